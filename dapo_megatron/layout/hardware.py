"""The devices that a plan can be made for: `gpus.yaml`, and files of the same form."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from dapo_megatron.config.fields import did_you_mean, nearest
from dapo_megatron.config.schema import Section
from dapo_megatron.layout.efficiency import EFFICIENCIES
from dapo_megatron.types import ConfigError

_TABLE = Path(__file__).with_name("gpus.yaml")


class Gpu(Section):
    """One kind of device and what connects it. Rates are peaks, of one GPU and one direction, in decimal units."""

    name: str
    """As people say it."""
    memory_mib: PositiveInt
    """Total memory as nvidia-smi shows it, in MiB."""
    hbm_gb_per_second: PositiveFloat
    """Memory bandwidth, in GB/s."""
    bf16_tflops: PositiveFloat
    """Dense bf16 peak, in TFLOP/s."""
    fp8_tflops: PositiveFloat | None = None
    """Dense fp8 peak, in TFLOP/s. None: no fp8."""
    nvlink_gb_per_second: PositiveFloat
    """NVLink, in GB/s."""
    nvlink_domain_gpus: PositiveInt = 8
    """GPUs that reach each other over NVLink."""
    internode_gb_per_second: PositiveFloat
    """Network between such domains, in GB/s a GPU."""
    pcie_gb_per_second: PositiveFloat
    """To host memory, in GB/s."""
    host_memory_gib_per_gpu: PositiveFloat = 192.0
    """Host memory that a GPU's processes share out, in GiB; 1.5 TiB for a node of eight."""
    efficiency: str = Field("hopper")
    """Which measured efficiencies apply: a name of `efficiency.EFFICIENCIES`."""
    source: str
    """Where the numbers are published."""

    @property
    def memory_bytes(self) -> int:
        """Total memory, in bytes."""
        return self.memory_mib * 2**20


@cache
def known_gpus() -> Mapping[str, Gpu]:
    """The devices of `gpus.yaml` by the name `plan --gpu` takes."""
    return read_gpus(_TABLE)


def read_gpus(file: Path) -> dict[str, Gpu]:
    """The devices of a YAML file. Raises ConfigError for what is not of the form of `gpus.yaml`."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); give a YAML file with GPU entries.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} must be YAML ({error}); correct it.") from None
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{file} must map names to GPU entries; write it as dapo_megatron/layout/gpus.yaml is written.")
    return {str(name).lower(): _gpu(file, str(name), entry) for name, entry in content.items()}


def gpu_named(name: str, own: Mapping[str, Gpu] | None = None) -> Gpu:
    """The device of that name; `own` entries win over `gpus.yaml`. ConfigError, with the nearest names, for an unknown one."""
    gpus = {**known_gpus(), **(own or {})}
    if name.lower() in gpus:
        return gpus[name.lower()]
    hint = did_you_mean(nearest(name.lower(), gpus)) or "."
    raise ConfigError(f"--gpu ({name}) must be one of {', '.join(gpus)}, or an entry of a YAML file given with --gpu-file{hint}")


def _gpu(file: Path, name: str, entry: Any) -> Gpu:
    if not isinstance(entry, dict):
        raise ConfigError(f"{name} in {file} must map fields to values, not be {entry!r}; see dapo_megatron/layout/gpus.yaml.")
    try:
        gpu = Gpu(**entry)
    except (ValidationError, TypeError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else [{"loc": (), "msg": str(error)}]
        words = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in problems)
        raise ConfigError(f"{name} in {file}: {words}; the fields are those of dapo_megatron/layout/gpus.yaml.") from None
    if gpu.efficiency not in EFFICIENCIES:
        hint = did_you_mean(nearest(gpu.efficiency, EFFICIENCIES)) or "."
        raise ConfigError(f"{name}.efficiency ({gpu.efficiency}) in {file} must be one of {', '.join(EFFICIENCIES)}{hint}")
    return gpu
