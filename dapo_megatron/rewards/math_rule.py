"""The `math` rule: string rule first, math-verify (sympy) for what strings cannot decide.

Importing this module imports sympy (seconds). It sets no time limit of its own and `bounds.py` cannot foresee everything that never
ends, so call it where the process can be killed.
"""

from __future__ import annotations

import re
from decimal import Decimal
from functools import lru_cache

from math_verify import LatexExtractionConfig, parse, verify

from dapo_megatron.rewards.bounds import MAX_EXPRESSION_CHARS, is_bounded
from dapo_megatron.rewards.rules import find_answer_line, find_last_boxed, is_hedge, normalize_answer

_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_WORD = re.compile(r"[A-Za-z]{2,}")
# math-verify 0.9.0 adds these up, as if `34 39` were a mixed number such as `1 \frac{1}{2}`.
_JUXTAPOSED_NUMBERS = re.compile(r"\d\s+\d|\d\s*\(\s*\d+\s*\)")
_EMPHASIS = " \t*_`\"'“”‘’"
_MATH_DELIMITER = re.compile(r"\\[()\[\]]|\$\$")
# Plain expressions are left out: math-verify 0.9.0 hands those to sympy's parse_expr, which evaluates Python.
_EXTRACTION = [LatexExtractionConfig()]


def is_math_correct(response: str, answer: str) -> bool:
    r"""Whether the stated answer equals the ground truth as a string, a number or an expression.

    The answer is stated on the last `Answer:` line (Markdown emphasis allowed) or, without one, in the last `\boxed{}`.
    Two decimals or two words are compared without math-verify, which would read the words as products of letters.
    """
    stated = find_stated_answer(response)
    if stated is None or len(stated) > MAX_EXPRESSION_CHARS or is_hedge(stated, answer):
        return False
    truth = strip_markup(answer)
    given, expected = normalize_answer(stated), normalize_answer(truth)
    if given == expected:
        return given != ""
    if _DECIMAL.fullmatch(given) and _DECIMAL.fullmatch(expected):
        return Decimal(given) == Decimal(expected)
    if _WORD.fullmatch(given) and _WORD.fullmatch(expected):
        return given.casefold() == expected.casefold()
    if _JUXTAPOSED_NUMBERS.search(given) or not is_bounded(stated, truth):
        return False
    return is_symbolically_equal(stated, truth)


def find_stated_answer(response: str) -> str | None:
    r"""The stated answer without its dress: the `Answer:` line, or the last `\boxed{}` where that is missing or empty."""
    line = find_answer_line(response, allow_markup=True)
    if line is not None and (stated := strip_markup(line)):
        boxed = find_last_boxed(stated) if stated.count(r"\boxed{") == 1 and not is_hedge(stated, "") else None
        return stated if boxed is None else strip_markup(boxed)
    boxed = find_last_boxed(response)
    return None if boxed is None else strip_markup(boxed)


def strip_markup(text: str) -> str:
    r"""Drop math delimiters (`\( \)`, `\[ \]`, `$$`), emphasis and quotes at both ends, and a closing `.`, `,` or `;`."""
    return _MATH_DELIMITER.sub("", text).lstrip(_EMPHASIS).rstrip(_EMPHASIS + ".,;")


@lru_cache(maxsize=4096)
def is_symbolically_equal(given: str, expected: str) -> bool:
    """math-verify's verdict on two LaTeX expressions. Runs for ever on expressions that sympy cannot evaluate."""
    gold, target = (parse(rf"\boxed{{{_bare(text)}}}", _EXTRACTION, parsing_timeout=None) for text in (expected, given))
    return verify(gold, target, timeout_seconds=None)


def _bare(text: str) -> str:
    return text.replace("$", "").strip()
