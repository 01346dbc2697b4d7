"""Made tokenizers: one token per character (or byte), exact round trips, and at home in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rl.config import GeneratedTokenizer, ModelSection
from rl.data.tokenizer import build_tokenizer, load_tokenizer

CHARACTERS = GeneratedTokenizer(type="characters", alphabet="0123456789+-*=;abcdefg \n")
BYTES = GeneratedTokenizer(type="bytes")
HOSTILE = "  Héllo\r\n\tx’s 🙂<think>a  b </think><answer>\u2028</answer> <eos><pad>  ,.! n't \x00"


def test_tokens_of_a_character_tokenizer_worked_out_by_hand() -> None:
    tokenizer = build_tokenizer(CHARACTERS)
    # 0 <pad>, 1 <eos>, 2 <unk>, 3-6 the tags, then the alphabet: digits from 7, + 17, - 18, * 19, = 20, ; 21, a 22
    assert tokenizer("a5+1=<think>6</think>")["input_ids"] == [22, 12, 17, 8, 20, 3, 13, 4]
    assert tokenizer("5é<eos>")["input_ids"] == [12, 2, 1]
    assert len(tokenizer) == 3 + 4 + 24
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    "text", ["a5 \n b-2=", "<think>a5;b5-2=3</think><answer>3</answer><eos>", " <think> ", "\n\n  a"]
)
def test_characters_round_trip(text: str) -> None:
    tokenizer = build_tokenizer(CHARACTERS)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_character_alone_is_one_token() -> None:
    tokenizer = build_tokenizer(CHARACTERS)
    assert CHARACTERS.alphabet is not None
    for character in CHARACTERS.alphabet:
        assert len(tokenizer(character)["input_ids"]) == 1
        assert tokenizer.decode(tokenizer(character)["input_ids"]) == character


def test_bytes_round_trip_anything() -> None:
    tokenizer = build_tokenizer(BYTES)
    assert len(tokenizer) == 3 + 4 + 256
    assert tokenizer.decode(tokenizer(HOSTILE)["input_ids"]) == HOSTILE
    assert len(tokenizer("é€")["input_ids"]) == 5
    assert tokenizer.unk_token_id not in tokenizer("".join(map(chr, range(0x2000))))["input_ids"]


def test_tags_survive_skip_special_tokens_and_the_end_does_not() -> None:
    tokenizer = build_tokenizer(CHARACTERS)
    ids = tokenizer("<think>a</think><answer>5</answer><eos><pad>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think><answer>5</answer>"


@pytest.mark.parametrize("section", [CHARACTERS, BYTES], ids=lambda section: section.type)
def test_saved_tokenizers_open_in_transformers(tmp_path: Path, section: GeneratedTokenizer) -> None:
    tokenizer = build_tokenizer(section)
    tokenizer.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    text = "a5b-2=<think>a5;b5-2=3</think><answer>3</answer><eos>  \n"
    assert opened(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert opened.decode(opened(text)["input_ids"]) == text
    assert (opened.pad_token_id, opened.eos_token_id, len(opened)) == (0, 1, len(tokenizer))
    loaded = load_tokenizer(ModelSection(name_or_path=str(tmp_path)))
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.tokenizer = .*no tokenizer could be loaded \(a folder that exists\)"):
        load_tokenizer(ModelSection(name_or_path="x", tokenizer=str(tmp_path)))


def test_a_tokenizer_without_an_end_is_refused_and_padding_is_filled_in(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(CHARACTERS)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "no_pad")
    assert load_tokenizer(ModelSection(name_or_path=str(tmp_path / "no_pad"))).pad_token_id == 1
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no_end")
    with pytest.raises(ValueError, match=r"model\.name_or_path = .*has no end token"):
        load_tokenizer(ModelSection(name_or_path=str(tmp_path / "no_end")))
