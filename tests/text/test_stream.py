"""Pieces of a stream against the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daskllm.text import Detokenizer, Tokenizer
from tests.text import samples
from tests.text.conftest import Directory

TEXTS = ["今天天气很好。", "👩‍👩‍👧 and 🎉!", "caf\u00e9 hello world", "\U0001f1eb\U0001f1f7 中文 mixed"]


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = Detokenizer(tokenizer)
    return [*(stream.push(id_) for id_ in ids), stream.flush()]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_text(data: st.DataObject, directories: dict[str, Directory]) -> None:
    ours = directories[data.draw(st.sampled_from(list(samples.KINDS)))].ours
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 3), max_size=30))
    assert "".join(pieces_of(ours, ids)) == ours.decode(ids)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_well_formed_text_is_that_of_transformers(
    data: st.DataObject, directories: dict[str, Directory]
) -> None:
    directory = directories[data.draw(st.sampled_from(list(samples.KINDS)))]
    ids = data.draw(st.lists(st.integers(0, directory.ours.vocab_size - 1), max_size=12))
    expected = directory.theirs.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in expected:
        assert directory.ours.decode(ids) == expected


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_byte_level_text_is_that_of_transformers_up_to_its_end(
    data: st.DataObject, directories: dict[str, Directory]
) -> None:
    directory = directories["qwen"]
    ids = data.draw(st.lists(st.integers(0, directory.ours.vocab_size - 1), max_size=12))
    whole = directory.theirs.decode(ids, skip_special_tokens=True)
    assert whole in (directory.ours.decode(ids), directory.ours.decode(ids) + "\ufffd")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["llama3", "gpt2", "mistral", "mistral-first"])
def test_no_piece_and_no_cut_text_holds_half_a_character(
    kind: str, text: str, directories: dict[str, Directory]
) -> None:
    ours = directories[kind].ours
    ids = ours.encode(text)
    pieces = pieces_of(ours, ids)
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
    for end in range(len(ids)):
        assert text.startswith(ours.decode(ids[:end]))
    assert pieces.count("") < len(pieces)


def test_a_finished_character_is_shown_at_once(directories: dict[str, Directory]) -> None:
    ours = directories["mistral"].ours
    ids = ours.encode("🎉", add_special_tokens=False)[-4:]
    assert [piece for piece in pieces_of(ours, ids) if piece] == ["🎉"]
    assert pieces_of(ours, ids)[3] == "🎉"


def test_bytes_that_are_no_character_do_not_hold_the_rest_back(directories: dict[str, Directory]) -> None:
    ours = directories["mistral"].ours
    byte = ours.encode("🎉", add_special_tokens=False)[-4]
    a = ours.encode("a", add_special_tokens=False)[-1]
    stream = Detokenizer(ours)
    assert stream.push(byte) == ""
    assert stream.push(a).startswith("\ufffd")


def test_a_stream_can_be_used_again_after_its_end(directories: dict[str, Directory]) -> None:
    ours = directories["mistral"].ours
    ids = ours.encode("Once upon", add_special_tokens=False)
    stream = Detokenizer(ours)
    for _ in range(2):
        assert "".join(map(stream.push, ids)) + stream.flush() == "Once upon"
