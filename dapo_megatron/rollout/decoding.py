"""Continuous batching over a transformers model: the synchronous heart of the embedded engine.

Shape letters: P prompts of one prefill, L positions, R rows in decoding, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from dapo_megatron.arrays import pieces
from dapo_megatron.config.schema import HF_PREFILL_TOKENS
from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult
from dapo_megatron.rollout.kv_cache import RowCache
from dapo_megatron.rollout.row_table import RowTable
from dapo_megatron.rollout.sampling import RowParams, draw
from dapo_megatron.rollout.texts import response_texts
from dapo_megatron.types import EngineError, FinishReason, Sample

_FIRST_CAPACITY = 512


_UNSTARTED = Sample(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32), "abort", "")


@dataclass(eq=False, slots=True)
class _Job:
    """A request in work and the responses of its samples that are over."""

    request: GenerateRequest
    responses: dict[int, _Response] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return len(self.responses) == self.request.num_samples

    def start_of(self, sample: int) -> Sample:
        return self.request.started[sample] if self.request.started else _UNSTARTED


@dataclass(frozen=True, slots=True)
class _Admission:
    """Samples that enter together and share one prefill: of their prompt and the tokens they already have."""

    number: int
    first_sample: int
    num_samples: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Response:
    token_ids: np.ndarray
    log_probs: np.ndarray
    weight_versions: np.ndarray
    finish_reason: FinishReason


class Decoding:
    """Requests that decode together under one version of the weights: `add` any time, `advance` until `is_idle`.

    Requests enter in their order, whole groups at a time (a group larger than `max_batch_size` in pieces of that size, each
    with a prefill of its own; samples that go on after tokens of an earlier call one by one), as soon as there are rows for them.
    What happens depends on the calls alone and never on the clock, so the same calls give the same bits. One transfer from
    the device a step.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_batch_size: int, weight_version: int):
        self._model, self._tokenizer, self._device = model, tokenizer, model.device
        self._max_batch_size, self._weight_version = max_batch_size, weight_version
        self._jobs: dict[int, _Job] = {}  # by a number that grows in the order of arrival
        self._numbers = itertools.count()
        self._over: list[int] = []  # with nothing left to generate when they came
        self._waiting: deque[_Admission] = deque()
        self._rows = RowTable()
        self._max_length = 0
        self._cache: RowCache | None = None
        self._params: RowParams | None = None

    @property
    def is_idle(self) -> bool:
        """Whether every request has been returned or given up."""
        return not self._jobs

    def add(self, requests: Sequence[GenerateRequest]) -> None:
        """Put requests behind those that wait."""
        for request in requests:
            number = next(self._numbers)
            self._jobs[number] = job = _Job(request)
            for index, start in enumerate(request.started):
                if start.finish_reason != "abort":
                    columns = (start.token_ids, start.log_probs, start.weight_versions)
                    job.responses[index] = _Response(*columns, start.finish_reason)
            self._waiting.extend(self._admissions_of(number, job))
            if job.is_over:
                self._over.append(number)
        jobs = [job.request for job in self._jobs.values()]
        # The last token of a response is never fed back, so it needs no place in the cache.
        longest = max(len(request.prompt_token_ids) + request.params.max_response_tokens - 1 for request in jobs)
        self._max_length = max(self._max_length, longest)
        num_rows = min(self._max_batch_size, self._rows.num_rows + sum(admission.num_samples for admission in self._waiting))
        self._rows.reserve(
            num_rows,
            max(request.params.max_response_tokens for request in jobs),
            max(len(request.params.stop_token_ids) for request in jobs),
        )
        if self._cache is None:
            capacity = min(_FIRST_CAPACITY, self._max_length)
            self._cache = RowCache(self._model.config.num_hidden_layers, num_rows, capacity)
        self._cache.reserve(num_rows, 0)

    def _admissions_of(self, number: int, job: _Job) -> Iterator[_Admission]:
        """Neighbours that have the same tokens enter together."""
        unfinished = [index for index in range(job.request.num_samples) if index not in job.responses]
        first = 0
        for at, index in enumerate(unfinished):
            tokens = tuple(job.start_of(index).token_ids.tolist())
            end = at + 1
            goes_on = (
                end < len(unfinished)
                and unfinished[end] == index + 1
                and end - first < self._max_batch_size
                and not tokens
                and not len(job.start_of(index + 1).token_ids)
            )
            if not goes_on:
                yield _Admission(number, unfinished[first], end - first, (*job.request.prompt_token_ids, *tokens))
                first = end

    def abort(self, request_ids: Collection[int]) -> list[GenerateResult]:
        """End these requests and return what they have; ids of no request in work are ignored."""
        numbers = {number for number, job in self._jobs.items() if job.request.request_id in request_ids}
        self._waiting = deque(admission for admission in self._waiting if admission.number not in numbers)
        rows = np.flatnonzero(np.isin(self._rows.request[: self._rows.num_rows], list(numbers)))
        if len(rows):
            self._keep(rows, ["abort"] * len(rows))
            self._remove(rows)
        for number in numbers:
            job = self._jobs[number]
            for index in range(job.request.num_samples):
                if index not in job.responses:
                    start = job.start_of(index)
                    job.responses[index] = _Response(start.token_ids, start.log_probs, start.weight_versions, "abort")
        self._over = [number for number in self._over if number not in numbers]
        return self._results(sorted(numbers))

    @torch.inference_mode()
    def advance(self, max_steps: int) -> list[GenerateResult]:
        """Decode until some requests are finished, or for `max_steps` forwards; return the finished ones in request order."""
        if self._over:
            over, self._over = self._over, []
            return self._results(over)
        for _ in range(max_steps):
            if self.is_idle:
                break
            admissions = self._admissions()
            finished = self._prefill(admissions) if admissions else self._step()
            if finished:
                return self._results(finished)
        return []

    def _admissions(self) -> list[_Admission]:
        """What enters now: as many waiting groups as there are rows for, within the token bound of one prefill."""
        admissions: list[_Admission] = []
        num_free = self._rows.max_rows - self._rows.num_rows
        longest = 0
        while self._waiting and self._waiting[0].num_samples <= num_free:
            longest = max(longest, len(self._waiting[0].token_ids))
            if admissions and longest * (len(admissions) + 1) > HF_PREFILL_TOKENS:
                break
            num_free -= self._waiting[0].num_samples
            admissions.append(self._waiting.popleft())
        return admissions

    def _prefill(self, admissions: list[_Admission]) -> list[int]:
        """Run the prompts (with what was generated before) once each, copy their keys and values to the rows of their samples, and
        draw the next tokens.

        Prompts are padded on the left, so that the last position of all is the last one of the batch and the model computes
        no other logits.
        """
        prompts = [admission.token_ids for admission in admissions]
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
            job, first = self._jobs[admission.number], admission.first_sample
            self._rows.admit(admission.number, job.request, first, admission.num_samples, job.start_of(first))
        prompt_of_row = self._tensor(np.repeat(np.arange(len(prompts)), [admission.num_samples for admission in admissions]))
        self._rows_cache(length).insert(first_row, cache, prompt_of_row, num_pads[prompt_of_row])
        self._params = None
        return self._draw(logits[prompt_of_row], first_row, self._rows.sampling_params(first_row, self._device))

    def _step(self) -> list[int]:
        """One token for every row."""
        rows = self._rows
        position = rows.position[: rows.num_rows]
        length = int(position.max()) + 1
        cache = self._rows_cache(length)
        positions = self._tensor(position)
        is_ragged = int(position.min()) + 1 < length
        mask = torch.arange(length, device=self._device) <= positions[:, None] if is_ragged else None
        cache.begin_step(positions, length)
        logits = self._model(
            input_ids=self._tensor(rows.newest_tokens()),
            attention_mask=None if mask is None else mask[:, None, None, :],
            position_ids=positions[:, None],
            past_key_values=cache,
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
        """Take these rows out and close the holes; return the numbers of the requests that are over now, rising."""
        stopped = self._rows.stopped[finished_rows].tolist()
        numbers = self._keep(finished_rows, ["stop" if at_stop else "length" for at_stop in stopped])
        self._remove(finished_rows)
        return sorted(number for number in numbers if self._jobs[number].is_over)

    def _keep(self, kept: np.ndarray, finish_reasons: Sequence[FinishReason]) -> set[int]:
        """Copy the responses of these rows, one at least, to their requests, whose numbers are returned."""
        rows = self._rows
        counts, numbers, indices = (column[kept].tolist() for column in (rows.count, rows.request, rows.sample))
        places = list(zip(kept.tolist(), counts, strict=True))
        tokens = np.concatenate([rows.tokens[row, :count] for row, count in places], dtype=np.int32)
        log_probs = np.concatenate([rows.log_probs[row, :count] for row, count in places])
        versions = np.full(len(tokens), self._weight_version, np.int32)
        first = 0
        for number, index, count in zip(numbers, indices, counts, strict=True):
            before = self._jobs[number].start_of(index).weight_versions
            versions[first : first + len(before)] = before
            first += count
        columns = zip(pieces(tokens, counts), pieces(log_probs, counts), pieces(versions, counts), finish_reasons, strict=True)
        for number, index, response in zip(numbers, indices, columns, strict=True):
            self._jobs[number].responses[index] = _Response(*response)
        return set(numbers)

    def _remove(self, gone: np.ndarray) -> None:
        sources, targets = self._rows.remove(gone)
        if len(targets) and self._cache is not None:
            length = int(self._rows.position[targets].max())
            self._cache.move(self._tensor(sources), self._tensor(targets), length)
        self._params = None

    def _results(self, numbers: Sequence[int]) -> list[GenerateResult]:
        """The records of requests that are over, which are forgotten."""
        jobs = [self._jobs.pop(number) for number in numbers]
        responses = [job.responses[sample] for job in jobs for sample in range(job.request.num_samples)]
        texts = response_texts(self._tokenizer, [response.token_ids.tolist() for response in responses])
        samples = iter(
            [
                Sample(response.token_ids, response.log_probs, response.weight_versions, response.finish_reason, text)
                for response, text in zip(responses, texts, strict=True)
            ]
        )
        return [GenerateResult(job.request.request_id, tuple(itertools.islice(samples, job.request.num_samples))) for job in jobs]

    def _rows_cache(self, length: int) -> RowCache:
        """The cache, with room for so many positions."""
        assert self._cache is not None, "add() makes it"
        if length > self._cache.capacity:
            self._cache.reserve(0, min(self._max_length, max(length, 2 * self._cache.capacity)))
        return self._cache

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array, device=self._device)


def _left_padded_mask(num_pads: Tensor, length: int) -> Tensor:
    """Who may see whom [P, 1, L, L]: causal, no padding; a padding position sees itself, as an empty row could become NaN."""
    index = torch.arange(length, device=num_pads.device)
    is_causal = index <= index[:, None]
    is_token = index >= num_pads[:, None, None]
    return ((is_causal & is_token) | (index == index[:, None]))[:, None]
