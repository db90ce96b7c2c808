"""What a response states as its answer, in one form: the votes of maj@k.

The same search and the same normalisation as the reward rule's, so responses of one form have one verdict. Nothing is evaluated: answers
that only the `math` rule sees as equal (`1/2`, `0.5`) are different votes.
"""

from __future__ import annotations

from collections.abc import Callable

from dapo_megatron.rewards.rules import find_answer_line, normalize_answer

MAX_ANSWER_CHARS = 1000
"""A longer one counts as none: it is kept with every response."""


def stated_answer_rule(kind: str) -> Callable[[str], str | None]:
    """The rule that belongs to `reward.type`: the normalised answer of a response, None where it states none.

    Type custom has none; its function may set `Score.answer` itself.
    """
    match kind:
        case "dapo":
            return _answer_line
        case "exact":
            return _whole_response
        case "math":
            return _answer_line_or_box
    return states_nothing


def states_nothing(response: str) -> None:
    """The rule of a reward function whose answers are unknown."""


def _answer_line(response: str) -> str | None:
    return _normalized(find_answer_line(response))


def _whole_response(response: str) -> str | None:
    return _bounded(response.strip())


def _answer_line_or_box(response: str) -> str | None:
    from dapo_megatron.rewards.math_rule import find_stated_answer  # here, not above: it imports sympy (seconds)

    return _normalized(find_stated_answer(response))


def _normalized(answer: str | None) -> str | None:
    return None if answer is None or len(answer) > MAX_ANSWER_CHARS else _bounded(normalize_answer(answer))


def _bounded(answer: str) -> str | None:
    return answer if 0 < len(answer) <= MAX_ANSWER_CHARS else None
