"""Execute S8.ipynb: python run_notebook.py [NAME=VALUE ...]

The names are those of the notebook's parameters cell. The executed notebook goes into the folder of the run
under runs/, beside its pictures, history, weights and checkpoints. Nothing that git tracks changes.

    --record    run the defaults on the full data, and put the result in place of S8.ipynb and assets/
    --script    execute nothing: write S8.py, the notebook with these values, for torchrun
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import nbformat

from parameters import PARAMETERS, TEXTS, check_installed, check_parameters, run_folder

NOTEBOOK = Path("S8.ipynb")


def main(arguments: list[str]) -> None:
    os.chdir(Path(__file__).resolve().parent)
    options = [argument for argument in arguments if argument.startswith("--")]
    given = parse([argument for argument in arguments if argument not in options])
    if options not in ([], ["--record"], ["--script"]):
        raise ValueError(f"expected --record or --script, found {' '.join(options)}")
    check_installed()
    values = {name: default for name, (default, _, _) in PARAMETERS.items()} | TEXTS | given
    check_parameters(values)
    if options == ["--script"]:
        return write_script(given)
    if options == ["--record"]:
        check_recordable(given)
        values["DATA"] = "full"
    folder = run_folder(values, uses_sample(values))
    if options == ["--record"]:
        start_over(folder)
    before = NOTEBOOK.read_bytes()
    execute(with_parameters(given), folder, given)
    if options == ["--record"]:
        if NOTEBOOK.read_bytes() != before:
            raise ValueError(f"expected {NOTEBOOK} as when the run began, found another: the result is in {folder}")
        publish(folder)


def uses_sample(values: dict[str, object]) -> bool:
    """Whether a run with these parameters uses the embedded sample. CIFAR-10 is downloaded if need be."""
    if values["DATA"] == "sample":
        return True
    from cifar10 import ASSETS, find_cifar10  # here, because it takes seconds

    return find_cifar10(values["DATA_ROOT"], values["DATA"]) == ASSETS


def parse(arguments: list[str]) -> dict[str, object]:
    """NAME=VALUE texts as a dict. A value is a number or a truth value if it reads as one, else text."""
    values = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise ValueError(f"expected NAME=VALUE, found {argument!r}: see the parameters cell of {NOTEBOOK}")
        try:
            values[name] = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (SyntaxError, ValueError):
            values[name] = text
    return values


def with_parameters(values: dict[str, object]) -> nbformat.NotebookNode:
    """The notebook, with these values in its parameters cell and without outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.metadata.pop("execution", None)
        if "parameters" in cell.metadata.get("tags", []):
            for name, value in values.items():
                # The comment behind the value stays.
                pattern = rf"(?m)^{name} = [^#\n]*?(?=  #|$)"
                cell.source = re.sub(pattern, lambda _: f"{name} = {value!r}", cell.source)
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: Path, values: dict[str, object]) -> None:
    """Run all cells, their output shown here as it comes; the result is S8.ipynb in the folder."""
    import papermill

    growing = folder / "S8.running.ipynb"
    count = sum(cell.cell_type == "code" for cell in notebook.cells)
    started = []

    def on_cell_start(cell: nbformat.NotebookNode, cell_index: int) -> None:
        if cell.cell_type == "code":
            started.append(cell_index)
            print(f"\n--- cell {len(started)} of {count}", flush=True)

    # A kernel that is stopped complains in a file. What the cells print to standard error comes here.
    errors = os.fdopen(os.dup(2), "w", buffering=1)
    with open(folder / "kernel.log", "w") as log:
        os.dup2(log.fileno(), 2)
    sys.stderr = errors
    try:
        papermill.execute_notebook(
            notebook,
            growing,
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=errors,
            coalesce_streams=True,  # keep the last state of each progress bar, not every one it passed
            on_cell_start=on_cell_start,
        )
    except papermill.PapermillExecutionError as error:
        sys.exit(f"{error.ename}: {error.evalue}")
    except KeyboardInterrupt:
        again = "the same command" + (", without RESUME=false," if values.get("RESUME") is False else "")
        print(f"interrupted: {again} continues after the last whole epoch", file=errors)
        os._exit(1)  # else Python complains of questions that the stopped kernel will not answer
    result = nbformat.read(growing, as_version=4)
    result.metadata.pop("papermill", None)
    for cell in result.cells:
        cell.metadata.pop("papermill", None)
    nbformat.write(result, growing)
    os.replace(growing, folder / NOTEBOOK)


def write_script(values: dict[str, object]) -> None:
    import nbconvert

    text, _ = nbconvert.PythonExporter().from_notebook_node(with_parameters(values))
    NOTEBOOK.with_suffix(".py").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- the record


def check_recordable(values: dict[str, object]) -> None:
    """Raise ValueError unless the recorded run would be this commit's defaults."""
    if values:
        name = next(iter(values))
        raise ValueError(f"expected a record without parameters, found {name}: make notebook takes it")
    status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)
    if status.stdout:
        first = status.stdout.splitlines()[0][3:]
        raise ValueError(f"expected a clean tree for a record, found {first} changed: commit it first")


def start_over(folder: Path) -> None:
    """A record is one run from its first epoch. What an earlier run left is kept under another name."""
    if any(folder.iterdir()):
        aside = folder.with_name(f"{folder.name}.{datetime.now():%Y%m%d-%H%M%S}")
        os.replace(folder, aside)
        folder.mkdir()
        print(f"{folder} is kept as {aside}")


def publish(folder: Path) -> None:
    """Put the run's files in place of those that git tracks."""
    for file in sorted(folder.iterdir()):
        if file.suffix in (".png", ".csv", ".safetensors"):
            place(file, Path("assets") / file.name)
    place(folder / "RF Calculations.xlsx", Path("RF Calculations.xlsx"))
    place(folder / NOTEBOOK, NOTEBOOK)


def place(file: Path, target: Path) -> None:
    """Copy beside and rename, so that the target is never half a file."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.copyfile(file, partial)
    os.replace(partial, target)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted before the first cell")
