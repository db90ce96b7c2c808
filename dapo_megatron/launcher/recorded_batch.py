"""A training batch as a file, RUN/batches/step_NNNNNN.npz: the samples of each optimizer step, without the cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from dapo_megatron.types import CheckpointError, TrainBatch, TrainSample
from dapo_megatron.whole_files import whole_file

FOLDER = "batches"


@dataclass(frozen=True, slots=True)
class RecordedBatch:
    """`optimizer_steps[i]` holds the samples of optimizer step i of `rollout_step` (counted from 1, as in metrics.jsonl)."""

    rollout_step: int
    optimizer_steps: tuple[tuple[TrainSample, ...], ...]


def record(batch: TrainBatch, run_dir: Path, rollout_step: int) -> Path:
    """Write the batch into the run folder; the file appears when it is complete."""
    steps = [[s for rank in step.micro_batches for micro_batch in rank for s in micro_batch] for step in batch.optimizer_steps]
    samples = [sample for step in steps for sample in step]
    file = run_dir / FOLDER / f"step_{rollout_step:06d}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as stream:
        np.savez_compressed(
            stream,
            rollout_step=np.int64(rollout_step),
            optimizer_step=np.array([index for index, step in enumerate(steps) for _ in step], np.int32),
            num_prompt_tokens=np.array([sample.num_prompt_tokens for sample in samples], np.int32),
            num_response_tokens=np.array([sample.num_loss_tokens for sample in samples], np.int32),
            token_ids=_joined([sample.token_ids for sample in samples], np.int32),
            rollout_log_probs=_joined([sample.rollout_log_probs for sample in samples], np.float32),
            advantages=np.array([sample.advantage for sample in samples], np.float64),
            loss_weights=np.array([sample.loss_weight for sample in samples], np.float64),
            on_policy=np.array([sample.on_policy for sample in samples], bool),
        )
    return file


def read_recorded(path: Path) -> RecordedBatch:
    """The batch of a file, or the newest of a run folder. CheckpointError when there is none."""
    file = path
    if path.is_dir():
        files = sorted((path / FOLDER).glob("step_*.npz"))
        if not files:
            raise CheckpointError(
                f"{path} holds no recorded batch ({FOLDER}/step_NNNNNN.npz); train with train.record_batch_of_step, or leave --batch out"
            )
        file = files[-1]
    try:
        with np.load(file, allow_pickle=False) as columns:
            return _from_columns(dict(columns))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{file} is no recorded batch ({error}); give a run folder, or RUN/{FOLDER}/step_NNNNNN.npz"
        ) from None


def _from_columns(columns: dict[str, np.ndarray]) -> RecordedBatch:
    num_prompt, num_response = columns["num_prompt_tokens"], columns["num_response_tokens"]
    token_ends, response_ends = np.cumsum(num_prompt + num_response), np.cumsum(num_response)
    numbered = [
        (
            int(columns["optimizer_step"][at]),
            TrainSample(
                token_ids=columns["token_ids"][token_ends[at] - num_prompt[at] - num_response[at] : token_ends[at]],
                num_prompt_tokens=int(num_prompt[at]),
                rollout_log_probs=columns["rollout_log_probs"][response_ends[at] - num_response[at] : response_ends[at]],
                advantage=float(columns["advantages"][at]),
                loss_weight=float(columns["loss_weights"][at]),
                on_policy=bool(columns["on_policy"][at]),
            ),
        )
        for at in range(len(num_prompt))
    ]
    steps = groupby(numbered, key=lambda item: item[0])
    return RecordedBatch(int(columns["rollout_step"]), tuple(tuple(sample for _, sample in step) for _, step in steps))


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])
