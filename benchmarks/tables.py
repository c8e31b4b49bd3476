"""Write every table and measured figure of the pages from the recorded files: `python benchmarks/tables.py`.

A page marks a place with `<!-- name -->` and `<!-- end -->`. The function of that name, below, gives what
stands between them, from assets/*.csv, the weights' metadata and the outputs of S8.ipynb. `make record` runs
this after a new record.
"""

import contextlib
import csv
import io
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nbformat
from safetensors import safe_open

import held_out
from bench import three_digits
from checkpoint import write_file

PAGES = ("README.md", "MODEL_CARD.md", "RECIPE.md", "docs/results.md", "docs/speed.md", "docs/howto.md")
PAGES += ("docs/comparison.md",)
PLACES: dict[str, Callable[[], str]] = {}  # of each name, the function that writes it


def place(function: Callable[[], str]) -> Callable[[], str]:
    PLACES[function.__name__] = function
    return function


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        write_file(path, render(path.read_text(encoding="utf-8")).encode())


def render(text: str) -> str:
    """The page with every marked place written again.

    Raises:
        KeyError: no function has the name of a place.
    """
    pattern = r"(?ms)^<!-- (\w+) -->\n(.*?)^<!-- end -->$"
    return re.sub(pattern, lambda match: f"<!-- {match[1]} -->\n{PLACES[match[1]]()}\n<!-- end -->", text)


# ---------------------------------------------------------------- recorded files


def table(name: str) -> list[dict[str, str]]:
    with open(ROOT / "assets" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def history(run: dict[str, str], network: str = "Net") -> list[dict[str, str]]:
    """The epochs of a run in assets/runs.csv, or of its teacher."""
    name = run["history"] if network == "Net" else run["teacher_history"]
    if not name:
        return []
    rows = [row for row in table(name) if row.get("seed", run["seed"]) == run["seed"]]
    return [row for row in rows if row.get("network", network) == network]


def runs(recipe: str, epochs: int, machine: str = "") -> list[dict[str, str]]:
    return [
        row
        for row in table("runs.csv")
        if row["recipe"] == recipe and row["epochs"] == str(epochs) and machine in row["machine"]
    ]


def accuracy(run: dict[str, str], network: str = "Net") -> float:
    return float(history(run, network)[-1]["test_accuracy"])


def minutes(run: dict[str, str]) -> float:
    """Training and testing, the teacher's included."""
    epochs = history(run, "Teacher") + history(run)
    return sum(float(row["seconds"]) for row in epochs) / 60


def by_minutes(recipe: str) -> list[dict[str, str]]:
    """The runs in assets/frontier.csv on two Intel cores (AMX), the shortest first."""
    rows = [row for row in table("frontier.csv") if row["recipe"] == recipe]
    rows = [row for row in rows if row["machine"].startswith("2 threads of Intel(R) Xeon(R) Processor")]
    return sorted(rows, key=lambda row: float(row["minutes"]))


def best_by_minutes(recipe: str) -> list[dict[str, str]]:
    """Of the runs `by_minutes` those that are more accurate than every shorter one."""
    rows, score = by_minutes(recipe), lambda row: float(row["test_accuracy"])
    return [row for i, row in enumerate(rows) if all(score(row) > score(other) for other in rows[:i])]


def mean_and_spread(several: list[dict[str, str]]) -> str:
    """The mean accuracy and its standard deviation over the seeds; of one run its accuracy."""
    values = [accuracy(run) for run in several]
    if len(values) == 1:
        return f"{values[0]:.2f} %"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %"


def span(values: list[float], unit: str) -> str:
    low, high = round(min(values)), round(max(values))
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    # A figure, its spread and its unit stay on one line.
    return re.sub(r"(?<=[\d±]) (?=[%±\d]|min)", "\u00a0", text)


def printed() -> str:
    """All that the notebook's cells printed."""
    notebook = nbformat.read(ROOT / "S8.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def printed_lines(pattern: str) -> str:
    """The lines that the notebook printed and that match, as a block of text."""
    lines = [line for line in printed().splitlines() if re.match(pattern, line)]
    return "```text\n" + "\n".join(lines) + "\n```"


def metadata() -> dict[str, str]:
    with safe_open(ROOT / "assets" / "net.safetensors", "pt") as file:
        return file.metadata()


# ---------------------------------------------------------------- README

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


@place
def headline() -> str:
    """How good, how long, and what is here."""
    record = runs("today's", 100)
    several = mean_and_spread(record)
    seeds, weights = "one seed", "its weights"
    if len(record) > 1:
        seeds = f"mean of {NUMBERS[len(record)]} seeds"
        weights = f"the weights of seed 0, with {accuracy(record[0]):.2f} %,"
    return (
        f"A network that you can read in one sitting gets **{several}** of CIFAR-10's test images right "
        f"({seeds}). It trains in {minutes(record[0]):.0f} minutes on two server cores, "
        f"and {weights} are in this repository."
    )


@place
def prediction() -> str:
    """A command, and what it prints."""
    import predict

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        predict.main([str(ROOT / "assets" / "pictures" / "cat.jpg")])
    answer = text.getvalue().strip().replace(f"{ROOT}/", "")
    return f"```console\n$ .venv/bin/python predict.py assets/pictures/cat.jpg\n{answer}\n```"


@place
def choices() -> str:
    """What to run on which machine, and what to expect."""
    record, gpu = (mean_and_spread(runs(recipe, 100)) for recipe in ("today's", "before the teacher"))
    rows = [["two cores with bfloat16, and two hours", "`make notebook`", record]]
    for row in reversed(best_by_minutes("ours")):
        if row["epochs"] != "100":
            time = f"… and {float(row['minutes']):.0f} minutes"
            command = row["command"].removesuffix(" RESUME=false DATA=full")
            rows.append([time, f"`{command}`", f"{row['test_accuracy']} %"])
    (laptop,) = runs("without mirror images", 16, "Zen 3")
    old = f"16 epochs of an earlier recipe: {accuracy(laptop):.2f} %, {minutes(laptop):.0f} minutes"
    rows += [
        [
            "two cores without bfloat16, as in most laptops",
            "`make notebook EPOCHS=24`",
            f"not recorded; {old}",
        ],
        ["a GPU", "`make notebook`", f"not recorded; without a teacher {gpu} in a minute (H100)"],
        ["no data set", "`make notebook DATA=sample EPOCHS=20`", sample_accuracy()],
    ]
    return markdown(["if you have", "run", "and expect on test images"], rows)


def sample_accuracy() -> str:
    (run,) = runs("the sample", 20)
    return f"{accuracy(run):.1f} %, having learnt from 2,000 images"


@place
def results() -> str:
    """One row for each recipe of 100 epochs."""
    rows = []
    for recipe, name in (
        ("today's", "today's recipe"),
        ("without mirror images", "without mirror images: an earlier teacher"),
        ("before the teacher", "before the teacher"),
    ):
        several = runs(recipe, 100)
        spans = {}  # of each machine
        for run in several:
            spans.setdefault(run["machine"], []).append(minutes(run))
        times = "<br>".join(span(values, "min") for values in spans.values())
        machines = "<br>".join(re.sub("^two cores of an |,.*", "", machine) for machine in spans)
        together = [text.replace(" ", "\u00a0") for text in (times, machines)]
        rows.append([name, str(len(several)), mean_and_spread(several), *together])
    return markdown(["recipe", "seeds", "test accuracy", "time", "machine"], rows)


@place
def statistics_of_cifar10() -> str:
    text = re.search(r"\[Train\]\n(?: - .*\n)+\[Test\]\n(?: - .*\n)+", printed())[0]
    return f"```text\n{text.rstrip()}\n```"


# ---------------------------------------------------------------- speed


@place
def speed() -> str:
    """Some rows of the recorded run's kind of machine."""
    names = {
        "Kornia": "input: Kornia, at its best",
        "BatchTransform": "input: `BatchTransform`",
        "plain PyTorch: float32, batch 256": "step: plain PyTorch, float32",
        "plain PyTorch: bfloat16, compiled, batch 256": "step: plain PyTorch, autocast, compiled",
        "ours: bfloat16, compiled, batch 256": "step: ours, compiled",
        "our epoch, testing included": "epoch, testing included",
    }
    rows = []
    for row in table("bench.csv"):
        kind, _, _ = row["row"].partition(", batches of")
        if kind in names:
            rate = f"{three_digits(float(row['value']))} images/s"
            rows.append([names[kind], rate, f"{float(row['ratio']):.1f} times as fast"])
    return markdown(["part", "rate", "beside the original project"], rows)


def bench_table(name: str) -> str:
    """All rows of a recorded bench except `growth`, which assets/bench.png shows."""
    rows = []
    for row in table(name):
        if row["part"] != "growth":
            value = f"{three_digits(float(row['value']))} {row['unit']}"
            rows.append([row["part"], row["row"], value, f"{float(row['ratio']):.2f}"])
    return markdown(["part", "what", "median", "ratio"], rows)


PLACES["speed_zen4"] = partial(bench_table, "bench_zen4.csv")
PLACES["speed_amx"] = partial(bench_table, "bench.csv")
PLACES["speed_avx512"] = partial(bench_table, "bench_avx512.csv")
PLACES["speed_zen3"] = partial(bench_table, "bench_zen3.csv")


@place
def memory() -> str:
    peak = next(float(row["value"]) for row in table("bench.csv") if row["row"].startswith("a run:"))
    return f"A run of batches of 256 takes {peak:.1f} GB at its peak, with data, compiler and testing."


# ---------------------------------------------------------------- results and model card


@place
def all_runs() -> str:
    """Every run of assets/runs.csv. The commit of the record is the one in the weights."""
    rows = []
    for run in table("runs.csv"):
        commit = metadata()["commit"][:7] if run["history"] == "history.csv" else run["commit"]
        teacher = f"{accuracy(run, 'Teacher'):.2f} %" if run["teacher_history"] else "none"
        rows.append(
            [
                f"{run['recipe']}, {run['epochs']} epochs",
                run["seed"],
                f"{accuracy(run):.2f} %",
                teacher,
                f"{minutes(run):.1f}",
                run["machine"].removeprefix("two cores of an "),
                f"`{run['command']}`",
                commit,
                f"[file](../assets/{run['history']})",
            ]
        )
    header = ["recipe", "seed", "test", "its teacher", "minutes", "machine", "command", "commit", "epochs"]
    return markdown(header, rows)


@place
def time_to_accuracy() -> str:
    """When the record first passes a level."""
    run = runs("today's", 100)[0]
    spent = sum(float(row["seconds"]) for row in history(run, "Teacher"))
    levels = {86.15: "86.15 %, the original project after its 100 epochs", 90: "90 %"}
    levels |= {91.25: "91.25 %, ResNet-20's paper"}
    rows = []
    for row in history(run):
        spent += float(row["seconds"])
        for level in [level for level in levels if float(row["test_accuracy"]) > level]:
            rows.append([levels.pop(level), row["epoch"], f"{spent / 60:.0f}"])
    rows.append([f"{accuracy(run):.2f} %, the end", row["epoch"], f"{spent / 60:.0f}"])
    return markdown(["over", "epoch", "minutes, with the teacher's"], rows)


@place
def accuracy_by_minutes() -> str:
    """Every run of assets/frontier.csv."""
    rows = []
    for run in table("frontier.csv"):
        cells = [run[name] for name in ("recipe", "minutes", "test_accuracy", "epochs", "teacher_epochs")]
        rows.append([*cells, run["machine"], f"`{run['command']}`", run["commit"][:7]])
    header = ["recipe", "minutes", "test (%)", "epochs", "teacher's epochs", "machine", "command", "commit"]
    return markdown(header, rows)


@place
def last_epochs() -> str:
    text = printed()
    count = len(history(runs("today's", 100)[0]))
    start = text.rindex(f"Epoch {count - 2}\n")
    lines = text[start:].splitlines()[:11]
    return "```text\n" + "\n".join(lines) + "\n```"


@place
def record_accuracy() -> str:
    """The record's accuracy, and the spread over seeds."""
    record = runs("today's", 100)
    text = f"{accuracy(record[0]):.2f} % of the 10,000 test images: weights of the last epoch, seed 0, in "
    text += "bfloat16, without test-time augmentation."
    if len(record) > 1:
        others = " and ".join(f"{accuracy(run):.2f} %" for run in record[1:])
        text += f" Other seeds reached {others}: {mean_and_spread(record)} over all."
    return text


@place
def record_teacher() -> str:
    score = accuracy(runs("today's", 100)[0], "Teacher")
    return f"The teacher, which learnt the labels, has {score:.2f} % of the test images right."


@place
def record_classes() -> str:
    return printed_lines(r"Correct: |\w+ and \w+: \d+ of")


@place
def record_calibration() -> str:
    return printed_lines("Expected calibration error")


@place
def record_damage() -> str:
    return printed_lines(r"JPEG quality|blur, sigma|noise, std|shift \(px\)")


# ---------------------------------------------------------------- recipe and how-to


@place
def findings() -> str:
    """What each change of the recipe brings or costs in 16 epochs or 100."""
    return markdown(*held_out.findings(table("ablations.csv")))


@place
def experiments() -> str:
    """What each change brings or costs, judged by 10,000 held-out images."""
    return markdown(*held_out.experiments(table("ablations.csv")))


@place
def missed_aims() -> str:
    """The aims that the seeds' mean and the best runs of so many minutes do not reach."""
    record, rows = runs("today's", 100), []
    reached = [("100 epochs, mean over seeds", 91.9, statistics.mean(map(accuracy, record)))]
    for limit, aim in ((30, 90.0), (60, 90.8)):
        (*_, best) = [row for row in best_by_minutes("ours") if float(row["minutes"]) <= limit]
        reached.append((f"{limit} minutes, everything counted", aim, float(best["test_accuracy"])))
    for name, aim, score in reached:
        if score < aim:
            rows.append([name, f"{aim} %", f"{score:.2f} %", f"{aim - score:.2f}"])
    return markdown(["run", "was to reach", "reached", "points less"], rows)


@place
def comparison() -> str:
    """Networks of up to 0.3 million parameters; the others' figures are from assets/comparison.csv."""
    record = runs("today's", 100)
    ours = f"{mean_and_spread(record)}, {NUMBERS[len(record)]} seed{'s' * (len(record) > 1)}"
    rows = [["**this one**", "0.19 M", ours, "last", "1.16 M parameters", "100", "this repository"]]
    rows += [list(row.values()) for row in table("comparison.csv")]
    header = ["network", "parameters", "test accuracy", "which epoch", "teacher", "epochs", "source"]
    return markdown(header, rows)


@place
def soak() -> str:
    """How often each fault was tried and survived."""
    rows = [
        [row["part"], row["what"], f"{int(row['tried']):,}", f"{int(row['survived']):,}"]
        for row in table("soak.csv")
    ]
    return markdown(["part", "what", "tried", "survived"], rows)


if __name__ == "__main__":
    main()
