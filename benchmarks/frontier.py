"""Draw assets/frontier.png, accuracy by minutes, from assets/runs.csv: `python benchmarks/frontier.py`.

A mark is a whole run: its accuracy in the last epoch, after as many minutes of training and testing,
the teacher's included. The line is the original recipe, its schedule stretched over as many minutes
as the earlier record took (assets/seed_history.csv).
"""

import itertools
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from tables import ROOT, accuracy, minutes, table  # isort: skip - it makes the next one possible
from checkpoint import save_figure

CORES = {  # how each machine's marks look
    "AMD EPYC (Zen 4), bfloat16": ("#0072B2", "o"),
    "Intel Xeon (AMX), bfloat16": ("#D55E00", "s"),
    "AMD EPYC (Zen 3), float32": ("#56B4E9", "^"),
}
LEVELS = {"ResNet-20's paper": (91.25, "#009E73", "--"), "the original project": (86.15, "#CC79A7", "-.")}


def plot(picture: Path) -> None:
    """Draw all recorded runs on two CPU cores, the original recipe and two levels to compare with."""
    figure = Figure((9, 5), dpi=150, layout="constrained")
    figure.suptitle("Accuracy by minutes on two CPU cores", fontsize=13)
    axes = figure.subplots()
    for cores in CORES:
        plot_runs(axes, cores)
    way = table("seed_history.csv")
    times = [float(row["seconds"]) / 60 for row in way]
    label = f"the original recipe in {times[-1]:.0f} minutes, on its way (Zen 4, float32)"
    axes.plot(times, [float(row["test_accuracy"]) for row in way], color="#777777", lw=1.5, label=label)
    for name, (level, color, dashes) in LEVELS.items():
        axes.axhline(level, color=color, ls=dashes, lw=1.5, label=f"{name}: {level:.2f} %")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([5, 10, 20, 30, 60, 120]))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(5, 150)
    axes.set_ylim(65, 95)
    axes.set_xlabel("minutes of training and testing, the teacher's included")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=9, loc="outside lower center", ncols=2)
    save_figure(figure, picture)


def plot_runs(axes: Axes, cores: str) -> None:
    """A mark for each run on a machine. Above the fastest of a kind is what it was."""
    color, mark = CORES[cores]
    several = [run for run in table("runs.csv") if run["machine"] == f"two cores of an {cores}"]
    places = {}  # of each kind of run
    for run in several:
        kind = f"{run['epochs']} epochs"
        if run["teacher_epochs"] == "0":
            kind += ", no teacher"
        places.setdefault(kind, []).append((minutes(run), accuracy(run)))
    times, scores = zip(*itertools.chain.from_iterable(places.values()))
    axes.scatter(times, scores, color=color, marker=mark, zorder=3, label=f"a run on {cores}")
    for kind, marks in places.items():
        highest = max(accuracy for _, accuracy in marks)
        offset = {"xytext": (0, 8), "textcoords": "offset points"}
        axes.annotate(kind, (min(marks)[0], highest), **offset, ha="center", fontsize=8.5)


if __name__ == "__main__":
    plot(ROOT / "assets" / "frontier.png")
