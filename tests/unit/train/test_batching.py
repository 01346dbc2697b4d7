"""Packing: where tokens go, what predicts them, and that nothing is lost."""

from __future__ import annotations

import torch

from rl.train.batching import Row, idle_micro_batch, make_micro_batch, pack_rows


def row(index: int, prompt: list[int], completion: list[int], **more: object) -> Row:
    return Row(index=index, prompt_ids=prompt, completion_ids=completion, **more)  # type: ignore[arg-type]


def test_the_example_of_the_docstring() -> None:
    batch = make_micro_batch([row(0, [1, 2], [3, 4, 5]), row(1, [6], [7, 8])])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 6, 7]
    assert batch.cu_seqlens.tolist() == [0, 4, 6] and batch.max_seqlen == 4
    assert batch.predict.tolist() == [1, 2, 3, 4, 5]
    assert batch.targets.tolist() == [3, 4, 5, 7, 8]
    assert batch.loss_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.padded(torch.arange(5.0) + 1).tolist() == [[1, 2, 3], [4, 5, 0]]


def test_masked_rows_keep_their_places() -> None:
    batch = make_micro_batch([row(0, [1], [2, 3], trained=False, advantage=2.0), row(1, [1], [2], advantage=-1.0)])
    assert batch.loss_mask.tolist() == [[0, 0], [1, 0]]
    assert batch.present.tolist() == [[True, True], [True, False]]
    assert batch.advantages.tolist() == [2.0, -1.0]


def test_sampling_logprobs_and_routes_follow_their_tokens() -> None:
    first = row(0, [1, 2], [3], sampling_logprobs=torch.tensor([-0.5]), routes=torch.full((2, 1, 1), 4))
    second = row(1, [1], [2, 3], sampling_logprobs=torch.tensor([-1.0, -2.0]), routes=torch.full((2, 1, 1), 7))
    batch = make_micro_batch([first, second])
    assert batch.sampling_logprobs is not None and batch.routes is not None
    assert batch.sampling_logprobs.tolist() == [[-0.5, 0.0], [-1.0, -2.0]]
    assert batch.routes.flatten().tolist() == [4, 4, 7, 7]


def test_packing_respects_the_budget_and_loses_no_row() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (40, 2), generator=generator).tolist()
    rows = [row(i, [1] * p, [2] * c) for i, (p, c) in enumerate(lengths)]
    batches = pack_rows(rows, max_tokens=64)
    assert sorted(r.index for b in batches for r in b.rows) == list(range(40))
    assert all(len(b.tokens) <= 64 for b in batches)
    assert [len(b.tokens) for b in pack_rows(rows, max_tokens=10**6)] == [sum(r.places for r in rows)]
    alone = pack_rows([row(0, [1] * 90, [2] * 9), row(1, [1], [2])], max_tokens=64)
    assert sorted(len(b.tokens) for b in alone) == [1, 98]


def test_padding_counts_where_the_policy_pads() -> None:
    """One long row among short ones would make a grid of many times the budget."""
    rows = [row(i, [1] * 2, [2] * (1 + i % 3)) for i in range(12)] + [row(12, [1] * 20, [2] * 11), row(13, [1], [2])]
    assert max(len(b.rows) * b.max_seqlen for b in pack_rows(rows, max_tokens=100)) > 400
    batches = pack_rows(rows, max_tokens=100, padded=True)
    assert sorted(r.index for b in batches for r in b.rows) == list(range(14))
    assert all(len(b.rows) * b.max_seqlen <= 100 for b in batches)
    assert [len(b.rows) for b in pack_rows(rows[:2], max_tokens=3, padded=True)] == [1, 1]


def test_idle_batch_has_no_loss() -> None:
    routes = torch.zeros(4, 2, 3, dtype=torch.int64)
    like = make_micro_batch([row(5, [1, 2], [3, 4, 5], sampling_logprobs=torch.zeros(3), routes=routes)])
    like.old_logprobs = torch.zeros(1, 3)
    idle = idle_micro_batch(like)
    assert idle.loss_mask.sum() == 0 and idle.old_logprobs is not None and idle.ref_logprobs is None
    assert idle.routes is not None and idle.routes.shape == (1, 2, 3)
