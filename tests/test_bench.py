import csv

import pytest
from conftest import REPOSITORY

import bench
from dataset import ASSETS, AlbumentationsCIFAR10, train_transform


def test_operations_of_a_training_image():
    # Multiply-adds of the convolutions, stage by stage: weights times places.
    stage1 = (27 + 96 + 2 * 9_216) * 32**2 + 9_216 * 16**2
    stage2 = (288 + 1_280 + 2 * 14_400) * 16**2 + 14_400 * 8**2
    stage3 = (360 + 1_760 + 2 * 17_424) * 8**2 + 17_424 * 4**2
    stage4 = (396 + 2_112 + 3 * 20_736) * 4**2
    assert bench.flops_per_image() == 3 * 2 * (stage1 + stage2 + stage3 + stage4 + 480)


def test_input_part_measures_five_ways_side_by_side(capsys):
    pytest.importorskip("kornia")
    rows = bench.bench_input(AlbumentationsCIFAR10(ASSETS, transform=train_transform()), count=512, rounds=1)
    assert [row["part"] for row in rows] == ["input"] * 5 and rows[0]["ratio"] == 1
    assert all(row["ratio"] == row["value"] / rows[0]["value"] > 0 for row in rows)
    assert "BatchTransform" in capsys.readouterr().out


def test_readme_says_what_was_measured_on_the_recorded_run_s_kind_of_machine():
    with open(REPOSITORY / "assets/bench_zen4.csv") as file:
        rate = {row["row"]: float(row["value"]) for row in csv.DictReader(file)}

    def over(one, other):
        """How many times the rate of the one row is the other's, by how their names begin."""
        first, second = (next(rate[name] for name in rate if name.startswith(start)) for start in (one, other))
        return first / second

    readme = (REPOSITORY / "README.md").read_text()
    batched = over("BatchTransform", "the seed: A"), over("BatchTransform", "Kornia")
    step = over("ours: bfloat16", "the seed: fp32"), over("ours: bfloat16", "ceiling")
    assert "the input reaches {:.1f} times the seed's rate and {:.1f} times Kornia's".format(*batched) in readme
    assert f"a compiled step {step[0]:.1f} times the seed's (7.6 in a run before, noted by hand) and {100 * step[1]:.0f} % of" in readme
    assert f"an epoch {100 * over('our epoch', 'our training steps'):.0f} % of the rate of its steps" in readme


def test_readme_shows_the_recorded_table():
    readme = (REPOSITORY / "README.md").read_text()
    with open(REPOSITORY / "assets/bench.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows} == {"input", "step", "epoch", "growth", "predict"}
    peak = next(float(row["value"]) for row in rows if row["row"].startswith("a run:"))
    memory = "a run's peak memory, test and compiler included, no teacher: at most 2.5 GB"
    assert f"| {memory} | {bench.rounded(peak)} GB |" in readme and peak < 2.5
    rate = {row["row"]: float(row["value"]) for row in rows}
    ours, ceiling = rate["ours: bfloat16, compiled, batch 256"], rate["ceiling: the same operations as one matrix product"]
    epoch, steps = rate["our epoch, testing included"], rate["our training steps alone, on a batch that is there"]
    for aim, measured in {
        "input: 10 times the seed's rate": f"{rate['BatchTransform'] / rate['the seed: Albumentations per sample, 2 workers']:.1f}",
        "input: 1.3 times Kornia's": f"{rate['BatchTransform'] / rate['Kornia, batched']:.1f}",
        "step: 8 times the seed's rate": f"{ours / rate['the seed: fp32, NCHW, batch 1024, dropout 0.1, .item()']:.1f}",
        "an epoch at 93 % of the rate of its steps": f"{epoch / steps:.0%}",
        "step: 55 % of the matrix product's rate": f"{ours / ceiling:.0%}",
    }.items():
        assert f"| {aim} | {measured.replace('%', ' %')}" in readme
    for row in rows:
        if row["part"] != "growth":  # drawn in assets/bench.png
            median = f"{bench.rounded(float(row['value']))} {row['unit']}"
            assert f"| {row['part']} | {row['row']} | {median} | {float(row['ratio']):.2f} |" in readme
