"""Host-side bookkeeping of the rows in decoding: numpy columns, so that a step costs the same Python for 1 row or 256.

Shape letters: R rows, T response tokens, S stop ids.
"""

from __future__ import annotations

import numpy as np
import torch

from dapo_megatron.rollout.engine import GenerateRequest
from dapo_megatron.rollout.sampling import RowParams, uniforms
from dapo_megatron.types import Sample


class RowTable:
    """What the decoding loop knows of each sample in flight. Rows in use are always [0, num_rows)."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.max_rows = self._max_tokens = self._max_stops = 0
        self.request = np.zeros(0, np.int64)
        """[R] number of the row's request."""
        self.sample = np.zeros(0, np.int64)
        """[R] index of the sample in its request."""
        self.position = np.zeros(0, np.int64)
        """[R] position in the sequence of the row's newest token, which is not yet in the cache."""
        self.count = np.zeros(0, np.int64)
        """[R] response tokens so far."""
        self.limit = np.zeros(0, np.int64)
        """[R] max_response_tokens."""
        self.stopped = np.zeros(0, np.bool_)
        """[R] whether the newest token is a stop id of the row."""
        self.tokens = np.zeros((0, 0), np.int64)
        """[R, T] response so far."""
        self.log_probs = np.zeros((0, 0), np.float32)
        """[R, T] nats."""
        self._temperature = np.zeros(0, np.float32)
        self._top_k = np.zeros(0, np.int64)
        self._top_p = np.zeros(0, np.float32)
        self._stops = np.zeros((0, 0), np.int64)
        self._uniforms = np.zeros((0, 0), np.float64)

    def reserve(self, max_rows: int, max_tokens: int, max_stops: int) -> None:
        """Make room for so many rows, response tokens and stop ids of a row; what the rows hold is kept."""
        self.max_rows = max(max_rows, self.max_rows)
        self._max_tokens = max(max_tokens, self._max_tokens)
        if max_stops > self._max_stops:
            self._stops = np.pad(self._stops, ((0, 0), (0, max_stops - self._max_stops)), constant_values=-1)
            self._max_stops = max_stops
        widths = {
            "tokens": self._max_tokens,
            "log_probs": self._max_tokens,
            "_uniforms": self._max_tokens,
            "_stops": self._max_stops,
        }
        for name, column in self._columns().items():
            shape = (self.max_rows, widths[name]) if name in widths else (self.max_rows,)
            if column.shape != shape:
                grown = np.zeros(shape, column.dtype)
                grown[tuple(map(slice, column.shape))] = column
                setattr(self, name, grown)

    def _columns(self) -> dict[str, np.ndarray]:
        return {name: column for name, column in vars(self).items() if isinstance(column, np.ndarray)}

    def admit(self, request_number: int, request: GenerateRequest, first_sample: int, num_samples: int, start: Sample) -> None:
        """Append samples first_sample.. of a request, each with the tokens of `start`."""
        params = request.params
        new = slice(self.num_rows, self.num_rows + num_samples)
        samples = slice(first_sample, first_sample + num_samples)
        count = len(start.token_ids)
        self.request[new] = request_number
        self.sample[new] = np.arange(samples.start, samples.stop)
        self.position[new] = len(request.prompt_token_ids) + count - 1
        self.count[new] = count
        self.limit[new] = params.max_response_tokens
        self.tokens[new, :count] = start.token_ids
        self.log_probs[new, :count] = start.log_probs
        self._temperature[new] = params.temperature
        self._top_k[new] = params.top_k or 0
        self._top_p[new] = params.top_p
        self._stops[new] = -1
        self._stops[new, : len(params.stop_token_ids)] = params.stop_token_ids
        draws = uniforms(request.seed, samples.stop, params.max_response_tokens)
        self._uniforms[new, : params.max_response_tokens] = draws[samples]
        self.num_rows += num_samples

    def sampling_params(self, first_row: int, device: torch.device) -> RowParams:
        """Of the rows from `first_row` on."""
        rows = slice(first_row, self.num_rows)
        return RowParams.of(self._temperature[rows], self._top_k[rows], self._top_p[rows], device)

    def next_uniforms(self, first_row: int) -> np.ndarray:
        """The random number of the next token of each row from `first_row` on."""
        rows = np.arange(first_row, self.num_rows)
        return self._uniforms[rows, self.count[rows]]

    def append(self, first_row: int, tokens: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
        """One more token for each row from `first_row` on; returns the rows that are now finished, rising."""
        rows = np.arange(first_row, self.num_rows)
        count = self.count[rows]
        self.tokens[rows, count] = tokens
        self.log_probs[rows, count] = log_probs
        self.count[rows] += 1
        self.position[rows] += 1
        self.stopped[rows] = stopped = (tokens[:, None] == self._stops[rows]).any(1)
        return rows[stopped | (count + 1 == self.limit[rows])]

    def newest_tokens(self) -> np.ndarray:
        """[R, 1] input of the next forward."""
        rows = np.arange(self.num_rows)
        return self.tokens[rows, self.count[rows] - 1][:, None]

    def remove(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Drop these rows (rising); the last rows move into the holes. Returns (source rows, target rows) of the moves."""
        num_left = self.num_rows - len(rows)
        targets = rows[rows < num_left]
        sources = np.setdiff1d(np.arange(num_left, self.num_rows), rows, assume_unique=True)
        for column in self._columns().values():
            column[targets] = column[sources]
        self.num_rows = num_left
        return sources, targets
