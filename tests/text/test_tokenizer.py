"""Ids and text against transformers, for every kind of tokenizer; text is data; bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daskllm.text import Tokenizer
from daskllm.types import ModelError, RowError
from tests.text import samples
from tests.text.conftest import Directory

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"

UNKNOWN = ("<unk>", "[UNK]")

TEXTS = [
    "Once upon a time there was a park.",
    "hello world",
    "今天天气很好，我们去公园。",
    "  two  spaces\n\nand lines \t",
    "",
    " ",
    "caf\u00e9 👩‍👩‍👧 🎉",
    "a < b > c | d [INS] <|im_ </ s>",
    "<0x0A> is a byte token's name",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_ids_are_those_of_transformers(directory: Directory, text: str, special: bool) -> None:
    expected = directory.theirs(text, add_special_tokens=special).input_ids
    assert directory.ours.encode(text, add_special_tokens=special) == expected


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip", [True, False])
def test_text_is_that_of_transformers(directory: Directory, text: str, skip: bool) -> None:
    ids = directory.theirs(text).input_ids
    assert directory.ours.decode(ids, skip_special_tokens=skip) == directory.theirs.decode(
        ids, skip_special_tokens=skip
    )


def test_attributes_are_those_of_transformers(directory: Directory) -> None:
    ours, theirs = directory.ours, directory.theirs
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.special_ids == {id_ for id_, token in theirs.added_tokens_decoder.items() if token.special}


def test_spelled_control_tokens_are_text(directory: Directory) -> None:
    theirs = directory.theirs
    for content, id_ in theirs.get_added_vocab().items():
        for text in (content, f"a {content} b", f"x{content}{content}y", f" {content}\n"):
            ids = directory.ours.encode(text, add_special_tokens=False)
            if content in UNKNOWN:
                continue  # what the vocabulary lacks becomes <unk>, in any text
            assert id_ not in ids, (content, text)


@pytest.mark.parametrize("kind", ["llama3", "qwen", "gpt2", "mistral"])
def test_spelled_control_tokens_come_back_as_they_were(kind: str, directories: dict[str, Directory]) -> None:
    ours = directories[kind].ours
    for content in directories[kind].theirs.get_added_vocab():
        text = f"so {content}a{content} end"
        assert ours.decode(ours.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_text_gives_a_special_id(data: st.DataObject, directories: dict[str, Directory]) -> None:
    directory = directories[data.draw(st.sampled_from(list(samples.KINDS)))]
    contents = list(directory.theirs.get_added_vocab())
    words = st.one_of(st.sampled_from(contents), st.text(max_size=4), st.sampled_from(["<", "|>", " ", "▁"]))
    text = "".join(data.draw(st.lists(words, max_size=8)))
    vocab = directory.theirs.get_added_vocab()
    added = {id_ for content, id_ in vocab.items() if content not in UNKNOWN}
    assert not added & set(directory.ours.encode(text, add_special_tokens=False))


def test_batch_is_one_by_one_and_keeps_bad_rows_apart(directory: Directory) -> None:
    texts = [*TEXTS, "bad \ud83d", "after"]
    batch = directory.ours.encode_batch(texts)
    assert isinstance(batch[len(TEXTS)], RowError)
    assert "U+D83D at position 4" in str(batch[len(TEXTS)])
    for text, ids in zip(texts, batch, strict=True):
        if text != "bad \ud83d":
            assert ids == directory.ours.encode(text)
    assert directory.ours.encode_batch([]) == []


def test_lone_surrogate_is_the_rows_error(directory: Directory) -> None:
    with pytest.raises(RowError, match=r"lone surrogate U\+DC00 at position 1"):
        directory.ours.encode("a\udc00")


def test_flags_do_not_override_the_post_processor(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}
    with_none = Directory(samples.write(tmp_path / "a", samples.byte_level(in_vocab=["<s>", "</s>"]), config))
    with_bos = Directory(
        samples.write(tmp_path / "b", samples.byte_fallback(), config | {"add_bos_token": False})
    )
    for directory in (with_none, with_bos):
        assert directory.ours.encode("hello") == directory.theirs("hello").input_ids
    assert with_bos.ours.encode("hello")[0] == with_bos.ours.bos_token_id


def test_config_adds_and_promotes_tokens(tmp_path: Path) -> None:
    tokenizer = samples.byte_level(["<s>"], ["<end>"])
    config = {"bos_token": "<s>", "eos_token": "<end>", "pad_token": "<pad>", "extra_special_tokens": ["<x>"]}
    directory = Directory(samples.write(tmp_path, tokenizer, config))
    ours, theirs = directory.ours, directory.theirs
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids == {id_ for id_, token in theirs.added_tokens_decoder.items() if token.special}
    ids = theirs("a<end>b<pad>c<x>").input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "abc"


def test_special_tokens_map_counts_where_the_config_lists_no_tokens(tmp_path: Path) -> None:
    tokens = {"bos_token": {"content": "<s>", "lstrip": False, "rstrip": False}, "eos_token": "</s>"}
    files = {"special_tokens_map.json": json.dumps(tokens)}
    directory = Directory(samples.write(tmp_path, samples.byte_fallback(), {}, files))
    assert directory.ours.bos_token_id == directory.theirs.bos_token_id == 1
    assert directory.ours.eos_token_id == directory.theirs.eos_token_id == 2


def test_padding_and_truncation_of_the_file_are_not_applied(tmp_path: Path) -> None:
    tokenizer = samples.byte_level()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    ours = Tokenizer.from_directory(samples.write(tmp_path, tokenizer))
    assert ours.decode(ours.encode("the little girl")) == "the little girl"
    assert len(ours.encode("the little girl")) < 64


def test_runs_of_spaces_that_a_vocabulary_adds_stay_words(tmp_path: Path) -> None:
    tokenizer = samples.byte_level()
    tokenizer.add_tokens(["  ", "\n\n"])
    directory = Directory(samples.write(tmp_path, tokenizer))
    text = "a  b\n\nthe park."
    ids = directory.theirs(text).input_ids
    assert directory.theirs.convert_tokens_to_ids("\n\n") in ids
    assert directory.ours.encode(text) == ids


def test_added_words_that_the_model_has_are_spelled_as_any_word(tmp_path: Path) -> None:
    tokenizer = samples.byte_level(["<s>"])
    word = "\u0120the"
    bare = Tokenizer.from_directory(samples.write(tmp_path / "bare", tokenizer))
    assert tokenizer.token_to_id(word) is not None
    tokenizer.add_tokens([word, "th", "<new>"])
    files = {"chat_template.jinja": "th<new>{{ messages[0].content }}"}
    directory = Directory(samples.write(tmp_path / "added", tokenizer, {}, files))
    assert directory.ours.vocab_size == len(directory.theirs)
    assert directory.ours.encode("in the park") == bare.encode("in the park")
    th, new = directory.theirs.convert_tokens_to_ids(["th", "<new>"])
    ids = directory.ours.encode_chat([{"role": "user", "content": "in the <new>"}])
    assert ids == [th, new, *bare.encode("in the <new>")]
    assert directory.ours.decode([th, new]) == "th<new>"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_file_is_named(tmp_path: Path, name: str) -> None:
    path = samples.write(tmp_path, samples.byte_level())
    (path / name).write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=name):
        Tokenizer.from_directory(path)


def test_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer.json in .*save_pretrained"):
        Tokenizer.from_directory(tmp_path)


def test_unknown_model_kind_is_refused(tmp_path: Path) -> None:
    path = samples.write(tmp_path, samples.byte_level())
    saved = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(saved | {"model": {"type": "Magic"}}))
    with pytest.raises(ModelError, match=r"tokenizer.json"):
        Tokenizer.from_directory(path)


def test_decoder_that_looks_around_is_refused(tmp_path: Path) -> None:
    path = samples.write(tmp_path, samples.byte_level())
    saved = json.loads((path / "tokenizer.json").read_text())
    saved["decoder"] = {"type": "BPEDecoder", "suffix": "</w>"}
    (path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(ModelError, match="decoder of type 'BPEDecoder'"):
        Tokenizer.from_directory(path)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K model is not here")
def test_a_real_tokenizer() -> None:
    directory = Directory(STORIES)
    for text in TEXTS:
        ids = directory.theirs(text).input_ids
        assert directory.ours.encode(text) == ids
        assert directory.ours.decode(ids) == directory.theirs.decode(ids, skip_special_tokens=True)
    assert directory.ours.encode("a<s>b").count(1) == 1
