"""The pixels, numbers and words of each figure against values worked out by hand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

import visualize
from visualize import (
    denormalize,
    plot_augmentations,
    plot_confusion_matrix,
    plot_history,
    plot_misclassified,
    plot_predictions,
    plot_reliability,
    plot_robustness,
    plot_samples,
)

pytestmark = pytest.mark.filterwarnings("error")  # clipped colours, layouts that do not fit

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
RED, BLUE = (255, 0, 0), (0, 0, 255)
CLASSES = ("airplane", "automobile", "bird")


def plain(color, count=1):
    return np.full((count, 32, 32, 3), color, dtype=np.uint8)


def pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def where(picture, color):
    """The rows and the columns, in order, with a pixel of exactly this colour."""
    same = (picture == color).all(axis=2)
    return np.flatnonzero(same.any(axis=1)), np.flatnonzero(same.any(axis=0))


def words(figure):
    pixels(figure)  # drawing gives the tick labels their text
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def epoch(number, **changes):
    row = {"epoch": number, "train_loss": 1.5, "train_accuracy": 40.0, "test_loss": 1.4}
    return {**row, "test_accuracy": 50.0 + number, "learning_rate": 0.1, "seconds": 30.0, **changes}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_denormalize_returns_every_pixel_value(dtype):
    stored = np.stack([np.arange(256), np.arange(256)[::-1], np.roll(np.arange(256), 99)], axis=-1)
    stored = stored.reshape(1, 16, 16, 3).astype(np.uint8)
    network_input = ((stored / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(dtype)
    restored = denormalize(network_input, MEAN, STD)
    assert restored.dtype == np.uint8 and restored.flags.c_contiguous
    assert np.array_equal(restored, stored)
    assert np.array_equal(denormalize(network_input[0], MEAN, STD), stored[0])


def test_denormalize_clips_and_rounds():
    values = np.array([-9, -0.1, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.1, np.inf])
    image = values.reshape(1, 1, -1).repeat(3, axis=0)
    assert denormalize(image, (0, 0, 0), (1, 1, 1))[0, :, 1].tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_misclassified_draws_the_pixels_of_the_image_unsmoothed():
    image = plain(RED)
    image[:, :, 16:] = BLUE
    picture = pixels(plot_misclassified(image, [0], [1], [0.5], CLASSES))
    (rows, red), (_, blue) = where(picture, RED), where(picture, BLUE)
    assert len(red) > 64 and abs(len(red) - len(blue)) <= 1  # two screen pixels for each of the image
    assert blue[0] == red[-1] + 1  # no purple between the halves
    assert (np.diff(np.concatenate([red, blue])) == 1).all() and abs(len(rows) - 2 * len(red)) <= 2  # square


def test_samples_are_in_the_row_of_their_class():
    images = np.concatenate([plain(BLUE), plain(RED, 2), plain((0, 255, 0))])
    figure = plot_samples(images, [2, 0, 0, 0], CLASSES, per_class=2, note="sample of 4")
    picture = pixels(figure)
    (red_rows, red_columns), (blue_rows, blue_columns) = where(picture, RED), where(picture, BLUE)
    labels = {label.get_text(): label.get_window_extent() for label in figure.axes[0].get_yticklabels()}
    height = picture.shape[0]
    for name, rows in (("airplane", red_rows), ("bird", blue_rows)):
        middle = height - (labels[name].y0 + labels[name].y1) / 2  # text is measured from the bottom
        assert rows[0] < middle < rows[-1]
        assert 0 <= labels[name].x0 and labels[name].x1 < red_columns[0]
    assert red_columns[0] == blue_columns[0]
    assert len(red_columns) == pytest.approx(2 * len(blue_columns), abs=2)  # two red images, one blue
    assert not (picture == (0, 255, 0)).all(axis=2).any()  # it is the third of its class


def test_augmentations_show_the_original_at_the_left_of_each_row():
    augmented = {"flip": plain(BLUE, 3), "pipeline": plain(BLUE, 2)}
    figure = plot_augmentations(plain(RED)[0], augmented, note="sample")
    picture = pixels(figure)
    (red_rows, red_columns), (blue_rows, blue_columns) = where(picture, RED), where(picture, BLUE)
    assert np.array_equal(red_rows, blue_rows) and (np.diff(red_rows) > 1).sum() == 1  # two rows, aligned
    assert red_columns[-1] < blue_columns[0]
    assert {"flip", "pipeline", "original"} < set(words(figure))


def test_confusion_matrix_counts():
    targets, predictions = [0, 0, 0, 0, 1, 1, 1], np.array([0, 0, 0, 1, 1, 0, 0])
    figure = plot_confusion_matrix(targets, predictions, CLASSES, note="sample of 7")
    cells = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    table = [[int(cells[column, row]) for column in range(3)] for row in range(3)]
    assert table == [[3, 1, 0], [2, 1, 0], [0, 0, 0]]  # true classes down, predicted across
    assert [cells[2.6, row] for row in range(3)] == ["75.0 %", "33.3 %", "no images"]
    assert "57.14 % of 7 images" in figure.get_suptitle()
    # The worst mistake has the full colour, although the diagonal has more images.
    picture = pixels(figure)
    for cell, color in (((0, 1), (213, 94, 0)), ((0, 0), (221, 221, 221)), ((2, 0), (255, 255, 255))):
        x, y = figure.axes[0].transData.transform(np.subtract(cell, 0.3)).astype(int)  # beside the number
        assert picture[-y, x].tolist() == list(color)


def test_confusion_matrix_without_mistakes():
    assert "100.00 % of 2 images" in plot_confusion_matrix([0, 1], [0, 1], CLASSES).get_suptitle()


def test_confusion_matrix_of_a_hundred_classes_names_the_worst_pairs_and_is_quick():
    targets = np.arange(10_000) % 100
    predictions = targets.copy()
    predictions[3:1500:100] = 5  # 15 images
    predictions[6:700:100] = 1
    figure = plot_confusion_matrix(targets, predictions, [f"class {i}" for i in range(100)])
    axes = figure.axes[0]
    assert len(axes.texts) == 1  # a text in each of 10,000 cells would take half a minute
    assert axes.texts[0].get_text().splitlines()[1:] == ["15  class 3 as class 5", "7  class 6 as class 1"]
    assert {"0", "20", "80"} <= set(words(figure))
    counts = axes.images[0].get_array()
    assert counts[3, 5] == 15 and counts[6, 1] == 7 and counts.mask.diagonal().all()


def test_confusion_matrix_of_a_million_images_has_numbers_only_if_they_have_room():
    targets = np.repeat(np.arange(12), 100_000)
    assert len(plot_confusion_matrix(targets, targets, "abcdefghijkl").axes[0].texts) == 1
    assert len(plot_confusion_matrix(targets[::1000], targets[::1000], "abcdefghijkl").axes[0].texts) > 144


def test_samples_of_a_hundred_classes_fit_a_page():
    images, names = plain(RED, 100), [f"class {i}" for i in range(100)]
    figure = plot_samples(images, np.arange(100), names)
    assert "40 of 100 classes" in figure.get_suptitle()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == 40 and labels[0] == "class 0" and labels[-1] == "class 99"
    assert figure.get_size_inches()[1] < 15


LONG = (
    "German shorthaired pointer",
    "BRITTANY SPANIEL IN CAPITALS",
    "robin, American robin, Turdus migratorius",
)


DAMAGE = {"mild": 80.0, "much stronger": 50.0, "strongest of all": 9.5}


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plot_misclassified(plain(RED, 9), [0, 1, 2] * 3, [1, 2, 0] * 3, [0.5] * 9, LONG),
        lambda: plot_predictions(plain(RED, 6), LONG * 2, [[(name, 0.9) for name in LONG]] * 6),
        lambda: plot_robustness(90.0, {f"{name} {i}": DAMAGE for i in (1, 2) for name in LONG}),
        lambda: plot_samples(plain(RED), [0], [name * 3 for name in LONG]),
    ],
)
def test_long_names_do_not_overlap(figure):
    figure = figure()
    pixels(figure)
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent().padded(-1) for text in texts]
    assert all(box.count_overlaps(boxes) == 1 for box in boxes)  # itself
    assert figure.get_size_inches()[0] <= 9.3 and figure.axes[0].get_window_extent().width > 100


def test_names_of_misclassified_images_are_whole_up_to_three_inches():
    figure = plot_misclassified(plain(RED, 9), [0] * 9, [2] * 9, [0.5] * 9, LONG)
    assert f"true: {LONG[0]}\npred.: {LONG[2]}\nconf.: 50.0 %" in words(figure)


def test_long_names_leave_room_for_the_confusion_matrix():
    figure = plot_confusion_matrix([0, 1, 2], [0, 1, 1], [name * 3 for name in LONG])
    pixels(figure)
    assert figure.axes[0].get_window_extent().width > 800
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[0].startswith("German") and names[0].endswith("pointer") and "…" in names[0]


@pytest.mark.parametrize("epochs", [1, 2, 25])
def test_history_draws_every_epoch(epochs):
    history = [epoch(number) for number in range(1, epochs + 1)]
    figure = plot_history(history, references={"low": 12.5, "high": 91.25})
    text = words(figure)
    assert f"test: {50 + epochs:.2f} % at epoch {epochs}" in text
    assert text.index("high: 91.25 %") < text.index("low: 12.50 %")
    assert {"epoch", "accuracy (%)", "loss (nats per image)", "learning rate"} < set(text)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines[f"test: {50 + epochs:.2f} % at epoch {epochs}"].get_ydata()[-1] == 50 + epochs
    assert list(lines["high: 91.25 %"].get_ydata()) == [91.25, 91.25]
    legend = plot_history(history, {"_baseline": 90.0}).axes[0].get_legend()
    assert "_baseline: 90.00 %" in [text.get_text() for text in legend.get_texts()]
    box = figure.axes[-1].get_window_extent().padded(-2)  # the learning rate: one blue line, or one marker
    picture = pixels(figure)[::-1][int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)]
    assert (picture == (0, 114, 178)).all(axis=2).sum() > 20
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize("count", [0, 1, 8, 30])
def test_misclassified_captions(count):
    figure = plot_misclassified(
        plain(RED, count), [1] * count, [2] * count, [0.973] * count, CLASSES, note="sample"
    )
    assert words(figure).count("true: automobile\npred.: bird\nconf.: 97.3 %") == count
    assert any("every image was classified correctly" in text for text in words(figure)) == (count == 0)


def test_predictions_show_the_picture_alone_and_under_its_heat():
    answers = [[("bird", 0.9), ("airplane", 0.05)]]
    heat = np.zeros((1, 2, 2))
    plain_picture = where(pixels(plot_predictions(plain(RED), ["a bird"], answers)), RED)
    figure = plot_predictions(plain(RED), ["a bird"], answers, heat)
    assert {"a bird", "bird 90.0 %", "airplane 5.0 %"} <= set(words(figure))
    picture, heated = figure.axes[0].get_images(), figure.axes[1].get_images()
    assert len(picture) == 1 and len(heated) == 2
    assert heated[1].get_extent() == heated[0].get_extent()  # the heat covers the whole picture
    rows, columns = where(pixels(figure), RED)
    assert len(columns) == pytest.approx(len(plain_picture[1]), rel=0.1)
    assert len(rows) == pytest.approx(len(columns), abs=2)


def test_reliability_and_robustness_draw_their_numbers():
    low = {"count": 1, "confidence": 0.35, "accuracy": 0.5}
    bins = [low, {"count": 3, "confidence": 0.95, "accuracy": 0.9}]
    figure = plot_reliability(bins, 0.042)
    curve, bars = figure.axes
    assert curve.get_lines()[1].get_xydata() == pytest.approx(np.array([[35, 50], [95, 90]]))
    assert [bar.get_height() for bar in bars.patches] == [25, 75] and "4.2 points" in figure.get_suptitle()
    figure = plot_robustness(90.1, {"blur": {"1": 80.0, "2": 9.5}, "shift": {"4": 89.0}})
    assert [axes.get_title() for axes in figure.axes] == ["blur", "shift"]
    assert list(figure.axes[0].get_lines()[1].get_ydata()) == [80.0, 9.5]
    assert {"80.0", "9.5", "89.0"} <= set(words(figure))


def draw(name, text="bird", note=""):
    """One figure of each kind, with `text` wherever a caller's text stands in it."""
    classes = ("airplane", text)
    row = {"count": 1, "confidence": 0.9, "accuracy": 0.8}
    figures = {
        "samples": lambda: plot_samples(plain(RED), [0], classes, note=note),
        "augmentations": lambda: plot_augmentations(plain(RED)[0], {text: plain(RED)}, note=note),
        "history": lambda: plot_history([epoch(1)], {text: 90.0}, note=note),
        "misclassified": lambda: plot_misclassified(plain(RED), [0], [1], [0.5], classes, note=note),
        "none misclassified": lambda: plot_misclassified([], [], [], [], classes, note=note),
        "confusion matrix": lambda: plot_confusion_matrix([0], [1], classes, note=note),
        "predictions": lambda: plot_predictions(
            plain(RED), [text], [[(text, 0.9)]], np.zeros((1, 4, 4)), note=note
        ),
        "reliability": lambda: plot_reliability([row], 0.1, note=note),
        "robustness": lambda: plot_robustness(90.1, {text: {text: 80.0, "2": 9.5}}, note=note),
    }
    return figures[name]()


FIGURES = (
    "samples", "augmentations", "history", "misclassified", "none misclassified", "confusion matrix",
    "predictions", "reliability", "robustness",
)  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_note_ends_the_title_and_all_text_lies_inside(name):
    assert "(" not in draw(name).get_suptitle()
    # Dollars are dollars: matplotlib would fail to read these texts as formulas.
    figure = draw(name, "cost_$5_vs_$10.jpg", note="sample of $2_500_$ images")
    assert figure.get_suptitle().endswith(r" (sample of \$2_500_\$ images)")
    height, width, _ = pixels(figure).shape
    assert width <= 9.2 * 150
    box = figure.get_tightbbox()  # inches
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width / 150 and box.y1 <= height / 150
    assert figure._repr_png_().startswith(b"\x89PNG")  # a notebook calls it


NAN = np.full((3, 2, 2), np.nan)
ZEROS = np.zeros((3, 2, 2))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: denormalize(plain(RED), MEAN, STD), r"float \(N, 3, H, W\).* found uint8 \(1, 32, 32, 3\)"),
        (lambda: denormalize(ZEROS, (125.3, 123.0, 113.9), STD), r"mean: .*\[0, 1\].*125\.3.*255"),
        (lambda: denormalize(ZEROS, MEAN, (0.2, 0, 0.2)), "std: .*above 0"),
        (lambda: denormalize(NAN, MEAN, STD), "NaN"),
        (lambda: plot_samples(plain(RED) / 255, [0], CLASSES), "expected uint8 .*float64.*denormalize"),
        (lambda: plot_samples(plain(RED).transpose(0, 3, 1, 2), [0], CLASSES), r"\(N, H, W, 3\).*\(1, 3, 32"),
        (lambda: plot_samples(plain(RED, 2), [0], CLASSES), r"targets: expected 2 integers.*\(1,\)"),
        (lambda: plot_samples(plain(RED), [3], CLASSES), "targets: expected 0 to 2, found 3 to 3"),
        (lambda: plot_samples(plain(RED), [-1], CLASSES), "targets: expected 0 to 2, found -1 to -1"),
        (
            lambda: plot_augmentations(plain(RED)[0] / 255, {"flip": plain(RED)}),
            r"augmented\['flip'\].*float64",
        ),
        (
            lambda: plot_misclassified(plain(RED), [0], [1], [97.3], CLASSES),
            r"confidences: .*\[0, 1\].*97\.3",
        ),
        (lambda: plot_misclassified(plain(RED), [0], [0.9], [0.5], CLASSES), "predictions: .*1 int.*float64"),
        (lambda: plot_confusion_matrix([0, 1], [0], CLASSES), "predictions: expected 2 integers"),
        (lambda: plot_misclassified([], [0], [1], [0.5], CLASSES), r"images: expected uint8.* \(0,\)"),
        (lambda: plot_predictions(plain(RED), ["a"], [[("b", 97.3)]]), r"answers: .*\[0, 1\], found 97\.3"),
        (lambda: plot_predictions(plain(RED), ["a"], [[("b", 1)]], plain(RED)[..., 0]), "heat: .* 255"),
        (lambda: plot_predictions(plain(RED), ["a"], [[("b", 1)]], plain(RED) / 255), "cannot reshape"),
        (lambda: plot_reliability([], 0.0), "bins: .* found none"),
        (
            lambda: plot_reliability([{"confidence": 95, "accuracy": 90, "count": 1}], 0.05),
            "bins: .* 90 to 95",
        ),
        (lambda: plot_reliability([{"confidence": 1, "accuracy": 1, "count": 1}], 4.2), "error: .* 4.2"),
        (lambda: plot_robustness(90.0, {"blur": {}}), r"damaged\['blur'\]: .* found none"),
        (lambda: plot_robustness(90.0, {"blur": {"1": 9000.0}}), r"damaged\['blur'\]: .*\[0, 100\].* 9000"),
        (lambda: plot_robustness(9000.0, {"blur": {"1": 90.0}}), r"clean: .*\[0, 100\], found 9000"),
    ],
)
def test_wrong_input_is_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: plot_samples(plain(RED), [0], CLASSES, per_class=0),
        lambda: plot_augmentations(plain(RED), {"flip": plain(RED)}),
        lambda: plot_augmentations(plain(RED)[0], {"crop": plain(RED)[:, :9]}),
        lambda: plot_augmentations(plain(RED)[0], {}),
        lambda: plot_history([]),
        lambda: plot_history([epoch(1), {"epoch": 2}]),
        lambda: plot_misclassified(plain(RED, 2), [0, 0], [1, 1], [0.5], CLASSES),
        lambda: plot_confusion_matrix([], [], CLASSES),
        lambda: plot_predictions(plain(RED), ["a"], [[("b", 1.0)]], np.zeros((2, 4, 4))),
        lambda: plot_predictions(plain(RED, 2), ["a"], [[("b", 1.0)]] * 2),
        lambda: plot_robustness(90.0, {}),
    ],
)
def test_no_figure_of_missing_or_mismatched_input(call):
    with pytest.raises((ValueError, LookupError, ArithmeticError)):  # numpy's and matplotlib's own
        call()


def test_needs_neither_torch_nor_pyplot():
    code = "import sys, visualize; print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    folder = Path(visualize.__file__).parent
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
