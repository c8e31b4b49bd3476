"""The receptive field of a model as an Excel workbook."""

import io
import itertools
from datetime import datetime
from pathlib import Path

import xlsxwriter
from torch import nn

from checkpoint import write_file
from utils import SIZE, Size, receptive_field

COLUMNS = ("name", "kernel", "stride", "padding", "dilation")
COLUMNS += ("size_in", "size_out", "jump_in", "jump_out", "rf_in", "rf_out")
LETTERS = "ABCDEFGHIJK"  # of the columns
HEADER = 5  # the row of the headings; the image is in the next row, and the layers follow
TINTS = ("DDEBF7", "E2EFDA", "FFF2CC", "FCE4D6", "EDE7F6")
EXPLANATION = """\
rf out = rf in + (kernel − 1) · dilation · jump in        jump out = jump in · stride        \
size out = ⌊(size in + 2 · padding − dilation · (kernel − 1) − 1) / stride⌋ + 1
Blue: read from the model. Black: computed by the formulas above. Jump and receptive field (rf) are in \
pixels of the image, size out in pixels of the layer's output, the rest in pixels of its input.
With the dilation left out of rf out, the last cell would say (wrong wherever a dilation is not 1):"""
FORMULAS = {  # of row {r}; {p} is the row above it
    "size_in": "=G{p}",
    "size_out": "=INT((F{r}+2*D{r}-E{r}*(B{r}-1)-1)/C{r})+1",
    "jump_in": "=I{p}",
    "jump_out": "=H{r}*C{r}",
    "rf_in": "=K{p}",
    "rf_out": "=J{r}+(B{r}-1)*E{r}*H{r}",
}


def write_receptive_field_workbook(model: nn.Module, path: str | Path, input_size: Size = SIZE) -> None:
    """Writes `receptive_field(model, input_size)` as an .xlsx file whose computed cells are live formulas.

    The last cell is the receptive field of the last layer. Layers of one part of the model share
    a colour. The same model gives the same bytes. `path` is replaced, and never holds half a
    file.

    Raises:
        ValueError: the model has no layers, has branches, or has a pool that rounds its size up.
    """
    image = {"name": "image", "size_out": input_size[1], "jump_out": 1, "rf_out": 1}
    rows = [image, *receptive_field(model, input_size)]
    check_chain(rows)
    content = io.BytesIO()
    with xlsxwriter.Workbook(content, {"in_memory": True}) as book:
        author = "write_receptive_field_workbook"
        book.set_properties({"author": author, "created": datetime(1980, 1, 1)})  # not now: files stay equal
        title = f"Receptive field of {type(model).__name__}, layer by layer"
        fill_sheet(book, book.add_worksheet("Receptive field"), title, rows)
    write_file(path, content.getvalue())


def check_chain(rows: list[dict]) -> None:
    """Raises ValueError unless each row is fed by the row before it and rounds its size down."""
    if len(rows) < 2:
        raise ValueError("expected a model with convolutions or pools, found none: there is nothing to write")
    for before, row in itertools.pairwise(rows):
        chained = all(row[f"{key}_in"] == before[f"{key}_out"] for key in ("size", "jump", "rf"))
        reach = row["size_in"] + 2 * row["padding"] - row["dilation"] * (row["kernel"] - 1) - 1
        if not chained or row["size_out"] != reach // row["stride"] + 1:
            found = f"{row['name']}, which is not fed by the layer before it or rounds up"
            raise ValueError(
                f"expected a chain of layers that round down, found {found}: use receptive_field"
            )


def fill_sheet(book, sheet, title: str, rows: list[dict]) -> None:
    """Writes the explanation, the headings, the image and the layers to an XlsxWriter sheet."""

    def style(**changes):
        font = {"font_name": "Calibri", "font_size": 11, "font_color": "#000000"}
        return book.add_format({**font, "align": "center", "valign": "vcenter", **changes})

    first, last = HEADER + 2, HEADER + len(rows)
    sheet.write_string("A1", title, style(bold=True, font_size=16, align="left"))
    for r, text in enumerate(EXPLANATION.splitlines(), 2):
        color = "#C00000" if r == 4 else "#000000"
        sheet.write_string(f"A{r}", text, style(align="left", font_color=color))
    undilated = 1 + sum((row["kernel"] - 1) * row["jump_in"] for row in rows[1:])
    formula = f"=K{first - 1}+SUMPRODUCT(B{first}:B{last}-1,H{first}:H{last})"
    sheet.write_formula("K4", formula, style(font_color="#C00000"), undilated)

    for letter, key in zip(LETTERS, COLUMNS):
        heading, width, align = f"{key.replace('_', ' ')} (px)", len(key) + 8, "center"
        if key == "name":
            heading, width, align = "layer", max(len(row["name"]) for row in rows[1:]) + 4, "left"
        heading_style = style(bold=True, font_color="#FFFFFF", bg_color="#1F3864", align=align)
        sheet.write_string(f"{letter}{HEADER}", heading, heading_style)
        sheet.set_column_pixels(f"{letter}:{letter}", 7 * width)  # a character of Calibri 11 has 7 pixels

    tints = {"image": "F2F2F2"}
    for r, row in enumerate(rows, HEADER + 1):
        tint = tints.setdefault(row["name"].split(".")[0], TINTS[(len(tints) - 1) % len(TINTS)])
        sheet.write_string(f"A{r}", row["name"], style(bg_color=tint, align="left"))
        for letter, key in zip(LETTERS[1:], COLUMNS[1:]):
            if key in FORMULAS and row is not rows[0]:
                formula = FORMULAS[key].format(r=r, p=r - 1)
                computed = style(bg_color=tint, bold=key == "rf_out")
                sheet.write_formula(f"{letter}{r}", formula, computed, row[key])
            else:
                sheet.write(f"{letter}{r}", row.get(key), style(bg_color=tint, font_color="#0000FF"))
    for r in range(last):
        points = 26 if r in (0, HEADER - 1) else 18
        sheet.set_row_pixels(r, points / 0.75)
    sheet.freeze_panes(HEADER, 1)
