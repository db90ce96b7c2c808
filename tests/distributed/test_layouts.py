"""Every layout computes what plain transformers computes: weights, log-probs, losses, gradients, norms, updated parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dapo_megatron.config.schema import AlgoConfig, Config
from dapo_megatron.types import TrainBatch, TrainSample
from tests.distributed import oracle, programs
from tests.distributed.batches import cut, random_samples
from tests.distributed.ranks import run_ranks
from tests.tiny_models import FAMILIES, make_hf_model

TOLERANCE = 1e-5
"""Relative, fp32; of a tensor relative to its largest element."""

OPTIMIZER = {"lr": 1e-3, "num_warmup_rollout_steps": 0, "weight_decay": 0.1, "clip_grad": 1.0}


@dataclass(frozen=True)
class Case:
    """A layout, and with it a model, a cut and a number of optimizer steps: cases cover all of them, not their product."""

    name: str
    layout: dict[str, Any]
    model: str = "llama"
    samples_per_micro_batch: int = 2
    num_updates: int = 3
    samples_per_update: int = 8


TP2, TP4 = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 4}
PP2, PP4 = {"pipeline_parallel_size": 2}, {"pipeline_parallel_size": 4}
SP, VPP2, FULL = {"sequence_parallel": True}, {"virtual_pipeline_size": 2}, {"recompute": "full"}
SELECTIVE, PLAIN_OPTIMIZER = {"recompute": "selective"}, {"use_distributed_optimizer": False}
FIRST1, LAST1 = {"num_layers_in_first_pipeline_stage": 1}, {"num_layers_in_last_pipeline_stage": 1}
FIRST2, FIRST4 = {"num_layers_in_first_pipeline_stage": 2}, {"num_layers_in_first_pipeline_stage": 4}
DP2, DP4 = {"num_ranks": 2}, {"num_ranks": 4}
CP2, CP4 = {"context_parallel_size": 2}, {"context_parallel_size": 4}
EP2, EP4, ETP2 = {"expert_parallel_size": 2}, {"expert_parallel_size": 4}, {"expert_tensor_parallel_size": 2}

CASES = (
    Case("one_rank", {}),
    Case("one_rank_nothing_packed", {}, "qwen2", samples_per_micro_batch=1, num_updates=1),
    Case("one_rank_all_packed", {}, "llama3_tied", samples_per_micro_batch=8),
    Case("one_rank_recompute", FULL, "qwen3", samples_per_micro_batch=3),
    Case("tp2", TP2, num_updates=1),
    Case("tp2_tied", TP2, "llama3_tied", samples_per_micro_batch=1),
    Case("tp2_padded_groups", {**TP2, "pad_query_groups": True}, "three_groups", samples_per_micro_batch=8),
    Case("tp2_selective_recompute", TP2 | SELECTIVE, samples_per_micro_batch=3),
    Case("tp2_sp", TP2 | SP, "qwen3", samples_per_micro_batch=1, num_updates=16, samples_per_update=4),
    Case("tp2_sp_biases", TP2 | SP, "qwen2", samples_per_micro_batch=3),
    Case("tp2_sp_full_recompute", TP2 | SP | FULL, "llama3_tied"),
    Case("tp4", TP4, "qwen3"),
    Case("pp2", PP2, "qwen3", samples_per_micro_batch=8, num_updates=1),
    Case("pp2_tied", PP2, "qwen2", samples_per_micro_batch=1),
    Case("pp4", PP4),
    Case("pp2_vpp2", PP2 | VPP2, "llama3_tied", num_updates=16, samples_per_update=4),
    Case("pp2_vpp2_full_recompute", PP2 | VPP2 | FULL),
    Case("pp2_first1", PP2 | FIRST1, "six_layers"),
    Case("pp2_last1", PP2 | LAST1, "six_layers", samples_per_micro_batch=1),
    Case("pp2_vpp2_first2", PP2 | VPP2 | FIRST2, "six_layers"),
    Case("pp4_first1_last1", PP4 | FIRST1 | LAST1, "six_layers"),
    Case("tp2_pp2", TP2 | PP2, "qwen2"),
    Case("tp2_pp2_first4", TP2 | PP2 | FIRST4, "six_layers", samples_per_micro_batch=3),
    Case("tp2_sp_pp2_vpp2", TP2 | SP | PP2 | VPP2, "qwen3"),
    Case("dp2", DP2, "qwen3", samples_per_micro_batch=1, num_updates=16, samples_per_update=4),
    Case("dp2_plain_optimizer", DP2 | PLAIN_OPTIMIZER, "qwen2"),
    Case("dp4", DP4),
    Case("tp2_sp_dp2", DP4 | TP2 | SP, "llama3_tied"),
    Case("cp2_tp2_plain_optimizer", CP2 | TP2 | PLAIN_OPTIMIZER, num_updates=1),
    Case("pp2_dp2", DP4 | PP2, "qwen2", samples_per_micro_batch=1),
    Case("pp2_vpp2_dp2", DP4 | PP2 | VPP2, "qwen3"),
    Case("cp2", CP2, "qwen3", samples_per_micro_batch=1, num_updates=1),
    Case("cp4_all_packed_full_recompute", CP4 | FULL, "qwen2", samples_per_micro_batch=8),
    Case("cp2_tp2_sp", CP2 | TP2 | SP, "llama3_tied", samples_per_micro_batch=3),
    Case("cp2_pp2_vpp2_first2_selective_recompute", CP2 | PP2 | VPP2 | FIRST2 | SELECTIVE, "six_layers", num_updates=1),
    Case("cp2_dp2", CP2 | DP4, "qwen2", num_updates=1),
    Case("latent_experts_cp2_tp2_sp_ep2", CP2 | TP2 | SP | EP2, "deepseek_v3", num_updates=1),
    Case("experts_ep2", DP2 | EP2, "qwen3_moe"),
    Case("experts_tp2_sp_etp2", TP2 | SP | ETP2, "qwen3_moe", num_updates=1),
    Case("experts_tp2_sp_dp2_ep4_recompute", DP4 | TP2 | SP | EP4 | FULL, "qwen3_moe", samples_per_micro_batch=1),
    Case("latent_tp2_sp_ep2", TP2 | SP | EP2, "deepseek_v3"),
    Case("experts_pp2_dp2_ep2_plain_optimizer", DP4 | PP2 | EP2 | PLAIN_OPTIMIZER, "qwen3_moe_some_dense"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`three_groups` has heads as in SmolLM2: 3 query groups of 3 heads, which 2 ranks do not divide."""
    folder = tmp_path_factory.mktemp("models")
    nine_heads = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}
    with_experts = ("qwen3_moe", "qwen3_moe_some_dense", "mixtral", "deepseek_v2", "deepseek_v3", "moonlight")
    return {family: make_hf_model(folder / family, family) for family in (*FAMILIES, *with_experts)} | {
        "six_layers": make_hf_model(folder / "six_layers", "qwen3", num_hidden_layers=6),
        "three_groups": make_hf_model(folder / "three_groups", "llama3_tied", **nine_heads),
    }


@cache
def samples_of(model: Path, count: int) -> tuple[TrainSample, ...]:
    """Every other one of older weights, its log-probs so far off that the loss clips on both sides."""
    rng = np.random.default_rng(1)
    reference = oracle.load(model)

    def drawn_with(sample: TrainSample) -> tuple[float, ...]:
        with torch.no_grad():
            now = oracle.sequence_log_probs(reference, sample).numpy()
        return tuple(np.minimum(now + rng.normal(scale=0.4, size=now.shape), 0.0).tolist())

    samples = random_samples(count)
    return tuple(
        replace(sample, rollout_log_probs=drawn_with(sample), on_policy=False) if index % 2 else sample
        for index, sample in enumerate(samples)
    )


@cache
def expected(model: Path, count: int, num_updates: int) -> oracle.OracleRun:
    batch = cut(list(samples_of(model, count)), num_ranks=1, samples_per_micro_batch=1, num_updates=num_updates)
    run = oracle.train(model, programs.make_config(model, optimizer=OPTIMIZER), batch)
    assert run.updates[0].num_clipped, "clipped tokens are part of what is compared"
    assert run.updates[0].grad_norm > OPTIMIZER["clip_grad"], "and so are clipped gradients"
    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_layout_agrees_with_transformers(models: dict[str, Path], case: Case):
    """From the HF directory into the ranks and back bit by bit, then training against the oracle.

    Loss, norm and gradients of the first update agree to TOLERANCE. Parameters cannot: Adam's step is lr * m / (sqrt(v) + eps), at
    first lr * sign(g), so an element whose gradient is rounding noise may go either way. They are compared in units of the way
    Adam can go, lr * updates: to 1e-2 in the quadratic mean of a tensor, and to twice all of it for a single element.
    Losses and norms of later updates see those parameters: 1e-4.
    """
    model, count = models[case.model], case.num_updates * case.samples_per_update
    config = programs.make_config(model, **case.layout, optimizer=OPTIMIZER)
    batch = cut(
        list(samples_of(model, count)),
        num_ranks=config.actor.data_parallel_size,
        samples_per_micro_batch=case.samples_per_micro_batch,
        num_updates=case.num_updates,
    )
    loaded, got = run_ranks(programs.load_and_replay, config.actor.world_size, config, batch)[0]
    want = expected(model, count, case.num_updates)

    before = oracle.per_expert(oracle.tensors(oracle.load(model)))
    assert loaded.keys() == got.gradients.keys() == got.weights.keys() == before.keys()
    for name, parameter in before.items():
        assert np.array_equal(loaded[name], parameter.detach().numpy()), name

    assert [update.num_loss_tokens for update in got.updates] == [update.num_loss_tokens for update in want.updates]
    for index, (update, reference) in enumerate(zip(got.updates, want.updates, strict=True)):
        tolerance = 1e-4 if index else TOLERANCE
        assert update.loss == pytest.approx(reference.loss, rel=tolerance, abs=tolerance / 10), index
        assert update.grad_norm == pytest.approx(reference.grad_norm, rel=tolerance), index
    way = OPTIMIZER["lr"] * case.num_updates
    for name, gradient in want.updates[0].gradients.items():
        assert np.abs(got.gradients[name] - gradient).max() <= TOLERANCE * np.abs(gradient).max(), name
        apart = np.abs(got.weights[name] - want.weights[name])
        assert np.sqrt((apart**2).mean()) <= 1e-2 * way, name
        assert apart.max() <= 2 * way, name


@pytest.mark.parametrize("layout", [TP2 | SP, PP2 | LAST1, DP2, CP2], ids=["tp2_sp", "pp2_last1", "dp2", "cp2"])
def test_log_probs_agree_with_transformers(models: dict[str, Path], layout: dict[str, Any]):
    """Each trained token's on one rank of its data-parallel copy, which says which one it is."""
    config = programs.make_config(models["qwen3"], **layout)
    batch = cut(random_samples(), num_ranks=config.actor.data_parallel_size, samples_per_micro_batch=2)
    reported = [copies for copies in run_ranks(programs.log_probs, 2, config, batch) if copies is not None]
    reference = oracle.load(models["qwen3"])
    for copy, micro_batches in enumerate(batch.optimizer_steps[0].micro_batches):
        parts = reported if layout == CP2 else [reported[copy]]
        for index, samples in enumerate(micro_batches):
            trained, log_probs = (np.concatenate(column) for column in zip(*(part[index] for part in parts), strict=True))
            with torch.no_grad():
                wanted = torch.cat([oracle.sequence_log_probs(reference, sample) for sample in samples])
            assert sorted(trained) == list(range(len(wanted)))
            np.testing.assert_allclose(log_probs, wanted.numpy()[trained], atol=1e-4)


def places_in_sequences(rank: int, init_method: str, lengths: list[int], size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """By context-parallel rank, of packed tokens: their positions in ours, and the rows of angles that megatron-core gives them."""
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

    from dapo_megatron.models.context_parallel import ContextShare, pack_context_parallel

    rows = torch.arange(max(lengths))
    found = []
    for of_rank in range(size):
        pack = pack_context_parallel(np.array(lengths), ContextShare(of_rank, size), torch.device("cpu"))
        theirs = [_get_thd_freqs_on_this_cp_rank(of_rank, size, torch.empty(length // size), rows) for length in lengths]
        assert pack.positions is not None
        found.append((pack.positions.numpy(), torch.cat(theirs).numpy()))
    return found


def test_context_parallel_ranks_have_the_positions_that_megatron_core_rotates_by():
    (found,) = run_ranks(places_in_sequences, 1, [24, 8, 40, 8], 4)
    assert len(found) == 4
    for ours, theirs in found:
        assert ours.tolist() == theirs.tolist()


def packs_of_two_ranks(rank: int, init_method: str, samples: tuple[TrainSample, ...]) -> list[tuple[Any, ...]]:
    """What TransformerEngine's kernels are told on each of two context-parallel ranks, and the places in the pack that a rank has."""
    from dapo_megatron.actor.micro_batch import to_tensors
    from dapo_megatron.models.context_parallel import ContextShare

    told = []
    for of_rank in range(2):
        share = ContextShare(of_rank, 2)
        batch = to_tensors(
            samples, device=torch.device("cpu"), implementation="transformer_engine", pad_to_multiple=8, context=share
        )
        packed = batch.packed
        bounds = [packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded]
        lengths = np.diff(packed.cu_seqlens_q.numpy())
        columns = [x.numpy() for x in (batch.input_ids[0], batch.rows, batch.targets, batch.trained)]
        numbers = [x.tolist() for x in bounds], packed.max_seqlen_q, packed.max_seqlen_kv, packed.pad_between_seqs
        told.append((numbers, columns, share.places(lengths)))
    return told


def test_transformer_engine_is_told_whole_padded_sequences():
    """Of 5, 2 and 9 packed tokens, padded to multiples of 4, and padding of its own behind them; each rank has half of each."""
    rng = np.random.default_rng(0)
    samples = tuple(
        TrainSample(rng.integers(1, 99, prompt + response), prompt, np.zeros(response, np.float32), 1.0, 1.0)
        for prompt, response in ((3, 3), (2, 1), (1, 9))
    )
    (told,) = run_ranks(packs_of_two_ranks, 1, samples)
    whole, trained = np.full(24, -1), {}
    for numbers, (input_ids, rows, targets, tokens), places in told:
        assert numbers == ([[0, 8, 12, 24]] * 4, 12, 12, False)
        assert len(input_ids) == 12
        whole[places] = input_ids
        trained |= dict(zip(tokens.tolist(), zip(places[rows].tolist(), targets.tolist(), strict=True), strict=True))
    assert whole.tolist() == [
        token
        for sample, padding in zip(samples, (3, 2, 3), strict=True)
        for token in (*sample.token_ids[:-1].tolist(), *[0] * padding)
    ]
    predicting = [2, 3, 4, 9, *range(12, 21)]
    targets = [token for sample in samples for token in sample.token_ids[sample.num_prompt_tokens :].tolist()]
    assert [trained[token] for token in range(13)] == list(zip(predicting, targets, strict=True))


@pytest.mark.parametrize("layout", [TP2 | SP, PP2 | VPP2], ids=["tp2_sp", "pp2_vpp2"])
def test_truncated_importance_sampling_agrees_with_transformers(models: dict[str, Path], layout: dict[str, Any]):
    """Tokens drawn by policies around the actor's: every token has a weight, and some weights are cut."""
    samples = [sample for sample in samples_of(models["qwen3"], 24) if not sample.on_policy]
    batch = cut(samples, num_ranks=1, samples_per_micro_batch=2, num_updates=3)
    plain = programs.make_config(models["qwen3"], **layout, optimizer=OPTIMIZER)
    config = plain.model_copy(update={"algo": AlgoConfig(tis_clip=1.2)})
    _, got = run_ranks(programs.load_and_replay, 2, config, batch)[0]
    want, uncorrected = (oracle.train(models["qwen3"], one, batch).updates for one in (config, plain))
    assert want[0].grad_norm != pytest.approx(uncorrected[0].grad_norm, rel=0.01)
    for index, (update, reference) in enumerate(zip(got.updates, want, strict=True)):
        tolerance = 1e-4 if index else TOLERANCE
        assert update.loss == pytest.approx(reference.loss, rel=tolerance, abs=tolerance / 10), index
        assert update.grad_norm == pytest.approx(reference.grad_norm, rel=tolerance), index
    for name, gradient in want[0].gradients.items():
        assert np.abs(got.gradients[name] - gradient).max() <= TOLERANCE * np.abs(gradient).max(), name


@pytest.mark.parametrize("layout", [TP2 | SP, PP2], ids=["tp2_sp", "pp2"])
def test_bf16_follows_the_fp32_gradient(models: dict[str, Path], layout: dict[str, Any]):
    batch = cut(random_samples(), num_ranks=1, samples_per_micro_batch=4)  # on-policy: no clip that rounding could decide
    config = programs.make_config(models["qwen2"], "bf16", **layout, optimizer=OPTIMIZER)
    _, got = run_ranks(programs.load_and_replay, 2, config, batch)[0]
    for name, gradient in oracle.train(models["qwen2"], config, batch).updates[0].gradients.items():
        cosine = (got.gradients[name] * gradient).sum() / (np.linalg.norm(got.gradients[name]) * np.linalg.norm(gradient))
        assert cosine > 0.99, name
    assert all(np.isfinite(weights).all() for weights in got.weights.values())


def train(rank: int, init_method: str, config: Config, batch: TrainBatch) -> dict[str, float]:
    from dapo_megatron.actor.worker import ActorWorker

    return ActorWorker(config, rank=rank, init_method=init_method).train(batch, rollout_step=0)


@pytest.mark.parametrize("layout", [CP2 | TP2, PP2 | VPP2], ids=["cp2_tp2", "pp2_vpp2"])
def test_later_updates_keep_the_log_probs_of_the_weights_that_sampled(models: dict[str, Path], layout: dict[str, Any]):
    """Old log-probs are taken before the first update, so only the ratio moves, and the engine's values stay the yardstick."""
    reference = oracle.load(models["qwen3"])
    with torch.no_grad():
        samples = [
            replace(s, rollout_log_probs=tuple(oracle.sequence_log_probs(reference, s).tolist())) for s in random_samples(12)
        ]
    batch = cut(samples, num_ranks=1, samples_per_micro_batch=2, num_updates=3)
    config = programs.make_config(models["qwen3"], **layout, optimizer={**OPTIMIZER, "lr": 1e-2, "clip_grad": 0.0})
    metrics = run_ranks(train, config.actor.world_size, config, batch)
    assert all(row == metrics[0] for row in metrics), "all ranks report the same numbers"
    assert metrics[0]["actor/num_optimizer_steps"] == 3
    assert metrics[0]["actor/ratio_max"] > 1.05
    assert metrics[0]["actor/log_prob_diff_max"] < 1e-4


def test_an_empty_micro_batch_changes_nothing(models: dict[str, Path]):
    batch = cut(random_samples(), num_ranks=1, samples_per_micro_batch=4)
    (step,) = batch.optimizer_steps
    padded = TrainBatch((replace(step, micro_batches=(((*step.micro_batches[0], ())),)),))
    config = programs.make_config(models["llama"], **CP2, **TP2, **SP)
    plain, with_empty = (run_ranks(train, 4, config, cuts)[0] for cuts in (batch, padded))
    assert with_empty == plain
