"""Where prompts and responses lie in a pack, and whether attention sees them as sequences or as trees.

As sequences, each response has its prompt in front of it: keys and values of the prompt are copied for each of them, and a causal kernel
does nothing in vain. As trees, a prompt stands once before all its responses, and a mask hides them from one another: nothing is
copied, but a response that is long beside its prompt is compared to all the others in vain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dapo_megatron.models.packed import PackedSequences, consecutive, pack_sequences, pack_trees

_SLOT_COST, _TILE_ROW_COST = 32, 128
"""Of a token copied to a tile slot, and of one more sequence or tree in a tile, in pairs of tokens that attention compares."""
_MAX_TREE_TOKENS = 512
"""Masks are as large as the square of it."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrompts:
    """One entry a response, int64 [S]: where its prompt starts in the pack and how long that is, and the same of the response."""

    prompt_starts: np.ndarray
    prompt_lengths: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def sequence_lengths(self) -> np.ndarray:
        """Prompt and response, [S]."""
        return self.prompt_lengths + self.lengths

    def predicting_places(self, num_responses: int) -> np.ndarray:
        """Of the first responses: the last place of the prompt and all of the response, one response after the other."""
        last = self.prompt_starts + self.prompt_lengths - 1
        first = slice(num_responses)
        return consecutive(
            _alternating(last[first], self.starts[first]), _alternating(np.ones_like(last[first]), self.lengths[first])
        )

    def pack(self, device: torch.device) -> PackedSequences:
        """The cheaper of the two ways."""
        starts, of_prompt = np.unique(self.prompt_starts, return_inverse=True)
        if len(starts) < len(self.starts) and device.type == "cpu":  # CUDA's fast kernels take no such masks
            tree_lengths = np.bincount(of_prompt, self.lengths).astype(np.int64) + self._of_prompts(of_prompt)
            if tree_lengths.max() <= _MAX_TREE_TOKENS and _cost(tree_lengths, 1.0) < _cost(self.sequence_lengths, 0.5):
                return self._trees(of_prompt, tree_lengths, device)
        places = consecutive(_alternating(self.prompt_starts, self.starts), _alternating(self.prompt_lengths, self.lengths))
        return pack_sequences(places, self.sequence_lengths, device)

    def _of_prompts(self, of_prompt: np.ndarray) -> np.ndarray:
        """Lengths of the prompts, each once."""
        lengths = np.zeros(of_prompt.max() + 1, np.int64)
        lengths[of_prompt] = self.prompt_lengths
        return lengths

    def _trees(self, of_prompt: np.ndarray, tree_lengths: np.ndarray, device: torch.device) -> PackedSequences:
        """Trunks are prompts, branches are responses; `of_prompt` [S] has the number of each response's tree."""
        _, first = np.unique(of_prompt, return_index=True)
        trunks = np.zeros(len(first), np.int64)
        tree = np.concatenate((np.arange(len(first)), of_prompt))
        branch = np.concatenate((trunks, 1 + np.arange(len(of_prompt))))
        order = np.lexsort((branch, tree))
        starts = np.concatenate((self.prompt_starts[first], self.starts))[order]
        lengths = np.concatenate((self.prompt_lengths[first], self.lengths))[order]
        positions = np.concatenate((trunks, self.prompt_lengths))[order]
        return pack_trees(
            places=consecutive(starts, lengths),
            lengths=tree_lengths,
            positions=consecutive(positions, lengths),
            branches=np.repeat(branch[order], lengths),
            device=device,
        )


def _cost(lengths: np.ndarray, share_of_pairs: float) -> float:
    return float((share_of_pairs * lengths**2 + _SLOT_COST * lengths + _TILE_ROW_COST).sum())


def _alternating(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.stack((first, second), axis=1).ravel()
