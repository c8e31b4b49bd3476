"""The sums over an epoch: losses, hits, samples. Exact, whatever the batch sizes."""

import math

import torch
from torch.nn import functional as F

from checks import EMPTY, check_targets
from processes import sum_over_processes


class Totals:
    """Sums over the batches so far: losses, hits, samples.

    Each batch's sums stay on the device until somebody reads them. Then they are added up here,
    in float64, which some devices lack.
    """

    def __init__(self):
        self.pending: list[torch.Tensor] = []  # (loss, hits) of batches that nobody has read
        self.losses: list[float] = []
        self.steps: list[tuple[int, float]] = []  # (number, learning rate) of each batch
        self.correct = self.samples = 0

    @torch.no_grad()
    def add(self, logits: torch.Tensor, targets: torch.Tensor, number: int = 0, rate: float = 0.0) -> None:
        check_targets(logits, targets)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        classes = targets.argmax(1) if targets.ndim == 2 else targets
        self.pending.append(torch.stack([loss, (logits.argmax(1) == classes).sum()]))
        self.steps.append((number, rate))
        self.samples += len(targets)

    def read(self) -> None:
        """Wait for the device, and add up the batches since the last time."""
        if self.pending:
            losses, hits = torch.stack(self.pending).unbind(1)
            self.losses += losses.tolist()
            self.correct += sum(map(int, hits.tolist()))
            self.pending = []

    def sum_over_processes(self) -> None:
        self.read()
        loss, *counts = sum_over_processes(math.fsum(self.losses), self.correct, self.samples)
        self.losses, (self.correct, self.samples) = [loss], map(int, counts)

    def means(self) -> tuple[float, float]:
        self.read()
        if not self.samples:
            raise ValueError(f"expected at least one batch of (images, targets), {EMPTY}")
        return math.fsum(self.losses) / self.samples, 100 * self.correct / self.samples

    def check_finite(self, steps: int) -> None:
        """Raise FloatingPointError if one of the batches that nobody has read has no finite loss."""
        first = len(self.losses)
        self.read()
        for loss, (number, rate) in zip(self.losses[first:], self.steps[first:]):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"expected a finite loss, found {loss} in step {number} of {steps} "
                    f"at learning rate {float(rate):.4g}: lower it, or look for NaN in the images"
                )
