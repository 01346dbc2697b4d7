"""Which problems a step trains on: a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import random
from functools import lru_cache

from rl.distributed import derive_seed


class ProblemOrder:
    """Epoch after epoch of all problems, each epoch in its own seeded order, cut into steps.

    Every problem comes once an epoch. A step that reaches over the end of an epoch takes no problem a second time as
    long as there are at least `prompts_per_step` problems: those just seen move back behind the border. The same on
    every rank; rank r samples problems r, r + world_size, ... of the step.

        ProblemOrder(5, seed=0, prompts_per_step=2): steps [a b] [c d] [e x] [.. ..], x of epoch 1 and not e
    """

    def __init__(self, num_problems: int, seed: int, prompts_per_step: int, *, shuffle: bool = True) -> None:
        if num_problems < 1 or prompts_per_step < 1:
            raise ValueError(
                f"an order needs at least one problem and one prompt a step, got {num_problems} and {prompts_per_step}"
            )
        self.num_problems = num_problems
        self.seed = seed
        self.prompts_per_step = prompts_per_step
        self.shuffle = shuffle
        self._epoch = lru_cache(maxsize=4)(self._compute_epoch)

    def indices(self, step: int) -> list[int]:
        """The problems of a step (counted from 0), prompts_per_step numbers below num_problems."""
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        first = step * self.prompts_per_step
        places = (divmod(place, self.num_problems) for place in range(first, first + self.prompts_per_step))
        return [self._problem_at(epoch, place) for epoch, place in places]

    def epoch(self, step: int) -> float:
        """Epochs completed before this step."""
        return step * self.prompts_per_step / self.num_problems

    def _problem_at(self, epoch: int, place: int) -> int:
        return self._epoch(epoch)[place] if self.shuffle else place

    def _compute_epoch(self, epoch: int) -> tuple[int, ...]:
        """The order of one epoch. Its head depends on the tail of the epoch before only if a step spans both; such a
        chain starts anew at every epoch that begins with a step."""
        start = epoch
        while start > 0 and self._seen_in_border_step(start):
            start -= 1
        order = self._permutation(start)
        for later in range(start + 1, epoch + 1):
            seen = self._seen_in_border_step(later)
            order = _move_back(self._permutation(later), set(order[len(order) - seen :]), self.prompts_per_step - seen)
        return tuple(order)

    def _seen_in_border_step(self, epoch: int) -> int:
        """How many problems of the step in which `epoch` begins belong to the epoch before; 0 if it begins with a step,
        or if steps are larger than the data set, where repetition within a step cannot be avoided."""
        if self.prompts_per_step > self.num_problems:
            return 0
        return epoch * self.num_problems % self.prompts_per_step

    def _permutation(self, epoch: int) -> list[int]:
        order = list(range(self.num_problems))
        random.Random(derive_seed(self.seed, "order", epoch)).shuffle(order)
        return order


def _move_back(order: list[int], seen: set[int], size: int) -> list[int]:
    """`order` with its first `size` unseen problems in front and everything else behind, both in their old order."""
    head = [problem for problem in order if problem not in seen][:size]
    front = set(head)
    return head + [problem for problem in order if problem not in front]
