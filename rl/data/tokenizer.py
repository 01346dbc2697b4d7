"""Tokenizers: the one of a checkpoint, or one made from an alphabet (or from all bytes) that a recipe names.

A made tokenizer is an ordinary `PreTrainedTokenizerFast`: it is saved beside the weights and opens with
`AutoTokenizer`. Its tokens are <pad> 0, <eos> 1, <unk> 2, the special strings, then the characters in the order of the
alphabet (or the 256 bytes). Decoding gives back exactly what was encoded, white space included.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rl.config import GeneratedTokenizer, ModelSection

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer that a recipe's model section names; it has an end token.

    Raises ValueError naming the key if it cannot be found or has no end token.
    """
    if isinstance(model.tokenizer, GeneratedTokenizer):
        return build_tokenizer(model.tokenizer)
    key = "model.name_or_path" if model.tokenizer is None else "model.tokenizer"
    name = model.tokenizer or model.name_or_path
    assert name is not None, "ModelSection demands a tokenizer where there is no checkpoint"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        what = "a folder that exists" if Path(name).exists() else "neither a folder here nor a reachable hub id"
        raise ValueError(f"{key} = {name!r}: no tokenizer could be loaded ({what}): {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{key} = {name!r}: this tokenizer has no end token (eos_token), so no completion could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_tokenizer(section: GeneratedTokenizer) -> PreTrainedTokenizerFast:
    """Make the tokenizer that the section describes."""
    reserved = [PAD, EOS, UNK, *section.special_tokens]
    alphabet = section.alphabet
    backend = _bytes(reserved) if alphabet is None else _characters(reserved, alphabet)
    # Added tokens are cut out before the model sees the text, so "<think>" is one token and never seven. Only the first
    # three are special: completions are decoded with skip_special_tokens, and the tags must survive that.
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, EOS, UNK)])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in section.special_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _characters(reserved: list[str], alphabet: str) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate([*reserved, *alphabet])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return backend


def _bytes(reserved: list[str]) -> Tokenizer:
    # ByteLevel writes each byte as one printable character; BPE without merges keeps them apart
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*reserved, *symbols])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend
