import csv
import os

import pytest

import ablations
import bench
from conftest import REPOSITORY
from dataset import ASSETS, AlbumentationsCIFAR10, train_transform
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
    assert rows[0]["ratio"] == 1
    for row in rows:
        assert row["ratio"] == row["value"] / rows[0]["value"] > 0
    assert "BatchTransform" in capsys.readouterr().out


def test_a_fresh_process_is_another_one():
    assert bench.in_fresh_process(os.getpid) != os.getpid()


@pytest.mark.parametrize("change", ablations.CHANGES)
def test_every_change_of_the_recipe_trains_each_weight_once(change):
    net = Net()
    recipe = ablations.RECIPE | ablations.CHANGES[change]
    optimizer, scheduler = recipe["plan"](net, 100)
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in net.parameters())
    rates = [scheduler.lr_lambdas[0](step) for step in range(101)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == rates[20] == pytest.approx(1)
    assert rates[100] == pytest.approx(0)
    group = optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(0.04 * group["initial_lr"])


def test_the_cosine_is_above_the_line_at_first_and_below_it_at_last():
    _, line = ablations.RECIPE["plan"](Net(), 100)
    _, cosine = ablations.cosine_plan(Net(), 100)
    difference = [cosine.lr_lambdas[0](step) - line.lr_lambdas[0](step) for step in (10, 40, 60, 80)]
    assert difference == pytest.approx([0, 0.1036, 0, -0.1036], abs=1e-3)


def test_held_out_images_are_never_learnt(monkeypatch):
    images = AlbumentationsCIFAR10(ASSETS)
    monkeypatch.setattr(ablations, "training_images", lambda: images)
    monkeypatch.setattr(ablations, "HELD_OUT", 200)
    loader = ablations.batch_loader(list, 256, seed=0)
    held_out = ablations.images_at(0, 200, train_transform())
    learnt = {image.numpy().tobytes() for image in loader.images}
    assert len(loader.images) == 1800
    assert not learnt & {image.tobytes() for image in held_out.data}


def test_readme_says_what_was_measured_on_the_recorded_run_s_kind_of_machine():
    with open(REPOSITORY / "assets/bench_zen4.csv") as file:
        rate = {row["row"]: float(row["value"]) for row in csv.DictReader(file)}

    def times(row, other):
        """The ratio of two rows' rates. They are named by how they begin."""
        first = next(rate[name] for name in rate if name.startswith(row))
        second = next(rate[name] for name in rate if name.startswith(other))
        return first / second

    readme = (REPOSITORY / "README.md").read_text()
    original, kornia = times("BatchTransform", "the seed: A"), times("BatchTransform", "Kornia")
    assert f"the input reaches {original:.1f} times the seed's rate and {kornia:.1f} times Kornia's" in readme
    original, ceiling = times("ours: bfloat16", "the seed: fp32"), times("ours: bfloat16", "ceiling")
    compiled = f"a compiled step {original:.1f} times the seed's (7.6 in a run before, noted by hand)"
    assert f"{compiled} and {100 * ceiling:.0f} % of" in readme
    epoch = times("our epoch", "our training steps")
    assert f"an epoch {100 * epoch:.0f} % of the rate of its steps" in readme


def test_readme_shows_the_recorded_table():
    readme = (REPOSITORY / "README.md").read_text()
    with open(REPOSITORY / "assets/bench.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows} == {"input", "step", "epoch", "growth", "predict"}
    peak = next(float(row["value"]) for row in rows if row["row"].startswith("a run:"))
    memory = "a run's peak memory, test and compiler included, no teacher: at most 2.5 GB"
    assert f"| {memory} | {bench.three_digits(peak)} GB |" in readme and peak < 2.5
    rate = {row["row"]: float(row["value"]) for row in rows}
    per_sample = rate["the seed: Albumentations per sample, 2 workers"]
    original_step = rate["the seed: fp32, NCHW, batch 1024, dropout 0.1, .item()"]
    step = rate["ours: bfloat16, compiled, batch 256"]
    ceiling = rate["ceiling: the same operations as one matrix product"]
    epoch = rate["our epoch, testing included"]
    steps = rate["our training steps alone, on a batch that is there"]
    aims = {
        "input: 10 times the seed's rate": f"{rate['BatchTransform'] / per_sample:.1f}",
        "input: 1.3 times Kornia's": f"{rate['BatchTransform'] / rate['Kornia, batched']:.1f}",
        "step: 8 times the seed's rate": f"{step / original_step:.1f}",
        "an epoch at 93 % of the rate of its steps": f"{epoch / steps:.0%}",
        "step: 55 % of the matrix product's rate": f"{step / ceiling:.0%}",
    }
    for aim, measured in aims.items():
        assert f"| {aim} | {measured.replace('%', ' %')}" in readme
    for row in rows:
        if row["part"] != "growth":  # drawn in assets/bench.png
            median = f"{bench.three_digits(float(row['value']))} {row['unit']}"
            assert f"| {row['part']} | {row['row']} | {median} | {float(row['ratio']):.2f} |" in readme
