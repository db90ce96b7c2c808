"""Seconds of one layer, of the LM head and of collectives on one GPU: every product, every element-wise pass, every collective.

Shape letters: T tokens of a micro-batch on one context-parallel rank, h hidden size, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from dapo_megatron.layout.efficiency import EFFICIENCIES, Efficiency
from dapo_megatron.layout.flops import attention_core_flops
from dapo_megatron.layout.hardware import Gpu
from dapo_megatron.layout.layout import Layout, Recompute
from dapo_megatron.layout.model_shape import Experts, GroupedQueryAttention, ModelShape

COLLECTIVE_LATENCY_SECONDS = 12e-6
"""Of one collective within a node, beside its bytes."""
DISPATCH_LINK_SHARE = 0.77
"""Of NVLink's rate, by the kernels that send a token once: DeepEP's README has 153 and 158 GB/s of H800's 200."""
ATTENTION_WITH_DROPOUT = 0.75
"""Rate of an attention kernel that draws random numbers over that of one that does not; assumed."""
NETWORK_LATENCY_SECONDS = 25e-6
"""Of one collective between nodes."""


@dataclass(frozen=True, slots=True)
class TimeOptions:
    """What decides time besides model, layout and GPU. The defaults are this project on GPUs."""

    precision: Literal["bf16", "fp8"] = "bf16"
    """Of matrix products in the linear layers of transformer layers; router and LM head stay in bf16."""
    grad_bytes: int = 4
    overlap_data_parallel: bool = False
    """Gradients are reduced and parameters gathered while other layers compute. FSDP always does."""
    overlap_tensor_parallel: bool = False
    """Collectives of tensor parallelism run inside the matrix products (user buffers)."""
    dispatch_once_per_node: bool = False
    """A token goes once to every node, and there to every rank, that has some of its experts (DeepEP); False: once to every expert."""
    overlap_expert_parallel: bool = False
    """Tokens of one micro-batch are sent to experts and back while another one is computed."""
    dropout: bool = False
    """In attention and on both residual branches."""
    fully_sharded: bool = False
    """FSDP: parameters are gathered for every forward and backward pass, gradients scattered after every backward pass."""
    gpus_per_node: int = 8


@dataclass(frozen=True, slots=True)
class Seconds:
    """Time of something on one GPU, by what it waits for."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    """Element-wise passes."""
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0
    expert_parallel: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.matmul + self.attention + self.memory + self.tensor_parallel + self.context_parallel + self.expert_parallel

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.memory + other.memory,
            self.tensor_parallel + other.tensor_parallel,
            self.context_parallel + other.context_parallel,
            self.expert_parallel + other.expert_parallel,
        )

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(
            self.matmul * factor,
            self.attention * factor,
            self.memory * factor,
            self.tensor_parallel * factor,
            self.context_parallel * factor,
            self.expert_parallel * factor,
        )


NO_TIME = Seconds()


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU, its links and the shares of their peaks that kernels reach."""

    gpu: Gpu
    options: TimeOptions = TimeOptions()
    shares: Efficiency | None = None
    """None: those of the GPU's generation."""

    @property
    def efficiency(self) -> Efficiency:
        """The shares of peaks that kernels reach."""
        return EFFICIENCIES[self.gpu.efficiency] if self.shares is None else self.shares

    def in_bf16(self) -> Machine:
        """The same machine where matrix products are in bf16."""
        return self if self.options.precision == "bf16" else replace(self, options=replace(self.options, precision="bf16"))

    def __hash__(self) -> int:
        return hash(
            (self.gpu.name, self.options, self.shares)
        )  # for the caches: a model's own hash goes through all of its fields

    def matmul(self, rows: float, columns: float, depth: float, count: float = 1) -> float:
        """`count` products [rows, depth] x [depth, columns]: arithmetic, plus the bytes of all three, plus launches."""
        efficiency = self.efficiency
        peak = self.gpu.bf16_tflops
        if self.options.precision == "fp8":
            peak = self.gpu.fp8_tflops or peak
        flops = 2 * rows * columns * depth
        operand = 1 if self.options.precision == "fp8" else 2
        num_bytes = operand * (rows * depth + depth * columns) + 2 * rows * columns
        return count * (
            flops / (peak * 1e12 * efficiency.matmul)
            + num_bytes / (self.gpu.hbm_gb_per_second * 1e9 * efficiency.memory)
            + efficiency.launch_seconds
        )

    def attention(self, flops: float, *, backward: bool) -> float:
        """The attention kernel in bf16."""
        efficiency = self.efficiency
        share = efficiency.attention_backward if backward else efficiency.attention_forward
        if self.options.dropout:
            share *= ATTENTION_WITH_DROPOUT
        return flops / (self.gpu.bf16_tflops * 1e12 * share) + efficiency.launch_seconds

    def stream(self, num_bytes: float, num_kernels: int = 1) -> float:
        """Element-wise kernels that read and write so many bytes together."""
        efficiency = self.efficiency
        return num_bytes / (self.gpu.hbm_gb_per_second * 1e9 * efficiency.memory) + num_kernels * efficiency.launch_seconds

    def collective(self, num_bytes: float, group: int, stride: int = 1) -> float:
        """All-gather or reduce-scatter of `num_bytes` over `group` ranks that lie `stride` ranks apart (a ring)."""
        if group == 1:
            return 0.0
        rate, latency = self.link(group, stride)
        return num_bytes * (group - 1) / group / rate + latency

    def all_to_all(self, num_bytes: float, group: int, copies_per_token: int) -> float:
        """Every rank sends `num_bytes`, spread evenly over a group of neighbours; what leaves the node takes the network."""
        if group == 1:
            return 0.0
        efficiency = self.efficiency
        near = min(group, self.gpu.nvlink_domain_gpus)
        inside_bytes = num_bytes * (near - 1) / group
        if self.options.dispatch_once_per_node:
            ranks_of_token = (near - 1) * (1 - (1 - 1 / group) ** copies_per_token)
            inside_bytes = min(inside_bytes, num_bytes / copies_per_token * ranks_of_token)
        share = DISPATCH_LINK_SHARE if self.options.dispatch_once_per_node else efficiency.link
        inside = inside_bytes / (self.gpu.nvlink_gb_per_second * 1e9 * share)
        sent = num_bytes * (group - near) / group
        if self.options.dispatch_once_per_node:
            num_nodes = group / near
            nodes_of_token = (num_nodes - 1) * (1 - (1 - 1 / num_nodes) ** copies_per_token)
            sent = min(sent, num_bytes / copies_per_token * nodes_of_token)
        outside = sent / (self.gpu.internode_gb_per_second * 1e9 * efficiency.network)
        return max(inside, outside) + (NETWORK_LATENCY_SECONDS if group > near else COLLECTIVE_LATENCY_SECONDS)

    def link(self, group: int, stride: int) -> tuple[float, float]:
        """Bytes per second and latency of a ring; over nodes the members in one node use their network cards together."""
        efficiency = self.efficiency
        nvlink = self.gpu.nvlink_gb_per_second * 1e9 * efficiency.link
        if group * stride <= self.gpu.nvlink_domain_gpus:
            return nvlink, COLLECTIVE_LATENCY_SECONDS
        members = max(1, self.gpu.nvlink_domain_gpus // stride)
        network = members * self.gpu.internode_gb_per_second * 1e9 * efficiency.network
        return min(nvlink, network), NETWORK_LATENCY_SECONDS

    def point_to_point(self, num_bytes: float, stride: int) -> float:
        """One rank to the one `stride` ranks away."""
        return num_bytes / self.link(2, stride)[0] + COLLECTIVE_LATENCY_SECONDS


@dataclass(frozen=True, slots=True)
class LayerSeconds:
    """Forward, backward and what recompute adds to the backward pass."""

    forward: Seconds
    backward: Seconds
    recompute: Seconds


@dataclass(frozen=True, slots=True)
class Cut:
    """What of a layout decides the time of one layer."""

    tensor: int
    context: int
    expert: int
    expert_tensor: int
    sequence_parallel: bool

    @classmethod
    def of(cls, layout: Layout) -> Cut:
        """The sizes of a layout."""
        return cls(
            layout.tensor_parallel_size,
            layout.context_parallel_size,
            layout.expert_parallel_size,
            layout.expert_tensor_parallel_size,
            layout.sequence_parallel,
        )


@lru_cache(maxsize=200_000)
def layer_seconds(
    machine: Machine,
    shape: ModelShape,
    cut: Cut,
    has_experts: bool,
    num_tokens: float,
    mean_square: float,
    recompute: Recompute,
) -> LayerSeconds:
    """One layer over T = `num_tokens`; `mean_square` is the sum of squared sequence lengths over the sum of lengths."""
    without_experts = replace(cut, expert=1, expert_tensor=1)  # attention is the same under any expert parallelism
    attention = _attention(machine, shape, without_experts, num_tokens, mean_square)
    rest = _experts(machine, shape, cut, num_tokens) if has_experts else _mlp(machine, shape, without_experts, num_tokens)
    forward, backward = attention.forward + rest.forward, attention.backward + rest.backward
    if machine.options.overlap_expert_parallel:
        forward, backward = _beside_another(forward, backward)
    if recompute.granularity == "full":
        return LayerSeconds(forward, backward, forward)
    names = {name for module in recompute.modules for name in _RECOMPUTED[module]}
    again = [block.parts[name].forward for block in (attention, rest) for name in sorted(names & block.parts.keys())]
    return LayerSeconds(forward, backward, sum(again, NO_TIME))


def _beside_another(forward: Seconds, backward: Seconds) -> tuple[Seconds, Seconds]:
    """Expert-parallel communication runs beside all the rest of a layer, in both directions; a tenth is never covered."""
    sent = forward.expert_parallel + backward.expert_parallel
    if not sent:
        return forward, backward
    share = max(1 - (forward.total + backward.total - sent) / sent, 0.1)
    exposed = (replace(one, expert_parallel=one.expert_parallel * share) for one in (forward, backward))
    return next(exposed), next(exposed)


@dataclass(frozen=True, slots=True)
class _Part:
    forward: Seconds
    backward: Seconds


@dataclass(frozen=True, slots=True)
class _Block:
    """Attention or MLP of a layer, by the parts that recompute can name."""

    parts: Mapping[str, _Part]
    forward: Seconds
    backward: Seconds

    @classmethod
    def of(cls, parts: Mapping[str, _Part]) -> _Block:
        whole = _merge(*parts.values())
        return cls(parts, whole.forward, whole.backward)


_RECOMPUTED: Mapping[str, tuple[str, ...]] = {
    "core_attn": ("core",),
    "layernorm": ("norms",),
    "mla_up_proj": ("up_projections", "rope"),
    "mlp": ("mlp", "activation"),
    "moe": ("experts", "moe_activation", "shared", "router"),
    "moe_act": ("moe_activation",),
    "shared_experts": ("shared",),
}


def _linear(machine: Machine, rows: float, columns: float, depth: float, count: float = 1) -> _Part:
    """Forward, and both gradients; that of the weight is added to an fp32 buffer, read and written."""
    forward = machine.matmul(rows, columns, depth, count)
    input_grad = machine.matmul(rows, depth, columns, count)
    weight_grad = machine.matmul(columns, depth, rows, count)
    weight_grad += machine.stream(count * 2 * machine.options.grad_bytes * columns * depth, 0)
    if machine.options.precision == "bf16":
        return _Part(Seconds(matmul=forward), Seconds(matmul=input_grad + weight_grad))
    # The input, and the gradient of the output, are read in bf16 and written in fp8, as they are and transposed; weights once a step.
    cast_forward = machine.stream(4 * count * rows * depth, int(count))
    cast_backward = machine.stream(4 * count * rows * columns, int(count))
    return _Part(Seconds(matmul=forward, memory=cast_forward), Seconds(matmul=input_grad + weight_grad, memory=cast_backward))


def _passes(machine: Machine, num_bytes: float, num_kernels: int = 1) -> _Part:
    """Element-wise work: backward reads and writes twice as much."""
    return _Part(
        Seconds(memory=machine.stream(num_bytes, num_kernels)), Seconds(memory=machine.stream(2 * num_bytes, num_kernels))
    )


def _merge(*parts: _Part) -> _Part:
    return _Part(sum((part.forward for part in parts), NO_TIME), sum((part.backward for part in parts), NO_TIME))


def _gather_and_reduce(machine: Machine, shape: ModelShape, cut: Cut, num_tokens: float) -> _Part:
    """Around one attention or MLP: gather and reduce-scatter (or an all-reduce, the same bytes), in the backward pass too; with sequence
    parallelism the input is gathered once more for the gradient of the weights.
    """
    if cut.tensor == 1:
        return _Part(NO_TIME, NO_TIME)
    once = machine.collective(2 * num_tokens * shape.hidden_size, cut.tensor)
    exposed = 0.25 if machine.options.overlap_tensor_parallel else 1.0
    forward, backward = 2 * once * exposed, (3 if cut.sequence_parallel else 2) * once * exposed
    return _Part(Seconds(tensor_parallel=forward), Seconds(tensor_parallel=backward))


@lru_cache(maxsize=20_000)
def _attention(machine: Machine, shape: ModelShape, cut: Cut, num_tokens: float, mean_square: float) -> _Block:
    hidden, attention, tensor = shape.hidden_size, shape.attention, cut.tensor
    own_tokens = num_tokens / tensor if cut.sequence_parallel else num_tokens
    heads = attention.num_heads / tensor
    # Both norms and both residual additions: 2 x (read, write) and 2 x (read, read, write) of bf16.
    parts = {"norms": _passes(machine, own_tokens * hidden * 8, 2), "residual": _passes(machine, own_tokens * hidden * 12, 2)}
    if machine.options.dropout:
        parts["dropout"] = _passes(machine, own_tokens * hidden * 2 * 5, 2)  # read and write bf16, write a mask, twice
    if isinstance(attention, GroupedQueryAttention):
        groups, width = max(attention.num_groups / tensor, 1.0), attention.head_dim
        parts["qkv"] = _linear(machine, num_tokens, (heads + 2 * groups) * width, hidden)
        parts["projection"] = _linear(machine, num_tokens, hidden, heads * width)
        rope_bytes = 4 * num_tokens * (heads + groups) * width * (2 if attention.qk_norm else 1)
        parts["rope"] = _passes(machine, rope_bytes, 4 if attention.qk_norm else 2)
        key_value_bytes = 4 * num_tokens * groups * width
    else:
        query, rank = heads * attention.query_dim, attention.q_lora_rank
        down = attention.kv_lora_rank + attention.rope_dim
        up = heads * (attention.nope_dim + attention.value_dim)
        parts["down_projections"] = _merge(
            *([_linear(machine, own_tokens, rank, hidden)] if rank else []),
            _linear(machine, own_tokens, down, hidden),
            _passes(machine, 4 * own_tokens * (down + (rank or 0)), 4),
        )
        parts["up_projections"] = _merge(
            _linear(machine, num_tokens, query, rank or hidden), _linear(machine, num_tokens, up, attention.kv_lora_rank)
        )
        # Rotary parts are split off and joined again for queries and keys of all heads.
        parts["rope"] = _passes(machine, 2 * num_tokens * heads * (6 * attention.query_dim + 2 * attention.value_dim), 8)
        parts["projection"] = _linear(machine, num_tokens, hidden, heads * attention.value_dim)
        key_value_bytes = 2 * num_tokens * heads * (attention.query_dim + attention.value_dim)
    flops = attention_core_flops(shape) / tensor * num_tokens * mean_square
    core_forward = machine.attention(flops, backward=False)
    core_backward = machine.attention(2.5 * flops, backward=True)
    ring_forward, ring_backward = NO_TIME, NO_TIME
    if cut.context > 1:
        rate, latency = machine.link(cut.context, tensor)
        one_way = (cut.context - 1) * (key_value_bytes / rate + latency)
        # The ring runs beside the attention of the block that is there; half of it is never covered.
        ring_forward = Seconds(context_parallel=max(one_way - core_forward / 2, 0.1 * one_way))
        ring_backward = Seconds(context_parallel=max(2 * one_way - core_backward / 2, 0.2 * one_way))
    parts["core"] = _Part(Seconds(attention=core_forward) + ring_forward, Seconds(attention=core_backward) + ring_backward)
    parts["attention_collectives"] = _gather_and_reduce(machine, shape, cut, num_tokens)
    return _Block.of(parts)


@lru_cache(maxsize=20_000)
def _mlp(machine: Machine, shape: ModelShape, cut: Cut, num_tokens: float) -> _Block:
    hidden, width, halves = shape.hidden_size, shape.ffn_hidden_size / cut.tensor, 2 if shape.gated else 1
    parts = {
        "mlp": _merge(
            _linear(machine, num_tokens, halves * width, hidden),
            _linear(machine, num_tokens, hidden, width),
            _gather_and_reduce(machine, shape, cut, num_tokens),
        ),
        "activation": _passes(machine, 2 * num_tokens * width * (halves + 1)),
    }
    return _Block.of(parts)


@lru_cache(maxsize=20_000)
def _experts(machine: Machine, shape: ModelShape, cut: Cut, num_tokens: float) -> _Block:
    experts = shape.experts
    assert isinstance(experts, Experts), "a layer with experts belongs to a model with experts"
    hidden, halves = shape.hidden_size, 2 if shape.gated else 1
    own_tokens = num_tokens / cut.tensor  # every token is routed by one tensor-parallel rank
    copies = own_tokens * experts.num_per_token * cut.expert_tensor  # on this rank, balanced
    num_local = experts.num_experts / cut.expert
    width, rows = experts.ffn_hidden_size / cut.expert_tensor, copies / num_local
    sent = 2 * own_tokens * experts.num_per_token * hidden
    exchange = machine.all_to_all(sent, cut.expert, experts.num_per_token) + machine.collective(
        2 * copies * hidden, cut.expert_tensor
    )
    parts = {
        "router": _merge(
            _linear(machine.in_bf16(), own_tokens, experts.num_experts, hidden),
            _passes(machine, own_tokens * experts.num_experts * 24, 12),
        ),
        "experts": _merge(
            _linear(machine, rows, halves * width, hidden, num_local),
            _linear(machine, rows, hidden, width, num_local),
            # Copies are sorted by rank, again by expert, and back: each time read and written.
            _passes(machine, 4 * (sent / 2) * 2 + 4 * copies * hidden * 2, 8),
            _Part(Seconds(expert_parallel=2 * exchange), Seconds(expert_parallel=2 * exchange)),
        ),
        "moe_activation": _passes(machine, 2 * copies * width * (halves + 1)),
    }
    if experts.shared_ffn_hidden_size:
        shared = experts.shared_ffn_hidden_size / cut.tensor
        parts["shared"] = _merge(
            _linear(machine, num_tokens, halves * shared, hidden),
            _linear(machine, num_tokens, hidden, shared),
            _passes(machine, 2 * num_tokens * shared * (halves + 1)),
            _gather_and_reduce(machine, shape, cut, num_tokens),
        )
    return _Block.of(parts)


@lru_cache(maxsize=20_000)
def head_seconds(machine: Machine, shape: ModelShape, cut: Cut, num_tokens: float) -> LayerSeconds:
    """LM head and loss, in bf16: the product, and four passes over fp32 logits."""
    machine = machine.in_bf16()
    vocab = shape.vocab_size / cut.tensor
    part = _merge(
        _linear(machine, num_tokens, vocab, shape.hidden_size),
        _passes(machine, num_tokens * vocab * 12, 4),
        _gather_and_reduce(machine, shape, cut, num_tokens),
    )
    return LayerSeconds(part.forward, part.backward, NO_TIME)
