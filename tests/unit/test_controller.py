"""The loop over fakes of the actor and the engines (in process, so that order and failures can be arranged)."""

from __future__ import annotations

import json
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dapo_megatron.config.schema import Config
from dapo_megatron.data.loader import PromptStream
from dapo_megatron.data.prompts import DataReport, PromptSet
from dapo_megatron.launcher.controller import Controller, ControllerState, read_state, sync_weights
from dapo_megatron.launcher.identity import RunIdentity
from dapo_megatron.launcher.recorded_batch import read_recorded
from dapo_megatron.launcher.run_folder import RunFolder
from dapo_megatron.rollout.engine import GenerateResult, SamplingParams
from dapo_megatron.rollout.sampler import SamplerRules
from dapo_megatron.rollout.wave_sampler import WaveSampler
from dapo_megatron.types import CheckpointError, LogProbError, Prompt, Sample, Score, TrainBatch
from dapo_megatron.weights.file_digest import FileDigest
from dapo_megatron.weights.transports.records import PushReport


class FakeActor:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.save_error = ""
        self.metrics: dict[str, float] = {}

    async def train(self, batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        self.calls.append(("train", rollout_step))
        return {"actor/num_loss_tokens": sum(step.num_loss_tokens for step in batch.optimizer_steps), **self.metrics}

    async def send_weights(self, version: int) -> AsyncIterator[str]:
        self.calls.append(("send", version))
        yield f"weights {version}"

    async def start_save(self, directory: Path) -> None:
        self.calls.append(("save", directory.parent.name))
        (directory / "weights").mkdir()
        (directory / "weights" / "file").write_text("w")
        self._polls_left = 3

    async def save_is_written(self) -> bool:
        self._polls_left -= 1
        return self._polls_left <= 0

    async def finish_save(self) -> dict[str, FileDigest]:
        if self.save_error:
            raise CheckpointError(self.save_error)
        return {}

    async def load(self, directory: Path, digests: dict[str, FileDigest], allow_canary: bool) -> None:
        self.calls.append(("load", directory.parent.name))


class FakeEngine:
    """Every answer is one token; sample i of a prompt says i."""

    weight_version = 0

    def __init__(self) -> None:
        self.received: list[str] = []

    async def generate(self, requests: Any) -> AsyncIterator[GenerateResult]:
        for request in requests:
            samples = tuple(Sample((1,), (-0.5,), (self.weight_version,), "stop", str(i)) for i in range(request.num_samples))
            yield GenerateResult(request.request_id, samples)

    async def receive(self, message: str) -> int:
        self.received.append(message)
        return len(message)


class Scorer:
    """`right` says which answers are correct."""

    def __init__(self, right: set[str]) -> None:
        self.right = right

    async def score(self, responses: Any, answer: str) -> tuple[Score, ...]:
        return tuple(Score(1.0 if text in self.right else -1.0, text in self.right) for text in responses)


def make(
    tmp_path: Path,
    *,
    right: set[str],
    alarm: dict[str, Any] | None = None,
    dtype: str = "bf16",
    offload: bool = False,
    state: ControllerState | None = None,
    **train: Any,
) -> tuple[Controller, FakeActor, FakeEngine, list[dict], RunFolder]:
    config = Config.model_validate(
        {
            "model": {"path": "unused", "dtype": dtype},
            "metrics": {"log_prob_diff_alarm": alarm or {}},
            "actor": {"offload": offload},
            "data": {"path": "unused"},
            "run": {"dir": str(tmp_path)},
            "train": {"num_prompts_per_step": 2, "num_samples_per_prompt": 2, "num_updates_per_rollout": 1, **train},
            "checkpoint": {"every": 2},
        }
    )
    prompts = PromptSet(tuple(Prompt(i, (5, 6), "?", "0") for i in range(7)), DataReport(7, 0, 0, 0, ()), fingerprint="0")
    stream = PromptStream(prompts, 0, True)
    engine, actor, rows = FakeEngine(), FakeActor(), []
    folder = RunFolder(tmp_path)
    folder.create({})
    lag = config.train.rollout_lag
    rules = SamplerRules(num_samples_per_prompt=2, params=SamplingParams(), seed=0, max_over_sampling=2, lag=lag)
    sampler = WaveSampler([engine], Scorer(right), stream, rules)
    controller = Controller(
        config,
        actor=actor,
        engines=[engine],
        sampler=sampler,
        prompts=stream,
        folder=folder,
        report=rows.append,
        identity=RunIdentity({"code": "1"}),
        state=state,
    )
    return controller, actor, engine, rows, folder


async def test_a_step_samples_with_version_k_and_leaves_version_k_plus_1(tmp_path: Path):
    controller, actor, engine, rows, _ = make(tmp_path, right={"0"}, num_rollout_steps=2)
    await controller.run()
    assert actor.calls == [("send", 0), ("train", 0), ("send", 1), ("train", 1), ("save", "step_000002.tmp"), ("send", 2)]
    assert engine.received == ["weights 0", "weights 1", "weights 2"]
    assert [(row["rollout_step"], row["weights/version"], row["rollout/num_groups_kept"]) for row in rows] == [
        (1, 1, 2),
        (2, 2, 2),
    ]


async def test_the_tokens_of_a_step_are_let_go_before_the_next_is_generated(tmp_path: Path):
    controller, actor, engine, _, _ = make(tmp_path, right={"0"}, num_rollout_steps=3)
    trained: list[weakref.ref[np.ndarray]] = []
    generate = engine.generate

    async def train(batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        samples = [s for step in batch.optimizer_steps for rank in step.micro_batches for packed in rank for s in packed]
        trained.extend(weakref.ref(sample.token_ids) for sample in samples)
        return {"actor/num_loss_tokens": len(samples)}

    async def generate_when_free(requests: Any) -> AsyncIterator[GenerateResult]:
        assert not any(tokens() is not None for tokens in trained)
        async for result in generate(requests):
            yield result

    actor.train, engine.generate = train, generate_when_free
    await controller.run()
    assert len(trained) >= 3 * 4


async def test_data_without_signal_trains_nothing_and_ends(tmp_path: Path):
    controller, actor, _, rows, _ = make(tmp_path, right={"0", "1"}, num_rollout_steps=2)
    await controller.run()
    assert "train" not in {name for name, _ in actor.calls}
    assert [row["rollout/num_groups_kept"] for row in rows] == [0, 0]
    assert [row["rollout/num_groups_all_correct"] for row in rows] == [4, 4]


async def test_the_run_stops_when_it_is_accurate_enough(tmp_path: Path):
    controller, _, _, rows, folder = make(tmp_path, right={"0"}, num_rollout_steps=50, stop_at_accuracy=0.5)
    await controller.run()
    assert len(rows) == 10
    newest = folder.newest_checkpoint()
    assert newest is not None and read_state(newest).num_steps == 10


async def test_the_state_of_a_checkpoint_reads_back_as_it_was(tmp_path: Path):
    controller, _, _, _, folder = make(tmp_path, right={"0"}, num_rollout_steps=2)
    await controller.run()
    newest = folder.newest_checkpoint()
    assert newest is not None
    state = read_state(newest)
    assert (state.num_steps, state.sampler.next_group_id) == (2, 4)
    assert state.prompts == controller._prompts.state() and state.sampler == controller._sampler.state()
    with pytest.raises(CheckpointError):
        read_state(tmp_path)


async def test_a_save_is_written_while_later_steps_train_and_its_figures_stand_in_the_row_that_found_it(tmp_path: Path):
    controller, _, _, rows, folder = make(tmp_path, right={"0"}, num_rollout_steps=8)
    await controller.run()
    assert [row["rollout_step"] for row in rows if "checkpoint/bytes" in row] == [4, 6, 8]
    assert rows[-1]["checkpoint/bytes"] > 0 and rows[-1]["checkpoint/num_failed_saves"] == 0
    assert [path.name for path in folder.complete_checkpoints()] == ["step_000006", "step_000008"]


async def test_a_save_that_fails_is_said_loudly_and_costs_neither_the_run_nor_the_older_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    controller, actor, _, rows, folder = make(tmp_path, right={"0"}, num_rollout_steps=6)
    report = controller._report

    def disk_fills_up(row: Any) -> None:
        report(row)
        actor.save_error = "No space left on device" if row["rollout_step"] >= 4 else ""

    controller._report = disk_fills_up
    await controller.run()
    assert len(rows) == 6 and rows[-1]["checkpoint/num_failed_saves"] == 2
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step_000002"]
    assert "CHECKPOINT NOT SAVED: step_000004.tmp: No space left on device" in caplog.text
    assert "would go back to step_000002" in caplog.text


async def test_a_folder_that_cannot_be_written_to_costs_neither_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    controller, _, _, rows, folder = make(tmp_path, right={"0"}, num_rollout_steps=3)
    folder.checkpoints.rmdir()
    folder.checkpoints.write_text("a file where the folder was")
    await controller.run()
    assert len(rows) == 3 and caplog.text.count("CHECKPOINT NOT SAVED") == 2


async def test_older_checkpoints_that_cannot_be_removed_do_not_unsave_the_newest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    controller, _, _, rows, folder = make(tmp_path, right={"0"}, num_rollout_steps=4)

    def refuse(self: RunFolder, *_: Any) -> None:
        raise PermissionError(13, "Permission denied", "step_000002")

    monkeypatch.setattr(RunFolder, "prune", refuse)
    await controller.run()
    assert [path.name for path in folder.complete_checkpoints()] == ["step_000002", "step_000004"]
    assert max(row.get("checkpoint/num_failed_saves", 0) for row in rows) == 0
    assert "could not be removed" in caplog.text and "Permission denied" in caplog.text and "NOT SAVED" not in caplog.text


async def test_a_run_that_goes_on_knows_how_long_its_phases_took(tmp_path: Path):
    settings = {"right": {"0"}, "num_rollout_steps": 8}
    controller, _, _, _, folder = make(tmp_path, **settings)
    assert controller._clock.deadline("train") == 3600
    await controller.run()
    newest = folder.newest_checkpoint()
    assert newest is not None
    controller, *_ = make(tmp_path, **settings, state=read_state(newest))
    assert controller._clock.deadline("train") == controller._clock.deadline("save") == 600


async def test_looking_whether_a_save_is_written_says_nothing_about_how_long_a_save_takes(tmp_path: Path):
    controller, _, _, rows, _ = make(tmp_path, right={"0"}, num_rollout_steps=4)
    await controller.run()
    assert sum("time/save_seconds" in row for row in rows) == 4 and sum("checkpoint/write_seconds" in row for row in rows) == 1
    assert controller._clock.deadline("train") == 600 and controller._clock.deadline("save") == 3600


async def test_the_phase_file_names_the_phase_under_way(tmp_path: Path):
    controller, actor, _, _, folder = make(tmp_path, right={"0"}, num_rollout_steps=1)
    seen = []
    train = actor.train

    async def look(batch: TrainBatch, rollout_step: int) -> dict[str, float]:
        seen.append(json.loads(folder.phase_file.read_text()))
        return await train(batch, rollout_step)

    actor.train = look
    await controller.run()
    assert [(note["rollout_step"], note["phase"]) for note in seen] == [(1, "train")]


@pytest.mark.parametrize(
    ("dtype", "mean", "maximum", "alarms"),
    [("fp32", 2e-3, 1e-2, 1), ("fp32", 1e-5, 0.1, 1), ("fp32", 1e-5, 1e-3, 0), ("bf16", 0.02, 3.0, 0), ("bf16", 0.06, 0.1, 1)],
    ids=["fp32_mean", "fp32_max", "fp32_sound", "bf16_sound", "bf16_mean"],
)
async def test_actor_and_engine_that_disagree_about_log_probs_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str, mean: float, maximum: float, alarms: int
):
    controller, actor, _, rows, _ = make(tmp_path, right={"0"}, dtype=dtype, num_rollout_steps=1)
    actor.metrics = {"actor/log_prob_diff_mean": mean, "actor/log_prob_diff_max": maximum}
    await controller.run()
    warnings = [record.message for record in caplog.records if "log_prob_diff" in record.message]
    assert len(warnings) == alarms
    assert all("in rollout step 1, above metrics.log_prob_diff_alarm" in text and "likely causes" in text for text in warnings)
    assert rows[0]["actor/log_prob_diff_mean"] == mean, "the run goes on"


async def test_an_alarm_that_has_nothing_to_compare_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    controller, actor, *_ = make(tmp_path, right={"0"}, num_rollout_steps=3)
    actor.metrics = {"actor/mismatch_mean": 0.2}
    await controller.run()
    said = [record.message for record in caplog.records if "log_prob_diff_alarm does not see rollout step 1," in record.message]
    assert len(said) == 1 and "actor/mismatch_mean" in said[0]


@pytest.mark.parametrize("value", [0.3, float("nan")])
async def test_a_disagreement_about_log_probs_ends_the_run_when_asked(tmp_path: Path, value: float):
    controller, actor, _, rows, _ = make(
        tmp_path, right={"0"}, alarm={"mean": None, "max": 0.25, "action": "stop"}, num_rollout_steps=3
    )
    actor.metrics = {"actor/log_prob_diff_mean": 0.2, "actor/log_prob_diff_max": value}
    with pytest.raises(LogProbError, match=rf"log_prob_diff_max is {value} nats in rollout step 1, above .*\(0.25\)"):
        await controller.run()
    assert rows == [] and actor.calls[-1] == ("train", 0), "no weights of that step are sent or saved"


async def test_the_batch_of_one_step_is_recorded_and_reads_back(tmp_path: Path):
    controller, *_ = make(tmp_path, right={"0"}, num_rollout_steps=2, num_updates_per_rollout=2, record_batch_of_step=2)
    await controller.run()
    recorded = read_recorded(tmp_path)
    assert recorded == read_recorded(tmp_path / "batches" / "step_000002.npz")
    assert recorded.rollout_step == 2
    assert [len(step) for step in recorded.optimizer_steps] == [2, 2]
    for right, wrong in recorded.optimizer_steps:
        assert (
            right.num_prompt_tokens == 2 and right.token_ids.tolist() == [5, 6, 1] and right.rollout_log_probs.tolist() == [-0.5]
        )
        assert right.advantage == -wrong.advantage > 0 and right.loss_weight == 1 and right.on_policy


@pytest.mark.parametrize("content", [None, b"not a zip"])
def test_what_is_no_recorded_batch_is_said(tmp_path: Path, content: bytes | None):
    file = tmp_path / "batches" / "step_000001.npz"
    if content is not None:
        file.parent.mkdir()
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match="no recorded batch"):
        read_recorded(tmp_path)


class FakeServers:
    """Servers behind one handle: they ask the actor for their weights."""

    endpoints = ("engine 0", "engine 1")

    async def update_weights(self, version: int, push: Any) -> PushReport:
        return await push(self.endpoints)

    async def release_memory(self) -> None:
        pass


class Turns(FakeServers):
    """Notes, in the list of the actor's calls, whose turn it is."""

    def __init__(self, calls: list[tuple[str, Any]]) -> None:
        self.calls, self.weight_version = calls, 0

    async def update_weights(self, version: int, push: Any) -> PushReport:
        self.calls.append(("engines take back weights", version))
        report = await push(self.endpoints)
        self.calls.append(("engines take back the cache", version))
        self.weight_version = version
        return report

    async def release_memory(self) -> None:
        self.calls.append(("engines release", self.weight_version))


class OffloadingActor(FakeActor):
    async def make_room(self) -> dict[str, float]:
        self.calls.append(("make room", None))
        return {"actor/offload_bytes": 5.0, "actor/offload_seconds": 0.5}

    async def push_weights(self, version: int, endpoints: Any) -> PushReport:
        self.calls.append(("push", version))
        return PushReport(version, 10, seconds=1.0, check_seconds=0.1, memcpy_seconds=0.5)


@pytest.mark.parametrize("right", [{"0"}, {"0", "1"}], ids=["something to learn", "nothing to learn"])
async def test_actor_and_engines_on_the_same_devices_take_turns(tmp_path: Path, right: set[str]):
    controller, _, _, rows, _ = make(tmp_path, right=right, offload=True, num_rollout_steps=1)
    actor = OffloadingActor()
    controller._actor = controller._saver._actor = actor
    controller._engines = [Turns(actor.calls)]
    await controller.run()
    sent = [("engines take back weights", 1), ("push", 1), ("engines take back the cache", 1)]
    trained = [("train", 0)] if right == {"0"} else []
    first = [("make room", None), *[(call, 0) for call, _ in sent]]
    assert actor.calls == [*first, ("engines release", 0), *trained, ("save", "step_000001.tmp"), ("make room", None), *sent]
    assert rows[0]["actor/offload_bytes"] == 5.0


class PushingActor:
    def __init__(self) -> None:
        self.pushed: list[tuple[int, Any]] = []

    async def push_weights(self, version: int, endpoints: Any) -> PushReport:
        self.pushed.append((version, endpoints))
        return PushReport(
            version,
            3 * 10**9,
            seconds=6.0,
            check_seconds=1.0,
            memcpy_seconds=0.5,
            failures={"engine 1": "gone"},
            shard_check_seconds=0.3,
        )


async def test_servers_get_their_weights_from_the_ranks_and_the_row_says_how_fast():
    actor = PushingActor()
    assert await sync_weights(actor, [FakeServers()], 7) == {
        "weights/sync_bytes": 3 * 10**9,
        "weights/sync_gb_per_second": 0.5,
        "weights/sync_to_memcpy_ratio": 12.0,
        "weights/shard_check_seconds": 0.3,
        "weights/check_seconds": 1.0,
        "weights/num_engines_failed": 1,
    }
    assert actor.pushed == [(7, FakeServers.endpoints)]
