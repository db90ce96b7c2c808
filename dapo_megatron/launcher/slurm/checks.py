"""The preflight: what the facts of all nodes say about the run. Pure functions; a finding names its node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.slurm.facts import NodeFacts

GIB = 2**30
MIN_FREE_GPU_SHARE = 0.9
"""Of a GPU's memory: what is not free is somebody else's."""
MIN_SHM_BYTES = GIB
"""Ray's object store and NCCL's buffers; containers often have 64 MiB."""
MAX_CLOCK_SKEW_SECONDS = 5.0

_ONE_PROCESS = "cluster.backend local is one process, which needs none"

Verdict = Literal["good", "bad", "skipped"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One check on one node, or on all of them (`node` None)."""

    check: str
    verdict: Verdict
    words: str
    node: str | None = None


@dataclass(frozen=True, slots=True)
class Gathered:
    """What the head knows of all nodes; `nodes[0]` is its own."""

    nodes: tuple[NodeFacts, ...]
    missing: tuple[str, ...] = ()
    """Nodes that did not come, so that nothing is known of them."""
    unseen: tuple[str, ...] = ()
    """Nodes whose file in the run folder the head did not see."""
    skew_seconds: Mapping[str, float] | None = None
    """Of each node's clock against the head's, by name."""
    all_reduce: AllReduce | None = None
    """None: nothing to reduce over."""


@dataclass(frozen=True, slots=True)
class AllReduce:
    """Outcome over all ranks: bus bandwidth, or what went wrong where."""

    backend: str
    num_nodes: int
    num_ranks: int
    gigabytes_per_second: float
    errors: Mapping[str, str]
    """By name of the node."""


def all_findings(config: Config, gathered: Gathered, needed_bytes: int) -> list[Finding]:
    """Every check; `needed_bytes` is the host memory that the run needs on a node."""
    checks: Sequence[Callable[[], Iterator[Finding]]] = (
        lambda: came(gathered.missing),
        lambda: folder(gathered),
        lambda: versions(gathered.nodes),
        lambda: gpus(config, gathered.nodes),
        lambda: memory(gathered.nodes, needed_bytes),
        lambda: shared_memory(config, gathered.nodes),
        lambda: clocks(gathered.skew_seconds),
        lambda: network(config, gathered.nodes),
        lambda: all_reduce(gathered.all_reduce),
    )
    return [finding for check in checks for finding in check()]


def came(missing: Sequence[str]) -> Iterator[Finding]:
    """Nodes that were waited for in vain."""
    for node in missing:
        yield Finding(
            "here", "bad", "did not come before cluster.startup_deadline_seconds; is it up, and does it see the run folder?", node
        )


def folder(gathered: Gathered) -> Iterator[Finding]:
    """The run folder is one folder: each node read the head's file (else it would not be here), and the head each node's."""
    name = "run folder"
    faults = {node.name: node.run_folder for node in gathered.nodes if node.run_folder}
    other = "what it wrote there is not seen by the first node: it has another file system under that path"
    faults |= {node: other for node in gathered.unseen}
    for node, fault in faults.items():
        yield Finding(name, "bad", fault, node)
    if not faults:
        seen = f"seen by all nodes{' that came' if gathered.missing else ''}, both ways"
        yield Finding(name, "good", seen if len(gathered.nodes) > 1 else "can be written and read")


def versions(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Equal everywhere; what most nodes have is right."""
    names = sorted({name for node in nodes for name in node.versions})
    differs = False
    for name in names:
        held = [node.versions.get(name, "none") for node in nodes]
        usual, _ = Counter(held).most_common(1)[0]
        for node, version in zip(nodes, held, strict=True):
            if version != usual:
                differs = True
                yield Finding("versions", "bad", f"{name} {version}, but {usual} on the others", node.name)
    if not differs:
        torch = nodes[0].versions.get("torch")
        yield Finding("versions", "good", f"python {nodes[0].versions.get('python')}, torch {torch}, ... on all nodes")


def gpus(config: Config, nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """As many as asked for, free, and nobody else's."""
    wanted = config.slurm.gpus_per_node
    if not wanted:
        yield Finding("GPUs", "skipped", "none are asked for (slurm.gpus_per_node 0)")
        return
    found_bad = False
    for node in nodes:
        num_wanted = _gpus_of_group(config, node.group)
        have = node.gpus or ()
        faults = [f"{len(have)} GPUs, {num_wanted} wanted"] if len(have) < num_wanted else []
        for index, gpu in enumerate(have):
            if gpu.processes:
                faults.append(f"GPU {index} is used by {', '.join(gpu.processes)}")
            elif gpu.num_free_bytes < MIN_FREE_GPU_SHARE * gpu.num_bytes:
                faults.append(f"GPU {index} has {gpu.num_free_bytes / GIB:.0f} of {gpu.num_bytes / GIB:.0f} GiB free")
        for fault in faults:
            found_bad = True
            yield Finding("GPUs", "bad", fault, node.name)
    kinds = Counter(gpu.name for node in nodes for gpu in node.gpus or ())
    if not found_bad:
        yield Finding("GPUs", "good", f"{', '.join(f'{number} x {name}' for name, number in kinds.items())}, free")


def memory(nodes: Sequence[NodeFacts], needed_bytes: int) -> Iterator[Finding]:
    """Host memory against what the run needs."""
    short = [node for node in nodes if node.num_memory_bytes < needed_bytes]
    for node in short:
        words = f"{node.num_memory_bytes / GIB:.1f} GiB available, the run needs about {needed_bytes / GIB:.1f}"
        yield Finding("host memory", "bad", words, node.name)
    if not short:
        least = min(node.num_memory_bytes for node in nodes)
        yield Finding("host memory", "good", f"at least {least / GIB:.1f} GiB available, about {needed_bytes / GIB:.1f} needed")


def shared_memory(config: Config, nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Room in /dev/shm."""
    if config.cluster.backend == "local":
        yield Finding("/dev/shm", "skipped", _ONE_PROCESS)
        return
    short = [node for node in nodes if node.num_shm_bytes < MIN_SHM_BYTES]
    for node in short:
        words = (
            f"{node.num_shm_bytes / 2**20:.0f} MiB free, {MIN_SHM_BYTES / 2**20:.0f} wanted; give the container more, or clean up"
        )
        yield Finding("/dev/shm", "bad", words, node.name)
    if not short:
        yield Finding("/dev/shm", "good", f"at least {min(node.num_shm_bytes for node in nodes) / GIB:.1f} GiB free")


def clocks(skew_seconds: Mapping[str, float] | None) -> Iterator[Finding]:
    """Clocks agree, so that logs and file times can be compared."""
    off = {node: skew for node, skew in (skew_seconds or {}).items() if abs(skew) > MAX_CLOCK_SKEW_SECONDS}
    for node, skew in off.items():
        yield Finding("clock", "bad", f"{skew:+.1f} s off the first node's", node)
    if not skew_seconds:
        yield Finding("clock", "skipped", "one node")
    elif not off:
        yield Finding("clock", "good", f"at most {max(map(abs, skew_seconds.values())):.2f} s apart, the way included")


def network(config: Config, nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Each node has an address for the others, and free ports in the range."""
    if config.cluster.backend == "local":
        yield Finding("ports", "skipped", _ONE_PROCESS)
        return
    for node in nodes:
        if node.network:
            yield Finding("ports", "bad", node.network, node.name)
    if not any(node.network for node in nodes):
        yield Finding("ports", "good", "free in the range of slurm.first_port to slurm.last_port")


def all_reduce(outcome: AllReduce | None) -> Iterator[Finding]:
    """All ranks can talk, and how fast."""
    if outcome is None:
        yield Finding("all-reduce", "skipped", "one process")
        return
    if len(outcome.errors) == outcome.num_nodes > 1:  # one that is not in reach fails all others
        words = "; ".join(f"{node}: {error}" for node, error in outcome.errors.items())
        yield Finding("all-reduce", "bad", f"failed on every node, so that no single one can be blamed: {words}")
        return
    for node, error in outcome.errors.items():
        yield Finding("all-reduce", "bad", error, node)
    if not outcome.errors:
        words = f"{outcome.backend} over {outcome.num_ranks} processes: {outcome.gigabytes_per_second:.2f} GB/s (bus)"
        yield Finding("all-reduce", "good", words)


def bad_nodes(findings: Sequence[Finding]) -> list[str]:
    """Names, each once."""
    return list(dict.fromkeys(finding.node for finding in findings if finding.verdict == "bad" and finding.node is not None))


def needed_host_bytes(config: Config, num_params: int, num_actor_nodes: int, *, on_gpus: bool) -> int:
    """About what a node's share of the run needs at its peak, a checkpoint being written.

    On GPUs: the copy that is written (weights, fp32 master weights, two moments), and what `actor.offload` moves to the host. Without:
    parameters, gradients and optimizer besides, and the engines' weights. Processes themselves: 1 GiB each.
    """
    width = 4 if config.model.dtype == "fp32" else 2
    state, copies = width + 12, 1
    if config.actor.offload:
        copies += 1
    share = copies * state * num_params / num_actor_nodes
    processes = (config.actor.world_size + config.rollout.num_engines) / num_actor_nodes
    if not on_gpus:
        share += (state + 4) * num_params * config.actor.num_weight_copies / num_actor_nodes
        share += 4 * num_params * config.rollout.num_engines / num_actor_nodes
    return int(share + (processes * (GIB if on_gpus else GIB / 2)))


def _gpus_of_group(config: Config, group: int) -> int:
    slurm = config.slurm
    return slurm.gpus_per_node if group == 0 or slurm.rollout_gpus_per_node is None else slurm.rollout_gpus_per_node
