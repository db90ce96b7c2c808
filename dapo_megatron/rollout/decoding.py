"""Continuous batching over a transformers model: the synchronous heart of the embedded engine.

Shape letters: P prompts of one prefill, L positions, R rows in decoding, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult
from dapo_megatron.rollout.kv_cache import RowCache
from dapo_megatron.rollout.row_table import RowTable
from dapo_megatron.rollout.sampling import RowParams, draw
from dapo_megatron.types import EngineError, Sample

_FIRST_CAPACITY = 512
_MAX_PREFILL_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class _Admission:
    """Samples that enter together and share one prefill of their prompt."""

    request_index: int
    first_sample: int
    num_samples: int


@dataclass(frozen=True, slots=True)
class _Response:
    token_ids: np.ndarray
    log_probs: np.ndarray
    stopped: bool


class Decoding:
    """One call of generate(): `advance` until `is_done`.

    Requests enter in their order, whole groups at a time (a group larger than `max_batch_size` in pieces of that size, each
    with a prefill of its own), as soon as there are rows for all their samples. What happens depends on the requests alone and
    never on the clock, so the same call gives the same bits. One transfer from the device a step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[GenerateRequest],
        max_batch_size: int,
        weight_version: int,
    ):
        self._model, self._tokenizer, self._device = model, tokenizer, model.device
        self._requests = tuple(requests)
        self._weight_version = weight_version
        self._waiting = deque(
            _Admission(index, first, min(max_batch_size, request.num_samples - first))
            for index, request in enumerate(self._requests)
            for first in range(0, request.num_samples, max_batch_size)
        )
        self._responses: list[dict[int, _Response]] = [{} for _ in self._requests]
        self._num_unfinished = len(self._requests)
        self._max_rows = min(max_batch_size, sum(request.num_samples for request in self._requests))
        # The last token of a response is never fed back, so it needs no place in the cache.
        self._max_length = max(len(r.prompt_token_ids) + r.params.max_response_tokens - 1 for r in self._requests)
        self._cache = RowCache(model.config.num_hidden_layers, self._max_rows, min(_FIRST_CAPACITY, self._max_length))
        self._rows = RowTable(
            self._max_rows,
            max(request.params.max_response_tokens for request in self._requests),
            max(len(request.params.stop_token_ids) for request in self._requests),
        )
        self._params: RowParams | None = None

    @property
    def is_done(self) -> bool:
        """Whether every request has been returned."""
        return self._num_unfinished == 0

    @torch.inference_mode()
    def advance(self, max_steps: int) -> list[GenerateResult]:
        """Decode until some requests are finished, or for `max_steps` forwards; return the finished ones in request order."""
        for _ in range(max_steps):
            admissions = self._admissions()
            finished = self._prefill(admissions) if admissions else self._step()
            if finished:
                return self._results(finished)
        return []

    def _admissions(self) -> list[_Admission]:
        """What enters now: as many waiting groups as there are rows for, within the token bound of one prefill."""
        admissions: list[_Admission] = []
        num_free = self._max_rows - self._rows.num_rows
        longest = 0
        while self._waiting and self._waiting[0].num_samples <= num_free:
            longest = max(longest, len(self._requests[self._waiting[0].request_index].prompt_token_ids))
            if admissions and longest * (len(admissions) + 1) > _MAX_PREFILL_TOKENS:
                break
            num_free -= self._waiting[0].num_samples
            admissions.append(self._waiting.popleft())
        return admissions

    def _prefill(self, admissions: list[_Admission]) -> list[int]:
        """Run the prompts once each, copy their keys and values to the rows of their samples, and draw the first tokens.

        Prompts are padded on the left, so that the last position of all is the last one of the batch and the model computes
        no other logits.
        """
        prompts = [self._requests[admission.request_index].prompt_token_ids for admission in admissions]
        length = max(map(len, prompts))
        token_ids = np.zeros((len(prompts), length), np.int64)
        for row, prompt in enumerate(prompts):
            token_ids[row, length - len(prompt) :] = prompt
        num_pads = self._tensor(np.array([length - len(prompt) for prompt in prompts]))
        cache = DynamicCache()
        logits = self._model(
            input_ids=self._tensor(token_ids),
            attention_mask=_left_padded_mask(num_pads, length) if any(len(prompt) < length for prompt in prompts) else None,
            position_ids=(torch.arange(length, device=self._device) - num_pads[:, None]).clamp_(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, 0]

        first_row = self._rows.num_rows
        for admission in admissions:
            request = self._requests[admission.request_index]
            self._rows.admit(admission.request_index, request, admission.first_sample, admission.num_samples)
        prompt_of_row = self._tensor(np.repeat(np.arange(len(prompts)), [admission.num_samples for admission in admissions]))
        self._reserve(length)
        self._cache.insert(first_row, cache, prompt_of_row, num_pads[prompt_of_row])
        self._params = None
        return self._draw(logits[prompt_of_row], first_row, self._rows.sampling_params(first_row, self._device))

    def _step(self) -> list[int]:
        """One token for every row."""
        rows = self._rows
        position = rows.position[: rows.num_rows]
        length = int(position.max()) + 1
        self._reserve(length)
        positions = self._tensor(position)
        is_ragged = int(position.min()) + 1 < length
        mask = torch.arange(length, device=self._device) <= positions[:, None] if is_ragged else None
        self._cache.begin_step(positions, length)
        logits = self._model(
            input_ids=self._tensor(rows.newest_tokens()),
            attention_mask=None if mask is None else mask[:, None, None, :],
            position_ids=positions[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, 0]
        if self._params is None:
            self._params = rows.sampling_params(0, self._device)
        return self._draw(logits, 0, self._params)

    def _draw(self, logits: Tensor, first_row: int, params: RowParams) -> list[int]:
        """Draw a token for each row from `first_row` on, retire finished rows, return the requests that are complete now."""
        tokens, log_probs = draw(logits, self._tensor(self._rows.next_uniforms(first_row)), params)
        # fp64 holds every token id and every fp32 exactly: one transfer brings both.
        drawn = torch.stack((tokens.double(), log_probs.double())).cpu().numpy()
        if not np.isfinite(drawn[1]).all():
            raise EngineError(
                f"The model gives logits that are not finite with weights of version {self._weight_version}; "
                "look at actor/grad_norm of the steps before, and lower actor.optimizer.lr if it grew."
            )
        finished_rows = self._rows.append(first_row, drawn[0].astype(np.int64), drawn[1])
        return self._retire(finished_rows) if len(finished_rows) else []

    def _retire(self, finished_rows: np.ndarray) -> list[int]:
        """Take these rows out and close the holes; return the requests that are complete now, rising."""
        rows = self._rows
        complete = []
        for row in finished_rows.tolist():
            count, request_index = rows.count[row], int(rows.request[row])
            responses = self._responses[request_index]
            responses[int(rows.sample[row])] = _Response(
                rows.tokens[row, :count].astype(np.int32), rows.log_probs[row, :count].copy(), bool(rows.stopped[row])
            )
            if len(responses) == self._requests[request_index].num_samples:
                complete.append(request_index)
        sources, targets = rows.remove(finished_rows)
        if len(targets):
            length = int(rows.position[targets].max())
            self._cache.move(self._tensor(sources), self._tensor(targets), length)
        self._params = None
        return sorted(complete)

    def _results(self, request_indices: list[int]) -> list[GenerateResult]:
        """The records of complete requests; all texts are decoded in one call."""
        responses = [self._responses[i][sample] for i in request_indices for sample in range(self._requests[i].num_samples)]
        texts = self._tokenizer.batch_decode([response.token_ids.tolist() for response in responses], skip_special_tokens=True)
        samples = iter([self._sample(response, text) for response, text in zip(responses, texts, strict=True)])
        results = []
        for index in request_indices:
            request = self._requests[index]
            results.append(GenerateResult(request.request_id, tuple(itertools.islice(samples, request.num_samples))))
            self._responses[index] = {}
        self._num_unfinished -= len(results)
        return results

    def _sample(self, response: _Response, text: str) -> Sample:
        return Sample(
            token_ids=response.token_ids,
            log_probs=response.log_probs,
            weight_versions=np.full(len(response.token_ids), self._weight_version, np.int32),
            finish_reason="stop" if response.stopped else "length",
            text=text,
        )

    def _reserve(self, length: int) -> None:
        if length > self._cache.capacity:
            self._cache.reserve(min(self._max_length, max(length, 2 * self._cache.capacity)))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array, device=self._device)


def _left_padded_mask(num_pads: Tensor, length: int) -> Tensor:
    """Who may see whom [P, 1, L, L]: causal, no padding; a padding position sees itself, as an empty row could become NaN."""
    index = torch.arange(length, device=num_pads.device)
    is_causal = index <= index[:, None]
    is_token = index >= num_pads[:, None, None]
    return ((is_causal & is_token) | (index == index[:, None]))[:, None]
