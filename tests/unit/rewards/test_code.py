"""`code`: programs are scored by tests that they cannot see, by either style, and nothing that they do to the process
helps."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards import code_runner
from rewards.base import Score
from rewards.code import code_format_reward, code_reward, extract_program, fenced_blocks
from rewards.code_outputs import same_output, same_value
from rewards.code_tests import CallCase, ScriptCase, StdinCase, parse_tests
from rewards.pool import VerifierPool
from rewards.registry import load_function
from rewards.sandbox import SandboxUnavailable, isolation_method
from rewards.scorer import RewardScorer
from tests.clock import assert_takes_less

# One after the other: a fork bomb of one test uses up the processes that another may have.
pytestmark = pytest.mark.xdist_group("sandbox")


def _isolates() -> bool:
    try:
        isolation_method()
    except SandboxUnavailable:
        return False
    return True


needs_isolation = pytest.mark.skipif(
    not _isolates(), reason="neither bubblewrap nor namespaces isolate on this machine"
)


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(workers=2, time_limit_s=30) as pool:
        yield pool


def tagged(program: str) -> str:
    return f"<think>t</think>\n<answer>\n```python\n{program}\n```\n</answer>"


def grade(pool: VerifierPool, program: str, tests: Any, **params: Any) -> Score:
    return code_reward([""], [tagged(program)], tests=[tests], pool=pool, **{"time_limit_s": 1.0, **params})[0]


SQUARES = [{"input": "2", "output": "4\n"}, {"input": "3", "output": "9\n"}, {"input": "-1", "output": "1\n"}]
ADD_CASES = {"entry_point": "add", "cases": [{"args": [1, 2], "output": 3}, {"args": [-1, 1], "output": 0}]}
ADD_TESTS = {"entry_point": "add", "tests": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]}
ADD_LOOP = {
    "entry_point": "add",
    "tests": ["for n in range(5):\n    assert add(n, n) == 2 * n, n", "assert add(0, 0) == 0 and add(0, 1) == 1"],
}


ADD_MAP = {"entry_point": "add", "tests": ["for a, b in zip(map(add, [1, 2], [3, 4]), [4, 6]):\n    assert a == b"]}


@needs_isolation
@pytest.mark.parametrize(
    ("program", "tests", "value", "says"),
    [
        ("print(int(input()) ** 2)", SQUARES, 1.0, "3 of 3"),
        ("n = int(input())\nprint(4 if n == 2 else 9 if n == 3 else 0)", SQUARES, 2 / 3, "printed '0"),
        ("print(4)\nimport sys; sys.exit(0)", SQUARES, 1 / 3, "2 of 3|1 of 3"),
        ("print(int(input()) ** 2)\nraise ValueError('after')", SQUARES, 0.0, "ValueError: after"),
        ("print(int(input()) ** 2)\nimport os; os._exit(0)", SQUARES, 0.0, "printed ''"),
        ("def add(a, b): return a + b", ADD_CASES, 1.0, "2 of 2"),
        ("class Solution:\n    def add(self, a, b): return a + b", ADD_CASES, 1.0, "2 of 2"),
        ("def add(a, b): return 3", ADD_CASES, 0.5, "returned 3"),
        ("def ad(a, b): return a + b", ADD_CASES, 0.0, "no function 'add'"),
        ("def add(a, b): return a + b", {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}, 1.0, "1 of 1"),
        ("def add(a, b): return [a + b]", {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}, 1.0, "1 of 1"),
        ("def add(a, b): return [a, b]", {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}, 0.0, "[1, 2]"),
        ("def add(a, b): return a + b", ADD_TESTS, 1.0, "2 of 2"),
        ("def add(a, b): return a + b", ADD_LOOP, 1.0, "2 of 2"),
        ("def add(a, b): return abs(a) + b + (a > 2)", ADD_LOOP, 0.5, "AssertionError: 3"),
        ("def add(a, b): return a +", ADD_TESTS, 0.0, "SyntaxError"),
        ("", SQUARES, 0.0, "answer|printed|fence"),
        ("def add(a, b): return 10**5000", ADD_CASES, 0.0, "returned <no repr"),
        ("def add(a, b): return 10**5000", ADD_LOOP, 0.0, "AssertionError: 0"),
    ],
)
def test_scores(pool: VerifierPool, program: str, tests: Any, value: float, says: str) -> None:
    score = grade(pool, program, tests)
    assert score.value == pytest.approx(value), score
    assert any(part in score.reason for part in says.split("|")), score


LONG = list(range(100_000, 120_000))
EMPTY_INPUT = {"input": "", "output": "0"}


@needs_isolation
@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("print(4)\nexit()", [{"input": "", "output": "4"}]),
        ("print(4)\nquit(0)\nprint(5)", [{"input": "", "output": "4"}]),
        (
            "from concurrent.futures import ThreadPoolExecutor\nimport time\n"
            "def wait(n):\n    time.sleep(0.1)\n    return n\n"
            "with ThreadPoolExecutor(32) as threads: print(sum(threads.map(wait, range(64))))",
            [{"input": "", "output": "2016"}],
        ),
        ("import sys\nprint(4)\nsys.stdout.close()", [{"input": "", "output": "4"}]),
        ("import io, sys\nprint(4)\nsys.stdout = io.StringIO()\nprint(5)", [{"input": "", "output": "4"}]),
        (
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            "@dataclass\nclass Pair:\n    a: int\n    b: int\ndef add(a, b): return Pair(a, b).a + b",
            ADD_CASES,
        ),
        ("class Node: pass\ndef f(x):\n    x.append(Node())\n    return 3",
         {"entry_point": "f", "cases": [{"args": [[1]], "output": 3}]}),
        ("def f(x): return x", {"entry_point": "f", "cases": [{"args": [LONG], "output": LONG}] * 20}),
        ("class Solution:\n    def f(self, x: List[int]) -> Optional[List[int]]:\n        return x",
         {"entry_point": "f", "cases": [{"args": [[1]], "output": [1]}]}),
        # how programs of contests read fast
        ("import io, os\nread = io.BytesIO(os.read(0, os.fstat(0).st_size)).read\nprint(int(read()) ** 2)", SQUARES),
        ("import sys\nn = sys.stdin.readline\nprint(int(n()) ** 2)", SQUARES),
        ("print(len(open(0).read()))", [{"input": "long line\n" * 400_000, "output": "4000000"}, EMPTY_INPUT]),
    ],
    ids=["exit", "quit", "threads", "closed output", "other output", "dataclass", "changed argument", "long values",
         "names of typing", "size of the input", "lines of the input", "long input"],
)  # fmt: skip
def test_honest_programs_are_paid_in_full(pool: VerifierPool, program: str, tests: Any) -> None:
    score = grade(pool, program, tests, time_limit_s=5.0, program_limit_s=20.0)
    assert score.value == 1.0, score


CHEATS_FILE = Path(__file__).parents[2] / "data" / "rewards" / "code_cheats.txt"
CHEATS = {name: body for name, _, body in (part.partition("\n") for part in CHEATS_FILE.read_text().split("### ")[1:])}


@needs_isolation
@pytest.mark.parametrize(
    "tests", [ADD_CASES, ADD_TESTS, ADD_LOOP, ADD_MAP], ids=["calls", "asserts", "test code", "map"]
)
def test_no_cheat_is_paid(pool: VerifierPool, tests: Any) -> None:
    programs = [tagged(program) for program in CHEATS.values()]
    scores = code_reward([""] * len(programs), programs, tests=[tests] * len(programs), pool=pool, time_limit_s=0.5)
    print()
    for name, score in zip(CHEATS, scores, strict=True):
        print(f"{name:28} {score.value}  {score.reason[:80]}")
    paid = {name: score for name, score in zip(CHEATS, scores, strict=True) if score.value}
    assert paid == {}
    assert grade(pool, "def add(a, b): return a + b", tests).value == 1.0  # the workers are as good as before


LOOKS_FOR_THE_ANSWER = r"""
import gc, glob, os, sys
found = []
frame = sys._getframe()
while frame:
    found.append(repr(frame.f_locals) + repr(frame.f_globals))
    frame = frame.f_back
for thing in gc.get_objects():
    try: found.append(repr(thing)[:100000])
    except Exception: pass
for pid in ('1', 'self', str(os.getppid())):
    for name in ('environ', 'cmdline', 'maps'):
        try: found.append(open(f'/proc/{pid}/{name}').read())
        except OSError: pass
for path in glob.glob('/**', recursive=False) + glob.glob('/tmp/**', recursive=True) + glob.glob('/harness/**',
recursive=True):
    try: found.append(open(path).read())
    except (OSError, UnicodeDecodeError): pass
try:
    for line in open('/proc/self/maps'):
        if 'rw-p' in line and line.split()[-1] in ('[heap]', '[stack]'):
            start, end = (int(x, 16) for x in line.split()[0].split('-'))
            with open('/proc/self/mem', 'rb') as memory:
                memory.seek(start)
                found.append(memory.read(end - start).decode('latin-1'))
except OSError: pass
text = '\n'.join(found)
where = text.find('expected' + '-output-')
answer = text[where : where + 40]
def add(a, b): return answer
if __name__ == '__main__': print(answer)
"""


@needs_isolation
@pytest.mark.parametrize("style", ["stdin", "calls", "test code"])
def test_the_expected_output_is_nowhere_to_be_found(pool: VerifierPool, style: str) -> None:
    secret = "expected-output-5d1f0c9a7b3e4f62a8d94c10"
    tests: Any = {
        "stdin": [{"input": "", "output": secret}],
        "calls": {"entry_point": "add", "cases": [{"args": [1, 2], "output": secret}]},
        "test code": {"entry_point": "add", "tests": [f"expected = '{secret}'\nassert add(1, 2) == expected"]},
    }[style]
    score = grade(pool, LOOKS_FOR_THE_ANSWER, tests, time_limit_s=5.0)
    assert score.value == 0.0 and secret not in score.reason and "Error: add" not in score.reason


@needs_isolation
def test_a_test_sees_what_the_program_did_to_its_arguments_and_its_exceptions(pool: VerifierPool) -> None:
    tests = {
        "entry_point": ["sort", "fail", "pairs"],
        "setup": "import math",
        "tests": [
            "x = [3, 1, 2]\nsort(x)\nassert x == [1, 2, 3]",
            "try:\n    fail(-1)\nexcept ValueError as e:\n    assert 'neg' in str(e)\nelse:\n    assert False",
            "assert list(pairs({'a': 1})) == [('a', 1)]\nassert math.isnan(fail(math.nan))",
            "assert fail(2**70) == 2**70",
            "def check(candidate):\n    assert candidate([2, 1]) is None\n",
            "try:\n    fail('own')\nexcept LookupError as e:\n    assert 'mine' in str(e)\nelse:\n    assert False",
            "try:\n    fail('unicode')\nexcept ValueError as e:\n    pass\nelse:\n    assert False",
        ],
    }
    program = (
        "def sort(x): x.sort()\n"
        "class Mine(LookupError): pass\n"
        "def fail(x):\n    if x == 'own': raise Mine('mine')\n    if x == 'unicode': b'\\xff'.decode()\n"
        "    if x < 0: raise ValueError('negative')\n    return x\n"
        "def pairs(d): return iter(d.items())\n"
    )
    score = grade(pool, program, tests)
    assert score.value == 1.0, score


@needs_isolation
@pytest.mark.parametrize(
    "test",
    ["def test_add():\n    assert add(1, 2) == 3", "import math", "import solution\nassert solution.add(1, 2) == 3",
     "assert add(print) == 3"],
)  # fmt: skip
def test_a_test_that_calls_nothing_is_an_error_of_the_row(pool: VerifierPool, test: str) -> None:
    """It would say the same of every program."""
    score = grade(pool, "def add(a, b): return 0", {"entry_point": "add", "tests": [test]})
    assert score.value is None and score.rule == "error" and "never calls add" in score.reason


# A row in the style of each data set, a right program and a wrong one.
DATA_SETS: dict[str, tuple[dict[str, Any], str, str]] = {
    "mbpp": (
        {"text": "Write a function that finds what two tuples share.", "test_setup_code": "",
         "test_list": ["assert set(shared((1, 2), (2, 3))) == {2}", "assert set(shared((1,), (2,))) == set()"]},
        "def shared(a, b): return tuple(set(a) & set(b))", "def shared(a, b): return a + b",
    ),
    "humaneval": (
        {"entry_point": "root", "prompt": "import math\nfrom typing import List\n\n"
         "def value(cs: List[float], x: float):\n    return cs[0] + cs[1] * x\n\n"
         "def root(cs: List[float]) -> float:\n    \"\"\"Where value is 0.\"\"\"\n",
         "test": "META = {}\n\ndef check(candidate):\n    for n in range(1, 9):\n"
         "        assert math.fabs(value([n, 2], candidate([n, 2]))) < 1e-4\n"},
        "def root(cs: List[float]) -> float:\n    return -cs[0] / cs[1]", "def root(cs): return 0",
    ),
    "leetcode": (
        {"entry_point": "Solution().double", "prompt": "from typing import *\nfrom math import *\n",
         "problem_description": "Double each.", "starter_code": "class Solution:\n    def double(self, nums)",
         "test": "def check(candidate):\n    assert candidate(nums=[1, 2]) == [2, floor(4.5)]\n"},
        "class Solution:\n    def double(self, nums: List[int]) -> List[int]:\n        return [2 * n for n in nums]",
        "class Solution:\n    def double(self, nums): return nums",
    ),
    "kodcode": (
        {"question": "Add numbers.", "test_info": [{"function_name": "add"}],
         "test": "from solution import add\n\ndef test_small():\n    assert add(1, 2) == 3\n\n"
         "def test_zero():\n    assert add(0, 0) == 0\n"},
        "def add(a, b): return a + b", "def add(a, b): return 0",
    ),
    "livecodebench": (
        {"question_content": "Repeat.", "starter_code": "class Solution: ...", "metadata": '{"func_name": "repeat"}',
         "public_test_cases": '[{"input": "[1, 2]\\n2", "output": "[1, 2, 1, 2]", "testtype": "functional"}]'},
        "class Solution:\n    def repeat(self, x: List[int], n: int): return x * n",
        "class Solution:\n    def repeat(self, x, n): return x",
    ),
    "livecodebench on standard input": (
        {"question_content": "Square.", "starter_code": "", "metadata": "{}",
         "public_test_cases": '[{"input": "3\\n", "output": "9\\n", "testtype": "stdin"}]'},
        "print(int(input()) ** 2)", "print(3)",
    ),
}  # fmt: skip


@needs_isolation
@pytest.mark.parametrize("name", DATA_SETS)
def test_the_page_reads_data_sets(
    pool: VerifierPool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the snippet of rewards/README.md, a right program of each data set scores 1 and a wrong one 0."""
    row, right, wrong = DATA_SETS[name]
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: [row])
    page = (Path(__file__).parents[3] / "rewards" / "README.md").read_text()
    snippet = page.split("## Data sets of programs")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "my_programs.py").write_text(snippet)
    (problem,) = load_function(f"{tmp_path}/my_programs.py:problems")("some/set", "test", name.split()[0])
    assert problem["prompt"] and grade(pool, right, problem["tests"]).value == 1.0
    assert grade(pool, wrong, problem["tests"], scoring="all").value == 0.0


@needs_isolation
def test_all_or_nothing_and_time_limits(pool: VerifierPool) -> None:
    wrong_once = "n = int(input())\nprint(n * n if n > 0 else 7)"
    assert grade(pool, wrong_once, SQUARES).value == pytest.approx(2 / 3)
    assert grade(pool, wrong_once, SQUARES, scoring="all").value == 0.0
    started = time.monotonic()
    slow = grade(pool, "import time\ntime.sleep(60)", SQUARES * 10, time_limit_s=0.2, program_limit_s=0.5)
    assert slow.value == 0.0 and slow.rule == "timeout" and time.monotonic() - started < 20


@needs_isolation
def test_the_memory_of_a_program_is_a_setting(pool: VerifierPool) -> None:
    program, tests = "print(len(bytearray(600 << 20)))", [{"input": "", "output": str(600 << 20)}]
    assert grade(pool, program, tests, memory_limit_mb=1024, time_limit_s=8.0).value == 1.0
    assert "MemoryError" in grade(pool, program, tests, time_limit_s=8.0).reason
    for allowed in (32, 10**5):
        with pytest.raises(ValueError, match=r"memory_limit_mb: .* is not allowed; 64 to 2048"):
            RewardScorer([{"func": "code", "params": {"memory_limit_mb": allowed}}])


@needs_isolation
def test_nothing_is_written_outside(pool: VerifierPool, tmp_path: Path) -> None:
    target = tmp_path / "written"
    score = grade(
        pool, f"try: open({str(target)!r}, 'w')\nexcept OSError: pass\ndef add(a, b): return a + b", ADD_TESTS
    )
    assert score.value == 1.0 and not target.exists()


@needs_isolation
def test_programs_a_second(pool: VerifierPool) -> None:
    """Test cases start no interpreter each: far faster than that, on any machine and whatever else it does."""
    tests = [{"input": f"{n}\n", "output": f"{n * n}\n"} for n in range(20)]
    programs = [tagged("print(int(input()) ** 2)")] * 30
    code_reward([""] * 4, programs[:4], tests=[tests] * 4, pool=pool)
    for _ in range(3):
        started = time.monotonic()
        scores = code_reward([""] * 30, programs, tests=[tests] * 30, pool=pool)
        seconds = (time.monotonic() - started) / 30
        assert all(score.value == 1.0 for score in scores)
        started = time.monotonic()
        for _ in range(4):
            subprocess.run([sys.executable, "-I", "-c", "pass"], check=True)
        starts = 20 * (time.monotonic() - started) / 4 / 2  # of a program's cases, on two workers
        print(f"\n{1 / seconds:.0f} programs of 20 test cases a second, 2 workers; with a start each {1 / starts:.0f}")
        if seconds < starts / 2:
            break
    else:
        raise AssertionError(f"{seconds:.3f} s a program; starting an interpreter for each case takes {starts:.3f} s")


@needs_isolation
@pytest.mark.parametrize("style", ["stdin", "calls"])
def test_a_sandbox_that_falls_silent_costs_its_case(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next case loads the program into the sandbox that takes its place."""
    monkeypatch.setattr("rewards.sandbox._GRACE_S", -1.0)  # gives up before the sandbox itself does
    monkeypatch.setattr(code_runner, "_sandboxes", {})
    program = (
        "import time\ndef f(n):\n    time.sleep(5 * n)\n    return n\n"
        "if __name__ == '__main__': print(f(int(input())))\n"
    )
    cases: dict[str, list[Any]] = {
        "stdin": [StdinCase(str(n), str(n)) for n in (0, 1, 0)],
        "calls": [CallCase("f", (n,), n) for n in (0, 1, 0)],
    }
    result = code_runner.run_program(program, cases[style], code_runner.Limits(case_s=2.0))
    assert (result["passed"], result["failure"], result["timed_out"]) == (2, "case 1: timeout", True), result


def test_refuses_loudly_where_nothing_isolates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_runner, "Sandbox", _Refuses)
    monkeypatch.setattr(code_runner, "_sandboxes", {})
    with pytest.raises(SandboxUnavailable):
        code_runner.run_program("print(1)", [StdinCase("", "1")], code_runner.Limits())


def test_a_worker_that_dies_costs_its_own_row(
    pool: VerifierPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the kernel is out of memory: once is mended by another try, a second time is an error of the row."""
    path = tmp_path / "runner.py"
    path.write_text(
        "import os\n"
        "def run(program, cases, limits, stop):\n"
        f"    flag = {str(tmp_path / 'killed')!r} + str(len(program))\n"
        "    once = 'once' in program and not os.path.exists(flag)\n"
        "    open(flag, 'w').close()\n"
        "    if once or 'always' in program: os.kill(os.getpid(), 9)\n"
        "    if 'raise' in program: raise OSError('disk full')\n"
        "    return {'passed': 1, 'total': 1, 'failure': '', 'timed_out': False}\n"
    )
    monkeypatch.setattr("rewards.code._RUN", f"{path}:run")
    programs = [tagged(text) for text in ("fine", "once killed", "always killed", "raise")]
    scores = code_reward([""] * 4, programs, tests=[SQUARES] * 4, pool=pool)
    assert [score.value for score in scores] == [1.0, 1.0, None, None]
    assert [score.rule for score in scores] == ["tests", "tests", "error", "error"]
    assert "SIGKILL" in scores[2].reason and "disk full" in scores[3].reason


def test_no_isolation_stops_all(pool: VerifierPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "refuses.py"
    path.write_text(
        "from rewards.sandbox import SandboxUnavailable\n"
        "def run(program, cases, limits, stop): raise SandboxUnavailable('install bubblewrap')\n"
    )
    monkeypatch.setattr("rewards.code._RUN", f"{path}:run")
    with pytest.raises(RuntimeError, match="install bubblewrap"):
        code_reward([""], [tagged("x")], tests=[SQUARES], pool=pool)


class _Refuses:
    def __init__(self, limits: object) -> None:
        raise SandboxUnavailable("none works on this machine")


def test_rows_without_tests_or_program(pool: VerifierPool) -> None:
    scores = code_reward([""] * 3, ["x", "no block", tagged("print(1)")], tests=[None, SQUARES, "{"], pool=pool)
    assert scores[0].value is None and scores[0].rule == ""
    assert scores[1].value == 0.0 and scores[1].rule == "no program"
    assert scores[2].value is None and scores[2].rule == "error" and "not JSON" in scores[2].reason


@pytest.mark.parametrize(
    ("text", "is_tagged", "program"),
    [
        ("<answer>```python\nx\n```</answer>", True, "x\n"),
        ("<answer>```py\nx\n```\ntext\n```\ny\n```</answer>", True, None),
        ("<answer>text\n```py\nx\n```\n```text\ny\n```</answer>", True, "x\n"),
        ("```py\nx\n```\ntext\n```\ny\n```", False, "y\n"),
        ("<answer>print(1)</answer>", True, "print(1)"),
        ("<answer>\n  ```py\n  if x:\n    y\n\n  z\n  ```\n</answer>", True, "if x:\n  y\n\nz\n"),
        ("<answer>```cpp\nx\n```</answer>", True, None),
        ("<think>```python\nx\n```</think>no", True, None),
        ("<answer>1</answer><answer>2</answer>", True, None),
        ("<think>```python\nx\n```</think>\n```python\ny\n```", False, "y\n"),
        ("just text", False, None),
        ("```python\nnever closed", False, None),
        ("", True, None),
    ],
)
def test_extraction(text: str, is_tagged: bool, program: str | None) -> None:
    assert extract_program(text, tagged=is_tagged)[0] == program


def test_fences_are_read_in_linear_time() -> None:
    text = "```\n" * 400_000
    assert len(fenced_blocks(text)) == 200_000
    assert_takes_less(1.5, lambda: fenced_blocks(text))


def test_code_format() -> None:
    cases = {
        "<think>t</think><answer>```python\nx\n```</answer>": 1.0,
        "<think>t</think><answer>```cpp\nx\n```</answer>": 0.0,
        "<think>t</think><answer>x</answer>": 0.0,
        "<think>t</think><answer>text\n```python\nx\n```</answer>": 0.0,
        "<answer>```python\nx\n```</answer>": 0.0,
    }
    assert [score.value for score in code_format_reward([], list(cases))] == list(cases.values())


@pytest.mark.parametrize(
    ("raw", "cases"),
    [
        ([{"input": "a", "output": "b"}], [StdinCase("a", "b")]),
        ('{"inputs": ["a"], "outputs": ["b"]}', [StdinCase("a", "b")]),
        ({"test_cases": [{"input": "a", "output": "b", "type": "stdin_stdout"}]}, [StdinCase("a", "b")]),
        ({"fn_name": "f", "inputs": [[1, 2]], "outputs": [3]}, [CallCase("f", (1, 2), 3)]),
        (
            {"entry_point": "f", "cases": [{"args": [1], "expected": 2, "kwargs": {"k": 3}}]},
            [CallCase("f", (1,), 2, {"k": 3})],
        ),
        (
            {"entry_point": "f", "tests": ["assert f(-1, k=[2]) == (3,)"]},
            [CallCase("f", (-1,), (3,), {"k": [2]}, exact=True)],
        ),
        ({"fn_name": "f", "inputs": [[1]], "outputs": [[3]]}, [CallCase("f", (1,), [3], boxed=True)]),
        (
            {"fn_name": "f", "inputs": [[1]] * 2, "outputs": [[3], 3]},
            [CallCase("f", (1,), [3]), CallCase("f", (1,), 3)],
        ),
        (
            {"entry_point": "f", "tests": ["assert f(1) == 2"], "setup": "x = 1"},
            [ScriptCase("x = 1\nassert f(1) == 2", ("f",))],
        ),
        ({"entry_point": "f", "tests": "assert f(x) == 3"}, [ScriptCase("\nassert f(x) == 3", ("f",))]),
        ({"entry_point": "f", "tests": ["assert f() == 1 == 1"]}, [ScriptCase("\nassert f() == 1 == 1", ("f",))]),
        ({"entry_point": "f", "tests": ["assert f(**x) == 1"]}, [ScriptCase("\nassert f(**x) == 1", ("f",))]),
        (["assert f(1) == 2"], [CallCase("f", (1,), 2, exact=True)]),
        (["assert sum(1, 2) == 3"], [CallCase("sum", (1, 2), 3, exact=True)]),
        (
            {
                "setup": "import math\ndef near(a, b): return math.isclose(a, b)",
                "tests": ["assert near(max(f(1), h(2)), 3)"],
            },
            [
                ScriptCase(
                    "import math\ndef near(a, b): return math.isclose(a, b)\nassert near(max(f(1), h(2)), 3)",
                    ("f", "h"),
                )
            ],
        ),
        ({"entry_point": "Solution().f", "tests": ["assert f(1) == 2"]}, [CallCase("f", (1,), 2, exact=True)]),
        ({"inputs": [["1", "2 3"]], "outputs": [["6"]]}, [StdinCase("1\n2 3", "6")]),
        (
            [{"type": "function_call", "fn_name": "f", "input": [n], "output": [n]} for n in (1, 2)],
            [CallCase("f", (n,), [n], boxed=True) for n in (1, 2)],
        ),
        (
            {"entry_point": None, "fn_name": "f", "tests": None, "inputs": [[1, 2]], "outputs": [3]},
            [CallCase("f", (1, 2), 3)],
        ),
    ],
)
def test_forms_of_tests(raw: Any, cases: list[Any]) -> None:
    assert parse_tests(raw) == cases


@pytest.mark.parametrize(
    "raw",
    ["{", "3", 3, [], [{"input": 1, "output": "b"}], {"inputs": ["a"], "outputs": []}, {"tests": ["assert 1"]}, {},
     {"entry_point": "f g", "tests": ["assert 1"]}, {"entry_point": "f", "cases": [{"args": [1]}]},
     {"entry_point": ["f", "g"], "cases": []}, {"entry_point": "f", "tests": ["assert f(1) = 2"]},
     {"entry_point": "f", "tests": ["assert f(1) == 2", "def check(candidate):\n    assert candidate(1"]},
     {"entry_point": "f", "setup": "import", "tests": ["assert f(1) == 2"]}, {"entry_point": 3, "tests": ["pass"]},
     {"entry_point": "f", "cases": None}, {"entry_point": "f", "cases": [{"args": [1], "output": 2, "kwargs": [3]}]},
     [{"input": "1", "output": "2", "type": "function_call", "fn_name": "f"}],
     [{"input": "1", "output": "2", "testtype": "functional"}], ["assert x == 1"], ["assert f(1) == 2", 3],
     [{"input": [1], "output": 2, "fn_name": "f"}, {"input": [1], "output": 2, "fn_name": "g"}], [{"fn_name": "f"}, 3],
     {"tests": "def check(candidate):\n    assert candidate(1) == int(2)"}],
)  # fmt: skip
def test_unreadable_tests_are_refused(raw: Any) -> None:
    with pytest.raises(ValueError, match="tests: "):
        parse_tests(raw)


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1 2\n", "1 2", True), ("1 2 \n\n", "1 2", True), ("1\n2", "1 2", False), ("3.0000001", "3.0", True),
        ("3.1", "3.0", False), ("3", "3.0", True), ("3.0", "3", False), ("yes", "Yes", False), ("", "", True),
        ("1 2", "1", False), ("1e400", "1.0", False), ("nan", "1.0", False), ("é", "é", True),
    ],
)  # fmt: skip
def test_same_output(printed: str, expected: str, same: bool) -> None:
    assert same_output(printed, expected) is same


@pytest.mark.parametrize(
    ("returned", "expected", "same"),
    [
        ([1, 2], (1, 2), True), ((1, (2,)), [1, [2]], True), ([1], [1, 2], False), (2.0000001, 2.0, True),
        (2, 2.0, True),
        (2.1, 2.0, False), (10**400, 1.0, False), ("2", 2, False), ({1: "a"}, {"1": "a"}, True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1, "b": 2}, {"a": 1}, False), (None, None, True), (None, 0, False), (iter([1, 2]), [1, 2], True),
        ({10**5000: 1}, {"a": 1}, False),
        ({1, 2}, [1, 2], False), ("ab", ["a", "b"], False), (float("nan"), 1.0, False),
    ],
)  # fmt: skip
def test_same_value(returned: Any, expected: Any, same: bool) -> None:
    assert same_value(returned, expected) is same
