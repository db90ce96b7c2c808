"""AdamW with the interface of the fused optimizers of apex and TransformerEngine, for machines without CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import adamw


class CpuAdam(torch.optim.Optimizer):
    """torch's functional AdamW with the number of steps kept per parameter group, as FusedAdam does.

    megatron-core 0.19.2 cannot load a distributed optimizer over torch.optim.AdamW, whose parameters have a `step` each: it looks
    for that among the checkpoint's tensors, where it never is.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        if not adam_w_mode or capturable:
            raise ValueError("CpuAdam has decoupled weight decay only and no CUDA graphs; leave both settings at their defaults")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One AdamW step on every parameter that has a gradient."""
        for group in self.param_groups:
            done = group.get("step", 0)
            group["step"] = done + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self._state_of(parameter) for parameter in parameters]
            beta1, beta2 = group["betas"]
            adamw(
                parameters,
                [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(float(done)) for _ in parameters],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state
