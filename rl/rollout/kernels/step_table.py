"""Where the time of a decode step goes, from the kernels that a profiler saw.

A step begins with `rows.begin`, a layer with the first of its two `norm.combine_norm`; shared experts and prompts may
run beside the rest, so a kernel is known by its name and how many of that name came before it in its layer."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

_FIRST, _NORM = "_begin_kernel", "_combine_norm_kernel"


class Kernel(NamedTuple):
    """start, length: microseconds."""

    name: str
    start: float
    length: float


def step_table(kernels: Sequence[Kernel]) -> list[str]:
    """The mean decode step of a run on a GPU: of its most frequent kind of layer each kernel, when it starts in the
    layer and how long it takes (some run beside others); then what else a step holds, by name."""
    steps = _cut(sorted(kernels, key=lambda kernel: kernel.start), _FIRST)
    if not steps:
        return ["no decode step with kernels of our own"]
    usual = Counter(len(step) for step in steps).most_common(1)[0][0]  # the last one has more: all that came after it
    steps = [step for step in steps if len(step) == usual]
    layers = [layer for step in steps for layer in _cut(step, _NORM, every=2)]
    kinds = Counter(_names(layer) for layer in layers)
    kind = max(kinds, key=lambda kind: (kinds[kind], len(kind)))
    layers = [layer for layer in layers if _names(layer) == kind]
    places: dict[tuple[str, int], list[Kernel]] = defaultdict(list)
    rest: Counter[str] = Counter()
    for kernel in (kernel for step in steps for kernel in step):
        rest[kernel.name] += round(1000 * kernel.length)
    for layer in layers:
        seen: Counter[str] = Counter()
        for kernel in layer:
            places[kernel.name, seen[kernel.name]].append(kernel._replace(start=kernel.start - layer[0].start))
            seen[kernel.name] += 1
            rest[kernel.name] -= round(1000 * kernel.length)
    alike, number = len(layers) // len(steps), len(steps)
    lines = [
        f"mean of {number} steps: {_span(steps):.0f} us; {alike} layers of a step are alike: {_span(layers):.1f} us",
        "   start us    for us  kernel",
    ]
    means = [
        (statistics.mean(k.start for k in found), statistics.mean(k.length for k in found), name)
        for (name, _), found in places.items()
    ]
    lines += [f"{start:11.1f} {length:9.1f}  {name[:90]}" for start, length, name in sorted(means)]
    lines.append("outside these layers, us a step")
    lines += [f"{ns / 1000 / number:21.1f}  {name[:90]}" for name, ns in rest.most_common() if ns]
    return lines


def _cut(kernels: Sequence[Kernel], name: str, every: int = 1) -> list[Sequence[Kernel]]:
    """In pieces that begin with every kernel of that name (or every second one); what comes before is left out."""
    starts = [i for i, kernel in enumerate(kernels) if kernel.name == name][::every]
    return [kernels[start:end] for start, end in itertools.pairwise((*starts, len(kernels)))]


def _names(kernels: Sequence[Kernel]) -> tuple[str, ...]:
    return tuple(sorted(kernel.name for kernel in kernels))


def _span(pieces: Sequence[Sequence[Kernel]]) -> float:
    """Microseconds from the first start to the last end, on average."""
    return statistics.mean(max(k.start + k.length for k in piece) - piece[0].start for piece in pieces)
