"""What a probe measures of a layout, and what follows for a whole rollout step. Free of megatron."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProbedStep:
    """One optimizer step of `num_micro_batches` on every data-parallel rank; times are from barrier to barrier."""

    num_micro_batches: int
    update_seconds: float
    """Forward, backward, reductions and the optimizer."""
    log_prob_seconds: float
    """The forward pass that gives old log-probs of the same micro-batches."""


@dataclass(frozen=True, slots=True)
class Probed:
    """The steps one rank measured, in the order they were given."""

    steps: tuple[ProbedStep, ...]
    peak_device_bytes: int | None
    """Most that torch had allocated on the rank's device during the last step; None where there is no GPU."""


@dataclass(frozen=True, slots=True)
class MeasuredLayout:
    """Times of a layout as a line through two steps: `fixed_seconds + seconds_per_micro_batch * m`.

    Warm-up and drain of the pipeline, the reductions that nothing hides and the optimizer are the fixed part.
    """

    fixed_seconds: float
    seconds_per_micro_batch: float
    log_prob_seconds_per_micro_batch: float
    peak_device_bytes: int | None
    noisy: bool
    """The longer step did not take longer: the machine did other work, and all of its time is counted per micro-batch."""

    @classmethod
    def of(cls, probed: Probed) -> MeasuredLayout:
        """From steps of two sizes; of several of one size the fastest counts."""
        updates: dict[int, float] = {}
        forwards: dict[int, float] = {}
        for step in probed.steps:
            number = step.num_micro_batches
            updates[number] = min(updates.get(number, math.inf), step.update_seconds)
            forwards[number] = min(forwards.get(number, math.inf), step.log_prob_seconds)
        short, long = sorted(updates)
        seconds = (updates[long] - updates[short]) / (long - short)
        noisy = seconds <= 0
        if noisy:
            seconds = updates[long] / long
        return cls(
            fixed_seconds=max(0.0, updates[short] - seconds * short),
            seconds_per_micro_batch=seconds,
            log_prob_seconds_per_micro_batch=forwards[long] / long,
            peak_device_bytes=probed.peak_device_bytes,
            noisy=noisy,
        )

    def rollout_step_seconds(self, *, num_updates: int, num_micro_batches: int, log_probs: bool) -> float:
        """Training of one rollout step: `num_updates` optimizer steps of `num_micro_batches`, and their old log-probs.

        `log_probs`: they come from the actor; the first optimizer step needs none, its forward pass gives them.
        """
        update = self.fixed_seconds + self.seconds_per_micro_batch * num_micro_batches
        forward = self.log_prob_seconds_per_micro_batch * num_micro_batches if log_probs else 0.0
        return num_updates * update + (num_updates - 1) * forward
