import csv
import functools
import os
import pickle
import shutil
import time

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import default_collate

import arms
import bench
import frontier
import held_out
import original
import peers
from checkpoint import save_weights
from dataset import ASSETS, AlbumentationsCIFAR10, train_transform
from identity import text_of
from model import Net


def test_operations_of_a_training_image():
    # Multiply-adds of the convolutions, stage by stage: weights times places.
    stage1 = (27 + 96 + 2 * 9_216) * 32**2 + 9_216 * 16**2
    stage2 = (288 + 1_280 + 2 * 14_400) * 16**2 + 14_400 * 8**2
    stage3 = (360 + 1_760 + 2 * 17_424) * 8**2 + 17_424 * 4**2
    stage4 = (396 + 2_112 + 3 * 20_736) * 4**2
    assert bench.flops_per_image() == 3 * 2 * (stage1 + stage2 + stage3 + stage4 + 480)


def test_input_part_measures_five_ways_side_by_side(capsys):
    pytest.importorskip("kornia")
    images = AlbumentationsCIFAR10(ASSETS, transform=train_transform())
    rows = bench.bench_input(images, count=512, rounds=1)
    assert [row["part"] for row in rows] == ["input"] * 5
    names = ["the original", "torchvision v2 from ", "Kornia, batches of ", "BatchTransform", "gathered"]
    assert all(row["row"].startswith(name) for row, name in zip(rows, names))
    assert rows[0]["ratio"] == 1
    for row in rows:
        assert row["ratio"] == row["value"] / rows[0]["value"] > 0
    assert "BatchTransform" in capsys.readouterr().out


def test_the_fastest_way_is_a_row():
    ways = {f"{seconds} s": lambda seconds=seconds: time.sleep(seconds) or 1 for seconds in (0.1, 0.01, 0.2)}
    (name, row), *others = bench.fastest(ways, rounds=1).items()
    assert name == "0.01 s" and row.work is ways[name] and not others


def pictures_of_peers(images: AlbumentationsCIFAR10) -> dict[str, torch.Tensor]:
    """All images, augmented in each way: normalised float32 (N, 3, 32, 32)."""
    compose = original.albumentations_transform()
    pictures = {"original": default_collate([original.augmented(compose, image) for image in images.data])}
    for kind, transform in peers.torchvision_transforms().items():
        uint8 = default_collate([transform(image) for image in images.data])
        pictures[kind] = peers.torchvision_normalize()(uint8)
    floats = peers.gather_and_convert(torch.from_numpy(images.data), torch.arange(len(images)))
    pictures["Kornia"] = peers.kornia_transform()(floats.div_(255))
    return pictures


def test_peers_augment_like_the_original():
    pytest.importorskip("kornia")
    torch.manual_seed(0)
    pictures = pictures_of_peers(AlbumentationsCIFAR10(ASSETS, train=False))
    black = torch.tensor([-mean / std for mean, std in zip(peers.MEAN, peers.STD)]).view(3, 1, 1)
    for kind, batch in pictures.items():
        assert batch.shape == (500, 3, 32, 32) and batch.dtype == torch.float32, kind
        # What is turned or moved into the picture is black, and so is the hole of 8x8.
        is_black = (batch - black).abs().amax(1) < 1e-5
        holes = F.avg_pool2d(is_black.float()[:, None], 8, stride=1).amax((1, 2, 3)) == 1
        expected = pictures["original"]
        assert batch.mean().item() == pytest.approx(expected.mean().item(), abs=0.05), kind
        assert batch.std().item() == pytest.approx(expected.std().item(), abs=0.05), kind
        assert holes.float().mean().item() == pytest.approx(0.5, abs=0.12), kind


def test_workers_can_be_started_where_there_is_no_fork():
    images = AlbumentationsCIFAR10(ASSETS, train=False)
    compose = original.albumentations_transform()
    transforms = [functools.partial(original.augmented, compose), *peers.torchvision_transforms().values()]
    for transform in transforms:
        dataset = pickle.loads(pickle.dumps(peers.PerSample(images, 10, transform)))
        assert dataset[9][0].shape == (3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_part_gives_plain_pytorch_what_is_fast_here(monkeypatch, dtype):
    monkeypatch.setattr(bench, "precision", lambda device: dtype)
    monkeypatch.setattr(bench, "compiled", lambda net, images: net)
    monkeypatch.setattr(bench, "in_turn", lambda rows: dict.fromkeys(rows, 1.0))
    monkeypatch.setattr(bench, "matrix_rate", lambda: 1.0)
    plain = [row["row"] for row in bench.bench_step() if row["row"].startswith("plain PyTorch")]
    kind = str(dtype).removeprefix("torch.")
    expected = ["float32", kind, f"{kind}, compiled"] if kind == "bfloat16" else [kind, f"{kind}, compiled"]
    assert plain == [f"plain PyTorch: {name}, batch 256" for name in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plain_step_learns_its_batch(monkeypatch, dtype):
    nets = []
    monkeypatch.setattr(peers, "Net", lambda: nets.append(Net()) or nets[0])
    monkeypatch.setattr(
        peers, "random_batch", lambda size: (torch.randn(16, 3, 32, 32), torch.arange(16) % 10)
    )
    step = peers.plain_step(dtype)
    before = [parameter.clone() for parameter in nets[0].parameters()]
    assert step() == 16
    assert all(not torch.equal(old, new) for old, new in zip(before, nets[0].parameters()))


def test_a_fresh_process_is_another_one():
    assert bench.in_fresh_process(os.getpid) != os.getpid()


def peaks_around_a_tensor() -> tuple[float, float]:
    """The peak before a tensor of 0.4 GB, and after it was freed."""
    before = bench.peak_memory()
    torch.ones(10**8)
    return before, bench.peak_memory()


def test_peak_memory_counts_what_was_freed():
    before, after = bench.in_fresh_process(peaks_around_a_tensor)
    assert after > before + 0.3


@pytest.mark.parametrize("autocast", [False, True])
def test_the_original_recipe_is_given_minutes(monkeypatch, tmp_path, autocast):
    images = bench.first_images(AlbumentationsCIFAR10(ASSETS, transform=train_transform()), 20)
    monkeypatch.setattr(original, "cifar10_images", lambda train: images)
    table = tmp_path / "table.csv"
    options = ["--autocast"] * autocast + ["--seed", "3", "--csv", str(table)]
    original.main(["--minutes", "0.001", "0.02", *options])
    with open(table) as file:
        rows = list(csv.DictReader(file))
    for row, minutes in zip(rows, (0.001, 0.02), strict=True):
        assert float(row["minutes"]) >= minutes - 0.005  # it is rounded
        assert 0 <= float(row["test_accuracy"]) <= 100
        assert row["recipe"] in frontier.LINES and int(row["epochs"]) >= 1
        assert ("autocast" in row["recipe"]) == ("--autocast" in row["command"]) == autocast
        assert f"--minutes {minutes} --seed 3" in row["command"]


@pytest.mark.parametrize("teacher, expected", [("none", "0"), ("20 epochs, 92.00 % on test", "20")])
def test_a_whole_run_of_the_notebook_is_a_line_of_the_table(monkeypatch, tmp_path, teacher, expected):
    def run_notebook(command, check):
        time.sleep(0.6)
        assert command[1:] == [tmp_path / "run_notebook.py", *options] and check
        folder = tmp_path / "runs" / "24-epochs-seed-3"
        folder.mkdir(parents=True)
        metadata = {"seed": "3", "epochs": "24", "test_accuracy": "88.12", "teacher": teacher}
        save_weights(Net(), folder / "net.safetensors", metadata | {"commit": "1234567"})

        (tmp_path / "runs" / "other").mkdir()  # of a run that ends at the same time
        (tmp_path / "runs" / "other" / "net.safetensors").write_bytes(b"")

    options = ["EPOCHS=24", "SEED=3", "RESUME=false", "DATA=full"]
    shutil.copy("S8.ipynb", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(frontier, "ROOT", tmp_path)
    monkeypatch.setattr(frontier.subprocess, "run", run_notebook)
    row = frontier.measure(["EPOCHS=24", "SEED=3"])
    assert 0.6 / 60 <= float(row["minutes"]) + 0.005 < 0.1
    assert row["command"] == f"make notebook {' '.join(options)}"
    values = [row[name] for name in ("recipe", "seed", "test_accuracy", "epochs", "teacher_epochs", "commit")]
    assert values == ["ours", "3", "88.12", "24", expected, "1234567"]


def test_autocast_and_channels_last_change_no_answer():
    net, _ = original.build_net()
    images = torch.randn(8, 3, 32, 32)
    logits = net.eval()(images)
    fast = original.Autocast(net)
    assert fast(images).dtype == torch.float32
    assert torch.allclose(fast(images), logits, atol=0.1)
    assert next(fast.parameters()).is_contiguous(memory_format=torch.channels_last)


def test_a_run_adds_a_line_to_its_table_also_behind_a_link(tmp_path):
    (tmp_path / "link.csv").symlink_to("table.csv")
    for seed in (0, 1):
        held_out.append({"change": "labels", "seed": seed}, tmp_path / "link.csv")
    assert (tmp_path / "table.csv").read_text().splitlines() == ["change,seed", "labels,0", "labels,1"]
    (tmp_path / "wider.csv").write_text("seed,loss,change\n0,0.5,labels\n")
    held_out.append({"change": "dropout", "seed": 1}, tmp_path / "wider.csv")
    assert (tmp_path / "wider.csv").read_text().splitlines()[-1] == "1,,dropout"
    (tmp_path / "empty.csv").touch()
    held_out.append({"change": "labels"}, tmp_path / "empty.csv")
    assert (tmp_path / "empty.csv").read_text().splitlines() == ["change", "labels"]


def test_held_out_images_are_never_learnt(monkeypatch):
    images = AlbumentationsCIFAR10(ASSETS)
    monkeypatch.setattr(held_out, "training_images", lambda: images)
    monkeypatch.setattr(arms, "HELD_OUT", 200)
    learnt = {image.numpy().tobytes() for image in arms.learning_images().images}
    judges = {image.numpy().tobytes() for image in arms.held_out(200).images}
    assert (len(learnt), len(judges)) == (1800, 200) and not learnt & judges


# ---------------------------------------------------------------- 10,000 held-out images


def test_the_scaled_loss_does_not_depend_on_how_soft_the_answers_are():
    torch.manual_seed(0)
    targets = torch.randint(10, (1000,))
    logits = torch.randn(1000, 10) + 2 * F.one_hot(targets, 10)
    scores = [arms.held_out_scores(factor * logits, targets) for factor in (0.6, 1.0, 1.6)]
    assert len({score["loss"] for score in scores}) == 3
    assert max(abs(float(score["scaled_loss"]) - float(scores[1]["scaled_loss"])) for score in scores) < 5e-4
    best = float(scores[1]["factor"])
    assert [float(score["factor"]) for score in scores] == pytest.approx(
        [best / 0.6, best, best / 1.6], abs=0.02
    )


def test_answers_are_the_mean_over_teachers_and_mirror_images(monkeypatch, tmp_path):
    images = AlbumentationsCIFAR10(ASSETS)
    monkeypatch.setattr(held_out, "training_images", lambda: images)
    for name, value in (("FOLDER", tmp_path), ("HELD_OUT", 1500), ("VIEWS", 2)):
        monkeypatch.setattr(arms, name, value)
    logits = torch.randn(2, 2, 500, 2, 10).half()  # of each teacher and view
    for seed in (0, 1):
        kept = {"views": logits[seed], "augmentation": text_of(train_transform())}
        torch.save(kept, arms.answer_file(seed))
    loader = arms.AnsweredLoader([0, 1])
    loader.set_epoch(4)  # the second view again
    places = loader.loader.order()[:256]
    pictures, _, answers = next(iter(loader))
    expected = (logits.float() / 2).softmax(4).mean((0, 3))
    torch.testing.assert_close(answers, expected[1][places])
    loader.loader.set_epoch(2)
    alone = torch.cat([x for x, _ in loader.loader.augmented(places, 256)])
    assert torch.equal(pictures, alone)
    torch.save(kept | {"augmentation": "none"}, arms.answer_file(1))
    with pytest.raises(ValueError, match="found some to none: run arms.py answers --seed 1 again"):
        arms.AnsweredLoader([0, 1])


def test_a_stopped_run_has_no_line_and_a_stopped_teacher_no_answers(monkeypatch, tmp_path):
    images = AlbumentationsCIFAR10(ASSETS)
    monkeypatch.setattr(held_out, "training_images", lambda: images)
    monkeypatch.setattr(arms, "FOLDER", tmp_path)
    monkeypatch.setattr(arms, "HELD_OUT", 1500)
    monkeypatch.setattr(arms, "AnsweredLoader", lambda teachers: arms.learning_images())
    monkeypatch.setattr(arms.training_utils, "fit", lambda *_, epochs, **options: [{}] * (epochs - 1))
    with pytest.raises(KeyboardInterrupt):
        arms.run("nothing", seed=0, teachers=[0], epochs=2)
    with pytest.raises(KeyboardInterrupt):
        arms.keep_answers(seed=0)
    assert not any(tmp_path.iterdir())
