"""`language_consistency`: the share of the words that are in the target language.

In: completions, and the language as a parameter or a dataset column. Out: `Score`s from 0 to 1. Words are told apart by
script, and among languages of the Latin script by the small words of each sentence. Mathematics, code and tags are not
words.

Source: DeepSeek-R1 (arXiv 2501.12948), section 2.3.2: "the proportion of target language words in the CoT".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from rewards.base import Completion, Score, completion_text
from rewards.reward_entry import checked_by

_SCRIPT_RANGES = MappingProxyType(
    {
        "han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ffff",
        "kana": "\u3040-\u30ff\u31f0-\u31ff",
        "hangul": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
        "latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
        "cyrillic": "\u0400-\u052f",
        "greek": "\u0370-\u03ff\u1f00-\u1fff",
        "arabic": "\u0600-\u06ff\u0750-\u077f",
        "hebrew": "\u0590-\u05ff",
        "devanagari": "\u0900-\u097f",
        "bengali": "\u0980-\u09ff",
        "tamil": "\u0b80-\u0bff",
        "thai": "\u0e00-\u0e7f",
    }
)
# The marks of these are what a sentence of the language cannot do without; written by hand, a word in two lists counts
# for both.
_SMALL_WORDS = MappingProxyType(
    {
        "en": "the of and to is in that it we for this are with as be on by have so from which if then was not can",
        "de": "der die das und ist nicht ein eine wir mit von den dem zu im auf für es also sich auch wenn dann sind",
        "fr": "le la les des et est une un nous que pour dans pas qui avec sur donc du ce cette au il sont alors par",
        "es": "el la los las de y es una un que por para con no en se del lo como entonces si son al su esto más",
        "it": "il la le gli di e è una un che per con non in si del lo come quindi se sono al questo della dei",
        "pt": "o a os as de e é uma um que por para com não em se do da como então são ao isso mais dos",
        "nl": "de het een en is niet van wij we met dat in op voor te zijn dus als dan door ook deze die er",
        "pl": "i w na nie to jest się z że do jak więc są dla co jeśli mamy przez po ale",
        "tr": "ve bir bu için ile da de ne olarak daha gibi çok o ise eğer sonra var",
        "vi": "và là của có không một các cho với được này trong ta thì nếu để",
        "id": "yang dan di ini itu dengan untuk dari adalah kita tidak dalam jika maka ke",
    }
)
_SCRIPTS_OF = MappingProxyType(
    {
        **dict.fromkeys(_SMALL_WORDS, ("latin",)),
        "zh": ("han",), "ja": ("han", "kana"), "ko": ("hangul",), "ru": ("cyrillic",), "uk": ("cyrillic",),
        "el": ("greek",), "ar": ("arabic",), "fa": ("arabic",), "he": ("hebrew",), "hi": ("devanagari",),
        "bn": ("bengali",), "ta": ("tamil",), "th": ("thai",),
    }
)  # fmt: skip
_ONE_BY_ONE = ("han", "kana", "thai")  # no blanks between words: a character counts as a word
_WORD = re.compile(
    "|".join(
        f"(?P<{script}>[{signs}]{'' if script in _ONE_BY_ONE else '+'})" for script, signs in _SCRIPT_RANGES.items()
    )
)
# Bounded, so that an unclosed formula cannot make the scan quadratic.
_NOT_PROSE = re.compile(
    r"</?(?:think|answer)>|\\[A-Za-z]+|\$\$[^$]{0,2000}\$\$|\$[^$\n]{0,500}\$|\\\([^)]{0,500}\\\)|`[^`\n]{0,500}`"
)
_SENTENCE_END = re.compile(r"[.!?;\n。！？；]+")
_MIN_HITS = 2


def _check(**params: Any) -> None:
    language = params.get("language", "en")
    if language not in _SCRIPTS_OF:
        raise ValueError(f"language: {language!r} is not allowed; one of {', '.join(sorted(_SCRIPTS_OF))}")


@checked_by(_check)
def language_consistency_reward(
    prompts: Sequence[Any],
    completions: Sequence[Completion],
    completion_ids: Sequence[Any] = (),
    *,
    language: str = "en",
    language_column: str | None = None,
    **columns: Sequence[Any],
) -> list[Score]:
    """Words in the target language / all words; 0 for a text without words. Range [0, 1]. Source: DeepSeek-R1 (arXiv
    2501.12948), section 2.3.2, which does not say how the language of a word is told; that is our own.

    language: ISO 639-1 code. language_column: a dataset column that holds the code of each row instead (None: does not
    apply). A word's script decides; Chinese, Japanese and Thai count by characters. Two languages of the Latin script
    are told apart by sentence: one in which another language has more of its small words (at least 2) than the target
    does not count.

    >>> language_consistency_reward([], ["<think>We add 两 numbers</think>"])[0].value      # We, add, numbers of 4
    0.75
    """
    languages = columns[language_column] if language_column is not None else [language] * len(completions)
    scores: list[Score] = []
    for completion, target in zip(completions, languages, strict=True):
        if target is None:
            scores.append(Score(None, "the row has no language"))
            continue
        _check(language=target)
        scores.append(_score(completion_text(completion), target))
    return scores


def _score(text: str, language: str) -> Score:
    ours = total = 0
    for sentence in _SENTENCE_END.split(_NOT_PROSE.sub(" ", text)):
        words = [(str(found.lastgroup), found.group().lower()) for found in _WORD.finditer(sentence)]
        total += len(words)
        if "latin" in _SCRIPTS_OF[language] and _is_foreign([word for _, word in words], language):
            continue
        ours += sum(script in _SCRIPTS_OF[language] for script, _ in words)
    if total == 0:
        return Score(0.0, "no words", rule="language")
    return Score(ours / total, f"{ours} of {total} words are {language}", rule="language")


_SETS = MappingProxyType({language: frozenset(words.split()) for language, words in _SMALL_WORDS.items()})


def _is_foreign(words: Sequence[str], language: str) -> bool:
    """Whether the small words of another language are more frequent in this sentence than those of `language`."""
    counts = Counter(words)
    hits = {name: sum(counts[word] for word in small & counts.keys()) for name, small in _SETS.items()}
    return max(hits.values()) >= _MIN_HITS and max(hits.values()) > hits[language]
