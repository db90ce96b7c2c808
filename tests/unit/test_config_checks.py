"""Rules that span sections: one sentence each, with value, rule and remedy."""

import json
from pathlib import Path

import pytest

from dapo_megatron.config.checks import check_config, read_hf_config
from dapo_megatron.config.load import load_config
from dapo_megatron.config.schema import Config
from dapo_megatron.types import ConfigError
from tests.published_configs import DEEPSEEK_V2_LITE

HF_CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
SGLANG = "--rollout.engine.type=sglang"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    for name in ("tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def load(model: Path, tmp_path: Path):
    (tmp_path / "train.jsonl").write_text("")

    def load(*overrides: str) -> Config:
        base = [f"--model.path={model}", f"--data.path={tmp_path / 'train.jsonl'}", f"--run.dir={tmp_path / 'run'}"]
        return load_config([], [*base, "--rollout.max_response_tokens=1024", *overrides])

    return load


def only_problem(config: Config, hf_config: dict | None = None, fields: frozenset[str] | None = None) -> str:
    (problem,) = check_config(config, hf_config if hf_config is not None else HF_CONFIG, fields)
    return problem


def test_sound_config_has_no_problems(load):
    config = load("--actor.tensor_parallel_size=4", "--actor.pipeline_parallel_size=2", "--actor.virtual_pipeline_size=2")
    assert check_config(config, HF_CONFIG, frozenset()) == []


def test_context_parallel_ranks_count_among_those_of_a_copy(load):
    actor = load("--context_parallel_size=4", "--actor.tensor_parallel_size=2", "--num_ranks=16").actor
    assert (actor.data_parallel_size, actor.num_weight_copies, load("--context_parallel_size=3").actor.world_size) == (2, 8, 3)
    problem = only_problem(load("--actor.context_parallel_size=2", "--actor.tensor_parallel_size=2", "--actor.num_ranks=6"))
    assert problem == ("actor.num_ranks (6) must be a multiple of tensor x pipeline x context parallel size (4); use 4, 8 or 16.")


def test_how_context_parallel_ranks_exchange_keys_is_no_choice(load):
    config = load("--context_parallel_size=2", "--actor.megatron_extra.cp_comm_type=a2a")
    assert only_problem(config, fields=frozenset({"cp_comm_type"})).startswith(
        "actor.megatron_extra.cp_comm_type must not be given: it is set by actor.context_parallel_size, whose cut"
    )


def test_uneven_stages_have_no_problems(load):
    uneven = load("--pipeline_parallel_size=3", "--num_layers_in_first_pipeline_stage=3", "--num_layers_in_last_pipeline_stage=1")
    interleaved = load("--pipeline_parallel_size=2", "--num_layers_in_first_pipeline_stage=6", "--virtual_pipeline_size=2")
    assert check_config(uneven, HF_CONFIG) == check_config(interleaved, HF_CONFIG) == []


def test_tensor_parallel_size_must_divide_what_it_shards(load, model):
    problems = check_config(load("--actor.tensor_parallel_size=3"), HF_CONFIG)
    assert problems == [
        f"actor.tensor_parallel_size (3) must divide {name} ({size}) of {model}; use 1, 2, 4 or 8{other_remedy}."
        for name, size, other_remedy in (
            ("num_attention_heads", 32, ", or set actor.pad_query_groups"),
            ("num_key_value_heads", 8, ", or set actor.pad_query_groups"),
            ("intermediate_size", 512, ""),
        )
    ]


def test_padded_query_groups_need_not_divide(load):
    three_groups = {**HF_CONFIG, "num_attention_heads": 9, "num_key_value_heads": 3}
    assert len(check_config(load("--actor.tensor_parallel_size=2"), three_groups)) == 2
    assert check_config(load("--actor.tensor_parallel_size=2", "--actor.pad_query_groups=true"), three_groups) == []


def test_query_heads_count_as_key_value_heads_when_these_are_not_given(load):
    without = {key: value for key, value in HF_CONFIG.items() if key != "num_key_value_heads"}
    assert check_config(load("--actor.tensor_parallel_size=16"), without) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("chunked_prefil_size", "is not an argument of SGLang's ServerArgs; did you mean chunked_prefill_size?"),
        ("port", "must not be given: it is set by the launcher; remove it."),
        ("chunked_prefill_size", None),
    ],
)
def test_server_arguments_are_those_of_sglang(load, name, words):
    config = load(SGLANG, f"--rollout.sglang_extra.{name}=64")
    problems = check_config(config, HF_CONFIG, server_arguments=frozenset({"chunked_prefill_size", "port"}))
    assert problems == ([f"rollout.sglang_extra.{name} {words}"] if words else [])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["--cluster.backend=local", "--actor.tensor_parallel_size=2"],
            "parallel size) (2) must be 1 where cluster.backend is local",
        ),
        (["--cluster.backend=local", "--num_engines=2"], "rollout.num_engines (2) must be 1 where cluster.backend is local"),
        (["--actor.num_ranks=6", "--actor.tensor_parallel_size=4"], "actor.num_ranks (6) must be a multiple of"),
        (["--actor.pipeline_parallel_size=3"], "actor.pipeline_parallel_size (3) must divide num_hidden_layers (8)"),
        (
            ["--actor.pipeline_parallel_size=4", "--actor.virtual_pipeline_size=3"],
            "actor.pipeline_parallel_size x actor.virtual_pipeline_size (12) must divide num_hidden_layers (8)",
        ),
        (["--actor.virtual_pipeline_size=2"], "needs actor.pipeline_parallel_size > 1"),
        (
            ["--actor.num_layers_in_last_pipeline_stage=2"],
            "actor.num_layers_in_last_pipeline_stage (2) needs actor.pipeline_parallel_size > 1",
        ),
        (
            ["--actor.pipeline_parallel_size=3", "--actor.num_layers_in_first_pipeline_stage=3"],
            "actor.num_layers_in_first_pipeline_stage (3) must leave a positive multiple of 2, for the other stages, but 5 of",
        ),
        (
            ["--pipeline_parallel_size=2", "--num_layers_in_first_pipeline_stage=3", "--num_layers_in_last_pipeline_stage=4"],
            "must leave none: there is no other stage, but 1 of num_hidden_layers (8)",
        ),
        (
            ["--pipeline_parallel_size=4", "--num_layers_in_first_pipeline_stage=3", "--num_layers_in_last_pipeline_stage=5"],
            "but 0 of num_hidden_layers (8)",
        ),
        (
            ["--pipeline_parallel_size=3", "--num_layers_in_first_pipeline_stage=2", "--virtual_pipeline_size=2"],
            "actor.virtual_pipeline_size (2) must divide layers of each other stage (3)",
        ),
        (["--actor.sequence_parallel=true"], "needs actor.tensor_parallel_size > 1"),
        (
            ["--train.num_prompts_per_step=8", "--train.num_updates_per_rollout=16"],
            "must not exceed train.num_prompts_per_step (8)",
        ),
        (["--reward.type=custom"], "reward.function is missing"),
        (["--reward.function=a:b"], "reward.function (a:b) has no effect with reward.type math"),
        (["--reward.type=custom", "--reward.function=a.b"], "reward.function (a.b) must be an import path"),
        (["--run.prepare=:b"], "run.prepare (:b) must be an import path"),
        (["--reward.wrong_reward=1"], "must be greater than reward.wrong_reward (1)"),
        (["--algo.overlong_cache_tokens=1024"], "must be less than rollout.max_response_tokens (1024)"),
        (["--rollout.max_response_tokens=4000"], "(1024 + 4000 = 5024) must not exceed max_position_embeddings (4096)"),
        ([SGLANG, "--rollout.max_response_tokens=3067"], "(4096), less 6 that SGLang keeps,"),
        ([SGLANG, "--rollout.engine.max_total_tokens=2049"], "must not exceed rollout.engine.max_total_tokens (2049), less 6"),
        (["--algo.old_log_probs=engine", "--rollout.top_p=0.7"], "algo.old_log_probs engine needs rollout.top_p 1"),
        (["--algo.tis_clip=2", "--algo.old_log_probs=engine"], "algo.tis_clip (2) has no effect with algo.old_log_probs engine"),
        (["--algo.tis_clip=2", "--rollout.top_k=5"], "algo.tis_clip needs rollout.top_p 1 and no rollout.top_k (now 1 and 5)"),
        (["--rollout.partial_rollout=true"], "rollout.partial_rollout (True) has no effect with rollout.sampler waves"),
        (["--rollout.in_flight_margin=0.5"], "rollout.in_flight_margin (0.5) has no effect with rollout.sampler waves"),
        (
            ["--rollout.sampler=streaming", "--rollout.partial_rollout=true", "--rollout.max_staleness=0"],
            "rollout.partial_rollout needs rollout.max_staleness of at least 1 (now 0)",
        ),
        (["--algo.accuracy_max=0.5", "--algo.dynamic_sampling=false"], "have no effect without algo.dynamic_sampling"),
        (["--algo.accuracy_min=0.4", "--algo.accuracy_max=0.3"], "(0.3) leave no group: with train.num_samples_per_prompt 16"),
        (
            ["--train.rollout_lag=1", "--cluster.placement=split", "--rollout.max_staleness=0"],
            "train.rollout_lag 1 needs rollout.max_staleness of at least 1 (now 0)",
        ),
        (
            ["--train.rollout_lag=1", "--cluster.placement=split", "--rollout.top_p=0.9"],
            "train.rollout_lag 1 needs rollout.top_p 1",
        ),
        (["--train.rollout_lag=1"], "train.rollout_lag 1 needs cluster.placement split (now colocated)"),
        (["--actor.offload=true", "--cluster.placement=split"], "actor.offload has no effect with cluster.placement split"),
        (
            ["--actor.offload=true", "--train.rollout_lag=1", "--cluster.backend=local"],
            "actor.offload needs train.rollout_lag 0 (now 1)",
        ),
        (
            ["--rollout.engine.num_threads=2", "--cluster.backend=local"],
            "rollout.engine.num_threads (2) has no effect where cluster.backend is local",
        ),
        (["--run.max_restarts=1", "--checkpoint.every=0"], "run.max_restarts (1) needs checkpoints"),
        (["--run.max_restarts=1", "--checkpoint.resume=false"], "run.max_restarts (1) needs checkpoint.resume true"),
        (["--data.path=nowhere.jsonl"], "data.path (nowhere.jsonl) must be an existing file"),
        (["--eval.path=nowhere.parquet"], "eval.path (nowhere.parquet) must be an existing file"),
        (["--checkpoint.load=nowhere"], "checkpoint.load (nowhere) holds no complete checkpoint"),
        (["--rollout.sglang_extra.chunked_prefill_size=64"], "rollout.sglang_extra (chunked_prefill_size) has no effect"),
        ([SGLANG, "--cluster.backend=local"], "rollout.engine.type sglang needs cluster.backend ray"),
        ([SGLANG, "--engine_urls=[http://a:1]", "--num_engines=2"], "must be the number of rollout.engine.engine_urls (1)"),
        ([SGLANG, "--engine_urls=[a:1]"], "rollout.engine.engine_urls (a:1) must look like http://host:port"),
        ([SGLANG, "--engine_urls=[http://a:1]", "--rollout.sglang_extra.tool_server=b"], "no effect on servers that run already"),
        (
            [SGLANG, "--engine_urls=[http://a:1]", "--api_key_env=NO_SUCH_VARIABLE"],
            "must name an environment variable that is set",
        ),
        ([SGLANG, "--weight_transport=disk"], "rollout.engine.weight_sync_dir is missing"),
        ([SGLANG, "--rollout.engine.tensor_parallel_size=3"], "must divide num_attention_heads (32)"),
        ([SGLANG, "--rollout.engine.return_routed_experts=true"], "return_routed_experts must be false"),
    ],
)
def test_rule_across_sections(load, overrides, words):
    problem = only_problem(load(*overrides))
    assert words in problem and problem.endswith(".")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "model_type (mamba)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config of"),
        ({"quantization_config": FP8}, "(fp8) needs rollout.engine.type sglang (now hf)"),
        ({"hidden_act": "gelu"}, "hidden_act (gelu)"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type (yarn)"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type (linear)"),
        ({"use_sliding_window": True}, "use_sliding_window (true)"),
        ({"vocab_size": None}, "lacks vocab_size"),
    ],
)
def test_unsupported_architecture_is_named(load, change, words):
    assert words in only_problem(load(), {**HF_CONFIG, **change})


def test_fp8_model_is_served_by_sglang_in_bf16(load):
    hf_config = {**HF_CONFIG, "quantization_config": FP8}
    assert check_config(load(SGLANG), hf_config) == []
    assert "rollout.engine.dtype (fp32) must be bf16" in only_problem(load(SGLANG, "--rollout.engine.dtype=fp32"), hf_config)


QWEN3_MOE = {**HF_CONFIG, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
MIXTRAL = {**HF_CONFIG, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
DEEPSEEK = {**HF_CONFIG, **YARN, "model_type": "deepseek_v3", "n_routed_experts": 8, "moe_intermediate_size": 96}
SHARED_HEADS = ["--actor.tensor_parallel_size=2", "--actor.sequence_parallel=true"]


@pytest.mark.parametrize(
    ("hf_config", "overrides"),
    [
        (QWEN3_MOE, ["--expert_parallel_size=4", "--actor.num_ranks=4"]),
        (QWEN3_MOE, [*SHARED_HEADS, "--expert_parallel_size=2", "--rollout.engine.type=sglang"]),
        (QWEN3_MOE | {"intermediate_size": 511}, [*SHARED_HEADS, "--expert_tensor_parallel_size=2"]),
        (MIXTRAL, ["--pipeline_parallel_size=2", "--expert_parallel_size=2", "--actor.num_ranks=4"]),
        (DEEPSEEK, ["--expert_parallel_size=2", "--actor.num_ranks=2"]),
    ],
)
def test_models_with_experts_are_trained(load, hf_config, overrides):
    assert check_config(load(*overrides), hf_config) == []


@pytest.mark.parametrize(
    ("hf_config", "overrides", "words"),
    [
        (QWEN3_MOE, ["--expert_parallel_size=3", "--num_ranks=3"], "actor.expert_parallel_size (3) must divide num_experts (8)"),
        (QWEN3_MOE, ["--expert_tensor_parallel_size=5", "--num_ranks=5"], "must divide moe_intermediate_size (96)"),
        (MIXTRAL, ["--expert_tensor_parallel_size=3", "--num_ranks=3"], "must divide intermediate_size (512)"),
        (QWEN3_MOE, ["--expert_parallel_size=2"], "(1 x 2 x 1) must divide the actor's ranks (1)"),
        (QWEN3_MOE, ["--actor.tensor_parallel_size=2"], "actor.sequence_parallel must be true"),
        (DEEPSEEK, ["--expert_parallel_size=3", "--num_ranks=3"], "must divide num_experts (8)"),
        (DEEPSEEK | {"intermediate_size": 511, "first_k_dense_replace": 1}, SHARED_HEADS, "must divide intermediate_size (511)"),
        (
            QWEN3_MOE | {"moe_intermediate_size": 90},
            [SGLANG, "--rollout.engine.tensor_parallel_size=4"],
            "(4) must divide moe_inter",
        ),
        (DEEPSEEK, [SGLANG], "rollout.engine.type (sglang) must be hf for model_type (deepseek_v3)"),
        (QWEN3_MOE | {"decoder_sparse_step": 2, "intermediate_size": 511}, SHARED_HEADS, "must divide intermediate_size (511)"),
    ],
)
def test_layout_of_experts_follows_the_rules(load, hf_config, overrides, words):
    assert words in only_problem(load(*overrides), hf_config)


@pytest.mark.parametrize("name", ["expert_parallel_size", "expert_tensor_parallel_size"])
def test_a_dense_model_has_no_experts_to_share_out(load, name):
    assert f"actor.{name} (2) must be 1: " in only_problem(load(f"--actor.{name}=2"))


@pytest.mark.parametrize(
    "rope", [{"rope_parameters": {"rope_type": "llama3"}}, {"rope_parameters": None, "rope_scaling": {"type": "llama3"}}, {}]
)
def test_supported_rope_forms_of_old_and_new_files_pass(load, rope):
    assert check_config(load(), {**HF_CONFIG, **rope}) == []


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "lacks config.json"),
        ("tokenizer.json", "lacks a tokenizer"),
        ("model.safetensors", "lacks safetensors weights"),
    ],
)
def test_model_directory_must_be_complete(load, model, missing, words):
    (model / missing).unlink()
    assert words in only_problem(load())


def test_missing_model_directory_is_one_problem(load):
    config = load("--model.path=nowhere")
    (problem,) = check_config(config, None)
    assert problem.startswith("model.path (nowhere) must be an HF model directory")


def test_missing_weight_shards_are_counted(load, model):
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model-00001-of-00002.safetensors").write_text("")
    assert "lacks 1 of 2 weight files (model-00002-of-00002.safetensors first)" in only_problem(load())


def test_hub_names_are_not_looked_for_on_disk(load):
    assert check_config(load("--data.path=owner/name"), HF_CONFIG) == []


def test_run_folder_below_a_file_is_refused(load, tmp_path):
    (tmp_path / "file").write_text("")
    assert "must be a directory" in only_problem(load(f"--run.dir={tmp_path / 'file' / 'run'}"))


def test_existing_checkpoints_are_not_overwritten_by_a_fresh_start(load, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_000050").mkdir(parents=True)
    assert check_config(load(), HF_CONFIG) == []
    assert "checkpoint.resume is false" in only_problem(load("--checkpoint.resume=false"))


def test_checkpoint_to_load_must_be_complete(load, tmp_path):
    checkpoint = tmp_path / "other" / "checkpoints" / "step_000050"
    checkpoint.mkdir(parents=True)
    config = load(f"--checkpoint.load={checkpoint}")
    assert "holds no complete checkpoint" in only_problem(config)
    (checkpoint / "COMPLETE").write_text("{}")
    assert check_config(config, HF_CONFIG) == []


def test_pass_through_keys_are_checked_against_the_real_fields(load):
    fields = frozenset({"moe_router_topk", "tensor_model_parallel_size", "attention_softmax_in_fp32"})
    config = load("--actor.megatron_extra.atention_softmax_in_fp32=true")
    assert "did you mean attention_softmax_in_fp32?" in only_problem(config, fields=fields)
    owned = load("--actor.megatron_extra.tensor_model_parallel_size=2")
    assert "it is set by actor.tensor_parallel_size" in only_problem(owned, fields=fields)


def test_all_problems_come_together(load):
    config = load("--actor.virtual_pipeline_size=2", "--reward.type=custom", "--data.path=nowhere.jsonl")
    assert len(check_config(config, HF_CONFIG)) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "with a config.json"), ("{", "must be JSON"), ("[]", "must hold a JSON object, not list")],
)
def test_unreadable_hf_config_is_an_error(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="config.json") as caught:
        read_hf_config(tmp_path)
    assert words in str(caught.value)


def test_router_that_megatron_computes_otherwise_is_refused_before_anything_starts(load, model):
    from dapo_megatron.train import model_problem

    (problem,) = model_problem(load(), DEEPSEEK_V2_LITE | {"topk_method": "group_limited_greedy"})
    assert problem.startswith(f"{model} cannot be trained: topk_method ('group_limited_greedy') must be 'greedy'")
    assert model_problem(load(), DEEPSEEK_V2_LITE) == []
