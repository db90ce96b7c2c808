"""Modules of the local layer spec against torch's own operations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.distributed.ranks import run_ranks


def forward_and_backward(rank: int, init_method: str) -> dict[str, Any]:
    """Of both modules: whether bits are torch's, gradients beside torch's, elements kept for the backward pass."""
    import torch
    import torch.nn.functional as F

    from dapo_megatron.models.norm import SequenceParallelRMSNorm
    from dapo_megatron.models.swiglu import SwiGLU

    torch.manual_seed(0)
    results: dict[str, Any] = {}

    def run(function: Any, x: torch.Tensor, grad: torch.Tensor, *parameters: torch.Tensor) -> tuple[list[torch.Tensor], int]:
        leaf = x.detach().clone().requires_grad_()
        for parameter in parameters:
            parameter.grad = None
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = function(leaf.clone())
        out.backward(grad)
        return [out, leaf.grad, *(parameter.grad.clone() for parameter in parameters)], sum(kept.values())

    for dtype in (torch.float32, torch.bfloat16):
        joined, grad = torch.randn(7, 1, 12, dtype=dtype), torch.randn(7, 1, 6, dtype=dtype)
        ours, results["swiglu_kept"] = run(SwiGLU(config=None), joined, grad)
        theirs, _ = run(lambda x: F.silu(x[..., :6]) * x[..., 6:], joined, grad)
        results[f"swiglu_{dtype}"] = all(map(torch.equal, ours, theirs))

    out = SwiGLU(config=None)(joined.requires_grad_().clone()).sum()
    out.backward(retain_graph=True)
    try:
        out.backward()
    except RuntimeError as error:
        results["swiglu_again"] = str(error)

    norm = SequenceParallelRMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 40)  # type: ignore[arg-type]
    torch.nn.init.normal_(norm.weight)
    x, grad = torch.randn(7, 1, 3, 64), torch.randn(7, 1, 3, 40)
    part = slice(24, None)  # of a joined projection, as queries are
    ours, results["norm_kept"] = run(lambda x: norm(x[..., part]), x, grad, norm.weight)
    theirs, _ = run(lambda x: F.rms_norm(x[..., part], (40,), norm.weight, norm.eps), x, grad, norm.weight)
    results["norm_forward"] = torch.equal(ours[0], theirs[0])
    results["norm_gradients"] = [(a.numpy(), b.numpy()) for a, b in zip(ours[1:], theirs[1:], strict=True)]
    return results


def test_local_modules_compute_what_torch_does_and_keep_less():
    (got,) = run_ranks(forward_and_backward, 1)
    assert got["swiglu_torch.float32"] and got["swiglu_torch.bfloat16"], "bits differ"
    assert got["swiglu_kept"] == 7 * 12, "its input alone"
    assert "modified by an inplace operation" in got["swiglu_again"], "its input is its gradient by then"
    assert got["norm_forward"], "bits differ"
    assert got["norm_kept"] == 7 * 3 * 40 + 40 + 7 * 3, "input, weight and one scale a row"
    for ours, theirs in got["norm_gradients"]:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
