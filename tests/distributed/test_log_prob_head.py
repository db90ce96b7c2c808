"""The chunked, vocabulary-parallel LM head against the naive computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.distributed.ranks import run_ranks

ROWS, HIDDEN, VOCAB = 23, 16, 37


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, weight, targets, and gradients that flow into log-probs and entropy."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    return hidden, weight, targets, torch.randn(ROWS, generator=generator), torch.randn(ROWS, generator=generator)


def naive(temperature: float, entropy_gradient: bool) -> dict[str, np.ndarray]:
    hidden, weight, targets, of_log_probs, of_entropy = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    log_probs = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    total = (log_probs * of_log_probs).sum() + ((entropy * of_entropy).sum() if entropy_gradient else 0)
    total.backward()
    return as_numpy(log_probs, entropy, hidden.grad, weight.grad)


def as_numpy(*tensors: torch.Tensor | None) -> dict[str, np.ndarray]:
    names = ("log_probs", "entropy", "hidden_grad", "weight_grad")
    return {name: tensor.detach().numpy() for name, tensor in zip(names, tensors, strict=True) if tensor is not None}


def chunked(
    rank: int,
    init_method: str,
    world_size: int,
    rows_per_rank: int,
    temperature: float,
    chunk_tokens: int,
    entropy_gradient: bool,
) -> dict[str, np.ndarray]:
    import torch.distributed as dist

    from dapo_megatron.actor.log_probs import Vocabulary, head_loss, log_probs_and_entropy

    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    hidden, weight, targets, of_log_probs, of_entropy = inputs()
    padded = torch.zeros(rows_per_rank * world_size, HIDDEN)
    padded[:VOCAB] = weight
    start = rank * rows_per_rank
    local = padded[start : start + rows_per_rank].clone().requires_grad_()
    hidden.requires_grad_()
    vocabulary = Vocabulary(start, max(0, min(rows_per_rank, VOCAB - start)), dist.group.WORLD if world_size > 1 else None)

    def loss(log_probs: torch.Tensor, entropy: torch.Tensor, rows: slice) -> torch.Tensor:
        of_entropy_too = (entropy * of_entropy[rows]).sum() if entropy_gradient else 0
        return (log_probs * of_log_probs[rows]).sum() + of_entropy_too

    sizes = {"vocabulary": vocabulary, "temperature": temperature, "chunk_tokens": chunk_tokens}
    loss_sum, log_probs, entropy = head_loss(hidden, local, targets, loss, **sizes)
    (2 * loss_sum).backward()
    without_grad = log_probs_and_entropy(hidden, local, targets, **sizes)
    assert torch.equal(without_grad[0], log_probs) and torch.equal(without_grad[1], entropy)
    np.testing.assert_allclose(loss_sum.item(), loss(log_probs, entropy, slice(None)).item(), rtol=1e-5)
    return as_numpy(log_probs, entropy, hidden.grad / 2, local.grad / 2)


@pytest.mark.parametrize("entropy_gradient", [False, True], ids=["log_probs_only", "with_entropy"])
@pytest.mark.parametrize(("chunk_tokens", "temperature"), [(5, 1.0), (64, 0.7)])
@pytest.mark.parametrize(("world_size", "rows_per_rank"), [(1, VOCAB), (2, 20), (2, 40)], ids=["tp1", "tp2", "tp2_all_padding"])
def test_head_equals_the_naive_computation(
    world_size: int, rows_per_rank: int, chunk_tokens: int, temperature: float, entropy_gradient: bool
):
    expected = naive(temperature, entropy_gradient)
    results = run_ranks(chunked, world_size, world_size, rows_per_rank, temperature, chunk_tokens, entropy_gradient)
    for result in results:
        for name in ("log_probs", "entropy", "hidden_grad"):
            np.testing.assert_allclose(result[name], expected[name], atol=2e-5, err_msg=name)
    weight_grad = np.concatenate([result["weight_grad"] for result in results])
    np.testing.assert_allclose(weight_grad[:VOCAB], expected["weight_grad"], atol=2e-5)
    assert not weight_grad[VOCAB:].any(), "padding rows take no gradient"


def logits_held(rank: int, init_method: str, chunk_tokens: int) -> int:
    """The largest tensor [rows, vocabulary] that forward and backward make, in elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from dapo_megatron.actor.log_probs import Vocabulary, head_loss

    hidden, weight, targets, of_log_probs, _ = inputs()

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim == 2 and result.shape[-1] == VOCAB and result.shape[0] != HIDDEN:
                self.elements = max(self.elements, result.numel())
            return result

    with Largest() as seen:
        loss_sum, _, _ = head_loss(
            hidden.requires_grad_(),
            weight.requires_grad_(),
            targets,
            lambda log_probs, entropy, rows: (log_probs * of_log_probs[rows]).sum(),
            vocabulary=Vocabulary(0, VOCAB, None),
            temperature=1.0,
            chunk_tokens=chunk_tokens,
        )
        loss_sum.backward()
    return seen.elements


def test_only_one_chunk_of_logits_exists():
    assert run_ranks(logits_held, 1, 5) == [5 * VOCAB]
