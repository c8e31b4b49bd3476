"""Figures from plain arrays and lists: samples, augmentations, history, mistakes, confusions, calibration, predictions.

Every `plot_` function returns a `matplotlib.figure.Figure`, at most about 9 inches wide, 150 dots an inch,
no text under 8 points: legible when a page shows it 830 pixels wide. As the last expression of a notebook
cell, or through `display`, it appears once; anywhere, `figure.savefig(path)` keeps it. `note` ends the
title in brackets, to say which data the figure was drawn from ("sample of 2,500 images").

This file needs numpy and matplotlib and nothing else: copy it into another experiment and it works.
"""

import io
from functools import partial

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette stays distinct under the common kinds of colour blindness. Nothing relies on it
# alone: curves differ in marker and dash too, and every cell of the confusion matrix has its number.
BLUE, VERMILION = "#0072B2", "#D55E00"
REFERENCE_STYLES = [("#009E73", "--"), ("#CC79A7", "-."), ("#000000", ":"), ("#E69F00", (0, (8, 2)))]
HISTORY_KEYS = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate")
SMALL, MEDIUM, LARGE = 8.5, 9.5, 11  # font sizes in points
BARE = {"xticks": [], "yticks": [], "frameon": False}  # axes that hold a picture


def denormalize(images, mean, std):
    """Undo (x / 255 - mean) / std and put the channels last: the picture as it was stored.

    Args:
        images: float array (N, 3, H, W) or (3, H, W), normalised, without NaN.
        mean, std: three numbers each, in [0, 1], std above 0: statistics of pixels in [0, 1], not 0..255.

    Returns:
        uint8 array (N, H, W, 3) or (H, W, 3), rounded to nearest and clipped to 0..255, C-contiguous.

    Raises:
        ValueError: another shape or dtype, a NaN, or a mean or std of another length or range.
    """
    images, mean, std = np.asarray(images), np.asarray(mean, dtype=float), np.asarray(std, dtype=float)
    if images.ndim not in (3, 4) or images.shape[-3] != 3 or images.dtype.kind != "f":
        found = f"{images.dtype} {images.shape}"
        raise ValueError(f"images: expected float (N, 3, H, W) or (3, H, W), found {found}; pass the network's input")
    for name, values, low in (("mean", mean, -1), ("std", std, 0)):
        if values.shape != (3,) or not ((values > low) & (values >= 0) & (values <= 1)).all():
            limits = "3 numbers in [0, 1], std above 0"
            raise ValueError(f"{name}: expected {limits}, found {values.tolist()}; divide 0..255 statistics by 255")
    if np.isnan(images).any():
        raise ValueError("images: expected numbers, found NaN; look for the step that made them")
    pixels = np.moveaxis(images.astype(np.float64), -3, -1) * std + mean
    return np.ascontiguousarray(np.rint(pixels * 255).clip(0, 255).astype(np.uint8))


def plot_samples(images, targets, classes, per_class=10, note=""):
    """One row a class, its name at the left: the first `per_class` images of each, in the order given.

    Args:
        images: uint8 array (N, H, W, 3), RGB.
        targets: N integers, 0 to len(classes) - 1.
        classes: class names.
        per_class: images a row, at least 1. A class that has fewer gets a shorter row.

    Raises:
        ValueError: a wrong shape, dtype, length, class index or per_class.
    """
    images = _pictures("images", images)
    targets = _indices("targets", targets, len(images), len(classes))
    if per_class < 1:
        raise ValueError(f"per_class: expected at least 1, found {per_class}; pass the number of images a row")
    rows = [images[np.flatnonzero(targets == index)[:per_class]] for index in range(len(classes))]
    return _draw_rows(rows, classes, per_class, f"The first {per_class} of each class", note)


def plot_augmentations(image, augmented, note=""):
    """One row an augmentation, its title at the left: the original, then what the augmentation made of it.

    Args:
        image: uint8 array (H, W, 3), RGB, the original.
        augmented: dict, title to uint8 array (K, H, W, 3): K draws each. Rows come in the dict's order:
            each augmentation by itself first, the whole pipeline last.

    Raises:
        ValueError: a wrong shape or dtype, or an empty dict.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image: expected uint8 (H, W, 3), found {image.dtype} {image.shape}; pass one stored picture")
    if not augmented:
        raise ValueError("augmented: expected at least one row, found none; pass a dict, title to (K, H, W, 3)")
    rows = [_pictures(f"augmented[{title!r}]", draws, image.shape) for title, draws in augmented.items()]
    columns = 1 + max(len(row) for row in rows)
    rows = [np.concatenate([image[None], row]) for row in rows]
    return _draw_rows(rows, augmented, columns, "Augmentations of one image", note, ("original", "drawn at random"))


def plot_history(history, references=None, note=""):
    """Accuracy (large), loss and learning rate by epoch; the last accuracies stand in the legend.

    The accuracies of a long run are shown from about its twentieth part on.

    Args:
        history: one dict an epoch, at least one, with `epoch` (integer), `train_loss` and `test_loss` (nats
            per image), `train_accuracy` and `test_accuracy` (percent) and `learning_rate`.
        references: dict, label to accuracy in percent: a horizontal line each, labelled in the legend.

    Raises:
        ValueError: no epoch, or an epoch without one of these keys.
    """
    if not history:
        raise ValueError("history: expected at least one epoch, found none; train first, or load a recorded history")
    missing = [key for key in HISTORY_KEYS if any(key not in row for row in history)]
    if missing:
        raise ValueError(f"history: expected these keys in each row: {HISTORY_KEYS}, found no {missing}; add them")
    column = {key: [row[key] for row in history] for key in HISTORY_KEYS}
    epochs, count = column["epoch"], len(history)
    figure = _figure(9, 4.6, f"Training history: {count} epoch{'s' * (count > 1)}", note)
    panels = figure.subplot_mosaic([["accuracy", "loss"], ["accuracy", "learning_rate"]], width_ratios=[3, 2])
    # A marker on each epoch of a long run would hide the line: about ten, the last epoch among them.
    every = max(1, count // 10)
    marks = {"markevery": ((count - 1) % every, every), "ms": 4, "lw": 1.5}
    for split, color, shape in (("train", BLUE, "o-"), ("test", VERMILION, "s--")):
        last = f"{split}: {column[split + '_accuracy'][-1]:.2f} % at epoch {epochs[-1]}"
        panels["accuracy"].plot(epochs, column[split + "_accuracy"], shape, color=color, label=last, **marks)
        panels["loss"].plot(epochs, column[split + "_loss"], shape, color=color, label=split, **marks)
    panels["learning_rate"].plot(epochs, column["learning_rate"], "o-", color=BLUE, **marks)
    # Highest first: the legend lists the lines in the order in which they lie.
    for index, (label, accuracy) in enumerate(sorted((references or {}).items(), key=lambda item: -item[1])):
        color, style = REFERENCE_STYLES[index % len(REFERENCE_STYLES)]
        panels["accuracy"].axhline(accuracy, color=color, ls=style, lw=1.5, label=f"{label}: {accuracy:.2f} %")
    if count >= 20:  # the first epochs climb far below what the end is compared with
        shown = [*column["train_accuracy"][count // 20 :], *column["test_accuracy"][count // 20 :], *(references or {}).values()]
        panels["accuracy"].set_ylim(bottom=min(shown) - 1)
    units = {"accuracy": "accuracy (%)", "loss": "loss (nats per image)", "learning_rate": "learning rate"}
    for name, axes in panels.items():
        _label(axes, "epoch", units[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        if count == 1:
            axes.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
        if name != "learning_rate":
            axes.legend(fontsize=SMALL)
    return figure


def plot_misclassified(images, targets, predictions, confidences, classes, note=""):
    """A grid of images in the order given; under each its true class, its predicted class, the confidence.

    Args:
        images: uint8 array (K, H, W, 3), RGB, K up to about 30. K = 0 gives a figure that says so.
        targets, predictions: K integers each, 0 to len(classes) - 1.
        confidences: K floats, 0 to 1: the probability given to the predicted class.
        classes: class names.

    Raises:
        ValueError: a wrong shape, dtype, length or class index, or a confidence outside [0, 1].
    """
    count = len(images)
    images = _pictures("images", images) if count else ()
    targets = _indices("targets", targets, count, len(classes))
    predictions = _indices("predictions", predictions, count, len(classes))
    confidences = np.asarray(confidences, dtype=float)
    if confidences.shape != (count,) or not ((confidences >= 0) & (confidences <= 1)).all():
        found = f"shape {confidences.shape}" + (f", up to {confidences.max():g}" if confidences.size else "")
        raise ValueError(f"confidences: expected {count} numbers in [0, 1], found {found}; pass probabilities")
    if not count:
        figure = _figure(5, 1, "Misclassified images", note)
        figure.text(0.5, 0.35, "None: every image was classified correctly.", ha="center", fontsize=MEDIUM)
        return figure
    rows = -(-count // 7)
    columns = -(-count // rows)  # rows of equal length where possible: 30 is 5 rows of 6, not 4 of 7 and one of 2
    figure = _figure(max(5, 1.28 * columns), 0.35 + 1.83 * rows, "Misclassified images", note)
    cells = figure.subplots(rows, columns, squeeze=False, subplot_kw=BARE).ravel()
    for axes, image, target, prediction, confidence in zip(cells, images, targets, predictions, confidences):
        axes.imshow(image, interpolation="nearest")
        caption = f"true: {classes[target]}\npred.: {classes[prediction]}\nconf.: {100 * confidence:.1f} %"
        axes.set_xlabel(caption, fontsize=SMALL)
    return figure


def plot_predictions(images, truths, answers, heat=None, note=""):
    """Images side by side; above each what it is, under it its most probable classes as bars.

    Args:
        images: uint8 array (K, H, W, 3), RGB, K from 1 to about 6.
        truths: K captions: the true classes, or the pictures' names.
        answers: for each image a list of (class name, probability in [0, 1]), as `predict` gives them.
        heat: float array (K, h, w) in [0, 1], as `grad_cam` gives it: each image once more, with that laid over it.

    Raises:
        ValueError: a wrong shape, dtype or length.
    """
    images = _pictures("images", images)
    if not len(images) == len(truths) == len(answers) > 0:
        found = f"{len(images)}, {len(truths)} and {len(answers)}"
        raise ValueError(f"expected as many images as truths and answers, at least one, found {found}; pass all of them")
    if heat is not None and (np.ndim(heat) != 3 or len(heat) != len(images)):
        raise ValueError(f"heat: expected ({len(images)}, h, w), found {np.shape(heat)}; pass one map for each image")
    longest, looks = max(map(len, answers)), 1 if heat is None else 2
    title = "Predictions and their probabilities" if heat is None else "Predictions; bright: where the network looked"
    figure = _figure(max(5, 1.5 * len(images)), 0.8 + 1.3 * looks + 0.2 * longest, title, note)
    *pictures, charts = figure.subplots(
        1 + looks, len(images), squeeze=False, subplot_kw=BARE, height_ratios=[1.3] * looks + [0.2 * longest]
    )
    for k, (chart, image, truth, answer) in enumerate(zip(charts, images, truths, answers)):
        for look in range(looks):
            pictures[look][k].imshow(image, interpolation="nearest")
        pictures[0][k].set_title(truth, fontsize=SMALL, weight="bold")
        if heat is not None:
            frame = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
            pictures[1][k].imshow(heat[k], cmap="inferno", alpha=0.5, vmin=0, vmax=1, extent=frame, interpolation="bilinear")
        chart.barh(range(len(answer)), [probability for _, probability in answer], color="#9ECAE1", height=0.85)
        for row, (name, probability) in enumerate(answer):
            chart.text(0.03, row, f"{name} {100 * probability:.1f} %", va="center", fontsize=SMALL)
        chart.set(xlim=(0, 1), ylim=(longest - 0.5, -0.5))
    return figure


def plot_reliability(bins, error, note=""):
    """How often the model is right, by how sure it is, beside how often it is that sure.

    Args:
        bins: dicts of confidence and accuracy (means, in [0, 1]) and count, one a bin of the confidence, at least one.
        error: the expected calibration error, in [0, 1].

    Raises:
        ValueError: no bins.
    """
    if not bins:
        raise ValueError("bins: expected at least one, found none; pass what calibration() gives")
    confidence, accuracy, count = (np.array([row[key] for row in bins]) for key in ("confidence", "accuracy", "count"))
    figure = _figure(9, 3.6, f"Calibration: expected error {100 * error:.1f} points", note)
    left, right = figure.subplots(1, 2)
    left.plot([0, 100], [0, 100], color="#777777", ls="--", lw=1.5, label="as sure as right")
    left.plot(100 * confidence, 100 * accuracy, color=BLUE, lw=1.5, label="the model")
    left.scatter(100 * confidence, 100 * accuracy, 5 + 200 * count / count.sum(), BLUE, zorder=3, clip_on=False)
    left.set(xlim=(0, 100), ylim=(0, 100))
    left.legend(fontsize=SMALL, loc="upper left")
    right.bar(100 * confidence, 100 * count / count.sum(), width=5, color=BLUE)
    right.set_xlim(0, 103)
    _label(left, "confidence (%)", "correct (%)")
    _label(right, "confidence (%)", "share of the images (%)")
    return figure


def plot_robustness(clean, damaged, note=""):
    """The accuracy by kind and strength of damage to the images, a panel a kind, the strengths from mild to strong.

    Args:
        clean: the accuracy on the images as they are, in percent.
        damaged: dict, kind of damage to a dict of strength (text) to accuracy in percent; at least one of each.

    Raises:
        ValueError: no damage, or a kind without strengths.
    """
    if not damaged or not all(damaged.values()):
        raise ValueError("damaged: expected strengths for each kind of damage, found none; pass {kind: {strength: accuracy}}")
    figure = _figure(9, 3.2, f"Accuracy on damaged test images; dashed: {clean:.2f} % without damage", note)
    panels = figure.subplots(1, len(damaged), squeeze=False, sharey=True)[0]
    for axes, (kind, accuracies) in zip(panels, damaged.items()):
        axes.axhline(clean, color="#777777", ls="--", lw=1.5)
        axes.plot(range(len(accuracies)), list(accuracies.values()), "o-", color=VERMILION, ms=5, lw=1.5)
        over = {"textcoords": "offset points", "fontsize": SMALL, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}}
        for place, accuracy in enumerate(accuracies.values()):  # above and to the right: the curve falls
            axes.annotate(f"{accuracy:.1f}", (place, accuracy), (3, 5), **over)
        axes.set_xticks(range(len(accuracies)), list(accuracies), fontsize=SMALL)
        axes.set_title(kind, fontsize=MEDIUM)
        axes.set(xlim=(-0.3, len(accuracies) - 0.3), ylim=(0, 105))
        _label(axes, "", "accuracy (%)" if axes is panels[0] else "")
    return figure


def plot_confusion_matrix(targets, predictions, classes, note=""):
    """Counts of images: true classes down, predicted classes across, each class's accuracy at the right.

    Colour shows the mistakes only. The diagonal, ten to a hundred times larger, is grey and bold instead:
    on one scale with the rest it would leave every mistake the same shade.

    Args:
        targets, predictions: N integers each, N at least 1, 0 to len(classes) - 1.
        classes: class names, up to about 25.

    Raises:
        ValueError: a wrong shape, dtype, length or class index, or no predictions at all.
    """
    size, total = len(classes), len(targets)
    if not total:
        raise ValueError("targets: expected at least one, found none; pass the test set's targets and predictions")
    targets = _indices("targets", targets, total, size)
    predictions = _indices("predictions", predictions, total, size)
    counts = np.bincount(targets * size + predictions, minlength=size * size).reshape(size, size)
    mistakes = np.ma.masked_array(counts, np.eye(size, dtype=bool))
    title = f"Confusion matrix: {100 * counts.trace() / total:.2f} % of {total:,} images correct"
    figure = _figure(9, 7, title, note)
    axes = figure.subplots(subplot_kw={"frameon": False})
    # White to vermilion and no darker: black numbers stay legible on every shade.
    shades = LinearSegmentedColormap.from_list("mistakes", ["white", VERMILION]).with_extremes(bad="#DDDDDD")
    top = max(1, mistakes.filled(0).max())
    drawn = axes.imshow(mistakes, cmap=shades, vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    for (row, column), count in np.ndenumerate(counts):
        weight = "bold" if row == column else "normal"
        axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=MEDIUM, weight=weight)
    axes.text(size - 0.4, -0.5 - size / 100, "correct", fontsize=MEDIUM)
    for row, (right, images) in enumerate(zip(counts.diagonal(), counts.sum(axis=1))):
        share = f"{100 * right / images:.1f} %" if images else "no images"
        axes.text(size - 0.4, row, share, va="center", fontsize=MEDIUM)
    axes.set_xticks(range(size), classes, rotation=30, ha="right", rotation_mode="anchor", fontsize=MEDIUM)
    axes.set_yticks(range(size), classes, fontsize=MEDIUM)
    axes.set_xlabel("predicted class", fontsize=MEDIUM)
    axes.set_ylabel("true class", fontsize=MEDIUM)
    axes.tick_params(length=0)
    bar = figure.colorbar(drawn, aspect=45, pad=0.03, ticks=MaxNLocator(integer=True))
    bar.set_label("misclassified images", fontsize=MEDIUM)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def _figure(width, height, title, note):
    """An empty figure of that size in inches, with its title, that a notebook can display."""
    # Not made by pyplot, which would keep it alive, open a window for it in a script, and show it twice in a
    # notebook. Until pyplot's inline backend is active, IPython can show a figure only by this method.
    figure = Figure((width, height), dpi=150, layout="compressed")
    figure._repr_png_ = partial(_png, figure)
    figure.get_layout_engine().set(h_pad=0.07)
    figure.suptitle(f"{title} ({note})" if note else title, fontsize=LARGE, wrap=True)
    return figure


def _png(figure):
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _label(axes, across, up):
    """Name the two directions of axes that hold curves or bars, and give them a grid."""
    axes.set_xlabel(across, fontsize=MEDIUM)
    axes.set_ylabel(up, fontsize=MEDIUM)
    axes.tick_params(labelsize=SMALL)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_rows(rows, labels, columns, title, note, heads=()):
    """A figure of rows of images, a label at the left of each; `heads` title the first column and the rest."""
    # One axes for all of them: an axes an image takes seconds to lay out.
    height, width = (size + 2 for size in rows[0].shape[1:3])
    lead = width // 3 if heads else 0  # sets the first column apart
    sheet = np.full((len(rows) * height - 2, columns * width + lead - 2, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            left = j * width + lead * (j > 0)
            sheet[i * height : (i + 1) * height - 2, left : left + width - 2] = image
    cell = min(0.8, 7.6 / columns)  # inches
    across = 0.25 + 0.07 * max(map(len, labels)) + cell * sheet.shape[1] / width
    down = (0.65 if heads else 0.45) + cell * sheet.shape[0] / width
    figure = _figure(max(5, across), down, title, note)
    axes = figure.subplots(subplot_kw={"xticks": [], "frameon": False})
    axes.imshow(sheet, interpolation="nearest")
    axes.set_yticks(np.arange(len(rows)) * height + height / 2 - 1.5, labels, fontsize=MEDIUM)
    axes.tick_params(length=0)
    for head, center in zip(heads, (width / 2 - 1.5, (width + lead + sheet.shape[1]) / 2)):
        axes.text(center, -3, head, ha="center", fontsize=MEDIUM)
    return figure


def _pictures(name, images, shape=None):
    """The images as an array, or ValueError unless they are uint8 (N, H, W, 3), each of `shape` if given."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (shape or (*images.shape[1:3], 3)):
        expected = f"uint8 (N, {', '.join(map(str, shape or 'HW3'))})"
        found = f"{images.dtype} {images.shape}"
        raise ValueError(f"{name}: expected {expected}, found {found}; denormalize() makes pictures of network inputs")
    return images


def _indices(name, values, length, classes):
    """The values as int64, or ValueError unless they are `length` integers from 0 to classes - 1."""
    values = np.asarray(values)
    if values.shape != (length,) or (length and values.dtype.kind not in "iu"):
        found = f"{values.dtype} {values.shape}"
        raise ValueError(f"{name}: expected {length} integers, found {found}; pass one class index for each image")
    if length and not 0 <= values.min() <= values.max() < classes:
        found = f"{values.min()} to {values.max()}"
        raise ValueError(f"{name}: expected 0 to {classes - 1}, found {found}; pass the name of every class")
    return values.astype(np.int64)
