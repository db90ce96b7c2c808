"""SGLang servers on machines without CUDA, from the same PyPI wheels: settings, a stand-in module and a plugin.

Three parts, none of which is in the way of a server on GPUs:

* `cpu_arguments` and `cpu_environment`: what the server of one engine is started with.
* `stand_in/`, on the server's PYTHONPATH only there: `common_ops`, which the loader of sglang-kernel asks for where its CUDA libraries
  cannot be loaded, and for which an empty module is enough; `flashinfer` and `megatron`, which cannot be imported, and so are not.
* `plugin.register`, found by SGLang through the entry point group `sglang.srt.plugins`: does nothing unless the server was
  started with SGLANG_USE_CPU_ENGINE=1 on a machine without CUDA.

UPSTREAM.md lists the symbols and when each part can go.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STAND_IN = Path(__file__).parent / "stand_in"
DEFAULT_MAX_TOTAL_TOKENS = 65536
_MODULES = frozenset({"llama", "qwen2", "qwen3", "qwen3_moe", "mixtral"})
"""Model types whose module in `sglang.srt.models` has their name."""


def cpu_arguments(tensor_parallel_size: int) -> dict[str, Any]:
    """ServerArgs of a server without CUDA; what the config says comes on top."""
    arguments: dict[str, Any] = {
        "device": "cpu",
        "attention_backend": "torch_native",
        "cuda_graph_backend_decode": "disabled",
        "cuda_graph_backend_prefill": "disabled",
        "max_total_tokens": DEFAULT_MAX_TOTAL_TOKENS,
        "mem_fraction_static": 0.5,
        "sleep_on_idle": True,  # else a server that has nothing to do keeps a core busy, which the actor's ranks need
    }
    return arguments | ({"disable_custom_all_reduce": True} if tensor_parallel_size > 1 else {})


def cpu_environment(
    model_type: str | None, tensor_parallel_size: int, num_threads: int, inherited: Mapping[str, str]
) -> dict[str, str]:
    """Environment variables on top of `inherited`; `num_threads` are those of one rank."""
    paths = [str(STAND_IN), *filter(None, [inherited.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "SGLANG_USE_CPU_ENGINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(num_threads),
        "SGLANG_CPU_OMP_THREADS_BIND": _core_binding(tensor_parallel_size),
        # Where the library is missing, SGLang goes without NCCL; torch ships it, and it fails on CPU tensors.
        "SGLANG_NCCL_SO_PATH": "/nonexistent",
        # Importing 250 models takes a third of a rank's start.
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(_other_models(model_type)) if model_type in _MODULES else "",
    }


def _other_models(model_type: str | None) -> Iterator[str]:
    sglang = find_spec("sglang")
    for folder in (sglang.submodule_search_locations or ()) if sglang is not None else ():
        for file in Path(folder, "srt", "models").glob("*.py"):
            if file.stem != model_type:
                yield file.stem


def _core_binding(num_ranks: int) -> str:
    """All cores for each rank, as `0-1|0-1`: the system's scheduler places threads better than a fixed core does."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    return "|".join([cores] * num_ranks)
