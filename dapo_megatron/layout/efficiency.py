"""What share of a peak rate real kernels reach.

A matrix product costs flops / (peak x share) + bytes / (bandwidth x share) + a launch: small and thin products are slower because their
bytes and their launch weigh more, without a table of shapes. The shares below are the only numbers of `plan` that were fitted;
`benchmarks/planner_fit.py` fits them and prints how well.
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
    "ampere": Efficiency(0.71, 0.49, 0.40, 0.95, 0.71, 0.80, 5e-6, "2 rows: Megatron-LM, 7B on 8 A100"),
    "hopper": Efficiency(
        0.62, 0.60, 0.50, 0.84, 0.64, 0.80, 5e-6, "11 rows: Megatron-LM, 7B on 8 H100, 2B to 462B on 48 to 6144"
    ),
    "h20": Efficiency(0.85, 0.70, 0.55, 0.84, 0.66, 0.80, 5e-6, "no rows: Hopper's kernels on a seventh of its arithmetic"),
    "b200": Efficiency(0.52, 0.43, 0.35, 0.90, 0.37, 0.80, 5e-6, "43 rows: SimuMax, slices of dense and MoE models on 8 B200"),
    "gb200": Efficiency(0.56, 0.43, 0.35, 0.90, 0.37, 0.80, 5e-6, "no rows: B200's, matrix products by power, 1200 W for 1000 W"),
    "b300": Efficiency(0.57, 0.43, 0.35, 0.90, 0.37, 0.80, 5e-6, "no rows: B200's, matrix products by power, 1100 W for 1000 W"),
    "gb300": Efficiency(0.66, 0.43, 0.35, 0.90, 0.37, 0.80, 5e-6, "no rows: B200's, matrix products by power, 1400 W for 1000 W"),
}
"""By the name that a GPU entry refers to. `network` and `launch_seconds` are assumed, not fitted; so are all shares of H20 (its few
arithmetic units are easily fed). GB200, B300 and GB300 have B200's chip under another limit of power, which large matrix products run into: their
rate is taken to go with that limit (data sheets), all else is B200's. Hopper's attention and memory are what its kernels alone reach
(`benchmarks.planner_fit.MEASURED`)."""
