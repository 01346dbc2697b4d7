"""Time the reward functions and print one JSON line for each figure.

    python scripts/bench_rewards.py [--data FOLDER] [--completions 10000] [--latex 1000] [--programs 60]

gsm8k_style: `format` and `accuracy` on worked solutions, right and wrong. math_style: `accuracy` on LaTeX answers, in
groups of 8 as in training: half of them the reference written another way, half the answer of another problem, which
is what math-verify has to be asked about. code: programs with 20 cases on standard input, in all workers of this
machine. sandbox_start: from nothing to a program's first output. No two rows are the same, so no memory helps.

--data: a folder with gsm8k_train.jsonl and math_test.jsonl; without it, the samples of tests/data and answers made up
here take their place.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewards.code import code_reward
from rewards.math_answer import accuracy_reward, reference_answer
from rewards.pool import default_workers
from rewards.sandbox import Sandbox, SandboxUnavailable, isolation_method
from rewards.tag_format import format_reward

GROUP = 8
CASES = 20
_SAMPLES = Path(__file__).resolve().parent.parent / "tests" / "data"
_DRESSED = ("{}", "${}", "{} dollars", "\\boxed{{{}}}", "**{}**", "The answer is {}.", "{}.00", "${}$")
_LATEX = (
    "\\frac{{{a}}}{{{b}}}", "{a}\\sqrt{{{b}}}", "\\left({a}, \\frac{{{b}}}{{7}}\\right]", "x^2 + {a}x - {b}",
    "\\begin{{pmatrix}} {a} & {b} \\\\ 1 & 0 \\end{{pmatrix}}", "({a}, {b})", "{a}\\pi + {b}", "\\{{{a}, {b}, 1\\}}",
    "{a},\\!{b:03d}", "\\frac{{{a} + \\sqrt{{{b}}}}}{{2}}", "{a}^{{\\circ}}", "e^{{{a}x}} - {b}",
    "\\int_0^{{{a}}} x\\,dx", "\\sum_{{k=1}}^{{{a}}} k + {b}",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with gsm8k_train.jsonl and math_test.jsonl")
    parser.add_argument("--completions", type=int, default=10_000)
    parser.add_argument("--latex", type=int, default=1000)
    parser.add_argument("--programs", type=int, default=60)
    options = parser.parse_args(arguments)
    try:
        solutions = _read(options.data, "gsm8k_train.jsonl") or _read(_SAMPLES, "gsm8k_sample.jsonl")
        answers = [str(row["answer"]) for row in _read(options.data, "math_test.jsonl")]
        golds = [answer for answer in answers if "\\" in answer] or list(_made_up(2 * options.latex))
    except (OSError, ValueError, KeyError) as error:
        print(f"bench_rewards: --data: {error!r}", file=sys.stderr)
        return 2
    for line in (
        bench_gsm8k(solutions, options.completions), bench_math(golds, options.latex), *bench_code(options.programs),
    ):  # fmt: skip
        print(json.dumps(line), flush=True)
    return 0


def _read(folder: Path | None, name: str) -> list[dict[str, Any]]:
    if folder is None:
        return []
    with (folder / name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _made_up(count: int) -> Iterator[str]:
    rng = random.Random(1)
    for number in range(count):
        yield _LATEX[number % len(_LATEX)].format(a=rng.randrange(2, 999), b=rng.randrange(2, 999))


def bench_gsm8k(solutions: Sequence[dict[str, Any]], count: int) -> dict[str, Any]:
    """Solutions whose last number is moved, so that every row has an answer of its own; every third is wrong."""
    rows: list[tuple[str, str]] = []
    for number in range(count):
        solution = str(solutions[number % len(solutions)]["answer"])
        last = reference_answer(solution) or "0"
        gold = str(int(float(last.replace(",", ""))) + number)
        stated = _DRESSED[number % len(_DRESSED)].format(gold if number % 3 else f"{gold}1")
        rows.append((f"<think>{solution.partition('####')[0]}</think>\n<answer>{stated}</answer>", f"#### {gold}"))
    seconds, right = [], 0
    for text, gold in rows:
        started = time.perf_counter()
        format_reward([""], [text])
        right += accuracy_reward([""], [text], answer=[gold])[0].value == 1.0
        seconds.append(time.perf_counter() - started)
    return {"bench": "gsm8k_style", "completions": count, "right": right, **_summary(seconds, 1)}


def bench_math(golds: Sequence[str], count: int) -> dict[str, Any]:
    """A problem at a time: its group of completions in one call."""
    accuracy_reward([""], ["<answer>\\int_0^x t\\,dt</answer>"], answer=["x^3"])  # starts the worker processes
    rng = random.Random(2)
    seconds, rules = [], []
    for number in range(-(-count // GROUP)):
        gold = golds[number % len(golds)]
        spaced = gold.replace("+", " + ").replace(",", ", ").replace("\\frac", "\\dfrac")
        answers = [gold, f"${gold}$", f"\\boxed{{{gold}}}", spaced, *rng.sample(list(golds), GROUP - 4)]
        texts = [f"<think>We compute.</think><answer>{answer}</answer>" for answer in answers]
        started = time.perf_counter()
        scores = accuracy_reward([""] * GROUP, texts, answer=[gold] * GROUP)
        seconds.append(time.perf_counter() - started)
        rules += [score.rule for score in scores]
    symbolic = sum(rule.startswith("math-verify") for rule in rules)
    return {"bench": "math_style", "completions": len(rules), "by_math_verify": symbolic, **_summary(seconds, GROUP)}


def bench_code(count: int) -> Iterator[dict[str, Any]]:
    try:
        method = isolation_method()
    except SandboxUnavailable as error:
        yield {"bench": "code", "skipped": str(error)}
        return
    program = "print(int(input()) ** 2)"
    starts = []
    for _ in range(5):
        started = time.perf_counter()
        with Sandbox() as sandbox:
            sandbox.load(program)
            assert sandbox.run("3").stdout == "9\n"
            starts.append(time.perf_counter() - started)
    yield {"bench": "sandbox_start", "method": method, "median_s": round(statistics.median(starts), 4)}
    tests = [{"input": f"{n}\n", "output": f"{n * n}\n"} for n in range(CASES)]
    text = f"<think>t</think><answer>```python\n{program}\n```</answer>"
    warm = 2 * default_workers()
    code_reward([""] * warm, [text] * warm, tests=[tests] * warm)
    started = time.perf_counter()
    scores = code_reward([""] * count, [text] * count, tests=[tests] * count)
    seconds = time.perf_counter() - started
    assert all(score.value == 1.0 for score in scores), scores[0]
    yield {
        "bench": "code", "programs": count, "cases": CASES, "workers": default_workers(), "seconds": round(seconds, 3),
        "programs_per_s": round(count / seconds, 1),
    }  # fmt: skip


def _summary(seconds: Sequence[float], rows: int) -> dict[str, float]:
    """seconds: of each call with `rows` completions."""
    each = sorted(1e3 * value / rows for value in seconds)
    return {
        "seconds": round(sum(seconds), 3),
        "median_ms": round(statistics.median(each), 4),
        "p99_ms": round(each[int(0.99 * (len(each) - 1))], 3),
    }


if __name__ == "__main__":
    sys.exit(main())
