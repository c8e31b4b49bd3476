"""The tables of RECIPE.md: what changes of the recipe did to images held out from training.

Each function takes the rows of assets/ablations.csv and returns a table: its header and its rows.
"""

import statistics

Rows = list[dict[str, str]]
Table = tuple[list[str], list[list[str]]]


def runs(rows: Rows, change: str, epochs: int) -> Rows:
    return [row for row in rows if row["change"] == change and row["epochs"] == str(epochs)]


# ---------------------------------------------------------------- 5,000 held-out images


def findings(rows: Rows) -> Table:
    """The mean accuracy of each change, and its difference to a baseline."""
    table = []
    for label, change, epochs, baseline in (
        (
            "today's, beside the recipe before the teacher",
            "teacher S, 20 views, no cutout, no label, plain statistics",
            100,
            "notebook",
        ),
        ("labels in place of the teacher", "labels", 16, "taught"),
        ("SGD in place of Muon", "taught, SGD", 16, "taught"),
        ("AdamW in place of Muon", "taught, AdamW, rate 3e-3, decay 0.05", 16, "taught"),
        ("twice the learning rates", "taught, twice the peak rates", 16, "taught"),
        ("no moving average", "taught, no average", 16, "taught"),
        ("no flip", "taught, no flip", 16, "taught"),
        ("dropout of 0.03", "taught, dropout 0.03", 16, "taught"),
    ):
        values, base = (
            [float(row["accuracy"]) for row in runs(rows, name, epochs)] for name in (change, baseline)
        )
        # All runs are judged by the same 5,000 images, so more runs do not make this error smaller.
        shares = [statistics.mean(part) / 100 for part in (values, base)]
        error = 100 * sum(share * (1 - share) / 5000 for share in shares) ** 0.5
        difference = f"{statistics.mean(values) - statistics.mean(base):+.2f} ± {error:.2f}"
        reached, counts = f"{statistics.mean(values):.2f} %", f"{len(values)} and {len(base)}"
        table.append([label, str(epochs), reached, difference, counts])
    return ["change", "epochs", "held out", "difference (points)", "runs"], table


# ---------------------------------------------------------------- 10,000 held-out images

PREFIX, MEAN = "40,000 images, teacher ", "the mean over the picture and its mirror image"
BRANCH = "from epoch 32 of nothing_2_40, order 0"
EXPERIMENTS = [  # label, change, epochs, what it is beside
    ("the teacher itself, mean over both mirror images", f"labels 0 itself, {MEAN}", 20, "labels 0 itself"),
    ("the teacher itself, squared loss", "squared 0 itself", 20, "labels 0 itself"),
    ("answers: mean over both mirror images", "labels 0: mirrored", 20, "labels 0: nothing"),
    (
        "… of two teachers, one with a squared loss",
        "labels 0 and squared 0: mirrored",
        20,
        "labels 0: mirrored",
    ),
    ("standardized logits", "labels 0: mirrored, standardized", 20, "labels 0: mirrored"),
    ("all classes but the first count twice", "0: decoupled", 20, "labels 0: mirrored"),
    ("half as many views, also mirrored", "0: half", 20, "labels 0: mirrored"),
    ("CutMix, and 0.6 of the peak rates", "0: cutmix, rates", 40, "0: nothing"),
    (
        "two orders of the last fifth, averaged",
        "0: the mean of net_nothing_2_40_0 and net_nothing_2_40_1",
        40,
        "0: nothing",
    ),
    (
        "sharpness-aware steps in the last fifth, radius 0.04",
        f"0: sharpness 0.04; {BRANCH}",
        40,
        "0: nothing",
    ),
]


def experiments(rows: Rows) -> Table:
    """Pairs of single runs: accuracy, scaled loss, and the differences."""
    table = []
    for label, change, epochs, baseline in EXPERIMENTS:
        (row,), (base,) = (runs(rows, PREFIX + name, epochs) for name in (change, baseline))
        cells = [label, str(epochs)]
        for column, unit, digits in (("accuracy", " %", 2), ("scaled_loss", "", 4)):
            value, before = float(row[column]), float(base[column])
            cells += [f"{value:.{digits}f}{unit}", f"{value - before:+.{digits}f}"]
        table.append(cells)
    return ["change", "epochs", "held out", "difference (points)", "scaled loss", "difference"], table
