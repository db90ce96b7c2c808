"""A layout as the settings of a run: a YAML file to merge over a run's own, or overrides of the command line."""

from __future__ import annotations

import json
from typing import Any

import yaml

from dapo_megatron.layout.hardware import known_gpus, read_gpus
from dapo_megatron.layout.layout import EngineLayout, Layout, Recompute
from dapo_megatron.layout.plan import PlanRequest


def settings_of(layout: Layout, request: PlanRequest) -> dict[str, Any]:
    """The layout and its devices as a tree of the configuration.

    What is off by default is written too, so that a file merged before cannot leave it on.
    """
    tree: dict[str, Any] = {"actor": _actor(layout), "cluster": {}}
    if layout.engine is not None:
        tree["rollout"] = _engines(layout.engine)
        tree["cluster"]["placement"] = "colocated" if layout.engine.colocated else "split"
    tree["cluster"] |= _gpu(request)
    per_node = min(request.gpus_per_node, request.num_gpus)
    tree["cluster"]["tensor_parallel_across_nodes"] = layout.tensor_parallel_size > per_node  # within one NVLink domain
    tree["slurm"] = {"nodes": request.num_gpus // per_node, "gpus_per_node": per_node}
    return tree


def _gpu(request: PlanRequest) -> dict[str, str | None]:
    own = {} if request.gpu_file is None else read_gpus(request.gpu_file)
    by_name = {**known_gpus(), **own}
    name = next((name for name, gpu in by_name.items() if gpu == request.gpu), None)
    return {"gpu": name, "gpu_file": str(request.gpu_file) if name in own else None}


def yaml_of(layout: Layout, request: PlanRequest, comments: tuple[str, ...] = ()) -> str:
    """A file for `dapo-megatron train BASE.yaml THIS.yaml`, headed by `comments`."""
    head = "".join(f"# {comment}\n" for comment in comments)
    return head + yaml.safe_dump(settings_of(layout, request), sort_keys=False, width=120)


def actor_overrides(layout: Layout) -> list[str]:
    """The actor's part as tokens of a command line, `--actor.NAME=VALUE`."""
    return [f"--actor.{name}={json.dumps(value)}" for name, value in _actor(layout).items()]


def _actor(layout: Layout) -> dict[str, Any]:
    return {
        "num_ranks": layout.world_size,
        "tensor_parallel_size": layout.tensor_parallel_size,
        "pipeline_parallel_size": layout.pipeline_parallel_size,
        "virtual_pipeline_size": layout.virtual_pipeline_size,
        "num_layers_in_first_pipeline_stage": layout.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": layout.num_layers_in_last_pipeline_stage,
        "context_parallel_size": layout.context_parallel_size,
        "expert_parallel_size": layout.expert_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel_size,
        "sequence_parallel": layout.sequence_parallel,
        "use_distributed_optimizer": layout.use_distributed_optimizer,
        "offload": layout.swap_optimizer and layout.swap_parameters,
        "max_tokens_per_micro_batch": layout.max_tokens_per_micro_batch,
        "log_prob_chunk_tokens": layout.log_prob_chunk_tokens,
        **_recompute(layout.recompute),
    }


def _recompute(recompute: Recompute) -> dict[str, Any]:
    """`actor.recompute` has the usual cases; the others are TransformerConfig's own fields."""
    extra: dict[str, Any] = {}
    if recompute.granularity == "selective" and recompute.modules != {"core_attn"}:
        extra["recompute_modules"] = sorted(recompute.modules)
    if recompute.granularity == "full" and (recompute.method, recompute.num_layers) != ("uniform", 1):
        extra |= {"recompute_method": recompute.method, "recompute_num_layers": recompute.num_layers}
    return {"recompute": recompute.granularity} | ({"megatron_extra": extra} if extra else {})


def _engines(engine: EngineLayout) -> dict[str, Any]:
    return {
        "num_engines": engine.num_engines,
        "engine": {
            "type": "sglang",
            "tensor_parallel_size": engine.tensor_parallel_size,
            "mem_fraction_static": round(engine.mem_fraction_static, 3),
        },
    }
