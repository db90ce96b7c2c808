"""How measured steps of a run correct the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Calibration:
    """Factors that predicted seconds of a phase are multiplied with: measured over predicted, medians over a run's steps."""

    source: str
    """The run folder."""
    num_steps: int
    """Steps that were measured."""
    rollout: float = 1.0
    train: float = 1.0
    """Old log-probs, forward, backward and optimizer."""
    sync: float = 1.0

    def factor(self, phase: str) -> float:
        """Of a phase of `StepTime`; old log-probs are part of what a run measures as training."""
        return {"rollout": self.rollout, "log_probs": self.train, "train": self.train, "sync": self.sync}[phase]
