"""What `plan` is asked and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dapo_megatron.layout.layout import Layout
from dapo_megatron.layout.workload import Workload

if TYPE_CHECKING:
    from dapo_megatron.layout.calibration import Calibration
    from dapo_megatron.layout.hardware import Gpu
    from dapo_megatron.layout.memory_records import MemoryPlan
    from dapo_megatron.layout.model_shape import ModelShape
    from dapo_megatron.layout.step_time import StepTime

RejectionKind = Literal["rule", "release", "memory", "host_memory", "slower"]
"""rule: megatron-core or the configuration refuses it. release: this version cannot run it. memory, host_memory: it does not fit.
slower: it fits, and so does one with more of everything else equal that is faster."""

Dtype = Literal["bf16", "fp32"]


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A model, devices and a workload."""

    model_name: str
    """For messages: the path or the name that the user gave."""
    model: ModelShape
    workload: Workload
    gpu: Gpu
    num_gpus: int
    """All devices, of actor and engines."""
    num_rollout_gpus: int | None = None
    """Devices for engines alone. None: colocated."""
    gpu_file: Path | None = None
    """YAML file that describes `gpu`, where it is not one of `hardware.known_gpus`."""
    gpus_per_node: int = 8
    """Devices that share a host's memory and its NVLink."""
    dtype: Dtype = "bf16"
    """Of the actor's weights and activations."""
    engine_dtype: Dtype = "bf16"
    """Of the engines' weights and KV cache."""
    disk_gb_per_second: float = 2.0
    """What one node writes to where checkpoints go."""
    only_runnable: bool = True
    """Reject what this version of the library cannot run (context parallelism, offload). False: plan it all the same."""
    top: int = 10
    calibration: Calibration | None = None

    @property
    def num_actor_gpus(self) -> int:
        """Devices of the actor's ranks."""
        return self.num_gpus - (self.num_rollout_gpus or 0)

    @property
    def colocated(self) -> bool:
        """Actor and engines take turns on the same devices."""
        return self.num_rollout_gpus is None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout that fits, with its memory and time."""

    layout: Layout
    memory: MemoryPlan
    time: StepTime
    limit: str
    """What bounds it: `activations of stage 1: 71.2 of 74.5 GB`, `decode: HBM bandwidth`."""
    gains: tuple[str, ...] = ()
    """What to change to be faster, with the figure: `+1 node removes full recompute: -18 %`."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A layout, or a family of layouts, that was left out, and one line why."""

    layout: Layout
    kind: RejectionKind
    reason: str
    num_layouts: int = 1
    """Layouts that the reason stands for: this one and those that need more of what is short."""
    peak_bytes: float | None = None
    """Where memory was reached."""
    step_seconds: float | None = None
    """Where time was reached."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Candidates, fastest first, and every rejection."""

    request: PlanRequest
    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    notes: tuple[str, ...] = ()
    """What holds for the whole plan: assumed lengths, a model that this version cannot train, calibration."""

    @property
    def num_enumerated(self) -> int:
        """Layouts that were looked at."""
        return len(self.candidates) + sum(rejection.num_layouts for rejection in self.rejections)
