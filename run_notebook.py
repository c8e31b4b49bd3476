"""Execute S8.ipynb and put the result in its place: python run_notebook.py [NAME=VALUE ...]

The names are those of the notebook's parameters cell. While it runs, the result grows in runs/S8.ipynb;
only a complete run replaces S8.ipynb, and one that fails says why in its last line.
"""

import json
import os
import sys
from pathlib import Path

import nbformat
import papermill

NOTEBOOK, GROWING = Path("S8.ipynb"), Path("runs/S8.ipynb")


def typed(text: str) -> int | float | str | bool:
    """A parameter's value as typed in a shell: a number or true/false where it reads as one, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main() -> None:
    os.chdir(Path(__file__).resolve().parent)
    if malformed := [argument for argument in sys.argv[1:] if "=" not in argument]:
        sys.exit(f"expected NAME=VALUE, found {malformed[0]!r}: see the parameters cell of {NOTEBOOK}")
    parameters = {name: typed(value) for name, value in (argument.split("=", 1) for argument in sys.argv[1:])}
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # What an earlier run was given is not a default of this one.
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    GROWING.parent.mkdir(exist_ok=True)
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
        sys.exit(f"interrupted: {NOTEBOOK} is as it was, and what this run had done is in {GROWING}")
    notebook = nbformat.read(GROWING, as_version=4)
    notebook.metadata.pop("papermill", None)  # it holds a copy of the whole input
    nbformat.write(notebook, GROWING)
    os.replace(GROWING, NOTEBOOK)


if __name__ == "__main__":
    main()
