"""What the last stage needs for logits and loss besides its layers."""

from __future__ import annotations

from dataclasses import dataclass

from dapo_megatron.layout.kept_local import norm_bytes
from dapo_megatron.layout.layout import Layout
from dapo_megatron.layout.memory_records import MemoryOptions
from dapo_megatron.layout.model_shape import ModelShape


@dataclass(frozen=True, slots=True)
class HeadMemory:
    """Bytes of one micro-batch: kept from its forward pass until its backward pass, and the most on top of that."""

    kept_bytes: float
    workspace_bytes: float


def head_memory(shape: ModelShape, layout: Layout, options: MemoryOptions) -> HeadMemory:
    """In training.

    chunked (`actor/log_probs.py`): gradients of hidden states and of the head's weight in fp32 from the forward pass on, logits of
    `log_prob_chunk_tokens` tokens in fp32. fused (TransformerEngine's cross-entropy): bf16 logits, which become their gradient in place.
    unfused (megatron-core): bf16 logits and their softmax in fp32.
    """
    tp, tokens, width = layout.tensor_parallel_size, layout.tokens_per_rank, options.precision.activation_bytes
    h = shape.hidden_size
    vocab = shape.padded_vocab_size(options.vocab_multiple * tp) / tp
    rows = width * tokens * h
    local_tokens = tokens / tp if layout.sequence_parallel else tokens
    local_rows = width * local_tokens * h
    weight_grad = options.precision.weight_bytes * vocab * h
    gathered = rows if layout.sequence_parallel else 0
    # Final norm: its input and output, or what the local spec's keeps.
    kept = 2 * local_rows if options.kernels == "transformer_engine" else local_tokens * norm_bytes(h, width)
    if options.head_loss == "chunked":
        chunk = min(layout.log_prob_chunk_tokens, tokens) * vocab
        held = 4 * tokens * h + 4 * vocab * h
        forward = gathered + rows + max((4 + width) * chunk, width * chunk + weight_grad)
        return HeadMemory(kept, held + max(forward, rows + weight_grad))
    held, forward = (2, 2) if options.head_loss == "fused" else (4, 6)
    # Each multi-token-prediction layer has been through the head before, and waits for its backward pass.
    before = shape.num_mtp_layers * (held * tokens * vocab + 2 * local_rows)
    backward = 2 * tokens * vocab + weight_grad + rows
    return HeadMemory(kept + before, gathered + max(forward * tokens * vocab, backward))


def log_prob_workspace(shape: ModelShape, layout: Layout, options: MemoryOptions) -> float:
    """Bytes of a pass for log-probabilities alone, by our own head."""
    tp, tokens, width = layout.tensor_parallel_size, layout.tokens_per_rank, options.precision.activation_bytes
    chunk = min(layout.log_prob_chunk_tokens, tokens) * shape.padded_vocab_size(options.vocab_multiple * tp) / tp
    rows = width * tokens * shape.hidden_size
    return (2 if layout.sequence_parallel else 1) * rows + (4 + width) * chunk
