"""Seconds of layers, optimizer steps, generation and whole rollout steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dapo_megatron.layout.calibration import Calibration
from dapo_megatron.layout.flops import forward_flops, training_flops, training_flops_per_token
from dapo_megatron.layout.hardware import gpu_named
from dapo_megatron.layout.layer_time import DISPATCH_LINK_SHARE, Cut, Machine, TimeOptions, head_seconds, layer_seconds
from dapo_megatron.layout.layout import FULL_RECOMPUTE, NO_RECOMPUTE, EngineLayout, Layout, Recompute
from dapo_megatron.layout.model_shape import Experts, GroupedQueryAttention, LatentAttention, ModelShape
from dapo_megatron.layout.rollout_time import rollout_seconds
from dapo_megatron.layout.step_time import step_time
from dapo_megatron.layout.train_time import MicroBatches, micro_batches, update_seconds
from dapo_megatron.layout.workload import Workload

DENSE = ModelShape(32, 4096, 14336, GroupedQueryAttention(32, 8, 128), None, (False,) * 32, 128256, tied=False)
MIXTURE = replace(DENSE, experts=Experts(64, 4, 2048, 2048), moe_layers=(False,) * 4 + (True,) * 28)
LATENT = replace(MIXTURE, attention=LatentAttention(32, 1536, 512, 128, 64, 128))
HEADLESS = replace(DENSE, vocab_size=1)
H100 = Machine(gpu_named("h100-80"))
BATCHES = MicroBatches(8, 8192, 4096)
WORKLOAD = Workload(num_prompts_per_step=64, num_samples_per_prompt=8, num_updates_per_rollout=2, max_response_tokens=8192)


def test_mean_and_limit_of_sampled_lengths():
    lengths = replace(WORKLOAD, mean_response_tokens=3000).response_lengths()
    assert lengths.mean() == pytest.approx(3000) and lengths.max() == 8192 and lengths.min() > 1


def test_longest_sequence_to_expect_grows_with_their_number():
    expected = [WORKLOAD.longest_of(number) - WORKLOAD.prompt_tokens for number in (1, 10, 1e6)]
    assert expected[0] == pytest.approx(np.median(WORKLOAD.response_lengths()), rel=0.02)
    assert expected[0] < expected[1] < expected[2] == 8192


def test_lengths_of_one_value_have_its_square():
    workload = replace(WORKLOAD, mean_response_tokens=1000, mean_prompt_tokens=24, length_spread=0.0)
    assert workload.mean_square == pytest.approx(1024) and workload.longest_of(500) == pytest.approx(1024)


def test_packed_sequences_cost_the_sum_of_their_squares():
    together = forward_flops(DENSE, 5000, 5000**2) - forward_flops(DENSE, 5000, 4000**2 + 1000**2)
    assert together == 32 * 2 * 4096 * (5000**2 - 4000**2 - 1000**2)
    assert training_flops(DENSE, 5000, 5000**2) == pytest.approx(5000 * training_flops_per_token(DENSE, 5000))


def test_experts_count_as_many_as_a_token_visits():
    per_layer = 2 * 4096 * (3 * (4 * 2048 + 2048) + 64)
    dense_layer = 2 * 4096 * 3 * 14336
    assert forward_flops(DENSE, 1, 0) - forward_flops(MIXTURE, 1, 0) == 28 * (dense_layer - per_layer)


def test_thin_products_reach_a_smaller_share_of_the_peak():
    def rate(rows: int) -> float:
        return 2 * rows * 4096 * 4096 / H100.matmul(rows, 4096, 4096)

    rates = [rate(rows) for rows in (64, 512, 4096, 32768)]
    assert rates == sorted(rates) and rates[-1] < 989e12 * 0.65 and rates[0] < 0.25 * rates[-1]


@pytest.mark.parametrize("chunks", [None, 2, 4])
def test_bubble_of_equal_stages(chunks: int | None):
    layout = Layout(pipeline_parallel_size=4, virtual_pipeline_size=chunks, data_parallel_size=2)
    update = update_seconds(H100, HEADLESS, layout, BATCHES)
    busy = update.forward.total + update.backward.total
    assert update.pipeline_bubble / busy == pytest.approx(3 / (8 * (chunks or 1)), rel=0.02)


def test_slowest_stage_sets_the_pace():
    even = update_seconds(H100, HEADLESS, Layout(pipeline_parallel_size=4), BATCHES)
    uneven = Layout(pipeline_parallel_size=4, num_layers_in_first_pipeline_stage=14, num_layers_in_last_pipeline_stage=6)
    assert update_seconds(H100, HEADLESS, uneven, BATCHES).forward.total == pytest.approx(even.forward.total * 14 / 8, rel=0.02)


def test_fewer_layers_beside_the_head_are_faster():
    shape = replace(DENSE, vocab_size=512_000)
    layout = Layout(pipeline_parallel_size=2)
    lighter = replace(layout, num_layers_in_first_pipeline_stage=19)
    assert update_seconds(H100, shape, lighter, BATCHES).total < update_seconds(H100, shape, layout, BATCHES).total


@pytest.mark.parametrize("shape", [DENSE, MIXTURE, LATENT])
def test_recompute_costs_up_to_one_more_forward_pass(shape: ModelShape):
    layout = Layout(expert_parallel_size=8 if shape.experts else 1, data_parallel_size=8)

    def again(recompute: Recompute) -> float:
        return update_seconds(H100, shape, replace(layout, recompute=recompute), BATCHES).recompute

    some = Recompute("selective", frozenset({"layernorm"}))
    more = Recompute("selective", frozenset({"layernorm", "moe", "mlp"}))
    forward = update_seconds(H100, replace(shape, vocab_size=1), layout, BATCHES).forward.total
    assert 0 < again(some) < again(more) < again(FULL_RECOMPUTE) == pytest.approx(forward, rel=0.02)
    block = Recompute("full", method="block", num_layers=8)
    assert again(block) == pytest.approx(again(FULL_RECOMPUTE) / 4)


@pytest.mark.parametrize(
    "name, few, many",
    [
        (
            "tensor_parallel",
            Layout(tensor_parallel_size=2, sequence_parallel=True),
            Layout(tensor_parallel_size=8, sequence_parallel=True),
        ),
        ("context_parallel", Layout(context_parallel_size=2), Layout(context_parallel_size=16)),
        (
            "expert_parallel",
            Layout(expert_parallel_size=2, data_parallel_size=2),
            Layout(expert_parallel_size=32, data_parallel_size=32),
        ),
    ],
)
def test_communication_within_layers(name: str, few: Layout, many: Layout):
    def seconds(layout: Layout) -> float:
        update = update_seconds(H100, MIXTURE, layout, MicroBatches(1, 65536, 4096))
        return getattr(update.forward, name) / layout_share(layout)

    def layout_share(layout: Layout) -> float:
        return 1 / layout.context_parallel_size

    assert getattr(update_seconds(H100, MIXTURE, Layout(), BATCHES).forward, name) == 0
    assert 0 < seconds(few) < seconds(many)


def test_collectives_between_nodes_take_the_network():
    inside, across = H100.collective(1e9, 8), H100.collective(1e9, 16)
    assert inside == pytest.approx(1e9 * 7 / 8 / (450e9 * H100.efficiency.link), rel=0.01)
    assert across > inside  # eight members of a node share eight network cards
    assert H100.collective(1e9, 2, stride=8) > 3 * H100.collective(1e9, 2)
    assert H100.collective(1e9, 1) == 0


def test_overlapped_gradients_wait_only_for_what_a_pass_does_not_cover():
    layout = Layout(data_parallel_size=64)
    exposed = update_seconds(H100, DENSE, layout, BATCHES).data_parallel
    overlapped = update_seconds(Machine(H100.gpu, TimeOptions(overlap_data_parallel=True)), DENSE, layout, BATCHES).data_parallel
    assert 0 < overlapped <= 0.06 * exposed


def test_fully_sharded_states_are_gathered_beside_other_layers():
    layout = Layout(data_parallel_size=16)
    plain, overlapped = (
        update_seconds(
            replace(H100, options=TimeOptions(fully_sharded=True, overlap_data_parallel=overlap)), DENSE, layout, BATCHES
        )
        for overlap in (False, True)
    )
    assert plain == overlapped


def test_fp8_weights_are_cast_once_a_step():
    fp8 = replace(H100, options=TimeOptions(precision="fp8"))
    once, twice = (update_seconds(fp8, DENSE, Layout(), MicroBatches(count, 1024, 1024)) for count in (1, 2))
    assert once.optimizer == twice.optimizer > update_seconds(H100, DENSE, Layout(), BATCHES).optimizer
    assert 2 * once.forward.memory == pytest.approx(twice.forward.memory)


def test_fp8_leaves_head_and_attention_in_bf16():
    fp8 = replace(H100, options=TimeOptions(precision="fp8"))
    cut = Cut.of(Layout())
    assert head_seconds(fp8, DENSE, cut, 4096) == head_seconds(H100, DENSE, cut, 4096)
    layers = [layer_seconds(machine, DENSE, cut, False, 4096, 4096, NO_RECOMPUTE).forward for machine in (fp8, H100)]
    assert layers[0].attention == layers[1].attention and layers[0].matmul < 0.65 * layers[1].matmul


def test_dispatch_once_per_node_sends_a_token_once_to_every_rank_within_the_node():
    once = replace(H100, options=TimeOptions(dispatch_once_per_node=True))
    nvlink = H100.gpu.nvlink_gb_per_second * 1e9
    ranks = 7 * (1 - (7 / 8) ** 8)  # of the other seven, with eight experts drawn at random
    assert once.all_to_all(8e9, 8, 8) == pytest.approx(1e9 * ranks / nvlink / DISPATCH_LINK_SHARE, rel=0.01)
    assert H100.all_to_all(8e9, 8, 8) == pytest.approx(7e9 / nvlink / H100.efficiency.link, rel=0.01)


@pytest.mark.parametrize("expert, longer", [(8, "rest"), (64, "sent")])
def test_experts_that_are_sent_to_beside_other_work_wait_for_the_longer(expert: int, longer: str):
    def layer(machine: Machine) -> tuple[float, float]:
        seconds = layer_seconds(machine, MIXTURE, Cut(1, 1, expert, 1, False), True, 8192, 4096, NO_RECOMPUTE)
        both = seconds.forward + seconds.backward
        return both.expert_parallel, both.total - both.expert_parallel

    beside = Machine(H100.gpu, TimeOptions(overlap_expert_parallel=True))
    (sent, rest), (waited, same) = layer(H100), layer(beside)
    assert same == pytest.approx(rest) and (sent > rest) is (longer == "sent")
    assert waited == pytest.approx(max(sent - rest, sent / 10))


def test_optimizer_on_the_host_is_slower_and_sharded_states_are_faster():
    def optimizer(**changes: object) -> float:
        return update_seconds(H100, DENSE, replace(Layout(data_parallel_size=8), **changes), BATCHES).optimizer  # type: ignore[arg-type]

    assert optimizer() < optimizer(use_distributed_optimizer=False) < optimizer(optimizer_offload_fraction=1.0)


def test_forward_pass_alone_is_the_forward_part_with_its_bubble():
    layout = Layout(pipeline_parallel_size=4)
    update = update_seconds(H100, HEADLESS, layout, BATCHES)
    alone = BATCHES.num_micro_batches * update.forward_alone + update.forward_bubble
    assert alone == pytest.approx(update.forward.total * (1 + 3 / 8) + update.pipeline_parallel / 2, rel=0.02)


def test_micro_batches_of_a_rank():
    layout = Layout(data_parallel_size=8, max_tokens_per_micro_batch=10240)
    batches = micro_batches(WORKLOAD, layout)
    tokens = 256 * WORKLOAD.sequence_tokens / 8
    assert batches.num_micro_batches * batches.tokens_per_micro_batch == pytest.approx(tokens)
    assert batches.num_micro_batches == -(-tokens // (10240 * 0.95))
    interleaved = replace(layout, pipeline_parallel_size=4, virtual_pipeline_size=2)
    assert micro_batches(WORKLOAD, interleaved).num_micro_batches % 4 == 0


def test_longest_sequence_is_never_cut():
    batches = micro_batches(WORKLOAD, Layout(data_parallel_size=256, max_tokens_per_micro_batch=10240))
    assert batches.tokens_per_micro_batch == pytest.approx(WORKLOAD.longest_of(256)) and batches.num_micro_batches == 1


ENGINE = EngineLayout(2, 4)


def _rollout(workload: Workload = WORKLOAD, tokens: int = 400_000, engine: EngineLayout = ENGINE):
    return rollout_seconds(H100, DENSE, engine, workload, tokens)


def test_generation_takes_at_least_the_longest_response_at_batch_one():
    weights = 2 * 8.03e9 / 2 / (3350e9 * H100.efficiency.memory)
    assert _rollout().total > 8192 * weights


def test_tail_grows_with_the_spread_of_lengths():
    even, spread = (_rollout(replace(WORKLOAD, mean_response_tokens=1500, length_spread=x)) for x in (0.2, 1.0))
    assert even.tail / even.total < spread.tail / spread.total


def test_more_room_for_the_cache_and_more_engines_are_faster():
    assert _rollout(tokens=1_000_000).total < _rollout(tokens=100_000).total
    assert _rollout(engine=EngineLayout(2, 8)).total < _rollout().total
    assert _rollout(tokens=1_000_000).batch_size > _rollout(tokens=100_000).batch_size


def test_streaming_runs_dry_once_and_waves_twice():
    assert _rollout(replace(WORKLOAD, sampler="streaming")).total < _rollout().total
    kept = replace(WORKLOAD, over_sampling=1.0)
    assert _rollout(replace(kept, sampler="streaming")) == _rollout(kept)


def test_few_sequences_read_few_experts():
    from dapo_megatron.layout.rollout_time import Decoder

    read = Decoder(H100, MIXTURE, 1).weight_bytes(np.array([1.0, 16.0, 1024.0]))
    assert read[0] < read[1] < read[2]
    assert read[2] == pytest.approx(2 * (28 * 64 * 3 * 4096 * 2048), rel=0.35)


LAYOUT = Layout(
    tensor_parallel_size=2,
    data_parallel_size=4,
    sequence_parallel=True,
    max_tokens_per_micro_batch=10240,
    engine=ENGINE,
)


def test_items_of_a_step_add_up():
    time = step_time(H100, DENSE, LAYOUT, WORKLOAD, 400_000)
    assert sum(item.seconds for item in time.items) == time.step_seconds > 0
    assert {item.phase for item in time.items} == {"rollout", "log_probs", "train", "sync"}
    assert len({(item.phase, item.name) for item in time.items}) == len(time.items)
    assert time.gpu_hours(100) == pytest.approx(time.step_seconds * 100 * 8 / 3600)
    assert 0.2 < time.mfu < 0.65
    assert time.tokens_per_gpu_second == pytest.approx(512 * WORKLOAD.sequence_tokens / 8 / time.step_seconds)


def test_training_alone_has_no_engines_to_wait_for():
    time = step_time(H100, DENSE, replace(LAYOUT, engine=None), WORKLOAD, None)
    assert {item.phase for item in time.items} == {"log_probs", "train"} and time.decode_bound is None


def test_log_probs_of_the_engine_save_a_pass():
    time = step_time(H100, DENSE, LAYOUT, replace(WORKLOAD, has_old_log_probs_pass=False), 400_000)
    assert time.phase_seconds("log_probs") == 0


def test_with_a_lag_only_the_longer_of_generation_and_training_counts():
    split = replace(LAYOUT, engine=EngineLayout(2, 4, colocated=False))
    apart = step_time(H100, DENSE, split, WORKLOAD, 400_000)
    beside = step_time(H100, DENSE, split, replace(WORKLOAD, rollout_lag=1), 400_000)
    training = apart.phase_seconds("log_probs") + apart.phase_seconds("train")
    longer = max(training, apart.phase_seconds("rollout"))
    assert beside.step_seconds == pytest.approx(longer + apart.phase_seconds("sync"))
    assert apart.num_gpus == 16 and apart.num_actor_gpus == 8


def test_swaps_cost_their_bytes_over_pcie_both_ways():
    without, swapped = (
        step_time(H100, DENSE, replace(LAYOUT, swap_optimizer=swap, swap_parameters=swap), WORKLOAD, 400_000).phase_seconds(
            "sync"
        )
        for swap in (False, True)
    )
    parameters = 8.03e9 / 2
    assert swapped - without == pytest.approx(2 * (12 * parameters / 4 + 2 * parameters) / 55e9, rel=0.01)


def test_calibration_multiplies_phases():
    plain = step_time(H100, DENSE, LAYOUT, WORKLOAD, 400_000)
    corrected = step_time(H100, DENSE, LAYOUT, WORKLOAD, 400_000, Calibration("run", 3, rollout=2.0, train=1.5))
    assert corrected.phase_seconds("rollout") == pytest.approx(2 * plain.phase_seconds("rollout"))
    assert corrected.phase_seconds("log_probs") == pytest.approx(1.5 * plain.phase_seconds("log_probs"))
    assert corrected.phase_seconds("sync") == pytest.approx(plain.phase_seconds("sync"))


def test_engines_without_room_are_a_programming_error():
    with pytest.raises(ValueError, match="kv_cache_tokens is None"):
        step_time(H100, DENSE, LAYOUT, WORKLOAD, None)
