"""Draw assets/frontier.png, accuracy by minutes, from assets/runs.csv: `python benchmarks/frontier.py`.

A dot is a whole run: its accuracy in the last epoch, after as many minutes of training and testing,
the teacher's included. The line is the original recipe on its way (assets/seed_history.csv).
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from checkpoint import save_figure
from tables import ROOT, accuracy, minutes, table

CORES = {  # how each machine's dots look
    "AMD EPYC (Zen 4), bfloat16": ("#0072B2", "o"),
    "Intel Xeon (AMX), bfloat16": ("#D55E00", "s"),
    "AMD EPYC (Zen 3), float32": ("#009E73", "^"),
}
LEVELS = {"ResNet-20's paper: 91.25 %": 91.25, "the original project: 86.15 %": 86.15}


def plot(picture: Path) -> None:
    figure = Figure((9, 5), dpi=150, layout="constrained")
    figure.suptitle("Accuracy by minutes on two CPU cores", fontsize=13)
    axes = figure.subplots()
    for cores, (color, mark) in CORES.items():
        several = [run for run in table("runs.csv") if run["machine"] == f"two cores of an {cores}"]
        several = [run for run in several if run["recipe"] != "the sample"]
        times, scores = [minutes(run) for run in several], [accuracy(run) for run in several]
        axes.scatter(times, scores, color=color, marker=mark, zorder=3, label=f"a run on {cores}")
    way = table("seed_history.csv")
    times, scores = [[float(row[key]) for row in way] for key in ("seconds", "test_accuracy")]
    label = "the original recipe on its way, Zen 4, float32"
    axes.plot([time / 60 for time in times], scores, color="#777777", lw=1.5, label=label)
    for (name, level), dashes in zip(LEVELS.items(), ("--", "-.")):
        axes.axhline(level, color="#CC79A7", ls=dashes, lw=1.5, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([5, 10, 20, 30, 60, 120]))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(60, 95)
    axes.set_xlabel("minutes of training and testing, the teacher's included")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=9, loc="outside lower center", ncols=2)
    save_figure(figure, picture)


if __name__ == "__main__":
    plot(ROOT / "assets" / "frontier.png")
