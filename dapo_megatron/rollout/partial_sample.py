"""One sample while it grows: what is known of it survives the engine that made it."""

from __future__ import annotations

import numpy as np

from dapo_megatron.rollout.engine import SamplingParams
from dapo_megatron.rollout.sglang_engine import Continuation, Piece
from dapo_megatron.types import FinishReason, Sample


class PartialSample:
    """The tokens of one sample so far, perhaps from several engines and weight versions."""

    def __init__(self, started: Sample | None):
        """`started` is what an earlier request got; an aborted one goes on, any other is finished."""
        self.token_ids: list[int] = started.token_ids.tolist() if started else []
        self.log_probs: list[float] = started.log_probs.tolist() if started else []
        self.weight_versions: list[int] = started.weight_versions.tolist() if started else []
        self.finish_reason: FinishReason | None = started.finish_reason if started else None
        if self.finish_reason == "abort":
            self.finish_reason = None

    @property
    def is_finished(self) -> bool:
        """Whether the sample came to its own end."""
        return self.finish_reason is not None

    def extend(self, piece: Piece) -> None:
        """Add what an engine sent; an abort leaves the sample unfinished."""
        self.token_ids += piece.token_ids
        self.log_probs += piece.log_probs
        self.weight_versions += piece.weight_versions
        if piece.finish_reason != "abort":
            self.finish_reason = piece.finish_reason

    def finish_if_complete(self, params: SamplingParams) -> None:
        """An engine may be lost between the last token and the word that it was the last."""
        if self.token_ids and self.token_ids[-1] in params.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= params.max_response_tokens:
            self.finish_reason = "length"

    def drop_other_versions(self, weight_version: int) -> int:
        """Begin again, unless every token so far is of this version; how many tokens were dropped."""
        if all(version == weight_version for version in self.weight_versions):
            return 0
        num_tokens = len(self.token_ids)
        self.token_ids, self.log_probs, self.weight_versions = [], [], []
        return num_tokens

    def continuation(self, rid: str, prompt: tuple[int, ...], params: SamplingParams) -> Continuation:
        """What an engine is asked for next."""
        return Continuation(rid, [*prompt, *self.token_ids], params.max_response_tokens - len(self.token_ids))

    def sample(self, text: str) -> Sample:
        """As it is now; unfinished ones say abort."""
        return Sample(
            np.asarray(self.token_ids, np.int32),
            np.asarray(self.log_probs, np.float32),
            np.asarray(self.weight_versions, np.int32),
            self.finish_reason or "abort",
            text,
        )
