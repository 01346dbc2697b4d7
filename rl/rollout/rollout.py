"""One call of `Engine.generate`, from its requests to its groups: the loop that decodes, looks, and fills up.

A turn of the loop: the scheduler takes ended rows out and says who comes, `_apply` queues it, `_decode` queues steps,
`_take_ended` reads a look and hands completions out. With `look_behind` the look was taken before those steps, so a
device works on them while the host reads. What the host must know meanwhile (`longest`, `shortest`) are bounds, counted
up by the steps queued since. There, prompts of rows to come are prefilled beside steps (`Scheduler.prefetch`).
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from rl.rollout import ops
from rl.rollout.arena import Zeros
from rl.rollout.cache import CacheShape, LatentCache, free_memory, plan_cache
from rl.rollout.decode import Stepper, TorchStepper
from rl.rollout.prefill import Prefill
from rl.rollout.sampling import Sampler
from rl.rollout.scheduler import Group, Row, Scheduler, Turnover
from rl.rollout.state import FinishedRow, Look, RowState
from rl.rollout.stop_strings import StopStrings
from rl.rollout.transfer import Mark, aside, to_device
from rl.types import Completion, RolloutGroup, RolloutRequest, SamplingParams

if TYPE_CHECKING:
    from rl.rollout.engine import Engine, OnGroup

INVARIANT_ROWS = 256  # of every step on a GPU with batch_invariant, unless max_batch_size says otherwise


class Rollout:
    """Owns the cache and everything else that lives as long as the call. `run` once, then read `stats`."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[RolloutRequest],
        params: SamplingParams,
        on_group: OnGroup | None,
        zeros: Zeros,
    ) -> None:
        self.started = time.perf_counter()
        self.engine, self.params, self.on_group = engine, params, on_group
        policy = engine.policy
        self.device = policy.lm_head.weight.device
        self.fixed_rows = self._fixed_rows()
        self.sampler = Sampler.from_params(params)
        self.stop_strings: StopStrings | None = None
        if params.stop_strings:
            if engine.decode_text is None:
                raise ValueError("SamplingParams.stop_strings is set, but the engine was given no decode_text")
            self.stop_strings = StopStrings(params.stop_strings, engine.decode_text)
        longest_prompt = max(len(request.problem.prompt_ids) for request in requests)
        limit = max(params.max_completion_length, 1)
        routes_shape, routes_dtype = _routes_layout(policy.config)
        self.row_multiple = self.fixed_rows or 1
        if engine.batch_invariant and self.device.type == "cpu":
            # With a multiple of this many rows no elementwise loop ends within a row (see `ops.invariant_rows`).
            self.row_multiple = ops.invariant_rows(policy.config.n_routed_experts or 1)
        shape = self._cache_shape(requests, longest_prompt, limit, routes_shape, routes_dtype)
        config, dtype = policy.config, policy.lm_head.weight.dtype
        self.cache = LatentCache(
            shape, layers=config.num_hidden_layers, width=config.cache_width, dtype=dtype, zeros=zeros
        )
        self.state = RowState(
            shape.slots,
            limit=limit,
            stop_token_ids=params.stop_token_ids,
            routes_shape=routes_shape,
            routes_dtype=routes_dtype,
            zeros=zeros,
        )
        self.stepper = self._make_stepper(shape.prompt_tokens + limit, zeros)
        self.prefill = Prefill(
            policy,
            self.cache,
            column_order=self.stepper.column_order(),
            chunk_tokens=engine.prefill_tokens,
            routes_dtype=routes_dtype,
            one_by_one=engine.batch_invariant,
            lean=self.stepper.lean_prefill(routes_dtype),
        )
        drawn = engine.limit_of
        self.scheduler = Scheduler(
            requests,
            slots=min(shape.slots, self._most_rows(requests)),
            prompt_slots=shape.prompt_slots,
            limit_of=lambda request, k: limit if drawn is None else min(drawn(request, k), limit),
            admit_at_least=max(1, shape.slots // 8),
            ahead=max(1, shape.slots // 8) if engine.look_behind else 0,
        )
        self.prompt_routes: dict[int, torch.Tensor] = {}
        self.groups: list[RolloutGroup | None] = [None] * len(requests)
        self.tokens = self.kept_steps = self.steps = self.row_steps = self.max_rows = 0
        self.longest, self.shortest = 0, 1  # own tokens in the cache of the longest row; sampled tokens of the shortest
        self.prefills: list[tuple[Mark, Mark, bool]] = []  # begin, end, whether rows waited for it
        self.arriving: dict[int, Mark] = {}  # by prompt slot: when its prefill is done
        self.first_token_s = self.seconds = 0.0
        self.made = Mark(self.device)
        self.set_up_s = time.perf_counter() - self.started

    def _make_stepper(self, positions: int, zeros: Zeros) -> Stepper:
        policy = self.engine.policy
        if self.engine.plain_because is None:
            from rl.rollout.cuda import CudaStepper  # imports triton

            return CudaStepper(
                policy, self.cache, self.state, self.sampler, positions=positions, keeper=self.engine.graph_keeper(),
                zeros=zeros, one_size=self.fixed_rows is not None,
            )  # fmt: skip
        return TorchStepper(
            policy, self.cache, self.state, self.sampler, positions=positions, row_multiple=self.row_multiple
        )

    def _cache_shape(
        self,
        requests: Sequence[RolloutRequest],
        longest_prompt: int,
        limit: int,
        routes_shape: tuple[int, int] | None,
        routes_dtype: torch.dtype,
    ) -> CacheShape:
        engine, config = self.engine, self.engine.policy.config
        element = engine.policy.lm_head.weight.element_size()
        plan = functools.partial(
            plan_cache,
            requests=len(requests),
            group=max(len(request.seeds) for request in requests),
            rows=self._most_rows(requests),
            own_tokens=limit,
            token_bytes=config.num_hidden_layers * config.cache_width * element,
            row_bytes=RowState.row_bytes(limit, routes_shape, routes_dtype),
            prompt_bytes=config.vocab_size * element,
            budget=engine.cache_bytes if engine.cache_bytes is not None else free_memory(self.device),
            row_multiple=self.row_multiple,
        )
        shape = plan(prompt_tokens=longest_prompt)
        if engine.plain_because is None and longest_prompt < engine.longest_prompt:
            with contextlib.suppress(ValueError):  # such prompts do not fit beside these completions
                wide = plan(prompt_tokens=engine.longest_prompt)  # captured graphs want the same lengths each time
                if (wide.slots, wide.prompt_slots) == (shape.slots, shape.prompt_slots):
                    return wide
        engine.longest_prompt = max(engine.longest_prompt, longest_prompt)
        return shape

    def _most_rows(self, requests: Sequence[RolloutRequest]) -> int:
        rows = sum(len(request.seeds) for request in requests)
        most = self.fixed_rows or self.engine.max_batch_size
        return rows if most is None else min(rows, most)

    def _fixed_rows(self) -> int | None:
        """Rows of every step, where equal bits need the same number always."""
        if not self.engine.batch_invariant or self.device.type == "cpu":
            return None
        reason = self.engine.plain_because
        if reason is not None:
            raise ValueError(f"rollout.batch_invariant = True: on a GPU it needs the Triton kernels, but {reason}")
        return self.engine.max_batch_size or INVARIANT_ROWS

    def run(self) -> list[RolloutGroup]:
        """The groups of all requests, in their order."""
        ended: list[int] = []
        while True:
            self._apply(self.scheduler.turn_over(ended))
            if not self.scheduler.rows:
                break
            if self.engine.look_behind:
                look = Look(self.state, len(self.scheduler.rows))
                steps = self._decode()
                self._prefill(self.scheduler.prefetch(), waited_for=False)
                ended = self._take_ended(look, steps_since=steps)
            else:
                self._decode()
                ended = self._take_ended(Look(self.state, len(self.scheduler.rows)), steps_since=0)
        Mark(self.device).wait()  # captured steps end with the rollout: none may be under way
        self.seconds = time.perf_counter() - self.started
        assert all(group is not None for group in self.groups)
        return [group for group in self.groups if group is not None]

    def _apply(self, turnover: Turnover) -> None:
        """Move rows into holes, prefill new prompts, start new rows with their first token. Only queues work."""
        if turnover.moves:
            source, target = to_device(turnover.moves, self.device, torch.int64).t()
            self.cache.move(source, target, self.longest + 1)
            self.state.move(source, target, self.longest + 1)
        self._prefill(turnover.new_prompts, waited_for=True)
        if turnover.new_rows:
            for slot in {row.prompt_slot for row in turnover.new_rows} & self.arriving.keys():
                self.arriving.pop(slot).hold()
            slots = self.state.start(turnover.new_rows)
            logits = self.prefill.logits.index_select(0, self.state.prompt_slot[slots])
            first = torch.zeros_like(slots)
            tokens, logprobs = self.stepper.draw(self.sampler, logits, self.state.seed[slots], first)
            self.state.record(slots, tokens, logprobs)
            self.shortest = 1
            if not self.first_token_s and not self.engine.look_behind:
                self.first_token_s = time.perf_counter() - self.started
        rows = self.scheduler.rows
        self.state.done[len(rows) :].fill_(True)  # vacated slots must stand still if they pad a step
        if rows and turnover.changed:
            slots_of = [row.group.prompt_slot for row in rows]
            self.stepper.regroup([slot or 0 for slot in slots_of], [len(row.group.prompt_ids) for row in rows])
            self.max_rows = max(self.max_rows, len(rows))

    def _prefill(self, groups: list[Group], *, waited_for: bool) -> None:
        """Queue it beside the steps. It overwrites prompts of groups whose rows have all ended: steps that are still
        under way may read those, but nothing of what comes of it is kept."""
        if not groups:
            return
        with aside(self.device, "prefill"):
            self.made.hold()
            began = Mark(self.device)
            self.prompt_routes |= self.prefill.run(groups)
            done = Mark(self.device)
        self.prefills.append((began, done, waited_for))
        self.arriving |= {group.prompt_slot: done for group in groups if group.prompt_slot is not None}

    def _decode(self) -> int:
        """steps_per_look steps, or fewer where no row can take as many, without looking at what they drew -> how
        many."""
        steps = max(min(self.engine.steps_per_look, self.state.limit - self.shortest), 0)
        self.stepper.advance(steps, self.longest + 1)
        self.longest += steps
        self.steps += steps
        self.row_steps += steps * len(self.scheduler.rows)
        return steps

    def _take_ended(self, look: Look, *, steps_since: int) -> list[int]:
        """Hand out the completions of the rows that had ended at the look -> their slots. steps_since: decode steps
        queued after it."""
        rows = self.scheduler.rows
        done, fed = look.read()
        if not self.first_token_s:
            self.first_token_s = time.perf_counter() - self.started
        lengths = [n + 1 for n in fed]
        self.longest = max(fed) + steps_since
        alive = (n for n, ended in zip(lengths, done, strict=True) if not ended)
        self.shortest = min(alive, default=self.state.limit) + steps_since
        with aside(self.device, "ended rows"):
            if self.stop_strings is not None:
                self._cut_at_stop_strings(lengths)
            ended = [slot for slot, row in enumerate(rows) if done[slot] or row.cut is not None]
            lengths = [rows[slot].cut or min(lengths[slot], self.params.max_completion_length) for slot in ended]
            finished = self.state.read(ended, lengths) if ended else []
        for slot, outputs in zip(ended, finished, strict=True):
            self._take(rows[slot], outputs)
        return ended

    def _cut_at_stop_strings(self, lengths: list[int]) -> None:
        assert self.stop_strings is not None
        rows = self.scheduler.rows
        tokens = self.state.out_tokens[: len(rows), : max(lengths)].tolist()
        for row, row_tokens, length in zip(rows, tokens, lengths, strict=True):
            row.cut = self.stop_strings.cut(row_tokens[:length], row.seen)
            row.seen = length

    def _take(self, row: Row, finished: FinishedRow) -> None:
        """A row has ended; when it was its group's last, the group is complete."""
        tokens = finished.tokens
        stopped = row.cut is not None or (bool(tokens) and tokens[-1] in self.params.stop_token_ids)
        group = row.group
        group.completions[row.k] = Completion(
            tokens, finished.logprobs, "stop" if stopped else "length", finished.routes
        )
        self.tokens += len(tokens)
        self.kept_steps += max(len(tokens) - 1, 0)  # the first token comes from the prompt
        if len(group.completions) == group.size:
            completions = [group.completions[k] for k in range(group.size)]
            routes = self.prompt_routes.pop(group.index, None)  # a part of a buffer for all prompts prefilled together
            complete = RolloutGroup(group.request.problem, completions, None if routes is None else routes.clone())
            self.groups[group.index] = complete
            if self.on_group is not None:
                self.on_group(group.index, complete)

    def stats(self) -> dict[str, Any]:
        """What `Engine.stats` says."""
        prefills = [(end.seconds_since(begin), waited_for) for begin, end, waited_for in self.prefills]
        return {
            "backend": self.stepper.name,
            "tokens": self.tokens,
            "prefill_s": sum(seconds for seconds, _ in prefills),
            "decode_s": self.seconds - self.set_up_s - sum(s for s, waited_for in prefills if waited_for),
            "first_token_s": self.first_token_s,
            "steps": self.steps,
            "max_batch": self.max_rows,
            "busy_frac": self.kept_steps / max(self.row_steps, 1),
            "cache_bytes": self.cache.bytes,
            "derived_bytes": self.stepper.derived_bytes,
            "build_s": self.stepper.build_s,
            **self.stepper.extra_stats(),
        }


def _routes_layout(config: Any) -> tuple[tuple[int, int] | None, torch.dtype]:
    """-> (MoE layers, K) or None, and the smallest dtype that holds an expert's number."""
    layers = len(config.moe_layers)
    if not layers:
        return None, torch.uint8
    return (layers, config.num_experts_per_tok), torch.uint8 if config.n_routed_experts <= 256 else torch.int16
