"""Soft overlong punishment (arXiv 2503.14476, eq. 13)."""

from __future__ import annotations


def soft_overlong_punishment(num_tokens: int, max_response_tokens: int, cache_tokens: int) -> float:
    """Reward, in [-1, 0], added for a response of `num_tokens`, its stop token included.

    0 up to L_max - L_cache, then linear down to -1 at L_max, and -1 beyond. L_max is `max_response_tokens`, where generation
    stops; L_cache is `cache_tokens`; 0 turns the punishment off. L_cache > L_max raises ValueError.
    """
    if not 0 <= cache_tokens <= max_response_tokens:
        raise ValueError(
            f"overlong_cache_tokens ({cache_tokens}) must be between 0 and max_response_tokens ({max_response_tokens}); "
            "lower it, or use 0 for no punishment"
        )
    expected = max_response_tokens - cache_tokens
    if cache_tokens == 0 or num_tokens <= expected:
        return 0.0
    return max(-1.0, (expected - num_tokens) / cache_tokens)
