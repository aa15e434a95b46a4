"""Muon for the inner matrices and AdamW for everything else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Quintic Newton-Schulz iteration: pull all singular values of [M, a, b] towards one."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.transpose(1, 2)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.transpose(1, 2)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; matrices of one shape are updated together."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._step_together(parameters, group)

    def _step_together(self, parameters: list[Tensor], group: dict) -> None:
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            buffer = state.setdefault("momentum", torch.zeros_like(parameter))
            buffer.lerp_(parameter.grad, 1 - group["momentum"])
            updates.append(parameter.grad.lerp(buffer, group["momentum"]))
        scale = math.sqrt(max(1.0, parameters[0].shape[0] / parameters[0].shape[1]))
        for parameter, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"] * scale)


class Team:
    """Processes that work on one batch together: each computes the gradients of its share, all take the same step.

    Args:
        rank: Number of this process.
        size: Number of processes.
        meeting: Address at which they find each other.
    """

    def __init__(self, rank: int, size: int, meeting: str) -> None:
        self.rank, self.size = rank, size
        if size > 1:
            torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)

    def average(self, gradients: list[Tensor]) -> None:
        """Replace gradients by their mean over the team, in place."""
        if self.size == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


class Optimiser:
    """Both optimisers under one cosine schedule with warm-up and gradient clipping.

    Args:
        modules: Module and learning-rate factor pairs; a factor of zero freezes the module.
        steps: Length of the schedule.
        lr_muon: Peak learning rate of the matrices.
        lr_adam: Peak learning rate of the rest.
        warmup: Steps of linear warm-up.
    """

    def __init__(
        self,
        modules: list[tuple[nn.Module, float]],
        steps: int,
        lr_muon: float = 0.02,
        lr_adam: float = 2e-3,
        warmup: int = 100,
    ) -> None:
        self.steps, self.warmup = steps, warmup
        matrices, rest = [], []
        for module, factor in modules:
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(factor > 0)
                if factor == 0:
                    continue
                is_matrix = parameter.ndim == 2 and "layers" in name
                group = {"params": [parameter], "lr": factor * (lr_muon if is_matrix else lr_adam)}
                (matrices if is_matrix else rest).append(group)
        self.optimisers: list[torch.optim.Optimizer] = []
        if matrices:
            self.optimisers.append(Muon(_merge(matrices), lr=lr_muon))
        if rest:
            self.optimisers.append(torch.optim.AdamW(_merge(rest), lr=lr_adam, weight_decay=0.05, betas=(0.9, 0.98)))
        self.parameters = [p for opt in self.optimisers for g in opt.param_groups for p in g["params"]]
        self.peaks = [[g["lr"] for g in opt.param_groups] for opt in self.optimisers]

    def step(self, at: int) -> None:
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        progress = max(0.0, (at - self.warmup) / max(1, self.steps - self.warmup))
        factor = min(1.0, (at + 1) / self.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
        for optimiser, peaks in zip(self.optimisers, self.peaks, strict=True):
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimiser.step()
        for parameter in self.parameters:
            parameter.grad = None


def _merge(groups: list[dict]) -> list[dict]:
    by_rate: dict[float, list[Tensor]] = defaultdict(list)
    for group in groups:
        by_rate[group["lr"]] += group["params"]
    return [{"params": params, "lr": rate} for rate, params in by_rate.items()]
