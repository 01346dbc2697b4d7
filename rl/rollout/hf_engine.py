"""Rollouts with transformers' `generate`, for policies that are not of our own architecture (Qwen, Llama, ...).

Same protocol as `rl.rollout.engine.Engine`: one group per request, stop token kept, the log-probability of each token
under the distribution it was drawn from. `generate` runs the model and its cache; the draw is ours, in a logits
processor that leaves only the drawn token, so noise depends on (row seed, step, token id) as in the in-process engine
and torch's generators are not used. What cannot be had here: a prompt is prefilled once per row, rows of a batch run
until the last of them has ended, there are no routes, and since prompts are padded on the left, a completion's logits
depend on its batch by rounding (about 1e-6 in fp32): equal seeds give equal tokens unless two candidates tie that
closely.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from rl.rollout.engine import OnGroup, check_requests
from rl.rollout.sampling import Sampler, to_int64
from rl.rollout.stop_strings import StopStrings
from rl.types import Completion, RolloutGroup, RolloutRequest, SamplingParams


class HFEngine:
    """policy: rl.policy.hf.HFPolicy, or a transformers causal LM. max_batch_size: rows of one `generate` (None: all).
    decode_text: token ids -> text, needed for stop strings. `stats` describes the last `generate`."""

    def __init__(
        self,
        policy: Any,
        *,
        max_batch_size: int | None = None,
        decode_text: Callable[[list[int]], str] | None = None,
    ) -> None:
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(f"rollout.max_batch_size = {max_batch_size}: must be at least 1, or null for all rows")
        self.policy, self.max_batch_size, self.decode_text = policy, max_batch_size, decode_text
        self.stats: dict[str, float | int] = {}

    @torch.no_grad()
    def generate(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, *, on_group: OnGroup | None = None
    ) -> list[RolloutGroup]:
        """See `rl.types.RolloutEngine`. Rows go in batches of at most `max_batch_size`, shortest prompts first. Dropout
        is off meanwhile; the policy's mode is put back."""
        check_requests(requests, params)
        stops = None
        if params.stop_strings:
            if self.decode_text is None:
                raise ValueError("SamplingParams.stop_strings is set, but the engine was given no decode_text")
            stops = StopStrings(params.stop_strings, self.decode_text)
        sampler = Sampler.from_params(params)
        model = getattr(self.policy, "inner", self.policy)
        started, modes = time.perf_counter(), [(module, module.training) for module in model.modules()]
        rows = sorted(
            ((i, k) for i, request in enumerate(requests) for k in range(len(request.seeds))),
            key=lambda row: len(requests[row[0]].problem.prompt_ids),
        )
        size = self.max_batch_size or max(len(rows), 1)
        done: list[dict[int, Completion]] = [{} for _ in requests]
        groups: list[RolloutGroup | None] = [None] * len(requests)
        model.eval()
        # A checkpoint's generation_config fills whatever ours leaves open (repetition penalty, stop tokens, ...).
        habits, model.generation_config = model.generation_config, GenerationConfig()
        try:
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                prompts = [requests[i].problem.prompt_ids for i, _ in batch]
                seeds = [requests[i].seeds[k] for i, k in batch]
                for (i, k), completion in zip(
                    batch, _sample(model, prompts, seeds, params, sampler, stops), strict=True
                ):
                    done[i][k] = completion
                    if len(done[i]) == len(requests[i].seeds):
                        completions = [done[i][j] for j in range(len(done[i]))]
                        complete = groups[i] = RolloutGroup(requests[i].problem, completions)
                        if on_group is not None:
                            on_group(i, complete)
        finally:
            model.generation_config = habits
            for module, training in modes:
                module.training = training
        seconds = time.perf_counter() - started
        tokens = sum(len(completion.token_ids) for group in done for completion in group.values())
        self.stats = {
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "max_batch": min(size, len(rows)),
        }
        return [group for group in groups if group is not None]


def _sample(
    model: Any,
    prompts: list[tuple[int, ...]],
    seeds: list[int],
    params: SamplingParams,
    sampler: Sampler,
    stops: StopStrings | None,
) -> list[Completion]:
    """One batch through `generate`, one completion per prompt."""
    if params.max_completion_length == 0:
        return [Completion([], torch.zeros(0), "length") for _ in prompts]
    device = model.get_output_embeddings().weight.device
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    real = torch.arange(width, device=device) >= width - torch.tensor([[len(p)] for p in prompts], device=device)
    recorder = _Recorder(sampler, torch.tensor([to_int64(seed) for seed in seeds], device=device), width)
    ends = _Ends(width, params, stops)
    config = GenerationConfig(
        max_new_tokens=params.max_completion_length, do_sample=False, num_beams=1, use_cache=True, pad_token_id=0
    )
    output = model.generate(
        input_ids=ids,
        attention_mask=real.long(),
        generation_config=config,
        logits_processor=LogitsProcessorList([recorder]),
        stopping_criteria=StoppingCriteriaList([ends]),
        # Under ZeRO-3 `generate` would keep ranks in step, for ever if one has fewer batches; weights are whole here.
        synced_gpus=False,
    )
    tokens = output[:, width:].tolist()
    logprobs = torch.stack(recorder.logprobs, dim=1).cpu()
    completions = []
    for row, row_tokens in enumerate(tokens):
        length = ends.lengths.get(row)
        row_tokens = row_tokens[:length]
        completions.append(
            Completion(row_tokens, logprobs[row, : len(row_tokens)].clone(), "length" if length is None else "stop")
        )
    return completions


class _Recorder(LogitsProcessor):
    """Draws each row's token and leaves it as the only candidate; keeps its log-probability."""

    def __init__(self, sampler: Sampler, seeds: torch.Tensor, prompt_width: int) -> None:
        self._sampler, self._seeds, self._prompt_width = sampler, seeds, prompt_width
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = torch.full_like(self._seeds, input_ids.shape[1] - self._prompt_width)
        tokens, logprobs = self._sampler(scores, self._seeds, step)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


class _Ends(StoppingCriteria):
    """lengths: by row, the tokens of a completion that was stopped (rows missing here ran into the length limit)."""

    def __init__(self, prompt_width: int, params: SamplingParams, stops: StopStrings | None) -> None:
        self._prompt_width, self._stops = prompt_width, stops
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        length = input_ids.shape[1] - self._prompt_width
        last = input_ids[:, -1].tolist()
        for row, token in enumerate(last):
            if row in self.lengths:
                continue
            if self._stops is not None:
                cut = self._stops.cut(input_ids[row, self._prompt_width :].tolist(), length - 1)
                if cut is not None:
                    self.lengths[row] = cut
                    continue
            if token in self._stop_token_ids:
                self.lengths[row] = length
        return torch.tensor([row in self.lengths for row in range(len(last))], device=input_ids.device)
