"""A micro-batch as tensors on this rank. Shape letters: T packed tokens, R trained tokens of the micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from dapo_megatron.models.shared_prompts import SharedPrompts
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
    prompts: dict[bytes, int] = {}
    inputs: list[np.ndarray] = []
    spans: list[tuple[int, int, int, int]] = []
    total = 0
    for sample in samples:
        prompt, response = sample.token_ids[: sample.num_prompt_tokens], sample.token_ids[sample.num_prompt_tokens : -1]
        key = prompt.tobytes()
        start = prompts.get(key) if implementation == "local" else None
        if start is None:
            prompts[key] = start = total
            inputs.append(prompt)
            total += len(prompt)
        inputs.append(response)
        spans.append((start, len(prompt), total, len(response)))
        total += len(response)
    padding = -total % pad_to_multiple if total else pad_to_multiple
    if padding:  # a sequence of its own, so that no real token attends to it
        inputs.append(np.zeros(padding, dtype=np.int32))
        spans.append((total, padding, 0, 0))
    layout = SharedPrompts(*np.array(spans).T)
    targets = [sample.token_ids[sample.num_prompt_tokens :] for sample in samples]
    per_sample = np.array([(sample.advantage, sample.loss_weight, sample.on_policy) for sample in samples], np.float32)
    num_tokens = [len(response) for response in targets]
    advantages, loss_weights, on_policy = torch.from_numpy(per_sample.reshape(-1, 3).T.repeat(num_tokens, axis=1)).to(device)
    log_probs = np.concatenate([np.zeros(0, np.float32), *(sample.rollout_log_probs for sample in samples)])
    return MicroBatchTensors(
        input_ids=_long(inputs, device)[None],
        packed=_packed(layout, device, implementation),
        rows=torch.from_numpy(layout.predicting_places(len(samples))).to(device),
        targets=_long(targets, device),
        advantages=advantages,
        loss_weights=loss_weights,
        rollout_log_probs=torch.from_numpy(log_probs).to(device),
        on_policy=on_policy.bool(),
    )


def _long(parts: list[np.ndarray], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *parts], dtype=np.int64)).to(device)


def _packed(layout: SharedPrompts, device: torch.device, implementation: Implementation) -> PackedSeqParams:
    if implementation == "local":
        return layout.pack(device)
    lengths = layout.sequence_lengths
    boundaries = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=int(lengths.max()),
        max_seqlen_kv=int(lengths.max()),
    )
