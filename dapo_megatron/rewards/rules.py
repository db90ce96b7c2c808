"""String rules: where a response states its answer, how answers are brought to one form, and the verdicts built on that.

Pure functions of `(response, answer)`, linear in the length of the response.
"""

from __future__ import annotations

import re

ANSWER_WINDOW_CHARS = 300
"""The answer line is searched in so many trailing characters (DAPO release)."""

_ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
_MARKED_ANSWER_LINE = re.compile(r"(?i)Answer[*_\s]*:[*_\s]*([^\n]+)")
_HEDGE = re.compile(r"(?i)(?<![a-z])(?:or|either|maybe|perhaps|possibly)(?![a-z])|\\lor(?![a-z])|\\vee(?![a-z])")
_MATH_SEGMENT = re.compile(r"(?<!\\)\$([^$]+)(?<!\\)\$")
_EQUALS = re.compile(r"(?<![<>!:\\])=")
_STYLE_COMMAND = re.compile(r"\\(?:boxed|fbox|text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_THIN_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|\\,|,\\!)\s*(?=\d{3})")
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad(?![a-z])|~")
_SIZING = re.compile(r"\\(?:left|right|big|Big|displaystyle)(?![a-zA-Z])")
_DEGREE = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|°")
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:(\d)|\{([^{}]*)\})\s*(?:(\d)|\{([^{}]*)\})")
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\d)")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_LOOSE_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_UNIT = re.compile(
    r"""(?ix) (?<=[\d)}\s])\s*
    (?:(?:square|sq|cubic)\s*)?
    (?: units? | ways? | integers? | digits? | points? | students? | people | percent | %
      | dollars? | cents? | usd | degrees? | radians?
      | (?:milli|centi|kilo)?(?:meter|metre|gram|liter|litre)s? | mm | cm | km | kg | gm
      | inch(?:es)? | foot | feet | ft | yards? | miles? | mph | pounds? | lbs? | ounces?
      | seconds? | minutes? | hours? | hrs? | days? | weeks? | months? | years?
    ) (?:\s*\^\s*\{?[23]\}?)?$"""
)


def is_exact(response: str, answer: str) -> bool:
    """Whether the stripped response is the stripped answer."""
    return response.strip() == answer.strip()


def is_dapo_correct(response: str, answer: str) -> bool:
    """The rule DAPO was released with: the last `Answer: ...` line near the end, compared as a normalised string.

    Source: arXiv 2503.14476, eq. 7, and its release. Stricter on purpose in three places: a hedge (`34 or 39`) is wrong, a
    space between digits (`3 4`) is kept, and commas are dropped only where they separate thousands.
    """
    line = find_answer_line(response)
    if line is None or is_hedge(line, answer):
        return False
    given = normalize_answer(line)
    return given != "" and given == normalize_answer(answer)


def find_answer_line(response: str, *, allow_markup: bool = False) -> str | None:
    """The text after the last `Answer:` within the last 300 characters; None where there is none.

    `allow_markup` also accepts Markdown emphasis around the label (`**Answer:** 34`), which the released rule misses.
    """
    pattern = _MARKED_ANSWER_LINE if allow_markup else _ANSWER_LINE
    lines = pattern.findall(response[-ANSWER_WINDOW_CHARS:])
    return lines[-1] if lines else None


def find_last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`; None where there is none or its braces do not balance."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


def is_hedge(text: str, answer: str) -> bool:
    """Whether the text offers alternatives (`34 or 39`) although the answer itself holds none."""
    return _HEDGE.search(text) is not None and _HEDGE.search(answer) is None


def normalize_answer(text: str) -> str:
    """One form for answers that differ only in LaTeX dress, spacing, units or thousands separators; nothing is evaluated."""
    text = _EQUALS.split(text)[-1].replace("−", "-")
    segments = _MATH_SEGMENT.findall(text)
    if len(segments) == 1:
        text = segments[0].rstrip(". ")
    text = _THIN_SEPARATOR.sub(",", text)
    text = _SIZING.sub("", _SPACING.sub(" ", text))
    text = unwrap_style(_DEGREE.sub("", text))
    for dress, plain in (("\\$", ""), ("$", ""), ("\\%", "%"), ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac")):
        text = text.replace(dress, plain)
    text = _SHORT_FRACTION.sub(_braced_fraction, text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = _LOOSE_SPACE.sub("", _UNIT.sub("", text.strip()))
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def unwrap_style(text: str) -> str:
    r"""Replace `\text{x}`, `\boxed{x}`, `\mathrm{x}` and their like by `x`, however deep they nest."""
    while True:
        text, count = _STYLE_COMMAND.subn(r"\1", text)
        if count == 0:
            return text


def _braced_fraction(match: re.Match[str]) -> str:
    top_digit, top, bottom_digit, bottom = match.groups(default="")
    return rf"\frac{{{(top_digit or top).strip()}}}{{{(bottom_digit or bottom).strip()}}}"
