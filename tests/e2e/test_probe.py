"""`probe` from the command line: real Ray, real ranks, a model of which only config.json exists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.runs import run
from tests.published_configs import QWEN3_8B


@pytest.mark.timeout(240)
def test_layouts_are_ranked_by_what_their_ranks_measured(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {tmp_path}}}\ndata: {{path: unused}}\nrun: {{dir: {tmp_path / 'run'}}}\n")
    layouts = ("max_tokens_per_micro_batch=24576", "pipeline_parallel_size=2,virtual_pipeline_size=2,num_ranks=2")
    given = (part for layout in layouts for part in ("--layout", layout))
    done = run(tmp_path, "probe", str(file), "--json", "--shrink", *given, seconds=200)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["shrunk"]
    assert [layout["train_seconds"] for layout in report["layouts"]] == sorted(
        layout["train_seconds"] for layout in report["layouts"]
    )
    found = {layout["layout"]["name"]: layout for layout in report["layouts"]}
    assert set(found) == set(layouts)
    for layout in found.values():
        assert layout["measured"]["seconds_per_micro_batch"] > 0 and layout["measured"]["log_prob_seconds_per_micro_batch"] > 0
        assert layout["measured"]["peak_device_bytes"] is None
    numbers = [layout["num_micro_batches"] for layout in found.values()]
    assert numbers[0] != numbers[1] and any(number % 2 == 0 for number in numbers), "whole steps at each layout's own budget"
