r"""Throughput of the `math` verifier: the responses of one rollout step of the paper, scored by the real worker processes.

    python -m benchmarks.verifier
    python -m benchmarks.verifier --hostile 64 --num-workers 8

512 problems x 16 responses of 20,000 characters. One problem in five has an expression as its answer (fractions, roots), the others an
integer; 70 % of the responses are right. Answers come as an `Answer:` line or in a box, an expression in one of several equal forms; one
response in twenty is cut off. `--hostile` puts so many power towers and the like in the place of answers, half of which only the
deadline ends. No verdict is reused between problems: every expression is another one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import time
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version

from dapo_megatron.config.schema import RewardConfig
from dapo_megatron.rewards.workers import RewardWorkers
from dapo_megatron.types import Score

TARGET_SECONDS = 20.0
_SENTENCES = (
    "Let us write $n = 2k + 1$ and look at the remainder. ",
    "By the triangle inequality $|a + b| \\leq |a| + |b|$, hence the bound holds. ",
    "Wait, that does not follow; let me check the case $x = 3$ again.\n",
    "Substituting gives $\\frac{x^2 - 1}{x + 1} = x - 1$, so \\boxed{7} cannot be right. ",
    "So far the answer would be 12, but the second condition fails.\n\n",
    "{Therefore} we sum over all $k$ from 1 to $n$ and get $\\frac{n(n+1)}{2}$. ",
)
_STOPPED_BY_BOUNDS = ("Answer: $9^{9^{9^9}}$", "Answer: $(10^9)!$", r"\boxed{\sum_{k=1}^{10^9} k^k}", "Answer: " + "{" * 100)
_STOPPED_BY_DEADLINE = (r"\boxed{\Gamma(10^{10})}", r"\boxed{\sin^{200}(x)+\cos^{200}(x)+\tan^{150}(x)}")


@dataclass(frozen=True, slots=True)
class Problem:
    """The responses to one problem."""

    answer: str
    responses: tuple[str, ...]


def problems(num_problems: int, num_responses: int, num_chars: int, num_hostile: int, seed: int = 0) -> list[Problem]:
    """The workload; the same for the same arguments."""
    rng = random.Random(seed)
    hostile = set(rng.sample(range(num_problems * num_responses), num_hostile))
    made = []
    for index in range(num_problems):
        is_expression = index % 5 == 0
        truth = Fraction(rng.randrange(1, 2000), rng.randrange(2, 60)) if is_expression else Fraction(rng.randrange(100_000))
        responses = []
        for at in range(num_responses):
            if index * num_responses + at in hostile:
                ending = rng.choice(rng.choice((_STOPPED_BY_BOUNDS, _STOPPED_BY_DEADLINE)))
            else:
                ending = _ending(truth if rng.random() < 0.7 else truth + rng.randrange(1, 9), is_expression, rng)
            responses.append(reasoning(num_chars - len(ending), rng) + ending)
        made.append(Problem(_latex(truth), tuple(responses)))
    return made


def reasoning(num_chars: int, rng: random.Random) -> str:
    """Text such as a policy writes on its way to an answer."""
    parts: list[str] = []
    length = 0
    while length < num_chars:
        parts.append(rng.choice(_SENTENCES))
        length += len(parts[-1])
    return "".join(parts)[:num_chars]


def _ending(value: Fraction, is_expression: bool, rng: random.Random) -> str:
    if rng.random() < 0.05:
        return ""  # cut off
    stated = _form(value, rng) if is_expression else str(value)
    return rng.choice((f"\n\nAnswer: {stated}", f"\n\n**Answer:** ${stated}$", f"\n\nSo it is $\\boxed{{{stated}}}$."))


def _form(value: Fraction, rng: random.Random) -> str:
    top, bottom, factor = value.numerator, value.denominator, rng.randrange(2, 6)
    return rng.choice(
        (
            rf"\dfrac{{{top}}}{{{bottom}}}",
            rf"\frac{{{top * factor}}}{{{bottom * factor}}}",
            rf"{top}/{bottom}",
            rf"\frac{{\sqrt{{{top**2}}}}}{{{bottom}}}",
        )
    )


def _latex(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


async def score_all(config: RewardConfig, work: list[Problem]) -> tuple[list[tuple[Score, ...]], float]:
    """Verdicts, and the seconds they took once the workers were up."""
    async with RewardWorkers(config) as workers:
        await workers.wait_ready()
        start = time.perf_counter()
        verdicts = await asyncio.gather(*(workers.score(problem.responses, problem.answer) for problem in work))
        return verdicts, time.perf_counter() - start


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-problems", type=int, default=512)
    parser.add_argument("--num-responses", type=int, default=16)
    parser.add_argument("--num-chars", type=int, default=20_000)
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--hostile", type=int, default=0)
    args = parser.parse_args()

    work = problems(args.num_problems, args.num_responses, args.num_chars, args.hostile)
    config = RewardConfig(type="math", num_workers=args.num_workers)
    cpu_before = time.process_time()
    verdicts, seconds = asyncio.run(score_all(config, work))
    own_cpu = time.process_time() - cpu_before

    scores = [score for group in verdicts for score in group]
    num_expected = args.num_problems * args.num_responses
    assert len(scores) == num_expected, f"{num_expected - len(scores)} slots lost"
    errors = Counter(score.error for score in scores if score.error)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, python {platform.python_version()}")
    print(f"math-verify {version('math-verify')}, sympy {version('sympy')}, {args.num_workers} scorers")
    print(f"{len(scores)} responses of {args.num_chars} characters, {args.hostile} hostile")
    print(f"seconds                {seconds:8.2f}   (target {TARGET_SECONDS:g} on 2 cores)")
    print(f"responses per second   {len(scores) / seconds:8.0f}")
    print(f"CPU of the trainer     {own_cpu:8.2f} s")
    print(f"correct                {sum(score.correct for score in scores) / len(scores):8.3f}")
    for error, count in errors.most_common():
        print(f"wrong by default       {count:8d}   {error}")


if __name__ == "__main__":
    main()
