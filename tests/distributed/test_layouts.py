"""Every layout computes what plain transformers computes: weights, log-probs, loss, gradients, grad norm, updated weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dapo_megatron.config.schema import Config
from dapo_megatron.types import TrainBatch
from tests.distributed import oracle, programs
from tests.distributed.batches import cut, random_samples
from tests.distributed.ranks import run_ranks
from tests.tiny_models import FAMILIES, make_hf_model

TOLERANCE = 1e-5
"""Relative to the largest element of a tensor, fp32."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "one_rank": {},
    "tp2": {"tensor_parallel_size": 2},
    "tp4": {"tensor_parallel_size": 4},
    "pp2": {"pipeline_parallel_size": 2},
    "pp4": {"pipeline_parallel_size": 4},
    "pp2_vpp2": {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2},
    "tp2_pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "dp2": {"num_ranks": 2},
    "tp2_sp": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "tp2_selective_recompute": {"tensor_parallel_size": 2, "recompute": "selective"},
    "tp2_sp_full_recompute": {"tensor_parallel_size": 2, "sequence_parallel": True, "recompute": "full"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: make_hf_model(folder / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def three_groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads as in SmolLM2: 3 query groups of 3 heads, which 2 ranks do not divide."""
    return make_hf_model(
        tmp_path_factory.mktemp("three_groups") / "model",
        "llama3_tied",
        hidden_size=72,
        num_attention_heads=9,
        num_key_value_heads=3,
    )


def run_first_step(model: Path, layout: dict[str, Any], batch: TrainBatch, **options: Any) -> list[dict[str, Any]]:
    config = programs.make_config(model, **layout, **options)
    return run_ranks(programs.first_step, config.actor.world_size, config, batch)


def assert_matches_oracle(model: Path, layout: dict[str, Any], samples_per_micro_batch: int = 2) -> None:
    num_ranks = programs.make_config(model, **layout).actor.data_parallel_size
    batch = cut(random_samples(), num_ranks=num_ranks, samples_per_micro_batch=samples_per_micro_batch)
    results = run_first_step(model, layout, batch, use_distributed_optimizer=False)
    reference = oracle.load(model)
    loss, gradients = oracle.first_step_gradients(reference, batch)

    statistics = results[0]["statistics"]
    assert statistics.num_loss_tokens == batch.optimizer_steps[0].num_loss_tokens
    assert statistics.loss_sum / statistics.num_loss_tokens == pytest.approx(loss, rel=TOLERANCE)
    assert all(result["statistics"] == statistics for result in results), "all ranks report the same numbers"
    norm = np.sqrt(sum((gradient.astype(np.float64) ** 2).sum() for gradient in gradients.values()))
    assert results[0]["grad_norm"] == pytest.approx(norm, rel=TOLERANCE)
    assert results[0]["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        difference = np.abs(results[0]["gradients"][name] - gradient).max()
        assert difference <= TOLERANCE * np.abs(gradient).max(), name
    assert_log_probs_match(reference, batch, results)


def assert_log_probs_match(reference: torch.nn.Module, batch: TrainBatch, results: list[dict[str, Any]]) -> None:
    """One rank per data-parallel copy reports log-probs, in the order of the copies."""
    reported = [result["log_probs"] for result in results if result["log_probs"] is not None]
    for micro_batches, log_probs in zip(batch.optimizer_steps[0].micro_batches, reported, strict=True):
        for samples, values in zip(micro_batches, log_probs, strict=True):
            with torch.no_grad():
                expected = torch.cat([oracle.sequence_log_probs(reference, sample) for sample in samples])
            np.testing.assert_allclose(values, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_agrees_with_transformers(models: dict[str, Path], layout: dict[str, Any]):
    assert_matches_oracle(models["llama"], layout)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
@pytest.mark.parametrize("layout", ["tp2_sp", "tp2_pp2"])
def test_every_family_agrees_with_transformers(models: dict[str, Path], family: str, layout: str):
    assert_matches_oracle(models[family], LAYOUTS[layout])


@pytest.mark.parametrize("samples_per_micro_batch", [1, 3, 8])
def test_any_cut_into_micro_batches_gives_the_same_gradient(models: dict[str, Path], samples_per_micro_batch: int):
    assert_matches_oracle(models["qwen2"], LAYOUTS["one_rank"], samples_per_micro_batch)


def test_query_groups_that_the_ranks_do_not_divide_are_padded_without_effect(three_groups: Path):
    assert_matches_oracle(three_groups, {"tensor_parallel_size": 2, "pad_query_groups": True})


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2"])
def test_bf16_follows_the_fp32_gradient(models: dict[str, Path], layout: str):
    batch = cut(random_samples(), num_ranks=1, samples_per_micro_batch=4)
    result = run_first_step(models["qwen2"], LAYOUTS[layout], batch, dtype="bf16", use_distributed_optimizer=False)[0]
    _, gradients = oracle.first_step_gradients(oracle.load(models["qwen2"]), batch)
    for name, expected in gradients.items():
        got = result["gradients"][name]
        cosine = (got * expected).sum() / (np.linalg.norm(got) * np.linalg.norm(expected))
        assert cosine > 0.99, name
    moved = result["weights_after"]["model.norm.weight"]
    assert np.isfinite(moved).all()


def several_updates(rank: int, init_method: str, config: Config, batch: TrainBatch) -> dict[str, float]:
    from dapo_megatron.actor.worker import ActorWorker

    return ActorWorker(config, rank=rank, init_method=init_method).train(batch, rollout_step=0)


@pytest.mark.parametrize("layout", ["tp2", "pp2_vpp2"])
def test_later_updates_keep_the_log_probs_of_the_weights_that_sampled(models: dict[str, Path], layout: str):
    """Old log-probs are taken before the first update, so only the ratio moves, and the engine's values stay the yardstick."""
    samples = random_samples(12)
    reference = oracle.load(models["qwen3"])
    with torch.no_grad():
        samples = [replace(s, rollout_log_probs=tuple(oracle.sequence_log_probs(reference, s).tolist())) for s in samples]
    steps = tuple(
        cut(samples[i : i + 4], num_ranks=1, samples_per_micro_batch=2).optimizer_steps[0] for i in range(0, len(samples), 4)
    )
    config = programs.make_config(
        models["qwen3"], **LAYOUTS[layout], optimizer={"lr": 1e-2, "num_warmup_rollout_steps": 0, "clip_grad": 0.0}
    )
    metrics = run_ranks(several_updates, 2, config, TrainBatch(steps))
    assert metrics[0] == metrics[1]
    assert metrics[0]["actor/num_optimizer_steps"] == 3
    assert metrics[0]["actor/ratio_max"] > 1.05
    assert metrics[0]["actor/log_prob_diff_max"] < 1e-4


def test_an_empty_micro_batch_changes_nothing(models: dict[str, Path]):
    batch = cut(random_samples(), num_ranks=1, samples_per_micro_batch=4)
    (step,) = batch.optimizer_steps
    padded = TrainBatch((replace(step, micro_batches=(((*step.micro_batches[0], ())),)),))
    plain, with_empty = (run_first_step(models["llama"], LAYOUTS["tp2_sp"], b) for b in (batch, padded))
    assert with_empty[0]["grad_norm"] == plain[0]["grad_norm"]
    assert with_empty[0]["statistics"] == plain[0]["statistics"]


@pytest.mark.parametrize("layout", ["dp2", "tp2_pp2"])
def test_the_distributed_optimizer_takes_the_same_step(models: dict[str, Path], layout: str):
    num_ranks = 2 if layout == "dp2" else 1
    batch = cut(random_samples(), num_ranks=num_ranks, samples_per_micro_batch=2)
    whole, sharded = (
        run_first_step(models["qwen3"], LAYOUTS[layout], batch, use_distributed_optimizer=flag)[0] for flag in (False, True)
    )
    assert sharded["grad_norm"] == pytest.approx(whole["grad_norm"], rel=TOLERANCE)
    for name, value in whole["weights_after"].items():
        np.testing.assert_allclose(sharded["weights_after"][name], value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_weights_come_back_bit_equal_from_every_layout(models: dict[str, Path], layout: dict[str, Any]):
    for family in ("llama3_tied", "qwen3") if layout else FAMILIES:
        config = programs.make_config(models[family], **layout)
        sent = run_ranks(programs.round_trip, config.actor.world_size, config, 5000)[0]
        reference = dict(oracle.load(models[family]).named_parameters())
        assert sent.keys() == reference.keys()
        for name, parameter in reference.items():
            assert np.array_equal(sent[name], parameter.detach().numpy()), name


def test_padded_query_groups_come_back_bit_equal(three_groups: Path):
    config = programs.make_config(three_groups, tensor_parallel_size=2, pad_query_groups=True)
    sent = run_ranks(programs.round_trip, 2, config, 5000)[0]
    for name, parameter in oracle.load(three_groups).named_parameters():
        assert np.array_equal(sent[name], parameter.detach().numpy()), name
