"""A micro-batch as tensors on this rank. Shape letters: T packed tokens, R trained tokens of the micro-batch, both of this rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from dapo_megatron.models.context_parallel import ContextShare, pack_context_parallel
from dapo_megatron.models.shared_prompts import SharedPrompts
from dapo_megatron.models.spec import Implementation
from dapo_megatron.types import MicroBatch


@dataclass(frozen=True, slots=True)
class MicroBatchTensors:
    """What the forward pass and the loss need.

    `input_ids` [1, T]; `rows` [R] are the packed places whose successor `targets` [R] is trained on; `advantages`,
    `loss_weights` and `rollout_log_probs` are fp32 [R], `on_policy` is bool [R]. A micro-batch without samples has dummy tokens and R = 0.
    Under context parallelism a rank has the trained tokens whose predecessors it has; `trained` [R] numbers them over all ranks.
    """

    input_ids: Tensor
    packed: PackedSeqParams
    rows: Tensor
    trained: Tensor
    targets: Tensor
    advantages: Tensor
    loss_weights: Tensor
    rollout_log_probs: Tensor
    on_policy: Tensor


def to_tensors(
    samples: MicroBatch,
    *,
    device: torch.device,
    implementation: Implementation,
    pad_to_multiple: int,
    context: ContextShare,
) -> MicroBatchTensors:
    """Pack the samples of a micro-batch, and take this rank's share of it; the whole is padded to a multiple that ranks can share out.

    The last token of a response predicts nothing and is not packed. Under `local` without context parallelism, samples of one prompt
    share its tokens; context parallelism cuts whole sequences, each with its own prompt.
    """
    shares_prompts = implementation == "local" and context.size == 1
    prompts: dict[bytes, int] = {}
    inputs: list[np.ndarray] = []
    spans: list[tuple[int, int, int, int]] = []
    total = 0
    for sample in samples:
        prompt, response = sample.token_ids[: sample.num_prompt_tokens], sample.token_ids[sample.num_prompt_tokens : -1]
        key = prompt.tobytes()
        start = prompts.get(key) if shares_prompts else None
        if start is None:
            prompts[key] = start = total
            inputs.append(prompt)
            total += len(prompt)
        inputs.append(response)
        spans.append((start, len(prompt), total, len(response)))
        total += len(response)
        if filling := -(len(prompt) + len(response)) % context.sequence_multiple:
            inputs.append(np.zeros(filling, dtype=np.int32))
            total += filling
    padding = -total % pad_to_multiple if total else pad_to_multiple
    if padding:  # a sequence of its own, so that no real token attends to it
        inputs.append(np.zeros(padding, dtype=np.int32))
        spans.append((total, padding, 0, 0))
    layout = SharedPrompts(*np.array(spans).T)
    lengths = -(-layout.sequence_lengths // context.sequence_multiple) * context.sequence_multiple
    rows = layout.predicting_places(len(samples))
    input_ids, trained = _long(inputs), np.arange(len(rows))
    if context.size > 1:
        own = context.places(lengths)
        place_here = np.full(len(input_ids), -1)
        place_here[own] = np.arange(len(own))
        rows = place_here[rows]
        trained = np.flatnonzero(rows >= 0)
        input_ids, rows = input_ids[own], rows[trained]
    targets = [sample.token_ids[sample.num_prompt_tokens :] for sample in samples]
    per_sample = np.array([(sample.advantage, sample.loss_weight, sample.on_policy) for sample in samples], np.float32)
    num_tokens = [len(response) for response in targets]
    per_token = per_sample.reshape(-1, 3).T.repeat(num_tokens, axis=1).take(trained, axis=1)
    advantages, loss_weights, on_policy = torch.from_numpy(per_token).to(device)
    log_probs = np.concatenate([np.zeros(0, np.float32), *(sample.rollout_log_probs for sample in samples)])
    return MicroBatchTensors(
        input_ids=torch.from_numpy(input_ids).to(device)[None],
        packed=_packed(layout, lengths, context, device, implementation),
        rows=torch.from_numpy(rows).to(device),
        trained=torch.from_numpy(trained),
        targets=torch.from_numpy(_long(targets)[trained]).to(device),
        advantages=advantages,
        loss_weights=loss_weights,
        rollout_log_probs=torch.from_numpy(log_probs[trained]).to(device),
        on_policy=on_policy.bool(),
    )


def _long(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *parts], dtype=np.int64)


def _packed(
    layout: SharedPrompts, lengths: np.ndarray, context: ContextShare, device: torch.device, implementation: Implementation
) -> PackedSeqParams:
    if implementation == "local":
        return layout.pack(device) if context.size == 1 else pack_context_parallel(lengths, context, device)
    boundaries = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    # TransformerEngine 2.20 counts whole sequences and divides by the ranks. Padding is part of them: their ends need no masks then.
    of_padded = {} if context.size == 1 else dict.fromkeys(("cu_seqlens_q_padded", "cu_seqlens_kv_padded"), boundaries)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=int(lengths.max()),
        max_seqlen_kv=int(lengths.max()),
        **of_padded,
        **({} if context.size == 1 else {"pad_between_seqs": False}),
    )
