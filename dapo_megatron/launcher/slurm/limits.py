"""What can be known of a job before it is in the queue: devices, the partition's limits, the run folder and its disk."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from dapo_megatron.config.checks import read_hf_config
from dapo_megatron.config.fields import did_you_mean, either, nearest
from dapo_megatron.config.schema import Config, SglangEngineConfig
from dapo_megatron.config.slurm_text import seconds_of
from dapo_megatron.launcher.placement import spanning_problem
from dapo_megatron.launcher.run_folder import RunFolder, read_marker
from dapo_megatron.launcher.slurm.scheduler import Partition
from dapo_megatron.launcher.slurm.script import NodeGroup, node_groups
from dapo_megatron.layout.model_shape import ModelShape
from dapo_megatron.layout.parameters import num_params

OPTIMIZER_BYTES = 12
"""Of a parameter in a checkpoint: AdamW's two moments and the master weight, in fp32."""


def device_problems(config: Config) -> Iterator[str]:
    """Whether the ranks and engines of the run and the GPUs of the job fit."""
    slurm, engine = config.slurm, config.rollout.engine
    if config.cluster.ray_address is not None:
        yield f"cluster.ray_address ({config.cluster.ray_address}) must be null in a job: it starts a Ray of its own on its nodes."
    if config.cluster.backend == "local" and slurm.nodes + slurm.rollout_nodes > 1:
        yield (
            f"cluster.backend local runs in one process, but slurm asks for {slurm.nodes + slurm.rollout_nodes} nodes; "
            "use slurm.nodes 1, or cluster.backend ray."
        )
    split = config.cluster.placement == "split"
    if slurm.rollout_nodes and not split:
        yield "slurm.rollout_nodes puts the engines on nodes of their own; set cluster.placement to split."
    engine_size = engine.tensor_parallel_size if isinstance(engine, SglangEngineConfig) else 1
    attached = isinstance(engine, SglangEngineConfig) and bool(engine.engine_urls)
    num_ranks, for_engines = config.actor.world_size, 0 if attached else config.rollout.num_engines * engine_size
    actor, *rollout = node_groups(slurm)
    if rollout:
        yield from _group_problems(actor, "slurm.nodes", f"{num_ranks} actor ranks", num_ranks)
        yield from _group_problems(rollout[0], "slurm.rollout_nodes", f"the engines' {for_engines} ranks", for_engines)
    elif split:
        what = f"{num_ranks} actor ranks and the engines' {for_engines} ranks"
        yield from _group_problems(actor, "slurm.nodes", what, num_ranks + for_engines)
    else:
        what = f"{num_ranks} actor ranks" if num_ranks >= for_engines else f"the engines' {for_engines} ranks"
        yield from _group_problems(actor, "slurm.nodes", what, max(num_ranks, for_engines))
    if not config.cluster.tensor_parallel_across_nodes:
        yield from _tensor_parallel_problems(actor, config.actor.tensor_parallel_size, num_ranks)
    gpus = (rollout or [actor])[0].gpus_per_node
    if for_engines and gpus and engine_size > gpus:
        yield (
            f"rollout.engine.tensor_parallel_size ({engine_size}) must be at most the GPUs of a node ({gpus}); use a smaller one, "
            "with more engines."
        )


def _group_problems(group: NodeGroup, name: str, what: str, num_needed: int) -> Iterator[str]:
    if not group.gpus_per_node:
        if group.nodes > max(num_needed, 1):
            yield f"{name} ({group.nodes}) is more than {what} can be spread over; use at most {num_needed}."
        return
    wanted = math.ceil(num_needed / group.gpus_per_node)
    have = f"{name} ({group.nodes}) x {group.gpus_per_node} GPUs = {group.nodes * group.gpus_per_node}"
    if group.nodes < wanted:
        yield f"{what} need {num_needed} GPUs, but {have}; use {name} {wanted}, or other sizes."
    elif group.nodes > max(wanted, 1):
        yield f"{what} need {num_needed} GPUs and would leave whole nodes idle: {have}; use {name} {max(wanted, 1)}."


def _tensor_parallel_problems(group: NodeGroup, size: int, num_ranks: int) -> Iterator[str]:
    """A group of ranks is a node's own; what of a node is less than a group stays empty."""
    gpus = group.gpus_per_node
    if not gpus:
        return
    num_usable = group.nodes * (gpus - gpus % size)
    if size > gpus:
        yield spanning_problem(size, f"slurm.gpus_per_node is {gpus}")
    elif num_usable < num_ranks <= group.nodes * gpus:
        yield spanning_problem(size, f"of the {gpus} GPUs of a node {gpus % size} would be left, and {num_ranks} ranks need them")


def partition_problems(config: Config, partitions: Mapping[str, Partition]) -> Iterator[str]:
    """What the partitions of the cluster cannot give; jobs that ask for it would wait for ever."""
    settings = (
        ("slurm.nodes", "slurm.partition", "slurm.gpus_per_node"),
        (
            "slurm.rollout_nodes",
            "slurm.rollout_partition",
            "slurm.rollout_gpus_per_node",
        ),
    )
    for group, names in zip(node_groups(config.slurm), settings, strict=False):
        for name in group.partition.split(",") if group.partition else [None]:
            partition = next((it for it in partitions.values() if it.name == name or (name is None and it.is_default)), None)
            if partition is not None:
                yield from _partition_problems(config, group, partition, *names)
            elif name is None:
                yield f"slurm.partition must be given: this cluster has no default one; use {either(sorted(partitions))}."
            else:
                hint = did_you_mean(nearest(name, partitions)) or f"; use {either(sorted(partitions))}"
                yield f"{names[1]} ({name}) is no partition of this cluster{hint}."


def _partition_problems(
    config: Config, group: NodeGroup, partition: Partition, nodes: str, setting: str, gpus: str
) -> Iterator[str]:
    where = f"partition {partition.name}"
    if not partition.up:
        yield f"{where} takes no jobs now ({setting}); use another one."
    most_gpus = max((node.gpus for node in partition.nodes), default=0)
    most_cpus = max((node.cpus for node in partition.nodes), default=0)
    cpus_wanted = config.slurm.cpus_per_node or 0
    num_fit = sum(node.gpus >= group.gpus_per_node and node.cpus >= cpus_wanted for node in partition.nodes)
    if group.gpus_per_node > most_gpus:
        yield f"{gpus} ({group.gpus_per_node}) must be at most {most_gpus}: no node of {where} has more GPUs."
    elif cpus_wanted > most_cpus:
        yield f"slurm.cpus_per_node ({cpus_wanted}) must be at most {most_cpus}: no node of {where} has more CPUs."
    elif group.nodes > num_fit:
        having = f" with {group.gpus_per_node} GPUs" if group.gpus_per_node else ""
        yield f"{nodes} ({group.nodes}) must be at most {num_fit}, the nodes{having} of {where}; the job would wait for ever."
    elif partition.max_nodes is not None and group.nodes > partition.max_nodes:
        yield f"{nodes} ({group.nodes}) must be at most {partition.max_nodes}, the limit of {where}; the job would wait for ever."
    seconds = seconds_of(config.slurm.time)
    if partition.max_seconds is not None and (seconds is None or seconds > partition.max_seconds):
        limit = f"{partition.max_seconds // 3600}:{partition.max_seconds // 60 % 60:02}:{partition.max_seconds % 60:02}"
        yield f"slurm.time ({config.slurm.time}) must be at most {limit}, the limit of {where}; the job would wait for ever."


def folder_problems(config: Config) -> Iterator[str]:
    """Whether the run folder can be written, and be seen in a container."""
    folder = config.run.dir
    if not str(folder.absolute()).isprintable() or set("%\\") & set(str(folder.absolute())):
        yield f"run.dir ({str(folder.absolute())!r}) must be one line of text without % and \\, which Slurm replaces in names of logs."
        return
    for mount in (folder.absolute(), Path.cwd(), *config.slurm.container_mounts) if config.slurm.container else ():
        if "," in str(mount):
            yield f"{mount} cannot be seen in a container: commas separate its mounts; use another path."
    probe = folder / "slurm" / ".writable"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        yield f"run.dir ({folder}) cannot be written: {error.strerror}; use a folder of yours that the nodes see too."


def space_problems(config: Config) -> Iterator[str]:
    """Whether the run folder, which exists, has room for the checkpoints."""
    if not config.checkpoint.every:
        return
    folder = RunFolder(config.run.dir)
    complete = folder.complete_checkpoints()
    if complete:
        each = sum(digest.num_bytes for digest in read_marker(complete[-1]).files.values())
    else:
        shape = ModelShape.from_hf(read_hf_config(config.model.path))
        each = num_params(shape) * (OPTIMIZER_BYTES + (4 if config.model.dtype == "fp32" else 2))
    num_more = max(config.checkpoint.keep_last + 1 - len(complete), 1)  # the newest is complete before the oldest goes
    needed, free = each * num_more, shutil.disk_usage(folder.path).free
    if needed > free:
        yield (
            f"run.dir ({config.run.dir}) has {free / 2**30:.1f} GiB free, but {num_more} more checkpoints of {each / 2**30:.1f} GiB "
            "come there; free space, or use another run.dir or a smaller checkpoint.keep_last."
        )
