"""What of a model decides its memory and its FLOPs, read from Megatron-LM's arguments: those of a config.json come from its family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dapo_megatron.types import ConfigError, MappingError
from dapo_megatron.weights.families import megatron_arguments


@dataclass(frozen=True, slots=True)
class GroupedQueryAttention:
    """Heads that share keys and values in groups; as many groups as heads: plain multi-head attention."""

    num_heads: int
    num_groups: int
    head_dim: int
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek): keys and values come out of one latent, a part of each key is rotated."""

    num_heads: int
    q_lora_rank: int | None
    """Width of the query latent. None: queries come straight from the hidden state."""
    kv_lora_rank: int
    nope_dim: int
    """Width of the part of a query or key head that is not rotated."""
    rope_dim: int
    """Width of the rotated part, which all heads share in the key."""
    value_dim: int

    @property
    def query_dim(self) -> int:
        """Width of a query or key head."""
        return self.nope_dim + self.rope_dim


Attention = GroupedQueryAttention | LatentAttention


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts of a layer."""

    num_experts: int
    num_per_token: int
    ffn_hidden_size: int
    """Width of one routed expert."""
    shared_ffn_hidden_size: int = 0
    """Width of all shared experts together; 0: none."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder: sizes, and which layers have experts. `vocab_size` is without padding."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Width of the MLP in layers without experts."""
    attention: Attention
    experts: Experts | None
    moe_layers: tuple[bool, ...]
    """One flag per layer: its MLP is a mixture of experts."""
    vocab_size: int
    tied: bool
    """Embedding and LM head are one matrix."""
    gated: bool = True
    """SwiGLU: the MLP has a gate beside its up projection."""
    linear_bias: bool = False
    """Every linear layer has a bias."""
    norm_bias: bool = False
    """LayerNorm with a bias; False: RMSNorm."""
    num_mtp_layers: int = 0
    """Multi-token-prediction layers behind the last one; a policy is trained without them."""

    def __hash__(self) -> int:
        # Shapes are looked up in caches thousands of times a second: these tell models apart well enough.
        return hash((self.num_layers, self.hidden_size, self.ffn_hidden_size, self.vocab_size))

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any]) -> ModelShape:
        """Of a config.json of any family of the mapping tables. ConfigError for an unknown family and a missing or wrong field."""
        try:
            return cls.from_megatron(megatron_arguments(hf_config))
        except MappingError as error:
            raise ConfigError(str(error)) from None

    @classmethod
    def from_megatron(cls, arguments: Mapping[str, Any]) -> ModelShape:
        """Of Megatron-LM's arguments, by their names in its namespace and with its defaults. ConfigError for a missing size."""
        num_layers, hidden_size = _size(arguments, "num_layers"), _size(arguments, "hidden_size")
        gated = bool(arguments.get("swiglu"))
        # Megatron-LM's default width: 4h, or 8h/3 in multiples of 64 where a gate is a third matrix.
        default_width = hidden_size * 8 // 3 // 64 * 64 if gated else 4 * hidden_size
        width = arguments.get("ffn_hidden_size") or default_width
        experts = _experts(arguments, width) if arguments.get("num_experts") else None
        return cls(
            num_layers=num_layers,
            hidden_size=hidden_size,
            ffn_hidden_size=width,
            attention=_attention(arguments, hidden_size),
            experts=experts,
            moe_layers=_moe_layers(arguments.get("moe_layer_freq", 1), num_layers) if experts else (False,) * num_layers,
            vocab_size=_size(arguments, "vocab_size"),
            tied=not arguments.get("untie_embeddings_and_output_weights", False),
            gated=gated,
            linear_bias=bool(arguments.get("add_bias_linear", True)),
            norm_bias=arguments.get("normalization", "LayerNorm") == "LayerNorm",
            num_mtp_layers=arguments.get("mtp_num_layers") or 0,
        )

    def padded_vocab_size(self, multiple: int) -> int:
        """Vocabulary rows after padding to a multiple: the tensor-parallel size here, 128 times that in Megatron-LM."""
        return -(-self.vocab_size // multiple) * multiple


def _attention(arguments: Mapping[str, Any], hidden_size: int) -> Attention:
    num_heads = _size(arguments, "num_attention_heads")
    if arguments.get("multi_latent_attention"):
        return LatentAttention(
            num_heads=num_heads,
            q_lora_rank=arguments.get("q_lora_rank"),
            kv_lora_rank=_size(arguments, "kv_lora_rank"),
            nope_dim=_size(arguments, "qk_head_dim"),
            rope_dim=_size(arguments, "qk_pos_emb_head_dim"),
            value_dim=_size(arguments, "v_head_dim"),
        )
    return GroupedQueryAttention(
        num_heads=num_heads,
        num_groups=arguments.get("num_query_groups") or num_heads,
        head_dim=arguments.get("kv_channels") or hidden_size // num_heads,
        qkv_bias=bool(arguments.get("add_qkv_bias") or arguments.get("add_bias_linear", True)),
        qk_norm=bool(arguments.get("qk_layernorm")),
    )


def _experts(arguments: Mapping[str, Any], dense_width: int) -> Experts:
    return Experts(
        num_experts=_size(arguments, "num_experts"),
        num_per_token=_size(arguments, "moe_router_topk"),
        ffn_hidden_size=arguments.get("moe_ffn_hidden_size") or dense_width,
        shared_ffn_hidden_size=arguments.get("moe_shared_expert_intermediate_size") or 0,
    )


def _moe_layers(frequency: int | list[int], num_layers: int) -> tuple[bool, ...]:
    """Every n-th layer from the first, or one flag per layer."""
    if isinstance(frequency, int):
        return tuple(layer % frequency == 0 for layer in range(num_layers))
    if len(frequency) != num_layers:
        raise ConfigError(
            f"moe_layer_freq has {len(frequency)} entries and must have num_layers ({num_layers}); give one per layer."
        )
    return tuple(bool(flag) for flag in frequency)


def _size(arguments: Mapping[str, Any], name: str) -> int:
    value = arguments.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{name} ({value!r}) must be a positive integer; give it with the model's other sizes.")
    return value
