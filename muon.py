"""Muon, the optimizer that trains the convolutions here, and the plan of a run with it.

An ordinary optimizer steps along the momentum of the gradient. Muon first makes that momentum
orthogonal: all its singular values become about 1, so that every direction of a filter bank moves
equally far. After K. Jordan 2024, https://kellerjordan.github.io/posts/muon, in the form that
airbench uses on CIFAR-10. There each filter bank is also held at the norm sqrt(filters), which is
free if a batch norm follows.

This file needs torch and nothing else.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

A, B, C = 3.4445, -4.7750, 2.0315  # K. Jordan's coefficients of the Newton-Schulz polynomial
NEWTON_SCHULZ_STEPS = 5
WARM_UP = 0.2  # the share of a run in which the learning rates rise
START = 0.04  # the learning rate at the start, as a share of its peak


class Muon(torch.optim.Optimizer):
    """Muon for convolutions; SGD with Nesterov momentum for parameter groups with `orthogonal=False`.

    Args:
        params: parameters or groups. Those of an orthogonal group are real and have two dimensions
            or more.
        lr: the length of a step; in orthogonal groups as a share of the weights' norm. A number, or
            a tensor with one.
        momentum: in [0, 1).
        weight_decay: the usual L2 term. Leave it at 0 in orthogonal groups, whose norm is fixed.

    Raises:
        ValueError: an orthogonal group holds a vector, a number or complex parameters, or an
            option is out of range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        orthogonal: bool = True,
    ):
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "orthogonal": orthogonal}
        super().__init__(params, options)

    def add_param_group(self, group: dict) -> None:
        super().add_param_group(group)
        added = self.param_groups.pop()
        check_group(added)
        self.param_groups.append(added)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One step for every parameter with a gradient. Returns the loss of the closure, if one is given.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.step_group(params, group)
        return loss

    def step_group(self, params: list[torch.Tensor], group: dict) -> None:
        for p in params:
            if p.grad.layout != torch.strided:
                raise RuntimeError(
                    "expected dense gradients, found a sparse one: give the embedding sparse=False"
                )
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in params]
        # The foreach functions take all parameters in one call. On a GPU calls cost more than
        # arithmetic.
        grads = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads)
        updates = torch._foreach_add(grads, buffers, alpha=group["momentum"])  # Nesterov
        if group["orthogonal"]:
            updates = orthogonalize(updates)
            fix_norms(params)
        lr = group["lr"]
        torch._foreach_mul_(updates, lr.squeeze() if isinstance(lr, torch.Tensor) else lr)
        torch._foreach_sub_(params, updates)


def check_group(group: dict) -> None:
    """Raise ValueError unless `Muon` can train this group."""
    lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
    if not (lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0):
        raise ValueError(
            "expected lr >= 0, 0 <= momentum < 1 and weight_decay >= 0, "
            f"found {lr}, {momentum} and {weight_decay}: correct them"
        )
    for p in group["params"]:
        if group["orthogonal"] and (p.ndim < 2 or p.is_complex()):
            found = "complex numbers" if p.is_complex() else "a vector"
            raise ValueError(
                f"expected real numbers in 2 dimensions or more, found {found}: "
                "put it into a group with orthogonal=False"
            )


def orthogonalize(updates: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each update with its singular values brought near 1, as a matrix (filters, everything else)."""
    result = list(updates)
    kinds = [(update.shape, update.device) for update in updates]
    for shape, device in dict.fromkeys(kinds):
        places = [i for i, kind in enumerate(kinds) if kind == (shape, device)]
        x = torch.stack([updates[i].flatten(1) for i in places])  # (banks of this shape, filters, rest)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # Newton-Schulz needs singular values up to 1
        for _ in range(NEWTON_SCHULZ_STEPS):
            square = x @ x.mT
            x = A * x + (B * square + C * square @ square) @ x
        for i, matrix in zip(places, x):
            result[i] = matrix.view(shape)
    return result


def fix_norms(params: list[torch.Tensor]) -> None:
    """Scale each filter bank to the norm sqrt(filters). A bank of zeros stays as it is."""
    norms = torch._foreach_norm(params)
    torch._foreach_clamp_min_(norms, 1e-7)  # not less: it would be 0 in float16
    torch._foreach_div_(params, norms)
    torch._foreach_mul_(params, [len(p) ** 0.5 for p in params])


# ---------------------------------------------------------------- the plan of a run


def parameter_groups(network: nn.Module) -> tuple[list, list, list]:
    """The trained parameters of a `Net` or a `Teacher`: (filter banks, other filters, norms).

    The banks are what Muon is for: 98 % of the parameters. A depthwise filter has one input, and
    the classifier has no batch norm behind it, so both are trained with SGD, like the batch
    norms.
    """
    banks, filters, norms = [], [], []
    for name, p in network.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim == 1:
            norms.append(p)
        elif "depthwise" in name or "classifier" in name:
            filters.append(p)
        else:
            banks.append(p)
    return banks, filters, norms


def one_cycle(share: float) -> float:
    """The learning rate as a share of its peak, after this share of the run; both are in [0, 1].

    It rises linearly from START to 1 in the warm-up, and then falls linearly to 0.
    """
    if share < WARM_UP:
        return START + (1 - START) * share / WARM_UP
    return max(0.0, (1 - share) / (1 - WARM_UP))


def plan(
    network: nn.Module,
    steps: int,
    *,
    learning_rate: float = 0.015,
    sgd_learning_rate: float = 0.2,
    weight_decay: float = 5e-4,
) -> tuple[Muon, LambdaLR]:
    """The optimizer and the schedule of a run with this many steps.

    Args:
        learning_rate: the peak for the filter banks, which Muon trains.
        sgd_learning_rate: the peak for all other parameters, which SGD trains.
        weight_decay: on depthwise filters and the classifier only.
    """
    banks, filters, norms = parameter_groups(network)
    # As numbers: the schedule would write into tensors, and the next plan with them would start at 0.
    sgd = {"lr": float(sgd_learning_rate), "momentum": 0.9, "orthogonal": False}
    groups = [
        {"params": banks},
        {"params": filters, "weight_decay": weight_decay, **sgd},
        {"params": norms, **sgd},
    ]
    optimizer = Muon(groups, lr=float(learning_rate))
    return optimizer, LambdaLR(optimizer, lambda step: one_cycle(step / steps))
