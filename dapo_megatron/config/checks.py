"""Rules that span sections, the model directory and the file system: everything knowable before a process is started.

Each rule is a generator of sentences: value, rule, remedy, in the words of the configuration.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dapo_megatron.config.expert_fields import EXPERT_FIELDS
from dapo_megatron.config.fields import did_you_mean, either, nearest
from dapo_megatron.config.layout_rules import ModelSizes, divisors, model_problems, rank_problems
from dapo_megatron.config.schema import Config, SglangEngineConfig
from dapo_megatron.types import ConfigError

DENSE_MODEL_TYPES = ("llama", "qwen2", "qwen3")
SUPPORTED_MODEL_TYPES = (*DENSE_MODEL_TYPES, *EXPERT_FIELDS)
LATENT_MODEL_TYPES = ("deepseek_v2", "deepseek_v3")
"""Those with latent attention, whose weights SGLang servers cannot be proven to hold."""
SUPPORTED_ROPE_TYPES = ("default", "llama3")
LATENT_ROPE_TYPES = ("default", "yarn")
SUPPORTED_ACTIVATIONS = ("silu",)

COMPLETE_MARKER = "COMPLETE"
"""File that a complete checkpoint carries."""

OWNED_MEGATRON_FIELDS: Mapping[str, str] = {
    "tensor_model_parallel_size": "actor.tensor_parallel_size",
    "pipeline_model_parallel_size": "actor.pipeline_parallel_size",
    "virtual_pipeline_model_parallel_size": "actor.virtual_pipeline_size",
    "num_layers_in_first_pipeline_stage": "actor.num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage": "actor.num_layers_in_last_pipeline_stage",
    "context_parallel_size": "actor.context_parallel_size",
    **dict.fromkeys(
        ("cp_comm_type", "hierarchical_context_parallel_sizes", "hybrid_context_parallel", "max_seqlen_per_dp_cp_rank"),
        "actor.context_parallel_size, whose cut of packed sequences goes with one way to exchange keys and values",
    ),
    "expert_model_parallel_size": "actor.expert_parallel_size",
    "expert_tensor_parallel_size": "actor.expert_tensor_parallel_size",
    "sequence_parallel": "actor.sequence_parallel",
    "num_layers": "the model's config.json",
    "hidden_size": "the model's config.json",
    "ffn_hidden_size": "the model's config.json",
    "num_attention_heads": "the model's config.json",
    "num_query_groups": "the model's config.json",
    "kv_channels": "the model's config.json",
    "params_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "calculate_per_token_loss": "the DAPO loss, which needs it on",
}
"""TransformerConfig fields that `actor.megatron_extra` may not touch, and who sets them."""


OWNED_SERVER_ARGUMENTS: Mapping[str, str] = {
    "model_path": "model.path",
    "tensor_parallel_size": "rollout.engine.tensor_parallel_size",
    "tp_size": "rollout.engine.tensor_parallel_size",
    "dtype": "rollout.engine.dtype",
    "mem_fraction_static": "rollout.engine.mem_fraction_static",
    "max_running_requests": "rollout.engine.max_running_requests",
    "max_total_tokens": "rollout.engine.max_total_tokens",
    "stream_interval": "rollout.engine.stream_interval_tokens",
    "random_seed": "run.seed",
    "device": "the machine",
    "host": "the launcher",
    "port": "the launcher",
    "nccl_port": "the launcher",
    "api_key": "the launcher",
    "base_gpu_id": "the launcher",
    "weight_version": "the weight sync",
    "quantization": "quantization_config of the model's config.json, which the weight sync follows",
    "enable_memory_saver": "cluster.placement",
    "enable_return_routed_experts": "rollout.engine.return_routed_experts",
    "skip_tokenizer_init": "the engine's client, which reads token ids",
    "incremental_streaming_output": "the engine's client",
}
"""Arguments of SGLang that `rollout.sglang_extra` may not touch, and who sets them."""


_KEPT_BY_SGLANG = 6
"""Tokens of the context, or of the KV cache, that a request to SGLang 0.5.23 cannot have (`rollout/room.py`)."""


def check_config(
    config: Config,
    hf_config: Mapping[str, Any] | None,
    transformer_config_fields: frozenset[str] | None = None,
    server_arguments: frozenset[str] | None = None,
) -> list[str]:
    """Every problem of the configuration as one sentence; an empty list when it can work.

    `hf_config` is the model's config.json (`read_hf_config`); None leaves the rules about the model out.
    `transformer_config_fields` are the names of megatron-core's TransformerConfig; None leaves `actor.megatron_extra` unchecked.
    `server_arguments` are those of SGLang's ServerArgs; None leaves `rollout.sglang_extra` unchecked.
    """
    problems = [
        *_step_sizes(config),
        *_rewards(config),
        *_log_probs(config),
        *_rollout_lag(config),
        *_offload(config),
        *rank_problems(config.actor),
        *_one_process(config),
        *_servers(config),
        *_restarts(config),
        *_model_directory(config.model.path),
        *_data_file("data.path", config.data.path),
        *_data_file("eval.path", config.eval.path),
        *_evaluation(config),
        *_run_folder(config),
    ]
    if hf_config is not None:
        problems += _architecture(config, hf_config)
        problems += _layout_of_model(config, hf_config)
        problems += _positions(config, hf_config, "rollout", config.rollout.max_response_tokens)
        if config.eval.path is not None and config.eval.max_response_tokens is not None:
            problems += _positions(config, hf_config, "eval", config.eval.max_response_tokens)
        problems += _servers_of_model(config, hf_config)
    if transformer_config_fields is not None:
        problems += _megatron_extra(config, transformer_config_fields)
    if server_arguments is not None:
        problems += _sglang_extra(config, server_arguments)
    return problems


def check_evaluation(config: Config, hf_config: Mapping[str, Any] | None, *, starts_actor: bool) -> list[str]:
    """As `check_config`, for `dapo-megatron evaluate`: only what an evaluation uses.

    `starts_actor`: the weights come from a checkpoint through actor ranks, so the layout must fit the model.
    """
    problems = [
        *_rewards(config),
        *_evaluation(config),
        *_model_directory(config.model.path),
        *_data_file("--data", config.eval.path),
    ]
    if config.eval.path is None:
        problems.append("--data is missing: the run has no eval.path; give a JSONL or parquet file, or the name of a data set.")
    problems += [*_one_process(config), *_servers(config)]
    if starts_actor:
        problems += rank_problems(config.actor)
    if hf_config is not None:
        section = "rollout" if config.eval.max_response_tokens is None else "eval"
        problems += _positions(config, hf_config, section, config.max_eval_response_tokens)
        if starts_actor:
            problems += [*_architecture(config, hf_config), *_layout_of_model(config, hf_config)]
    return problems


def check_layout(config: Config, hf_config: Mapping[str, Any]) -> list[str]:
    """The part of `check_config` that the actor's ranks depend on: no data, no run folder, no weights."""
    return [*rank_problems(config.actor), *_architecture(config, hf_config), *_layout_of_model(config, hf_config)]


def read_hf_config(path: Path) -> dict[str, Any]:
    """The config.json of an HF model directory. Raises ConfigError when it is missing, unreadable or no JSON object."""
    file = path / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"model.path ({path}) must be an HF directory with a config.json ({error.strerror}); give the directory of a model."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{file} must be JSON ({error}); copy the file again from its source.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, not {type(content).__name__}; copy the file again from its source.")
    return content


def _one_process(config: Config) -> Iterator[str]:
    if config.cluster.backend != "local":
        return
    for name, value in (
        ("the actor's ranks (tensor x pipeline x context x data parallel size)", config.actor.world_size),
        ("rollout.num_engines", config.rollout.num_engines),
    ):
        if value != 1:
            yield f"{name} ({value}) must be 1 where cluster.backend is local: all is one process; use 1, or cluster.backend ray."
    if config.rollout.engine.num_threads is not None:
        yield (
            f"rollout.engine.num_threads ({config.rollout.engine.num_threads}) has no effect where cluster.backend is local: rank and engine "
            f"take turns in the actor.num_threads ({config.actor.num_threads}) threads of one process; set those, or remove it."
        )


def _servers(config: Config) -> Iterator[str]:
    """Rules of `rollout.engine.type: sglang`."""
    engine = config.rollout.engine
    if not isinstance(engine, SglangEngineConfig):
        if config.rollout.sglang_extra:
            names = ", ".join(config.rollout.sglang_extra)
            yield f"rollout.sglang_extra ({names}) has no effect with rollout.engine.type {engine.type}; use type sglang, or remove it."
        return
    if config.cluster.backend == "local":
        yield "rollout.engine.type sglang needs cluster.backend ray: an engine is a server process; use ray, or the engine type hf."
    num_urls = len(engine.engine_urls)
    if num_urls and num_urls != config.rollout.num_engines:
        yield (
            f"rollout.num_engines ({config.rollout.num_engines}) must be the number of rollout.engine.engine_urls ({num_urls}); "
            f"use {num_urls}."
        )
    if num_urls and config.rollout.sglang_extra:
        yield "rollout.sglang_extra has no effect on servers that run already (rollout.engine.engine_urls); remove it."
    for url in engine.engine_urls:
        if not url.startswith(("http://", "https://")) or url.endswith("/"):
            yield f"rollout.engine.engine_urls ({url}) must look like http://host:port; correct it."
    if engine.api_key_env is not None and not engine.engine_urls:
        yield (
            f"rollout.engine.api_key_env ({engine.api_key_env}) has no effect without rollout.engine.engine_urls: servers of the run "
            "get a key of their own; remove it."
        )
    if engine.api_key_env is not None and engine.api_key_env not in os.environ:
        yield f"rollout.engine.api_key_env ({engine.api_key_env}) must name an environment variable that is set; export it."
    if engine.weight_transport == "disk" and engine.weight_sync_dir is None:
        yield "rollout.engine.weight_sync_dir is missing: weight_transport disk needs it; give a folder that actor and engines see."


def _servers_of_model(config: Config, hf_config: Mapping[str, Any]) -> Iterator[str]:
    engine = config.rollout.engine
    if not isinstance(engine, SglangEngineConfig):
        return
    num_heads = hf_config.get("num_attention_heads")
    if isinstance(num_heads, int) and num_heads % engine.tensor_parallel_size:
        yield (
            f"rollout.engine.tensor_parallel_size ({engine.tensor_parallel_size}) must divide num_attention_heads ({num_heads}) of "
            f"{config.model.path}; use {either(divisors(num_heads, limit=64))}."
        )
    model_type = hf_config.get("model_type")
    experts = EXPERT_FIELDS.get(str(model_type))
    width = experts.width(hf_config) if experts else None
    if experts and width and width % engine.tensor_parallel_size:
        yield (
            f"rollout.engine.tensor_parallel_size ({engine.tensor_parallel_size}) must divide {experts.width_field} ({width}) of "
            f"{config.model.path}: servers cut each expert over their ranks; use {either(divisors(width, limit=64))}."
        )
    if model_type in LATENT_MODEL_TYPES:
        yield (
            f"rollout.engine.type (sglang) must be hf for model_type ({model_type}) of {config.model.path}: what servers hold of latent attention "
            "cannot be compared with what was sent; use the embedded engine, or a model with grouped-query attention."
        )
    if engine.return_routed_experts and not hf_config.get("num_experts_per_tok"):
        yield f"rollout.engine.return_routed_experts must be false: {config.model.path} has no experts; remove it."


def _step_sizes(config: Config) -> Iterator[str]:
    train, rollout = config.train, config.rollout
    if train.num_updates_per_rollout > train.num_prompts_per_step:
        yield (
            f"train.num_updates_per_rollout ({train.num_updates_per_rollout}) must not exceed train.num_prompts_per_step "
            f"({train.num_prompts_per_step}): every optimizer step needs a group; use at most {train.num_prompts_per_step}."
        )
    if rollout.sampler == "waves":
        for name, value in (("partial_rollout", rollout.partial_rollout), ("in_flight_margin", rollout.in_flight_margin)):
            if value:
                yield f"rollout.{name} ({value}) has no effect with rollout.sampler waves; use rollout.sampler streaming or remove it."
    if rollout.partial_rollout and not rollout.max_staleness:
        yield (
            "rollout.partial_rollout needs rollout.max_staleness of at least 1 (now 0): a group that goes on has tokens of older weights; "
            "use 1, or more where responses span several steps."
        )
    yield from _band(config)
    if config.algo.overlong_cache_tokens >= rollout.max_response_tokens:
        yield (
            f"algo.overlong_cache_tokens ({config.algo.overlong_cache_tokens}) must be less than rollout.max_response_tokens "
            f"({rollout.max_response_tokens}); use about a fifth of it, or 0 to switch the penalty off."
        )


def _band(config: Config) -> Iterator[str]:
    algo, num_samples = config.algo, config.train.num_samples_per_prompt
    band = f"algo.accuracy_min ({algo.accuracy_min:g}) and algo.accuracy_max ({algo.accuracy_max:g})"
    if (algo.accuracy_min, algo.accuracy_max) != (0, 1) and not algo.dynamic_sampling:
        yield f"{band} have no effect without algo.dynamic_sampling; set it to true, or remove them."
    elif not any(algo.accuracy_min <= correct / num_samples <= algo.accuracy_max for correct in range(1, num_samples)):
        yield (
            f"{band} leave no group: with train.num_samples_per_prompt {num_samples} an accuracy is a multiple of 1/{num_samples} "
            "between 0 and 1; widen the band."
        )


def _rewards(config: Config) -> Iterator[str]:
    reward = config.reward
    if reward.type == "custom" and reward.function is None:
        yield "reward.function is missing: reward.type custom needs it; set it to the import path `module:function`."
    if reward.type != "custom" and reward.function is not None:
        yield (
            f"reward.function ({reward.function}) has no effect with reward.type {reward.type}; "
            "set reward.type to custom or remove the function."
        )
    if reward.correct_reward <= reward.wrong_reward:
        yield (
            f"reward.correct_reward ({reward.correct_reward:g}) must be greater than reward.wrong_reward "
            f"({reward.wrong_reward:g}), or wrong answers are learnt; the paper uses 1 and -1."
        )
    for key, import_path in (("reward.function", reward.function), ("run.prepare", config.run.prepare)):
        if import_path is not None and not all(import_path.partition(":")):
            yield f"{key} ({import_path}) must be an import path `module:function`, e.g. my_package.rewards:score."


def _log_probs(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if config.algo.old_log_probs == "engine" and (rollout.top_p < 1 or rollout.top_k is not None):
        yield (
            f"algo.old_log_probs engine needs rollout.top_p 1 and no rollout.top_k (now {rollout.top_p:g} and {rollout.top_k}): "
            "a truncated distribution has other log-probs than the actor's; use algo.old_log_probs actor."
        )
    if config.algo.tis_clip is not None and config.algo.old_log_probs == "engine":
        yield (
            f"algo.tis_clip ({config.algo.tis_clip:g}) has no effect with algo.old_log_probs engine, which is what it corrects towards; "
            "use algo.old_log_probs actor, or set algo.tis_clip to null."
        )
    if config.algo.tis_clip is not None and (rollout.top_p < 1 or rollout.top_k is not None):
        yield (
            f"algo.tis_clip needs rollout.top_p 1 and no rollout.top_k (now {rollout.top_p:g} and {rollout.top_k}): a truncated "
            "distribution has other log-probs than the actor's; set algo.tis_clip to null, or sample without truncation."
        )


def _rollout_lag(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if not config.train.rollout_lag:
        return
    if not rollout.max_staleness:
        yield "train.rollout_lag 1 needs rollout.max_staleness of at least 1 (now 0): every token is one version old; use 1 or more."
    if rollout.top_p < 1 or rollout.top_k is not None:
        yield (
            f"train.rollout_lag 1 needs rollout.top_p 1 and no rollout.top_k (now {rollout.top_p:g} and {rollout.top_k}): importance "
            "ratios against older weights need the engine's whole distribution; sample without truncation, or use train.rollout_lag 0."
        )
    if config.cluster.backend == "ray" and config.cluster.placement == "colocated":
        yield (
            "train.rollout_lag 1 needs cluster.placement split (now colocated): engines sample while the actor trains, on devices of "
            "their own; use split, or train.rollout_lag 0."
        )


def _offload(config: Config) -> Iterator[str]:
    if not config.actor.offload:
        return
    if config.cluster.placement != "colocated":
        yield (
            f"actor.offload has no effect with cluster.placement {config.cluster.placement}: engines have devices of their own; "
            "remove it, or use placement colocated."
        )
    if config.train.rollout_lag:
        yield "actor.offload needs train.rollout_lag 0 (now 1): engines that sample beside the actor leave it no turn; use one of the two."


def _restarts(config: Config) -> Iterator[str]:
    if config.run.max_restarts and not config.checkpoint.every:
        yield (
            f"run.max_restarts ({config.run.max_restarts}) needs checkpoints to start again from, but checkpoint.every is 0; "
            "set checkpoint.every to a number of rollout steps, or run.max_restarts to 0."
        )
    if config.run.max_restarts and not config.checkpoint.resume:
        yield (f"run.max_restarts ({config.run.max_restarts}) needs checkpoint.resume true; set it, or run.max_restarts to 0.")


def _model_sizes(config: Config, hf_config: Mapping[str, Any]) -> ModelSizes:
    """The sizes of config.json that are positive integers; rules about the others are left out."""
    num_heads = hf_config.get("num_attention_heads")
    heads = {
        "num_attention_heads": num_heads,
        "num_key_value_heads": hf_config.get("num_key_value_heads") or num_heads,
    }
    num_layers, model_type = hf_config.get("num_hidden_layers"), hf_config.get("model_type")
    experts = EXPERT_FIELDS.get(str(model_type))
    has_dense_layers = experts is None or experts.has_dense_layers(hf_config)
    return ModelSizes(
        name=str(config.model.path),
        num_layers=num_layers if isinstance(num_layers, int) else None,
        heads=_positive(heads),
        widths=_positive({"intermediate_size": hf_config.get("intermediate_size")}) if has_dense_layers else {},
        has_experts=experts is not None if model_type in SUPPORTED_MODEL_TYPES else None,
        num_experts=experts.number(hf_config) if experts else None,
        expert_width=experts.width(hf_config) if experts else None,
        **({"expert_width_field": experts.width_field} if experts else {}),
    )


def _positive(sizes: Mapping[str, Any]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if isinstance(size, int) and size > 0}


def _layout_of_model(config: Config, hf_config: Mapping[str, Any]) -> Iterator[str]:
    yield from model_problems(config.actor, _model_sizes(config, hf_config), pad_query_groups=config.actor.pad_query_groups)


def _positions(config: Config, hf_config: Mapping[str, Any], section: str, max_response_tokens: int) -> Iterator[str]:
    """The longest prompt and the longest response of `section` fit the model and, where its size is given, the KV cache."""
    positions, engine = hf_config.get("max_position_embeddings"), config.rollout.engine
    longest = config.data.max_prompt_tokens + max_response_tokens
    lengths = f"data.max_prompt_tokens + {section}.max_response_tokens ({config.data.max_prompt_tokens} + {max_response_tokens} = {longest})"
    kept, why = (_KEPT_BY_SGLANG, f", less {_KEPT_BY_SGLANG} that SGLang keeps,") if engine.type == "sglang" else (0, "")
    if isinstance(positions, int) and longest > positions - kept:
        yield (
            f"{lengths} must not exceed max_position_embeddings ({positions}){why} of {config.model.path}; "
            f"shorten one of them by {longest - positions + kept}."
        )
    if engine.type == "sglang" and engine.max_total_tokens is not None and longest > engine.max_total_tokens - kept:
        yield (
            f"{lengths} must not exceed rollout.engine.max_total_tokens ({engine.max_total_tokens}){why} "
            f"or responses are cut short; use {longest + kept} or more."
        )


def _evaluation(config: Config) -> Iterator[str]:
    settings = config.eval
    if settings.temperature == 0 and settings.num_samples > 1:
        yield (
            f"eval.num_samples ({settings.num_samples}) must be 1 with eval.temperature 0: greedy responses to a problem are all the "
            "same; use 1, or a temperature above 0."
        )


def _architecture(config: Config, hf_config: Mapping[str, Any]) -> Iterator[str]:
    model = config.model.path
    model_type = hf_config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        yield f"model_type ({model_type}) of {model} must be {either(SUPPORTED_MODEL_TYPES)}; use a model of these families."
        return
    missing = [name for name in _NEEDED_SIZES if not isinstance(hf_config.get(name), int)]
    if missing:
        yield f"config.json of {model} lacks {', '.join(missing)}; copy the file again from its source."
    activation = hf_config.get("hidden_act", "silu")
    if activation not in SUPPORTED_ACTIVATIONS:
        yield f"hidden_act ({activation}) of {model} must be {either(SUPPORTED_ACTIVATIONS)}; use a model with that activation."
    rope_type = _rope_type(hf_config)
    rope_types = LATENT_ROPE_TYPES if model_type in LATENT_MODEL_TYPES else SUPPORTED_ROPE_TYPES
    if rope_type not in rope_types:
        yield (f"rope type ({rope_type}) of {model} must be {either(rope_types)}; use a model without other position scaling.")
    yield from _quantisation(config, hf_config)
    if hf_config.get("use_sliding_window"):
        yield f"use_sliding_window (true) of {model} must be false: attention is over the whole sequence; use another model."


def _quantisation(config: Config, hf_config: Mapping[str, Any]) -> Iterator[str]:
    """SGLang servers take weights that are quantised as those of the model are; everybody else wants them plain."""
    quantization, engine, model = hf_config.get("quantization_config"), config.rollout.engine, config.model.path
    if not quantization:
        return
    if quantization.get("quant_method") != "fp8" or not quantization.get("weight_block_size"):
        yield (
            f"quantization_config of {model} must be absent, or fp8 with a weight_block_size: the actor trains bf16 or fp32 weights; use the "
            "unquantised model, or convert this one."
        )
    elif not isinstance(engine, SglangEngineConfig):
        yield (
            f"quantization_config of {model} (fp8) needs rollout.engine.type sglang (now {engine.type}): the embedded engine computes in "
            "bf16 or fp32; use the unquantised model, or SGLang servers on GPUs."
        )
    elif engine.dtype != "bf16":
        yield (
            f"rollout.engine.dtype ({engine.dtype}) must be bf16 for {model}, whose weights are fp8: what is not quantised is bf16; use bf16."
        )


_NEEDED_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


def _rope_type(hf_config: Mapping[str, Any]) -> str:
    """transformers 5 writes `rope_parameters`, older releases `rope_scaling` with `rope_type` or `type`."""
    scaling = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    return scaling.get("rope_type") or scaling.get("type") or "default"


def _model_directory(path: Path) -> Iterator[str]:
    if not path.is_dir():
        yield f"model.path ({path}) must be an HF model directory, but there is none; download the model and give its directory."
        return
    if not (path / "config.json").is_file():
        yield f"model.path ({path}) lacks config.json; give the directory of an HF model."
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        yield f"model.path ({path}) lacks a tokenizer (tokenizer.json); copy the tokenizer files next to the weights."
    index = path / "model.safetensors.index.json"
    if index.is_file():
        yield from _shards(index)
    elif not (path / "model.safetensors").is_file():
        yield (
            f"model.path ({path}) lacks safetensors weights (model.safetensors, or its index and shards); "
            "save the model with save_pretrained."
        )


def _shards(index: Path) -> Iterator[str]:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        yield f"{index} must be a JSON object with a weight_map; copy the file again from its source."
        return
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        yield f"{index.parent} lacks {len(missing)} of {len(shards)} weight files ({missing[0]} first); download them."


def _data_file(key: str, path: str | None) -> Iterator[str]:
    """A hub name looks like `owner/name`; whatever has a data file's ending or starts at a directory must exist."""
    if path is None:
        return
    looks_like_file = Path(path).suffix in {".jsonl", ".json", ".parquet"} or path.startswith((".", "/", "~"))
    if looks_like_file and not Path(path).is_file():
        yield f"{key} ({path}) must be an existing file or the name of a data set on a hub; correct the path."


def _run_folder(config: Config) -> Iterator[str]:
    run, checkpoint = config.run, config.checkpoint
    existing = next(folder for folder in (run.dir.absolute(), *run.dir.absolute().parents) if folder.exists())
    if not existing.is_dir():
        yield f"run.dir ({run.dir}) must be a directory, but {existing} is a file; choose another path."
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"run.dir ({run.dir}) must be writable, but {existing} is not; choose another path or change its permissions."
    checkpoints = run.dir / "checkpoints"
    if not checkpoint.resume and checkpoints.is_dir() and any(checkpoints.iterdir()):
        yield (
            f"checkpoint.resume is false, but {checkpoints} holds checkpoints; set it to true to go on from them, "
            "or choose another run.dir."
        )
    if checkpoint.load is not None and not (checkpoint.load / COMPLETE_MARKER).is_file():
        yield (
            f"checkpoint.load ({checkpoint.load}) holds no complete checkpoint; give a folder checkpoints/step_NNNNNN of another "
            "run, or null to start from model.path."
        )


def _megatron_extra(config: Config, transformer_config_fields: frozenset[str]) -> Iterator[str]:
    kind = "a field of megatron-core's TransformerConfig"
    yield from _passed_through(
        "actor.megatron_extra", config.actor.megatron_extra, OWNED_MEGATRON_FIELDS, transformer_config_fields, kind
    )


def _sglang_extra(config: Config, server_arguments: frozenset[str]) -> Iterator[str]:
    kind = "an argument of SGLang's ServerArgs"
    yield from _passed_through(
        "rollout.sglang_extra", config.rollout.sglang_extra, OWNED_SERVER_ARGUMENTS, server_arguments, kind
    )


def _passed_through(
    section: str, given: Iterable[str], owned: Mapping[str, str], known: frozenset[str], kind: str
) -> Iterator[str]:
    """Names that a pass-through table may not have: what we set ourselves, and what its receiver does not know."""
    for name in given:
        if name in owned:
            yield f"{section}.{name} must not be given: it is set by {owned[name]}; remove it."
        elif name not in known:
            yield f"{section}.{name} is not {kind}" + (did_you_mean(nearest(name, known)) or "; remove it.")
