"""`dapo-megatron evaluate` from the command line: real Ray, frozen megatron ranks, the embedded engine, real reward workers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from tests.e2e.forked import Forked
from tests.e2e.runs import rows, run

pytestmark = pytest.mark.timeout(300)


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def test_a_run_is_evaluated_at_its_interval(whole_run: Path):
    evaluated = [row for row in rows(whole_run) if "eval/accuracy" in row]
    assert [row["rollout_step"] for row in evaluated] == [6, 12, 18, 24, 30]
    assert len({row["eval/accuracy_standard_error"] for row in evaluated}) > 1


def test_a_killed_evaluation_goes_on_and_finds_what_the_run_found(folder: Path, whole_run: Path):
    out = whole_run / "evaluations" / "step_000030_max_of_two.heldout"
    few = ("--rollout.engine.max_batch_size", "2")
    with Forked(("evaluate", "whole", *few), folder, folder / "killed_evaluation.out") as process:
        deadline = time.monotonic() + 200
        while len(lines(out / "problems.jsonl")) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    before = lines(out / "problems.jsonl")
    assert 3 <= len(before) < 20 and not (out / "summary.json").exists()

    done = run(folder, "evaluate", "whole", "--actor.tensor_parallel_size", "1")
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} problems are done" in done.stdout and "20/20 problems" in done.stdout
    after = lines(out / "problems.jsonl")
    whole_before = before if (out / "problems.jsonl").read_bytes().startswith("\n".join(before).encode() + b"\n") else before[:-1]
    assert after[: len(whole_before)] == whole_before
    records = [json.loads(line) for line in after]
    assert sorted(record["problem"] for record in records) == list(range(20))
    assert {record["weight_version"] for record in records} == {30}
    assert {len(record["responses"]) for record in records} == {48}

    summary, row = json.loads((out / "summary.json").read_text()), rows(whole_run)[-1]
    assert summary["avg_at_48"]["value"] == pytest.approx(row["eval/accuracy"])
    assert summary["avg_at_48"]["standard_error"] == pytest.approx(row["eval/accuracy_standard_error"])
    assert summary["maj_at_48"]["value"] == pytest.approx(row["eval/majority_accuracy"])
    assert summary["response_length_mean_tokens"] == pytest.approx(row["eval/response_length_tokens"])
    assert summary["truncated_fraction"] == pytest.approx(row["eval/truncated_fraction"])
    assert "pass_at_32" in summary and summary["settings"]["weight_version"] == 30


def test_an_hf_directory_is_read_by_the_engines_themselves(folder: Path, whole_run: Path):
    done = run(
        folder,
        *("evaluate", "runs/quickstart-assets/model", "--data", "runs/quickstart-assets/max_of_two.heldout.jsonl"),
        *("--out", "hf", "--samples", "4", "--data.chat_template", "false", "--reward.type", "exact"),
        *("--data.max_prompt_tokens", "8", "--eval.max_response_tokens", "2"),
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (folder / "hf" / "logs").iterdir()) == ["engine_000.log"]
    summary = json.loads((folder / "hf" / "summary.json").read_text())
    assert summary["num_problems"] == 20 and summary["settings"]["weight_version"] == 0
    assert os.path.samefile(folder / summary["about"]["source"], folder / "runs/quickstart-assets/model")
