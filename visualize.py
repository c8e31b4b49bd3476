"""Figures from plain arrays and lists: samples, history, mistakes, predictions, calibration and more.

Every `plot_` function returns a `matplotlib.figure.Figure`. It is at most about 9 inches wide and
has 150 dots an inch and no text under 8 points, so it is legible on a page that shows it 830
pixels wide. A notebook shows the figure if it is the last expression of a cell;
`figure.savefig(path)` writes it. `note` ends the title in brackets and tells the source of the
data, such as "sample of 2,500 images". An argument that has not the shape, dtype, length or range
of the docstring raises ValueError. A text that has no room is shortened in its middle.

This file stands alone: copy it into another experiment and it works. It needs numpy and matplotlib.
"""

import io
from functools import partial

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours stay distinct under the common kinds of colour blindness. Curves also
# differ in marker and dash, and the worst mistakes of a confusion matrix have numbers.
BLUE, VERMILION = "#0072B2", "#D55E00"
REFERENCE_STYLES = [("#009E73", "--"), ("#CC79A7", "-."), ("#000000", ":"), ("#E69F00", (0, (8, 2)))]
SMALL, MEDIUM, LARGE = 8.5, 9.5, 11  # font sizes in points
BARE = {"xticks": [], "yticks": [], "frameon": False}  # axes of a picture


def denormalize(images, mean, std):
    """Turns the network's input (x / 255 - mean) / std back into pictures x.

    Args:
        images: float array (N, 3, H, W) or (3, H, W), normalised, without NaN.
        mean, std: three numbers each, of pixels in [0, 1]; std above 0.

    Returns:
        uint8 array (N, H, W, 3) or (H, W, 3), rounded to nearest and clipped to 0..255,
        C-contiguous.

    Raises:
        ValueError: images have another shape or dtype, or a NaN; a mean or std is out of range.
    """
    images, mean, std = np.asarray(images), np.asarray(mean, dtype=float), np.asarray(std, dtype=float)
    if images.ndim not in (3, 4) or images.shape[-3] != 3 or images.dtype.kind != "f":
        expected, found = "float (N, 3, H, W) or (3, H, W)", f"{images.dtype} {images.shape}"
        raise ValueError(f"images: expected {expected}, found {found}: pass the network's input")
    _within("mean", mean, 1, "divide by 255")
    if not 0 < std.min() <= std.max() <= 1:
        raise ValueError(f"std: expected numbers in [0, 1], above 0, found {std.tolist()}: divide by 255")
    if np.isnan(images).any():
        raise ValueError("images: expected numbers, found NaN: look for the step that made them")
    pixels = np.moveaxis(images.astype(np.float64), -3, -1) * std + mean
    return np.ascontiguousarray(np.rint(pixels * 255).clip(0, 255).astype(np.uint8))


def plot_samples(images, targets, classes, per_class=10, note=""):
    """One row a class with its name at the left: the first `per_class` images of the class.

    Args:
        images: uint8 array (N, H, W, 3), RGB.
        targets: N integers, 0 to len(classes) - 1.
        classes: class names. Of more than 40, 40 are drawn, from the first to the last.
        per_class: images a row, at least 1. A class with fewer images gets a shorter row.
    """
    images = _pictures("images", images)
    targets = _indices("targets", targets, len(images), len(classes))
    chosen = np.linspace(0, len(classes) - 1, min(40, len(classes))).round().astype(int)
    rows = [images[np.flatnonzero(targets == index)[:per_class]] for index in chosen]
    title = f"The first {per_class} of each class"
    if len(rows) < len(classes):
        title += f": {len(rows)} of {len(classes)} classes"
    return _draw_rows(rows, [classes[index] for index in chosen], per_class, title, note)


def plot_augmentations(image, augmented, note=""):
    """One row an augmentation with its name at the left: the original, then augmented images.

    Args:
        image: uint8 array (H, W, 3), RGB, the original.
        augmented: dict of name to uint8 array (K, H, W, 3), in the order of the rows, at least one.
    """
    rows = []
    for name, images in augmented.items():
        row = np.concatenate([np.asarray(image)[None], images])
        rows.append(_pictures(f"augmented[{name!r}]", row))
    columns, titles = max(len(row) for row in rows), ("original", "drawn at random")
    return _draw_rows(rows, augmented, columns, "Augmentations of one image", note, titles)


def plot_history(history, references=None, note=""):
    """Accuracy (large), loss and learning rate by epoch; the legend has the last accuracies.

    In a run of 20 epochs or more, the accuracies of the first twentieth are cut off.

    Args:
        history: one dict an epoch, at least one, with `epoch` (integer), `train_loss` and
            `test_loss` (nats per image), `train_accuracy` and `test_accuracy` (percent) and
            `learning_rate`.
        references: dict of label to accuracy in percent. Each becomes a horizontal line.
    """
    references = references or {}
    count = len(history)
    epochs = [row["epoch"] for row in history]
    figure = _figure(9, 4.6, f"Training history: {count} epoch{'s' * (count > 1)}", note)
    panels = figure.subplot_mosaic([["accuracy", "loss"], ["accuracy", "learning_rate"]], width_ratios=[3, 2])

    every = max(1, count // 10)  # more markers would hide the line; the last epoch has one
    style = {"markevery": ((count - 1) % every, every), "ms": 4, "lw": 1.5}
    accuracies = []
    for split, color, shape in (("train", BLUE, "o-"), ("test", VERMILION, "s--")):
        accuracy = [row[f"{split}_accuracy"] for row in history]
        accuracies += accuracy[count // 20 :]
        label = f"{split}: {accuracy[-1]:.2f} % at epoch {epochs[-1]}"
        panels["accuracy"].plot(epochs, accuracy, shape, color=color, label=label, **style)
        loss = [row[f"{split}_loss"] for row in history]
        panels["loss"].plot(epochs, loss, shape, color=color, label=split, **style)
    panels["learning_rate"].plot(epochs, [row["learning_rate"] for row in history], "o-", color=BLUE, **style)

    by_height = sorted(references.items(), key=lambda item: -item[1])  # as in the legend
    for index, (label, accuracy) in enumerate(by_height):
        color, dashes = REFERENCE_STYLES[index % len(REFERENCE_STYLES)]
        label = f"{_plain(label)}: {accuracy:.2f} %"
        panels["accuracy"].axhline(accuracy, color=color, ls=dashes, lw=1.5, label=label)
    if count >= 20:  # the first accuracies are so low that they would press the others together
        panels["accuracy"].set_ylim(bottom=min([*accuracies, *references.values()]) - 1)

    units = {"accuracy": "accuracy (%)", "loss": "loss (nats per image)", "learning_rate": "learning rate"}
    for name, axes in panels.items():
        _label(axes, "epoch", units[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        if count == 1:
            axes.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
        if name != "learning_rate":  # by itself, the legend leaves out labels that begin with "_"
            axes.legend(axes.lines, [line.get_label() for line in axes.lines], fontsize=SMALL)
    return figure


def plot_misclassified(images, targets, predictions, confidences, classes, note=""):
    """A grid of images; under each its true class, its predicted class and the confidence.

    Args:
        images: uint8 array (K, H, W, 3), RGB, K up to about 30. Without images, the figure says so.
        targets, predictions: K integers each, 0 to len(classes) - 1.
        confidences: K probabilities of the predicted classes, in [0, 1].
        classes: class names.
    """
    count = len(images)
    if not any(map(len, (images, targets, predictions, confidences))):
        figure = _figure(5, 1, "Misclassified images", note)
        figure.text(0.5, 0.35, "None: every image was classified correctly.", ha="center", fontsize=MEDIUM)
        return figure
    images = _pictures("images", images)
    targets = _indices("targets", targets, count, len(classes))
    predictions = _indices("predictions", predictions, count, len(classes))
    _within("confidences", confidences, 1, "pass probabilities")
    widest = max(_width(f"pred.: {classes[index]}", SMALL) for index in {*targets, *predictions})
    cell = min(max(1.28, widest + 0.1), 3)  # inches; the images stay as they are
    rows = -(-count // int(9 / cell))
    columns = -(-count // rows)  # the rows are about equally long: 30 images are 5 rows of 6
    figure = _figure(max(5, cell * columns), 0.35 + 1.83 * rows, "Misclassified images", note)
    figure.get_layout_engine().set(w_pad=0.04167 + (cell - 1.28) / 2)
    cells = figure.subplots(rows, columns, squeeze=False, subplot_kw=BARE).ravel()
    answers = zip(cells[:count], images, targets, predictions, confidences, strict=True)
    for axes, image, target, prediction, confidence in answers:
        axes.imshow(image, interpolation="nearest")
        names = f"true: {classes[target]}", f"pred.: {classes[prediction]}"
        lines = [*(_plain(name, cell - 0.1) for name in names), f"conf.: {100 * confidence:.1f} %"]
        axes.set_xlabel("\n".join(lines), fontsize=SMALL)
    return figure


def plot_predictions(images, truths, answers, heat=None, note=""):
    """Images side by side; above each its caption, under it its most probable classes as bars.

    Args:
        images: uint8 array (K, H, W, 3), RGB, K from 1 to about 6.
        truths: K captions, such as the true classes or the names of the pictures.
        answers: for each image a list of (class name, probability in [0, 1]), as `predict` returns them.
        heat: float array (K, h, w) in [0, 1], as `grad_cam` returns it. Each image is drawn a second time,
            under its heat.
    """
    images = _pictures("images", images)
    looks, title, maps = 1, "Predictions and their probabilities", [None] * len(images)
    if heat is not None:
        looks, title = 2, "Predictions; bright: where the network looked"
        maps = np.reshape(heat, np.shape(heat)[:3])  # refuses colours
        _within("heat", maps, 1, "pass what grad_cam() returns")
    shares = [share for answer in answers for _, share in answer]
    _within("answers", shares, 1, "pass what predict() returns")
    bars = max(len(answer) for answer in answers)
    cell = max(5 / len(images), 1.5)  # inches
    figure = _figure(cell * len(images), 0.8 + 1.3 * looks + 0.2 * bars, title, note)
    layout = {"squeeze": False, "subplot_kw": BARE, "height_ratios": [1.3] * looks + [0.2 * bars]}
    grid = figure.subplots(looks + 1, len(images), **layout)
    for column, image, truth, answer, heat_map in zip(grid.T, images, truths, answers, maps, strict=True):
        picture, chart = column[0], column[-1]
        picture.imshow(image, interpolation="nearest")
        picture.set_title(_plain(truth, 0.8 * cell), fontsize=SMALL, weight="bold")
        if heat_map is not None:
            frame = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
            style = {"cmap": "inferno", "alpha": 0.5, "vmin": 0, "vmax": 1, "interpolation": "bilinear"}
            column[1].imshow(image, interpolation="nearest")
            column[1].imshow(heat_map, extent=frame, **style)
        chart.barh(range(len(answer)), [share for _, share in answer], color="#9ECAE1", height=0.85)
        for row, (name, probability) in enumerate(answer):
            text = f"{_plain(name, cell - 0.7)} {100 * probability:.1f} %"
            chart.text(0.03, row, text, va="center", fontsize=SMALL)
        chart.set(xlim=(0, 1), ylim=(bars - 0.5, -0.5))
    return figure


def plot_reliability(bins, error, note=""):
    """Accuracy by confidence at the left, the share of the images by confidence at the right.

    Args:
        bins: as `calibration` returns them: at least one dict of `confidence` and `accuracy`
            (means, in [0, 1]) and `count`.
        error: the expected calibration error, in [0, 1].
    """
    confidence, accuracy = (np.array([row[key] for row in bins]) for key in ("confidence", "accuracy"))
    _within("bins", [*confidence, *accuracy], 1, "pass the bins of calibration()")
    _within("error", error, 1, "pass the error of calibration()")
    confidence, accuracy = 100 * confidence, 100 * accuracy
    count = np.array([row["count"] for row in bins])
    figure = _figure(9, 3.6, f"Calibration: expected error {100 * error:.1f} points", note)
    left, right = figure.subplots(1, 2)
    left.plot([0, 100], [0, 100], color="#777777", ls="--", lw=1.5, label="as sure as right")
    left.plot(confidence, accuracy, color=BLUE, lw=1.5, label="the model")
    left.scatter(confidence, accuracy, 5 + 200 * count / count.sum(), BLUE, zorder=3, clip_on=False)
    left.set(xlim=(0, 100), ylim=(0, 100))
    left.legend(fontsize=SMALL, loc="upper left")
    right.bar(confidence, 100 * count / count.sum(), width=5, color=BLUE)
    right.set_xlim(0, 103)
    _label(left, "confidence (%)", "correct (%)")
    _label(right, "confidence (%)", "share of the images (%)")
    return figure


def plot_robustness(clean, damaged, note=""):
    """Accuracy on damaged images: one panel for each kind of damage, from mild to strong.

    Args:
        clean: the accuracy on undamaged images, in percent.
        damaged: dict of kind to a dict of strength (text) to accuracy in percent, at least one of each.
    """
    for kind, accuracies in damaged.items():
        _within(f"damaged[{kind!r}]", list(accuracies.values()), 100, "pass percent by strength")
    _within("clean", clean, 100, "pass percent")
    figure = _figure(9, 3.2, f"Accuracy on damaged test images; dashed: {clean:.2f} % without damage", note)
    panels = figure.subplots(1, len(damaged), squeeze=False, sharey=True)[0]
    background = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    style = {"textcoords": "offset points", "fontsize": SMALL, "bbox": background}
    for axes, (kind, accuracies) in zip(panels, damaged.items()):
        places, heights = range(len(accuracies)), list(accuracies.values())
        axes.axhline(clean, color="#777777", ls="--", lw=1.5)
        axes.plot(places, heights, "o-", color=VERMILION, ms=5, lw=1.5)
        for place, height in zip(places, heights):
            axes.annotate(f"{height:.1f}", (place, height), (3, 5), **style)  # right, because curves fall
        names = [_plain(strength, 7.5 / len(damaged) / len(places)) for strength in accuracies]
        axes.set_xticks(places, names, fontsize=SMALL)
        axes.set_title(_plain(kind, 8 / len(damaged), MEDIUM), fontsize=MEDIUM)
        axes.set(xlim=(-0.3, len(accuracies) - 0.3), ylim=(0, 105))
        _label(axes, "", "accuracy (%)" if axes is panels[0] else "")
    return figure


def plot_confusion_matrix(targets, predictions, classes, note=""):
    """Counts of images: true classes down, predicted classes across, each class's accuracy at the right.

    The colours show the mistakes. The diagonal is grey, because its counts are so much larger.
    Where numbers have no room, as for more than 25 classes, the worst pairs are named instead.

    Args:
        targets, predictions: N integers each, N at least 1, 0 to len(classes) - 1.
        classes: class names.
    """
    size, total = len(classes), len(targets)
    targets = _indices("targets", targets, total, size)
    predictions = _indices("predictions", predictions, total, size)
    counts = np.bincount(targets * size + predictions, minlength=size * size).reshape(size, size)
    mistakes = np.ma.masked_array(counts, np.eye(size, dtype=bool))
    title = f"Confusion matrix: {100 * counts.trace() / total:.2f} % of {total:,} images correct"
    figure = _figure(9, 7, title, note)
    axes = figure.subplots(subplot_kw={"frameon": False})

    # From white to vermilion, and no darker: black numbers are legible on every shade.
    shades = LinearSegmentedColormap.from_list("mistakes", ["white", VERMILION]).with_extremes(bad="#DDDDDD")
    top = max(1, mistakes.filled(0).max())
    picture = axes.imshow(mistakes, cmap=shades, vmin=0, vmax=top, aspect="auto")
    names = [_plain(name, 1.3, MEDIUM) for name in classes]
    if size <= 25 and size * (len(f"{counts.max():,}") + 1) <= 84:  # characters in a row of cells
        for (row, column), count in np.ndenumerate(counts):
            weight = "bold" if row == column else "normal"
            axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=MEDIUM, weight=weight)
        axes.text(size - 0.4, -0.5 - size / 100, "correct", fontsize=MEDIUM)
        for row, (right, images) in enumerate(zip(counts.diagonal(), counts.sum(axis=1))):
            share = f"{100 * right / images:.1f} %" if images else "no images"
            axes.text(size - 0.4, row, share, va="center", fontsize=MEDIUM)
        slanted = {"rotation": 30 if size <= 16 else 60, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(size), names, fontsize=MEDIUM, **slanted)
        axes.set_yticks(range(size), names, fontsize=MEDIUM)
    else:
        lines = ["Most mistakes:"]
        order = (-mistakes.filled(0)).argsort(axis=None, kind="stable")
        for place in order[: min(25, np.sum(mistakes > 0))]:
            true, predicted = divmod(place, size)
            lines.append(f"{counts[true, predicted]:,}  {names[true]} as {names[predicted]}")
        axes.text(1.03, 1, "\n".join(lines), va="top", fontsize=SMALL, transform=axes.transAxes)
    axes.set_xlabel("predicted class", fontsize=MEDIUM)
    axes.set_ylabel("true class", fontsize=MEDIUM)
    axes.tick_params(length=0)
    bar = figure.colorbar(picture, aspect=45, pad=0.03, ticks=MaxNLocator(integer=True))
    bar.set_label("misclassified images", fontsize=MEDIUM)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def _figure(width, height, title, note):
    """An empty figure of this size in inches, with its title, that a notebook can show."""
    # pyplot would keep the figure alive, open a window in a script, and show it twice in a
    # notebook. Without pyplot, IPython shows a figure through _repr_png_ only.
    figure = Figure((width, height), dpi=150, layout="compressed")
    figure._repr_png_ = partial(_png, figure)
    figure.get_layout_engine().set(h_pad=0.07)
    title = f"{title} ({note})" if note else title
    figure.suptitle(_plain(title), fontsize=LARGE, wrap=True)
    return figure


def _png(figure):
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _width(text, size):
    """The width in inches of a text's longest line in this font size."""
    font = FontProperties(size=size)
    lines = str(text).split("\n")
    return max(text_to_path.get_text_width_height_descent(line, font, False)[0] for line in lines) / 72


def _plain(text, inches=99, size=SMALL):
    r"""The text with `\$` for `$`, because matplotlib would set the text between two dollars as a formula.

    If it is wider than `inches` in this font size, its middle is left out.
    """
    short = text = str(text)
    while len(short) > 3 and _width(short, size) > inches:
        half = len(short) * 9 // 20  # of nine tenths, so that a long text takes few steps
        short = f"{text[:half]}…{text[len(text) - half + 1 :]}"
    return short.replace("$", r"\$")


def _label(axes, across, up):
    """Names both directions of axes with curves or bars, and draws a grid."""
    axes.set_xlabel(across, fontsize=MEDIUM)
    axes.set_ylabel(up, fontsize=MEDIUM)
    axes.tick_params(labelsize=SMALL)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_rows(rows, labels, columns, title, note, column_titles=()):
    """Rows of images, labels at the left; the first of two column titles sets its column apart."""
    # One picture of all images: an axes for each image would take seconds to lay out.
    height, width = (size + 2 for size in rows[0].shape[1:3])
    gap = width // 3 if column_titles else 0  # after the first column
    sheet = np.full((len(rows) * height - 2, columns * width + gap - 2, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            left = j * width + gap * (j > 0)
            sheet[i * height : (i + 1) * height - 2, left : left + width - 2] = image
    labels = [_plain(label, 2.5, MEDIUM) for label in labels]
    longest = 0.07 * max(map(len, labels))  # inches, about
    cell = min(0.8, 7.6 / columns, (8.75 - longest) / columns, 13 / len(rows))
    across = 0.25 + longest + cell * sheet.shape[1] / width
    down = (0.65 if column_titles else 0.45) + cell * sheet.shape[0] / width
    figure = _figure(max(5, across), down, title, note)
    axes = figure.subplots(subplot_kw={"xticks": [], "frameon": False})
    axes.imshow(sheet, interpolation="nearest")
    middles = np.arange(len(rows)) * height + height / 2 - 1.5
    axes.set_yticks(middles, labels, fontsize=MEDIUM)
    axes.tick_params(length=0)
    centers = width / 2 - 1.5, (width + gap + sheet.shape[1]) / 2
    for column_title, center in zip(column_titles, centers):
        axes.text(center, -3, column_title, ha="center", fontsize=MEDIUM)
    return figure


def _pictures(name, images):
    """The images as an array, or ValueError unless they are uint8 (N, H, W, 3)."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        found = f"{images.dtype} {images.shape}"
        raise ValueError(f"{name}: expected uint8 (N, H, W, 3), found {found}: denormalize() makes pictures")
    return images


def _indices(name, values, length, classes):
    """The values as int64, or ValueError unless they are `length` integers from 0 to classes - 1."""
    values = np.asarray(values)
    if values.shape != (length,) or values.dtype.kind not in "iu":
        found = f"{values.dtype} {values.shape}"
        raise ValueError(f"{name}: expected {length} integers, found {found}: pass one class for each image")
    if not 0 <= values.min() <= values.max() < classes:
        found = f"{values.min()} to {values.max()}"
        raise ValueError(f"{name}: expected 0 to {classes - 1}, found {found}: pass the name of every class")
    return values.astype(np.int64)


def _within(name, values, top, advice):
    """Raises ValueError unless there are values, all of them numbers from 0 to top."""
    values = np.asarray(values, dtype=float)
    if not (values.size and 0 <= values.min() <= values.max() <= top):
        found = f"{values.min():g} to {values.max():g}" if values.size else "none"
        raise ValueError(f"{name}: expected numbers in [0, {top}], found {found}: {advice}")
