"""Checkpoints: training goes on bit by bit under the same layout, and loads under another."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dapo_megatron.config.schema import Config
from dapo_megatron.types import TrainBatch
from tests.distributed import programs
from tests.distributed.batches import cut, random_samples
from tests.distributed.ranks import run_ranks
from tests.tiny_models import make_hf_model


def train_save_train(rank: int, init_method: str, config: Config, batches: list[TrainBatch], folder: Path) -> dict[str, Any]:
    """Two steps, save, one step more: its metrics and the weights after it."""
    from dapo_megatron.actor.worker import ActorWorker

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    for step, batch in enumerate(batches[:2]):
        worker.train(batch, step)
    worker.start_save(folder)
    trained = worker.train(batches[2], 2)  # while the files are written
    worker.finish_save()
    return {"metrics": trained, "weights": programs.received(worker.mapping, list(worker.send_weights(3)))}


def load_train(rank: int, init_method: str, config: Config, batch: TrainBatch, folder: Path) -> dict[str, Any]:
    """Load, then the step that the other program took last."""
    from dapo_megatron.actor.worker import ActorWorker

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    worker.load(folder, {})
    return {"metrics": worker.train(batch, 2), "weights": programs.received(worker.mapping, list(worker.send_weights(3)))}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings: the hardest case under pipeline parallelism."""
    return make_hf_model(tmp_path_factory.mktemp("model") / "llama3_tied", "llama3_tied")


def batches(num_ranks: int) -> list[TrainBatch]:
    return [cut(random_samples(seed=seed), num_ranks=num_ranks, samples_per_micro_batch=2) for seed in range(3)]


def config_for(model: Path, **layout: Any) -> Config:
    return programs.make_config(model, **layout, optimizer={"lr": 1e-2, "num_warmup_rollout_steps": 1})


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_parallel_size": 2},
        {"num_ranks": 2},
        {"num_ranks": 2, "use_distributed_optimizer": False},
        {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2},
        {"pipeline_parallel_size": 2, "num_ranks": 4},
        {"pipeline_parallel_size": 2, "use_distributed_optimizer": False},
        {"context_parallel_size": 2},
    ],
    ids=["tp2", "dp2", "dp2_plain_optimizer", "pp2_vpp2", "pp2_dp2", "pp2_plain_optimizer", "cp2"],
)
def test_a_loaded_checkpoint_goes_on_bit_by_bit(model: Path, tmp_path: Path, layout: dict[str, Any]):
    config = config_for(model, **layout)
    data = batches(config.actor.data_parallel_size)
    went_on = run_ranks(train_save_train, config.actor.world_size, config, data, tmp_path)[0]
    loaded = run_ranks(load_train, config.actor.world_size, config, data[2], tmp_path)[0]
    assert loaded["metrics"] == went_on["metrics"]
    for name, value in went_on["weights"].items():
        assert np.array_equal(loaded["weights"][name], value), name


@pytest.mark.parametrize(
    ("saved", "read"),
    [
        ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}),
        ({"tensor_parallel_size": 2, "context_parallel_size": 2}, {"tensor_parallel_size": 4}),
        ({"pipeline_parallel_size": 2, "virtual_pipeline_size": 2}, {}),
        ({"pipeline_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}, {"pipeline_parallel_size": 2}),
        ({"pipeline_parallel_size": 2, "num_ranks": 4}, {"tensor_parallel_size": 2}),
        (
            {"pipeline_parallel_size": 2, "use_distributed_optimizer": False},
            {"tensor_parallel_size": 2, "use_distributed_optimizer": False},
        ),
        ({"num_ranks": 2}, {"context_parallel_size": 2}),
    ],
    ids=[
        *("tp2_to_pp2", "tp2cp2_to_tp4", "vpp_to_one_rank", "uneven_pp2_to_pp2", "pp2dp2_to_tp2", "pp2_plain_to_tp2_plain"),
        "dp2_to_cp2",
    ],
)
def test_a_checkpoint_loads_under_another_layout(model: Path, tmp_path: Path, saved: dict[str, Any], read: dict[str, Any]):
    before, after = config_for(model, **saved), config_for(model, **read)
    data = batches(before.actor.data_parallel_size)
    went_on = run_ranks(train_save_train, before.actor.world_size, before, data, tmp_path)[0]
    last = batches(after.actor.data_parallel_size)[2]
    loaded = run_ranks(load_train, after.actor.world_size, after, last, tmp_path)[0]
    assert loaded["metrics"]["actor/grad_norm"] == pytest.approx(went_on["metrics"]["actor/grad_norm"], rel=1e-4)
    for name, value in went_on["weights"].items():
        np.testing.assert_allclose(loaded["weights"][name], value, atol=2e-4, err_msg=name)


TP2_SP, EP2 = {"tensor_parallel_size": 2, "sequence_parallel": True}, {"num_ranks": 2, "expert_parallel_size": 2}


@pytest.mark.parametrize(
    ("family", "saved", "reads"),
    [
        ("qwen3_moe", EP2, [EP2, TP2_SP | EP2, {"pipeline_parallel_size": 2}]),
        ("moonlight", {"use_distributed_optimizer": False}, [EP2 | {"use_distributed_optimizer": False}]),
    ],
    ids=["ep2_to_tp2ep2_and_pp2", "one_rank_plain_to_ep2_plain"],
)
def test_experts_load_however_they_are_shared_out(
    tmp_path: Path, family: str, saved: dict[str, Any], reads: list[dict[str, Any]]
):
    """megatron-core has an optimizer of its own for experts that are shared out: the state moves into it and out of it."""
    model = make_hf_model(tmp_path / "model", family, num_hidden_layers=2)
    (tmp_path / "saved").mkdir()
    before = config_for(model, **saved)
    data = batches(before.actor.data_parallel_size)
    went_on = run_ranks(train_save_train, before.actor.world_size, before, data, tmp_path / "saved")[0]
    for read in reads:
        after = config_for(model, **read)
        last = batches(after.actor.data_parallel_size)[2]
        loaded = run_ranks(load_train, after.actor.world_size, after, last, tmp_path / "saved")[0]
        assert loaded["metrics"]["actor/grad_norm"] == pytest.approx(went_on["metrics"]["actor/grad_norm"], rel=1e-4)
        for name, value in went_on["weights"].items():
            atol = 0 if read == saved else 2e-4
            np.testing.assert_allclose(loaded["weights"][name], value, rtol=0, atol=atol, err_msg=name)


def load_damaged(rank: int, init_method: str, config: Config, folder: Path, damage: str) -> str:
    """What loading says when the files are not those that were saved."""
    from dapo_megatron.actor.worker import ActorWorker
    from dapo_megatron.types import CheckpointError
    from dapo_megatron.weights.file_digest import FileDigest, digest_file

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    name = "weights/__0_0.distcp"
    digests = {name: FileDigest(5, "00") if damage == "file" else digest_file(folder / name)}
    try:
        worker.load(folder, digests)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_a_checkpoint_that_does_not_give_its_numbers_again_is_refused_and_the_first_one_is_named(model: Path, tmp_path: Path):
    config = config_for(model, tensor_parallel_size=2)
    data = batches(1)
    run_ranks(train_save_train, 2, config, data, tmp_path)
    assert "__0_0.distcp is not what was saved" in run_ranks(load_damaged, 2, config, tmp_path, "file")[1]
    saved = json.loads((tmp_path / "canary.json").read_text())
    saved["optimizer"]["exp_avg"] *= 1 + 1e-12
    (tmp_path / "canary.json").write_text(json.dumps(saved))
    assert "optimizer exp_avg of the canary is" in run_ranks(load_damaged, 2, config, tmp_path, "none")[0]
    saved["log_probs"][3] += 0.01
    (tmp_path / "canary.json").write_text(json.dumps(saved))
    assert "log-prob 3 of the canary is" in run_ranks(load_damaged, 2, config, tmp_path, "none")[0]
    under_pp = config_for(model, pipeline_parallel_size=2)
    assert "under another layout (tolerance 0.001)" in run_ranks(load_damaged, 2, under_pp, tmp_path, "none")[0]


def save_where_a_rank_cannot(
    rank: int, init_method: str, config: Config, batches: list[TrainBatch], folder: Path
) -> dict[str, Any]:
    """Rank 1 may write only tiny files, as if its disk were full; then it may again."""
    from dapo_megatron.actor.worker import ActorWorker
    from dapo_megatron.types import CheckpointError

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    worker.train(batches[0], 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    for name in ("full", "free"):
        if rank == 0:
            (folder / name).mkdir()
    worker.start_save(folder / "full")
    try:
        worker.finish_save()
        error = "no error"
    except CheckpointError as failure:
        error = str(failure)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    trained = worker.train(batches[1], 1)
    worker.start_save(folder / "free")
    return {"error": error, "metrics": trained, "files": sorted(worker.finish_save())}


def test_a_rank_that_cannot_write_fails_the_save_on_all_ranks_and_nothing_else(model: Path, tmp_path: Path):
    ranks = run_ranks(save_where_a_rank_cannot, 2, config_for(model, tensor_parallel_size=2), batches(1), tmp_path)
    assert all("/full failed on rank 0: rank 1: " in rank["error"] for rank in ranks), ranks
    assert ranks[0]["metrics"]["actor/num_loss_tokens"] > 0
    assert ranks[1]["files"] == ["optimizer/__1_0.distcp", "rng/rank_00001.pt", "weights/__1_0.distcp"]
