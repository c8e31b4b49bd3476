import csv

import pytest
from conftest import REPOSITORY

import bench
from dataset import ASSETS, AlbumentationsCIFAR10, train_transform


def test_operations_of_a_training_image():
    # 33.9 million multiply-adds forward; the backward pass computes two such products for all but the first layer.
    assert bench.flops_per_image() == pytest.approx(3 * 2 * 33.9e6, rel=0.02)


def test_input_part_measures_five_ways_side_by_side(capsys):
    rows = bench.bench_input(AlbumentationsCIFAR10(ASSETS, transform=train_transform()), count=512, rounds=1)
    assert [row["part"] for row in rows] == ["input"] * 5 and rows[0]["ratio"] == 1
    assert all(row["ratio"] == row["value"] / rows[0]["value"] > 0 for row in rows)
    assert "BatchTransform" in capsys.readouterr().out


def test_readme_shows_the_recorded_table():
    readme = (REPOSITORY / "README.md").read_text()
    with open(REPOSITORY / "assets/bench.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows} == {"input", "step", "epoch", "growth", "predict"}
    for row in rows:
        if row["part"] != "growth":  # drawn in assets/bench.png
            assert f"| {row['part']} | {row['row']} | {bench.rounded(float(row['value']))} {row['unit']} | {float(row['ratio']):.2f} |" in readme
