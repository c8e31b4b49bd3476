import csv

from conftest import REPOSITORY

import soak


def test_two_minutes_of_soak():
    rows = soak.run(2)
    assert {row["part"] for row in rows} == {"kills", "downloads", "files"}
    tried = {row["what"]: row["tried"] for row in rows}
    assert tried["SIGKILL while training"] >= 8 and tried["mutated files: predicted, or ValueError"] >= 2_000
    assert [row for row in rows if row["survived"] < row["tried"]] == []


def test_readme_shows_the_recorded_table():
    readme = (REPOSITORY / "README.md").read_text()
    with open(REPOSITORY / "assets/soak.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows} == {"kills", "downloads", "files"}
    tried = {part: sum(int(row["tried"]) for row in rows if row["part"] == part) for part in ("kills", "downloads")}
    damaged = next(int(row["tried"]) for row in rows if row["what"].startswith("mutated files"))
    said = f"{tried['kills']} kills while training, {tried['downloads']} downloads with broken servers or none, "
    said += f"{damaged:,} damaged files. All survived."
    assert said in readme and all(row["tried"] == row["survived"] for row in rows)
    for row in rows:
        assert f"| {row['part']} | {row['what']} | {int(row['tried']):,} | {int(row['survived']):,} |" in readme
