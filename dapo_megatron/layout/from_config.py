"""A run's configuration in the words of the planner: its workload, its layout, and what `plan` is asked about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dapo_megatron.config.schema import ActorConfig, Config, HfEngineConfig, SglangEngineConfig
from dapo_megatron.layout.hardware import Gpu, gpu_named, read_gpus
from dapo_megatron.layout.layout import EmbeddedEngine, EngineLayout, Layout, Recompute
from dapo_megatron.layout.model_shape import ModelShape
from dapo_megatron.layout.plan import PlanRequest, Rejection
from dapo_megatron.layout.search import evaluate
from dapo_megatron.layout.train_time import micro_batches
from dapo_megatron.layout.workload import Workload
from dapo_megatron.types import ConfigError

OVER_SAMPLING_WITHOUT_FILTER = 1.0
"""Groups generated per group trained on where `algo.dynamic_sampling` is off."""


def workload_of(config: Config) -> Workload:
    """Sizes of a step of this run; how long responses are on average is not in a configuration."""
    train = config.train
    sizes: dict[str, Any] = {} if config.algo.dynamic_sampling else {"over_sampling": OVER_SAMPLING_WITHOUT_FILTER}
    return Workload(
        num_prompts_per_step=train.num_prompts_per_step,
        num_samples_per_prompt=train.num_samples_per_prompt,
        num_updates_per_rollout=train.num_updates_per_rollout,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.rollout.max_response_tokens,
        num_rollout_steps=train.num_rollout_steps,
        has_old_log_probs_pass=config.algo.old_log_probs == "actor",
        rollout_lag=train.rollout_lag,
        **sizes,
    )


def layout_of(config: Config) -> Layout:
    """The configured layout. Its engines are left out where they are not the run's own."""
    actor = config.actor
    layout = Layout(
        tensor_parallel_size=actor.tensor_parallel_size,
        pipeline_parallel_size=actor.pipeline_parallel_size,
        virtual_pipeline_size=actor.virtual_pipeline_size,
        num_layers_in_first_pipeline_stage=actor.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=actor.num_layers_in_last_pipeline_stage,
        context_parallel_size=actor.context_parallel_size,
        expert_parallel_size=actor.expert_parallel_size,
        expert_tensor_parallel_size=actor.expert_tensor_parallel_size,
        data_parallel_size=actor.data_parallel_size,
        sequence_parallel=actor.sequence_parallel,
        use_distributed_optimizer=actor.use_distributed_optimizer,
        max_tokens_per_micro_batch=actor.max_tokens_per_micro_batch,
        recompute=_recompute(actor),
        swap_optimizer=actor.offload,
        swap_parameters=actor.offload,
        log_prob_chunk_tokens=actor.log_prob_chunk_tokens,
        engine=_engines(config),
        embedded=_embedded(config),
    )
    return replace(layout, num_micro_batches=micro_batches(workload_of(config), layout).num_micro_batches)


def num_rollout_gpus(config: Config) -> int | None:
    """Devices for engines alone; None where they share the actor's, or are not the run's own."""
    engine = config.rollout.engine
    if config.cluster.placement == "colocated" or not isinstance(engine, SglangEngineConfig) or engine.engine_urls:
        return None
    return config.rollout.num_engines * engine.tensor_parallel_size


def request_of(config: Config, hf_config: Mapping[str, Any], gpu: Gpu) -> PlanRequest:
    """A plan for the devices that the configuration asks for."""
    engines = num_rollout_gpus(config)
    return PlanRequest(
        model_name=str(config.model.path),
        model=ModelShape.from_hf(hf_config),
        workload=workload_of(config),
        gpu=gpu,
        num_gpus=config.actor.world_size + (engines or 0),
        num_rollout_gpus=engines,
        gpu_file=config.cluster.gpu_file,
        **dtypes_of(config),
    )


def dtypes_of(config: Config) -> dict[str, Any]:
    """`PlanRequest.dtype` and `engine_dtype`: of the actor, and of the engines where they are servers of the run."""
    engine = config.rollout.engine
    return {"dtype": config.model.dtype, "engine_dtype": engine.dtype if isinstance(engine, SglangEngineConfig) else "bf16"}


def gpu_of(config: Config | None, name: str | None = None, file: Path | None = None) -> Gpu | None:
    """The device of a run; None where nothing names one. `name` and `file` are of a command line (--gpu, --gpu-file) and win.

    It is the one that --gpu names, else `cluster.gpu`, else the only entry of the file. The only entry of --gpu-file also wins over a
    `cluster.gpu` that is not in it. ConfigError for an unknown name and a file that cannot be used.
    """
    configured, configured_file = (None, None) if config is None else (config.cluster.gpu, config.cluster.gpu_file)
    chosen = file or configured_file
    own = {} if chosen is None else read_gpus(chosen)
    if name is not None:
        return gpu_named(name, own)
    sole = next(iter(own.values())) if len(own) == 1 else None
    if configured is None or (file is not None and sole is not None and configured.lower() not in own):
        if len(own) > 1 and file is None:
            raise ConfigError(f"cluster.gpu is missing: cluster.gpu_file ({chosen}) has {', '.join(own)}; name one.")
        return sole
    try:
        return gpu_named(configured, own)
    except ConfigError as error:
        words = (problem.replace("--gpu ", "cluster.gpu ", 1) for problem in error.problems)
        raise ConfigError([problem.replace("given with --gpu-file", "named by cluster.gpu_file") for problem in words]) from None


def fit_problem(config: Config, hf_config: Mapping[str, Any]) -> str | None:
    """Why this run will not fit on the devices that its configuration names, in one sentence; None when it will, or when none is named."""
    gpu = gpu_of(config)
    if gpu is None:
        return None
    found = evaluate(request_of(config, hf_config, gpu), layout_of(config))
    if not isinstance(found, Rejection) or found.kind not in ("memory", "host_memory"):
        return None
    return f"this run will not fit on {config.cluster.gpu or gpu.name}: {found.reason}"


def _recompute(actor: ActorConfig) -> Recompute:
    """`actor.recompute` with what `actor.megatron_extra` says of it."""
    extra = actor.megatron_extra
    if actor.recompute == "selective":
        return Recompute("selective", frozenset(extra.get("recompute_modules", ("core_attn",))))
    if actor.recompute == "full":
        return Recompute("full", method=extra.get("recompute_method", "uniform"), num_layers=extra.get("recompute_num_layers", 1))
    return Recompute()


def _engines(config: Config) -> EngineLayout | None:
    engine = config.rollout.engine
    if not isinstance(engine, SglangEngineConfig) or engine.engine_urls:
        return None
    share = {} if engine.mem_fraction_static is None else {"mem_fraction_static": engine.mem_fraction_static}
    return EngineLayout(
        tensor_parallel_size=engine.tensor_parallel_size,
        num_engines=config.rollout.num_engines,
        colocated=config.cluster.placement == "colocated",
        **share,
    )


def _embedded(config: Config) -> EmbeddedEngine | None:
    engine, count = config.rollout.engine, config.rollout.num_engines
    if not isinstance(engine, HfEngineConfig):
        return None
    workload = workload_of(config)
    in_work = engine.max_batch_size
    if config.eval.path is None:  # held-out sets may have more prompts than a step
        in_work = math.ceil(workload.num_samples_per_step * workload.over_sampling / count)
    return EmbeddedEngine(
        num_engines=count,
        num_rows=min(engine.max_batch_size, in_work),
        max_sequence_tokens=workload.max_sequence_tokens,
        element_bytes=4 if engine.dtype == "fp32" else 2,
        colocated=config.cluster.placement == "colocated",
        has_own_process=config.cluster.backend == "ray",
    )
