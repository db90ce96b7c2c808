"""What one node of a job says about itself. Nothing is judged here (`checks.py` does), nothing is started."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from dapo_megatron.launcher.identity import PACKAGES, installed_version


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """One GPU as nvidia-smi lists it; `processes` are those that hold memory of it."""

    name: str
    num_bytes: int
    num_free_bytes: int
    processes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """One node, at the time `clock` (seconds since 1970, by its own clock)."""

    name: str
    group: int = 0
    address: str
    clock: float
    versions: dict[str, str]
    """Of python, the packages that numbers depend on, and the GPU driver; by name."""
    gpus: tuple[GpuFacts, ...] | None
    """None: there is no nvidia-smi."""
    num_memory_bytes: int
    """Host memory that is available to the job."""
    num_shm_bytes: int
    """Free in /dev/shm."""
    network: str = ""
    """What is wrong with its address or its ports; empty when others can reach it."""
    run_folder: str = ""
    """What is wrong with the run folder; empty when this node can write and read it."""
    topology: str = ""

    @property
    def is_cut_off(self) -> bool:
        """The run cannot even be started with this node."""
        return bool(self.network or self.run_folder)


def gather(name: str, address: str, *, group: int = 0, network: str = "", run_folder: str = "", topology: str = "") -> NodeFacts:
    """Of this node; a second or so where there are GPUs."""
    gpus, driver = _gpus()
    versions = {"python": platform.python_version(), "dapo-megatron": installed_version("dapo-megatron") or "not installed"}
    versions |= {package: installed_version(package) or "not installed" for package in PACKAGES}
    shm = shutil.disk_usage("/dev/shm")
    return NodeFacts(
        name=name,
        group=group,
        address=address,
        versions=versions | ({"driver": driver} if driver else {}),
        gpus=gpus,
        num_memory_bytes=_available_memory(),
        num_shm_bytes=shm.free,
        network=network,
        run_folder=run_folder,
        topology=topology,
        clock=time.time(),
    )


def folder_problem(folder: Path) -> str:
    """Why this node cannot write into the folder and read that back; empty when it can. A folder that is yet to come counts as the one above."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile("w+", dir=there, prefix=".look.") as file:
            file.write(file.name)
            file.flush()
            read = Path(file.name).read_text()
    except OSError as error:
        return f"{there} cannot be written and read: {error.strerror}"
    return "" if read == file.name else f"{there} does not give back what was written"


def parse_gpus(listing: str, processes: str) -> tuple[GpuFacts, ...]:
    """From the CSV of nvidia-smi: `uuid, name, memory.total, memory.free` in MiB, and `gpu_uuid, pid, process_name`."""
    holders: dict[str, list[str]] = {}
    for line in processes.splitlines():
        uuid, pid, name = (part.strip() for part in line.split(",", 2))
        holders.setdefault(uuid, []).append(f"{name} (pid {pid})")
    found = []
    for line in listing.splitlines():
        uuid, name, total, free = (part.strip() for part in line.split(","))
        found.append(GpuFacts(name, int(total) * 2**20, int(free) * 2**20, tuple(holders.get(uuid, ()))))
    return tuple(found)


def _gpus() -> tuple[tuple[GpuFacts, ...] | None, str | None]:
    """The GPUs that the job may use, and the driver."""
    if shutil.which("nvidia-smi") is None:
        return None, None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = [f"--id={visible}"] if visible else []
    listing = _nvidia_smi("--query-gpu=uuid,name,memory.total,memory.free", *ids)
    processes = _nvidia_smi("--query-compute-apps=gpu_uuid,pid,process_name", *ids)
    driver = _nvidia_smi("--query-gpu=driver_version", *ids).splitlines()
    return parse_gpus(listing, processes), driver[0].strip() if driver else None


def _nvidia_smi(*arguments: str) -> str:
    """Its CSV; empty where it fails (no device, or a driver that does not answer): then there are no GPUs."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30, check=False
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _available_memory() -> int:
    """What the kernel has left, or less where a control group bounds the job."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limits = [available]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup") if not controllers else Path("/sys/fs/cgroup/memory")
        names = ("memory.max", "memory.current") if not controllers else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if controllers and "memory" not in controllers.split(","):
            continue
        for folder in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
            limit, used = folder / names[0], folder / names[1]
            if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
                limits.append(int(text) - int(used.read_text()))
            if folder == root:
                break
    return max(0, min(limits))
