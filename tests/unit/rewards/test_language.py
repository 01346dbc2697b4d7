"""`language_consistency`: shares by hand, scripts, neighbours of the Latin script, mathematics, hostile texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewards.language import language_consistency_reward
from tests.clock import assert_takes_less

SHARED = Path(__file__).parents[4] / "shared" / "data" / "adversarial_cases.jsonl"
ENGLISH = "We add the numbers and find that the sum is even, so the answer is ten."
SENTENCES = {
    "en": ENGLISH,
    "de": "Wir addieren die Zahlen und sehen, dass die Summe nicht ungerade ist.",
    "fr": "Nous ajoutons les nombres et nous voyons que la somme est paire, donc le résultat est dix.",
    "es": "Sumamos los números y vemos que la suma es par, por lo que el resultado es diez.",
    "it": "Sommiamo i numeri e vediamo che la somma è pari, quindi il risultato è dieci con una cifra.",
    "pt": "Somamos os números e vemos que a soma não é ímpar, então o resultado é dez para nós.",
    "zh": "我们把数字相加，得到十。",
    "ja": "数字を足すと十になります。",
    "ko": "숫자를 더하면 십이 됩니다.",
    "ru": "Мы складываем числа и получаем десять.",
    "ar": "نجمع الأرقام ونحصل على عشرة",
    "hi": "हम संख्याओं को जोड़ते हैं",
    "th": "เราบวกตัวเลข",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_each_language_is_itself_and_no_other(language: str) -> None:
    for target in SENTENCES:
        value = language_consistency_reward([], [SENTENCES[language]], language=target)[0].value
        assert value is not None
        if target == language:
            assert value == 1.0, (language, target)
        elif (language, target) != ("zh", "ja"):  # Chinese signs are Japanese signs
            assert value < 0.7, (language, target, value)


@pytest.mark.parametrize(
    ("text", "language", "value"),
    [
        ("<think>We add 两 numbers</think>", "en", 0.75),
        ("add 二 and 二", "en", 0.5),
        ("我们 use 加法", "zh", 4 / 5),
        (ENGLISH + " 因为", "en", 16 / 18),
        (r"$\frac{а}{b}$ is one half, \text{we} see", "en", 1.0),  # a Cyrillic letter inside of a formula
        ("`код` is code", "en", 1.0),
        ("12 + 3 = 15", "en", 0.0),
        ("", "en", 0.0),
        ("<think></think><answer>42</answer>", "en", 0.0),
    ],
)
def test_shares(text: str, language: str, value: float) -> None:
    assert language_consistency_reward([], [text], language=language)[0].value == pytest.approx(value)


def test_a_foreign_sentence_does_not_count_and_names_do_no_harm() -> None:
    mixed = f"{ENGLISH} {SENTENCES['de']}"
    value = language_consistency_reward([], [mixed])[0].value
    assert value == pytest.approx(16 / 28)
    assert language_consistency_reward([], ["Café owner José bought naïve Müller a crêpe."])[0].value == 1.0


def test_language_of_the_row() -> None:
    texts = [SENTENCES["zh"], SENTENCES["zh"], SENTENCES["zh"]]
    scores = language_consistency_reward([], texts, language_column="lang", lang=["zh", "en", None])
    assert [score.value for score in scores] == [1.0, 0.0, None]
    with pytest.raises(ValueError, match="language: 'xx' is not allowed; one of ar, bn"):
        language_consistency_reward([], [""], language_column="lang", lang=["xx"])


def test_hostile_texts_take_little_time() -> None:
    texts = ["$" * 10**6, "$$" + "a" * 10**6, "\\(" * 300_000, "`" * 10**6, "<" * 10**6, "a" * 10**6, "the " * 250_000]
    assert_takes_less(10.0, lambda: language_consistency_reward([], texts))


@pytest.mark.skipif(not SHARED.exists(), reason="the shared cases are not here")
def test_shared_cases() -> None:
    rows = [json.loads(line) for line in SHARED.read_text().splitlines()]
    for row in rows:
        if "language" in row:
            (score,) = language_consistency_reward([], [row["completion"]], language=row["language"])
            assert score.value is not None and (score.value > 0.9) is row["language_ok"], row["id"]
