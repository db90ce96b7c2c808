"""Which groups are worth training on (arXiv 2503.14476, section 3.2 and the constraint of eq. 8)."""

from __future__ import annotations


def has_learning_signal(accuracy: float) -> bool:
    """Whether a group with this share of correct samples is kept: 0 < accuracy < 1, strictly.

    Accuracy and not the shaped reward decides: soft overlong punishment gives the samples of an all-correct group different
    rewards, and keeping it would train on nothing but response length.
    """
    return 0 < accuracy < 1


def is_in_band(accuracy: float, accuracy_min: float, accuracy_max: float) -> bool:
    """Whether a group with signal is also neither too hard nor too easy: accuracy_min <= accuracy <= accuracy_max."""
    return accuracy_min <= accuracy <= accuracy_max
