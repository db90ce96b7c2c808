"""Actor and engine must agree about the log-probabilities of the tokens the engine sampled; says so loudly when they do not."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from dapo_megatron.config.schema import Config
from dapo_megatron.types import LogProbError

FP32_LIMITS = {"mean": 1e-3, "max": 0.05}
"""Nats. Two sound fp32 implementations differ by about 1e-6 in the mean and 1e-4 at worst."""
BF16_LIMITS = {"mean": 0.05, "max": None}
"""Nats. Sound bf16 runs have means of 0.005 to 0.02; a single unlikely token may be off by more than 1."""

LIKELY_CAUSES = (
    "likely causes: the engine serves other weights or another model than the actor trains, rollout.temperature reaches only one of "
    "them, top_p or top_k truncate the engine's distribution, or one of them computes in a lower precision"
)

logger = logging.getLogger(__name__)


class LogProbAlarm:
    """`metrics.log_prob_diff_alarm` at work."""

    def __init__(self, config: Config):
        settings = config.metrics.log_prob_diff_alarm
        precise = config.model.dtype == config.rollout.engine.dtype == "fp32"
        automatic = FP32_LIMITS if precise else BF16_LIMITS
        chosen = {"mean": settings.mean, "max": settings.max}
        self._limits = {kind: automatic[kind] if value == "auto" else value for kind, value in chosen.items()}
        self._stops = settings.action == "stop"
        self._has_said_that_it_is_blind = all(limit is None for limit in self._limits.values())

    def check(self, row: Mapping[str, float], rollout_step: int) -> None:
        """Warn, or raise LogProbError, when a difference of this step is above its limit or NaN; steps that measured none pass, the first of them with a line."""
        if not self._has_said_that_it_is_blind and "actor/log_prob_diff_mean" not in row:
            self._has_said_that_it_is_blind = True
            logger.warning(
                f"metrics.log_prob_diff_alarm does not see rollout step {rollout_step}, nor later ones like it: every token was drawn by "
                "older weights than those about to be trained (train.rollout_lag, partial rollouts), and no two numbers of the same weights "
                "are there to compare; actor/mismatch_mean holds their difference and what training has changed."
            )
        for kind, limit in self._limits.items():
            value = row.get(f"actor/log_prob_diff_{kind}")
            if value is None or limit is None or value <= limit:
                continue
            problem = (
                f"actor/log_prob_diff_{kind} is {value:.3g} nats in rollout step {rollout_step}, above "
                f"metrics.log_prob_diff_alarm.{kind} ({limit:g}); {LIKELY_CAUSES}"
            )
            if self._stops:
                raise LogProbError(problem)
            logger.warning("%s", problem)
