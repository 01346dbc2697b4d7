"""Rows for the cold start: (prompt, completion) pairs as tokens, with the loss on the completion and its end token
only."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rl.config import SFTSection, TemplateSection
from rl.data.problems import question_in, refuse_unknown, text_in
from rl.data.sources import LocatedRow, read_rows
from rl.data.template import PromptTemplate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SFTRow:
    """prompt: the worded prompt. token_ids: prompt, completion and end token. loss_mask: as long, 1 where token_ids[t]
    is to be learnt (its logprob given the tokens before it), 0 on the prompt."""

    prompt: str
    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SFTRows(Sequence[SFTRow]):
    """Rows in the order of their source. overlong: how many more were dropped because they were too long."""

    rows: tuple[SFTRow, ...]
    overlong: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> SFTRow:  # type: ignore[override]  # no slices: a set has one meaning
        return self.rows[index]

    def __iter__(self) -> Iterator[SFTRow]:
        return iter(self.rows)


def load_sft_rows(
    sft: SFTSection, template: TemplateSection, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0
) -> SFTRows:
    """Read `sft.data`, worded with the template of `data`. ValueError for the first bad row, with its place and column.

    Prompt and completion are tokenised apart and joined, as in a rollout, where the border between them is a border
    between tokens too.
    """
    wording = PromptTemplate(template, tokenizer)
    source_rows = read_rows(sft.data, key="sft.data", seed=seed)
    rows: list[SFTRow] = []
    overlong = 0
    for row in source_rows:
        made = _sft_row(row, wording)
        if len(made.token_ids) <= sft.max_length:
            rows.append(made)
            continue
        if sft.overlong_rows == "refuse":
            raise ValueError(
                f"{row.place}: prompt and completion have {len(made.token_ids)} tokens, sft.max_length allows "
                f"{sft.max_length} (overlong_rows: drop leaves such rows out)"
            )
        overlong += 1
    if not rows:
        raise ValueError(f"sft.data: all {overlong} rows are longer than sft.max_length = {sft.max_length}")
    if overlong:
        logger.warning("sft.data: dropped %d of %d rows over %d tokens", overlong, len(source_rows), sft.max_length)
    return SFTRows(tuple(rows), overlong)


def _sft_row(row: LocatedRow, wording: PromptTemplate) -> SFTRow:
    prompt = wording.text(question_in(row, wording.section))
    completion = text_in(row, "completion")
    prompt_ids = wording.token_ids(prompt)
    completion_ids = list(wording.tokenizer(completion, add_special_tokens=False)["input_ids"])
    refuse_unknown(row, "prompt", prompt, prompt_ids, wording.tokenizer)
    refuse_unknown(row, "completion", completion, completion_ids, wording.tokenizer)
    if completion_ids[-1] != wording.tokenizer.eos_token_id:
        completion_ids.append(int(wording.tokenizer.eos_token_id))
    return SFTRow(prompt, (*prompt_ids, *completion_ids), (0,) * len(prompt_ids) + (1,) * len(completion_ids))
