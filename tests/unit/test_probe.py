"""What a probe makes of measured steps, the batches it times, and what it refuses before anything is started."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dapo_megatron.actor.probed import MeasuredLayout, Probed, ProbedStep
from dapo_megatron.config.load import load_config
from dapo_megatron.config.schema import Config
from dapo_megatron.launcher.probe import PlannedLayout, ProbeRequest, probe, recorded_lengths
from dapo_megatron.launcher.probe_batch import ProbeLengths, probe_batch
from dapo_megatron.launcher.probe_jobs import is_probe, rank_runs, submit_probe
from dapo_megatron.launcher.probe_layouts import expected_lengths, given_layouts, planned_layouts, tokens_per_update
from dapo_megatron.launcher.recorded_batch import record
from dapo_megatron.launcher.slurm.record import JobRecords
from dapo_megatron.types import ConfigError, OptimizerStepBatch, TrainBatch, TrainSample
from tests.published_configs import QWEN3_8B

LENGTHS = ProbeLengths(prompts=[5], responses=[3, 10, 40], num_samples_per_prompt=4)


def measured(*steps: tuple[int, float, float]) -> MeasuredLayout:
    return MeasuredLayout.of(Probed(tuple(ProbedStep(*step) for step in steps), None))


def test_two_steps_give_the_line_through_them():
    line = measured((4, 1.5, 0.4), (8, 2.5, 0.8))
    assert (line.fixed_seconds, line.seconds_per_micro_batch) == (pytest.approx(0.5), pytest.approx(0.25))
    assert line.log_prob_seconds_per_micro_batch == pytest.approx(0.1) and not line.noisy
    whole = line.rollout_step_seconds(num_updates=3, num_micro_batches=10, log_probs=True)
    assert whole == pytest.approx(3 * (0.5 + 2.5) + 2 * 1.0)
    assert line.rollout_step_seconds(num_updates=3, num_micro_batches=10, log_probs=False) == pytest.approx(9.0)


def test_of_steps_of_one_size_the_fastest_counts():
    assert measured((4, 1.5, 0.4), (8, 9.0, 0.8), (4, 7.0, 9.0), (8, 2.5, 7.0)) == measured((4, 1.5, 0.4), (8, 2.5, 0.8))


def test_longer_step_that_took_less_is_noise_and_says_so():
    line = measured((4, 3.0, 0.4), (8, 2.4, 0.8))
    assert line.noisy and line.seconds_per_micro_batch == pytest.approx(0.3) and line.fixed_seconds > 0


def test_fixed_part_is_never_negative():
    assert measured((4, 1.0, 0.1), (8, 3.0, 0.2)).fixed_seconds == 0


def test_micro_batches_are_full_on_every_copy():
    batch = probe_batch(LENGTHS, [1, 2, 4], num_copies=3, max_tokens=64, vocab_size=50, seed=0)
    assert [[len(rank) for rank in step.micro_batches] for step in batch.optimizer_steps] == [[1] * 3, [2] * 3, [4] * 3]
    micro_batches = [m for step in batch.optimizer_steps for rank in step.micro_batches for m in rank]
    assert {sum(len(sample.token_ids) for sample in micro_batch) for micro_batch in micro_batches} == {64}
    samples = [sample for micro_batch in micro_batches for sample in micro_batch]
    assert all(sample.num_loss_tokens == len(sample.rollout_log_probs) > 0 for sample in samples)
    assert max(int(sample.token_ids.max()) for sample in samples) < 50
    assert all(
        step.num_loss_tokens == sum(s.num_loss_tokens for r in step.micro_batches for m in r for s in m)
        for step in batch.optimizer_steps
    )


@pytest.mark.parametrize("max_tokens", [2, 3, 5, 6, 7])
def test_short_micro_batches_are_full_too(max_tokens: int):
    (step,) = probe_batch(LENGTHS, [20], num_copies=1, max_tokens=max_tokens, vocab_size=50, seed=1).optimizer_steps
    assert {sum(len(sample.token_ids) for sample in micro_batch) for micro_batch in step.micro_batches[0]} == {max_tokens}


def test_samples_share_prompts_in_groups_and_follow_the_seed():
    def batch(seed: int) -> TrainBatch:
        return probe_batch(LENGTHS, [1], num_copies=1, max_tokens=400, vocab_size=50, seed=seed)

    assert batch(0) == batch(0) != batch(1)
    (micro_batch,) = batch(0).optimizer_steps[0].micro_batches[0]
    prompts = [tuple(sample.token_ids[:5]) for sample in micro_batch]
    assert len(prompts) > 8 and len(set(prompts[:4])) == 1 and prompts[3] != prompts[4]


def test_lengths_of_a_recorded_batch(tmp_path: Path):
    samples = tuple(
        TrainSample(np.arange(n + 2, dtype=np.int32), 2, np.zeros(n, np.float32), 1.0, 1.0, on_policy=True) for n in (3, 5)
    )
    record(TrainBatch((OptimizerStepBatch(((samples,),), 8),)), tmp_path, rollout_step=1)
    assert recorded_lengths(tmp_path) == ProbeLengths([2, 2], [3, 5], 2)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {tmp_path}}}\ndata: {{path: d}}\nrun: {{dir: {tmp_path / 'run'}}}\n")
    return file


@pytest.fixture
def request_for(run_file: Path) -> ProbeRequest:
    return ProbeRequest(
        files=[run_file], overrides=[], layouts=[], lengths=LENGTHS, num_tokens_per_update=1e6, copies=None, shrink=True, as_json=False
    )  # fmt: skip


@pytest.mark.parametrize(
    ("layouts", "copies", "words"),
    [
        (["tensor_parallel_size=3"], None, "tensor_parallel_size=3: actor.tensor_parallel_size (3) must divide"),
        (["num_ranks=1000"], None, "1000 ranks are more than this machine's"),
        (["num_ranks=1000"], None, "--copies 1 starts one copy of the model"),
        (["num_ranks=2"], 3, "--copies (3) must not exceed its data-parallel size (2)"),
        (["seed=1", "pipeline_parallel_size=5"], None, "actor.pipeline_parallel_size (5) must divide num_hidden_layers (36)"),
    ],
)
def test_layout_that_cannot_be_probed_is_refused_before_anything_starts(request_for, layouts, copies, words):
    asked = replace(request_for, layouts=given_layouts(layouts), copies=copies)
    with pytest.raises(ConfigError) as error:
        probe(asked, Console())
    assert words in str(error.value)


def test_planned_layouts_are_the_best_of_different_cuts(run_file: Path):
    config = load_config(
        [run_file], ["--actor.num_ranks=8", "--rollout.max_response_tokens=8192", "--rollout.engine.type=sglang"]
    )
    layouts = planned_layouts(config, "h100-80", 3)
    assert len(layouts) == 3 and all(layout.planned_seconds for layout in layouts)
    actors = [load_config([run_file], layout.overrides).actor for layout in layouts]
    assert {actor.world_size for actor in actors} == {8}
    assert len({(actor.tensor_parallel_size, actor.pipeline_parallel_size, actor.context_parallel_size) for actor in actors}) == 3


def test_probe_without_a_gpu_to_plan_for_asks_for_one(run_file: Path):
    with pytest.raises(ConfigError, match=r"--gpu is missing.*--layout"):
        planned_layouts(load_config([run_file], []), None, 3)


def test_expected_lengths_are_those_of_the_plan(run_file: Path):
    config = load_config([run_file], [])
    lengths = expected_lengths(config)
    assert lengths.num_samples_per_prompt == 16 and max(lengths.responses) <= 20480
    assert tokens_per_update(config, lengths) == pytest.approx(512 * (256 + 20480 / 3), rel=0.01)


def test_name_of_a_given_layout_is_what_was_given():
    assert given_layouts(["tensor_parallel_size=2,seed=1"]) == [
        PlannedLayout("tensor_parallel_size=2,seed=1", ["--actor.tensor_parallel_size=2", "--seed=1"])
    ]


@pytest.fixture
def probe_folder(tmp_path: Path) -> Path:
    """Of an array whose second run has not ended."""
    folder = tmp_path / "probe"
    for name, rows in {"1_TP2": [9.0, 4.0], "2_PP2": [9.0], "3_DP2": [9.0, 3.0]}.items():
        (folder / name).mkdir(parents=True)
        lines = [
            {"rollout_step": step, "time/train_seconds": seconds, "time/rollout_seconds": 2.0, "time/step_seconds": seconds + 2.5}
            for step, seconds in enumerate(rows, 1)
        ]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = JobRecords(folder)
    records.folder.mkdir()
    records.write_sweep(["1_TP2", "2_PP2", "3_DP2"])
    return folder


def test_runs_of_an_array_are_ranked_by_their_last_step(probe_folder: Path):
    console = Console(record=True, width=100, file=io.StringIO())
    assert is_probe(probe_folder) and not is_probe(probe_folder / "1_TP2")
    assert rank_runs(probe_folder, console, as_json=True) == 1
    found = json.loads(console.export_text())
    assert [(run["name"], run["train_seconds"]) for run in found["layouts"]] == [("3_DP2", 3.0), ("1_TP2", 4.0), ("2_PP2", 9.0)]
    assert found["unfinished"] == ["2_PP2"]
    rank_runs(probe_folder, console, as_json=False)
    assert "2_PP2: 1 of 2 steps; dapo-megatron status" in console.export_text()


def test_array_has_a_short_run_of_each_layout(run_file: Path, capsys: pytest.CaptureFixture[str]):
    checked: list[Config] = []
    layouts = given_layouts(["tensor_parallel_size=2,num_ranks=8", "pipeline_parallel_size=4,num_ranks=8"])
    assert submit_probe([run_file], ["--slurm.time=1:00:00"], layouts, checked.append, Console(), dry_run=True) is None
    assert [(config.actor.tensor_parallel_size, config.actor.pipeline_parallel_size) for config in checked] == [(2, 1), (1, 4)]
    train = checked[0].train
    assert (train.num_rollout_steps, train.num_updates_per_rollout, train.num_prompts_per_step) == (2, 2, 64)
    assert len({config.run.dir for config in checked}) == 2 and checked[0].run.dir.parent == run_file.parent / "run" / "probe"
    assert "#SBATCH --array=0-1" in capsys.readouterr().out
