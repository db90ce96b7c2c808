"""`dapo-megatron plan` from the command line: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from dapo_megatron import cli
from dapo_megatron.config.checks import check_layout
from dapo_megatron.config.load import load_config, resolved_dict
from dapo_megatron.layout.from_config import fit_problem, layout_of
from dapo_megatron.layout.hardware import known_gpus
from dapo_megatron.layout.search import plan
from tests.published_configs import QWEN2_5_32B, QWEN3_8B, QWEN3_235B_A22B

MODEL_FILE = Path(__file__).parents[2] / "configs" / "models" / "qwen2.5-32b.json"
SMALL = ("--gpus", "8", "--gpu", "h100-80", "--response-tokens", "8192")
"""Qwen3-8B on one node."""


@pytest.fixture(autouse=True)
def plans_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same question has the same answer: tests that ask it again share it."""
    monkeypatch.setattr("dapo_megatron.plan.plan", _plan_once)


_plan_once = cache(plan)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3-8b")
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    return folder


@pytest.fixture(scope="module")
def run_file(model: Path) -> Path:
    file = model / "run.yaml"
    file.write_text(
        f"model: {{path: {model}}}\ndata: {{path: d}}\nrun: {{dir: {model / 'run'}}}\n"
        "train: {num_prompts_per_step: 64}\nrollout: {max_response_tokens: 8192}\n"
    )
    return file


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dapo-megatron", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def words(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, on one line."""
    return " ".join(capsys.readouterr().out.split())


def as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert call(monkeypatch, *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_table_names_limits_settings_and_reasons(monkeypatch, capsys, model):
    assert call(monkeypatch, model, *SMALL, "--top", "3") == 0
    text = words(capsys)
    assert f"{model} on 8 x H100 SXM 80 GB: 512 prompts x 16 samples, up to 1024 + 8192 tokens" in text
    assert " limited by 1: " in text and " 3: " in text and " 4: " not in text
    assert "tensor_parallel_size:" in text and "dapo-megatron submit CONFIG.yaml layout.yaml" in text
    assert "layouts rejected:" in text and "GPU memory is too small" in text


def test_json_accounts_for_every_layout_byte_and_second(monkeypatch, capsys, model):
    plan = as_json(monkeypatch, capsys, model, *SMALL)
    assert plan["num_layouts"] == plan["num_fitting"] + sum(rejection["num_layouts"] for rejection in plan["rejections"])
    assert all(rejection["reason"] for rejection in plan["rejections"])
    best = plan["layouts"][0]
    # Of layouts that are as fast as each other the simplest comes first.
    assert best["step_seconds"] <= 1.02 * min(layout["step_seconds"] for layout in plan["layouts"])
    assert sum(item["seconds"] for item in best["time"]) == pytest.approx(best["step_seconds"])
    phases = [phase for stage in best["stages"] for phase in stage["phases"]]
    assert max(sum(item["num_bytes"] for item in phase["items"]) for phase in phases) == best["peak_bytes"]
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
    cuts = [tuple(layout["settings"]["actor"].get(size, 1) for size in sizes) for layout in plan["layouts"]]
    assert len(set(cuts)) == len(cuts), "the best of each cut of the model"


def test_layouts_that_this_version_cannot_run_are_marked(monkeypatch, capsys, model):
    few = (MODEL_FILE, "--gpus", 8, "--gpu", "h100-80", "--all")
    assert call(monkeypatch, *few, "--explain", "tp=4,dp=2", "--write", model / "never.yaml") == 2
    assert "has nothing to write: no layout fits that this version can run" in capsys.readouterr().err
    assert call(monkeypatch, *few) == 0
    text = words(capsys)
    assert "TP4 DP2 * " in text and "* this version cannot run it" in text


def test_explained_layout_is_itemised(monkeypatch, capsys, model):
    assert call(monkeypatch, model, *SMALL, "--explain", "tp=2,pp=2,recompute=full") == 0
    text = words(capsys)
    assert "TP2 PP2" in text and "recompute full" in text and " that fit; limited by " in text and "the fastest of " in text
    for part in (
        "GPU memory, training",
        "GPU memory, rollout",
        "One rollout step",
        "optimizer state",
        "KV cache",
        "pipeline bubble",
    ):
        assert part in text
    assert "host memory of a node" in text and "checkpoint: " in text


def test_explained_sizes_alone_are_in_the_json(monkeypatch, capsys, model):
    plan = as_json(monkeypatch, capsys, model, *SMALL, "--explain", "tp=4,pp=1,cp=1")
    assert {layout["settings"]["actor"]["tensor_parallel_size"] for layout in plan["layouts"]} == {4}
    assert all(rejection["layout"].startswith("TP4 DP2") for rejection in plan["rejections"])


def test_explained_layout_has_its_passes_in_flight_and_its_checkpoint_at_the_given_rate(monkeypatch, capsys):
    where = (
        MODEL_FILE,
        "--gpus",
        64,
        "--gpu",
        "h100-80",
        "--explain",
        "tp=4,pp=4,vpp=1",
        "--response-tokens",
        8192,
    )
    texts = []
    for more in ((), ("--disk-gb-per-second", 20)):
        assert call(monkeypatch, *where, *more) == 0
        texts.append(words(capsys))
    assert all("forward passes in flight 4 3 2 1" in text for text in texts)
    seconds = [re.search(r"(\d+) s to write at (\d+) GB/s a node", text) for text in texts]
    assert all(seconds) and [found[2] for found in seconds if found] == ["2", "20"]
    assert int(seconds[0][1]) == pytest.approx(10 * int(seconds[1][1]), abs=5)


def test_explained_layout_that_does_not_fit_has_its_reason_with_numbers(monkeypatch, capsys):
    assert call(monkeypatch, MODEL_FILE, "--gpus", 16, "--gpu", "h100-80", "--explain", "tp=2,pp=1") == 1
    text = words(capsys)
    assert "No layout with tp=2,pp=1 is in the plan:" in text
    assert "TP2 DP8" in text and "of 85.5 GB" in text


def test_explained_layout_that_fits_and_is_slower_is_not_called_too_large(monkeypatch, capsys, model):
    assert call(monkeypatch, model, *SMALL, "--explain", "tp=8,recompute=full,tokens=9216") == 1
    assert "No layout with tp=8,recompute=full,tokens=9216 is in the plan:" in words(capsys)


def test_stored_model_is_the_published_one():
    assert json.loads(MODEL_FILE.read_text()) == QWEN2_5_32B


@pytest.mark.parametrize("more", [(), ("--rollout-gpus", "4"), ("--explain", "tp=8"), ("--all",)])
def test_written_settings_are_those_of_the_plan(monkeypatch, capsys, model, run_file, tmp_path, more):
    file = tmp_path / "layout.yaml"
    assert call(monkeypatch, run_file, *SMALL, *more, "--write", file) == 0
    text = words(capsys)
    config = load_config([run_file, file])
    assert check_layout(config, QWEN3_8B) == []
    assert str(layout_of(config)) in text
    assert config.actor.tensor_parallel_size == 8 or "--explain" not in more
    assert config.cluster.gpu == "h100-80" and (config.slurm.nodes, config.slurm.gpus_per_node) == (1, 8)
    assert config.cluster.placement == ("split" if "--rollout-gpus" in more else "colocated")
    assert config.actor.world_size == (4 if "--rollout-gpus" in more else 8)


def test_configuration_gives_workload_gpus_and_gpu(monkeypatch, capsys, run_file):
    assert call(monkeypatch, run_file, "--actor.num_ranks", 8, "--cluster.gpu", "h200", "--top", 1) == 0
    text = words(capsys)
    assert "on 8 x H200" in text and "64 prompts x 16 samples, up to 1024 + 8192 tokens" in text
    assert f"dapo-megatron submit {run_file} layout.yaml --actor.num_ranks 8 --cluster.gpu h200" in text


def test_run_folder_is_planned_by_its_configuration(monkeypatch, capsys, run_file, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": resolved_dict(load_config([run_file])), "versions": {}}))
    assert call(monkeypatch, tmp_path, "--gpus", 8, "--gpu", "h100-80", "--top", 1) == 0
    text = words(capsys)
    assert "64 prompts x 16 samples" in text and "dapo-megatron submit CONFIG.yaml layout.yaml" in text


@pytest.fixture
def past_run(run_file: Path, tmp_path: Path) -> Path:
    """A run of two steps whose responses had 500 tokens."""
    engine = ["--rollout.engine.type=sglang", "--rollout.num_engines=8", "--actor.num_ranks=8", "--actor.tensor_parallel_size=4"]
    config = load_config([run_file], engine)
    (tmp_path / "config.json").write_text(json.dumps({"config": resolved_dict(config), "versions": {}}))
    times = {"time/rollout_seconds": 1e4, "time/train_seconds": 2e4, "time/sync_seconds": 3e3}
    rows = [{"rollout_step": step, "rollout/response_length_tokens": 500.0, **times} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_measured_steps_of_a_run_correct_times_and_lengths(monkeypatch, capsys, run_file, past_run):
    arguments = (run_file, "--gpus", 8, "--gpu", "h100-80", "--explain", "tp=4,pp=1")
    plain = as_json(monkeypatch, capsys, *arguments)["layouts"][0]
    corrected = as_json(monkeypatch, capsys, *arguments, "--calibrate", past_run)
    assert corrected["workload"]["mean_response_tokens"] == 500
    assert f"corrected by 1 steps of {past_run}: rollout x" in " ".join(corrected["notes"])
    assert corrected["layouts"][0]["step_seconds"] > plain["step_seconds"]


def test_calibration_by_what_is_no_run_is_refused(monkeypatch, capsys, model, run_file, past_run):
    for path in (model, past_run / "missing", run_file.parent):
        assert call(monkeypatch, run_file, *SMALL, "--calibrate", path) == 2
        assert f"--calibrate ({path}) must be the folder of a run" in capsys.readouterr().err
    (past_run / "metrics.jsonl").unlink()
    assert call(monkeypatch, run_file, *SMALL, "--calibrate", past_run) == 2
    assert "holds no metrics.jsonl" in capsys.readouterr().err


def test_gpus_of_a_file_of_ones_own(monkeypatch, capsys, model, tmp_path):
    file = tmp_path / "gpus.yaml"
    fields = {
        "name": "Half an H200", "memory_mib": 71885, "hbm_gb_per_second": 2400, "bf16_tflops": 495, "nvlink_gb_per_second": 450,
        "internode_gb_per_second": 50, "pcie_gb_per_second": 55, "source": "a test",
    }  # fmt: skip
    file.write_text(json.dumps({"half": fields}))
    assert call(monkeypatch, model, "--gpus", 8, "--gpu-file", file, "--top", 1, "--response-tokens", 8192) == 0
    assert "on 8 x Half an H200" in words(capsys)


def test_gpu_of_a_file_goes_into_the_settings_that_are_written(monkeypatch, capsys, run_file, tmp_path):
    file, layout = tmp_path / "gpus.yaml", tmp_path / "layout.yaml"
    file.write_text(yaml.safe_dump({name: known_gpus()["h200"].model_dump() | {"name": name} for name in ("ours", "theirs")}))
    assert (
        call(monkeypatch, run_file, "--actor.num_ranks", 8, "--gpu", "ours", "--gpu-file", file, "--top", 1, "--write", layout)
        == 0
    )
    config = load_config([run_file, layout])
    assert (config.cluster.gpu, config.cluster.gpu_file) == ("ours", file) and fit_problem(config, QWEN3_8B) is None
    assert call(monkeypatch, run_file, layout, "--top", 1) == 0
    assert "on 8 x ours" in words(capsys)
    assert call(monkeypatch, run_file, "--actor.num_ranks", 8, "--cluster.gpu", "theirs", "--gpu-file", file, "--top", 1) == 0
    assert "on 8 x theirs" in words(capsys)


def test_plan_of_a_model_with_experts_passes_the_checks_of_a_run(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_235B_A22B))
    layout = tmp_path / "layout.yaml"
    arguments = (tmp_path, "--gpus", 64, "--gpu", "b200", "--explain", "tp=4,pp=4,ep=8,etp=1", "--write", layout)
    plan = as_json(monkeypatch, capsys, *arguments)
    config = load_config([layout], [f"--model.path={tmp_path}", "--data.path=unused"])
    assert config.actor.expert_parallel_size > 1 and check_layout(config, QWEN3_235B_A22B) == []
    assert all(layout["layout"].startswith("TP4 PP4") and "EP8" in layout["layout"] for layout in plan["layouts"])


def test_nothing_fits_and_nothing_is_written(monkeypatch, capsys, tmp_path):
    arguments = (MODEL_FILE, "--gpus", 1, "--gpu", "a100-80")
    assert call(monkeypatch, *arguments) == 1
    text = words(capsys)
    assert "No layout fits." in text and "GPU memory is too small" in text
    assert call(monkeypatch, *arguments, "--write", tmp_path / "layout.yaml") == 2
    assert "has nothing to write" in capsys.readouterr().err and not (tmp_path / "layout.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", 64, "--gpu", "h100"), ("--gpu (h100) must be one of", "did you mean", "h100-80")),
        (("--gpus", 64), ("--gpu is missing", "h100-80")),
        (("--gpu", "h200"), ("--gpus is missing",)),
        (("--gpus", 100, "--gpu", "h200"), ("--gpus (100) must be a multiple of --gpus-per-node (8)", "use 96 or 104")),
        (("--gpus", 64, "--gpu", "h200", "--rollout-gpus", 64), ("--rollout-gpus (64) must be less than --gpus (64)",)),
        (("--gpus", 64, "--gpu", "h200", "--rollout-gpus", 12), ("--rollout-gpus (12) must be a multiple", "use 8 or 16")),
        (("--gpus", 64, "--gpu", "h200", "--rollout-gpus", 8, "--colocated"), ("exclude each other",)),
        (
            ("--gpus", 64, "--gpu", "h200", "--response-tokens", 40000),
            ("1024 + 40000 = 41024", "max_position_embeddings (40960)", "shorten one of them by 64"),
        ),
        (("--gpus", 64, "--gpu", "h200", "--mean-response-tokens", 99999), ("--mean-response-tokens (99999) must be above 0",)),
        (("--gpus", 64, "--gpu", "h200", "--explain", "tq=4"), ("tq must be one of tp",)),
        (("--gpus", 64, "--gpu", "h200", "--explain", "tp"), ("tp must be NAME=VALUE",)),
        (("--gpus", 8, "--gpu", "h200", "--explain", "tp=3"), ("--explain (tp=3) is no layout of 8 GPUs",)),
        (("--gpus", 64, "--gpu", "h200", "--respons-tokens", 9), ("--respons-tokens is no option of plan", "did you mean --response-tokens")),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_value_rule_and_remedy(monkeypatch, capsys, model, arguments, words):
    assert call(monkeypatch, model, *arguments) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in words), error
    assert "Traceback" not in error


def test_unknown_option_beside_a_configuration_is_refused(monkeypatch, capsys, run_file):
    assert call(monkeypatch, run_file, *SMALL, "--actor.num_rank", 8) == 2
    assert "did you mean --actor.num_ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({name: value for name, value in QWEN3_8B.items() if name != "hidden_size"}, "hidden_size"),
        (QWEN3_8B | {"model_type": "gpt9"}, "gpt9"),
        ({"architectures": []}, "has no model_type"),
        ([], "must hold a JSON object"),
    ],
)
def test_model_without_what_is_needed_is_refused(monkeypatch, capsys, tmp_path, content, words):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    assert call(monkeypatch, file, *SMALL) == 2
    assert words in capsys.readouterr().err


def test_path_that_is_nothing_is_refused(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, tmp_path / "missing.json", *SMALL) == 2
    assert "missing.json cannot be read" in capsys.readouterr().err
    assert call(monkeypatch, tmp_path, *SMALL) == 2
    assert f"{tmp_path} holds no config.json: it must be an HF directory or a run folder" in capsys.readouterr().err


def test_help_teaches_by_examples(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    text = words(capsys)
    assert "--explain tp=4,pp=2" in text and "Exit code 1: no layout fits" in text


def test_planning_loads_no_heavy_package(model):
    code = (
        "import sys; from dapo_megatron import cli; sys.argv = ['x', 'plan', *sys.argv[1:]]\n"
        "try: cli.main()\nexcept SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'megatron', 'ray', 'transformers', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model), *SMALL], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_page_is_drawn_by_a_browser_and_fetches_nothing(monkeypatch, capsys, model, tmp_path):
    page = tmp_path / "plan.html"
    assert call(monkeypatch, model, *SMALL, "--top", 4, "--html", page) == 0
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs a browser: install chromium")
    done = subprocess.run(
        [
            *(
                browser,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--host-resolver-rules=MAP * ~NOTFOUND",
            ),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=8000", "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    dom = done.stdout[done.stdout.index("<body") :]
    assert dom.count('class="main-svg"') >= 3, "three figures"
    assert dom.count('class="trace bars"') > 10 and 'class="trace scatter' in dom
    for part in (
        "The best of each cut of the model",
        "GPU memory",
        "optimizer state",
        "seconds of a rollout step",
        "of the card",
        "Rejected",
    ):
        assert part in dom
    head = page.read_text().partition("<script>")[0]
    assert "http" not in head and "<link" not in head
