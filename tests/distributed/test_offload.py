"""Memory that is given up while engines generate: nothing of what the ranks compute changes, and turns are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dapo_megatron.config.schema import Config
from dapo_megatron.types import EngineError, TrainBatch
from tests.distributed import programs
from tests.distributed.batches import cut, random_samples
from tests.distributed.ranks import run_ranks
from tests.tiny_models import make_hf_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")


def run_of_two_steps(rank: int, init_method: str, config: Config, batches: list[TrainBatch], folder: Path) -> dict[str, Any]:
    """Send, train, save, send, train, load what was saved, send; with what is on the device between."""
    from dapo_megatron.actor.worker import ActorWorker

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    held, moved = [worker.memory.held.name], []

    def send(version: int) -> Any:
        moved.append(worker.make_room())
        held.append(worker.memory.held.name)
        weights = programs.received(worker.mapping, list(worker.send_weights(version)))
        held.append(worker.memory.held.name)
        return weights

    first = send(0)
    rows = [worker.train(batches[0], 0)]
    held.append(worker.memory.held.name)
    worker.start_save(folder)
    second = send(1)  # while the files are written
    worker.finish_save()
    again = programs.received(worker.mapping, list(worker.send_weights(1)))  # to an engine that came back
    rows.append(worker.train(batches[1], 1))
    third = send(2)
    send(3)  # after a step without anything to learn
    worker.load(folder, {})
    loaded = send(1)
    return {"rows": rows, "held": held, "moved": moved, "weights": [first, second, again, third, loaded]}


@pytest.mark.parametrize(("dtype", "distributed_optimizer"), [("bf16", True), ("fp32", False)], ids=["bf16", "fp32_plain"])
def test_a_run_is_the_same_bit_for_bit(model: Path, tmp_path: Path, dtype: str, distributed_optimizer: bool):
    results = {}
    for offload in (False, True):
        config = programs.make_config(
            model, dtype, offload=offload, num_ranks=2, use_distributed_optimizer=distributed_optimizer, optimizer={"lr": 1e-2}
        )
        batches = [cut(random_samples(seed=seed), num_ranks=2, samples_per_micro_batch=2) for seed in range(2)]
        folder = tmp_path / str(offload)
        folder.mkdir()
        results[offload] = run_ranks(run_of_two_steps, 2, config, batches, folder)[0]
    off, on = results[False], results[True]
    assert on["rows"] == off["rows"]
    for ours, theirs in zip(on["weights"], off["weights"], strict=True):
        assert all(np.array_equal(ours[name], value) for name, value in theirs.items())
    first, second, again, _, loaded = on["weights"]
    assert any(not np.array_equal(first[name], second[name]) for name in first), "the test trains"
    assert all(np.array_equal(second[name], again[name]) and np.array_equal(second[name], loaded[name]) for name in first)
    assert set(off["held"]) == {"ALL"} and off["moved"] == [{}] * 5
    begin, nothing_to_learn, after_load = ["PARAMETERS", "PARAMETERS", "NOTHING"], ["NOTHING"] * 2, ["PARAMETERS", "NOTHING"]
    after_training = ["PARAMETERS", "NOTHING"]
    assert on["held"] == [*begin, "ALL", *after_training, *after_training, *nothing_to_learn, *after_load]
    sizes = [moved["actor/offload_bytes"] for moved in on["moved"]]
    assert sizes[0] < sizes[1] == sizes[-1], "the moments of AdamW come with the first step"


def out_of_turn(rank: int, init_method: str, config: Config, call: Callable[[Any], Any]) -> str:
    from dapo_megatron.actor.worker import ActorWorker

    worker = ActorWorker(config, rank=rank, init_method=init_method)
    worker.memory.take_back()
    try:
        call(worker)
    except EngineError as error:
        return str(error)
    return "done"


def send_all(worker: Any) -> None:
    list(worker.send_weights(1))


def test_weights_cannot_be_sent_while_the_actor_has_all_of_the_device(model: Path):
    (said,) = run_ranks(out_of_turn, 1, programs.make_config(model, offload=True), send_all)
    assert "holds parameters, optimizer state and gradient buffers" in said and "make_room() must come before" in said
