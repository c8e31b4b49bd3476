"""BatchTransform against Albumentations: the same pictures from the same parameters, drawn alike.

Albumentations' own drawing and `apply` run here, one image at a time. The numbers of an affine map are caught
before Albumentations multiplies them into a matrix, so that each can be compared.
"""

import warnings

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from albumentations.augmentations.geometric import functional as fgeometric
from albumentations.pytorch import ToTensorV2
from scipy.stats import ks_2samp

from batches import BatchTransform
from dataset import ASSETS, MEAN, STD, AlbumentationsCIFAR10, train_transform

warnings.filterwarnings("ignore", "ShiftScaleRotate is a special case")
pytestmark = pytest.mark.filterwarnings("ignore:ShiftScaleRotate is a special case")

COLOUR, REFLECT, REPLICATE = (125, 30, 250), cv2.BORDER_REFLECT_101, cv2.BORDER_REPLICATE
SIZE = (32, 24)  # higher than wide, so that swapped axes show

# Bounds of the mean absolute difference, in pixel values. Albumentations rounds after each warp. After a
# RandomBrightnessContrast it rounds down.
EXACT, NEARLY, ROUNDED, CUT_OFF = 0.0, 1e-6, 0.35, 0.6
CASES = {
    "horizontal flip": (EXACT, [A.HorizontalFlip(p=0.3)]),
    "vertical flip": (EXACT, [A.VerticalFlip(p=0.7)]),
    "rotate": (ROUNDED, [A.Rotate((-15, 40))]),
    "rotate on colour": (ROUNDED, [A.Rotate(90, fill=COLOUR, p=1)]),
    "rotate, reflected": (ROUNDED, [A.Rotate(90, border_mode=REFLECT, p=0.8)]),
    "rotate twice, two borders": (
        0.5,
        [A.Rotate(45, fill=COLOUR, p=1), A.Rotate(45, border_mode=REFLECT, p=1)],
    ),
    "shift scale rotate": (ROUNDED, [A.ShiftScaleRotate(0.1, 0.1, 15)]),
    "shift scale rotate, limits": (
        ROUNDED,
        [
            A.ShiftScaleRotate(
                0, (-0.3, 0.1), (5, 20), REPLICATE, shift_limit_x=(0, 0.3), shift_limit_y=0.2, p=1
            )
        ],
    ),
    "affine": (
        ROUNDED,
        [
            A.Affine(
                {"x": (0.8, 1.3), "y": 0.9},
                {"x": (-0.2, 0.1)},
                None,
                (-30, 50),
                {"x": (-20, 5), "y": 10},
                p=0.9,
            )
        ],
    ),
    "affine in pixels": (
        ROUNDED,
        [
            A.Affine(
                (0.7, 1.2), None, {"x": (-3, 9), "y": -2}, 12, (-9, 16), keep_ratio=True, fill=COLOUR, p=1
            )
        ],
    ),
    "affine, reflected": (ROUNDED, [A.Affine(1.1, (-0.1, 0.2), shear=(3, 8), border_mode=REFLECT, p=1)]),
    "pad, crop": (EXACT, [A.PadIfNeeded(40, 33, border_mode=REFLECT), A.RandomCrop(32, 24)]),
    "pad on colour, crop": (EXACT, [A.PadIfNeeded(37, 40, fill=(125.5, 30.2, 250)), A.RandomCrop(30, 31)]),
    "pad far": (EXACT, [A.PadIfNeeded(131, 160, border_mode=REFLECT), A.RandomCrop(101, 140)]),
    "pad, replicated": (EXACT, [A.PadIfNeeded(50, 50, border_mode=REPLICATE), A.VerticalFlip()]),
    "crop": (EXACT, [A.RandomCrop(27, 11)]),
    "crop of everything": (EXACT, [A.RandomCrop(*SIZE)]),
    "crop of more than there is": (EXACT, [A.RandomCrop(41, 16, True, fill=COLOUR)]),
    "crop of more, reflected": (EXACT, [A.RandomCrop(30, 31, True, border_mode=REFLECT)]),
    "crop, then pad": (EXACT, [A.RandomCrop(24, 20), A.PadIfNeeded(32, 32, fill=9)]),
    "pad, fill beyond the range": (EXACT, [A.PadIfNeeded(40, 33, fill=(300, -20, 127.5))]),
    "affine, fill beyond the range": (ROUNDED, [A.Affine(rotate=(25, 25), fill=(300, -20, 12.6), p=1)]),
    "dropout": (EXACT, [A.CoarseDropout((1, 4), (3, 9), (0, 40), fill=7)]),
    "dropout in shares": (
        EXACT,
        [A.CoarseDropout((2, 3), (0.1, 0.4), (0.0, 0.25), fill=(7.9, 30, 250), p=0.9)],
    ),
    "brightness, contrast": (CUT_OFF, [A.RandomBrightnessContrast(p=0.4)]),
    "brightness, contrast, limits": (CUT_OFF, [A.RandomBrightnessContrast((0.1, 0.3), (-0.7, -0.2), p=1)]),
    "normalise": (NEARLY, [A.Normalize(MEAN, STD), ToTensorV2()]),
    "normalise by numbers": (NEARLY, [A.Normalize(0.5, 0.25, max_pixel_value=200)]),
    # In standard deviations. Beyond the crop ours sees more of the image; Albumentations reflects the crop.
    "train_transform": (0.015, train_transform().transforms),
}
RANDOM = [
    "horizontal flip",
    "vertical flip",
    "rotate",
    "rotate on colour",
    "shift scale rotate",
    "shift scale rotate, limits",
    "affine",
    "affine in pixels",
    "affine, reflected",
    "pad, crop",
    "pad far",
    "crop, then pad",
    "dropout",
    "dropout in shares",
    "brightness, contrast",
    "brightness, contrast, limits",
]


def original_transform() -> A.Compose:
    """The augmentation of the original project."""
    warps = [A.HorizontalFlip(), A.Rotate(15), A.ShiftScaleRotate(0.1, 0.1, 15)]
    colours = [A.RandomBrightnessContrast(p=0.1), A.CoarseDropout(), A.Normalize(MEAN, STD), ToTensorV2()]
    return A.Compose(warps + colours)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return AlbumentationsCIFAR10(ASSETS).data[::10]


@pytest.fixture
def affine(monkeypatch):
    """Albumentations' function from six numbers to a matrix. Meanwhile, Albumentations gets the numbers."""
    original = fgeometric.create_affine_transformation_matrix
    monkeypatch.setattr(fgeometric, "create_affine_transformation_matrix", lambda *numbers: numbers)
    return original


def translate_names(step, params: dict) -> dict:
    """Albumentations' parameters under the names of `BatchTransform.parameters`."""
    if "matrix" in params:
        *pairs, rotate, _ = params["matrix"]
        named = zip(("translate", "shear", "scale"), pairs)
        return {"rotate": rotate} | {f"{name}_{axis}": pair[axis] for name, pair in named for axis in "xy"}
    if "crop_coords" in params:
        return dict(zip("xy", params["crop_coords"]))
    if "holes" in params:
        holes = np.zeros((step.num_holes_range[1], 4))
        holes[: len(params["holes"])] = params["holes"]
        return dict(zip(("x_min", "y_min", "x_max", "y_max"), holes.T))
    return {key: params[key] for key in ("alpha", "beta") if key in params}


def their_draws(step, count: int, size: tuple[int, int], seed: int) -> tuple[list, dict[str, np.ndarray]]:
    """What Albumentations draws: for its `apply` (None: not applied), and as `BatchTransform.parameters`."""
    step.set_random_seed(seed)
    shape, data = {"shape": (*size, 3)}, {"image": np.zeros((*size, 3), np.uint8)}
    draws = []
    for _ in range(count):
        draws.append(step.get_params_dependent_on_data(shape, data) if step.should_apply() else None)
    applied = np.array([params is not None for params in draws])
    parameters = {"applied": applied}
    rows = [translate_names(step, params) for params in draws if params is not None]
    for key in rows[0]:
        values = np.array([row[key] for row in rows])
        parameters[key] = np.empty((count, *values.shape[1:]))
        parameters[key][applied] = values
        parameters[key][~applied] = values[0]  # must have no effect
    return draws, parameters


@pytest.mark.parametrize("name", CASES)
def test_same_picture_from_the_same_parameters(name, images, affine):
    bound, steps = CASES[name]
    originals = images if name == "train_transform" else images[:, :, : SIZE[1]]
    expected, parameters = list(originals), []
    for step in steps:
        draws, values = their_draws(step, len(images), expected[0].shape[:2], 1)
        parameters.append(values)
        for i in np.flatnonzero(values["applied"]):
            if "matrix" in draws[i]:
                draws[i]["matrix"] = affine(*draws[i]["matrix"])
            expected[i] = step.apply(expected[i], **draws[i] | {"shape": expected[i].shape})
    if isinstance(steps[-1], ToTensorV2):
        expected = [image.permute(1, 2, 0).numpy() for image in expected]
    transform = BatchTransform(A.Compose(steps))
    table = transform.pack(parameters, len(images), originals.shape[1:3])
    result = transform(torch.from_numpy(originals), table).permute(0, 2, 3, 1).numpy()
    assert result.dtype == np.float32 and result.shape == np.shape(expected)
    if expected[0].dtype == np.uint8:
        assert -1e-3 < result.min() and result.max() < 255 + 1e-3
    difference = np.abs(result - np.float64(expected)).mean((1, 2, 3))
    assert difference.mean() <= bound and difference.max() < 1, (difference.mean(), difference.max())
    untouched = ~np.any([values["applied"] for values in parameters], axis=0)
    assert untouched.any() == all(step.p < 1 for step in steps)
    if untouched.any():  # a neighbour's warp interpolates them too, at their own pixels
        largest = np.abs(result[untouched] - originals[untouched]).max()
        assert largest <= (1e-3 if bound == ROUNDED else 0)


def numbers_of(parameters: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Numbers to compare: of the images that the transform is applied to, and of the holes that there are."""
    applied = parameters.get("applied", np.ones(count, bool))
    numbers = {key: values[applied] for key, values in parameters.items() if key != "applied"}
    if "x_min" in numbers:
        height, width = (numbers[axis + "_max"] - numbers[axis + "_min"] for axis in "yx")
        exists = height > 0
        numbers = {"y": numbers["y_min"][exists], "x": numbers["x_min"][exists], "height": height[exists]}
        numbers |= {"width": width[exists], "holes": exists.sum(1)}
    return numbers | {"applied": applied.astype(float)}


UNIFORM = ("rotate", "shear_x", "shear_y", "scale_x", "scale_y", "alpha", "beta")


def same_distribution(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ks_2samp(ours, theirs, method="asymp").pvalue > 1e-3


@pytest.mark.parametrize("name", RANDOM)
def test_parameters_are_distributed_as_albumentations_draws_them(name, affine):
    our_count, their_count, size = 50_000, 15_000, SIZE
    steps = CASES[name][1]
    transform = BatchTransform(A.Compose(steps))
    for step, values in zip(steps, transform.parameters(our_count, SIZE, 2, 3)):
        ours = numbers_of(values, our_count)
        theirs = numbers_of(their_draws(step, their_count, size, 4)[1], their_count)
        if isinstance(step, A.PadIfNeeded):
            size = (max(size[0], step.min_height), max(size[1], step.min_width))
        for key in theirs:
            if key in ours:
                assert same_distribution(ours[key], theirs[key]), key
                if key in UNIFORM:  # the ends show more than the distribution
                    assert np.ptp(ours[key]) == pytest.approx(np.ptp(theirs[key]), rel=2e-3), key
            else:  # neither draws it: the shear of a Rotate, say
                assert np.ptp(theirs[key]) == 0, key
        # One draw must not serve two parameters, nor two draws one.
        varying = [key for key in ours if key not in ("holes", "applied") and np.ptp(ours[key]) > 0]
        if len(varying) > 1:
            correlations = [np.corrcoef([numbers[key] for key in varying]) for numbers in (ours, theirs)]
            assert np.abs(correlations[0] - correlations[1]).max() < 0.05


def test_distribution_test_tells_15_degrees_from_16(affine):
    ours = BatchTransform(A.Compose([A.Rotate(16, p=1)])).parameters(50_000, SIZE, 2, 3)[0]["rotate"]
    for limit, same in ((15, False), (16, True)):
        theirs = their_draws(A.Rotate(limit, p=1), 15_000, SIZE, 4)[1]["rotate"]
        assert same_distribution(ours, theirs) == same


@pytest.mark.parametrize("compose", [original_transform(), train_transform()], ids=["original", "ours"])
def test_picture_follows_from_seed_epoch_and_index_alone(compose, images):
    transform, batch = BatchTransform(compose), torch.from_numpy(images.copy())
    table = transform.draw(len(batch), (32, 32), 5, 2)
    whole = transform(batch, table)
    assert whole.shape == (len(batch), 3, 32, 32) and whole.dtype == torch.float32
    assert np.array_equal(batch, images)
    # In standard deviations: the rounding of a warp's coordinates depends on the batch size.
    for size in (1, 7, 128):
        parts = [transform(*rows) for rows in zip(batch.split(size), table.split(size))]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(transform(batch[order], table[order]), whole[order], rtol=0, atol=1e-4)
    for seed, epoch in ((5, 3), (6, 2), (2, 5)):
        other = transform(batch, transform.draw(len(batch), (32, 32), seed, epoch))
        assert (other != whole).flatten(1).any(1).float().mean() > 0.9
    assert torch.equal(BatchTransform(compose).draw(len(batch), (32, 32), 5, 2), table)
    assert torch.equal(transform.draw(len(batch), (32, 32), 5, 2), table)
    for count in (1, len(batch) // 2, 3 * len(batch)):
        both = min(count, len(batch))
        assert torch.equal(transform.draw(count, (32, 32), 5, 2)[:both], table[:both])


def test_random_numbers_depend_neither_on_each_other_nor_on_the_order_of_the_images():
    transform = BatchTransform(A.Compose([A.Rotate(90, p=1), A.Rotate(90, p=1)]))
    angles = [values["rotate"] for values in transform.parameters(1000, SIZE, 5, 2)]
    of_order = np.random.default_rng((5, 2, 1)).uniform(-90, 90, 1000)  # what BatchLoader shuffles with
    assert np.abs(np.corrcoef([of_order, *angles]) - np.eye(3)).max() < 0.2


@pytest.mark.parametrize("size", [(2, 1), (1, 2)])
def test_images_of_a_single_row_or_column(size):
    images = torch.arange(12, dtype=torch.uint8).view(2, *size, 3)
    transform = BatchTransform(A.Compose([A.VerticalFlip(p=1), A.HorizontalFlip(p=1)]))
    result = transform(images, transform.draw(2, size, 0, 0))
    assert torch.equal(result, images.flip(1, 2).permute(0, 3, 1, 2).float())


@pytest.mark.parametrize("border", [{"fill": 0}, {"fill": COLOUR}, {"border_mode": REFLECT}], ids=str)
def test_neighbouring_warps_are_one_warp_by_the_product_of_their_maps(border, images):
    steps = [A.HorizontalFlip(), A.Rotate(15, **border), A.ShiftScaleRotate(0.1, 0.1, 15, **border)]
    transform = BatchTransform(A.Compose(steps))
    originals = images[:, :, : SIZE[1]]
    flips, *warps = parameters = transform.parameters(len(images), SIZE, 0, 0)
    table = transform.pack(parameters, len(images), SIZE)
    result = transform(torch.from_numpy(originals), table).permute(0, 2, 3, 1).numpy()
    mirror = np.array([[-1.0, 0, SIZE[1] - 1], [0, 1, 0], [0, 0, 1]])
    difference = []
    for i, image in enumerate(originals):
        matrix = mirror if flips["applied"][i] else np.eye(3)
        for values in warps:
            row = {key: column[i] for key, column in values.items()}
            if not row["applied"]:
                continue
            neutral = (("translate", 0), ("shear", 0), ("scale", 1))
            pairs = [{axis: row.get(f"{name}_{axis}", value) for axis in "xy"} for name, value in neutral]
            centre = fgeometric.center(SIZE)
            matrix = fgeometric.create_affine_transformation_matrix(*pairs, row["rotate"], centre) @ matrix
        mode = border.get("border_mode", cv2.BORDER_CONSTANT)
        expected = fgeometric.warp_affine(image, matrix, cv2.INTER_LINEAR, border.get("fill", 0), mode, SIZE)
        difference.append(np.abs(result[i] - expected).mean())
    assert len(transform.stages) == 1
    assert np.mean(difference) < ROUNDED and max(difference) < 1


def test_compositions_inside_another_are_its_steps(images):
    flip, warp, normalize = A.HorizontalFlip(), A.Affine(rotate=(-20, 20)), A.Normalize(MEAN, STD)
    first = A.Compose([A.NoOp(), flip, A.Sequential([warp, A.NoOp(p=0)], p=1)])
    last = A.Compose([normalize, A.NoOp(), A.Compose([ToTensorV2()])])
    results = []
    for steps in ([flip, warp, normalize, ToTensorV2()], [first, last]):
        transform = BatchTransform(A.Compose(steps))
        table = transform.draw(len(images), (32, 32), 0, 1)
        results.append(transform(torch.from_numpy(images), table))
    assert torch.equal(*results)
    nothing = BatchTransform(A.NoOp())
    same = nothing(torch.from_numpy(images), nothing.draw(len(images), (32, 32), 0, 1))
    assert np.array_equal(same.permute(0, 2, 3, 1), images)


FLIPS = [A.HorizontalFlip(), A.VerticalFlip()]
REFUSED = {  # what is said of the last of each row
    "a transform with a batched form, found GaussianBlur": [A.GaussianBlur()],
    "a transform with a batched form, found SafeRotate": [A.SafeRotate()],
    "a transform with a batched form, found OneOf": [A.OneOf(FLIPS, p=1)],
    "a transform with a batched form, found SomeOf": [A.Compose([A.SomeOf(FLIPS, 2)])],
    "Compose with p 1, found 0.5": [A.Compose(FLIPS, p=0.5)],
    "Sequential with p 1, found 0.9": [A.Sequential(FLIPS, p=0.9)],
    "RandomCrop with p 1, found 0.5": [A.RandomCrop(24, 24, p=0.5)],
    "Rotate with crop_border False, found True": [A.Rotate(crop_border=True)],
    "Rotate with interpolation 1, found 0": [A.Rotate(interpolation=cv2.INTER_NEAREST)],
    "Rotate with border_mode 0 or 1 or 4, found 3": [A.Rotate(border_mode=cv2.BORDER_WRAP)],
    "Rotate with fill of one or three numbers, found (9.0, 8.0)": [A.Rotate(fill=(9, 8))],
    "Affine with fit_output False, found True": [A.Affine(fit_output=True)],
    "Affine with balanced_scale False, found True": [A.Affine(balanced_scale=True)],
    "PadIfNeeded with position 'center', found 'random'": [A.PadIfNeeded(40, 40, position="random")],
    "PadIfNeeded with pad_height_divisor None, found 16": [A.PadIfNeeded(None, None, 16, 16)],
    "PadIfNeeded with fill of one or three numbers, found (9.0,)": [A.PadIfNeeded(40, 40, fill=(9,))],
    "CoarseDropout with fill of one or three numbers, found 'random'": [A.CoarseDropout(fill="random")],
    "RandomBrightnessContrast with brightness_by_max True, found False": [
        A.RandomBrightnessContrast(brightness_by_max=False)
    ],
    "RandomBrightnessContrast with ensure_safe_range False, found True": [
        A.RandomBrightnessContrast(ensure_safe_range=True)
    ],
    "Normalize with normalization 'standard', found 'image'": [A.Normalize(normalization="image")],
    # After normalization these mean something else.
    "only ToTensorV2 after Normalize, found CoarseDropout": [A.Normalize(), A.CoarseDropout(fill=0.5)],
    "only ToTensorV2 after Normalize, found RandomBrightnessContrast": [
        A.Compose([A.Normalize(), A.NoOp()]),
        A.RandomBrightnessContrast(),
    ],
    "only ToTensorV2 after ToTensorV2, found CoarseDropout": [
        A.Normalize(),
        ToTensorV2(),
        A.CoarseDropout(fill=0.5),
    ],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_transforms_are_refused_by_name_with_the_option_or_the_place(reason):
    steps = REFUSED[reason]
    advice = "run it image by image, the data set (AlbumentationsImages) behind a DataLoader"
    for compose in [A.Compose([A.HorizontalFlip(), *steps]), *(steps if len(steps) == 1 else [])]:
        with pytest.raises(NotImplementedError) as error:
            BatchTransform(compose)
        assert str(error.value) == f"expected {reason}: {advice}"


@pytest.mark.parametrize("fill", [256, -1.0, (0, 300, 7.9)])
def test_holes_of_a_colour_that_albumentations_cannot_make_are_refused(fill):
    with pytest.raises(ValueError, match="expected CoarseDropout with fill from 0 to 255, found "):
        BatchTransform(A.Compose([A.CoarseDropout(fill=fill)]))


def test_wrong_images_are_refused(images):
    transform, batch = BatchTransform(train_transform()), torch.from_numpy(images)
    table = transform.draw(len(batch), (32, 32), 0, 0)
    for wrong in (batch.float(), batch.permute(0, 3, 1, 2), batch[..., :1], batch[:9], batch[0]):
        with pytest.raises(ValueError, match="expected 200 uint8 images .*, found torch"):
            transform(wrong, table)
    with pytest.raises(ValueError, match=r"expected .* at least \(33, 32\), found \(32, 32\)"):
        BatchTransform(A.Compose([A.RandomCrop(33, 32)])).draw(8, (32, 32), 0, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compose", [original_transform(), train_transform()], ids=["original", "ours"])
def test_gpu_and_cpu_make_the_same_pictures(compose, images):
    pictures = []
    for device in ("cpu", "cuda"):
        transform = BatchTransform(compose, device)
        table = transform.draw(len(images), (32, 32), 0, 0)
        pictures.append(transform(torch.from_numpy(images).to(device), table).cpu())
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-2 / 255 / min(STD))
