"""Time of a rollout step, by item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["rollout", "log_probs", "train", "sync"]
PHASES: tuple[Phase, ...] = ("rollout", "log_probs", "train", "sync")


@dataclass(frozen=True, slots=True)
class TimeItem:
    """Seconds of a step that one thing takes; what runs beside something else counts only where it is waited for."""

    phase: Phase
    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """One rollout step. The seconds of `items` add up to it."""

    items: tuple[TimeItem, ...]
    num_gpus: int
    num_trained_tokens: float
    """Prompt and response tokens of the sequences trained on."""
    num_generated_tokens: float
    """Response tokens, of dropped groups too."""
    train_flops: float
    """Forward and backward of the trained tokens, without recompute, over all devices."""
    peak_flops_per_second: float
    """Of one device."""

    @property
    def step_seconds(self) -> float:
        """The whole step."""
        return sum(item.seconds for item in self.items)

    def phase_seconds(self, phase: Phase) -> float:
        """The items of one phase together."""
        return sum(item.seconds for item in self.items if item.phase == phase)

    @property
    def tokens_per_gpu_second(self) -> float:
        """Trained tokens per device and second of the whole step."""
        return self.num_trained_tokens / self.num_gpus / self.step_seconds

    @property
    def mfu(self) -> float:
        """Training FLOPs over what all devices could do during the train phase, in [0, 1]."""
        return self.train_flops / (self.peak_flops_per_second * self.num_gpus * self.phase_seconds("train"))

    def gpu_hours(self, num_rollout_steps: int) -> float:
        """Device hours of a run."""
        return self.step_seconds * num_rollout_steps * self.num_gpus / 3600
