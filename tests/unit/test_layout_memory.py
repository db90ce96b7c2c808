"""Memory of a layout: exact counts against hand arithmetic, and how each setting moves the peak."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dapo_megatron.layout.activations import layer_activations
from dapo_megatron.layout.engine_memory import engine_memory, kv_elements_per_token
from dapo_megatron.layout.fit import reason_not_fitting
from dapo_megatron.layout.in_flight import passes_in_flight
from dapo_megatron.layout.layout import FULL_RECOMPUTE, EmbeddedEngine, EngineLayout, Layout, Recompute
from dapo_megatron.layout.memory import (
    engine_room_bytes,
    plan_memory,
    resident_bytes,
    train_allocated_bytes,
    train_needed_bytes,
)
from dapo_megatron.layout.memory_records import DEFAULT_OPTIONS, MemoryOptions, Precision
from dapo_megatron.layout.model_shape import ModelShape
from dapo_megatron.layout.parameters import num_active_params, num_params
from dapo_megatron.layout.states import stage_states
from tests.published_configs import DEEPSEEK_V3, LLAMA3_2_1B, LLAMA3_70B, MIXTRAL_8X7B, QWEN2_5_32B, QWEN3_8B, QWEN3_235B_A22B

GIB = 2**30
H100 = 80 * GIB
QWEN_32B = ModelShape.from_hf(QWEN2_5_32B)
EIGHT_WAY = Layout(
    tensor_parallel_size=8, data_parallel_size=16, sequence_parallel=True, max_tokens_per_micro_batch=32768, num_micro_batches=4
)


@pytest.mark.parametrize(
    "config, billions, active",
    [
        (QWEN3_8B, 8.19, 8.19),
        (LLAMA3_70B, 70.55, 70.55),
        (QWEN2_5_32B, 32.76, 32.76),
        (MIXTRAL_8X7B, 46.70, 12.88),
        (QWEN3_235B_A22B, 235.09, 22.19),
        (DEEPSEEK_V3, 671.03, 37.55),
    ],
)
def test_parameters_are_the_published_number(config, billions, active):
    shape = ModelShape.from_hf(config)
    assert round(num_params(shape) / 1e9, 2) == billions and round(num_active_params(shape) / 1e9, 2) == active


def test_one_rank_holds_eighteen_bytes_a_parameter():
    shape = ModelShape.from_hf(LLAMA3_2_1B)
    (states,) = stage_states(shape, Layout(use_distributed_optimizer=False), MemoryOptions())
    assert states.num_params == num_params(shape)
    assert states.weight_bytes + states.grad_bytes + states.optimizer_bytes == 18 * num_params(shape)


def test_distributed_optimizer_shards_only_its_state():
    shape = ModelShape.from_hf(LLAMA3_70B)
    (states,) = stage_states(shape, Layout(data_parallel_size=8), MemoryOptions())
    assert states.weight_bytes == pytest.approx(2 * num_params(shape), rel=1e-6)
    assert states.grad_bytes == pytest.approx(4 * num_params(shape), rel=1e-6)
    assert states.optimizer_bytes == pytest.approx(12 / 8 * num_params(shape), rel=1e-6)


def test_fully_sharded_states_are_shards_and_what_is_whole_for_a_moment():
    shape = ModelShape.from_hf(LLAMA3_70B)
    (states,) = stage_states(shape, Layout(data_parallel_size=64), MemoryOptions(fully_sharded=True))
    vocabulary = 128256 * 8192
    layer = (num_params(shape) - 2 * vocabulary - 8192) // 80
    assert states.weight_bytes == 2 * (num_params(shape) / 64 + 2 * layer + 2 * vocabulary + 8192)
    assert states.grad_bytes == 4 * (num_params(shape) / 64 + vocabulary + 4096)
    assert states.optimizer_bytes == 12 * num_params(shape) / 64


def test_experts_are_sharded_over_their_own_data_parallel_ranks():
    shape = ModelShape.from_hf(MIXTRAL_8X7B)
    alone = stage_states(shape, Layout(expert_parallel_size=8, data_parallel_size=8), MemoryOptions())[0]
    twice = stage_states(shape, Layout(expert_parallel_size=8, data_parallel_size=16), MemoryOptions())[0]
    experts = 32 * 3 * 4096 * 14336
    dense = num_params(shape) - 8 * experts
    assert alone.num_params == twice.num_params == dense + experts
    assert alone.optimizer_bytes == 12 * (dense / 8 + experts) and twice.optimizer_bytes == 12 * (dense / 16 + experts / 2)


def test_tied_matrix_is_once_on_one_stage_and_twice_on_two():
    shape = ModelShape.from_hf(LLAMA3_2_1B)
    one = stage_states(shape, Layout(), MemoryOptions())
    two = stage_states(shape, Layout(pipeline_parallel_size=2), MemoryOptions())
    assert sum(stage.num_params for stage in two) - one[0].num_params == 128256 * 2048


def test_bf16_moments_and_offload_leave_the_device():
    options = MemoryOptions(precision=Precision(moment_bytes=2))
    (states,) = stage_states(QWEN_32B, replace(EIGHT_WAY, optimizer_offload_fraction=0.5), options)
    assert states.optimizer_bytes == states.host_optimizer_bytes == pytest.approx(states.num_params * 8 / 16 / 2, rel=1e-6)


@pytest.mark.parametrize(
    "stage, stages, chunks, micro_batches, passes",
    [
        (0, 4, 1, 32, (4,)),
        (3, 4, 1, 32, (1,)),
        (0, 4, 1, 2, (2,)),
        (0, 2, 2, 8, (3, 2)),
        (3, 4, 8, 4, (4, 4, 4, 4, 4, 4, 4, 1)),
        (0, 4, 2, 32, (7, 4)),
    ],
)
def test_passes_in_flight(stage, stages, chunks, micro_batches, passes):
    assert passes_in_flight(stage, stages, chunks, micro_batches) == passes


@pytest.mark.parametrize("config", [QWEN3_8B, LLAMA3_70B, MIXTRAL_8X7B, QWEN3_235B_A22B, DEEPSEEK_V3])
def test_fp8_halves_what_linear_layers_keep_and_copies_their_weights(config):
    shape, layout = ModelShape.from_hf(config), Layout(data_parallel_size=8, max_tokens_per_micro_batch=4096)
    bf16, beside, alone = (
        MemoryOptions(precision=precision)
        for precision in (
            Precision(),
            Precision(linear_weight_bytes=4, linear_input_bytes=1),
            Precision(linear_weight_bytes=2, linear_input_bytes=1),
        )
    )
    states = [stage_states(shape, layout, options)[0] for options in (bf16, beside, alone)]
    in_layers = num_params(shape) - 2 * shape.vocab_size * shape.hidden_size
    assert states[1].weight_bytes - states[0].weight_bytes == pytest.approx(2 * in_layers, rel=1e-3)
    assert states[2].weight_bytes == states[0].weight_bytes and states[1].optimizer_bytes == states[0].optimizer_bytes
    kinds = set(shape.moe_layers)
    kept = [
        [layer_activations(shape, has_experts, layout, options).kept for has_experts in sorted(kinds)]
        for options in (bf16, alone)
    ]
    assert all(0.6 * high < low < 0.95 * high for high, low in zip(*kept, strict=True))


def test_fp8_copies_of_a_fully_sharded_model_are_sharded_too():
    shape, layout = ModelShape.from_hf(LLAMA3_70B), Layout(data_parallel_size=64)
    weights = [
        stage_states(shape, layout, MemoryOptions(fully_sharded=True, precision=precision))[0].weight_bytes
        for precision in (Precision(), Precision(linear_weight_bytes=4, linear_input_bytes=1))
    ]
    assert 1 < weights[1] / weights[0] < 1.7


def test_less_is_kept_the_more_is_recomputed():
    def peak(recompute: Recompute) -> float:
        return train_allocated_bytes(QWEN_32B, replace(EIGHT_WAY, recompute=recompute))[0]

    modules = Recompute("selective", frozenset({"mlp"}))
    block = Recompute("full", method="block", num_layers=32)
    everything, parts, half, full = peak(Recompute()), peak(modules), peak(block), peak(FULL_RECOMPUTE)
    assert full < half < everything and full < parts < everything


def test_first_stage_of_a_pipeline_holds_the_most_activations():
    layout = replace(EIGHT_WAY, pipeline_parallel_size=4, data_parallel_size=4, num_micro_batches=8)
    activations = [stage.phases[0].bytes_of("activations: attention") for stage in plan_memory(QWEN_32B, layout, H100).stages]
    assert activations[0] == 4 * activations[3] and activations[1] == 3 * activations[3]


def test_whole_logits_take_what_the_issue_trackers_report_and_chunks_do_not():
    shape = ModelShape.from_hf(QWEN3_8B)
    layout = Layout(max_tokens_per_micro_batch=20480)
    unfused = plan_memory(shape, layout, H100, MemoryOptions(head_loss="unfused")).fullest.phases[0]
    assert unfused.bytes_of("LM head and loss") > 6 * 20480 * 151936
    short, long = (
        plan_memory(shape, replace(layout, max_tokens_per_micro_batch=tokens), H100).fullest.phases[1] for tokens in (1024, 20480)
    )
    logits = 6 * 1024 * 151936
    assert short.bytes_of("LM head and loss") + short.bytes_of("forward workspace") > logits
    assert long.bytes_of("LM head and loss") < 6 * 20480 * 151936 / 4


def test_packs_of_varying_sizes_need_a_larger_margin_in_training_the_more_is_kept():
    def margin(layout: Layout, **changes: bool) -> tuple[int, ...]:
        plan = plan_memory(QWEN_32B, layout, H100, MemoryOptions(**changes))
        return tuple(phase.bytes_of("allocator margin") for phase in plan.stages[0].phases)

    (train, log_probs), (of_one_size, alone) = margin(EIGHT_WAY), margin(EIGHT_WAY, varying_sizes=False)
    phase = plan_memory(QWEN_32B, EIGHT_WAY, H100).stages[0].phases[0]
    kept = sum(item.num_bytes for item in phase.items if item.name.startswith("activations") or item.name == "backward workspace")
    assert train - of_one_size == pytest.approx(0.35 * kept, abs=10) and log_probs == alone
    assert margin(replace(EIGHT_WAY, recompute=FULL_RECOMPUTE))[0] - of_one_size < 0
    assert train_needed_bytes(QWEN_32B, EIGHT_WAY) == pytest.approx(phase.total_bytes, abs=10)


def test_items_add_up_and_margin_is_among_them():
    engine = EngineLayout(tensor_parallel_size=4, num_engines=32, mem_fraction_static=0.5)
    plan = plan_memory(QWEN_32B, replace(EIGHT_WAY, engine=engine, swap_optimizer=True, swap_parameters=True), H100)
    (stage,) = plan.stages
    assert [phase.phase for phase in stage.phases] == ["train", "log_probs", "rollout", "sync"]
    for phase in stage.phases:
        assert phase.total_bytes == sum(item.num_bytes for item in phase.items)
        assert phase.bytes_of("allocator margin") >= 3 * GIB and phase.bytes_of("CUDA context and NCCL") > 0
    rollout = stage.phases[2]
    assert rollout.bytes_of("weights") == 0
    assert rollout.bytes_of("KV cache") + rollout.bytes_of("engine weights") == pytest.approx(0.5 * H100)
    assert plan.kv_cache_tokens == rollout.bytes_of("KV cache") * 4 // (2 * 2 * 64 * 8 * 128)
    assert plan.host_bytes > 8 * 6 * GIB


def test_split_engine_has_its_own_account():
    engine = EngineLayout(tensor_parallel_size=2, num_engines=4, colocated=False)
    plan = plan_memory(QWEN_32B, replace(EIGHT_WAY, engine=engine), H100)
    assert [phase.phase for phase in plan.stages[0].phases] == ["train", "log_probs"]
    assert plan.engine is not None and plan.engine.total_bytes < H100


@pytest.mark.parametrize("config, kib", [(QWEN3_8B, 144), (DEEPSEEK_V3, 68.625), (QWEN2_5_32B, 256)])
def test_kv_cache_of_a_token(config, kib):
    assert kv_elements_per_token(ModelShape.from_hf(config), 1) * 2 / 1024 == kib


def test_kv_groups_are_repeated_on_more_ranks_than_groups():
    shape = ModelShape.from_hf(QWEN3_8B)
    assert kv_elements_per_token(shape, 8) == kv_elements_per_token(shape, 16)
    latent = ModelShape.from_hf(DEEPSEEK_V3)
    assert kv_elements_per_token(latent, 1) == kv_elements_per_token(latent, 16)


def test_embedded_engine_holds_a_whole_model_and_its_batch_all_the_time():
    shape = ModelShape.from_hf(QWEN3_8B)
    alone = Layout(data_parallel_size=4, max_tokens_per_micro_batch=4096)
    engine = EmbeddedEngine(num_engines=6, num_rows=64, max_sequence_tokens=2048, element_bytes=2)
    weights, cache = 2 * num_params(shape), 64 * 2048 * 144 * 1024
    plain, beside = plan_memory(shape, alone, H100), plan_memory(shape, replace(alone, embedded=engine), H100)
    for before, after in zip(
        plain.stages[0].phases, beside.stages[0].phases, strict=False
    ):  # two engines on the fullest of four GPUs
        assert after.total_bytes - before.total_bytes == pytest.approx(2 * (weights + cache + 0.6 * GIB), rel=1e-6)
    rollout = beside.stages[0].phases[-1]
    assert rollout.phase == "rollout" and rollout.bytes_of("KV cache") == 2 * cache and rollout.bytes_of("engine workspace")
    assert beside.engine is None and beside.kv_cache_tokens is None


def test_embedded_engine_of_the_ranks_own_process_gives_its_cache_back():
    shape = ModelShape.from_hf(LLAMA3_2_1B)
    engine = EmbeddedEngine(num_rows=64, max_sequence_tokens=2048, has_own_process=False)
    train, *_, rollout = plan_memory(shape, Layout(embedded=engine), H100).stages[0].phases
    assert not train.bytes_of("KV cache") and not train.bytes_of("engine context") and train.bytes_of("engine weights")
    assert rollout.bytes_of("KV cache") == 4 * 64 * 2048 * 2 * 16 * 8 * 64


def test_embedded_engine_on_a_gpu_of_its_own_has_its_own_account():
    engine = EmbeddedEngine(num_rows=256, max_sequence_tokens=4096, colocated=False)
    memory = plan_memory(ModelShape.from_hf(DEEPSEEK_V3), Layout(embedded=engine), H100)
    assert memory.engine is not None and memory.engine.bytes_of("engine weights") == 4 * num_params(
        ModelShape.from_hf(DEEPSEEK_V3)
    )
    # Heads are unfolded: 128 keys of 192 and values of 128 a layer.
    assert memory.engine.bytes_of("KV cache") == 4 * 256 * 4096 * 61 * 128 * (192 + 128)
    assert not any(phase.bytes_of("engine weights") for phase in memory.stages[0].phases)


def test_engine_weights_are_the_models():
    weights = engine_memory(QWEN_32B, EngineLayout(), MemoryOptions()).weight_bytes
    assert weights == pytest.approx(2 * num_params(QWEN_32B), rel=1e-3)


def test_checkpoint_is_fourteen_bytes_a_parameter():
    checkpoint = plan_memory(QWEN_32B, EIGHT_WAY, H100).checkpoint
    assert checkpoint.total_bytes == 14 * num_params(QWEN_32B)
    assert checkpoint.save_seconds == pytest.approx(14 * num_params(QWEN_32B) / (2e9 * 16))


@pytest.mark.parametrize("colocated", [True, False])
def test_engine_of_the_size_of_the_room_just_fits(colocated):
    layout = replace(EIGHT_WAY, swap_optimizer=True, engine=EngineLayout(tensor_parallel_size=4, colocated=colocated))
    assert layout.engine is not None
    engine = engine_memory(QWEN_32B, layout.engine, DEFAULT_OPTIONS)
    resident = resident_bytes(QWEN_32B, layout) if colocated else None
    fraction = engine_room_bytes(engine, layout, resident, H100) / H100
    assert layout.engine is not None and 0 < fraction < 1

    def rollout_bytes(fraction: float) -> int:
        plan = plan_memory(QWEN_32B, replace(layout, engine=replace(layout.engine, mem_fraction_static=fraction)), H100)
        return (plan.engine or plan.stages[0].phases[2]).total_bytes

    assert rollout_bytes(fraction) == pytest.approx(H100, abs=10) and rollout_bytes(fraction + 0.01) > H100


def test_reason_names_stage_items_and_a_remedy():
    layout = replace(EIGHT_WAY, max_tokens_per_micro_batch=131072)
    reason = reason_not_fitting(plan_memory(QWEN_32B, layout, H100), layout, H100)
    assert reason is not None
    assert "in training (activations: MLP" in reason and "recompute more, or use fewer than 131072 tokens" in reason
    small = replace(EIGHT_WAY, max_tokens_per_micro_batch=4096)
    assert reason_not_fitting(plan_memory(QWEN_32B, small, H100), small, H100) is None


@pytest.mark.parametrize(
    "layout, words",
    [
        (Layout(use_distributed_optimizer=False), "share out the optimizer state"),
        (Layout(data_parallel_size=64), "over more ranks than TP1 x PP1"),
        (
            replace(EIGHT_WAY, recompute=FULL_RECOMPUTE, engine=EngineLayout(mem_fraction_static=0.95)),
            "swap weights and optimizer state out",
        ),
    ],
)
def test_remedy_fits_what_is_largest(layout, words):
    assert words in str(reason_not_fitting(plan_memory(QWEN_32B, layout, H100), layout, H100))
