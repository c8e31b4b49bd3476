import os

import pytest

import ablations
import bench
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


def test_a_run_adds_a_line_to_its_table_also_behind_a_link(tmp_path):
    (tmp_path / "link.csv").symlink_to("table.csv")
    for seed in (0, 1):
        ablations.append({"change": "labels", "seed": seed}, tmp_path / "link.csv")
    assert (tmp_path / "table.csv").read_text().splitlines() == ["change,seed", "labels,0", "labels,1"]
    (tmp_path / "empty.csv").touch()
    ablations.append({"change": "labels"}, tmp_path / "empty.csv")
    assert (tmp_path / "empty.csv").read_text().splitlines() == ["change", "labels"]


def test_held_out_images_are_never_learnt(monkeypatch):
    images = AlbumentationsCIFAR10(ASSETS)
    monkeypatch.setattr(ablations, "training_images", lambda: images)
    monkeypatch.setattr(ablations, "HELD_OUT", 200)
    loader = ablations.batch_loader(list, 256, seed=0)
    held_out = ablations.images_at(0, 200, train_transform())
    learnt = {image.numpy().tobytes() for image in loader.images}
    assert len(loader.images) == 1800
    assert not learnt & {image.tobytes() for image in held_out.data}
