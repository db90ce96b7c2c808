"""Predicted against published step times, FLOPs and rankings (`python -m benchmarks.planner`)."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median

import pytest

from benchmarks.layout_rows import FACTS, HELD_OUT, read_rows
from benchmarks.planner_fit import fit
from benchmarks.planner_time import TimeScore, gpu_of, regrets, score_flops, timed_rows
from dapo_megatron.layout.flops import training_flops_per_token
from dapo_megatron.layout.model_shape import GroupedQueryAttention, ModelShape

SHARED = Path(__file__).parents[3] / "shared" / "data" / "layouts.csv"
ROWS = read_rows(FACTS)


def _scores(rows: list[dict[str, str]]) -> list[TimeScore]:
    return [row.score() for row in timed_rows(rows)[0]]


def test_step_times_and_rankings_of_the_stored_facts():
    scores = _scores(ROWS)
    errors = [abs(score.error) for score in scores]
    assert len(scores) == 18 and median(errors) <= 0.03 and max(errors) <= 0.08
    assert {score.inputs.gpu for score in scores} == {"A100-80", "B200-192", "H100-80"}
    groups = regrets(scores)
    assert len(groups) == 3 and max(regret for *_, regret in groups) <= 0.05


def test_step_times_and_rankings_of_all_published_rows():
    if not SHARED.is_file():
        pytest.skip(f"{SHARED} is not here; the stored facts are tested")
    scores = _scores(read_rows(SHARED))
    errors = [abs(score.error) for score in scores]
    assert len(scores) >= 56 and median(errors) <= 0.03 and max(errors) <= 0.10
    groups = regrets(scores)
    assert len(groups) >= 15 and mean(regret for *_, regret in groups) <= 0.01


def test_shares_fitted_to_small_models_predict_the_large_ones():
    rows = [row for row in timed_rows(ROWS)[0] if row.gpu.efficiency == "hopper"]
    large = [row for row in rows if "462B" in row.variants[0].model or "70B" in row.variants[0].model]
    shares = fit([row for row in rows if row not in large])
    assert len(large) == 2 and max(abs(row.score(shares).error) for row in large) <= 0.12


def test_flops_per_token_are_six_per_parameter_and_causal_attention():
    """Llama 3 70B at 8,192 tokens, counted by hand."""
    shape = ModelShape(80, 8192, 28672, GroupedQueryAttention(64, 8, 128), None, (False,) * 80, 128256, tied=False)
    matrices = 80 * (8192 * 128 * (64 + 8 + 8) + 64 * 128 * 8192 + 3 * 8192 * 28672) + 8192 * 128256
    attention = 80 * 2 * 2 * 8192 * 8192 // 2
    assert training_flops_per_token(shape, 8192) == 3 * (2 * matrices + attention)


def test_flops_of_a_row_are_compared_with_its_published_rates():
    shape_flops = training_flops_per_token(timed_rows(ROWS)[0][3].variants[0].shape, 4096)
    row = next(row for row in ROWS if row["id"] == "281")
    [score] = score_flops([row | {"tok_per_s_gpu": "1000", "tflops_gpu": f"{shape_flops * 1000 / 1e12 / 1.02}"}])
    assert score.error == pytest.approx(0.02)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"gbs": ""}, "the global batch size is not published"),
        ({"gbs": "n/a"}, "the global batch size is not published"),
        ({"step_s": "", "tok_per_s_gpu": "37556 (36108)"}, "tok_per_s_gpu (37556 (36108)) is not a number"),
        ({"gpu": "TPU-v5"}, "TPU-v5 is not in the table of GPUs"),
        ({"precision": "nvfp4"}, "precision nvfp4 has no measured efficiency"),
        ({"mbs": "", "gbs": "3"}, "neither a micro-batch size nor a batch"),
    ],
)
def test_row_without_a_time_model_is_refused_with_what_it_lacks(changes, words):
    row = next(row for row in ROWS if row["id"] == "281")
    timed, [(row_id, _, reason)] = timed_rows([row | changes])
    assert not timed and row_id == "281" and words in reason


def test_low_precision_is_faster_by_less_than_the_peaks():
    row = next(row for row in ROWS if row["id"] == "305")
    bf16, fp8 = _scores([row, row | {"precision": "fp8"}])
    assert 1.2 < bf16.predicted_seconds / fp8.predicted_seconds < 2


@pytest.mark.parametrize("name, known", [("H100-80(DGXC)", "H100 SXM 80 GB"), ("B200-192", "B200 SXM 180 GB"), ("L4", None)])
def test_device_of_a_row(name, known):
    gpu = gpu_of(name)
    assert (gpu and gpu.name) == known


def test_device_with_another_memory_than_the_tables():
    gpu, full = gpu_of("A100-40"), gpu_of("A100-80")
    assert gpu is not None and full is not None and gpu.memory_mib == 40 * 1024
    assert gpu.bf16_tflops == full.bf16_tflops and gpu.name != full.name


def test_step_times_and_rankings_that_nothing_was_fitted_to():
    """All but four rows, of Qwen3-30B-A3B in fp8 on H100 and B200, which take twice as long as planned."""
    scores = _scores(read_rows(HELD_OUT))
    unexplained = [score for score in scores if score.error < -0.5]
    assert len(scores) >= 63 and len(unexplained) == 4
    assert {(score.inputs.model, score.inputs.gpu) for score in unexplained} == {
        ("Qwen3_30B_a3B", "H100-80"),
        ("Qwen3_30B_a3B", "B200-180"),
    }
    assert median(abs(score.error) for score in scores) <= 0.09
    assert max(abs(score.error) for score in scores if score not in unexplained) <= 0.36
    medians = {"H100-80": 0.10, "B200-180": 0.15, "GB200-186": 0.05, "GB300-288": 0.08}
    for gpu, limit in medians.items():
        assert median(abs(score.error) for score in scores if score.inputs.gpu == gpu) <= limit
    assert mean(regret for *_, regret in regrets(scores)) <= 0.05


def test_a_row_that_says_how_tokens_are_sent_to_experts_is_taken_at_its_word():
    """Qwen3-30B-A3B in bf16 on 16 H100: plain all-to-all, HybridEP, and HybridEP beside other work."""
    scores = {score.inputs.row_id: score for score in _scores(read_rows(HELD_OUT))}
    assert max(abs(scores[row].error) for row in ("M6", "M10", "M11")) <= 0.06
    assert scores["M6"].predicted_seconds > 1.5 * scores["M10"].predicted_seconds
