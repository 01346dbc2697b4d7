"""Chain arithmetic modulo 10: a task on which thinking longer pays, small enough for a laptop.

A problem is a start digit and operations, each behind its own label, worked out from left to right modulo 10:

    a5b-2c*6d+0e+9f-3g*7=

The thinking says the start and then each step by its label; the answer is the last result:

    <think>a5;b5-2=3;c3*6=8;d8+0=8;e8+9=7;f7-3=4;g4*7=8</think><answer>8</answer>

With six operations that completion is 49 characters and tags (each tag being one token) and the end token: 50 tokens.
The labels tell the policy which operation is next, so that each step needs only the step before and one look at the
problem.

Cold-start traces teach both habits: some reason to the end, the others stop after hardly any step and guess a digit
(right one time in ten). Reinforcement then has to find out that reasoning to the end wins.

Held-out problems are told from the others by a hash of their text, so no seed, size or purpose can mix them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Literal

from rl.distributed import derive_seed

Split = Literal["train", "eval"]

LABELS = "abcdefghij"
ALPHABET = "0123456789+-*=;" + LABELS
"""Every character of problems and traces beside the four tags."""

_HELD_OUT_FRACTION = 0.1


def problems(
    split: Split, size: int, seed: int = 0, operations: int = 6, factors: str = "0123456789"
) -> Iterator[dict[str, str]]:
    """`size` different problems of a split: prompt ("a5b-2...="), answer (one digit as text).

    operations: how many, 1 to 9. factors: digits to multiply by; without 0, 5 and even ones no multiplication forgets
    what came before. Raises ValueError if the arguments do not fit, or no more problems are left.
    """
    _check(split, size, operations, factors)
    rng = random.Random(derive_seed(seed, "chain_arithmetic", split))
    seen: set[str] = set()
    misses = 0
    while len(seen) < size:
        prompt = _draw(rng, operations, factors)
        if prompt in seen or is_held_out(prompt) != (split == "eval"):
            misses += 1
            if misses > 1000 + 100 * size:
                raise ValueError(f"size = {size}: there are not so many {split} problems with {operations} operations")
            continue
        seen.add(prompt)
        yield {"prompt": prompt, "answer": steps(prompt)[-1][-1]}


def traces(
    size: int,
    seed: int = 0,
    operations: int = 6,
    guess_fraction: float = 0.6,
    max_guess_steps: int = 1,
    factors: str = "0123456789",
) -> Iterator[dict[str, str]]:
    """`size` cold-start traces over train problems: prompt, completion, answer (the right one, also where the trace
    guesses).

    guess_fraction: share of traces that write 0 to max_guess_steps steps (equally often each) and then guess; the
    others reason to the end. max_guess_steps = operations - 1 spreads the point of giving up over the whole chain.
    """
    if not 0 <= guess_fraction <= 1:
        raise ValueError(f"guess_fraction = {guess_fraction}: allowed from 0 to 1")
    if not 0 <= max_guess_steps < operations:
        raise ValueError(f"max_guess_steps = {max_guess_steps}: allowed from 0 to operations - 1 = {operations - 1}")
    rng = random.Random(derive_seed(seed, "chain_arithmetic", "traces"))
    for problem in problems("train", size, derive_seed(seed, "traces"), operations, factors):
        said, answer = steps(problem["prompt"]), problem["answer"]
        if rng.random() < guess_fraction:
            said, answer = said[: 1 + rng.randint(0, max_guess_steps)], str(rng.randint(0, 9))
        yield {**problem, "completion": f"<think>{';'.join(said)}</think><answer>{answer}</answer>"}


def steps(prompt: str) -> list[str]:
    """What full reasoning says, a step an entry: "a5b-2c*6=" -> ["a5", "b5-2=3", "c3*6=8"]."""
    value = int(prompt[1])
    said = [prompt[:2]]
    for i in range(2, len(prompt) - 1, 3):
        label, sign, operand = prompt[i], prompt[i + 1], int(prompt[i + 2])
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 10
        said.append(f"{label}{value}{sign}{operand}={result}")
        value = result
    return said


def is_held_out(prompt: str) -> bool:
    """True for the tenth of all problems that is never trained on, a property of the text alone."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < _HELD_OUT_FRACTION * 2**64


def _draw(rng: random.Random, operations: int, factors: str) -> str:
    text = f"{LABELS[0]}{rng.randint(0, 9)}"
    for label in LABELS[1 : operations + 1]:
        sign = rng.choice("+-*")
        text += label + sign + rng.choice(factors if sign == "*" else "0123456789")
    return text + "="


def _check(split: str, size: int, operations: int, factors: str) -> None:
    if split not in ("train", "eval"):
        raise ValueError(f"split = {split!r}: allowed: train, eval")
    if size < 1:
        raise ValueError(f"size = {size}: allowed from 1")
    if not 1 <= operations < len(LABELS):
        raise ValueError(f"operations = {operations}: allowed from 1 to {len(LABELS) - 1}")
    if not factors or not set(factors) <= set("0123456789"):
        raise ValueError(f"factors = {factors!r}: allowed: digits, at least one")
