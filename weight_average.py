"""The moving average of a model's weights, which `fit` tests and keeps. Needs torch and nothing else."""

import copy
from collections.abc import Iterable

import torch
from torch import nn


def is_running_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm that learns statistics: one in evaluation mode is frozen."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training


class WeightAverage:
    """An exponential moving average of a model's weights and batch-norm statistics, in `module`.

    torch.optim.swa_utils.AveragedModel does the same and costs three times as much a step: it
    groups all tensors again each time, and its count of steps is a tensor that a GPU would have
    to wait for.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(model)
        for part in self.module.modules():
            # measure_norms runs the module in training mode, in which nothing may be dropped.
            if isinstance(part, nn.modules.dropout._DropoutNd):
                part.p = 0.0
        self.averages, self.currents = [], []
        self.counters = []  # pairs of counts: how many batches a batch norm has seen
        tensors = [part.state_dict(keep_vars=True).values() for part in (self.module, model)]
        pairs = {id(current): (average, current) for average, current in zip(*tensors)}
        for average, current in pairs.values():  # once each, even if a tensor has two names
            if average.is_floating_point():
                self.averages.append(average.detach())
                self.currents.append(current.detach())
            else:
                self.counters.append((average, current))

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights after a step. The first call copies them."""
        decay = 0.0
        if self.updates:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, self.currents, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def measure_norms(self, batches: Iterable[torch.Tensor]) -> None:
        """Compute the batch norms' statistics from these images; frozen ones keep theirs.

        As `torch.optim.swa_utils.update_bn`, which thaws frozen batch norms.
        """
        momenta = {norm: norm.momentum for norm in self.module.modules() if is_running_norm(norm)}
        for norm in momenta:
            norm.reset_running_stats()
            norm.momentum = None  # every image counts the same
        for images in batches if momenta else ():
            self.module(images)
        for norm, momentum in momenta.items():
            norm.momentum = momentum

    def copy_counters(self) -> None:
        """Take over how many batches the batch norms have seen."""
        for average, current in self.counters:
            average.copy_(current)

    def check_finite(self) -> None:
        for key, value in self.module.state_dict().items():
            if not value.isfinite().all():
                raise FloatingPointError(
                    f"expected finite weights, found others in {key} after the last step"
                )

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the averaged state dict."""
        return copy.deepcopy(self.module.state_dict())
