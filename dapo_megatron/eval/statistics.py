"""avg@k, pass@k and maj@k of n samples to each of m problems, with standard errors. Pure functions.

A standard error is clustered by problem: samples of one problem are not independent, so the problem's mean is the observation and the
error is that of the mean of m of them (arXiv 2411.00640, section 2.2). It answers "how far may this be from other problems of the
kind". To compare two policies on the same problems, `sampling_standard_error` is the smaller one that counts: only the drawing of
responses varies.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems. `standard_error` is None for a single problem, which has none."""

    value: float
    standard_error: float | None

    @classmethod
    def over_problems(cls, values: Sequence[float]) -> Estimate:
        """From one value per problem (at least one)."""
        count = len(values)
        mean = math.fsum(values) / count
        if count == 1:
            return cls(mean, None)
        return cls(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count))


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k samples, drawn without replacement from these, hold a correct one: 1 - C(n - c, k) / C(n, k).

    Unbiased for the probability that k fresh samples do. Source: arXiv 2107.03374, eq. 1.
    """
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def pass_ks(num_samples: int) -> list[int]:
    """Powers of two up to the number of samples."""
    return [2**power for power in range(num_samples.bit_length())]


def majority_accuracy(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """maj@n: whether the most frequent answer is correct, from the stated answers and verdicts of n samples of a problem.

    A sample without an answer does not vote; no vote at all is wrong. Answers that tie for the most votes count by their mean, as if one
    of them were drawn. An answer whose samples got different verdicts (a time-out among them) counts by the mean of those.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    verdicts: defaultdict[str, list[bool]] = defaultdict(list)
    for answer, is_correct in zip(answers, correct, strict=True):
        if answer is not None:
            verdicts[answer].append(is_correct)
    most = max(votes.values())
    winners = [verdicts[answer] for answer, count in votes.items() if count == most]
    return sum(sum(verdict) / len(verdict) for verdict in winners) / len(winners)


def sampling_standard_error(num_samples: int, num_correct: Sequence[int]) -> float | None:
    """Of avg@n when the problems stay and the responses are drawn anew; None for one sample each, which shows no spread."""
    if num_samples == 1:
        return None
    shares = [correct / num_samples for correct in num_correct]
    return math.sqrt(math.fsum(share * (1 - share) for share in shares) / (num_samples - 1)) / len(shares)
