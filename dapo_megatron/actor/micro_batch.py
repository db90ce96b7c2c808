"""A micro-batch as tensors on this rank. Shape letters: T packed tokens, R trained tokens of the micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from dapo_megatron.models.packed import pack_sequences
from dapo_megatron.models.spec import Implementation
from dapo_megatron.types import MicroBatch


@dataclass(frozen=True, slots=True)
class MicroBatchTensors:
    """What the forward pass and the loss need.

    `input_ids` [1, T]; `rows` [R] are the packed places whose successor `targets` [R] is trained on; `advantages`,
    `loss_weights` and `rollout_log_probs` are fp32 [R], `on_policy` is bool [R]. A micro-batch without samples has one dummy token and R = 0.
    """

    input_ids: Tensor
    packed: PackedSeqParams
    rows: Tensor
    targets: Tensor
    advantages: Tensor
    loss_weights: Tensor
    rollout_log_probs: Tensor
    on_policy: Tensor


def to_tensors(
    samples: MicroBatch, *, device: torch.device, implementation: Implementation, pad_to_multiple: int
) -> MicroBatchTensors:
    """Pack the samples of a micro-batch; T is padded to a multiple (sequence parallelism shards it).

    The last token of a response predicts nothing and is not packed. Under `local`, samples of one prompt share its tokens.
    """
    prompts: dict[bytes, np.ndarray] = {}
    inputs, sequences, rows, targets = [], [], [], []
    total = 0
    for sample in samples:
        tokens = sample.token_ids.astype(np.int64)
        prompt, response = tokens[: sample.num_prompt_tokens], tokens[sample.num_prompt_tokens :]
        key = prompt.tobytes()
        if key not in prompts or implementation != "local":
            prompts[key] = np.arange(total, total + len(prompt))
            inputs.append(prompt)
            total += len(prompt)
        sequence = np.concatenate([prompts[key], np.arange(total, total + len(response) - 1)])
        inputs.append(response[:-1])
        total += len(response) - 1
        sequences.append(sequence)
        rows.append(sequence[len(prompt) - 1 :])
        targets.append(response)
    padding = -total % pad_to_multiple if total else pad_to_multiple
    if padding:  # a sequence of its own, so that no real token attends to it
        inputs.append(np.zeros(padding, dtype=np.int64))
        sequences.append(np.arange(total, total + padding))
    per_sample = np.array([(sample.advantage, sample.loss_weight, sample.on_policy) for sample in samples], np.float32)
    num_tokens = [len(response) for response in targets]
    advantages, loss_weights, on_policy = torch.from_numpy(per_sample.reshape(-1, 3).T.repeat(num_tokens, axis=1)).to(device)
    log_probs = np.concatenate([np.zeros(0, np.float32), *(sample.rollout_log_probs for sample in samples)])
    return MicroBatchTensors(
        input_ids=_long(inputs, device)[None],
        packed=_packed(sequences, device, implementation),
        rows=_long(rows, device),
        targets=_long(targets, device),
        advantages=advantages,
        loss_weights=loss_weights,
        rollout_log_probs=torch.from_numpy(log_probs).to(device),
        on_policy=on_policy.bool(),
    )


def _long(parts: list[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts])).to(device)


def _packed(sequences: list[np.ndarray], device: torch.device, implementation: Implementation) -> PackedSeqParams:
    if implementation == "local":
        return pack_sequences(sequences, device)
    lengths = [len(sequence) for sequence in sequences]
    boundaries = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
