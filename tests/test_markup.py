"""The HTML of notebooks: well formed, and no text in it is taken for markup."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest

from daskllm import markup
from daskllm.markup import HTML

NASTY = "<script>alert('&')</script>\""


def words(html: str) -> str:
    """What a reader sees; fails where tags do not match."""
    return " ".join("".join(ET.fromstring(f"<body>{html}</body>").itertext()).split())


@pytest.mark.parametrize(
    "made",
    [
        lambda text: markup.card(text, markup.quote(text), note=text),
        lambda text: markup.facts([(text, text)]),
        lambda text: markup.table([text], [[text], [markup.bar(0.3, text)]]),
        lambda text: markup.details(text, markup.quote(text)),
        lambda text: markup.progress(0.5, text),
        lambda text: markup.strip([(text, 1.0, 0), ("other", 2.0, 9)]) + markup.quote(text),
    ],
)
def test_text_is_never_markup(made: Callable[[str], str]) -> None:
    html = made(NASTY)
    assert "<script" not in html
    assert words(html).count("alert('&')") >= 1


def test_what_is_html_already_is_left_alone() -> None:
    assert words(markup.facts([("a", HTML("<b>bold</b>"))])) == "abold"
    assert "<b>bold</b>" in markup.table(["a"], [[HTML("<b>bold</b>")]])


@pytest.mark.parametrize(("share", "width"), [(-1.0, "0.0"), (0.25, "25.0"), (7.0, "100.0")])
def test_a_bar_stays_within_its_frame(share: float, width: str) -> None:
    assert f"width:{width}%" in markup.bar(share)


def test_parts_of_nothing_are_a_strip_all_the_same() -> None:
    assert words(markup.strip([("a", 0.0, 0)])) == ""
    assert words(markup.strip([])) == ""


def test_words_keep_the_colour_of_their_page() -> None:
    parts = [markup.quote("a"), markup.facts([("b", "c")]), markup.table(["d"], [["e"]]), markup.bar(1, "f")]
    styles = re.findall('style="([^"]*)"', markup.card("title", *parts, note="note"))
    assert not any(rule.strip().startswith("color:") for style in styles for rule in style.split(";"))
