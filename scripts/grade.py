"""Grade a file of completions offline.

    python scripts/grade.py CASES.jsonl --out VERDICTS.jsonl [--tagged]

A row has `id`, `task` (gsm8k, math, multiple_choice, countdown, code), `gold`, and `completion` or `completion_spec`
([[text, times], ...]); `options` where they apply. A verdict has `id`, `correct`, `extracted`, `gold`, `rule`,
`reason`, `seconds`; with --tagged the answer must stand in the tags and `format_ok` is added. Where the rows have
labels (`expected`, or `correct` and `format_ok`), the agreement is printed. Exit code 1: some rows could not be graded
(rule `error`: the verifier does not work, or the tests of a program cannot be read). Exit code 2: the file or its rows
cannot be read; nothing is graded then.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewards.grading import agreement, grade_rows, read_rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, help="JSONL file with one completion a row")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file for the verdicts")
    parser.add_argument("--tagged", action="store_true", help="answers must stand in <answer> tags; report format_ok")
    options = parser.parse_args(arguments)
    try:
        rows = read_rows(options.cases)
        if options.out.exists() and options.out.samefile(options.cases):
            raise ValueError(f"--out {options.out}: is the file of the cases, which would be lost")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        sink = options.out.open("w", encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"grade: {error}", file=sys.stderr)
        return 2
    verdicts = []
    with sink:
        for verdict in tqdm(grade_rows(rows, tagged=options.tagged), total=len(rows), unit="row", disable=None):
            sink.write(json.dumps(verdict) + "\n")
            verdicts.append(verdict)
    seconds = sorted(verdict["seconds"] for verdict in verdicts)
    correct = sum(verdict["correct"] for verdict in verdicts)
    median_ms = 1e3 * seconds[len(seconds) // 2]
    print(f"{correct} of {len(verdicts)} correct; median {median_ms:.3f} ms, slowest {seconds[-1]:.3f} s")
    for line in agreement(rows, verdicts):
        print(line)
    failed = [verdict for verdict in verdicts if verdict["rule"] == "error"]
    if failed:
        first = failed[0]
        print(f"grade: {len(failed)} rows could not be graded; {first['id']}: {first['reason']}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
