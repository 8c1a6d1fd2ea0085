"""The Kubernetes manifests: against the schemas that the Dask operator installs, and their commands."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from distributed import Client

from tests.cluster_files.running import CLUSTER, free_port, here, running

MANIFESTS: dict[str, dict[str, Any]] = {
    f"{one['kind']} {one['metadata']['name']}": one
    for file in sorted((CLUSTER / "kubernetes").glob("*.yaml"))
    for one in yaml.safe_load_all(file.read_text())
}
CUSTOM = [name for name, one in MANIFESTS.items() if one["apiVersion"] == "kubernetes.dask.org/v1"]
SCHEDULER = MANIFESTS["DaskCluster daskllm"]["spec"]["scheduler"]
WORKERS = {
    "cpu": MANIFESTS["DaskCluster daskllm"]["spec"]["worker"],
    "gpu": MANIFESTS["DaskWorkerGroup daskllm-gpu"]["spec"]["worker"],
}


def crd(kind: str) -> dict[str, Any]:
    operator = Path(sys.prefix) / "schemas/dask_kubernetes/operator"
    if not operator.exists():
        pytest.skip("the operator's schemas are not here: make setup")
    folder = operator / "deployment/helm/dask-kubernetes-operator/crds"
    definition = yaml.safe_load((folder / f"{kind.lower()}.yaml").read_text())
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


def unknown(value: Any, schema: dict[str, Any], where: str = "") -> Iterator[str]:
    """Fields that a schema does not have; Kubernetes would drop them without a word."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from unknown(item, schema.get("items", {}), f"{where}[{number}]")
    elif isinstance(value, dict) and ("properties" in schema or "additionalProperties" in schema):
        for name, item in value.items():
            below = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            if below is None and not schema.get("x-kubernetes-preserve-unknown-fields"):
                yield f"{where}.{name}"
            yield from unknown(item, below if isinstance(below, dict) else {}, f"{where}.{name}")


def test_there_is_what_readme_names() -> None:
    assert sorted(CUSTOM) == ["DaskAutoscaler daskllm", "DaskCluster daskllm", "DaskWorkerGroup daskllm-gpu"]
    assert sum(one["kind"] == "NetworkPolicy" for one in MANIFESTS.values()) == 2


@pytest.mark.parametrize("name", CUSTOM)
def test_the_operator_takes_it(name: str) -> None:
    manifest = MANIFESTS[name]
    schema = crd(manifest["kind"])
    jsonschema.validate(manifest, schema)
    spec = schema["properties"]["spec"]
    assert list(unknown(manifest["spec"], spec, "spec")) == []
    # The check itself sees a slip of the pen.
    assert list(unknown({**manifest["spec"], "replicsa": 1}, spec, "spec")) == ["spec.replicsa"]


@pytest.mark.parametrize("pod", [SCHEDULER["spec"], *(one["spec"] for one in WORKERS.values())])
def test_pods_are_bounded_probed_and_unprivileged(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
    assert "memory" in container["resources"]["limits"]
    ports = {port["name"] for port in container["ports"]}
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/health"
        assert container[probe]["httpGet"]["port"] in ports
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not pod["automountServiceAccountToken"]
    claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(claims)
    assert all(f"PersistentVolumeClaim {claim}" in MANIFESTS for claim in claims.values())


def test_the_gpu_group_belongs_to_the_cluster_and_differs_in_what_a_gpu_needs() -> None:
    group, cpu = MANIFESTS["DaskWorkerGroup daskllm-gpu"], WORKERS["cpu"]["spec"]["containers"][0]
    gpu = group["spec"]["worker"]["spec"]["containers"][0]
    assert group["spec"]["cluster"] == MANIFESTS["DaskCluster daskllm"]["metadata"]["name"]
    assert gpu["args"] == cpu["args"]
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert gpu["image"] != cpu["image"]


def test_the_policies_are_for_the_labels_that_the_operator_sets() -> None:
    name = MANIFESTS["DaskCluster daskllm"]["metadata"]["name"]
    for component in ("scheduler", "worker"):
        policy = MANIFESTS[f"NetworkPolicy daskllm-{component}{'s' if component == 'worker' else ''}"]["spec"]
        labels = {"dask.org/cluster-name": name, "dask.org/component": component}
        assert policy["podSelector"]["matchLabels"] == labels
        assert policy["policyTypes"] == ["Ingress"]
        # Nobody gets in by an empty selector.
        sources = [source for rule in policy["ingress"] for source in rule["from"]]
        assert all(selector["matchLabels"] for source in sources for selector in source.values())
    service = SCHEDULER["service"]
    assert service["type"] == "ClusterIP"
    assert service["selector"] == {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}


@pytest.mark.cluster
def test_the_commands_start_a_cluster_whose_probes_answer(tmp_path: Path) -> None:
    port, dashboard, health = (str(free_port()) for _ in range(3))
    scheduler = here(
        SCHEDULER["spec"]["containers"][0]["args"],
        {"0.0.0.0": "127.0.0.1", "8786": port, ":8787": f"127.0.0.1:{dashboard}"},
    )
    changes = {"$(DASK_WORKER_NAME)": "daskllm-default-worker-1", ":8788": f"127.0.0.1:{health}"}
    worker = here(WORKERS["cpu"]["spec"]["containers"][0]["args"], changes)
    # The operator tells workers of their scheduler by this.
    there = {"DASK_SCHEDULER_ADDRESS": f"tcp://127.0.0.1:{port}"}
    with ExitStack() as stack:
        stack.enter_context(running(scheduler, tmp_path))
        stack.enter_context(running(worker, tmp_path, **there))
        client = stack.enter_context(Client(there["DASK_SCHEDULER_ADDRESS"], timeout="30s"))
        client.wait_for_workers(1, timeout=60)
        (known,) = client.scheduler_info()["workers"].values()
        assert (known["name"], known["nthreads"], known["memory_limit"]) == (
            changes["$(DASK_WORKER_NAME)"],
            2,
            0,
        )
        for listening in (dashboard, health):
            with urllib.request.urlopen(f"http://127.0.0.1:{listening}/health", timeout=10) as reply:
                assert reply.status == 200
        with urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/llm", timeout=10) as page:
            assert page.status == 200
