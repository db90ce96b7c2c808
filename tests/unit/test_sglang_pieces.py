"""Events of a server's stream, as SGLang writes them, and what is new in each."""

from __future__ import annotations

from typing import Any

import pytest

from dapo_megatron.rollout.sglang_engine import _piece
from dapo_megatron.types import EngineError


def event(output_ids: list[int], log_probs: list[float], num_so_far: int, **meta: Any) -> dict[str, Any]:
    spans = [{"version": "3", "start": 0, "end": num_so_far}]
    return {
        "index": 0,
        "output_ids": output_ids,
        "meta_info": {
            "completion_tokens": num_so_far,
            "output_token_logprobs": [[value, 0, None] for value in log_probs],
            "weight_versions": spans,
            **meta,
        },
    }


ABORT = {"finish_reason": {"type": "abort", "message": "Abort in waiting queue"}}


FAULT = {"finish_reason": {"type": "abort", "message": "Out of memory", "status_code": 500}}


@pytest.mark.parametrize(
    ("sent", "num_before", "tokens", "log_probs"),
    [
        pytest.param(event([13, 14], [-3.0, -4.0], 4), 2, [13, 14], [-3.0, -4.0], id="new tokens"),
        pytest.param(event([14], [-1.0, -2.0, -3.0, -4.0], 4, **ABORT), 4, [], [], id="abort repeats the last token"),
        pytest.param(
            event([13, 14, 14], [-3.0, -4.0, -1.0, -2.0, -3.0, -4.0], 4, **ABORT),
            2,
            [13, 14],
            [-3.0, -4.0],
            id="abort behind tokens that waited to be sent",
        ),
        pytest.param(event([], [], 0, **ABORT), 0, [], [], id="abort before the first token"),
        pytest.param(event([86], [], 1, **FAULT), 0, [], [], id="a token that stands in for none"),
        pytest.param(event([13, 14], [-3.0, -4.0], 4, **FAULT), 2, [13, 14], [-3.0, -4.0], id="fault in the middle"),
    ],
)
def test_every_token_is_taken_once_with_its_own_log_prob(
    sent: dict[str, Any], num_before: int, tokens: list[int], log_probs: list[float]
):
    piece = _piece(sent, num_before)
    assert (piece.token_ids, piece.log_probs, piece.weight_versions) == (tokens, log_probs, [3] * len(tokens))
    assert piece.finish_reason == ("abort" if "finish_reason" in sent["meta_info"] else None)


def test_last_piece_says_which_weights_drew_every_token_of_the_request():
    spans = [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 4}]
    last = _piece(event([13, 14], [-3.0, -4.0], 4, weight_versions=spans, finish_reason={"type": "length"}), 2)
    assert (last.weight_versions, last.versions_of_all) == ([4, 4], [3, 3, 4, 4])
    between = event([13, 14], [-3.0, -4.0], 4, weight_version="4")
    del between["meta_info"]["weight_versions"]
    assert (_piece(between, 2).weight_versions, _piece(between, 2).versions_of_all) == ([4, 4], ())


@pytest.mark.parametrize(("output_ids", "log_probs"), [([14], [-3.0, -4.0]), ([13, 14], [-4.0]), ([14], [-4.0])])
def test_tokens_or_log_probs_that_are_missing_are_an_error(output_ids: list[int], log_probs: list[float]):
    with pytest.raises(EngineError, match="where 2 are new; start it with --skip-tokenizer-init --incremental-streaming-output"):
        _piece(event(output_ids, log_probs, 4), 2)
