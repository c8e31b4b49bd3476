"""Execute S8.ipynb and put the result in its place: python run_notebook.py [NAME=VALUE ...]

The names are those of the notebook's parameters cell. While it runs, the result grows in runs/S8.ipynb;
only a complete run replaces S8.ipynb, and one that fails says why in its last line. RESUME=false
is a comment there, so that all cells, run again, go on.

With --script before them nothing is executed: S8.py is written, the notebook with these values, for torchrun.
"""

import ast
import os
import re
import sys
from pathlib import Path

import nbformat
import papermill

NOTEBOOK, GROWING = Path("S8.ipynb"), Path("runs/S8.ipynb")


def typed(text: str) -> int | float | str | bool:
    """A parameter's value as typed in a shell: a number or a truth value where it reads as one, else the text."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (SyntaxError, ValueError):
        return text


def main() -> None:
    os.chdir(Path(__file__).resolve().parent)
    script, arguments = sys.argv[1:2] == ["--script"], sys.argv[1:]
    if malformed := [argument for argument in arguments[script:] if "=" not in argument]:
        sys.exit(f"expected NAME=VALUE, found {malformed[0]!r}: see the parameters cell of {NOTEBOOK}")
    parameters = {name: typed(value) for name, value in (argument.split("=", 1) for argument in arguments[script:])}
    found = NOTEBOOK.read_text("utf-8")
    notebook = nbformat.reads(found, as_version=4)
    # What an earlier run was given is not a default of this one.
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    if script:
        import nbconvert  # here: to run the notebook takes less

        text, _ = nbconvert.PythonExporter().from_notebook_node(papermill.execute_notebook(notebook, None, parameters, prepare_only=True))
        NOTEBOOK.with_suffix(".py").write_text(text)
        return
    GROWING.parent.mkdir(exist_ok=True)
    # What a kernel that is stopped complains of goes to a file; what the cells print to standard error comes here.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with open(GROWING.with_name("kernel.log"), "w") as log:
        os.dup2(log.fileno(), 2)
    try:
        papermill.execute_notebook(
            notebook,
            GROWING,
            parameters,
            progress_bar=True,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            coalesce_streams=True,  # keep the last state of each progress bar, not every one it passed through
        )
    except papermill.PapermillExecutionError as error:
        sys.exit(f"{error.ename}: {error.evalue}")
    except KeyboardInterrupt:
        again = "the same command" + ", without RESUME=false," * (parameters.get("RESUME") is False)
        print(f"interrupted: {NOTEBOOK} is as it was; {again} goes on after the last whole epoch", file=sys.stderr)
        os._exit(1)  # else Python complains, on its way out, of questions that the stopped kernel will not answer
    notebook = nbformat.read(GROWING, as_version=4)
    notebook.metadata.pop("papermill", None)  # it holds a copy of the whole input
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            # Who runs all cells of the result again, after a crash, wants to go on.
            cell.source = re.sub(r"(?m)^RESUME = ", "# RESUME = ", cell.source)
    nbformat.write(notebook, GROWING)
    if NOTEBOOK.read_text("utf-8") != found:
        sys.exit(f"expected {NOTEBOOK} as when the run began, found another: it stays, and the result is {GROWING}; move it yourself")
    os.replace(GROWING, NOTEBOOK)


if __name__ == "__main__":
    main()
