"""Training and testing: exact numbers, the moving average, soft targets, and a whole run on the sample."""

import copy
import csv
import itertools
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dataset
import hardware
import training_utils
from batches import BatchLoader, ProgressiveLoader
from dataset import ASSETS, AlbumentationsCIFAR10, train_transform
from model import Net
from muon import plan
from training_utils import accept_interrupt, fit, gradient_step, soft_targets, start_epoch, train
from weight_average import WeightAverage

TRAIN_LINE = r"Train: Loss=\d+\.\d{4} Batch_id=%d Accuracy=\d+\.\d\d: "
TRAIN_LINE += r"100%%\|██████████\| %d/%d \[\d\d:\d\d<00:00, +[\d.]+(it/s|s/it)\]"
TEST_LINE = r"Test set: Average loss: \d+\.\d{4}, Accuracy: \d+/%d \(\d+\.\d\d%%\)"


class Scores(nn.Module):
    """Logits that are the pixels themselves, so that every number can be computed by hand."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return images.flatten(1) * self.scale


def uneven_batches():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(17, 1, 1, 5, generator=generator)
    targets = torch.randint(5, (17,), generator=generator)
    return images, targets, list(zip(images.split([8, 8, 1]), targets.split([8, 8, 1])))


def loss_and_accuracy(logits, targets):
    accuracy = 100 * (logits.argmax(1) == targets).float().mean().item()
    return F.cross_entropy(logits, targets).item(), accuracy


def sgd(model, learning_rate=0.1):
    return torch.optim.SGD(model.parameters(), lr=learning_rate)


# ---------------------------------------------------------------- an epoch


def test_losses_and_accuracies_are_exact_whatever_the_batch_sizes(capsys):
    images, targets, batches = uneven_batches()
    loss, accuracy = expected = loss_and_accuracy(images.flatten(1), targets)
    assert training_utils.test(Scores(), batches) == pytest.approx(expected, rel=1e-6)
    frozen = Scores()
    assert train(frozen, batches, sgd(frozen, 0.0)) == pytest.approx(expected, rel=1e-6)
    lines = re.split(r"[\r\n]+", capsys.readouterr().out)
    correct = round(accuracy * 0.17)
    assert f"Test set: Average loss: {loss:.4f}, Accuracy: {correct}/17 ({accuracy:.2f}%)" in lines
    bar = f"Train: Loss={loss:.4f} Batch_id=2 Accuracy={accuracy:.2f}: 100%|██████████| 3/3 ["
    assert any(bar in line for line in lines)


def test_a_sample_counts_with_the_prediction_before_its_step():
    images, targets, batches = uneven_batches()
    model = Scores()
    before = loss_and_accuracy(batches[0][0].flatten(1), batches[0][1])
    assert train(model, batches[:1], sgd(model, 10.0)) == pytest.approx(before, rel=1e-6)
    assert model.scale.item() != 1


def test_schedule_and_callback_follow_every_step():
    _, _, batches = uneven_batches()
    model = Scores()
    optimizer = sgd(model, 0.0)
    optimizer.param_groups[0]["lr"] = 1.0
    rates = []
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def after_step():
        rates.append(optimizer.param_groups[0]["lr"])

    train(model, batches, optimizer, scheduler, after_step=after_step)
    assert rates == [0.5, 0.25, 0.125]


def test_training_has_the_losses_of_a_plain_loop(monkeypatch):
    """In float64, because fresh weights magnify a rounding a hundredfold a step: float32 could not tell."""
    monkeypatch.setattr(hardware, "precision", lambda device: torch.float32)
    torch.manual_seed(0)
    images = AlbumentationsCIFAR10(ASSETS, transform=train_transform())
    images.data, images.targets = images.data[::60][:32], images.targets[::60][:32]
    batches = [(inputs.double(), targets) for inputs, targets in BatchLoader(images, 8, shuffle=True)]
    start = Net().double()

    def options(nesterov):
        return {"lr": 0.01, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 5e-4}

    def plain_loop(nesterov):
        net, losses = copy.deepcopy(start), []
        optimizer = torch.optim.SGD(net.parameters(), **options(nesterov))
        for inputs, targets in batches:
            loss = F.cross_entropy(net(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    fast = copy.deepcopy(start).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(fast.parameters(), fused=True, **options(True))
    step = gradient_step(fast, optimizer)
    losses = [train(fast, [batch], optimizer, step=step)[0] for batch in batches]
    assert losses == pytest.approx(plain_loop(True), rel=0, abs=1e-10)
    assert losses != pytest.approx(plain_loop(False), rel=0, abs=1e-3), "the test tells other momentum"


def test_soft_targets_are_learnt_and_the_labels_are_scored():
    images, targets, _ = uneven_batches()
    pupil = Scores()
    answers = (images.flatten(1) * 1.5).softmax(1)
    logits = images.flatten(1) * pupil.scale
    (slope,) = torch.autograd.grad(F.cross_entropy(logits, answers), pupil.scale)
    expected = loss_and_accuracy(logits, targets)
    assert train(pupil, [(images, targets, answers)], sgd(pupil)) == pytest.approx(expected, rel=1e-6)
    assert pupil.scale.item() == pytest.approx(1 - 0.1 * slope.item(), rel=1e-6)


def test_soft_targets_come_from_a_teacher_in_evaluation_mode(monkeypatch):
    monkeypatch.setattr(hardware, "precision", lambda device: torch.float32)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), Scores())
    teacher[0].running_mean.fill_(1.0)
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    images = torch.randn(120, 1, 1, 5)
    expected = ((images.flatten(1) - 1) / (1 + 1e-5) ** 0.5 / 2.0).softmax(1)
    torch.testing.assert_close(soft_targets(teacher, images, 2.0), expected)
    assert all(module.training for module in teacher.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())


def test_modes_are_restored_after_a_test_even_if_it_is_interrupted():
    _, _, batches = uneven_batches()
    model = nn.Sequential(Scores(), nn.Dropout(0.5).eval())

    def interrupted():
        yield batches[0]
        raise KeyboardInterrupt

    training_utils.test(model, batches)
    assert [module.training for module in (model, *model)] == [True, True, False]
    with pytest.raises(KeyboardInterrupt):
        training_utils.test(model, interrupted())
    assert [module.training for module in (model, *model)] == [True, True, False]


def test_train_turns_the_model_to_training_mode():
    _, _, batches = uneven_batches()
    model = nn.Sequential(nn.BatchNorm2d(1), Scores()).eval()
    train(model, batches[:1], sgd(model))
    assert model[0].num_batches_tracked == 1


def with_two_norms():
    norms = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
    return nn.Sequential(*norms, nn.Dropout(0.5), Scores())


@pytest.mark.parametrize("function", ["train", "fit", "fit with statistics"])
def test_a_frozen_batch_norm_stays_frozen(function):
    _, _, batches = uneven_batches()
    batches = batches[:2]
    model = with_two_norms()
    frozen, running = model[:2]
    frozen.eval()
    frozen.running_mean.fill_(0.7)
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items() if "run" in name}
    if function == "train":
        train(model, batches, sgd(model, 0.0))
    else:
        statistics = batches if "statistics" in function else None
        fit(model, batches, batches, sgd(model, 0.0), epochs=2, ema_decay=0.9, statistics=statistics)
    assert all(torch.equal(frozen.state_dict()[name], tensor) for name, tensor in before.items())
    assert [module.training for module in (model, *model)] == [True, False, True, True, True]
    assert running.running_mean != 0
    assert running.num_batches_tracked == (2 if function == "train" else 4)
    assert frozen.num_batches_tracked == 0


def test_a_model_in_evaluation_mode_is_trained_as_a_whole():
    _, _, batches = uneven_batches()
    model = with_two_norms().eval()  # as a pretrained one comes
    fit(model, batches[:1], batches, sgd(model), epochs=1)
    assert all(module.training for module in model.modules())
    assert [norm.num_batches_tracked.item() for norm in model[:2]] == [1, 1]


def test_a_bad_loss_stops_training_at_once_on_a_cpu():
    images, targets, _ = uneven_batches()
    batches = iter([(images, targets), (images * torch.nan, targets), (images, targets), (images, targets)])

    class Loader:
        def __len__(self):
            return 4

        def __iter__(self):
            return batches

    model = Scores()
    with pytest.raises(FloatingPointError, match="found nan in step 2 of 4 at learning rate 0.1"):
        train(model, Loader(), sgd(model))
    assert len(list(batches)) == 2


def test_a_bad_loss_names_the_learning_rate_of_its_step_even_if_it_is_a_tensor():
    images, targets, _ = uneven_batches()
    model = Scores()
    optimizer = sgd(model, torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    batches = [(images, targets), (images * torch.nan, targets)]
    with pytest.raises(FloatingPointError, match=r"in step 2 of 2 at learning rate 0\.05:"):
        train(model, batches, optimizer, scheduler)


# ---------------------------------------------------------------- the moving average


def test_average_starts_at_the_weights_and_slows_down_to_its_decay():
    model = Scores()
    average = WeightAverage(model, 0.3)
    decays = [0, 2 / 11, 3 / 12, 0.3, 0.3]  # at step t at most (1 + t) / (10 + t)
    expected = 1.0
    for value, decay in zip((2.0, 4.0, 8.0, 16.0, 32.0), decays):
        model.scale.data.fill_(value)
        average.update()
        expected = decay * expected + (1 - decay) * value
        assert average.module.scale.item() == pytest.approx(expected)


def test_average_without_decay_is_the_model():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), Scores())
    average = WeightAverage(model, 0.0)
    for value in (1.0, 2.0, 3.0):
        model[0].running_mean.fill_(value)
        model[0].num_batches_tracked.fill_(int(value))
        average.update()
        average.copy_counters()
    kept = average.weights()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    average.module[0].running_mean.fill_(9.0)
    assert kept["0.running_mean"] == 3, "the weights are a copy"
    assert (model[1].p, average.module[1].p) == (0.5, 0)


def test_average_of_weights_with_two_names_moves_once_a_step():
    norm = nn.BatchNorm1d(2)
    model = nn.Sequential(nn.Linear(2, 2), norm, nn.Linear(2, 2), norm)
    model[2].weight = model[0].weight
    average = WeightAverage(model, 0.5)
    average.update()
    with torch.no_grad():
        for tensor in (*model.parameters(), norm.running_mean):
            tensor.add_(11.0)
    average.update()  # at step 1 the decay is 2 / 11
    names = "0.weight", "2.weight", "1.running_mean", "3.running_mean", "2.bias"
    before, moved = model.state_dict(), average.weights()
    for name in names:
        torch.testing.assert_close(moved[name], before[name] - 2)


def test_average_names_weights_that_are_not_finite():
    average = WeightAverage(nn.Linear(2, 2), 0.5)
    average.check_finite()
    average.module.bias.data[1] = torch.inf
    with pytest.raises(FloatingPointError, match="expected finite weights, found others in bias"):
        average.check_finite()


# ---------------------------------------------------------------- a whole run


def test_fit_learns_the_sample_and_writes_what_it_prints(tmp_path, capsys):
    torch.manual_seed(0)
    train_set = AlbumentationsCIFAR10(ASSETS, transform=train_transform())
    test_set = AlbumentationsCIFAR10(ASSETS, train=False, transform=dataset.test_transform())
    train_loader = BatchLoader(train_set, 40, shuffle=True)
    test_loader = BatchLoader(test_set, 500, shuffle=False)
    net = Net()
    optimizer, scheduler = plan(net, 2 * len(train_loader))
    rows = []
    history = fit(
        net,
        train_loader,
        test_loader,
        optimizer,
        scheduler,
        epochs=2,
        ema_decay=0.9,
        history_file=tmp_path / "history.csv",
        on_epoch=lambda row: rows.append(dict(row)) or row.clear(),
    )
    out = capsys.readouterr().out
    assert history[-1]["test_accuracy"] > 20  # chance is 10
    assert history[-1]["train_loss"] < history[0]["train_loss"] < 2.5
    assert re.search(r"Training on .+, in (bfloat16|float32), channels-last", out)
    for epoch in (1, 2):
        printed = out[out.index(f"Epoch {epoch}\n") :]
        assert re.search(TRAIN_LINE % (49, 50, 50), printed)
        assert re.search(TEST_LINE % 500, printed)
    assert f"({history[-1]['test_accuracy']:.2f}%)" in out
    with open(tmp_path / "history.csv") as file:
        written = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert written == history == rows
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.04 * 0.015, 0.015 * 5 / 8])
    assert all(0 < row["seconds"] < 600 for row in rows)
    # The model holds what was tested last: the averaged weights.
    assert net.training
    assert net.stage1.dilated1.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert training_utils.test(net, test_loader) == (history[-1]["test_loss"], history[-1]["test_accuracy"])


def test_compiled_networks_are_used_in_training_and_in_tests(monkeypatch):
    _, _, batches = uneven_batches()
    calls = []

    def compiled(model, images):
        mode = "training" if model.training else "test"

        def network(batch):
            calls.append((mode, len(batch)))
            return model(batch)

        calls.append((mode, "compiled for", len(images)))
        return network

    monkeypatch.setattr(training_utils, "compiled", compiled)
    model = Scores()
    test_batch = torch.zeros(120, 1, 1, 5), torch.zeros(120, dtype=int)
    fit(model, batches[:1], [test_batch], sgd(model), epochs=1, compile=True)
    tested = [("test", "compiled for", 100), ("training", 8), ("test", 100), ("test", 20)]
    assert calls == [("training", "compiled for", 8), *tested]


def test_a_network_is_compiled_for_every_size_of_growing_images(monkeypatch):
    images = AlbumentationsCIFAR10(ASSETS, train=False, transform=train_transform())
    loader = ProgressiveLoader(BatchLoader(images, 250, shuffle=True), 3)
    test_batch = torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=int)
    prepared, learnt = [], []

    def compiled(model, *examples):
        if not model.training:
            return model
        prepared.extend(images.shape for images in examples)
        return lambda batch: learnt.append(batch.shape) or model(batch)

    monkeypatch.setattr(training_utils, "compiled", compiled)
    model = Net()
    fit(model, loader, [test_batch], sgd(model), epochs=3, compile=True)
    assert len(prepared) == 3 and set(learnt) == set(prepared)


def test_batch_norm_statistics_are_those_of_the_given_images(monkeypatch):
    monkeypatch.setattr(hardware, "precision", lambda device: torch.float32)
    torch.manual_seed(0)
    batches = [(torch.randn(8, 1, 1, 5) * spread + 3, torch.randint(5, (8,))) for spread in (1, 2)]
    means, variances = zip(*((images.mean(), images.var()) for images, _ in batches))
    expected = sum(means).item() / 2, sum(variances).item() / 2
    for statistics, as_given in ((None, False), (batches, True)):
        # Dropped pixels would change the statistics.
        model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(1), Scores())
        fit(model, batches, batches, sgd(model, 0.01), epochs=2, ema_decay=0.9, statistics=statistics)
        norm = model[1]
        measured = norm.running_mean.item(), norm.running_var.item()
        assert (measured == pytest.approx(expected, rel=1e-5)) == as_given
        assert (model[0].p, norm.momentum, norm.num_batches_tracked) == (0.5, 0.1, 4)


def test_set_epoch_reaches_loader_sampler_and_data_set():
    _, _, batches = uneven_batches()

    class Loader(list):
        epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    class Images(Loader):
        epochs = []

    class Sampler(torch.utils.data.SequentialSampler, Loader):
        epochs = []

    images = Images((torch.zeros(1, 1, 5), 0) for _ in range(4))
    inner = torch.utils.data.Subset(images, range(3))
    some = torch.utils.data.Subset(torch.utils.data.ConcatDataset([inner]), range(2))
    sampler = torch.utils.data.BatchSampler(Sampler(some), 2, False)
    for loader in (Loader(batches), torch.utils.data.DataLoader(some, batch_sampler=sampler)):
        model = Scores()
        fit(model, loader, batches, sgd(model), epochs=3)
    assert Loader.epochs == Images.epochs == Sampler.epochs == [1, 2, 3]


def test_each_process_has_its_own_dropout_masks_in_each_epoch(monkeypatch):
    torch.manual_seed(7)
    start_epoch([], 1, seed=5)
    assert torch.initial_seed() == 7, "the first process continues"
    seeds = set()
    for rank, epoch, seed in itertools.product((1, 2), (1, 2), (5, 50)):
        monkeypatch.setattr(training_utils, "rank", lambda: rank)
        start_epoch([], epoch, seed)
        seeds.add(torch.initial_seed())
    assert len(seeds) == 8


OUT_OF_RANGE = {"epochs": 0}, {"epochs": 1, "ema_decay": 1.0}, {"epochs": 1, "ema_decay": -0.1}


@pytest.mark.parametrize("wrong", OUT_OF_RANGE, ids=str)
def test_numbers_out_of_range_are_refused(wrong):
    model = Scores()
    with pytest.raises(ValueError, match="expected epochs >= 1 and 0 <= ema_decay < 1"):
        fit(model, [], [], sgd(model), **wrong)


def test_an_empty_loader_is_named():
    model = Scores()
    _, _, batches = uneven_batches()
    message = "at least one batch .* found an empty loader"
    for compile, *loaders in ((False, [], batches), (True, [], batches), (False, batches, [])):
        with pytest.raises(ValueError, match=message):
            fit(model, *loaders, sgd(model), epochs=1, compile=compile)
    with pytest.raises(ValueError, match=message):
        fit(model, batches, batches, sgd(model), epochs=1, statistics=[])
    for empty in (lambda: training_utils.test(model, []), lambda: train(model, [], sgd(model))):
        with pytest.raises(ValueError, match=message):
            empty()


def test_ctrl_c_in_the_first_epoch_leaves_the_weights_as_they_were():
    _, _, batches = uneven_batches()
    model = Scores()

    class Loader(list):
        def __iter__(self):
            yield from batches[:1]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="in the first epoch: there is nothing to keep"):
        fit(model, Loader(batches), batches, sgd(model), epochs=1)
    assert model.scale == 1


def test_ctrl_c_in_one_of_several_processes_ends_the_run(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            accept_interrupt(2, 5)
