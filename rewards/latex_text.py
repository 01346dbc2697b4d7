"""One spelling for mathematical text: Unicode signs, LaTeX layout and thousands separators in, plain LaTeX out.

`clean_math(text)` is the first step of every comparison. It only rewrites notation; it never changes a value, and
what it does not know it leaves alone for the parser to refuse. All steps are linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata


class HostileText(ValueError):
    """The answer holds characters that make the text differ from what a reader sees (direction overrides, zero-width
    characters or control characters between the visible ones); it is never right."""


_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ]+")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUBSCRIPT_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR = {char: unicodedata.normalize("NFKC", char).split("⁄") for char in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_GREEK_NAMES = ("delta", "epsilon", "mu", "mu", "rho", "sigma", "tau", "chi", "psi", "Delta", "Omega")
_SIGNS = str.maketrans(
    {
        **{char: chr(ord(char) - 0xFEE0) for char in map(chr, range(0xFF01, 0xFF5F))},
        **{char: rf"\frac{{{top}}}{{{bottom}}}" for char, (top, bottom) in _VULGAR.items()},
        **dict.fromkeys("−–—﹣‐‑", "-"),
        **dict.fromkeys("×✕⨯", r"\times "),
        **dict.fromkeys("·⋅∙•", r"\cdot "),
        **dict.fromkeys("   　", " "),
        **dict.fromkeys("“”„«»", '"'),
        **dict.fromkeys("‘’‛", "'"),
        **dict.fromkeys("′", "'"),
        **dict.fromkeys("∣｜", "|"),
        **{char: rf"\{name} " for char, name in zip("δεμµρστχψΔΩ", _GREEK_NAMES, strict=True)},
        "∗": "*", "≡": r"\equiv ", "→": r"\rightarrow ", "℃": r"^{\circ}C", "℉": r"^{\circ}F", "∴": r"\therefore ",
        "¢": r"\text{ cents}", "⟨": r"\langle ", "⟩": r"\rangle ",
        "÷": "/", "∕": "/", "⁄": "/", "√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ", "°": r"^{\circ}", "º": r"^{\circ}",
        "≤": r"\le ", "≦": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "≧": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ",
        "≈": r"\approx ",
        "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "ℝ": r"\mathbb{R}",
        "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "∖": r"\setminus ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ",
        "θ": r"\theta ", "λ": r"\lambda ", "φ": r"\phi ", "ω": r"\omega ", "…": r"\ldots ",
        "⋯": r"\ldots ",
        "、": ",", "。": ".",
    }
)  # fmt: skip
_MONEY = "$€£¥₹₽₩฿₫₺₪￥￡"
_CURRENCY = re.compile(
    r"(?<![A-Za-z])(?:US|CA|AU|NZ|HK|A|C)\\?\$(?=\s?\d)|\\\$|(?<![A-Za-z])(?:USD|EUR|GBP|Rs\.?|INR)(?=\s?\d)"
    rf"|[{re.escape(_MONEY[1:])}]"
)
_SPACING = re.compile(
    r"(?<!\\)\\(?:quad|qquad|,|;|:|>| |enspace|thinspace|hfill|hspace\*?\{[^{}]*\}|vspace\*?\{[^{}]*\})|~"
    r"|\\phantom\{[^{}]*\}"
)
_SIZED = re.compile(r"\\(?:left|right|[bB]ig{1,2}[lrm]?)(?![a-zA-Z])\.?")
_LAYOUT = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it|mathstrut|strut|"
    r"nonumber|notag|centering|large|Large|huge|Huge|normalsize|small)(?![a-zA-Z])\.?"
)
_RENAMED = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "nicefrac": "frac", "sfrac": "frac", "dbinom": "binom",
    "tbinom": "binom", "leq": "le", "geq": "ge",
    "leqslant": "le", "geqslant": "ge", "neq": "ne", "lt": "<", "gt": ">", "dots": "ldots", "cdots": "ldots",
    "dotsc": "ldots", "dotsb": "ldots", "dotsm": "ldots", "varnothing": "emptyset", "lbrace": "{", "rbrace": "}",
    "lvert": "|", "rvert": "|", "vert": "|", "mid": "|", "backslash": "setminus", "smallsetminus": "setminus",
    "land": "wedge", "lor": "vee", "colon": ":", "to": "rightarrow", "implies": "Rightarrow", "iff": "Leftrightarrow",
    "lbrack": "[", "rbrack": "]", "varphi": "phi", "vartheta": "theta",
    "varepsilon": "epsilon", "imath": "i",
    "jmath": "j", "ast": "cdot", "div": "/", "lparen": "(", "rparen": ")", "cosec": "csc",
    "tg": "tan", "ctg": "cot", "arctg": "arctan", "dollar": "$",
}  # fmt: skip
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_ESCAPED_SYMBOLS = {"<", ">", "|", ":", "[", "]", "(", ")", "/", "i", "j", "$"}
_WRAPPERS = re.compile(
    r"\\(?:boxed|fbox|framebox|underline|mathbf|boldsymbol|bm|mathit|mathcal|mathsf|mathtt|ensuremath|(?:textcolor|colorbox|color)\{[a-z]+\})\s*(?=\{)"
)
_THOUSANDS_LATEX = re.compile(r"(?<=\d)\s*(?:'|\{\s*,\s*\}|,\s*\\!|\\!\s*,?|\\,|\{\\,\})\s*(?=\d{3}(?!\d))")
_THOUSANDS_COMMA = re.compile(r"(?<![\d.,_^{(\[])(\d{1,3}(?:,\d{3})+)(?![\d,]*,?\d)")
_THOUSANDS_BLANK = re.compile(r"(?<![\d.,])(\d{1,3}(?: \d{3})+)(?!\d)(?! ?\d)")
_ORDINAL = r"(?:st|nd|rd|th)"
_IN_TEXT = r"\\(?:text|mathrm|mbox)\s*"
# Other ways to write what the parser knows; each pair is applied once, in this order.
_NOTATION = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\degrees?(?![a-zA-Z])", r"^{\\circ}"),
        (r"(?<=\d)\{\s*([:=.])\s*\}", r"\1"),  # `3{:}30`
        (r"(?<=\d )o'clock\b", "oclock"),
        # `sqrt 10`, `+/-`, `log2(8)`, `x in [1, 2]`, `<1, 2>`
        (r"(?<![\\A-Za-z])sqrt ?(\d+(?:\.\d+)?)", r"\\sqrt{\1}"),
        (r"\+ ?/ ?-", r"\\pm "),
        (r"(?<![\\A-Za-z])log(\d{1,3})(?=\()", r"log_{\1}"),
        (r"\A([a-z]) in (?=[\[({])", r"\1 \\in "),
        (r"\A<([^<>=]{1,400},[^<>=]{1,400})>\Z", r"\\langle \1\\rangle "),
        (r"\\mathbb\s*\{?R\}?\s*\^\s*\{?\+\}?", r"(0,\\infty)"),
        (r"\\color\s*\{[a-z]+\}(?!\s*\{)|\\tag\*?\s*\{[\dA-Za-z*]\}", " "),
        (r"\A\s*(?:\\(?:therefore|implies|Rightarrow|rightarrow)(?![a-zA-Z])|[=:])\s*(?=\S)", ""),
        (r"\\(?:checkmark|square|blacksquare|Box|qed)\s*\Z", ""),
        (rf"(\d)\s*(?:{_IN_TEXT}\{{\s*)?\(?(?:in )?base[ -](\d{{1,2}})\)?(?:\s*\}})?", r"\1_{\2}"),  # `110 (base 2)`
        (r"_\{?\((\d{1,2})\)\}?", r"_{\1}"),
        (  # `4^{\text{th}}`, `4th`
            rf"(?<=\d)\s*(?:\^\s*\{{\s*{_IN_TEXT}\{{\s*{_ORDINAL}\s*\}}\s*\}}|\^\s*\{{\s*{_ORDINAL}\s*\}}"
            rf"|{_IN_TEXT}\{{\s*{_ORDINAL}\s*\}}|(?<=\d)\^?{_ORDINAL}\b)(?!\s*(?:root|power))",
            "",
        ),
        (r"\.(\d{0,40})\\dot\s*\{?(\d)\}?(?:(\d{0,40})\\dot\s*\{?(\d)\}?)?", r".\1\\overline{\2\3\4}"),
        # `0.333...`
        (r"\.(\d{0,40}?)(?:(\d)\2{2,40}|(\d{2,6})\3{1,20})\s*(?:\.{3,}|\\l?dots)", r".\1\\overline{\2\3}"),
    )
)
_MONEY_SCALES = {"k": "thousand", "m": "million", "b": "billion"}
_MONEY_SCALE = re.compile(r"(\\?\$|[€£¥])\s?(\d[\d,.]*)\s?([kKMB])(?![a-zA-Z])")
_TIMES_LETTER = re.compile(r"(?<=\d )x (?=\d)")
_UNION_LETTER = re.compile(r"(?<=[)\]]) ?U ?(?=[(\[])")
# `{-1} ∪ [0, 7)`: braces that are written as on paper.
_PLAIN_SET = re.compile(
    r"(?<![\\^_\w}])\{([-\d][-\d\s,./]{0,99})\}(?=\s*\\(?:cup|cap)(?![a-zA-Z]))|(?<=\\cup) ?\{([-\d][-\d\s,./]{0,99})\}"
)
_CLOCK = re.compile(r"(?<=\d)\s*(?:\\text\{\s*([ap])\.\s?m\.?\s*\}|([ap])\.\s?m\.?(?![a-z]))", re.IGNORECASE)
BOLD = re.compile(r"(?<![\w)\]}*])\*\*(?=[^\s*])([^*\n]{1,400})\*\*(?![\w(*])")
_TO_RATIO = re.compile(r"\A(\d+) (?:to|:) (\d+)\Z")
# `4*I`, as sympy prints the imaginary unit; the rows of aligned equations; a blank whose command lost its blank.
_SYMPY_I = re.compile(r"(?<=\*)(\s*)I(?![A-Za-z0-9_])")
_ALIGNED = re.compile(r"\\begin\s*\{(aligned|align\*?|gathered|split|cases)\}(.{0,1000}?)\\end\s*\{\1\}", re.DOTALL)
_ROOT_INDEX = {"√": "", "∛": "[3]", "∜": "[4]"}
_ROOT_SIGN = re.compile(r"([√∛∜])\s?(\d+(?:\.\d+)?|[a-z](?![a-z]))")
_LONE_BACKSLASH = re.compile(r"(?<!\\)\\\s*\Z")
_EDGE_PAIRS = (
    ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ('"', '"'), ("```", "```"),
    ("`", "`"), ("'", "'"),
    ("**", "**"), ("*", "*"), ("__", "__"), ("_", "_"),
)  # fmt: skip
# `\\\\sqrt`: a command whose backslash was doubled by a template (a row of a matrix never starts with these names).
_DOUBLED = re.compile(
    r"(?<!\\)\\\\(?=(?:[dt]?frac|sqrt|pi|text|cdot|times|infty|left|right|pm|cup|circ|in|le|ge|boxed|begin|end)(?![a-zA-Z]))"
)
_MATH_DELIMITERS = re.compile(r"(?<!\\)\$+|\\\(|\\\)|(?<!\\)\\\[|(?<!\\)\\\]")


_TEXT_COMMAND = re.compile(
    r"\\(?:text|mbox|textbf|textit|textrm|textnormal|mathrm|mathbf|operatorname|emph|boxed|hbox)\s*(?=\{)"
)


def check_visible(text: str) -> str:
    """`text` without invisible characters at its ends. HostileText when control or format characters stand inside.

    >>> check_visible(chr(0x200B) + "42")
    '42'
    """
    stripped = text.strip().strip("\u200b\u2060\ufeff").strip()
    for char in stripped:
        if char > "~" or char < " ":
            category = unicodedata.category(char)
            if category in ("Cf", "Cs", "Co", "Cn") or (category == "Cc" and char not in "\t\n\r"):
                raise HostileText(f"character U+{ord(char):04X} inside the answer")
    return stripped


def _rename(match: re.Match[str]) -> str:
    new = _RENAMED.get(match.group(1))
    if new is None:
        return match.group()
    if new in "{}":
        return "\\" + new
    return new if new in _ESCAPED_SYMBOLS else "\\" + new


def _root(match: re.Match[str]) -> str:
    """`√10` as the root of all its digits."""
    return f"\\sqrt{_ROOT_INDEX[match.group(1)]}{{{match.group(2)}}}"


def _equations(match: re.Match[str]) -> str:
    """The rows of aligned equations as a list; the cases of a function stay."""
    if match.group(1) == "cases" and "&" in match.group(2):
        return match.group()
    rows = match.group(2).replace("&", " ").split("\\\\")
    return ", ".join(row.strip().rstrip(",") for row in rows if row.strip())


_SPELLED_SET = re.compile(
    r"(?:x is |x can be )?(?:the set of )?(?:all )?(?:(real)(?: number| value)?s?(?: of)?(?: x)?|(integer)s?)"
    r"(?:,? (?:except|other than|but|excluding|not equal to)(?: for)? (?:x ?= ?)?(-?[\w/.]+))?"
)


def _spelled_set(text: str) -> str:
    """`all real numbers`, `all real numbers except 2`, `all integers` in signs."""
    if "real" not in text.lower() and "integers" not in text.lower():
        return text
    spelled = _SPELLED_SET.fullmatch(" ".join(plain_letters(text).casefold().strip(" .,:;").split()))
    if spelled is None or spelled.group() in ("real", "integer"):
        return text
    numbers = "\\mathbb{R}" if spelled[1] else "\\mathbb{Z}"
    return numbers + (f"\\setminus\\{{{spelled[3]}\\}}" if spelled[3] else "")


def strip_math_delimiters(text: str) -> str:
    """`text` without dollar signs that open or close math, and without \\( \\) \\[ \\]; escaped dollars stay."""
    return _MATH_DELIMITERS.sub(" ", text)


def strip_edges(text: str) -> str:
    """`text` without paired quotes or math delimiters around the whole and without punctuation at the end
    (an ellipsis stays: `1, 2, ...` goes on)."""
    before = None
    while before != text:
        before = text
        text = text.strip()
        if not text.endswith(".."):
            text = text.rstrip(".,;:").rstrip()
        for opening, closing in _EDGE_PAIRS:
            if len(text) > len(opening) + len(closing) and text.startswith(opening) and text.endswith(closing):
                inside = text[len(opening) : len(text) - len(closing)]
                if closing not in inside.replace("\\$", ""):  # `$x$ and $y$` is no pair
                    text = inside.strip()
    return text


def clean_math(text: str) -> str:
    """Mathematical text in one spelling, ready for the parser.

    >>> clean_math(r"$\\left( \\dfrac{1}{2},\\, 1{,}000 \\right)$")
    '( \\\\frac{1}{2}, 1000 )'
    """
    text = _ROOT_SIGN.sub(_root, check_visible(text))
    text = _LONE_BACKSLASH.sub("", text.translate(_SIGNS))
    text = _SYMPY_I.sub(r"\1i", _ALIGNED.sub(_equations, _spelled_set(text)))
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + run.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT_RUN.sub(lambda run: "_{" + run.group().translate(_SUBSCRIPTS) + "}", text)
    text = text.replace("\\\\%", "\\%").replace("\\%", "%").replace("\\#", "#").replace("\\&", "&").replace("\\_", "_")
    text = _THOUSANDS_LATEX.sub("", _DOUBLED.sub(r"\\", text))
    text = _MONEY_SCALE.sub(lambda match: f"{match[1]}{match[2]} {_MONEY_SCALES[match[3].lower()]}", text)
    for pattern, new in _NOTATION:
        text = pattern.sub(new, text)
    text = _CLOCK.sub(lambda match: f" {(match.group(1) or match.group(2)).lower()}m", text)
    text = strip_math_delimiters(_CURRENCY.sub(" ", BOLD.sub(r"\1", text)))
    text = _WRAPPERS.sub("", text)
    text = _SPACING.sub(" ", text.replace("\\!", ""))
    text = _COMMAND.sub(_rename, _LAYOUT.sub(" ", _SIZED.sub("", text)))
    text = _TO_RATIO.sub(r"\1:\2", strip_edges(" ".join(text.split())))
    text = _THOUSANDS_COMMA.sub(lambda match: match.group().replace(",", ""), text)
    text = _UNION_LETTER.sub(r" \\cup ", _TIMES_LETTER.sub(r"\\times ", text))
    text = _PLAIN_SET.sub(lambda match: f" \\{{{match[1] or match[2]}\\}}", text)
    return _THOUSANDS_BLANK.sub(lambda match: match.group().replace(" ", ""), text)


def plain_letters(text: str) -> str:
    """`text` without LaTeX text commands, braces and math delimiters; case and punctuation stay.

    >>> plain_letters(r"\\textbf{(C)}\\ 12")
    '(C) 12'
    """
    text = strip_math_delimiters(_TEXT_COMMAND.sub("", check_visible(text).translate(_SIGNS)))
    return " ".join(_SPACING.sub(" ", text).replace("{", "").replace("}", "").split())


def plain_words(text: str) -> str:
    """`text` as lower-case words for comparing answers that are words: without LaTeX text commands, articles and
    punctuation.

    >>> plain_words(r"\\text{The Ellipse}.")
    'ellipse'
    """
    text = plain_letters(text).casefold()
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text)
    text = re.sub(r"(?<=\d)\s+(?=[ap]m\b)|(?<=\d)(?:st|nd|rd|th)\b", "", text)
    text = text.lstrip(" \t\n\r\"'`*").rstrip(" \t\n\r\"'`*.,;:" + ("" if any(map(str.isdigit, text)) else "!?"))
    return " ".join(word for word in re.split(r"\s+", text) if word not in ("the", "a", "an"))
