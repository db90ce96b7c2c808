"""Group-relative advantages (arXiv 2503.14476, eq. 9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

AdvantageStd = Literal["population", "sample"]


def group_advantages(rewards: Sequence[float], *, normalize_by_std: bool, std: AdvantageStd, eps: float = 1e-6) -> list[float]:
    """Advantage of each of the G samples of one prompt: (R_i - mean R) / (std R + eps), one value for all tokens of a sample.

    Eq. 9 does not say which standard deviation. `sample` divides by G - 1, as `torch.std` does in the release on verl, with
    the same eps of 1e-6; `population` divides by G and gives advantages larger by sqrt(G / (G - 1)), 3 % at G = 16.
    Without `normalize_by_std` rewards are only centred on their mean (arXiv 2503.20783).

    Equal rewards give exact zeros. A reward that is not finite raises ValueError.
    """
    if not all(map(math.isfinite, rewards)):
        raise ValueError(f"rewards are {list(rewards)}; they must be finite, correct the reward function")
    if len(set(rewards)) <= 1:
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if not normalize_by_std:
        return centred
    divisor = len(rewards) - 1 if std == "sample" else len(rewards)
    scale = math.sqrt(math.fsum(value * value for value in centred) / divisor) + eps
    return [value / scale for value in centred]
