"""Drawing tokens: the inverse of the cumulative distribution, its truncations, and the random streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dapo_megatron.rollout.engine import GenerateRequest, SamplingParams
from dapo_megatron.rollout.row_table import RowTable
from dapo_megatron.rollout.sampling import RowParams, draw, uniforms
from dapo_megatron.types import EngineError, Sample

CPU = torch.device("cpu")
UNSTARTED = Sample((), (), (), "abort", "")


def row_params(num_rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> RowParams:
    return RowParams.of(np.full(num_rows, temperature), np.full(num_rows, top_k), np.full(num_rows, top_p), CPU)


def truncated_reference(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Distribution [V] of one row in fp64, token by token."""
    probs = (logits.double() / temperature).softmax(-1).tolist()
    by_probability = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    kept = by_probability[: top_k or None]
    mass = sum(probs[token] for token in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        if reached >= top_p:
            break
        nucleus.append(token)
        reached += probs[token] / mass
    total = sum(probs[token] for token in nucleus)
    reference = torch.zeros(len(probs), dtype=torch.float64)
    for token in nucleus:
        reference[token] = probs[token] / total
    return reference


SETTINGS = [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.7, 6, 0.9), (1.0, 1, 1.0), (1.0, 0, 1e-6)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_tokens_on_a_fine_grid_of_u_have_the_shares_of_the_distribution(temperature, top_k, top_p):
    logits = torch.randn(11, generator=torch.Generator().manual_seed(3)) * 2
    grid = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    tokens, log_probs = draw(logits.expand(len(grid), -1), grid, row_params(len(grid), temperature, top_k, top_p))
    reference = truncated_reference(logits, temperature, top_k, top_p)
    shares = torch.bincount(tokens, minlength=11).double() / len(grid)
    torch.testing.assert_close(shares, reference, atol=1e-4, rtol=0)
    torch.testing.assert_close(log_probs.double(), reference.log()[tokens], atol=1e-6, rtol=1e-6)


def test_rows_of_one_batch_follow_their_own_params():
    logits = torch.randn(len(SETTINGS), 11, generator=torch.Generator().manual_seed(4))
    u = torch.linspace(0, 0.999, len(SETTINGS), dtype=torch.float64)
    temperature, top_k, top_p = map(np.array, zip(*SETTINGS, strict=True))
    together = draw(logits, u, RowParams.of(temperature, top_k, top_p, CPU))
    for row, setting in enumerate(SETTINGS):
        token, log_prob = draw(logits[row : row + 1], u[row : row + 1], row_params(1, *setting))
        assert together[0][row] == token[0]
        torch.testing.assert_close(together[1][row], log_prob[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("top_k", [0, 3])
def test_token_of_zero_probability_is_never_drawn(u, top_k):
    logits = torch.full((1, 50_000), -torch.inf)
    logits[0, 100:40_000] = torch.randn(39_900, generator=torch.Generator().manual_seed(5))
    token, log_prob = draw(logits, torch.tensor([u], dtype=torch.float64), row_params(1, top_k=top_k))
    assert 100 <= token.item() < 40_000
    assert torch.isfinite(log_prob).all()


def test_greedy_takes_the_most_likely_token_with_log_prob_zero():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    params = RowParams.of(np.array([0.0, 1.0]), np.zeros(2, int), np.ones(2), CPU)
    tokens, log_probs = draw(logits, torch.tensor([0.999, 0.999], dtype=torch.float64), params)
    assert tokens.tolist() == [1, 2]
    assert log_probs[0] == 0
    torch.testing.assert_close(log_probs[1], logits[1].log_softmax(-1)[2])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_give_a_nan_log_prob(temperature):
    logits = torch.tensor([[0.0, torch.nan, 1.0]])
    _, log_prob = draw(logits, torch.tensor([0.5], dtype=torch.float64), row_params(1, temperature))
    assert torch.isnan(log_prob).all()


def test_equal_logits_at_the_top_k_border_keep_exactly_k_tokens():
    u = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    tokens, _ = draw(torch.zeros(100, 7), u, row_params(100, top_k=3))
    assert set(tokens.tolist()) == {0, 1, 2}


def test_random_stream_of_a_sample_depends_neither_on_the_group_size_nor_on_the_length():
    large = uniforms(seed=9, num_samples=6, num_tokens=200)
    np.testing.assert_array_equal(uniforms(seed=9, num_samples=3, num_tokens=70), large[:3, :70])
    assert len(np.unique(large)) == large.size
    assert not np.isin(uniforms(seed=10, num_samples=6, num_tokens=200), large).any()


def test_rows_that_finish_are_replaced_by_the_last_ones():
    table = RowTable()
    table.reserve(max_rows=6, max_tokens=4, max_stops=2)
    request = GenerateRequest(7, (1, 2, 3), 6, 5, SamplingParams(max_response_tokens=4, stop_token_ids=(8,)))
    table.admit(0, request, first_sample=0, num_samples=6, start=UNSTARTED)
    finished = table.append(0, np.array([8, 1, 2, 8, 4, 8]), np.zeros(6))
    assert finished.tolist() == [0, 3, 5]
    sources, targets = table.remove(finished)
    assert (sources.tolist(), targets.tolist()) == ([4], [0])
    assert table.sample[:3].tolist() == [4, 1, 2]
    assert table.newest_tokens()[:, 0].tolist() == [4, 1, 2]
    np.testing.assert_array_equal(table.next_uniforms(0), uniforms(5, 6, 4)[[4, 1, 2], 1])


def test_a_table_that_grows_keeps_its_rows_and_takes_samples_that_have_tokens():
    table = RowTable()
    table.reserve(max_rows=1, max_tokens=3, max_stops=0)
    table.admit(0, GenerateRequest(7, (1, 2, 3), 1, 5, SamplingParams(max_response_tokens=3)), 0, 1, UNSTARTED)
    table.append(0, np.array([9]), np.array([-0.25]))
    table.reserve(max_rows=2, max_tokens=5, max_stops=2)
    started = Sample((4, 6), (-1.0, -2.0), (0, 0), "abort", "")
    params = SamplingParams(max_response_tokens=5, stop_token_ids=(8, 7))
    table.admit(1, GenerateRequest(8, (1,), 4, 6, params), 3, 1, started)
    assert table.newest_tokens()[:, 0].tolist() == [9, 6]
    assert table.position.tolist() == [3, 2] and table.count.tolist() == [1, 2]
    np.testing.assert_array_equal(table.next_uniforms(0), [uniforms(5, 1, 3)[0, 1], uniforms(6, 4, 5)[3, 2]])
    assert table.append(0, np.array([7, 7]), np.array([-0.5, -3.0])).tolist() == [1], "a stop id of the second row alone"
    assert table.tokens[1, :3].tolist() == [4, 6, 7] and table.log_probs[1, :3].tolist() == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}, {"max_response_tokens": 0}]
)
def test_impossible_params_are_refused_with_their_name(wrong):
    with pytest.raises(EngineError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_empty_prompt_is_refused():
    with pytest.raises(EngineError, match="request 3 has an empty prompt"):
        GenerateRequest(3, (), 1, 0, SamplingParams())
