"""The Grafana dashboard asks for what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from distributed import Client, LocalCluster

import daskllm
from daskllm.dashboard import metrics
from tests.dashboard.conftest import address, asked, got, rows
from tests.dashboard.test_plugins import samples
from tests.waiting import eventually

GRAFANA = Path(__file__).resolve().parents[2] / "cluster/grafana"
BOARD = json.loads((GRAFANA / "daskllm.json").read_text())
QUERIES = [(panel["title"], target) for panel in BOARD["panels"] for target in panel["targets"]]
_PROMETHEUS = {"instance", "job"}
"""Labels that Prometheus adds by itself."""


@pytest.mark.cluster
def test_each_query_is_of_a_metric_that_is_there_with_the_labels_that_it_names(
    cluster: LocalCluster, client: Client, llm: daskllm.LLM
) -> None:
    table = rows(30)
    table.loc[3, "text"] = None
    client.compute(asked(llm, table)).result()
    workers = client.scheduler_info()["workers"].values()
    pages = [address(cluster), *(f"http://{w['host']}:{w['services']['dashboard']}" for w in workers)]

    def there() -> dict[str, set[str]]:
        """Metric -> its labels, of those that have a value on some endpoint."""
        found: dict[str, set[str]] = {}
        for page in pages:
            for name, labels in samples(got(f"{page}/metrics")):
                found.setdefault(name, set()).update(label for label, _ in labels)
        return found

    named = {name for _, query in QUERIES for name in re.findall(r"daskllm_\w+", query["expr"])}
    eventually(lambda: named <= set(there()))
    found = there()
    for title, query in QUERIES:
        (*others, name) = re.findall(r"daskllm_\w+", query["expr"])
        grouped = {g.strip() for by in re.findall(r"by \(([^)]*)\)", query["expr"]) for g in by.split(",")}
        shown = set(re.findall(r"\{\{(\w+)\}\}", query["legendFormat"]))
        # What is summed away cannot be shown; what is not summed has its own labels.
        has = grouped if "sum" in query["expr"] else found[name] | _PROMETHEUS
        assert grouped <= found[name], title
        assert shown <= has, title
        assert all(found[other] == found[name] for other in others), title


def test_panels_do_not_overlap_and_have_titles() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    titles = [panel["title"] for panel in BOARD["panels"]]
    assert all(titles)
    assert len(set(titles)) == len(titles)
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(titles)


def test_the_table_of_metrics_is_up_to_date_and_the_scrapes_are_yaml() -> None:
    assert metrics.table() in (GRAFANA / "README.md").read_text()
    assert len(yaml.safe_load((GRAFANA / "prometheus.yaml").read_text())["scrape_configs"]) == 2
