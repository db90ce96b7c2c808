"""How memory and time of well-known models move with every setting, on every kind of device."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dapo_megatron.layout.flops import training_flops_per_token
from dapo_megatron.layout.hardware import gpu_named
from dapo_megatron.layout.layer_time import Machine, TimeOptions
from dapo_megatron.layout.layout import FULL_RECOMPUTE, NO_RECOMPUTE, Layout, Recompute
from dapo_megatron.layout.memory import train_allocated_bytes
from dapo_megatron.layout.memory_records import MemoryOptions, Precision
from dapo_megatron.layout.model_shape import ModelShape
from dapo_megatron.layout.states import stage_states
from dapo_megatron.layout.train_time import MicroBatches, update_seconds
from tests.published_configs import DEEPSEEK_V3, LLAMA3_70B, MIXTRAL_8X7B, QWEN2_5_32B, QWEN3_8B, QWEN3_235B_A22B

GPT3_175B = ModelShape.from_megatron(
    {
        "num_layers": 96,
        "hidden_size": 12288,
        "num_attention_heads": 96,
        "vocab_size": 51200,
        "untie_embeddings_and_output_weights": True,
    }
)
DENSE = {"Qwen3-8B": QWEN3_8B, "Qwen2.5-32B": QWEN2_5_32B, "Llama 3 70B": LLAMA3_70B}
MIXTURES = {"Mixtral 8x7B": MIXTRAL_8X7B, "Qwen3-235B-A22B": QWEN3_235B_A22B, "DeepSeek-V3": DEEPSEEK_V3}
SHAPES = {name: ModelShape.from_hf(config) for name, config in {**DENSE, **MIXTURES}.items()} | {"GPT-3 175B": GPT3_175B}
OPTIONS = MemoryOptions(expert_imbalance=1.0)
TOKENS = 8192
PLAIN = TimeOptions()


def layout_of(shape: ModelShape, **sizes: object) -> Layout:
    """128 GPUs: TP2, two stages where layers allow it, experts over eight ranks."""
    stages = 2 if shape.num_layers % 2 == 0 else 1
    base = Layout(
        tensor_parallel_size=2,
        sequence_parallel=True,
        pipeline_parallel_size=stages,
        expert_parallel_size=8 if shape.experts else 1,
        data_parallel_size=64 // stages,
        max_tokens_per_micro_batch=TOKENS,
        num_micro_batches=8,
    )
    return replace(base, **sizes)


def peak(shape: ModelShape, layout: Layout, options: MemoryOptions = OPTIONS) -> float:
    return max(train_allocated_bytes(shape, layout, options))


def seconds(shape: ModelShape, layout: Layout, gpu: str = "h100-80", options: TimeOptions = PLAIN) -> float:
    batches = MicroBatches(layout.num_micro_batches, layout.max_tokens_per_micro_batch, 4096)
    return update_seconds(Machine(gpu_named(gpu), options), shape, layout, batches).total


@pytest.fixture(params=SHAPES, name="shape")
def _shape(request: pytest.FixtureRequest) -> ModelShape:
    return SHAPES[request.param]


@pytest.fixture(params=MIXTURES, name="mixture")
def _mixture(request: pytest.FixtureRequest) -> ModelShape:
    return SHAPES[request.param]


def test_more_tensor_parallel_ranks_hold_less_of_everything(shape):
    layouts = [layout_of(shape, tensor_parallel_size=size, data_parallel_size=64 // size) for size in (2, 4, 8)]
    weights = [max(states.weight_bytes for states in stage_states(shape, layout, OPTIONS)) for layout in layouts]
    peaks = [peak(shape, layout) for layout in layouts]
    assert weights == sorted(weights, reverse=True) and weights[0] > weights[-1]
    if not shape.experts:  # with as many experts a rank, fewer copies of the rest share out their optimizer state
        assert peaks == sorted(peaks, reverse=True)


def test_recompute_saves_memory_for_time(shape):
    part = "moe" if shape.experts else "mlp"
    choices = [NO_RECOMPUTE, Recompute("selective", frozenset({part})), FULL_RECOMPUTE]
    layouts = [layout_of(shape, recompute=choice) for choice in choices]
    peaks, times = [peak(shape, layout) for layout in layouts], [seconds(shape, layout) for layout in layouts]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    assert times == sorted(times) and times[-1] < 1.4 * times[0]


def test_fine_grained_recompute_saves_less_than_its_whole_part(mixture):
    none, activation, whole = (
        peak(mixture, layout_of(mixture, recompute=choice))
        for choice in (NO_RECOMPUTE, Recompute("selective", frozenset({"moe_act"})), Recompute("selective", frozenset({"moe"})))
    )
    assert whole < activation < none


def test_without_sequence_parallelism_more_is_kept(shape):
    assert peak(shape, layout_of(shape, sequence_parallel=False)) > peak(shape, layout_of(shape))


def test_context_parallelism_and_more_tokens_cancel(shape):
    """Twice the tokens on twice the ranks keep what one of them kept; the optimizer's state is cut once more."""
    one, two = layout_of(shape), layout_of(shape, context_parallel_size=2, max_tokens_per_micro_batch=2 * TOKENS)
    assert peak(shape, two) == pytest.approx(peak(shape, replace(one, data_parallel_size=2 * one.data_parallel_size)), rel=1e-3)


@pytest.mark.parametrize(
    "smaller",
    [{"grad_bytes": 2}, {"moment_bytes": 2}, {"grad_bytes": 2, "moment_bytes": 2}],
    ids=["bf16 gradients", "bf16 moments", "both"],
)
def test_smaller_states_save_their_bytes(shape, smaller):
    layout = layout_of(shape, data_parallel_size=8)
    before = stage_states(shape, layout, OPTIONS)[0]
    after = stage_states(shape, layout, replace(OPTIONS, precision=Precision(**smaller)))[0]
    assert after.weight_bytes == before.weight_bytes
    assert after.grad_bytes == pytest.approx(before.grad_bytes * smaller.get("grad_bytes", 4) / 4)
    assert after.optimizer_bytes == pytest.approx(before.optimizer_bytes * (4 + 2 * smaller.get("moment_bytes", 4)) / 12)


def test_whole_optimizer_needs_more(shape):
    assert peak(shape, layout_of(shape, use_distributed_optimizer=False)) > 1.5 * peak(shape, layout_of(shape))


def test_larger_vocabulary_costs_the_last_stage_and_untying_a_matrix(shape):
    larger = replace(shape, vocab_size=2 * shape.vocab_size)
    assert (
        train_allocated_bytes(larger, layout_of(shape), OPTIONS)[-1] > train_allocated_bytes(shape, layout_of(shape), OPTIONS)[-1]
    )
    single = Layout(data_parallel_size=8, max_tokens_per_micro_batch=TOKENS)
    matrix = 2 * shape.vocab_size * shape.hidden_size
    states = [stage_states(replace(shape, tied=tied), single, OPTIONS)[0].weight_bytes for tied in (True, False)]
    assert states[1] - states[0] == pytest.approx(matrix, rel=0.01)


def test_expert_tensor_parallelism_keeps_as_much_of_the_experts_as_expert_parallelism(mixture):
    by_expert, by_width = layout_of(mixture), layout_of(mixture, expert_parallel_size=4, expert_tensor_parallel_size=2)
    experts, widths = (stage_states(mixture, layout, OPTIONS)[0].num_params for layout in (by_expert, by_width))
    assert experts == widths
    assert peak(mixture, by_width) > peak(mixture, by_expert)  # every rank of a width's two has its tokens whole


def test_interleaving_trades_memory_for_bubble():
    shape = SHAPES["Qwen2.5-32B"]
    layouts = [
        layout_of(shape, pipeline_parallel_size=4, data_parallel_size=16, virtual_pipeline_size=count) for count in (None, 2, 4)
    ]
    peaks, times = [peak(shape, layout) for layout in layouts], [seconds(shape, layout) for layout in layouts]
    assert peaks[0] < min(peaks[1:]) and times == sorted(times, reverse=True)


def test_more_micro_batches_dilute_the_bubble_and_the_optimizer(shape):
    few, many = (layout_of(shape, num_micro_batches=count) for count in (4, 64))
    assert seconds(shape, many) < 16 * seconds(shape, few)


@pytest.mark.parametrize("gpu", ["a100-80", "h100-80", "h200", "b200", "gb200", "gb300"])
def test_utilisation_is_one_that_is_measured(shape, gpu):
    """Long runs of dense models reach 30 to 60 % of the peak, of experts 10 to 50 %."""
    layout = layout_of(shape, num_micro_batches=64)
    options = TimeOptions(overlap_data_parallel=True, overlap_tensor_parallel=True, dispatch_once_per_node=True)
    flops = training_flops_per_token(shape, 4096) * TOKENS * 64 * layout.data_parallel_size
    mfu = flops / layout.world_size / seconds(shape, layout, gpu, options) / (gpu_named(gpu).bf16_tflops * 1e12)
    assert (0.1 if shape.experts else 0.3) < mfu < 0.65


def test_a_newer_device_is_faster(shape):
    layout = layout_of(shape, num_micro_batches=32)
    times = [seconds(shape, layout, gpu) for gpu in ("a100-80", "h100-80", "b200")]
    assert times == sorted(times, reverse=True)
