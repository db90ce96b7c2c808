"""Verdicts of the dapo, math and exact rules."""

import subprocess
import sys

import pytest

from dapo_megatron.rewards.math_rule import is_math_correct, is_symbolically_equal
from dapo_megatron.rewards.rules import find_last_boxed, is_dapo_correct, is_exact, normalize_answer

pytestmark = pytest.mark.timeout(120)

# (response, answer, verdict of dapo, verdict of math)
CASES = [
    # where the answer stands
    ("Answer: 34", "34", True, True),
    ("So 17 * 2 = 34.\n\nAnswer: 34", "34", True, True),
    ("answer : 34", "34", True, True),
    ("ANSWER:34", "34", True, True),
    ("Final Answer: 34", "34", True, True),
    ("Answer:\n34", "34", True, True),
    ("Answer: 12\nNo, wait.\nAnswer: 34", "34", True, True),
    ("Answer: 34\nNo, wait.\nAnswer: 12", "34", False, False),
    ("Answer: 34\nThat is all.", "34", True, True),
    ("Answer: 34\n" + "x" * 301, "34", False, False),
    ("Answer: 34\n" + "x" * 280, "34", True, True),
    ("34", "34", False, False),
    ("The answer is 34", "34", False, False),
    ("", "34", False, False),
    ("Answer:", "34", False, False),
    ("Answer:   \n", "34", False, False),
    ("**Answer:** 34", "34", False, True),
    ("**Answer**: 34", "34", False, True),
    ("**Answer: 34**", "34", False, True),
    ("**Answer:**\n\n34", "34", False, True),
    ("__Answer:__ 35", "34", False, False),
    (r"The result is \boxed{34}.", "34", False, True),
    (r"The result is \boxed{35}.", "34", False, False),
    (r"First \boxed{12}, finally \boxed{34}", "34", False, True),
    (r"First \boxed{34}, finally \boxed{12}", "34", False, False),
    (r"Thus \boxed{34", "34", False, False),
    ("Answer:\n\\[\n\\boxed{34}\n\\]", "34", False, True),
    (r"\boxed{34}" + "\nAnswer: 12", "34", False, False),
    (r"Answer: \boxed{34}", "34", True, True),
    (r"Answer: The total is \boxed{34} apples", "34", False, True),
    # numbers
    ("Answer: 34.", "34", False, True),
    ("Answer: 34.0", "34", False, True),
    ("Answer: 034", "34", False, True),
    ("Answer: +34", "34", False, True),
    ("Answer: -34", "34", False, False),
    ("Answer: −34", "-34", True, True),
    ("Answer: .5", "0.5", False, True),
    ("Answer: .5", "5", False, False),
    ("Answer: 34.5", "34", False, False),
    ("Answer: 340", "34", False, False),
    ("Answer: 3 4", "34", False, False),
    ("Answer: 34 39", "73", False, False),
    ("Answer: 34 (39)", "73", False, False),
    ("Answer: 1,007", "1007", True, True),
    ("Answer: 1007", "1,007", True, True),
    ("Answer: 1,234,567", "1234567", True, True),
    ("Answer: 1{,}007", "1007", True, True),
    (r"Answer: 1\,007", "1007", True, True),
    (r"Answer: 1,\!007", "1007", True, True),
    ("Answer: 1,2", "12", False, False),
    ("Answer: 1e3", "34", False, False),
    ("Answer: five", "5", False, False),
    # LaTeX and other dress
    ("Answer: $34$", "34", True, True),
    ("Answer: $34.$", "34", True, True),
    ("Answer: The value is $34$.", "34", True, True),
    ("Answer: $$34$$", "34", True, True),
    (r"Answer: \(34\)", "34", False, True),
    (r"Answer: \[34\]", "34", False, True),
    (r"Answer: \text{34}", "34", True, True),
    (r"Answer: $\mathbf{34}$", "34", True, True),
    ("Answer: $2(x+1)$", "2x+2", False, True),
    (r"Answer: $1 \frac{1}{2}$", "3/2", False, True),
    ("Answer: x = 34", "34", True, True),
    ("Answer: $n=34$", "34", True, True),
    ('Answer: "34"', "34", False, True),
    ("Answer: `34`", "34", False, True),
    (r"Answer: \$34", "34", True, True),
    ("Answer: $34", "34", True, True),
    ("Answer: $1,200.50", "1200.50", True, True),
    # units
    ("Answer: 34 dollars", "34", True, True),
    ("Answer: 34 square units", "34", True, True),
    (r"Answer: 34\text{ cm}^2", "34", True, True),
    (r"Answer: $336^\circ$", "336", True, True),
    ("Answer: 336", r"336^\circ", True, True),
    ("Answer: 34%", "34", True, True),
    (r"Answer: 34\%", "34", True, True),
    ("Answer: 34 million", "34", False, False),
    # hedges
    ("Answer: 34 or 39", "34", False, False),
    ("Answer: 34 or 39", "39", False, False),
    ("Answer: $34$ or $39$", "34", False, False),
    (r"Answer: 34 \text{ or } 39", "34", False, False),
    (r"Answer: \boxed{34} or \boxed{39}", "34", False, False),
    (r"Answer: \boxed{34} or 39", "34", False, False),
    ("Answer: either 34", "34", False, False),
    ("Answer: 34, maybe 39", "34", False, False),
    ("Answer: 34 and 39", "34", False, False),
    ("Answer: $34$ and $39$", "34", False, False),
    ("Answer: 34, 39", "34", False, False),
    (r"Answer: 34 \lor 39", "34", False, False),
    ("Answer: 1 or 2", "1 or 2", True, True),
    # expressions
    (r"Answer: $\frac{1}{2}$", r"\frac{1}{2}", True, True),
    (r"Answer: $\frac12$", r"\frac{1}{2}", True, True),
    (r"Answer: $\dfrac{1}{2}$", r"\frac{1}{2}", True, True),
    (r"Answer: $\tfrac12$", r"\frac{1}{2}", True, True),
    ("Answer: 1/2", r"\frac{1}{2}", False, True),
    ("Answer: 0.5", r"\frac{1}{2}", False, True),
    (r"Answer: $\frac{2}{4}$", r"\frac{1}{2}", False, True),
    (r"Answer: $\frac{1}{3}$", r"\frac{1}{2}", False, False),
    (r"Answer: 3\sqrt{13}", r"3\sqrt{13}", True, True),
    (r"Answer: \sqrt3", r"\sqrt{3}", True, True),
    (r"Answer: $\sqrt{117}$", r"3\sqrt{13}", False, True),
    (r"Answer: $2\pi$", r"2\pi", True, True),
    (r"Answer: $\left(3, \frac{\pi}{2}\right)$", r"\left( 3, \frac{\pi}{2} \right)", True, True),
    (r"Answer: $(3, \pi/2)$", r"\left( 3, \frac{\pi}{2} \right)", False, True),
    ("Answer: $-q + p$", "p - q", False, True),
    ("Answer: $p + q$", "p - q", False, False),
    (r"Answer: $k \ne 1$", r"k \neq 1", False, True),
    # words
    ("Answer: Evelyn", r"\text{Evelyn}", True, True),
    ("Answer: yes", "Yes", False, True),
    ("Answer: seat", "east", False, False),
    ("Answer: B", "B", True, True),
    # pathological but finite
    ("Answer: " + "9" * 5000, "34", False, False),
    ("Answer: " + "(" * 40, "34", False, False),
    (r"\boxed{" * 5000, "34", False, False),
    (r"\boxed{" + "1+" * 5000 + "1}", "5001", False, False),
    ("Answer: 9**9**9**9", "34", False, False),
    ("Answer: " + r"\text{" * 40 + "34" + "}" * 40, "34", True, True),
]


@pytest.mark.parametrize(("response", "answer", "dapo", "math"), CASES)
def test_verdict(response: str, answer: str, dapo: bool, math: bool):
    assert (is_dapo_correct(response, answer), is_math_correct(response, answer)) == (dapo, math)


@pytest.mark.parametrize(
    ("response", "answer", "verdict"),
    [("39", "39", True), (" 39\n", "39", True), ("39.", "39", False), ("3 9", "39", False), ("", "39", False)],
)
def test_exact_compares_stripped_text(response: str, answer: str, verdict: bool):
    assert is_exact(response, answer) is verdict


def test_every_answer_that_is_accepted_by_dapo_is_accepted_by_math():
    assert [case for case in CASES if case[2] and not case[3]] == []


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("x \\geq 3", "x\\geq3"),
        ("x <= 3", "x<=3"),
        (r"\frac 1 2", r"\frac{1}{2}"),
        (r"5\ \text{feet}", "5"),
        ("3 meters", "3"),
        ("meters", "meters"),
        ("12 cubic inches", "12"),
        ("0.\\overline{3}", "0.\\overline{3}"),
        ("10!", "10!"),
    ],
)
def test_normal_form(text: str, normal: str):
    assert normalize_answer(text) == normal


def test_boxed_content_keeps_its_inner_braces():
    assert find_last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}} end}") == r"\frac{1}{2}"


def test_symbolic_comparison_does_not_evaluate_python(tmp_path):
    marker = tmp_path / "evaluated"
    expression = f"open('{marker}', 'w')"
    assert is_symbolically_equal(expression, "34") is False
    assert is_math_correct(f"Answer: {expression}", "34") is False
    assert not marker.exists()


def test_string_rules_import_no_sympy_no_torch_and_no_pydantic():
    code = (
        "import sys, dapo_megatron.rewards.worker_process\n"
        "sys.exit(','.join(m for m in ('sympy', 'torch', 'pydantic', 'numpy') if m in sys.modules) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
