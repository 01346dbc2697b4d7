"""`multiple_choice`: the letter (or the text) of the option that a completion chooses.

In: completions, a column with the right letter and optionally a column with the options (`["A)21", "B)4", ...]` or
plain texts in order). Out: one `Score` each, 1.0 or 0.0. Letters inside of words never count, and neither does a
letter that is mentioned only to be rejected (`not A`). An answer block has to name exactly one option.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rewards.base import Completion, Score, completion_text
from rewards.extract import after_thinking, find_boxes, free_answer
from rewards.latex_text import HostileText, check_visible
from rewards.math_compare import compare_texts
from rewards.phrases import Extraction, numbers_in
from rewards.strict_answer import HEDGE, WITHDRAWN, block_answer, gaps_between, without_working
from rewards.tag_format import answer_block

LETTERS = "ABCDEFGHIJ"
MAX_CHARS = 4000

# `B) 4`, `Option B: 4`; `C.P. of 1 kg` has no label.
_LABEL = re.compile(r"\A\s*(?:(?:[Oo]ption|[Cc]hoice)\s+)?[(\[]?([A-Ja-j])\s*(?:[)\]:]|\.(?![A-Za-z]\.))\s*")
_NAMED = re.compile(r"\b(?:option|choice)\s*[(\[]?([A-J])\b", re.IGNORECASE)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|boxed|mbox|bf|rm)(?![a-zA-Z])\s*")
# A letter by itself: `B`, `(B)`, `B)`, `**B.**`; CJK text may touch it.
_MENTION = re.compile(r"(?<![A-Za-z0-9'_])(?:[(\[]?([A-J])|(?<=[(\[])([a-j])(?=[)\]]))(?![A-Za-z0-9'_])(\s*[)\].:,])?")
_ARTICLE_CONTEXT = re.compile(r"\s+(?!(?:or|and|because|is|since|as)\b)[a-z]|'")
_CHOICE_WORDS = re.compile(
    r"(?:\b(?:option|choice|answer|letter)s?|答案|选项|选)[\s:：是为(*]*(?:\bis\b[\s:(*]*)?\Z", re.IGNORECASE
)
_MARKER = re.compile(
    r"\b(?:answer|option|choice)\b[^.\n]{0,80}?(?:\bis\b|:|\b(?:would|should|must|will) be\b)\s*:?"
    r"|\b(?:choose|select|pick|go with)\b|答案\s*(?:是|为|：|:)|\br[ée]ponse\s+(?:est|:)",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"(?:(?:不是|不选|并非)\s*|(?:\bnot|n't|\bnever|\bisn't|\bneither|\bnor|\bpas|\bnicht|\bno es|\bexcept"
    r"|\brather than|\binstead of)\s+)(?:option\s+|be\s+|the\s+)?[(\[*]*\s*\Z",
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    r"\b(?:option|choice|answer|statement)\s*[(\[]?([A-J])[)\]]?\s+(?:is|must be|has to be)\s+(?:therefore\s+)?"
    r"(?:the\s+)?(?:only\s+)?(?:right|correct|best|true)\b(?!\s+(?:if|only|when))",
    re.IGNORECASE,
)
_REJECTED = re.compile(
    r"[)\].]?\s+(?:is|are|was)\s*(?:n't|not|wrong|incorrect|false|too)\b|\s*(?:不对|错)", re.IGNORECASE
)
_ALTERNATIVE = re.compile(r"[(\[]?[A-J][)\]]?\s*(?:,|/|or|and|或|和)\s*[(\[]?[A-J]\b")
_NO_OPTION = re.compile(
    r"\bnone of the (?:given |above |answer |listed |provided )*(?:option|choice|answer)"
    r"|\bnot (?:in|among|one of|an option in|available in) the "
    r"(?:given |answer |listed |provided )*(?:option|choice|answer)|\berror in the\b|\bno correct (?:option|answer)",
    re.IGNORECASE,
)
_REJECTED_LETTER = re.compile(
    r"(?:\b[Nn]ot|n't|\b[Nn]ever)\s+(?:option\s+)?[(\[]?[A-J][)\]]?(?![A-Za-z])"
    r"|(?<![A-Za-z])[(\[]?[A-J][)\]]?\s+(?:is|are)\s*(?:n't|not|wrong|incorrect|false)\b"
)
# Options that are only named to be ruled out: `eliminating A, C and D`, `it is not A or C`, `both A and C are wrong`.
_LETTERS = r"[(\[]?[A-J][)\]]?(?:(?:,\s*(?:and|or|nor)?|\s+(?:and|or|nor)|\s*&)\s*[(\[]?[A-J][)\]]?(?![A-Za-z]))+"
_RULED_OUT = re.compile(
    rf"\b(?:not|neither|eliminat\w+|exclud\w+|reject\w*|rul\w+ out)\s+(?:(?:options?|choices?)\s+)?{_LETTERS}"
    rf"|\b(?:both\s+)?(?:(?:options?|choices?)\s+)?{_LETTERS}\s+(?:are|were|can be)\s+"
    r"(?:all\s+|both\s+)?(?:not|wrong|incorrect|false|invalid|eliminated|excluded|ruled out)\b",
    re.IGNORECASE,
)
_PHRASE_END = re.compile(r"\n|(?<=[^\s(][^A-J])(?<!\bRs)\.(?=\s|\Z)|。")
_CORRECTED = re.compile(r"\b(?:wait|actually|correction|oops)\b", re.IGNORECASE)
_DOUBT = re.compile(r"\?|\.\.|…|\b(?:if|but|fails?|impossible|doubt|false|think|would|was)\b", re.IGNORECASE)
_FORMULA = re.compile(r"[+*/^<>|~!¬&]|\\(?!text)[a-zA-Z]+|(?<!\S)-\s*[(\[]?[A-J](?![a-z])|(?<![A-Za-z])[A-J]-(?=\S)")
_LIMIT = re.compile(r"\b(?:than|least|most|too|over|under|up to)\b", re.IGNORECASE)
_NO_LETTER = "no option named"
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


@dataclass(frozen=True, slots=True)
class Options:
    """letters: the letters that may be chosen. texts: what each stands for, empty when unknown."""

    letters: str
    texts: dict[str, str]


def read_options(value: object) -> Options:
    """Options from a column value: a list of labelled or plain texts, a mapping from letter to text, or None.

    >>> read_options(["A)3", "B) 4"]).texts, read_options(None).letters
    ({'A': '3', 'B': '4'}, 'ABCDEFGHIJ')
    """
    if isinstance(value, dict):
        texts = {str(key).strip().upper(): str(text).strip() for key, text in value.items()}
        return Options("".join(texts), texts)
    if not isinstance(value, (list, tuple)) or not value:
        return Options(LETTERS, {})
    texts = {}
    for letter, item in zip(LETTERS, value, strict=False):
        text = str(item).strip()
        while (label := _LABEL.match(text)) is not None and label.group(1).upper() == letter:
            text = text[label.end() :]
        texts[letter] = text
    return Options("".join(texts), texts)


def chosen_letter(text: str, options: Options, *, strict: bool) -> Extraction:
    """The letter of the chosen option. strict: `text` is an answer block, and everything in it counts.

    >>> chosen_letter("I think it's not A, so it's (B).", read_options(None), strict=False).answer
    'B'
    >>> chosen_letter("A B C D", read_options(None), strict=True).answer is None
    True
    """
    if strict:
        return _block_choice(text, options)
    text = _TEXT_COMMAND.sub("", text) if "\\boxed" not in text else text
    boxes = find_boxes(text)
    if boxes and (letter := _letter_of(boxes[-1].content, options)):
        return Extraction(letter, "boxed")
    plain = _without_marks(text)
    if "\n" not in plain and not _MARKER.search(plain) and (letter := _letter_of(plain, options)):
        return Extraction(letter, "whole text")
    found = _free_choice(plain, options)
    if found.answer is None and found.how == _NO_LETTER and (answer := free_answer(text).answer):
        matching = _matching_options(answer, options) or _quoted_options(plain, options)
        return Extraction(matching[0], "option text") if len(matching) == 1 else found
    return found


def _without_marks(text: str) -> str:
    return text.replace("$", " ").replace("{", " ").replace("}", " ").replace("*", " ").strip()


def _block_choice(text: str, options: Options) -> Extraction:
    """The one option that an answer block names; hedges, second letters, formulas and stray numbers make it none."""
    if len(text) > MAX_CHARS:
        return Extraction(None, "the answer block is too long")
    try:
        text = check_visible(text).translate(_FULL_WIDTH)
    except HostileText as error:
        return Extraction(None, str(error))
    if WITHDRAWN.search(text) or text.endswith(".."):
        return Extraction(None, "struck-out, hidden or unfinished text")
    text = _TEXT_COMMAND.sub("", text) if "\\boxed" not in text else text
    boxes = find_boxes(text)
    if boxes:
        letters = list(dict.fromkeys(_letter_of(box.content, options) for box in boxes))
        if len(letters) != 1 or not letters[0]:
            return Extraction(None, "the box names no single option")
        outside = _without_marks(" ".join(gaps_between(text, boxes)))
        if _fault(outside, letters[0], options) or set(_mentions(outside, options)) - {letters[0]}:
            return Extraction(None, "something else beside the box")
        return Extraction(letters[0], "boxed")
    text = _without_marks(text)
    if letter := _letter_of(text, options, strict=True):
        return Extraction(letter, "answer block")
    return _strict_choice(text, options)


def _letter_of(text: str, options: Options, *, strict: bool = False) -> str:
    """The letter when `text` is a choice as a whole: `B`, `(b)`, `B) 4`, `4`; '' for anything else."""
    text = _TEXT_COMMAND.sub("", text).replace("{", "").replace("}", "").replace("$", "").strip().rstrip(".")
    bare = re.fullmatch(r"[(\[]?\s*([A-Ja-j])\s*[)\]:.]?", text)
    if bare is not None:
        letter = bare.group(1).upper()
        return letter if letter in options.letters else ""
    label = _LABEL.match(text)
    if label is not None and len(text) <= 300:
        letter = label.group(1).upper()
        rest = text[label.end() :].strip()
        if _MARKER.search(rest):
            return ""  # `A: The answer is B`
        if letter not in options.letters or any(m.group(1) != letter and m.group(3) for m in _MENTION.finditer(rest)):
            return ""
        matching = _matching_options(rest, options)
        if strict and not matching and (_fault(rest, letter, options) or set(_mentions(rest, options)) - {letter}):
            return ""
        return letter if not matching or letter in matching else ""
    matching = _matching_options(text, options)
    return matching[0] if len(matching) == 1 else ""


def _matching_options(text: str, options: Options) -> list[str]:
    if not options.texts or len(text) > 300:
        return []
    matches = {option: compare_texts(option, text) for option in options.texts.values() if option}
    literally = any(match.rule in ("same text", "same words") for match in matches.values())
    rules = ("same text", "same words") if literally else None  # `3% profit` is not `3% loss`
    return [
        letter
        for letter, option in options.texts.items()
        if option and matches[option].equal and (rules is None or matches[option].rule in rules)
    ]


def _quoted_options(text: str, options: Options) -> list[str]:
    """Options of a number and its unit that the last line quotes (`It takes 5 hours to drive the 15 miles`)."""
    line = text.rpartition("\n")[2]
    if HEDGE.search(line) or _LIMIT.search(line):
        return []
    quantities = {letter: option for letter, option in options.texts.items() if re.fullmatch(r"\d+ [a-z]+", option)}
    return [
        letter for letter, option in quantities.items() if re.search(rf"(?<![\d.,-]){option}\b", line, re.IGNORECASE)
    ]


def _mentions(text: str, options: Options) -> list[str]:
    """Letters that `text` names as choices, in order; articles, pronouns and rejected letters left out."""
    found: list[str] = []
    for match in _MENTION.finditer(text):
        letter, closed = (match.group(1) or match.group(2)).upper(), bool(match.group(3))
        before, after = text[: match.start()], text[match.end() :]
        if letter not in options.letters or _NEGATED.search(before[-40:]) or _REJECTED.match(after):
            continue
        bracketed = match.group().startswith(("(", "[")) or closed
        follows_word = _CHOICE_WORDS.search(before[-40:]) is not None
        if letter in "AI" and not bracketed and not follows_word and _ARTICLE_CONTEXT.match(after):
            continue
        found.append(letter)
    return found


def _strict_choice(text: str, options: Options) -> Extraction:
    letters = list(dict.fromkeys(_mentions(text, options)))
    label = _LABEL.match(text)
    if label is not None and letters == [label.group(1).upper()] and _matching_options(text[label.end() :], options):
        return Extraction(None, "the letter and its text name different options")
    marker = _MARKER.search(text[:60])
    if (
        marker is not None
        and not HEDGE.search(text[: marker.start()])
        and (letter := _letter_of(text[marker.end() :], options, strict=True))
    ):
        return Extraction(letter, "marked in the answer block")
    if not letters:
        answer = block_answer(text).answer
        matching = _matching_options(answer, options) if answer else []
        return Extraction(matching[0], "option text") if len(matching) == 1 else Extraction(None, _NO_LETTER)
    if len(letters) > 1 or _NO_OPTION.search(text):
        return Extraction(None, "several options")
    fault = _fault(text, letters[0], options)
    return Extraction(None, fault) if fault else Extraction(letters[0], "answer block")


def _fault(text: str, letter: str, options: Options) -> str:
    """Why words around a chosen letter do not state it plainly; '' when they do. Rejected letters (`not A, so B`) may
    be named; numbers only as they stand in the option's text."""
    rest = _REJECTED_LETTER.sub(" ", text)
    if HEDGE.search(rest) or _DOUBT.search(rest):
        return "hedging"
    if _FORMULA.search(rest):
        return "the letter stands in a formula"
    numbers = numbers_in(without_working(rest))
    known = numbers_in(options.texts[letter]) if options.texts else numbers[:1]
    return "" if set(numbers) <= set(known) else "numbers beside the letter"


def _free_choice(text: str, options: Options) -> Extraction:
    """The last stated choice: behind the last marker, on the last line, or the last letter of the last sentence."""
    tail = _RULED_OUT.sub(" ", text[-MAX_CHARS:]).strip()
    last_line = tail.rpartition("\n")[2].strip()
    if (_LABEL.match(last_line) is not None and last_line[0] != "a") and (letter := _letter_of(last_line, options)):
        return Extraction(letter, "last line")
    chosen = [match for match in _CHOSEN.finditer(tail) if match.group(1).upper() in options.letters][-1:]
    for marker in reversed(list(_MARKER.finditer(tail))[-4:]):
        if chosen and chosen[0].end() > marker.end():
            break
        found = _marked_choice(tail[marker.end() :], options)
        if found is not None:
            return found
    if chosen:
        return Extraction(chosen[0].group(1).upper(), "marked")
    sentences = [piece for piece in re.split(r"(?<=[.!?])\s+|\n+", tail) if piece.strip()]
    last = sentences[-1] if sentences else ""
    if _NO_OPTION.search(last):
        return Extraction(None, "no option chosen")
    letters = _mentions(last, options)
    if len(set(letters)) > 1 and _ALTERNATIVE.search(last):
        return Extraction(None, "several options")
    if letters:
        return Extraction(letters[-1], "last sentence")
    opening = _mentions(tail[:200], options)[:1]
    if opening and len(text) == len(tail) and tail.lstrip("([").startswith(opening[0]) and not _NO_OPTION.search(tail):
        return Extraction(opening[0], "first word")
    return Extraction(None, _NO_LETTER)


def _marked_choice(tail: str, options: Options) -> Extraction | None:
    """The choice that stands behind a marker, at the beginning of `tail`; None when there is none."""
    corrected = _CORRECTED.search(tail)
    if corrected is not None and (later := _mentions(tail[corrected.end() :], options)):
        return Extraction(later[-1], "corrected")
    phrase = _PHRASE_END.split(tail.lstrip(" \n:("), maxsplit=1)[0]
    if letter := _letter_of(phrase, options):
        return Extraction(letter, "marked")
    letters = _mentions(phrase, options)
    if len(set(letters)) > 1 and _ALTERNATIVE.match(phrase):
        return Extraction(None, "several options")
    if named := [letter.upper() for letter in _NAMED.findall(phrase) if letter.upper() in letters]:
        return Extraction(named[-1], "marked")  # `D/3, which is option A`
    if letters and not _NO_OPTION.search(tail):
        return Extraction(letters[0], "marked")
    answer = free_answer(phrase).answer if phrase else None
    matching = _matching_options(answer, options) if answer else []
    return Extraction(matching[0], "option text") if len(matching) == 1 else None


def score_choice(gold: object, extraction: Extraction, options: Options) -> Score:
    """Compare the chosen letter with the reference, which is a letter or the text of an option."""
    reference = _letter_of(str(gold), options) if gold is not None else ""
    if not reference:
        return Score(None, "the reference is neither a letter nor an option", gold=str(gold), rule="no reference")
    if extraction.answer is None:
        return Score(0.0, extraction.how, None, reference, "no answer")
    equal = extraction.answer == reference
    return Score(float(equal), f"option {extraction.answer} ({extraction.how})", extraction.answer, reference, "letter")


def multiple_choice_reward(
    prompts: Sequence[object],
    completions: Sequence[Completion],
    completion_ids: Sequence[object] | None = None,
    *,
    gold_column: str = "answer",
    options_column: str = "options",
    tagged: bool = True,
    **columns: Sequence[object],
) -> list[Score]:
    """1.0 when the completion chooses the reference option by letter or by its text, else 0.0; None without a
    reference.

    Range: {0, 1}. `tagged`: the choice must stand in the one answer block and be the only one; else the last choice
    after thinking counts. ValueError when the column of references is missing or has another length. Source: accuracy
    rewards of DeepSeek-R1 (arXiv 2501.12948), section 2.2.2; the rules that read the choice are our own.

    >>> text = "<think>2+2</think><answer>(B) 4</answer>"
    >>> multiple_choice_reward([], [text], answer=["B"], options=[["3", "4"]])[0].value
    1.0
    """
    golds = columns.get(gold_column)
    if golds is None or len(golds) != len(completions):
        raise ValueError(f"multiple_choice: column {gold_column!r} with {len(completions)} values is needed")
    option_values = columns.get(options_column) or [None] * len(completions)
    scores: list[Score] = []
    for gold, value, completion in zip(golds, option_values, completions, strict=True):
        options = read_options(value)
        text = completion_text(completion)
        if tagged:
            block = answer_block(text)
            found = Extraction(None, block.reason)
            if block.content is not None:
                found = chosen_letter(block.content, options, strict=True)
        else:
            found = chosen_letter(after_thinking(text), options, strict=False)
        scores.append(score_choice(gold, found, options))
    return scores
