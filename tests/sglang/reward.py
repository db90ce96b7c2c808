"""A reward of users' own, in a file that loads nothing: every reward worker imports it."""

from __future__ import annotations


def length_is_even(response: str, answer: str) -> float:
    """1 for an even number of characters."""
    return float(len(response) % 2 == 0)
