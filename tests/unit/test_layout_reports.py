"""Layouts as settings and back, what --explain means, and how a plan is told on a terminal."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from dapo_megatron.config.checks import check_layout
from dapo_megatron.config.load import load_config
from dapo_megatron.config.schema import Config
from dapo_megatron.layout.explain import matching, parse_sizes
from dapo_megatron.layout.from_config import fit_problem, gpu_of, layout_of, request_of, workload_of
from dapo_megatron.layout.hardware import gpu_named
from dapo_megatron.layout.layout import EmbeddedEngine, EngineLayout, Layout, Recompute
from dapo_megatron.layout.memory import plan_memory
from dapo_megatron.layout.plan import Candidate, PlanRequest
from dapo_megatron.layout.report import print_plan
from dapo_megatron.layout.report_figures import wrapped
from dapo_megatron.layout.report_yaml import actor_overrides, settings_of, yaml_of
from dapo_megatron.layout.search import evaluate, memory_options, plan
from dapo_megatron.train import check_fit
from dapo_megatron.types import ConfigError
from tests.published_configs import QWEN2_5_32B

BASE = {"model": {"path": "m"}, "data": {"path": "d", "max_prompt_tokens": 2048}}
LAYOUTS = [
    Layout(),
    Layout(tensor_parallel_size=8, data_parallel_size=2, sequence_parallel=True, max_tokens_per_micro_batch=24576),
    Layout(pipeline_parallel_size=4, virtual_pipeline_size=2, data_parallel_size=3, recompute=Recompute("full")),
    Layout(pipeline_parallel_size=2, num_layers_in_first_pipeline_stage=33, num_layers_in_last_pipeline_stage=31),
    Layout(expert_parallel_size=4, data_parallel_size=4, recompute=Recompute("selective", frozenset({"core_attn"}))),
    Layout(recompute=Recompute("selective", frozenset({"layernorm", "mlp"})), use_distributed_optimizer=False),
    Layout(recompute=Recompute("full", method="block", num_layers=3), log_prob_chunk_tokens=512),
    Layout(data_parallel_size=8, swap_optimizer=True, swap_parameters=True, engine=EngineLayout(4, 2, 0.8)),
    Layout(data_parallel_size=8, engine=EngineLayout(2, 4, 0.9, colocated=False)),
]


def request(gpu: str = "h100-80") -> PlanRequest:
    return replace(request_of(config_of({}), QWEN2_5_32B, gpu_named(gpu)), num_gpus=64)


def config_of(tree: dict[str, Any]) -> Config:
    return Config.model_validate(BASE | tree)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_comes_back_from_the_settings_written_for_it(layout: Layout, tmp_path: Path):
    base, file = tmp_path / "base.yaml", tmp_path / "layout.yaml"
    other = {"recompute": "full", "offload": True, "pipeline_parallel_size": 16, "context_parallel_size": 16}
    base.write_text(yaml.safe_dump(BASE | {"actor": other}))
    file.write_text(yaml_of(layout, request(), comments=("a layout",)))
    found = layout_of(load_config([base, file]))
    embedded = None if layout.engine else found.embedded  # the engine of a run that says nothing of engines
    assert replace(found, num_micro_batches=1) == replace(layout, embedded=embedded)
    assert layout_of(load_config([base], actor_overrides(layout))).tensor_parallel_size == layout.tensor_parallel_size


@pytest.mark.parametrize("placement", ["colocated", "split"])
def test_run_with_the_settings_of_a_planned_layout_is_planned_as_that_layout(tmp_path: Path, placement: str):
    engine = {"num_engines": 4, "engine": {"type": "sglang", "tensor_parallel_size": 4}}
    tree = BASE | {"actor": {"num_ranks": 16}, "rollout": engine, "cluster": {"placement": placement}}
    base, file = tmp_path / "base.yaml", tmp_path / "layout.yaml"
    base.write_text(yaml.safe_dump(tree))
    asked = request_of(load_config([base]), QWEN2_5_32B, gpu_named("h200"))
    found = plan(asked)
    assert found.candidates
    for candidate in found.candidates[:: len(found.candidates) // 12 or 1]:
        file.write_text(yaml_of(candidate.layout, asked))
        config = load_config([base, file])
        assert check_layout(config, QWEN2_5_32B) == []
        assert layout_of(config) == candidate.layout
        again = evaluate(request_of(config, QWEN2_5_32B, asked.gpu), layout_of(config))
        assert isinstance(again, Candidate) and again.memory == candidate.memory and again.time == candidate.time


def test_number_of_micro_batches_is_that_of_mean_lengths():
    config = config_of(
        {"actor": {"num_ranks": 4, "max_tokens_per_micro_batch": 32768}, "rollout": {"max_response_tokens": 18432}}
    )
    tokens = 512 * 16 / 16 * (2048 / 4 + 18432 / 3)
    assert layout_of(config).num_micro_batches >= tokens / (4 * 32768)


def test_workload_is_the_runs_own():
    config = config_of(
        {"train": {"num_prompts_per_step": 64, "rollout_lag": 1}, "algo": {"dynamic_sampling": False, "old_log_probs": "engine"}}
    )
    workload = workload_of(config)
    assert (workload.num_prompts_per_step, workload.max_prompt_tokens, workload.rollout_lag) == (64, 2048, 1)
    assert workload.over_sampling == 1 and not workload.has_old_log_probs_pass


def test_engines_that_run_elsewhere_take_no_gpus():
    engine = {"type": "sglang", "engine_urls": ["http://a:1"]}
    config = config_of({"rollout": {"engine": engine}, "cluster": {"placement": "split"}})
    assert layout_of(config).engine is None
    assert request_of(config, QWEN2_5_32B, gpu_named("h200")).num_gpus == 1


def test_split_engines_come_on_top_of_the_actors_gpus():
    tree = {
        "rollout": {"engine": {"type": "sglang", "tensor_parallel_size": 4}, "num_engines": 2},
        "cluster": {"placement": "split"},
    }
    asked = request_of(config_of(tree | {"actor": {"num_ranks": 8}}), QWEN2_5_32B, gpu_named("h200"))
    assert (asked.num_gpus, asked.num_rollout_gpus, asked.num_actor_gpus) == (16, 8, 8)


def test_run_that_does_not_fit_is_named_with_numbers():
    problem = fit_problem(config_of({"cluster": {"gpu": "h100-80"}, "actor": {"num_ranks": 8}}), QWEN2_5_32B)
    assert problem is not None and problem.startswith("this run will not fit on h100-80: ") and "of 85.5 GB" in problem


def test_run_that_fits_or_whose_gpu_is_unknown_is_not():
    fits = {
        "num_ranks": 64,
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 2,
        "sequence_parallel": True,
        "recompute": "full",
    }
    tree = {"cluster": {"gpu": "h200"}, "actor": fits | {"max_tokens_per_micro_batch": 24576}}
    servers = {"engine": {"type": "sglang", "tensor_parallel_size": 8, "mem_fraction_static": 0.5}, "num_engines": 8}
    assert fit_problem(config_of(tree | {"rollout": servers}), QWEN2_5_32B) is None
    assert fit_problem(config_of({}), QWEN2_5_32B) is None


@pytest.mark.parametrize(
    "placement, where", [("colocated", r"stage 1 needs .* in rollout"), ("split", "an engine's GPU needs .* in rollout")]
)
def test_embedded_engine_that_does_not_fit_beside_the_actor_or_alone_is_named(placement: str, where: str):
    actor = {
        "num_ranks": 64,
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 2,
        "sequence_parallel": True,
        "recompute": "full",
    }
    tree = {"cluster": {"gpu": "h200", "placement": placement}, "actor": actor | {"max_tokens_per_micro_batch": 24576}}
    problem = fit_problem(config_of(tree), QWEN2_5_32B)
    assert problem is not None and re.search(where, problem) and "engine weights 131.1" in problem
    assert "a smaller rollout.engine.max_batch_size, or dtype bf16" in problem and "or rollout.engine.type sglang" in problem
    assert ("cluster.placement split" in problem) == (placement == "colocated")


def test_rows_of_an_embedded_engine_are_those_that_a_step_can_fill():
    tree = {
        "rollout": {
            "engine": {"type": "hf", "max_batch_size": 64, "dtype": "bf16"},
            "num_engines": 2,
            "max_response_tokens": 1024,
        }
    }
    batch = {"train": {"num_prompts_per_step": 8, "num_samples_per_prompt": 8}, "algo": {"dynamic_sampling": False}}
    few, many = layout_of(config_of(tree | batch)).embedded, layout_of(config_of(tree)).embedded
    assert few == EmbeddedEngine(2, 32, 2048 + 1024, 2, colocated=True, has_own_process=True)
    assert many is not None and many.num_rows == 64
    evaluated = layout_of(config_of(tree | batch | {"eval": {"path": "held_out"}})).embedded
    assert evaluated is not None and evaluated.num_rows == 64
    assert layout_of(config_of({"rollout": {"engine": {"type": "sglang"}}})).embedded is None


def test_weights_and_activations_in_fp32_take_their_bytes():
    layout = {
        "num_ranks": 64,
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 2,
        "sequence_parallel": True,
        "recompute": "full",
    }
    tree = {"actor": layout, "rollout": {"engine": {"type": "sglang", "tensor_parallel_size": 8}, "num_engines": 8}}

    def planned(dtype: str) -> tuple[dict[str, int], tuple[str, ...]]:
        asked = replace(
            request_of(config_of(tree | {"model": {"path": "m", "dtype": dtype}}), QWEN2_5_32B, gpu_named("h200")), top=1
        )
        stage = plan_memory(asked.model, layout_of(config_of(tree)), asked.gpu.memory_bytes, memory_options(asked)).stages[0]
        items = {item.name: item.num_bytes for item in stage.phases[0].items}
        return items, plan(asked, only=lambda cut: cut.tensor_parallel_size == 8).notes

    (bf16, plain), (fp32, notes) = planned("bf16"), planned("fp32")
    assert fp32["weights"] == 2 * bf16["weights"] and fp32["gradients"] == bf16["gradients"]
    assert fp32["activations: layer inputs"] == 2 * bf16["activations: layer inputs"]
    assert fp32["optimizer state"] == pytest.approx(bf16["optimizer state"] * 2 / 3)
    assert not any("fp32" in note for note in plain) and any(note.startswith("fp32 is counted in memory") for note in notes)


def test_unknown_gpu_of_a_configuration_is_called_by_its_setting():
    with pytest.raises(ConfigError, match=r"^cluster\.gpu \(h10-80\) must be one of .* did you mean h100-80"):
        fit_problem(config_of({"cluster": {"gpu": "h10-80"}}), QWEN2_5_32B)


OWN_GPUS = """
tiny: &tiny
  name: Tiny card
  memory_mib: 16384
  hbm_gb_per_second: 500
  bf16_tflops: 60
  nvlink_gb_per_second: 30
  internode_gb_per_second: 3
  pcie_gb_per_second: 15
  source: made up
"""


def test_gpu_of_a_file_stands_in_a_configuration(tmp_path: Path):
    file = tmp_path / "gpus.yaml"
    file.write_text(OWN_GPUS)
    named, alone = (config_of({"cluster": cluster | {"gpu_file": file}}) for cluster in ({"gpu": "Tiny"}, {}))
    for config, words in ((named, "on Tiny: "), (alone, "on Tiny card: ")):
        gpu = gpu_of(config)
        assert gpu is not None and gpu.memory_mib == 16384
        problem = fit_problem(config, QWEN2_5_32B)
        assert problem is not None and words in problem and "of 17.2 GB" in problem
    other = gpu_of(config_of({"cluster": {"gpu": "h200", "gpu_file": file}}))
    assert other is not None and other.memory_mib == 143771
    asked = gpu_of(named)
    assert asked is not None
    cluster = settings_of(LAYOUTS[0], request_of(named, QWEN2_5_32B, asked))["cluster"]
    assert (cluster["gpu"], cluster["gpu_file"]) == ("tiny", str(file))


def test_gpu_of_a_command_line_wins_over_that_of_the_configuration(tmp_path: Path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(OWN_GPUS)
    two.write_text(OWN_GPUS + OWN_GPUS.replace("tiny", "other").replace("Tiny", "Other"))
    config = config_of({"cluster": {"gpu": "other", "gpu_file": two}})

    def name_of(*arguments: Any) -> str | None:
        gpu = gpu_of(*arguments)
        return gpu and gpu.name

    assert name_of(config) == "Other card"
    assert name_of(config, "tiny") == "Tiny card" and name_of(config, "h200") == "H200 SXM 141 GB"
    assert (
        name_of(config, None, one) == "Tiny card" and name_of(config_of({"cluster": {"gpu": "h200"}}), None, one) == "Tiny card"
    )
    assert name_of(None, None, one) == "Tiny card" and name_of(None, None, two) is None and name_of(None) is None


def test_narrow_terminal_gets_a_table_that_it_can_show():
    found = plan(replace(request(), num_gpus=64))
    for width, columns in ((80, ("layout", "recompute", "train GB", "step s")), (120, ("engines", "rollout", "tok/s", "MFU"))):
        console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
        print_plan(found, 5, console)
        lines = console.export_text().splitlines()
        header = next(line for line in lines if "train GB" in line)
        assert all(name in header for name in columns) and max(map(len, lines)) <= width
        assert any(line.startswith(" 1  ") for line in lines)
    assert "MFU" in header


@pytest.mark.parametrize(
    "more, cluster, words",
    [
        ("", {"gpu": "tyny"}, r"^cluster\.gpu \(tyny\) must be one of .*named by cluster\.gpu_file; did you mean tiny"),
        ("other: *tiny\n", {}, r"cluster\.gpu is missing: cluster\.gpu_file \(.*gpus\.yaml\) has tiny, other; name one\."),
        ("third: 3\n", {"gpu": "tiny"}, "third in .* must map fields to values"),
    ],
)
def test_gpu_file_of_a_configuration_that_cannot_be_used_is_refused_in_words(tmp_path: Path, more, cluster, words):
    file = tmp_path / "gpus.yaml"
    file.write_text(OWN_GPUS + more)
    with pytest.raises(ConfigError, match=words):
        fit_problem(config_of({"cluster": cluster | {"gpu_file": file}}), QWEN2_5_32B)


def test_check_warns_of_a_run_that_will_not_fit_and_refuses_it_when_strict(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5_32B))
    config = config_of({"model": {"path": tmp_path}, "cluster": {"gpu": "h100-80"}})
    console = Console(record=True, width=400, file=io.StringIO())
    check_fit(config, console, strict=False)
    assert console.export_text().startswith("warning: this run will not fit on h100-80: ")
    with pytest.raises(ConfigError, match="this run will not fit on h100-80"):
        check_fit(config, console, strict=True)


def test_explained_sizes_pick_layouts():
    layout = LAYOUTS[2]
    assert matching(layout, parse_sizes("pp=4, vpp=2,dp=3,recompute=full"))
    assert not matching(layout, parse_sizes("pp=4,tp=2"))
    assert matching(LAYOUTS[7], parse_sizes("engine_tp=4")) and matching(layout, parse_sizes("engine_tp=none"))


def test_hover_texts_are_broken_into_lines():
    assert wrapped("aa bb cc", width=6) == "aa bb<br>cc"
