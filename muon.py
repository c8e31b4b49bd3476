"""Muon, the optimizer that trains the filter banks."""

from collections.abc import Iterable

import torch


class Muon(torch.optim.Optimizer):
    """Steps of one size in every direction: the momentum of each filter bank is made orthogonal before it is applied.

    After K. Jordan's Muon (kellerjordan.github.io/posts/muon, 2024) as airbench uses it on CIFAR-10: for convolutions
    that a batch norm follows, to which the scale of their weights does not matter, so each bank is kept at the norm
    sqrt(filters). What else a network has, in groups with `orthogonal=False`, takes plain SGD with Nesterov momentum.

    Args:
        groups: parameters, or dicts of params with options of their own; those of orthogonal ones have 2 dimensions or more.
        lr: the step, as a share of the weights for orthogonal groups.
        momentum: in [0, 1).
        weight_decay: this share of the weights is added to the gradient; leave it 0 for orthogonal groups.

    Raises ValueError for an orthogonal group that holds a vector or a number.
    """

    def __init__(self, groups: Iterable, lr: float, momentum: float = 0.95, weight_decay: float = 0.0, orthogonal: bool = True):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "orthogonal": orthogonal})
        if any(p.ndim < 2 for group in self.param_groups if group["orthogonal"] for p in group["params"]):
            raise ValueError("expected 2 dimensions or more, found a vector: put it into a group with orthogonal=False")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if not (parameters := [p for p in group["params"] if p.grad is not None]):
                continue
            for p in parameters:
                momentum = self.state[p].get("momentum")
                self.state[p]["momentum"] = torch.zeros_like(p) if momentum is None else laid_out_like(p, momentum)
            weights = [matrix(p) for p in parameters]
            momenta = [matrix(self.state[p]["momentum"]) for p in parameters]
            gradients = [matrix(laid_out_like(p, p.grad)) for p in parameters]
            # Lists at once: on a GPU each call costs time.
            gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, gradients)
            updates = torch._foreach_add(gradients, momenta, alpha=group["momentum"])
            if group["orthogonal"]:
                updates = orthogonal(updates)
                torch._foreach_div_(weights, torch._foreach_norm(weights))
                torch._foreach_mul_(weights, [len(p) ** 0.5 for p in parameters])
            torch._foreach_mul_(updates, group["lr"])
            torch._foreach_sub_(weights, updates)


def laid_out_like(p: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, in the order in which p lies in memory."""
    return tensor if tensor.stride() == p.stride() else torch.empty_like(p).copy_(tensor)


def matrix(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous or channels-last tensor as (first dimension, the others as they lie in memory), without a copy."""
    tensor = tensor if tensor.is_contiguous() else tensor.movedim(1, -1)
    return tensor.view(len(tensor), -1) if tensor.ndim > 1 else tensor.view(1, -1)


def orthogonal(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each with all its singular values brought near 1, by Newton-Schulz steps."""
    result, together = list(matrices), {}
    for i, one in enumerate(matrices):  # each call costs a GPU more than the zeros that make all one size
        together.setdefault(None if one.is_cuda else one.shape, []).append(i)
    for places in together.values():
        rows, columns = (max(matrices[i].shape[side] for i in places) for side in (0, 1))
        x = matrices[0].new_zeros(len(places), rows, columns)
        parts = [part[: len(matrices[i]), : matrices[i].shape[1]] for i, part in zip(places, x)]
        torch._foreach_copy_(parts, [matrices[i] for i in places])
        x /= x.norm(dim=(1, 2), keepdim=True) + 1e-7
        for _ in range(5):
            square = x @ x.mT
            polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)  # K. Jordan's coefficients
            x = torch.baddbmm(x, polynomial, x, beta=3.4445)
        for i, part in zip(places, x):
            result[i] = part[: len(matrices[i]), : matrices[i].shape[1]].contiguous()
    return result
