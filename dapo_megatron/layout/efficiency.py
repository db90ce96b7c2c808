"""What share of a peak rate real kernels reach.

A matrix product costs flops / (peak x share) + bytes / (bandwidth x share) + a launch: small and thin products are slower because their
bytes and their launch weigh more, without a table of shapes. The shares below are the only numbers of `plan` that were fitted;
`benchmarks/planner.py` fits them and prints how well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of peak rates, in (0, 1], of one generation of devices."""

    matmul: float
    """Of the dense peak, by large matrix products."""
    attention_forward: float
    """Of the bf16 peak, by the attention kernel; causal FLOPs."""
    attention_backward: float
    """Likewise, backward."""
    memory: float
    """Of the memory bandwidth, by element-wise kernels."""
    link: float
    """Of the NVLink rate, by large collectives."""
    network: float
    """Of the network between nodes."""
    launch_seconds: float
    """From one kernel to the next, at least."""
    fitted_on: str
    """What the numbers rest on."""


EFFICIENCIES: Mapping[str, Efficiency] = {
    "ampere": Efficiency(0.75, 0.50, 0.42, 0.80, 0.75, 0.75, 5e-6, ""),
    "hopper": Efficiency(0.65, 0.50, 0.40, 0.80, 0.75, 0.75, 5e-6, ""),
    "blackwell": Efficiency(0.60, 0.45, 0.36, 0.80, 0.75, 0.75, 5e-6, ""),
}
"""By the name that a GPU entry refers to."""
