"""From a question to the prompt that the policy continues: text, tokens, and what ends a completion.

Three kinds. r1_zero: a plain-text dialogue for base models that asks for <think> and <answer>, after the template of
DeepSeek-R1-Zero (arXiv 2501.12948, table 1), in our own words. chat: the tokenizer's chat template, with a system
message if the recipe names one. raw: the question itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rl.config import TemplateSection

R1_ZERO_TEXT = (
    "Below, a user puts a question to an assistant and the assistant works it out. The assistant first reasons inside "
    "<think> and </think>, then states nothing but the final result inside <answer> and </answer>, like this: "
    "<think> the reasoning </think> <answer> the result </answer>.\n"
    "User: {prompt}\n"
    "Assistant:"
)

# A base model does not know that its turn ends with the answer; left alone it goes on with the user's next question.
R1_ZERO_STOP_STRINGS = ("</answer>",)

Messages = list[dict[str, Any]]


class PromptTemplate:
    """Words and tokenises questions. Raises ValueError at construction for kind chat without a chat template."""

    def __init__(self, section: TemplateSection, tokenizer: PreTrainedTokenizerBase) -> None:
        if section.kind == "chat" and not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "data.template.kind = 'chat': this tokenizer has no chat template; allowed for it: r1_zero, raw"
            )
        self.section = section
        self.tokenizer = tokenizer

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end a completion under this template."""
        return R1_ZERO_STOP_STRINGS if self.section.kind == "r1_zero" else ()

    def text(self, question: str | Messages) -> str:
        """The prompt. A list of messages ({role, content}) is understood by kind chat only (TypeError otherwise)."""
        if self.section.kind == "chat":
            prompt = self.tokenizer.apply_chat_template(
                self._messages(question),
                tokenize=False,
                add_generation_prompt=True,
                **self.section.chat_template_kwargs,
            )
            assert isinstance(prompt, str)
            return prompt
        if not isinstance(question, str):
            raise TypeError(f"kind: {self.section.kind} needs text, got {type(question).__name__}")
        if self.section.kind == "raw":
            return question
        return (self.section.text or R1_ZERO_TEXT).replace("{prompt}", question)

    def token_ids(self, text: str) -> list[int]:
        """Tokens of a prompt. A chat template writes its own begin token; plain text gets the one that the tokenizer
        puts before a text, but never its end token, after which there would be nothing to continue."""
        token_ids = list(self.tokenizer(text, add_special_tokens=self.section.kind != "chat")["input_ids"])
        if self.section.kind != "chat" and token_ids and token_ids[-1] == self.tokenizer.eos_token_id:
            token_ids.pop()
        return token_ids

    def _messages(self, question: str | Messages) -> Messages:
        system = [] if self.section.system is None else [{"role": "system", "content": self.section.system}]
        if isinstance(question, str):
            wording = self.section.text or "{prompt}"
            return [*system, {"role": "user", "content": wording.replace("{prompt}", question)}]
        return [*system, *question]


def sampling_stops(
    template: TemplateSection,
    stop_strings: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: Sequence[int],
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(stop_token_ids, stop_strings) for `SamplingParams`: the tokens that end a text, and the recipe's strings
    (`rollout.stop_strings`) or, where it names none, those of the template. A string that is one token of the tokenizer
    stops by that token, which costs no decoding."""
    strings = PromptTemplate(template, tokenizer).stop_strings if stop_strings is None else tuple(stop_strings)
    token_ids = list(end_tokens)
    added = tokenizer.get_added_vocab()
    token_ids += [added[text] for text in strings if text in added and added[text] not in token_ids]
    return tuple(token_ids), tuple(text for text in strings if text not in added)
