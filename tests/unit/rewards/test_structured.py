"""`json_schema` and `regex`: tables of (answer, rule, score), refused rules, and patterns that never end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from rewards.pool import VerifierPool
from rewards.structured import check_schema, json_schema_reward, regex_reward, validate

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(workers=1) as pool:
        yield pool


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ('{"name": "Ada", "age": 36}', 1.0),
        ('```json\n{"name": "Ada"}\n```', 1.0),
        ('{"name": "Ada", "age": 36.0}', 1.0),
        ('{"name": "", "age": 36}', 0.0),
        ('{"age": 36}', 0.0),
        ('{"name": "Ada", "age": -1}', 0.0),
        ('{"name": "Ada", "age": true}', 0.0),
        ('{"name": "Ada", "pet": 1}', 0.0),
        ('{"name": "Ada"} {"name": "Bob"}', 0.0),
        ('{"name": NaN}', 0.0),
        ("not json", 0.0),
        ("[" * 100_000, 0.0),
        ('{"name": "é日"}', 1.0),
        ('{"name": 1' + "0" * 10_000 + "}", 0.0),
    ],
)
def test_json_schema(pool: VerifierPool, answer: str, value: float) -> None:
    (score,) = json_schema_reward([], [f"<think>t</think><answer>{answer}</answer>"], schema=PERSON, pool=pool)
    assert score.value == value, score


def test_json_schema_of_the_row_and_without_an_answer(pool: VerifierPool) -> None:
    texts = ["<answer>1</answer>", "<answer>1</answer>", "1", "<answer>1</answer>"]
    scores = json_schema_reward(
        [], texts, schema_column="s", s=[{"type": "integer"}, '{"type": "string"}', True, None], pool=pool
    )
    assert [score.value for score in scores] == [1.0, 0.0, 0.0, None]
    assert json_schema_reward([], ["1"], schema=True, tagged=False, pool=pool)[0].value == 1.0


@pytest.mark.parametrize(
    ("value", "schema", "accepted"),
    [
        (1, {"type": ["string", "integer"]}, True),
        (None, {"type": "null"}, True),
        (True, {"enum": [1]}, False),
        (1, {"const": 1.0}, True),
        ([1, 2], {"items": {"type": "integer"}, "minItems": 2, "maxItems": 2}, True),
        ([1, "2"], {"items": {"type": "integer"}}, False),
        ("abc", {"pattern": "b"}, True),
        ("abc", {"pattern": "^b"}, False),
        (3, {"exclusiveMinimum": 3}, False),
        (3, {"exclusiveMaximum": 4, "minimum": 3}, True),
        (3, {"anyOf": [{"type": "string"}, {"minimum": 2}]}, True),
        (3, {"anyOf": [{"type": "string"}, {"minimum": 4}]}, False),
        (3, {"allOf": [{"minimum": 2}, {"maximum": 2}]}, False),
        ({"a": 1}, {"additionalProperties": {"type": "integer"}}, True),
        ({"a": 1}, False, False),
    ],
)
def test_keywords(value: Any, schema: Any, accepted: bool) -> None:
    check_schema(schema)
    assert (validate(value, schema) == "") is accepted


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"typ": "object"}, "keyword 'typ' is not supported"),
        ({"properties": {"a": {"format": "date"}}}, "schema.properties.a: keyword 'format'"),
        ({"type": "int"}, "'int' is not allowed; one of object"),
        ({"items": 3}, "schema.items: a int is not allowed"),
        ({"anyOf": [{"$ref": "#"}]}, r"anyOf\[0\]: keyword '\$ref'"),
        ({"pattern": "("}, "no regular expression"),
    ],
)
def test_what_would_not_be_checked_is_refused(schema: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_schema(schema)


def test_regex(pool: VerifierPool) -> None:
    texts = ["<answer>B</answer>", "<answer>(B)</answer>", "B", "<answer>B</answer>"]
    assert [score.value for score in regex_reward([], texts, pattern="[A-D]", pool=pool)] == [1.0, 0.0, 0.0, 1.0]
    assert [score.value for score in regex_reward([], texts, pattern="B", where="completion", pool=pool)] == [
        0.0,
        0.0,
        1.0,
        0.0,
    ]
    by_row = regex_reward([], texts[:3], pattern_column="p", p=["B", None, "("], pool=pool)
    assert [score.value for score in by_row] == [1.0, None, 0.0]  # no answer block: nothing to match
    (broken,) = regex_reward([], texts[:1], pattern_column="p", p=["("], pool=pool)
    assert broken.value is None and broken.rule == "error"


def test_a_pattern_that_never_ends_is_killed(pool: VerifierPool) -> None:
    started = time.monotonic()
    (score,) = regex_reward([], ["<answer>" + "a" * 60 + "b</answer>"], pattern="(a+)+", pool=pool)
    assert (score.value, score.rule) == (0.0, "timeout") and time.monotonic() - started < 20
