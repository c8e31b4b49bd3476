"""The notebook's parameters: which values they may have, and the folder of the run that they name.

Needs the standard library alone, so that a typing error costs a second.
"""

import importlib.util
import subprocess
from pathlib import Path

# The default, the smallest and the largest value.
PARAMETERS = {
    "EPOCHS": (100, 1, 10_000),
    "TEACHER_EPOCHS": ("auto", 0, 10_000),
    "VIEWS": (20, 1, 10_000),
    "BATCH_SIZE": (256, 2, 50_000),
    "LEARNING_RATE": (0.015, 1e-6, 100.0),
    "SGD_LEARNING_RATE": (0.2, 1e-6, 100.0),
    "WEIGHT_DECAY": (5e-4, 0.0, 1.0),
    "DROPOUT": (0.0, 0.0, 0.99),
    "EMA_DECAY": (0.995, 0.0, 0.99999),
    "SEED": (0, 0, 2**32 - 1),
    "RESUME": (True, False, True),
}
TEXTS = {"DATA": "auto", "DATA_ROOT": ""}
PACKAGES = ("albumentations", "filelock", "matplotlib", "safetensors", "torch", "torchsummary", "torchvision")
PACKAGES += ("tqdm", "xlsxwriter")


def check_parameters(values: dict[str, object]) -> None:
    """Raise ValueError if a parameter is unknown, of the wrong type or out of range.

    `values` is the notebook's `globals()`. Unknown names are noticed only before the notebook
    imports torch: until then, parameters are its only numbers and texts.
    """
    known = [*PARAMETERS, *TEXTS]
    if "torch" not in values:
        for name, value in values.items():
            if name not in known and not name.startswith("_") and isinstance(value, (int, float, str)):
                raise ValueError(f"unknown parameter {name}: expected {', '.join(known)}")
    for name, (default, low, high) in PARAMETERS.items():
        value = values[name]
        if value == default == "auto":
            continue
        if not isinstance(value, (int, type(low))) or not low <= value <= high:
            kind = f"'auto' or {type(low).__name__}" if default == "auto" else type(low).__name__
            raise ValueError(f"expected {name} to be {kind} from {low} to {high}, found {value!r}")
    if values["DATA"] not in ("auto", "full", "sample"):
        raise ValueError(
            f"expected DATA to be 'auto', 'full' or 'sample', found {values['DATA']!r}: name one"
        )
    if not isinstance(values["DATA_ROOT"], str):
        raise ValueError(f"expected DATA_ROOT to be a folder's name, found {values['DATA_ROOT']!r}")


def teacher_epochs(wanted: int | str, epochs: int) -> int:
    """The teacher's epochs. "auto": 20, or none if `Net` learns for fewer than 60."""
    if wanted == "auto":
        return 20 if epochs >= 60 else 0
    return wanted


def check_installed() -> None:
    """Raise ModuleNotFoundError for the first package that the notebook misses, and say how to add it."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"expected the package {name}, found none: pip install {name}")


def run_folder(values: dict[str, object], is_sample: bool) -> Path:
    """The folder of a run with these parameters, such as runs/100-epochs-seed-0-batch-size-128; it is made.

    Epochs and seed are always in the name, other parameters if they differ from the default.
    RESUME, DATA and DATA_ROOT tell no runs apart.
    """
    name = f"{'sample-' if is_sample else ''}{values['EPOCHS']}-epochs-seed-{values['SEED']}"
    for parameter, (default, _, _) in PARAMETERS.items():
        if parameter not in ("EPOCHS", "SEED", "RESUME") and values[parameter] != default:
            name += f"-{parameter.lower().replace('_', '-')}-{values[parameter]}"
    folder = Path("runs") / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def describe_commit() -> str:
    """The commit of this code in at least 12 digits, with "-dirty" after edits; "unknown" without git.

    A line that a run adds to a table in assets is no edit.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        folder = Path(__file__).resolve().parent
        return subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", check=True).stdout

    try:
        commit = git("rev-parse", "--short=12", "HEAD").strip()
        edited = git("status", "--porcelain", "--untracked-files=no", ".", ":!assets/*.csv")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if edited else commit
