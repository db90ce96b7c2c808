"""From the configuration to a reward function, and from what the function says to a Score."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol, SupportsFloat, cast

from dapo_megatron.rewards.rules import is_dapo_correct, is_exact
from dapo_megatron.rewards.stated_answer import states_nothing
from dapo_megatron.types import RewardError, Score

_MAX_ERROR_CHARS = 300


class RewardFn(Protocol):
    """Judges one response. A number is the reward, correct where > 0; a bool stands for the configured rewards."""

    def __call__(self, response: str, answer: str) -> Score | float: ...


@dataclass(frozen=True, slots=True)
class Judge:
    """A reward function and the rewards of its plain verdicts."""

    function: RewardFn
    correct_reward: float
    wrong_reward: float
    stated_answer: Callable[[str], str | None] = states_nothing
    """What a response votes for in maj@k."""

    def score(self, response: str, answer: str) -> Score:
        """The function's verdict; whatever the function raises becomes a wrong verdict with `error` set."""
        try:
            verdict = self.function(response, answer)
            stated = self.stated_answer(response)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - user code may raise anything; it costs this sample only
            return self._failed(f"{type(error).__name__}: {error}")
        if isinstance(verdict, bool):
            return Score(self.correct_reward if verdict else self.wrong_reward, verdict, answer=stated)
        if isinstance(verdict, SupportsFloat):
            reward = float(verdict)
            verdict = Score(reward, correct=reward > 0, answer=stated)
        if not isinstance(verdict, Score):
            return self._failed(f"reward function returned {verdict!r}; return a Score, a number or a bool")
        if not math.isfinite(verdict.reward):
            return self._failed(f"reward function returned the reward {verdict.reward}; it must be finite")
        return verdict

    def _failed(self, reason: str) -> Score:
        return Score(self.wrong_reward, correct=False, error=reason[:_MAX_ERROR_CHARS])


def load_reward_function(kind: str, function: str | None = None) -> RewardFn:
    """The function behind `reward.type`; `function` is the import path of type custom. Raises RewardError."""
    match kind:
        case "dapo":
            return is_dapo_correct
        case "exact":
            return is_exact
        case "math":
            return _load_math_rule()
        case "custom" if function:
            return _import_function(function)
        case "custom":
            raise RewardError("reward.type is custom but reward.function is not set; set it to `module:function`.")
    raise RewardError(f"reward.type ({kind}) is unknown; use dapo, math, exact or custom.")


def _load_math_rule() -> RewardFn:
    from dapo_megatron.rewards.math_rule import is_math_correct  # here, not above: it imports sympy (seconds)

    # math-verify 0.9.0 warns whenever its own alarm is off; the deadline is kept by the parent process.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    is_math_correct(r"Answer: \frac{2}{4}", "0.5")  # builds the LaTeX grammar before the first deadline runs
    return is_math_correct


def _import_function(path: str) -> RewardFn:
    module_name, separator, attribute = path.partition(":")
    if not (separator and module_name and attribute):
        raise RewardError(f"reward.function ({path}) must be an import path `module:function`, such as `my_rewards:score`.")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything while it is imported
        raise RewardError(
            f"reward.function ({path}): importing {module_name} raised {error!r}; "
            "start from the folder of the module, put that on PYTHONPATH, or fix the module."
        ) from error
    try:
        function = attrgetter(attribute)(module)
    except AttributeError as error:
        raise RewardError(f"reward.function ({path}): {error}; name a function of {module_name}.") from error
    if not callable(function):
        raise RewardError(f"reward.function ({path}) is {function!r}; it must be callable as (response, answer).")
    return cast(RewardFn, function)
