"""Rewards for answers of a given form: `json_schema` and `regex`.

In: completions and a schema or pattern, from the recipe or a dataset column. Out: `Score`s, 1 or 0. Matching runs in
the pool of killable workers, since a pattern with nested repetition can take for ever on a text made for it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rewards.base import Completion, Score, completion_text
from rewards.pool import Outcome, VerifierPool, shared_pool
from rewards.reward_entry import checked_by
from rewards.shown import shown
from rewards.tag_format import answer_block

_TIME_LIMIT_S = 1.0
_MAX_CHARS = 1_000_000
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),),
    "number": (int, float), "integer": (int,),
}  # fmt: skip
_KEYWORDS = (
    "type", "enum", "const", "properties", "required", "additionalProperties", "items", "minItems", "maxItems",
    "minLength", "maxLength", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "anyOf", "allOf",
)  # fmt: skip
_NOTES = ("$schema", "$id", "title", "description", "examples", "default")


def check_schema(schema: Any, where: str = "schema") -> None:
    """ValueError for a schema with a keyword that `validate` would not look at: what is not checked must not look
    checked."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where}: a {type(schema).__name__} is not allowed; an object or a truth value")
    for key in schema:
        if key not in _KEYWORDS and key not in _NOTES:
            raise ValueError(f"{where}: keyword {key!r} is not supported; allowed: {', '.join(_KEYWORDS)}")
    kinds = schema.get("type", [])
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind not in _TYPES:
            raise ValueError(f"{where}.type: {kind!r} is not allowed; one of {', '.join(_TYPES)}")
    if "pattern" in schema:
        _compile(schema["pattern"], f"{where}.pattern")
    for name, part in schema.get("properties", {}).items():
        check_schema(part, f"{where}.properties.{name}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            check_schema(schema[key], f"{where}.{key}")
    for key in ("anyOf", "allOf"):
        for index, part in enumerate(schema.get(key, ())):
            check_schema(part, f"{where}.{key}[{index}]")


def _compile(pattern: Any, where: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise ValueError(f"{where}: {pattern!r} is not allowed; a regular expression")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}: {pattern!r} is no regular expression: {error}") from error


def _check_json(**params: Any) -> None:
    if ("schema" in params) == ("schema_column" in params):
        raise ValueError("either schema or schema_column is needed")
    if "schema" in params:
        check_schema(params["schema"])


@checked_by(_check_json)
def json_schema_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Any] = (),
    *,
    schema: Mapping[str, Any] | bool | None = None,
    schema_column: str | None = None,
    tagged: bool = True,
    pool: VerifierPool | None = None,
    **columns: Sequence[Any],
) -> list[Score]:
    """1 when the answer is one JSON document that the schema accepts, else 0. Range {0, 1}. Source: JSON Schema, draft
    2020-12 (json-schema.org); departure: only the keywords of this file.

    schema: other keywords are refused. schema_column: the dataset's column that holds one per row, as data or JSON
    text; None there does not apply. tagged: the answer is the content of the answer block, else the whole text; one
    pair of ``` lines around it is taken off.

    >>> texts = ['<answer>{"a": 1}</answer>', '<answer>{"b": 1}</answer>']
    >>> [score.value for score in json_schema_reward([], texts, schema={"type": "object", "required": ["a"]})]
    [1.0, 0.0]
    """
    schemas = [schema] * len(completions) if schema_column is None else list(columns[schema_column])
    jobs = [
        (_answer_text(completion_text(completion), tagged), json.loads(item) if isinstance(item, str) else item)
        for completion, item in zip(completions, schemas, strict=True)
    ]
    return _score_in_pool("rewards.structured:match_json", jobs, pool)


def _check_regex(**params: Any) -> None:
    if ("pattern" in params) == ("pattern_column" in params):
        raise ValueError("either pattern or pattern_column is needed")
    if "pattern" in params:
        _compile(params["pattern"], "pattern")
    if params.get("where", "answer") not in ("answer", "completion"):
        raise ValueError(f"where: {params['where']!r} is not allowed; answer or completion")


@checked_by(_check_regex)
def regex_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Any] = (),
    *,
    pattern: str | None = None,
    pattern_column: str | None = None,
    where: Literal["answer", "completion"] = "answer",
    pool: VerifierPool | None = None,
    **columns: Sequence[Any],
) -> list[Score]:
    """1 when the pattern matches the whole answer block (where: answer) or the whole completion, else 0. Range {0, 1}.
    Source: own; the patterns are those of Python's `re`.

    pattern: matched as fullmatch; write `.*` where the rest does not matter. pattern_column: one per row. A text on
    which the pattern takes more than a second gives 0 and counts as timeout.

    >>> texts = ["<think>t</think><answer>B</answer>", "<think>t</think><answer>B or C</answer>"]
    >>> [score.value for score in regex_reward([], texts, pattern="[A-D]")]
    [1.0, 0.0]
    """
    patterns = [pattern] * len(completions) if pattern_column is None else list(columns[pattern_column])
    jobs = [
        (_answer_text(completion_text(completion), where == "answer"), item)
        for completion, item in zip(completions, patterns, strict=True)
    ]
    return _score_in_pool("rewards.structured:match_regex", jobs, pool)


def _answer_text(text: str, tagged: bool) -> str | None:
    return answer_block(text).content if tagged else text


def _score_in_pool(function: str, jobs: Sequence[tuple[str | None, Any]], pool: VerifierPool | None) -> list[Score]:
    scores: list[Score | None] = []
    for text, rule in jobs:
        if rule is None:
            scores.append(Score(None, "the row has no rule to match"))
        elif text is None or len(text) > _MAX_CHARS:
            scores.append(Score(0.0, "no answer" if text is None else f"more than {_MAX_CHARS} characters"))
        else:
            scores.append(None)
    waiting = [job for job, score in zip(jobs, scores, strict=True) if score is None]
    outcomes = iter((pool or shared_pool()).map(function, waiting, _TIME_LIMIT_S))
    return [
        _told(next(outcomes), job[0] or "") if score is None else score
        for job, score in zip(jobs, scores, strict=True)
    ]  # fmt: skip


def _told(outcome: Outcome, text: str) -> Score:
    extracted = text[:200]
    if outcome.status in ("error", "broken"):
        return Score(None, outcome.error, extracted, rule="error")
    if outcome.status != "ok":  # timeout or memory
        return Score(0.0, outcome.error, extracted, rule=outcome.status)
    return Score(0.0 if outcome.value else 1.0, outcome.value or "matches", extracted, rule="match")


def match_regex(text: str, pattern: str) -> str:
    """Empty when the pattern matches the whole text, else why not."""
    return "" if _compile(pattern, "pattern").fullmatch(text) else "does not match"


def match_json(text: str, schema: Any) -> str:
    """Empty when the text is a JSON document that the schema accepts, else the first reason why not."""
    check_schema(schema)
    lines = text.strip().splitlines()
    if len(lines) >= 2 and lines[0].strip() in ("```", "```json") and lines[-1].strip() == "```":
        lines = lines[1:-1]
    try:
        document = json.loads("\n".join(lines), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"[:200]
    return validate(document, schema)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def validate(value: Any, schema: Any, where: str = "$") -> str:
    """Empty when the schema accepts the value, else the first reason why not, with its place.

    >>> validate({"a": [1, "x"]}, {"properties": {"a": {"items": {"type": "integer"}}}})
    "$.a[1]: 'x' is no integer"
    """
    if isinstance(schema, bool):
        return "" if schema else f"{where}: nothing is allowed here"
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds is not None and not any(_is_type(value, kind) for kind in kinds):
        return f"{where}: {shown(value, 60)} is no {' or '.join(kinds)}"
    if "enum" in schema and not any(_same_json(value, item) for item in schema["enum"]):
        return f"{where}: {shown(value, 60)} is not one of the allowed values"
    if "const" in schema and not _same_json(value, schema["const"]):
        return f"{where}: {shown(value, 60)} is not {schema['const']!r}"
    checks = (_check_number, _check_string, _check_array, _check_object)
    for problem in (check(value, schema, where) for check in checks):
        if problem:
            return problem
    for part in schema.get("allOf", ()):
        if problem := validate(value, part, where):
            return problem
    if "anyOf" in schema and all(validate(value, part, where) for part in schema["anyOf"]):
        return f"{where}: {shown(value, 60)} fits none of the alternatives"
    return ""


def _is_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _same_json(left: Any, right: Any) -> bool:
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)


def _check_number(value: Any, schema: Mapping[str, Any], where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    if low <= value <= high and (above < value or above == -math.inf) and (value < below or below == math.inf):
        return ""
    return f"{where}: {shown(value, 60)} is out of range"


def _check_string(value: Any, schema: Mapping[str, Any], where: str) -> str:
    if not isinstance(value, str):
        return ""
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf):
        return f"{where}: a text of {len(value)} characters"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return f"{where}: {shown(value, 60)} does not match {schema['pattern']!r}"
    return ""


def _check_array(value: Any, schema: Mapping[str, Any], where: str) -> str:
    if not isinstance(value, list):
        return ""
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
        return f"{where}: {len(value)} items"
    problems = (validate(item, schema.get("items", True), f"{where}[{index}]") for index, item in enumerate(value))
    return next(filter(None, problems), "")


def _check_object(value: Any, schema: Mapping[str, Any], where: str) -> str:
    if not isinstance(value, dict):
        return ""
    for key in schema.get("required", ()):
        if key not in value:
            return f"{where}: {key!r} is missing"
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    problems = (validate(item, properties.get(key, others), f"{where}.{key}") for key, item in value.items())
    return next(filter(None, problems), "")
