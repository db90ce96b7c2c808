"""What no layout may change, and how far apart two layouts are in it. Free of megatron: the process that compares has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ReplayedUpdate:
    """One optimizer step: loss per trained token, trained tokens, global gradient norm before clipping."""

    loss: float
    num_loss_tokens: int
    grad_norm: float


@dataclass(frozen=True, slots=True)
class Replay:
    """A batch trained on under one layout. Tensors are fp32 by HF name."""

    updates: tuple[ReplayedUpdate, ...]
    gradients: Mapping[str, np.ndarray]
    """Of the first update, before clipping: the weights were still those of the HF directory."""
    weights: Mapping[str, np.ndarray]
    """After the last update."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest relative differences that count as agreement."""

    direct: float
    """Of the first update's loss and norm and of the gradients: the weights are the same, so only rounding differs."""
    after_adam: float
    """Of later losses and norms and of the weight changes. Adam's step is lr * m / (sqrt(v) + eps), at first lr * sign(gradient): it
    makes rounding noise of an element as large as a gradient."""


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """|a - b| / max(|a|, |b|) of one parameter, in the 2-norm; 0 where both are zero."""

    name: str
    gradient: float
    weight_change: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two replays of the same batch side by side; `tensors` from the worst gradient on."""

    updates: tuple[tuple[ReplayedUpdate, ReplayedUpdate], ...]
    tensors: tuple[TensorDifference, ...]

    def disagreements(self, tolerance: Tolerance) -> list[str]:
        """One sentence per quantity that is outside the tolerance; none when the layouts agree. NaN is outside."""
        found = []
        for index, (a, b) in enumerate(self.updates):
            limit = tolerance.after_adam if index else tolerance.direct
            if a.num_loss_tokens != b.num_loss_tokens:
                found.append(f"update {index + 1}: {a.num_loss_tokens} trained tokens in A, {b.num_loss_tokens} in B")
            for what, of_a, of_b, apart in (
                ("loss", a.loss, b.loss, loss_difference(a, b)),
                ("gradient norm", a.grad_norm, b.grad_norm, relative_difference(np.array(a.grad_norm), np.array(b.grad_norm))),
            ):
                if not apart <= limit:
                    found.append(f"update {index + 1}: {what} {of_a:.8g} in A, {of_b:.8g} in B ({apart:.1e} apart)")
        for what, limit, values in (
            ("gradient", tolerance.direct, [(tensor.gradient, tensor.name) for tensor in self.tensors]),
            ("weight change", tolerance.after_adam, [(tensor.weight_change, tensor.name) for tensor in self.tensors]),
        ):
            outside = [(apart, name) for apart, name in values if not apart <= limit]
            if outside:
                apart, name = max(outside, key=_worst_first)
                found.append(f"{what} of {len(outside)} of {len(values)} parameters, {name} worst ({apart:.1e} apart)")
        return found


def compare(a: Replay, b: Replay, before: Mapping[str, np.ndarray]) -> Comparison:
    """`before` are the HF weights both started from."""
    tensors = [
        TensorDifference(
            name,
            relative_difference(gradient, b.gradients[name]),
            _change_difference(a.weights[name], b.weights[name], before[name], len(a.updates)),
        )
        for name, gradient in a.gradients.items()
    ]
    worst_first = sorted(tensors, key=lambda tensor: _worst_first((tensor.gradient, tensor.name)), reverse=True)
    return Comparison(tuple(zip(a.updates, b.updates, strict=True)), tuple(worst_first))


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / max(|a|, |b|) in the 2-norm; 0 where both are zero, NaN where one is not finite."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    size = np.maximum(np.linalg.norm(a), np.linalg.norm(b))  # NaN stays NaN, which max() would lose
    return float(np.linalg.norm(a - b) / size) if size else 0.0


def _change_difference(a: np.ndarray, b: np.ndarray, before: np.ndarray, num_updates: int) -> float:
    """As `relative_difference` of the changes, but for one last fp32 digit of the weight per update: a small lr hardly exceeds that."""
    last_digits = num_updates * np.spacing(np.abs(before))
    beyond = np.maximum(np.abs(a - b) - last_digits, 0.0)
    size = np.maximum(np.linalg.norm(a - before), np.linalg.norm(b - before))
    return float(np.linalg.norm(beyond) / size) if size else 0.0


def loss_difference(a: ReplayedUpdate, b: ReplayedUpdate) -> float:
    """Relative to the loss or to 1, the size of an advantage: at ratio 1 the loss is a mean of advantages of both signs."""
    return abs(a.loss - b.loss) / max(abs(a.loss), abs(b.loss), 1.0)


def _worst_first(value: tuple[float, str]) -> tuple[bool, float, str]:
    apart, name = value
    return np.isnan(apart), apart, name
