"""The batch script of a run, from slurm/train.sbatch."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dapo_megatron.config.schema import Config, SlurmConfig
from dapo_megatron.launcher.slurm.quoting import environment

TEMPLATES = Path(__file__).parent / "templates"
"""The folder slurm/ of a checkout; in a wheel, its copy."""
FOLDER = "slurm"
"""What belongs to the jobs of a run, below the run folder."""
SCRIPT = f"{FOLDER}/job.sbatch"


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """Nodes of one kind."""

    nodes: int
    gpus_per_node: int
    partition: str | None
    sbatch: tuple[str, ...]


def node_groups(slurm: SlurmConfig) -> tuple[NodeGroup, ...]:
    """The actor's nodes and, in a heterogeneous job, those of the engines."""
    actor = NodeGroup(slurm.nodes, slurm.gpus_per_node, slurm.partition, slurm.sbatch)
    if not slurm.rollout_nodes:
        return (actor,)
    gpus = slurm.gpus_per_node if slurm.rollout_gpus_per_node is None else slurm.rollout_gpus_per_node
    return actor, NodeGroup(slurm.rollout_nodes, gpus, slurm.rollout_partition or slurm.partition, slurm.rollout_sbatch)


def render(
    config: Config, *, run_dir: Path, working_dir: Path, elements: Sequence[str] = (), signal_lead_seconds: int, python: str
) -> str:
    """The script. `elements`: folders below `run_dir`, one for each element of an array; `python`: what has this package here.

    ValueError when a value cannot stand in a script.
    """
    slurm = config.slurm
    mounts = dict.fromkeys([str(working_dir), str(run_dir), *slurm.container_mounts])
    return (
        environment(TEMPLATES)
        .get_template("train.sbatch")
        .render(
            slurm=slurm,
            parts=node_groups(slurm),
            job_name=slurm.job_name or re.sub(r"[^\x21-\x7e]", "_", run_dir.name),
            run_dir=run_dir,
            script=run_dir / SCRIPT,
            working_dir=working_dir,
            elements=tuple(elements),
            signal_lead_seconds=signal_lead_seconds,
            mounts=tuple(mounts),
            python=slurm.python or ("python3" if slurm.container else python),
        )
    )


def this_python() -> str:
    """The interpreter that runs this."""
    return sys.executable
