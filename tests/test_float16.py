"""float16 with loss scaling, as on a T4. The CPU computes in float16, too, so all of it runs here."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import hardware
from batches import BatchLoader
from dataset import ASSETS, AlbumentationsCIFAR10, train_transform
from hardware import LossScaler, precision
from identity import digest
from muon import Muon
from training_utils import fit, gradient_step, train

STEPS = 6


@pytest.fixture(autouse=True)
def in_float16(monkeypatch):
    monkeypatch.setattr(hardware, "PRECISIONS", {"cpu": torch.float16})


def small_net(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 8, 3, 2, bias=False), nn.ReLU(), nn.BatchNorm2d(8), nn.Dropout(0.1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))


def optimizer_of(net, lr=0.05):
    vectors = [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": [net[0].weight]}, {"params": [net[6].weight, *vectors], "orthogonal": False}]
    return Muon(groups, lr=lr, momentum=0.9)


class Batches:
    """Batches of 16 random images, with values of ordinary size except in some steps of every epoch."""

    def __init__(self, overflowing=(), value=1e30):
        images = torch.randn(STEPS, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        targets = torch.randint(10, (STEPS, 16), generator=torch.Generator().manual_seed(1))
        for step in overflowing:
            images[step] *= value
        self.batches = list(zip(images, targets))

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def run(epochs=3, batches=None, **files):
    """The weights and the history, without its seconds, of a run whose first steps overflow."""
    net = small_net()
    optimizer = optimizer_of(net)
    batches = batches or Batches()
    schedule = LambdaLR(optimizer, lambda step: 1 - step / 100)
    history = fit(net, batches, Batches(), optimizer, schedule, epochs=epochs, ema_decay=0.9, **files)
    return net.state_dict(), [{k: v for k, v in row.items() if k != "seconds"} for row in history]


@pytest.mark.parametrize(
    "capability, expected",
    [((6, 1), torch.float32), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_a_gpu_computes_in_what_its_generation_is_fast_in(capability, expected, monkeypatch):
    monkeypatch.setattr(hardware, "PRECISIONS", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision(torch.device("cuda")) == expected
    assert precision(torch.device("mps")) == torch.float32
    assert precision(torch.device("xpu")) == torch.bfloat16


def test_a_run_in_float16_ends_near_one_in_float32():
    images = AlbumentationsCIFAR10(ASSETS, transform=train_transform())
    images.data, images.targets = images.data[:800], images.targets[:800]
    losses = []
    for dtype in (torch.float16, torch.float32):
        hardware.PRECISIONS["cpu"] = dtype
        net = small_net()
        inside = []
        net[0].register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
        loaders = BatchLoader(images, 50, shuffle=True), BatchLoader(images, 100, shuffle=False)
        history = fit(net, *loaders, optimizer_of(net), epochs=3)
        assert set(inside) == {dtype}
        losses.append([history[-1]["train_loss"], history[-1]["test_loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0][1] < 0.95 * math.log(10)


def test_small_gradients_survive():
    """Without scaling they would be 0, because float16 has nothing between 0 and 6e-8."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 10, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = net[1].weight.detach().clone()
    images = torch.full((2, 1, 2, 2), 1e-7)
    gradient_step(net, optimizer)(images, torch.tensor([3, 5]))
    assert (net[1].weight != before).float().mean() > 0.1
    assert net[1].weight.grad.abs().max() < 1e-6


@pytest.mark.parametrize("value", [1e30, math.nan])
def test_a_skipped_step_counts_for_nobody(value):
    net, calls = small_net(), []
    optimizer = optimizer_of(net)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    scaler = LossScaler(net)
    step = gradient_step(net, optimizer, scaler=scaler)

    def watched(images, targets):
        before = [value.clone() for value in net.state_dict().values()]
        logits = step(images, targets)
        changed = [not torch.equal(*pair) for pair in zip(before, net.state_dict().values())]
        calls.append(any(changed))
        return logits

    updates = []
    loss, accuracy = train(
        net,
        Batches({2, 5}, value),
        optimizer,
        schedule,
        step=watched,
        after_step=lambda: updates.append(1),
    )
    assert calls == [True, True, False, True, True, False]
    assert schedule.last_epoch == len(updates) == STEPS - 2
    assert scaler.skipped == 2
    assert math.isfinite(loss) and accuracy * 64 % 100 == 0, "of the 64 images in the other steps"


def test_a_run_survives_overflow_and_continues_exactly(tmp_path, monkeypatch):
    """Too large a factor overflows in the first steps, and large pixels do in every epoch."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(hardware.torch.amp, "GradScaler", lambda device: scaler(device, 2.0**21))
    weights, history = run(batches=Batches({1}))
    assert all(math.isfinite(value) for row in history for value in row.values())
    steps = (0.05 - history[1]["learning_rate"]) / 0.05 * 100
    assert 0 < steps < STEPS - 2, "the first steps were skipped, too"

    class Stopped(Batches):
        def __iter__(self):
            yield from self.batches[:3]
            raise KeyboardInterrupt

    files = {"checkpoint": tmp_path / "net.pt", "history_file": tmp_path / "history.csv"}

    def stop(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    run(batches=Batches({1}), on_epoch=stop, **files)
    hardware.PRECISIONS["cpu"] = torch.float32  # the checkpoint knows better
    resumed = run(batches=Batches({1}), **files)
    assert resumed[1] == history
    assert all(torch.equal(resumed[0][key], value) for key, value in weights.items())


def test_overflow_in_every_step_is_an_error_with_the_learning_rate(tmp_path):
    everywhere = Batches(range(STEPS))
    message = "epoch 1: expected finite gradients .* in 6 steps, the last at learning rate 0.05: lower it"
    with pytest.raises(FloatingPointError, match=message):
        run(batches=everywhere)
    everywhere.batches *= 8
    with pytest.raises(FloatingPointError, match="epoch 1: expected finite gradients .* in 32 steps"):
        run(batches=everywhere, checkpoint=tmp_path / "net.pt")


def test_overflow_in_every_other_step_does_not_halve_the_factor_to_nothing():
    batches = Batches({0, 2, 4}, math.nan)
    with pytest.raises(FloatingPointError, match="epoch 11: expected finite gradients .* in 32 steps"):
        run(epochs=20, batches=batches)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_torch_s_optimizers_skip_a_step_too(kind, fused):
    net = small_net()
    optimizer = kind(net.parameters(), lr=0.01, fused=fused)
    scaler = LossScaler(net)
    step = gradient_step(net, optimizer, scaler=scaler)
    for number, (images, targets) in enumerate(Batches({1, 3})):
        before = digest([net.state_dict(), optimizer.state_dict()])
        step(images, targets)
        assert (digest([net.state_dict(), optimizer.state_dict()]) == before) == (number in (1, 3))
    assert scaler.skipped == 2


def test_an_infinite_loss_is_named_by_its_step_although_others_were_skipped():
    """A logit of -inf makes the loss infinite, but leaves the gradients finite."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    images = torch.full((4, 8, 1, 1, 1), 0.1)
    images[1] = math.nan
    targets = torch.zeros(4, 8, dtype=torch.int64)
    targets[3] = 1
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[0.0], [-1e6]]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    message = "found inf in step 4 of 4 at learning rate 0.1667"
    with pytest.raises(FloatingPointError, match=message):
        train(net, list(zip(images, targets)), optimizer, schedule)


def test_other_precisions_take_plain_steps():
    hardware.PRECISIONS["cpu"] = torch.float32
    net = small_net()
    scaler = LossScaler(net)
    loss = torch.tensor(2.0)
    assert scaler.scale(loss) is loss
    state = scaler.state_dict()
    optimizer = optimizer_of(net)
    train(net, Batches(), optimizer, step=gradient_step(net, optimizer, scaler=scaler))
    assert scaler.state_dict() == state
