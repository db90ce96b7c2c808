"""The search behind `plan`: what is enumerated, what is left out and why, what is best."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dapo_megatron.layout import search
from dapo_megatron.layout.calibration import Calibration
from dapo_megatron.layout.hardware import gpu_named
from dapo_megatron.layout.layout import FULL_RECOMPUTE, EngineLayout, Layout
from dapo_megatron.layout.model_shape import Experts, GroupedQueryAttention, ModelShape
from dapo_megatron.layout.plan import Candidate, PlanRequest, Rejection
from dapo_megatron.layout.report import best_of_cuts
from dapo_megatron.layout.search import evaluate, plan
from dapo_megatron.layout.space import recompute_choices, token_limits
from dapo_megatron.layout.workload import Workload

QWEN_7B = ModelShape(28, 3584, 18944, GroupedQueryAttention(28, 4, 128, qkv_bias=True), None, (False,) * 28, 152064, tied=False)
QWEN_30B = ModelShape(
    48, 2048, 6144, GroupedQueryAttention(32, 4, 128, qk_norm=True), Experts(128, 8, 768), (True,) * 48, 151936, tied=False
)
WORKLOAD = Workload(
    num_prompts_per_step=64,
    num_samples_per_prompt=8,
    num_updates_per_rollout=4,
    max_response_tokens=8192,
    mean_response_tokens=2500,
)
DENSE = PlanRequest("Qwen2.5-7B", QWEN_7B, WORKLOAD, gpu_named("h100-80"), 8)
MIXTURE = PlanRequest("Qwen3-30B-A3B", QWEN_30B, WORKLOAD, gpu_named("h200"), 16)
ENGINE = EngineLayout(2, 4, 0.5)
FITTING = Layout(
    tensor_parallel_size=4,
    data_parallel_size=2,
    sequence_parallel=True,
    max_tokens_per_micro_batch=9216,
    recompute=FULL_RECOMPUTE,
    engine=ENGINE,
)


@pytest.fixture(scope="module")
def dense_plan():
    return plan(DENSE)


@pytest.fixture(scope="module")
def mixture_plan():
    return plan(MIXTURE)


def test_every_layout_that_is_left_out_says_why_in_one_line(dense_plan, mixture_plan):
    for found in (dense_plan, mixture_plan):
        assert found.candidates and found.rejections
        for rejection in found.rejections:
            assert "\n" not in rejection.reason and 20 < len(rejection.reason) < 400
            assert any(character.isdigit() for character in rejection.reason)
        assert found.num_enumerated >= len(found.candidates) + len(found.rejections)


def test_everything_that_is_proposed_fits(dense_plan):
    for candidate in dense_plan.candidates:
        assert candidate.memory.peak_bytes <= DENSE.gpu.memory_bytes
        assert candidate.memory.kv_cache_tokens >= WORKLOAD.max_sequence_tokens
        assert isinstance(evaluate(DENSE, candidate.layout), Candidate)


def test_memory_rejections_are_above_the_device_and_carry_a_time(dense_plan):
    measured = [one for one in dense_plan.rejections if one.kind == "memory" and one.peak_bytes is not None]
    assert measured and all(one.peak_bytes > DENSE.gpu.memory_bytes and one.step_seconds > 0 for one in measured)


def test_fastest_goes_first_and_of_equals_the_simplest(dense_plan):
    seconds = [candidate.time.step_seconds for candidate in dense_plan.candidates]
    equal = [candidate for candidate in dense_plan.candidates if candidate.time.step_seconds <= 1.02 * min(seconds)]
    assert dense_plan.candidates[: len(equal)] == tuple(equal)
    assert equal[0].layout.num_chunks == min(candidate.layout.num_chunks for candidate in equal)
    assert seconds[len(equal) :] == sorted(seconds[len(equal) :])


@pytest.mark.parametrize("calibration", [None, Calibration("runs/hot", 4, rollout=0.5, train=0.25)])
def test_what_the_bound_leaves_out_is_slower(monkeypatch: pytest.MonkeyPatch, calibration: Calibration | None):
    """The same plan with every cut looked at has the same best layouts."""
    monkeypatch.setattr(search, "MIN_CUTS", 2)
    monkeypatch.setattr(search, "MAX_EQUAL_CUTS", 2)
    request = replace(DENSE, top=2, calibration=calibration)
    bounded, exhaustive = plan(request), plan(request, only=lambda layout: True)
    assert sum("at least" in one.reason for one in bounded.rejections) >= 3
    assert not any("at least" in one.reason for one in exhaustive.rejections)
    best, all_best = (
        sorted(candidate.time.step_seconds for candidate in found.candidates)[: request.top] for found in (bounded, exhaustive)
    )
    assert best == pytest.approx(all_best)


def test_offload_without_need_is_left_out_with_its_price_and_nothing_faster_is_lost(monkeypatch: pytest.MonkeyPatch):
    request = replace(DENSE, num_gpus=16)
    found = plan(request)
    needless = [one for one in found.rejections if "actor.offload saves" in one.reason]
    assert needless and all(one.kind == "slower" and one.layout.swap_optimizer and one.num_layouts >= 3 for one in needless)
    monkeypatch.setattr(search._Search, "_needless_swap", lambda *_: None)
    in_full = plan(request)
    assert len(in_full.candidates) > len(found.candidates)
    fastest = [{candidate.layout for candidate in best_of_cuts(one.candidates)[: request.top]} for one in (found, in_full)]
    assert fastest[0] == fastest[1]


def test_every_layout_of_the_table_says_what_would_gain(dense_plan):
    assert all(candidate.gains for candidate in best_of_cuts(dense_plan.candidates)[: DENSE.top])


@pytest.mark.parametrize("model", [QWEN_7B, QWEN_30B])
def test_rows_of_the_table_are_those_of_a_plan_that_accounts_for_all_memory(monkeypatch: pytest.MonkeyPatch, model: ModelShape):
    request = replace(MIXTURE, model=model, num_gpus=32, top=5)

    def rows() -> list[tuple[str, str, float]]:
        best = best_of_cuts(plan(request).candidates)[: request.top]
        return [(str(row.layout), str(row.layout.recompute), row.time.step_seconds) for row in best]

    monkeypatch.setattr(search, "MIN_CUTS", 8)
    quick, found = rows(), plan(request)
    assert any("the layouts shown take up to" in one.reason and "at least" not in one.reason for one in found.rejections)
    in_full = search._Search.of_cut
    monkeypatch.setattr(search._Search, "of_cut", lambda one, cut, worst: in_full(one, cut))
    assert quick == rows() and len(quick) == request.top


def test_only_some_cuts_are_looked_at():
    found = plan(DENSE, only=lambda layout: layout.tensor_parallel_size == 4)
    assert {candidate.layout.tensor_parallel_size for candidate in found.candidates} == {4}
    assert {rejection.layout.tensor_parallel_size for rejection in found.rejections} == {4}


def test_space_has_every_kind_of_cut(mixture_plan):
    layouts = [one.layout for one in (*mixture_plan.candidates, *mixture_plan.rejections)]
    assert {layout.expert_parallel_size for layout in layouts} >= {1, 2, 4, 8, 16}
    assert any(layout.expert_tensor_parallel_size > 1 for layout in layouts)
    assert any(layout.virtual_pipeline_size for layout in layouts)
    assert any(layout.num_layers_in_last_pipeline_stage for layout in layouts)
    assert any(layout.swap_optimizer for layout in layouts) and any(not layout.use_distributed_optimizer for layout in layouts)
    modules = {module for layout in layouts for module in layout.recompute.modules}
    assert modules == {"layernorm", "moe_act", "moe"}


def test_last_stage_with_the_head_gets_fewer_layers(dense_plan):
    uneven = [one.layout for one in (*dense_plan.candidates, *dense_plan.rejections)]
    stages = {layout.layers_per_stage(28) for layout in uneven if layout.num_layers_in_last_pipeline_stage}
    assert (15, 13) in stages and all(stage[-1] < max(stage) for stage in stages)


def test_rules_are_those_of_a_run():
    def reason(request: PlanRequest = DENSE, **changes: object) -> str:
        found = evaluate(request, replace(FITTING, **changes))  # type: ignore[arg-type]
        assert isinstance(found, Rejection) and found.kind == "rule"
        return found.reason

    assert reason(tensor_parallel_size=8, data_parallel_size=1) == (
        "actor.tensor_parallel_size (8) must divide num_attention_heads (28) of Qwen2.5-7B; use 1, 2 or 4, or set actor.pad_query_groups."
    )
    assert "actor.pipeline_parallel_size (3) must divide num_hidden_layers (28)" in reason(pipeline_parallel_size=3)
    assert "actor.expert_parallel_size (2) must be 1" in reason(expert_parallel_size=2)
    assert "data-parallel size (1024) must not exceed the samples of an optimizer step (128)" in reason(data_parallel_size=1024)
    assert "actor.expert_parallel_size (3) must divide num_experts (128)" in reason(MIXTURE, expert_parallel_size=3)
    assert "actor.expert_tensor_parallel_size (5) must divide moe_intermediate_size (768)" in reason(
        MIXTURE, expert_tensor_parallel_size=5
    )
    assert "(1 x 16 x 1) must divide the actor's ranks (8)" in reason(MIXTURE, expert_parallel_size=16)
    assert "actor.sequence_parallel must be true" in reason(MIXTURE, sequence_parallel=False)


def test_what_this_version_cannot_run_is_left_out_unless_asked_for():
    half = evaluate(DENSE, replace(FITTING, swap_optimizer=True))
    assert isinstance(half, Rejection) and half.kind == "release"
    assert "actor.offload moves optimizer and parameters together" in half.reason
    assert isinstance(evaluate(replace(DENSE, only_runnable=False), replace(FITTING, swap_optimizer=True)), Candidate)


def test_context_parallelism_is_offered_where_a_sequence_is_long_enough_for_it(dense_plan):
    """And fits where one rank cannot hold the activations of a sequence: 8192 tokens leave ranks of CP 8 1024, and CP 16 too few."""
    sizes = {candidate.layout.context_parallel_size for candidate in dense_plan.candidates}
    assert {1, 2} <= sizes and max(sizes) <= 8
    two = replace(FITTING, context_parallel_size=2, data_parallel_size=1)
    found = evaluate(DENSE, two)
    assert isinstance(found, Candidate) and found.time.step_seconds > 0


def test_logits_of_a_large_chunk_are_named_with_their_size():
    layout = replace(FITTING, tensor_parallel_size=1, data_parallel_size=8, sequence_parallel=False, log_prob_chunk_tokens=65536)
    found = evaluate(DENSE, replace(layout, max_tokens_per_micro_batch=65536, engine=replace(ENGINE, mem_fraction_static=0.1)))
    assert isinstance(found, Rejection) and found.kind == "memory"
    assert "LM head and loss" in found.reason and "actor.log_prob_chunk_tokens" in found.reason and "of 85.5 GB" in found.reason


def test_host_memory_bounds_offload():
    poor = replace(DENSE, gpu=DENSE.gpu.model_copy(update={"host_memory_gib_per_gpu": 8.0}))
    found = evaluate(poor, replace(FITTING, swap_optimizer=True, swap_parameters=True))
    assert isinstance(found, Rejection) and found.kind == "host_memory" and "exceeds 69 GB" in found.reason


def test_optimizer_on_the_host_is_the_last_resort():
    small = replace(DENSE, num_gpus=2, gpus_per_node=2)
    reasons = [rejection.reason for rejection in plan(small).rejections if rejection.kind == "release"]
    on_host = [reason for reason in reasons if "fits only with the optimizer in host memory" in reason]
    assert on_host
    planned = plan(replace(small, only_runnable=False))
    assert any(candidate.layout.optimizer_offload_fraction == 1 for candidate in planned.candidates)


def test_engines_of_their_own_leave_the_actor_its_memory():
    found = plan(replace(DENSE, num_gpus=16, num_rollout_gpus=8))
    best = found.candidates[0]
    assert best.layout.world_size == 8 and best.layout.engine.num_gpus == 8 and not best.layout.engine.colocated
    assert best.layout.engine.mem_fraction_static > 0.8 and not best.layout.swap_optimizer
    assert all(not candidate.layout.swap_optimizer for candidate in found.candidates)


def test_limit_names_the_longest_phase_and_how_full_the_device_is(dense_plan):
    assert all(candidate.limit.startswith(("generation", "training")) for candidate in dense_plan.candidates)
    assert all(" of 85.5 GB on stage " in candidate.limit for candidate in dense_plan.candidates)


def test_gains_name_changes_and_what_they_save(dense_plan):
    best = dense_plan.candidates[0]
    assert any(gain.startswith("rollout.sampler streaming: -") for gain in best.gains)
    assert any(gain.startswith("+1 node") for gain in best.gains)
    streaming = plan(replace(DENSE, workload=replace(WORKLOAD, sampler="streaming"), top=1))
    assert streaming.candidates[0].time.step_seconds < best.time.step_seconds
    assert not any("streaming" in gain for gain in streaming.candidates[0].gains)
    shown = best_of_cuts(dense_plan.candidates)[: DENSE.top]
    assert not any(candidate.gains for candidate in dense_plan.candidates if candidate not in shown)


def test_calibrated_plan_says_so():
    found = plan(replace(DENSE, calibration=Calibration("runs/hot", 4, rollout=0.5, train=0.25, sync=0.5), top=1))
    assert found.notes[-1] == "corrected by 4 steps of runs/hot: rollout x0.50, train x0.25, sync x0.50."


def test_assumed_lengths_and_what_was_not_run_on_gpus_are_noted(dense_plan, mixture_plan):
    for found in (dense_plan, mixture_plan):
        has_context = any(candidate.layout.context_parallel_size > 1 for candidate in found.candidates)
        assert ["CP above 1" in note for note in found.notes] == [True] * has_context
    assumed = plan(replace(DENSE, workload=replace(WORKLOAD, mean_response_tokens=None), top=1))
    assert "responses are taken to have 2731 tokens on average" in assumed.notes[0]


def test_token_limits_start_at_the_longest_sequence_and_end_with_the_share_of_a_rank():
    assert token_limits(DENSE, FITTING) == (9216, 18432, 36864)
    assert token_limits(DENSE, replace(FITTING, data_parallel_size=128)) == (9216,)


def test_recompute_choices_go_from_nothing_to_everything():
    assert [str(choice) for choice in recompute_choices(QWEN_30B)] == [
        "none",
        "layernorm",
        "layernorm+moe_act",
        "layernorm+moe",
        "full",
    ]
    assert [str(choice) for choice in recompute_choices(QWEN_7B)] == ["none", "layernorm", "layernorm+mlp", "full"]
