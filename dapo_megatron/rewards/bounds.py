r"""Which expressions are worth giving to sympy: short ones whose evaluation is bounded.

Numbers in sympy are evaluated as they are read, so `9^{9^9}` takes all time there is. Nothing here is complete: the deadline of the
verdict is what holds. It costs seconds a time, these tests microseconds.
"""

from __future__ import annotations

import re
from itertools import accumulate

MAX_EXPRESSION_CHARS = 1000
"""A longer stated answer is wrong without being parsed."""
MAX_NESTING = 12
"""Brackets within brackets; math-verify 0.9.0 takes time exponential in them."""
MAX_POWER_DIGITS = 100_000
"""Digits of a power of numbers that is worked out."""
MAX_FACTORIAL_DIGITS = 4
"""Digits of n in n! and of the numbers in a binomial coefficient."""

_STEP = {**dict.fromkeys("([{", 1), **dict.fromkeys(")]}", -1)}
_POWER = re.compile(r"([0-9]+)[\s{}()]*((?:(?:\^|\*\*)[\s{}()]*[-+]?[0-9]+[\s{}()]*)+)")
_NUMBER = re.compile(r"[0-9]+")
_BINOMIAL = re.compile(r"\\[dt]?binom(?![a-z])|\\choose(?![a-z])")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_LETTER = re.compile(r"[A-Za-z]")
# A sum or an integral restates the problem; with bounds such as 10^9 it is also worked out term by term.
_UNEVALUATED = re.compile(r"\\(?:sum|prod|i*int|oint|lim|limits|b?mod|pmod)(?![a-z])")


def is_bounded(expression: str, truth: str) -> bool:
    """Whether the stated `expression` may be compared symbolically with the ground truth.

    False for expressions that are too long or nest too deep, for powers, factorials and binomial coefficients of numbers that are
    too large, and for sums, products, integrals, limits and remainders unless the ground truth has one too.
    """
    return (
        len(expression) <= MAX_EXPRESSION_CHARS
        and _nesting(expression) <= MAX_NESTING
        and all(_has_bounded_value(power) for power in _POWER.finditer(expression))
        and _has_bounded_factorials(expression)
        and not (_BINOMIAL.search(expression) and _has_long_number(expression))
        and (_UNEVALUATED.search(expression) is None or _UNEVALUATED.search(truth) is not None)
    )


def _nesting(expression: str) -> int:
    return max(accumulate(_STEP.get(character, 0) for character in expression), default=0)


def _has_bounded_value(power: re.Match[str]) -> bool:
    """Read as a tower, which is the largest reading: a^b^c = a^(b^c)."""
    base, *exponents = (int(number) for number in (power[1], *_NUMBER.findall(power[2])))
    exponent = 1
    for number in reversed(exponents):
        if number > 1 and exponent > MAX_POWER_DIGITS.bit_length():
            return False
        exponent = number**exponent
        if exponent > MAX_POWER_DIGITS:
            return False
    return exponent * len(str(base)) <= MAX_POWER_DIGITS


def _has_bounded_factorials(expression: str) -> bool:
    """Of letters, of short numbers, and of brackets with a letter in the expression."""
    has_variable = _LETTER.search(_COMMAND.sub("", expression)) is not None
    for place in re.finditer("!", expression):
        before = expression[: place.start()].rstrip()
        if before[-1:] in {")", "}", "]"} and not has_variable:
            return False
        if before.endswith("!"):
            return False
        digits = len(before) - len(before.rstrip("0123456789"))
        letters = len(before) - len(before.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"))
        if digits > MAX_FACTORIAL_DIGITS or letters > 1:
            return False
    return True


def _has_long_number(expression: str) -> bool:
    return any(len(number) > MAX_FACTORIAL_DIGITS for number in _NUMBER.findall(expression))
