"""Execute S8.ipynb: python run_notebook.py [NAME=VALUE ...]

The names are those of the notebook's parameters cell. The executed notebook goes into the folder
of the run under runs/, beside its pictures, history, weights and checkpoints. Nothing that git
tracks changes.

    --record    run the defaults on the full data, and put the result in place of S8.ipynb and assets/
    --script    execute nothing: write S8.py, the notebook with these values, for torchrun
"""

import ast
import copy
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import nbformat

from parameters import check_installed, check_parameters, run_folder

NOTEBOOK = Path("S8.ipynb")


def main(arguments: list[str]) -> None:
    os.chdir(Path(__file__).resolve().parent)
    options = [argument for argument in arguments if argument.startswith("--")]
    changes = parse([argument for argument in arguments if argument not in options])
    if options not in ([], ["--record"], ["--script"]):
        raise ValueError(f"expected --record or --script, found {' '.join(options)}: use one of them")
    check_installed()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    values = values_of(notebook) | changes
    check_parameters(values)
    if options == ["--script"]:
        write_script(with_values(notebook, changes))
    elif options == ["--record"]:
        record(notebook, values, changes)
    else:
        is_sample = uses_sample(values)
        if is_sample:
            changes["DATA"] = "sample"  # so that the notebook does not try to download again
        again = "the same command"
        if changes.get("RESUME") is False:
            again += ", without RESUME=false,"
        hint = f"{again} continues after the last whole epoch"
        execute(with_values(notebook, changes), run_folder(values, is_sample), hint)


def parse(arguments: list[str]) -> dict[str, object]:
    """NAME=VALUE texts as a dict. A value is a number or a truth value if it reads as one, else text."""
    values = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise ValueError(
                f"expected NAME=VALUE, found {argument!r}: see the parameters cell of {NOTEBOOK}"
            )
        try:
            values[name] = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        except (SyntaxError, ValueError):
            values[name] = text
    return values


def uses_sample(values: dict[str, object]) -> bool:
    """Whether a run with these parameters uses the embedded sample. Downloads CIFAR-10 if need be."""
    if values["DATA"] == "sample":
        return True
    from cifar10 import ASSETS, find_cifar10  # here, because it takes seconds

    return find_cifar10(values["DATA_ROOT"], values["DATA"]) == ASSETS


# ---------------------------------------------------------------- the parameters cell


def parameters_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            return cell
    raise ValueError(f"expected a cell with the tag parameters in {NOTEBOOK}, found none: tag it")


def values_of(notebook: nbformat.NotebookNode) -> dict[str, object]:
    """The values in the parameters cell."""
    assignments = ast.parse(parameters_cell(notebook).source).body
    return {line.targets[0].id: ast.literal_eval(line.value) for line in assignments}


def with_values(notebook: nbformat.NotebookNode, values: dict[str, object]) -> nbformat.NotebookNode:
    """A copy of the notebook without outputs, with these values in its parameters cell."""
    result = copy.deepcopy(notebook)
    for cell in result.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None
            cell.metadata.pop("execution", None)
    cell = parameters_cell(result)
    lines = cell.source.splitlines()
    for assignment in ast.parse(cell.source).body:
        name, value = assignment.targets[0].id, assignment.value
        if name in values:
            line = lines[value.lineno - 1]
            # The comment behind the value stays.
            lines[value.lineno - 1] = (
                line[: value.col_offset] + repr(values[name]) + line[value.end_col_offset :]
            )
    cell.source = "\n".join(lines)
    return result


# ---------------------------------------------------------------- running


def execute(notebook: nbformat.NotebookNode, folder: Path, hint: str) -> None:
    """Run all cells and show their output as it comes. The result is S8.ipynb in the folder."""
    import papermill

    partial = folder / "S8.partial.ipynb"
    code_cells = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]

    def on_cell_start(cell: nbformat.NotebookNode, cell_index: int) -> None:
        if cell_index in code_cells:
            print(f"\n--- cell {code_cells.index(cell_index) + 1} of {len(code_cells)}", flush=True)

    # Windows has an encoding for pipes that lacks many of the cells' characters.
    sys.stdout.reconfigure(errors="replace")
    # A stopped kernel complains; that goes into a file. Standard error of the cells comes here.
    errors = os.fdopen(os.dup(2), "w", 1, sys.stderr.encoding, sys.stderr.errors)
    with open(folder / "kernel.log", "wb") as log:
        os.dup2(log.fileno(), 2)
    sys.stderr = errors
    try:
        papermill.execute_notebook(
            notebook,
            partial,
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=errors,
            coalesce_streams=True,  # keep the last state of each progress bar only
            on_cell_start=on_cell_start,
        )
    except papermill.PapermillExecutionError as error:
        sys.exit(f"{error.ename}: {error.evalue}")
    except KeyboardInterrupt:
        print(f"interrupted: {hint}", file=errors)
        os._exit(1)  # else Python complains of questions that the stopped kernel will not answer
    result = nbformat.read(partial, as_version=4)
    result.metadata.pop("papermill", None)
    for cell in result.cells:
        cell.metadata.pop("papermill", None)
    nbformat.write(result, partial)
    from checkpoint import write_file  # here, because it takes seconds

    write_file(folder / NOTEBOOK, partial.read_bytes())
    partial.unlink()


def write_script(notebook: nbformat.NotebookNode) -> None:
    import nbconvert

    text, _ = nbconvert.PythonExporter().from_notebook_node(notebook)
    NOTEBOOK.with_suffix(".py").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- the record


def record(notebook: nbformat.NotebookNode, values: dict[str, object], changes: dict[str, object]) -> None:
    """Run the defaults on the full data, from the first epoch, and put the result where git tracks it."""
    if changes:
        name = next(iter(changes))
        raise ValueError(f"expected a record without parameters, found {name}: make notebook takes it")
    check_tree()
    uses_sample(values | {"DATA": "full"})  # raises an error if there is no CIFAR-10
    folder = run_folder(values, is_sample=False)
    if any(folder.iterdir()):
        aside = folder.with_name(f"{folder.name}.{datetime.now():%Y%m%d-%H%M%S}")
        os.replace(folder, aside)
        folder.mkdir()
        print(f"the earlier run in {folder} is kept as {aside}")
    before = NOTEBOOK.read_bytes()
    execute(with_values(notebook, {}), folder, "a record starts again with its first epoch")
    epochs = len((folder / "history.csv").read_bytes().splitlines()) - 1
    if epochs < values["EPOCHS"]:
        raise ValueError(f"expected {values['EPOCHS']} epochs, found {epochs}: the result is in {folder}")
    if NOTEBOOK.read_bytes() != before:
        raise ValueError(
            f"expected {NOTEBOOK} as when the run began, found another: the result is in {folder}"
        )
    publish(folder)


def check_tree() -> None:
    """Raise ValueError unless git has every file of this folder as it is."""
    command = ["git", "status", "--porcelain"]
    try:
        status = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise ValueError("expected a git clone for a record, found none: clone the repository") from None
    if status:
        first = status.splitlines()[0][3:]
        raise ValueError(f"expected a clean tree for a record, found {first} changed: commit it first")


def publish(folder: Path) -> None:
    """Put the run's files in place of those that git tracks."""
    from checkpoint import write_file

    for file in sorted(folder.iterdir()):
        if file.suffix in (".png", ".csv", ".safetensors"):
            write_file(Path("assets") / file.name, file.read_bytes())
    for name in ("RF Calculations.xlsx", NOTEBOOK):
        write_file(name, (folder / name).read_bytes())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
