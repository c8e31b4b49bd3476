"""Runs that are interrupted, damaged, poisoned or handed over by strangers. soak.py kills them, too."""

import csv
import os
import pickle
import random
import re
import signal
import threading
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import checkpoint
import hardware
import training_utils
from checkpoint import difference, load_checkpoint, previous, save_checkpoint, save_weights
from dataset import ASSETS
from model import Net
from training_utils import fit

EPOCHS, STEPS = 5, 4


class Batches(list):
    """Random batches, with noise from Python and NumPy, that call `event` before one of them."""

    def __init__(self, epoch=0, step=0, event=None):
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            images = torch.randn(8, 1, 4, 4, generator=generator)
            self.append((images, torch.randint(3, (8,), generator=generator)))
        self.epoch = 0
        self.when = epoch, step
        self.event = event

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for step, (images, targets) in enumerate(super().__iter__(), 1):
            images = images + 0.1 * random.random() - 0.1 * np.random.rand()
            if self.event and (self.epoch, step) == self.when:
                images = self.event(images)
            yield images, targets


def linear_decay(step):
    return 1 - step / (EPOCHS * STEPS)


def run(
    folder,
    loader=None,
    rate=linear_decay,
    seed=0,
    epochs=EPOCHS,
    momentum=0.9,
    dropout=0.5,
    frozen=0,
    ema_decay=0.9,
    start=0.0,
    learning_rate=0.1,
    **options,
):
    """Train in a folder, with dropout, momentum, an average and a schedule.

    Returns the weights, and the history without the seconds.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    layers = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(dropout), nn.Linear(16, 3)
    model = nn.Sequential(nn.Flatten(), *layers)
    model[1].weight.data += start
    optimizer = torch.optim.SGD(list(model.parameters())[frozen:], lr=learning_rate, momentum=momentum)
    files = {"checkpoint": folder / "net.pt", "history_file": folder / "history.csv"}
    recipe = {"seed": seed, "augmentation": "flip " * 30 + "crop"}
    history = fit(
        model,
        loader or Batches(),
        Batches(),
        optimizer,
        LambdaLR(optimizer, rate),
        epochs=epochs,
        ema_decay=ema_decay,
        **{"recipe": recipe, **files, **options},
    )
    return model.state_dict(), [{k: v for k, v in row.items() if k != "seconds"} for row in history]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result of a run that nothing stopped."""
    return run(tmp_path_factory.mktemp("whole"))


def same(result, expected):
    (weights, history), (expected_weights, expected_history) = result, expected
    equal = [torch.equal(weights[key], value) for key, value in expected_weights.items()]
    return all(equal) and history == expected_history


def press_ctrl_c(*_):
    signal.raise_signal(signal.SIGINT)


def interrupted_in(epoch, folder):
    """A run that a real Ctrl-C ends in the middle of that epoch."""
    loader = Batches(epoch, 2, press_ctrl_c)
    result = run(folder, loader)
    assert loader.epoch == epoch, "it was pressed"
    return result


def fill_disk(path):
    """Let the next write of the file fail as on a full disk."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    Path(f"{path}.{os.getpid()}.partial").symlink_to("/dev/full")


# ---------------------------------------------------------------- interrupted runs


def test_ctrl_c_keeps_the_finished_epochs_and_the_next_call_continues(tmp_path, whole, capsys):
    weights, history = interrupted_in(3, tmp_path)
    assert history == whole[1][:2]
    assert "Interrupted after 2 of 5 epochs: history and weights are those of" in capsys.readouterr().out
    with open(tmp_path / "history.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    average = load_checkpoint(tmp_path / "net.pt")["average"]
    assert all(torch.equal(weights[key], average[key]) for key in weights)
    assert same(run(tmp_path), whole)
    out = capsys.readouterr().out
    assert "net.pt holds 2 of 5 epochs of this run:\nEpoch 1: Train: Loss=" in out
    assert "Continuing at learning rate 0.06\n" in out


def test_ctrl_c_in_the_first_epoch_is_raised(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="in the first epoch: there is nothing to keep"):
        interrupted_in(1, tmp_path)


def test_ctrl_c_while_a_checkpoint_is_written_keeps_the_epochs_before(tmp_path, whole, monkeypatch):
    def save(state, path):
        if len(state["history"]) == 3:
            press_ctrl_c()
        save_checkpoint(state, path)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    _, history = run(tmp_path)
    assert history == whole[1][:2]
    assert len(load_checkpoint(tmp_path / "net.pt")["history"]) == 2
    monkeypatch.undo()
    assert same(run(tmp_path), whole)


def test_fit_runs_in_a_thread(tmp_path, whole):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert same(results[0], whole)


@pytest.mark.parametrize("owner", ["loader", "batch sampler", "statistics"])
def test_random_generators_of_loaders_continue(owner, tmp_path):
    images = torch.utils.data.TensorDataset(torch.randn(32, 1, 4, 4), torch.randint(3, (32,)))

    def loaders():
        generator = torch.Generator().manual_seed(1)
        if owner == "batch sampler":
            order = torch.utils.data.RandomSampler(images, generator=generator)
            sampler = torch.utils.data.BatchSampler(order, 8, False)
            return {"loader": torch.utils.data.DataLoader(images, batch_sampler=sampler)}
        return {owner: torch.utils.data.DataLoader(images, 8, shuffle=True, generator=generator)}

    def interrupt(row):
        if row["epoch"] == 2:
            press_ctrl_c()

    expected = run(tmp_path / "whole", **loaders())
    run(tmp_path / "interrupted", **loaders(), on_epoch=interrupt)
    assert len(load_checkpoint(tmp_path / "interrupted/net.pt")["history"]) == 2
    assert same(run(tmp_path / "interrupted", **loaders()), expected)


def test_history_file_left_short_by_a_kill_is_completed(tmp_path):
    run(tmp_path)
    (tmp_path / "history.csv").unlink()
    run(tmp_path)
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 1 + EPOCHS


def test_finished_run_is_loaded_and_not_trained_again(tmp_path, whole, capsys, monkeypatch):
    run(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(training_utils, "compiled", None)
    loader = Batches(0, 1, lambda images: pytest.fail("a finished run is trained again"))
    assert same(run(tmp_path, loader, compile=True), whole)
    out = capsys.readouterr().out
    assert "Nothing is left to train. To train again: resume=False" in out
    assert "Training on" not in out and "Continuing" not in out
    fill_disk(tmp_path / "history.csv")
    with pytest.warns(UserWarning, match=r"history\.csv could not be written \(.*No space left.*continues"):
        assert same(run(tmp_path, loader), whole)


def test_a_run_without_files_writes_none(tmp_path, whole):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(run(tmp_path, checkpoint=None, history_file=None), whole)
    assert not list(tmp_path.iterdir())


def test_a_run_may_write_its_history_alone(tmp_path, whole):
    assert same(run(tmp_path, checkpoint=None, history_file=tmp_path / "new/folder/history.csv"), whole)
    assert [path.name for path in tmp_path.rglob("*.*")] == ["history.csv"]


# ---------------------------------------------------------------- damaged checkpoints


def damage(path, kind):
    data = path.read_bytes()
    middle = len(data) // 2
    noise = data[:middle] + os.urandom(64) + data[middle + 64 :]
    path.write_bytes({"cut": data[:middle], "empty": b"", "noise": noise}[kind])


@pytest.mark.parametrize("kind", ["cut", "empty", "noise"])
def test_the_previous_checkpoint_replaces_a_damaged_one(kind, tmp_path, whole, capsys):
    interrupted_in(4, tmp_path)
    damage(tmp_path / "net.pt", kind)
    damaged = (tmp_path / "net.pt").read_bytes()
    with pytest.warns(UserWarning, match=r"net\.pt is unusable .*net\.\d.*\.pt: using .*net\.previous\.pt"):
        assert same(run(tmp_path), whole)
    assert "holds 2 of 5 epochs" in capsys.readouterr().out
    assert damaged in [path.read_bytes() for path in tmp_path.glob("net.2*.pt")], "it is kept"


def test_without_a_good_checkpoint_an_error_and_nothing_overwritten(tmp_path):
    interrupted_in(4, tmp_path)
    for path in (tmp_path / "net.pt", previous(tmp_path / "net.pt")):
        damage(path, "noise")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    message = r"net\.pt \(.*net\.previous\.pt \(.*move what is there away to start again"
    with pytest.raises(ValueError, match=message):
        run(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_of_another_kind_is_no_checkpoint(tmp_path):
    torch.save({"model": {}}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net\.pt \(not a checkpoint of fit\)"):
        run(tmp_path)


def test_a_kill_between_the_two_renames_costs_an_epoch(tmp_path, whole):
    interrupted_in(4, tmp_path)
    os.replace(tmp_path / "net.pt", tmp_path / "net.pt.partial")
    assert same(run(tmp_path), whole)


def test_a_full_disk_costs_a_warning_and_the_next_epoch_is_saved(tmp_path, whole):
    def fill(images):
        fill_disk(tmp_path / "net.pt")
        return images

    message = r"epoch 3 could not be saved \(.*No space left.*net\.pt is as it was after epoch 2"
    with pytest.warns(UserWarning, match=message):
        assert same(run(tmp_path, Batches(3, 1, fill)), whole)
    assert len(load_checkpoint(tmp_path / "net.pt")["history"]) == EPOCHS
    assert len(load_checkpoint(previous(tmp_path / "net.pt"))["history"]) == EPOCHS - 1
    assert not list(tmp_path.glob("*.partial"))


# ---------------------------------------------------------------- bad numbers


def test_a_bad_loss_stops_the_run_and_is_not_saved(tmp_path):
    with pytest.raises(FloatingPointError) as error:
        run(tmp_path, Batches(3, 2, lambda images: images * torch.inf))
    message = (
        r"epoch 3: .*found nan in step 2 of 4 at learning rate 0\.055: .*net\.pt is as it was after epoch 2"
    )
    assert re.match(message, str(error.value))
    state = load_checkpoint(tmp_path / "net.pt")
    assert len(state["history"]) == 2
    assert all(value.isfinite().all() for value in state["model"].values())


def test_a_bad_loss_after_resuming_names_the_checkpoint_that_was_resumed(tmp_path):
    interrupted_in(3, tmp_path)
    with pytest.raises(FloatingPointError, match=r"epoch 3: .*net\.pt is as it was after epoch 2"):
        run(tmp_path, Batches(3, 1, lambda images: images * torch.nan))


def test_a_bad_loss_in_the_first_epoch_says_that_nothing_was_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="epoch 1: .*no checkpoint was saved"):
        run(tmp_path, Batches(1, 1, lambda images: images * torch.nan))


def test_weights_spoilt_by_the_last_step_are_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="epoch 2: expected finite weights"):
        run(tmp_path, rate=lambda step: torch.inf if step == 2 * STEPS - 1 else 1.0)
    assert len(load_checkpoint(tmp_path / "net.pt")["history"]) == 1


def test_a_state_that_could_not_be_read_back_is_refused_at_the_first_epoch(tmp_path):
    with pytest.raises(TypeError, match=r"expected .*found numpy\.\S+: convert with float"):
        run(tmp_path, rate=lambda step: np.float64(0.5))
    assert not (tmp_path / "net.pt").exists()


# ---------------------------------------------------------------- which run it is


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"epochs": 6}, "epochs was 5, is 6"),
        ({"loader": Batches()[:3]}, "steps an epoch was 4, is 3"),
        ({"ema_decay": 0.8}, "decay of the average was 0.9, is 0.8"),
        ({"statistics": Batches()}, "statistics was running, is from images without augmentation"),
        ({"recipe": {"seed": 0, "augmentation": "flip " * 30 + "cut"}}, "flip crop, is lip flip"),
        ({"momentum": 0.8}, "'momentum': 0.9"),
        ({"frozen": 4}, "'trained': 355"),
        ({"dropout": 0.4}, "Dropout(p=0.5"),
        ({"start": 0.1}, "starting weights was "),
        ({"resume": False}, "is not resumed, as asked"),
    ],
)
def test_another_run_is_named_kept_and_not_mixed(change, reason, tmp_path, capsys):
    interrupted_in(3, tmp_path)
    files = tmp_path / "net.pt", previous(tmp_path / "net.pt"), tmp_path / "history.csv"
    before = [file.read_bytes() for file in files]
    apart = {name: value for name, value in change.items() if name != "resume"}
    expected = run(tmp_path / "apart", **apart)
    capsys.readouterr()
    assert same(run(tmp_path, **change), expected)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if reason in line]
    names = r"net\.2\S+\.pt and \S+net\.previous\.2\S+\.pt and \S+history\.2\S+\.csv"
    assert re.search(f"{names}, starting with epoch 1$", line)
    for kept, content in zip(("net.2*.pt", "net.previous.2*.pt", "history.2*.csv"), before):
        assert [path.read_bytes() for path in tmp_path.glob(kept)] == [content]


@pytest.mark.parametrize(
    "change, reason", [({"dropout": 0.4}, "Dropout(p=0.5"), ({"epochs": 6}, "epochs was 5, is 6")]
)
def test_fit_s_own_keys_take_precedence_in_the_recipe(change, reason, tmp_path, capsys):
    options = {"recipe": {"epochs": "all of them", "model": "mine"}}
    run(tmp_path, **options)
    expected = run(tmp_path / "apart", **options, **change)
    assert same(run(tmp_path, **options, **change), expected)
    assert reason in capsys.readouterr().out


def test_a_checkpoint_from_before_a_key_was_added_is_kept(tmp_path, capsys):
    interrupted_in(3, tmp_path)
    state = load_checkpoint(tmp_path / "net.pt")
    for key in ("starting weights", "torch's seed"):
        del state["recipe"][key]
    for key in ("processor", "precision"):
        del state[key]
    torch.save(state, tmp_path / "net.pt")
    before = (tmp_path / "net.pt").read_bytes()
    run(tmp_path, epochs=EPOCHS)
    assert "is of another run (torch's seed was not given, is 0): kept as" in capsys.readouterr().out
    assert before in [path.read_bytes() for path in tmp_path.glob("net.2*.pt")]


def test_a_checkpoint_of_an_earlier_version_is_kept(tmp_path, whole, capsys):
    interrupted_in(3, tmp_path)
    state = load_checkpoint(tmp_path / "net.pt")
    del state["scaler"]
    torch.save(state, tmp_path / "net.pt")
    assert same(run(tmp_path), whole)
    assert "is of another run (an earlier version of this code wrote it): kept as" in capsys.readouterr().out


def test_a_schedule_that_the_checkpoint_lacks_is_named(tmp_path, capsys):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for schedule in (None, LambdaLR(optimizer, linear_decay)):
        fit(net, Batches(), Batches(), optimizer, schedule, epochs=1, checkpoint=tmp_path / "net.pt")
    printed = capsys.readouterr().out
    assert "is of another run (" in printed and "earlier version" not in printed


def test_a_history_of_another_run_is_kept(tmp_path, whole, capsys):
    """Without its checkpoint, and if two runs with their own checkpoints share the file."""
    (tmp_path / "history.csv").write_bytes(b"\xff is mine")
    interrupted_in(3, tmp_path)
    assert re.search(
        r"history\.csv is of an earlier run: kept as \S+history\.2\S+\.csv", capsys.readouterr().out
    )
    run(tmp_path, seed=1, checkpoint=tmp_path / "other.pt")
    other = (tmp_path / "history.csv").read_bytes()
    assert same(run(tmp_path), whole)
    assert re.search(
        r"history\.csv is of another run: kept as \S+history\.2\S+\.csv", capsys.readouterr().out
    )
    kept = [path.read_bytes() for path in tmp_path.glob("history.2*.csv")]
    assert len(kept) == 3 and b"\xff is mine" in kept and other in kept


def test_fit_continues_if_it_is_called_again_with_the_model_that_it_left(tmp_path, whole, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    arguments = optimizer, LambdaLR(optimizer, linear_decay)
    options = {"epochs": EPOCHS, "ema_decay": 0.9, "checkpoint": tmp_path / "net.pt"}
    fit(model, Batches(3, 2, press_ctrl_c), Batches(), *arguments, **options)
    for finished in (2, EPOCHS):
        capsys.readouterr()
        assert len(fit(model, Batches(), Batches(), *arguments, **options)) == EPOCHS
        assert f"net.pt holds {finished} of 5 epochs of this run" in capsys.readouterr().out
    # A new process has the model as it was at the start.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fit(model, Batches(), Batches(), optimizer, LambdaLR(optimizer, linear_decay), **options)
    assert "net.pt holds 5 of 5 epochs of this run" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_precision(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "PRECISIONS", {"cpu": torch.bfloat16})
    expected = run(tmp_path / "whole")
    interrupted_in(3, tmp_path)
    for _ in range(2):  # the second is finished: what comes after it has its precision, too
        monkeypatch.setattr(hardware, "PRECISIONS", {"cpu": torch.float32})
        capsys.readouterr()
        assert same(run(tmp_path), expected)
        assert hardware.PRECISIONS == {"cpu": torch.bfloat16}
        out = capsys.readouterr().out
        assert "in float32" not in out and "It was begun on" not in out


class SmallFirst(Batches):
    """In the notebook, a CPU's loader is another than a GPU's."""


def test_another_processor_is_named_and_may_have_computed_the_start_differently(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(training_utils, "processor", lambda device: "1 x fast")
    interrupted_in(3, tmp_path)
    monkeypatch.setattr(training_utils, "processor", lambda device: "2 x slow")
    run(tmp_path, Batches(4, 2, press_ctrl_c), start=1e-6)
    out = capsys.readouterr().out
    assert "net.pt holds 2 of 5 epochs" in out
    assert "It was begun on 1 x fast: on 2 x slow the last bits will differ\n" in out
    _, history = run(tmp_path, start=1e-6)
    assert "net.pt holds 3 of 5 epochs" in capsys.readouterr().out
    assert len(history) == EPOCHS
    run(tmp_path, SmallFirst(), start=1e-6)
    assert "is of another run (training loader was Batches, is SmallFirst)" in capsys.readouterr().out
    run(tmp_path, seed=1)
    assert "is of another run (seed was 0, is 1)" in capsys.readouterr().out


def test_a_learning_rate_in_a_tensor_is_resumed(tmp_path, whole):
    rates = [row["learning_rate"] for row in whole[1]]
    (tmp_path / "whole").mkdir()
    expected = run(tmp_path / "whole", learning_rate=torch.tensor(0.1))
    interrupted = Batches(3, 2, press_ctrl_c)
    run(tmp_path, interrupted, learning_rate=torch.tensor(0.1))
    result = run(tmp_path, learning_rate=torch.tensor(0.1))
    assert same(result, expected)
    assert [row["learning_rate"] for row in result[1]] == pytest.approx(rates)
    assert "tensor" not in (tmp_path / "history.csv").read_text()


def test_a_callback_cannot_change_what_is_saved(tmp_path, whole):
    assert same(run(tmp_path, on_epoch=lambda row: row.clear()), whole)
    assert same(run(tmp_path), whole)


def test_difference_names_the_first_key_that_differs():
    assert difference({"a": "1", "b": "2"}, {"b": "2", "a": "1"}) is None
    assert difference({"a": "1"}, {"a": "1", "b": "2"}) == "b was not given, is 2"
    assert difference({"a": "1", "b": "2"}, {"a": "1"}) == "b was 2, is not given"
    assert difference({"a": "1", "b": "2"}, {"b": "3", "a": "2"}) == "b was 2, is 3"
    old, new = 50 * "-" + "x" + 50 * "o", 50 * "-" + "y" + 50 * "o"
    assert difference({"a": old}, {"a": new}) == f"a was {old[20:80]}, is {new[20:80]}"


# ---------------------------------------------------------------- strangers' files


class Payload:
    """When it is unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_crafted_file_is_refused_and_its_code_does_not_run(tmp_path):
    ran = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(ran)))
    assert ran.exists(), "the payload works"
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


def test_a_file_that_unpacks_to_more_than_its_size_is_refused_before_it_is_read(tmp_path):
    interrupted_in(3, tmp_path)
    (tmp_path / "net.previous.pt").unlink()
    state = load_checkpoint(tmp_path / "net.pt")
    state["bomb"] = torch.zeros(10_000_000)
    torch.save(state, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as old:
        with zipfile.ZipFile(tmp_path / "net.pt", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    assert (tmp_path / "net.pt").stat().st_size < 100_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"net\.pt \([\d,]+ bytes that unpack to 40,\d{3},\d{3}\)"):
        load_checkpoint(tmp_path / "net.pt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_weights_with_two_names_come_back(tmp_path):
    first, second = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    for model in (first, second):
        model[1].weight = model[0].weight
    save_weights(first, tmp_path / "tied.safetensors", {})
    second.load_state_dict(load_file(tmp_path / "tied.safetensors"))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))


def test_weights_come_back_and_another_network_s_are_refused_by_their_keys(tmp_path):
    net = Net(num_classes=7).to(memory_format=torch.channels_last)
    save_weights(net, tmp_path / "seven.safetensors", {"classes": "seven"})
    loaded = Net.from_pretrained(tmp_path / "seven.safetensors")
    assert loaded.metadata == {"classes": "seven"}
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in net.state_dict().items())
    net.stage2.dilated1.conv = nn.Conv2d(40, 40, 1, bias=False)
    others = {
        "size mismatch for stage2.dilated1.conv.weight": net,
        "stage1.separable.depthwise.weight": nn.Linear(2, 2),
    }
    for key, other in others.items():
        save_weights(other, tmp_path / "other.safetensors", {})
        with pytest.raises(RuntimeError, match=key):
            Net.from_pretrained(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((ASSETS / "net.safetensors").read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        Net.from_pretrained(tmp_path / "cut.safetensors")
