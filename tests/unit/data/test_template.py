"""Prompts word for word, and what ends a completion."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from rl.config import GeneratedTokenizer, TemplateSection
from rl.data.template import PromptTemplate, sampling_stops
from rl.data.tokenizer import build_tokenizer

CHAT = (
    "{% if enable_thinking %}[T]{% endif %}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(GeneratedTokenizer(type="bytes", special_tokens=("<think>", "</think>", "<answer>")))


def test_r1_zero_ends_where_the_assistant_begins(tokenizer: PreTrainedTokenizerFast) -> None:
    template = PromptTemplate(TemplateSection(), tokenizer)
    text = template.text("What is {x} + 1?")
    assert text.endswith("User: What is {x} + 1?\nAssistant:")
    assert all(tag in text for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    assert tokenizer.decode(template.token_ids(text)) == text


def test_own_wording_may_hold_braces(tokenizer: PreTrainedTokenizerFast) -> None:
    template = PromptTemplate(TemplateSection(kind="r1_zero", text="Q: {prompt} Use \\boxed{}. A:"), tokenizer)
    assert template.text("{prompt}?") == "Q: {prompt}? Use \\boxed{}. A:"


def test_raw_is_the_question(tokenizer: PreTrainedTokenizerFast) -> None:
    assert PromptTemplate(TemplateSection(kind="raw"), tokenizer).text(" 1+1=") == " 1+1="
    with pytest.raises(TypeError, match="kind: raw needs text"):
        PromptTemplate(TemplateSection(kind="raw"), tokenizer).text([{"role": "user", "content": "x"}])


def test_chat_uses_the_tokenizers_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        PromptTemplate(TemplateSection(kind="chat"), tokenizer)
    tokenizer.chat_template = CHAT
    section = TemplateSection(
        kind="chat", system="Be brief.", text="{prompt} Think.", chat_template_kwargs={"enable_thinking": True}
    )
    template = PromptTemplate(section, tokenizer)
    assert template.text("1+1?") == "[T]<system>Be brief.<user>1+1? Think.<assistant>"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert template.text(turns) == "[T]<system>Be brief.<user>a<assistant>b<user>c<assistant>"


def test_an_end_token_put_behind_a_prompt_is_taken_away(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers import processors

    bare = PromptTemplate(TemplateSection(kind="raw"), tokenizer).token_ids("ab")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)]
    )
    assert PromptTemplate(TemplateSection(kind="raw"), tokenizer).token_ids("ab") == [0, *bare]
    tokenizer.chat_template = CHAT  # a chat template writes its own begin token
    assert PromptTemplate(TemplateSection(kind="chat"), tokenizer).token_ids("ab") == bare


def test_stops(tokenizer: PreTrainedTokenizerFast) -> None:
    # "</answer>" is plain text for this tokenizer, "</think>" one token (4)
    assert sampling_stops(TemplateSection(), None, tokenizer, [1]) == ((1,), ("</answer>",))
    assert sampling_stops(TemplateSection(kind="raw"), None, tokenizer, [1, 9]) == ((1, 9), ())
    assert sampling_stops(TemplateSection(), (), tokenizer, [1]) == ((1,), ())
    assert sampling_stops(TemplateSection(), ("</think>", "User:", "<eos>"), tokenizer, [1]) == ((1, 4), ("User:",))
