"""Rows -> problems: checked, worded, tokenised, too long ones dropped or refused, held-out ones proved held out."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rl.config import DataSection, TemplateSection
from rl.data.sources import LocatedRow, read_rows
from rl.data.template import PromptTemplate
from rl.types import Problem

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ProblemSet(Sequence[Problem]):
    """Problems in the order of their rows. overlong: how many more were dropped because their prompt was too long."""

    problems: tuple[Problem, ...]
    split: Literal["train", "eval"]
    overlong: int = 0

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Problem:  # type: ignore[override]  # no slices: a set has one meaning
        return self.problems[index]

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.problems)


def load_problems(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, split: Literal["train", "eval"], *, seed: int = 0
) -> ProblemSet:
    """Read `data.train` or `data.eval`. Raises ValueError for the first row that is not right, with its place and
    column.

    Every problem has the same columns (None where its row had none), so that reward functions get whole lists; `prompt`
    among them is the question before the template. Its id is the column `id`, or "<split>/<row counted from 0>".
    """
    source = data.train if split == "train" else data.eval
    key = f"data.{split}"
    if source is None:
        raise ValueError(f"{key}: is missing in the recipe")
    template = PromptTemplate(data.template, tokenizer)
    rows = read_rows(source, key=key, seed=seed)
    names = list(dict.fromkeys(name for row in rows for name in row.columns))
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    overlong = 0
    for row in rows:
        problem = _problem(row, names, template, split, missing_answers=data.missing_answers)
        if problem.id in seen:
            raise ValueError(f"{row.place}: column 'id': {problem.id!r} occurs already in {seen[problem.id]}")
        seen[problem.id] = row.place
        if len(problem.prompt_ids) <= data.max_prompt_length:
            problems.append(problem)
            continue
        if data.overlong_prompts == "refuse":
            raise ValueError(
                f"{row.place}: the prompt has {len(problem.prompt_ids)} tokens, data.max_prompt_length allows "
                f"{data.max_prompt_length} (overlong_prompts: drop leaves such rows out)"
            )
        overlong += 1
    if not problems:
        raise ValueError(
            f"{key}: all {overlong} prompts are longer than data.max_prompt_length = {data.max_prompt_length}"
        )
    if overlong:
        logger.warning("%s: dropped %d of %d prompts over %d tokens", key, overlong, len(rows), data.max_prompt_length)
    return ProblemSet(tuple(problems), split, overlong)


def load_train_and_eval(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0
) -> tuple[ProblemSet, ProblemSet | None]:
    """Both sets of a recipe, after the proof that no held-out prompt is trained on."""
    train = load_problems(data, tokenizer, "train", seed=seed)
    if data.eval is None:
        return train, None
    held_out = load_problems(data, tokenizer, "eval", seed=seed)
    refuse_overlap([problem.prompt for problem in train], held_out, on_overlap=data.eval_overlap, key="data.train")
    return train, held_out


def refuse_overlap(
    trained_prompts: Sequence[str], held_out: ProblemSet, *, on_overlap: Literal["refuse", "warn"], key: str
) -> int:
    """How many held-out problems have a prompt that is also trained on, compared without case, white space and Unicode
    form.

    Raises ValueError if there are any and on_overlap is "refuse"; else warns. key: where the trained prompts come from.
    """
    trained = {normalise(prompt) for prompt in trained_prompts}
    both = [problem for problem in held_out if normalise(problem.prompt) in trained]
    if both:
        message = (
            f"{len(both)} of {len(held_out)} held-out problems (data.eval) are also trained on ({key}); the first: "
            f"{both[0].id}: {both[0].prompt[-200:]!r}"  # the template's words come before the question
        )
        if on_overlap == "refuse":
            raise ValueError(f"{message}. Remove them, or set data.eval_overlap: warn")
        logger.warning("%s", message)
    return len(both)


def normalise(prompt: str) -> str:
    """What two wordings of the same prompt have in common: NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def _problem(
    row: LocatedRow,
    names: Sequence[str],
    template: PromptTemplate,
    split: str,
    *,
    missing_answers: Literal["refuse", "allow"],
) -> Problem:
    question = question_in(row, template.section)
    columns = {name: row.columns.get(name) for name in names}
    if "answer" in columns and not (missing_answers == "allow" and columns["answer"] is None):
        columns["answer"] = _answer_in(row)
    text = template.text(question)
    token_ids = template.token_ids(text)
    refuse_unknown(row, "prompt", text, token_ids, template.tokenizer)
    return Problem(id=_id_in(row, split), prompt=text, prompt_ids=tuple(token_ids), columns=columns)


def question_in(row: LocatedRow, template: TemplateSection) -> str | list[dict[str, Any]]:
    """The prompt column: text that is not empty, or (kind: chat) messages with role and content."""
    value = row.columns.get("prompt")
    if template.kind == "chat" and isinstance(value, list):
        if value and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
            return value
        raise ValueError(f"{row.place}: column 'prompt': expected messages with role and content, got {value!r:.200}")
    return text_in(row, "prompt")


def text_in(row: LocatedRow, column: str) -> str:
    """A column that must be text that can be written as UTF-8, and not empty."""
    value = row.columns.get(column)
    if value is None:
        present = ", ".join(map(repr, row.columns)) or "none"
        raise ValueError(
            f"{row.place}: column {column!r} is missing; this row has: {present} "
            f"(columns: {{{column}: OTHER}} in the recipe takes it from another one)"
        )
    if not isinstance(value, str):
        raise ValueError(f"{row.place}: column {column!r} has the wrong type {type(value).__name__}; expected text")
    if not value.strip():
        raise ValueError(f"{row.place}: column {column!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{row.place}: column {column!r} is no text: half a character ({error})") from error
    return value


def refuse_unknown(
    row: LocatedRow, column: str, text: str, token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> None:
    """ValueError if the tokenizer has no token for a part of the text and wrote its unknown token instead."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in token_ids or str(tokenizer.unk_token) in text:
        return
    strange = sorted({c for c in text if unknown in tokenizer(c, add_special_tokens=False)["input_ids"]})
    raise ValueError(f"{row.place}: column {column!r}: the tokenizer does not know {''.join(strange)!r}")


def _answer_in(row: LocatedRow) -> str:
    """The reference answer as text; a whole number is written out exactly, other types are refused."""
    value = row.columns.get("answer")
    if value is None:
        raise ValueError(
            f"{row.place}: column 'answer' is missing or null (data.missing_answers: allow lets such rows through, for "
            "functions that do without)"
        )
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_in(row, "answer")


def _id_in(row: LocatedRow, split: str) -> str:
    value = row.columns.get("id")
    if value is None:
        return f"{split}/{row.index}"
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"{row.place}: column 'id': expected text or a whole number, got {value!r:.200}")
    return str(value)
