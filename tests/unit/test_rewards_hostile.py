"""What a policy may write to break or to cheat the verifier: every response has its verdict, and none takes another's."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass

import pytest

from dapo_megatron.config.schema import RewardConfig
from dapo_megatron.rewards.bounds import is_bounded
from dapo_megatron.rewards.rules import is_dapo_correct
from dapo_megatron.rewards.workers import RewardWorkers
from dapo_megatron.types import Score

pytestmark = pytest.mark.timeout(120)

TIMEOUT_SECONDS = 5.0
MEBI = 2**20


def nested(opening: str, core: str, depth: int, closing: str = "}") -> str:
    return opening * depth + core + closing * depth


# name -> (response, answer, verdict of dapo, verdict of math)
CASES = {
    # what sympy would work on for ever
    "power tower of python": ("Answer: 9**9**9**9", "34", False, False),
    "power tower": ("Answer: $9^{9^{9^9}}$", "34", False, False),
    "boxed power tower": (r"\boxed{9^{9^{9^{9}}}}", "34", False, False),
    "huge power": ("Answer: $2^{1000000000000}$", "34", False, False),
    "huge negative power": ("Answer: $7^{-99999999999}$", "34", False, False),
    "remainder of a tower": (r"\boxed{2^{2^{100}} \mod 7}", "2", False, False),
    "factorial of python": ("Answer: factorial(10**9)", "34", False, False),
    "factorial of a power": ("Answer: $(10^9)!$", "34", False, False),
    "factorial of a billion": ("Answer: $1000000000!$", "34", False, False),
    "factorials of factorials": ("Answer: $((100!)!)!$", "34", False, False),
    "factorial of letters": ("Answer: " + "a" * 290 + "!", "34", False, False),
    "gamma function": (r"\boxed{\Gamma(10^{10})}", "34", False, False),
    "binomial coefficient": (r"Answer: $\binom{1000000000}{500000000}$", "34", False, False),
    "sum of a billion terms": (r"Answer: $\sum_{k=1}^{1000000000} k^{k}$", "34", False, False),
    "integral without closed form": (r"Answer: $\int_0^1 \sin(\sin(\sin(x^x))) dx$", "34", False, False),
    "polynomial of a million terms": ("Answer: $(x+y+z+w)^{400}$", "(x+y+z+w)^{401}", False, False),
    "huge exponent of ten": ("Answer: 1e999999999", "34", False, False),
    "the problem restated": (r"\boxed{\sum_{k=1}^{10} k}", "55", False, False),
    # depth and length
    "nested fractions": ("Answer: $" + nested(r"\frac{1}{1+", "1", 15) + "$", "34", False, False),
    "nested roots": (r"\boxed{" + nested(r"\sqrt{", "2", 100) + "}", "34", False, False),
    "nested boxes": (nested(r"\boxed{", "34", 30), "34", False, True),
    "5000 nested boxes": (nested(r"\boxed{", "34", 5000), "34", False, True),
    "5000 open boxes": (r"\boxed{" * 5000 + "34", "34", False, False),
    "nested braces": ("Answer: " + nested("{", "34", 120), "34", False, False),
    "100000 nested braces": (nested("{", "34", 100_000), "34", False, False),
    "nested parentheses": (r"\boxed{" + nested("(", "34", 480, ")") + "}", "34", False, False),
    "nested text": ("Answer: " + nested(r"\text{", "34", 35), "34", True, True),
    "a megabyte of digits": ("Answer: " + "9" * MEBI, "34", False, False),
    "a megabyte of digits in a box": (r"\boxed{" + "9" * MEBI + "}", "34", False, False),
    "900 digits": (r"\boxed{" + "9" * 900 + "}", "34", False, False),
    "sum of 450-digit numbers": (r"\boxed{" + "9" * 450 + "+" + "9" * 450 + "}", "34", False, False),
    "a megabyte before the answer": ("x" * MEBI + "\nAnswer: 34", "34", True, True),
    "a megabyte of spaces": (" " * MEBI, "34", False, False),
    "nothing": ("", "34", False, False),
    # what would make a careless pattern backtrack
    "label without colon": ("Answer" + " " * 100_000 + "x", "34", False, False),
    "label again and again": ("Answer:" * 100_000, "34", False, False),
    "dollars": ("Answer: " + "$" * 290, "34", False, False),
    "commas": ("Answer: " + "1," * 140 + "x", "34", False, False),
    "spaced digits": ("Answer: " + "3 " * 140, "34", False, False),
    "open commands": ("Answer: " + r"\text{" * 40, "34", False, False),
    # characters
    "fullwidth digits": ("Answer: ３４", "34", False, False),
    "arabic digits": ("Answer: ٣٤", "34", False, False),
    "superscript digits": ("Answer: ³⁴", "34", False, False),
    "circled number": ("Answer: ㉞", "34", False, False),
    "bold digits": ("Answer: 𝟑𝟒", "34", False, False),
    "NUL at the end": ("Answer: 34\0", "34", False, False),
    "NUL between digits": ("Answer: 3\x004", "34", False, False),
    "nothing but NUL": ("\0" * 1000, "34", False, False),
    "reversed by an override": ("Answer: \u202e43\u202c", "34", False, False),
    "override before the digits": ("Answer: \u202e34", "34", False, False),
    "right-to-left marks": ("Answer: \u200f34\u200f", "34", False, False),
    "zero-width space between digits": ("Answer: 3\u200b4", "34", False, False),
    "lone surrogate": ("Answer: 34 \ud800", "34", False, False),
    "terminal colours": ("Answer: \x1b[31m34\x1b[0m", "34", False, False),
    # code
    "python import": ("Answer: __import__('os').system('sleep 100')", "34", False, False),
    "python exit": (r"\boxed{__import__('os')._exit(0)}", "34", False, False),
    # the prompt's own words
    "prompt echo": ("The last line should be of the form Answer: $Answer\nThe sum is 12, so I stop", "34", False, False),
    "prompt echo with the answer": ('End with "Answer: 34".\nI do not know.\nAnswer: 12', "34", False, False),
    "instruction repeated": ('Remember to put your answer on its own line after "Answer:".', "34", False, False),
    "placeholder": ("Answer: $Answer", "34", False, False),
    "empty box": (r"Answer: \boxed{}", "34", False, False),
    # several answers at once
    "or": ("Answer: 34 or 39", "34", False, False),
    "either": ("Answer: either 34 or 39", "39", False, False),
    "maybe": ("Answer: maybe 34", "34", False, False),
    "and": ("Answer: 34 and 39", "34", False, False),
    "comma": ("Answer: 34, 39", "34", False, False),
    "semicolon": ("Answer: 34; 39", "34", False, False),
    "slash": ("Answer: 34/39", "34", False, False),
    "set": (r"Answer: $\{34, 39\}$", "34", False, False),
    "two boxes": (r"Answer: \boxed{34} \boxed{39}", "34", False, False),
    "boxes with or": (r"Answer: \boxed{34} or \boxed{39}", "34", False, False),
    "list": ("Answer: 1 2 3 34", "34", False, False),
    "parenthesis": ("Answer: 39 (34)", "34", False, False),
    "plus or minus": (r"Answer: $\pm 34$", "34", False, False),
    "interval": ("Answer: $[0, 100]$", "34", False, False),
    "inequality": ("Answer: $x > 0$", "34", False, False),
    "negation": ("Answer: not 34", "34", False, False),
    "unequal": (r"Answer: $\neq 34$", "34", False, False),
    "another language": ("Answer: 34 或 39", "34", False, False),
    # honest answers in odd dress
    "chain of equations": ("Answer: 2*17 = 34", "34", True, True),
    "thousands separator": ("Answer: 1,007", "1007", True, True),
    "thousands separator of LaTeX": ("Answer: 1{,}007", "1007", True, True),
    "commas in wrong places": ("Answer: 1,00,7", "1007", False, False),
    "space for thousands": ("Answer: 1 007", "1007", False, False),
    "point for thousands": ("Answer: 1.007", "1007", False, False),
    "fraction for a decimal": (r"Answer: $\frac{1}{2}$", "0.5", False, True),
    "slash for a fraction": ("Answer: 1/2", r"\frac{1}{2}", False, True),
    "another fraction": ("Answer: 1/3", "0.5", False, False),
    "division by zero": ("Answer: 1/0", "34", False, False),
    "zero by zero": (r"Answer: $\frac{0}{0}$", "0", False, False),
    "percent": ("Answer: 34%", "34", True, True),
    "percent is not a hundredth": ("Answer: 34%", "0.34", False, False),
    "unit": (r"Answer: $34\text{ meters}$", "34", True, True),
    "unit that would need conversion": ("Answer: 340 mm", "34", False, False),
    "full stop": ("Answer: 34.", "34", False, True),
    "bold": ("**Answer: 34**", "34", False, True),
    "bold label": ("**Answer:** **34**", "34", False, True),
    "heading": ("### Answer: 34", "34", True, True),
    "not a number": ("Answer: nan", "34", False, False),
    "infinity": (r"Answer: $\infty$", "34", False, False),
}
KILLED = {"gamma function", "polynomial of a million terms"}
"""What no bound foresees: the deadline ends it."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Verdicts by name; `neighbours` are those of a plain right response scored after each case."""

    scores: dict[str, Score]
    neighbours: dict[str, Score]


@pytest.fixture(scope="module")
def scored() -> Scored:
    """All cases, each with a plain right response after it, on two scorers at once."""

    async def score_all() -> list[tuple[Score, ...]]:
        async with RewardWorkers(RewardConfig(type="math", num_workers=2, timeout_seconds=TIMEOUT_SECONDS)) as workers:
            calls = [workers.score([response, f"Answer: {answer}"], answer) for response, answer, *_ in CASES.values()]
            return await asyncio.gather(*calls)

    pairs = dict(zip(CASES, asyncio.run(score_all()), strict=True))
    return Scored({name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()})


@pytest.mark.parametrize("name", CASES)
def test_hostile_response_has_its_verdict(name: str, scored: Scored):
    _, _, _, expected = CASES[name]
    late = f"no answer within {TIMEOUT_SECONDS:g} s; the verifier process was killed"
    assert (scored.scores[name].correct, scored.scores[name].error) == (expected, late if name in KILLED else None)


def test_no_response_takes_the_slot_of_its_neighbour(scored: Scored):
    assert [name for name, score in scored.neighbours.items() if not score.correct or score.error] == []


@pytest.mark.parametrize("name", CASES)
def test_the_string_rule_alone_needs_no_limit(name: str):
    response, answer, expected, _ = CASES[name]
    assert is_dapo_correct(response, answer) is expected


@pytest.mark.parametrize(
    "expression",
    [
        r"\frac{1+\sqrt{5}}{2}",
        "2^{2024}",
        "10^{100}",
        "2^{3^{4}}",
        "3^{2^{10}}",
        "x^{2^{n}}",
        "100!",
        "n!",
        "(2n)!",
        r"\frac{10!}{3!7!}",
        r"\binom{2024}{1012}",
        r"\frac{1}{1+\frac{1}{1+\frac{1}{1+\sqrt{2}}}}",
        r"\left(\frac{3}{4}\right)^{10}",
        "123456789012345678901234567890",
        r"\Gamma(\frac{1}{3})",
    ],
)
def test_answers_as_data_sets_have_them_are_compared(expression: str):
    assert is_bounded(expression, "34")


def test_sums_are_compared_where_the_ground_truth_is_one():
    assert is_bounded(r"\sum_{k=1}^{n} k^2", r"\sum_{i=1}^{n} i^2")


def test_bounds_hold_for_any_bracket_around_a_tower():
    for opening, power, closing in itertools.product(["", "(", "{"], ["^", "**", " ^ "], ["", ")", "}"]):
        assert not is_bounded(f"{opening}9{closing}{power}{opening}9{power}{opening}9{power}9{closing}", "34")
