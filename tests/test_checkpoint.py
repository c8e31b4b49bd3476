"""Runs that are stopped, damaged, poisoned or handed over by strangers. The kills themselves are in soak.py."""

import csv
import os
import pickle
import signal
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from dataset import ASSETS
from model import Net
from checkpoint import describe, load_checkpoint, previous, save_weights
from training_utils import fit

EPOCHS, STEPS = 5, 4


class Batches(list):
    """Random batches that call `event` before one of them."""

    def __init__(self, epoch=0, step=0, event=None):
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            self.append((torch.randn(8, 1, 4, 4, generator=generator), torch.randint(3, (8,), generator=generator)))
        self.epoch, self.when, self.event = 0, (epoch, step), event

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for step, (images, targets) in enumerate(super().__iter__(), 1):
            if self.event and (self.epoch, step) == self.when:
                images = self.event(images)
            yield images, targets


def run(
    folder, loader=None, rate=lambda step: 1 - step / (EPOCHS * STEPS), seed=0, epochs=EPOCHS, momentum=0.9, dropout=0.5, frozen=0,
    **options
):  # fmt: skip
    """A run with dropout, momentum, an average and a schedule, in a folder; its weights and its history but for seconds."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(dropout), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(list(model.parameters())[frozen:], lr=0.1, momentum=momentum)
    recipe = {"seed": seed, "augmentation": "flip " * 30 + "crop"}
    options = {"checkpoint": folder / "net.pt", "history_file": folder / "history.csv", "recipe": recipe} | options
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    history = fit(model, loader or Batches(), Batches(), optimizer, scheduler, epochs=epochs, ema_decay=0.9, **options)
    return model.state_dict(), [{name: value for name, value in row.items() if name != "seconds"} for row in history]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


def same(found, expected):
    return all(torch.equal(found[0][key], expected[0][key]) for key in expected[0]) and found[1] == expected[1]


def stopped_in(epoch, folder):
    """A run that a real Ctrl-C ends in the middle of that epoch."""
    pressed = []

    def press(images):
        pressed.append(os.kill(os.getpid(), signal.SIGINT))
        return images

    result = run(folder, Batches(epoch, 2, press))
    assert pressed
    return result


def test_ctrl_c_keeps_the_finished_epochs_and_the_next_call_goes_on(tmp_path, whole, capsys):
    weights, history = stopped_in(3, tmp_path)
    assert history == whole[1][:2] and "Interrupted after 2 of 5 epochs" in capsys.readouterr().out
    with open(tmp_path / "history.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    average = load_checkpoint(tmp_path / "net.pt")["average"]
    assert all(torch.equal(weights[key], average[key]) for key in weights)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert same(run(tmp_path), whole)
    out = capsys.readouterr().out
    assert "net.pt holds 2 of 5 epochs of this run:\nEpoch 1: Train: Loss=" in out and "Going on at learning rate 0.06" in out
    with pytest.raises(KeyboardInterrupt, match="first epoch"):
        stopped_in(1, tmp_path / "other")


def test_ctrl_c_belongs_to_the_main_thread(tmp_path, whole):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert same(found[0], whole)


def test_a_second_ctrl_c_is_raised_at_once(tmp_path):
    def press_twice(images):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Batches(3, 2, press_twice))


@pytest.mark.parametrize("whose", ["the loader's", "its batch sampler's", "the statistics'"])
def test_a_loader_s_own_generator_goes_on_too(whose, tmp_path):
    images = torch.utils.data.TensorDataset(torch.randn(32, 1, 4, 4), torch.randint(3, (32,)))

    def loaders():
        generator = torch.Generator().manual_seed(1)
        order = torch.utils.data.RandomSampler(images, generator=generator)
        if whose == "its batch sampler's":
            return {"loader": torch.utils.data.DataLoader(images, batch_sampler=torch.utils.data.BatchSampler(order, 8, False))}
        name = "loader" if whose == "the loader's" else "statistics"
        return {name: torch.utils.data.DataLoader(images, 8, shuffle=True, generator=generator)}

    expected = run(tmp_path / "whole", **loaders())
    run(tmp_path / "stopped", **loaders(), on_epoch=lambda row: os.kill(os.getpid(), signal.SIGINT) if row["epoch"] == 2 else None)
    assert len(load_checkpoint(tmp_path / "stopped/net.pt")["history"]) == 2
    assert same(run(tmp_path / "stopped", **loaders()), expected)


def test_a_history_that_a_kill_left_short_is_completed(tmp_path):
    run(tmp_path)
    (tmp_path / "history.csv").unlink()
    run(tmp_path)
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 1 + EPOCHS


def damage(path, kind):
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes({"cut": data[:middle], "empty": b"", "noise": data[:middle] + os.urandom(64) + data[middle + 64 :]}[kind])


@pytest.mark.parametrize("kind", ["cut", "empty", "noise"])
def test_of_a_damaged_checkpoint_the_previous_one_is_used(kind, tmp_path, whole, capsys):
    stopped_in(4, tmp_path)
    damage(tmp_path / "net.pt", kind)
    damaged = (tmp_path / "net.pt").read_bytes()
    with pytest.warns(UserWarning, match=r"net\.pt is unusable .*net\.\d.*\.pt: using .*net\.previous\.pt"):
        assert same(run(tmp_path), whole)
    assert "holds 2 of 5 epochs" in capsys.readouterr().out
    assert damaged in [path.read_bytes() for path in tmp_path.glob("net.2*.pt")], "it is kept"


def test_without_a_good_checkpoint_an_error_and_nothing_overwritten(tmp_path):
    stopped_in(4, tmp_path)
    for path in (tmp_path / "net.pt", previous(tmp_path / "net.pt")):
        damage(path, "noise")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"net\.pt \(.*net\.previous\.pt \(.*move what is there away"):
        run(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_killed_between_the_two_renames(tmp_path, whole):
    stopped_in(4, tmp_path)
    os.replace(tmp_path / "net.pt", tmp_path / "net.pt.partial")
    assert same(run(tmp_path), whole)


def test_a_full_disk_costs_a_warning_and_an_epoch(tmp_path, whole):
    def fill(images):
        (tmp_path / f"net.pt.{os.getpid()}.partial").symlink_to("/dev/full")  # a write there is refused as on a full disk
        return images

    with pytest.warns(UserWarning, match=r"epoch 3 could not be saved \(.*No space left.*net\.pt is as it was after epoch 2"):
        assert same(run(tmp_path, Batches(3, 1, fill)), whole)
    assert len(load_checkpoint(tmp_path / "net.pt")["history"]) == EPOCHS
    assert len(load_checkpoint(previous(tmp_path / "net.pt"))["history"]) == EPOCHS - 1


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    with pytest.raises(FloatingPointError) as error:
        run(tmp_path, Batches(3, 2, lambda images: images * torch.inf))
    for part in ("epoch 3:", "found nan in step 2 of 4 at learning rate 0.055", "net.pt is as it was after epoch 2"):
        assert part in str(error.value)
    state = load_checkpoint(tmp_path / "net.pt")
    assert len(state["history"]) == 2 and all(value.isfinite().all() for value in state["model"].values())
    with pytest.raises(FloatingPointError, match="epoch 1: .*no checkpoint was saved"):
        run(tmp_path / "other", Batches(1, 1, lambda images: images * torch.nan))


def test_weights_that_the_last_step_spoils_are_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="epoch 2: expected finite weights"):
        run(tmp_path, rate=lambda step: torch.inf if step == 2 * STEPS - 1 else 1.0)
    assert len(load_checkpoint(tmp_path / "net.pt")["history"]) == 1


def test_a_state_that_could_not_be_read_again_is_refused_at_the_first_epoch(tmp_path):
    with pytest.raises(TypeError, match=r"expected .*found numpy\.\S+: convert with float"):
        run(tmp_path, rate=lambda step: np.float64(0.5))
    assert not (tmp_path / "net.pt").exists()


class Refused(list):
    def __iter__(self):
        raise AssertionError("a finished run is not trained again")


def test_a_finished_run_is_said_and_loaded(tmp_path, whole, capsys):
    run(tmp_path)
    loader = Refused(Batches())
    assert same(run(tmp_path, loader), whole)
    assert "Nothing is left to train" in capsys.readouterr().out
    (tmp_path / "history.csv").unlink()
    (tmp_path / f"history.csv.{os.getpid()}.partial").symlink_to("/dev/full")  # a write there is refused as on a full disk
    with pytest.warns(UserWarning, match=r"history\.csv could not be written \(.*No space left"):
        assert same(run(tmp_path, loader), whole)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"epochs": 6}, "epochs was 5, is 6"),
        ({"statistics": Batches()}, "statistics was running, is taken anew"),
        ({"recipe": {"seed": 0, "augmentation": "flip " * 30 + "cut"}}, "flip crop, is lip flip"),
        ({"momentum": 0.8}, "'momentum': 0.9"),
        ({"frozen": 4}, "'trained': 355"),
        ({"dropout": 0.4}, "Dropout(p=0.5"),
        ({"resume": False}, "is not resumed, as asked"),
    ],
)
def test_another_run_is_said_kept_and_not_mixed(change, said, tmp_path, capsys):
    stopped_in(3, tmp_path)
    before = (tmp_path / "net.pt").read_bytes()
    expected = run(tmp_path / "apart", **{name: value for name, value in change.items() if name != "resume"})
    capsys.readouterr()
    assert same(run(tmp_path, **change), expected)
    assert said in capsys.readouterr().out
    assert [path.read_bytes() for path in tmp_path.glob("net.2*.pt")] == [before]


def test_what_fit_says_of_a_run_stands_above_the_recipe_given(tmp_path, capsys):
    given = {"recipe": {"epochs": "all of them", "model": "mine"}}
    run(tmp_path, **given)
    assert same(run(tmp_path, dropout=0.4, **given), run(tmp_path / "apart", dropout=0.4, **given))
    assert "Dropout(p=0.5" in capsys.readouterr().out


def test_schedules_of_several_parts_are_told_apart():
    def described(warmup, length):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        parts = [LinearLR(optimizer, 0.1, total_iters=warmup), CosineAnnealingLR(optimizer, length)]
        schedule = SequentialLR(optimizer, parts, [5])
        before = describe(optimizer, schedule)
        for _ in range(7):
            optimizer.step()
            schedule.step()
        assert describe(optimizer, schedule) == before, "as they were before they were stepped"
        return before

    assert described(5, 10) == described(5, 10)
    assert described(5, 10) != described(5, 20) and described(5, 10) != described(4, 10)


class Payload:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_crafted_file_is_refused_and_does_not_run(tmp_path):
    ran = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(ran)))
    assert ran.exists(), "what this test is there to tell apart"
    ran.unlink()
    torch.save({"recipe": Payload(ran), "model": Payload(ran)}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="unusable .*net.pt"):
        run(tmp_path)
    (tmp_path / "net.pt").write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(ValueError, match="unusable .*net.pt"):
        run(tmp_path)
    with pytest.raises(SafetensorError):
        Net.from_pretrained(tmp_path / "net.pt")
    assert not ran.exists()


def test_weights_come_back_and_another_network_s_are_refused_by_their_keys(tmp_path):
    net = Net(num_classes=7)
    save_weights(net, tmp_path / "seven.safetensors", {"classes": "seven"})
    again = Net.from_pretrained(tmp_path / "seven.safetensors")
    assert again.metadata == {"classes": "seven"}
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in net.state_dict().items())
    net.stage2.dilated1.conv = nn.Conv2d(40, 40, 1, bias=False)
    for other, key in ((net, "size mismatch for stage2.dilated1.conv.weight"), (nn.Linear(2, 2), "stage1.separable.depthwise.weight")):
        save_weights(other, tmp_path / "other.safetensors", {})
        with pytest.raises(RuntimeError, match=key):
            Net.from_pretrained(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((ASSETS / "net.safetensors").read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        Net.from_pretrained(tmp_path / "cut.safetensors")


def test_a_run_without_a_checkpoint_writes_none(tmp_path, whole):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(run(tmp_path, checkpoint=None, history_file=None), whole)
    assert not list(tmp_path.iterdir())
