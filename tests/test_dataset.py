"""The data set, its counted randomness, its loaders, and what happens without its files."""

import hashlib
import re
from pathlib import Path, PurePath

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

import cifar10
import dataset
from batches import BatchLoader, ProgressiveLoader, TaughtLoader
from cifar10 import find_cifar10
from conftest import needs_links
from dataset import (
    ASSETS,
    CLASSES,
    MEAN,
    STD,
    AlbumentationsCIFAR10,
    AlbumentationsImages,
    image_folder,
    train_transform,
)


def test_embedded_sample_is_lossless_and_balanced():
    digests = []
    for train, count in ((True, 200), (False, 50)):
        sample = AlbumentationsCIFAR10(ASSETS, train=train)
        assert sample.is_sample
        assert sample.data.shape == (10 * count, 32, 32, 3) and sample.data.dtype == np.uint8
        assert np.bincount(sample.targets).tolist() == [count] * 10
        digests.append(hashlib.sha256(sample.data.tobytes()).hexdigest()[:16])
    assert digests == ["dc47658d128215b5", "f02c6a9bda947b45"]
    assert sum(path.stat().st_size for path in ASSETS.glob("*.webp")) < 6e6


def test_sample_is_the_first_images_of_each_class(cifar10_root):
    for train, count in ((True, 200), (False, 50)):
        full = AlbumentationsCIFAR10(cifar10_root, train=train)
        sample = AlbumentationsCIFAR10(ASSETS, train=train)
        targets = np.array(full.targets)
        first = [np.flatnonzero(targets == c)[:count] for c in range(10)]
        assert np.array_equal(full.data[np.concatenate(first)], sample.data)
        assert full.classes == list(CLASSES) and not full.is_sample


def pictures_of(loader):
    return torch.cat([pictures for pictures, _ in loader])


def epochs_of(images, batch_size, workers, epochs):
    """The pictures of each epoch, with new workers for each, which is DataLoader's default."""
    pictures = []
    for epoch in epochs:
        images.set_epoch(epoch)
        pictures.append(
            pictures_of(DataLoader(Subset(images, range(0, 2000, 100)), batch_size, num_workers=workers))
        )
    return pictures


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")  # more than this machine has cores
@pytest.mark.parametrize("workers, batch_size", [(1, 20), (2, 8), (4, 3)])
def test_augmentation_depends_on_seed_epoch_and_index_alone(workers, batch_size):
    images = AlbumentationsCIFAR10(ASSETS, transform=train_transform(), seed=3)
    first, second = epochs_of(images, 20, 0, [1, 2])
    assert not torch.equal(first, second)
    second_again, first_again = epochs_of(images, batch_size, workers, [2, 1])
    assert torch.equal(first_again, first) and torch.equal(second_again, second)
    images.seed = 4
    assert not torch.equal(epochs_of(images, 20, 0, [1])[0], first)


class PlainAlbumentations(AlbumentationsCIFAR10):
    """The data set as most repositories write it: Albumentations draws by itself."""

    def __getitem__(self, index):
        return self.transform(image=self.data[index])["image"], self.targets[index]


def count_distinct_pictures(kind):
    """How many different pictures two workers make of one image, 64 times in each of 3 epochs."""
    images = kind(ASSETS, transform=train_transform())
    images.data[:] = images.data[:1]
    distinct = set()
    for epoch in range(3):
        images.set_epoch(epoch)
        pictures = pictures_of(DataLoader(Subset(images, range(64)), 8, num_workers=2))
        distinct |= {picture.numpy().tobytes() for picture in pictures}
    return len(distinct)


def test_epochs_differ_with_workers_where_plain_albumentations_repeats_itself():
    # Of 192 pictures, half are not warped. They are among 162 crops, so some coincide.
    assert count_distinct_pictures(AlbumentationsCIFAR10) > 150
    assert count_distinct_pictures(PlainAlbumentations) <= 64


def test_running_workers_switch_to_the_next_epoch():
    images = AlbumentationsCIFAR10(ASSETS, transform=train_transform())
    loader = DataLoader(Subset(images, range(16)), 8, num_workers=2, persistent_workers=True)
    first = pictures_of(loader)
    images.set_epoch(1)
    second = pictures_of(loader)
    images.set_epoch(0)
    assert torch.equal(pictures_of(loader), first) and not torch.equal(first, second)


def test_batch_loader_visits_every_image_once_in_a_new_order_each_epoch():
    images = AlbumentationsCIFAR10(ASSETS, train=False, transform=dataset.test_transform())
    images.targets = list(range(500))  # so that a target says which image it is
    loader = BatchLoader(images, 150, shuffle=True)
    orders = []
    for epoch in (1, 2, 1):
        loader.set_epoch(epoch)
        targets = [targets for _, targets in loader]
        assert [len(part) for part in targets] == [150, 150, 150, 50] and len(loader) == 4
        orders.append(torch.cat(targets).tolist())
        assert sorted(orders[-1]) == list(range(500))
    assert orders[0] == orders[2] != orders[1]
    pictures, targets = next(iter(BatchLoader(images, 500, shuffle=False)))
    expected = torch.stack([images[i][0] for i in range(500)])
    assert targets.tolist() == list(range(500)) and (pictures - expected).abs().max() < 1e-5
    sizes = [len(targets) for _, targets in BatchLoader(images, 499, shuffle=True)]
    assert sizes == [499], "one image is no batch"


def test_batch_loader_refuses_what_it_cannot_batch():
    images = AlbumentationsCIFAR10(ASSETS, train=False, transform=dataset.test_transform())
    with pytest.raises(ValueError, match="batch_size >= 1"):
        BatchLoader(images, -1, shuffle=True)
    for wrong in (AlbumentationsCIFAR10(ASSETS, train=False), Subset(images, range(9))):
        kind = type(wrong).__name__
        with pytest.raises(ValueError, match=f"AlbumentationsImages with a transform, found {kind} without"):
            BatchLoader(wrong, 10, shuffle=True)
    pixels = np.zeros((4, 64, 64, 3), np.uint8)
    large = AlbumentationsImages(pixels, [0] * 4, CLASSES, train_transform())
    with pytest.raises(ValueError, match=r"expected images of \(32, 32\), found \(64, 64\)"):
        BatchLoader(large, 2, shuffle=True)  # a DataLoader's would be scaled
    large.transform = A.Compose([A.HorizontalFlip(), train_transform()])  # also inside another Compose
    with pytest.raises(ValueError, match=r"expected images of \(32, 32\), found \(64, 64\)"):
        BatchLoader(large, 2, shuffle=True)
    large.transform = A.Compose(list(dataset.test_transform()))
    assert next(iter(BatchLoader(large, 2, shuffle=True)))[0].shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    "targets, found",
    [
        ([0] * 501, "torch.int64 (501,)"),
        ([0] * 499, "torch.int64 (499,)"),
        ([[0.1] * 10] * 500, "torch.float32 (500, 10)"),
        (np.zeros((500, 1), np.int64), "torch.int64 (500, 1)"),
        ([0.5] * 500, "torch.float32 (500,)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_batch_loader_refuses_targets_that_are_not_a_class_for_each_image(targets, found):
    images = AlbumentationsCIFAR10(ASSETS, train=False, transform=dataset.test_transform())
    images.targets = targets
    with pytest.raises(ValueError) as error:
        BatchLoader(images, 100, shuffle=True)
    message = "expected 500 targets, the class number of each image, found "
    assert str(error.value).startswith(message + found)


@pytest.mark.parametrize("kind", [np.int32, np.uint8, torch.tensor])
def test_batch_loader_makes_targets_of_every_integer_kind_int64(kind):
    images = AlbumentationsCIFAR10(ASSETS, train=False, transform=dataset.test_transform())
    expected, images.targets = images.targets, kind(images.targets)
    _, targets = next(iter(BatchLoader(images, 500, shuffle=False)))
    assert targets.dtype == torch.int64 and targets.tolist() == expected


def channel_means(pictures):
    return pictures.mean((2, 3))


def test_teacher_is_asked_once_about_each_view_and_its_answers_belong_to_the_pictures():
    images = AlbumentationsCIFAR10(ASSETS, transform=train_transform())
    images.data, images.targets = images.data[:500], list(range(500))
    questions = []

    def teacher(pictures):  # which sees the left half
        questions.append(len(pictures))
        return channel_means(pictures[..., :16])

    loader = TaughtLoader(BatchLoader(images, 150, shuffle=True), teacher, views=2)
    orders, answers_by_image, pictures_by_image = [], [], []
    for epoch in range(1, 6):
        loader.set_epoch(epoch)
        pictures, targets, answers = (torch.cat(parts) for parts in zip(*loader))
        torch.testing.assert_close(answers, channel_means(pictures))  # the mean over both halves
        orders.append(targets.tolist())
        answers_by_image.append(answers[targets.argsort()])
        pictures_by_image.append(pictures[targets.argsort()])
    assert sum(questions) == 2 * 2 * 500, "both views, each with its mirror image"
    assert all(orders[0] != order for order in orders[1:]), "the order is new in each epoch"
    same = [torch.equal(answers_by_image[0], answers) for answers in answers_by_image]
    assert same == [True, False, True, False, True]
    assert torch.equal(pictures_by_image[2], pictures_by_image[0].flip(3)), "the third epoch is mirrored"
    assert torch.equal(pictures_by_image[4], pictures_by_image[0])
    alone = BatchLoader(images, 150, shuffle=False)
    for epoch in (1, 2):  # the views are the pictures of the first epochs without a teacher
        alone.set_epoch(epoch)
        torch.testing.assert_close(channel_means(pictures_of(alone)), answers_by_image[epoch - 1])


def test_answers_belong_to_the_pictures_even_if_the_loader_is_used_before_and_meanwhile():
    images = AlbumentationsCIFAR10(ASSETS, train=False, transform=train_transform())
    inner = BatchLoader(images, 150, shuffle=True)
    inner.set_epoch(20)  # as the training of a teacher leaves it
    loader = TaughtLoader(inner, channel_means, views=2)
    next(iter(loader))  # as a compiler looks at a batch
    for epoch in (1, 2, 3):
        loader.set_epoch(epoch)
        inner.set_epoch(7)
        pictures, _, answers = (torch.cat(parts) for parts in zip(*loader))
        torch.testing.assert_close(answers, channel_means(pictures))


def test_an_epoch_keeps_its_answers_when_the_next_one_is_set():
    images = AlbumentationsCIFAR10(ASSETS, train=False, transform=train_transform())
    loader = TaughtLoader(BatchLoader(images, 150, shuffle=True), channel_means, views=2)
    loader.set_epoch(1)
    batches = iter(loader)
    next(batches)
    loader.set_epoch(2)
    for pictures, _, answers in batches:
        torch.testing.assert_close(answers, channel_means(pictures))


def test_a_teacher_is_asked_when_an_epoch_is_set_and_again_if_that_was_interrupted():
    images = AlbumentationsCIFAR10(ASSETS, train=False, transform=train_transform())
    questions = []

    def teacher(pictures):
        questions.append(len(pictures))
        if len(questions) == 1:
            raise KeyboardInterrupt
        return channel_means(pictures)

    loader = TaughtLoader(BatchLoader(images, 150, shuffle=True), teacher, views=2)
    with pytest.raises(KeyboardInterrupt):
        loader.set_epoch(1)
    assert len(list(loader)) == 4 and sum(questions[1:]) == 2 * 500
    loader.set_epoch(2)
    assert sum(questions[1:]) == 4 * 500, "before the first batch"


@pytest.mark.parametrize(
    "epochs, sizes",
    [(1, [32]), (2, [24, 32]), (3, [16, 24, 32]), (5, [16, 24, 24, 32, 32]), (6, [16, 16, 24, 24, 32, 32])],
)
def test_images_grow_in_three_parts_of_a_run_and_end_at_their_own_size(epochs, sizes):
    images = AlbumentationsCIFAR10(ASSETS, train=False, transform=train_transform())
    loader = BatchLoader(images, 150, shuffle=True)
    growing = ProgressiveLoader(loader, epochs)
    assert [next(iter(growing))[0].shape[-1], len(growing)] == [32, len(loader)], "before the first epoch"
    for epoch, size in enumerate([*sizes, 32], 1):
        growing.set_epoch(epoch)
        batches = list(growing)
        assert {pictures.shape[1:] for pictures, _ in batches} == {(3, size, size)}
        loader.set_epoch(epoch)
        for (small, targets), (pictures, expected) in zip(batches, loader, strict=True):
            assert torch.equal(targets, expected)
            torch.testing.assert_close(small.mean((2, 3)), pictures.mean((2, 3)), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "teacher, message",
    [
        (lambda pictures: channel_means(pictures).repeat(2, 1), "expected 500 answers .* found (1000, 3)"),
        (lambda pictures: channel_means(pictures)[:1], "expected 500 answers .* found (1, 3)"),
        (lambda pictures: channel_means(pictures) / 0, "expected finite answers of the teacher, found NaN"),
    ],
)
def test_answers_that_cannot_be_learnt_are_refused(teacher, message):
    images = AlbumentationsCIFAR10(ASSETS, train=False, transform=train_transform())
    loader = TaughtLoader(BatchLoader(images, 150, shuffle=True), teacher, views=2)
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        loader.set_epoch(1)
    assert not loader.answers


def test_answers_keep_no_gradients():
    images = AlbumentationsCIFAR10(ASSETS, train=False, transform=train_transform())
    weight = torch.ones((), requires_grad=True)
    loader = BatchLoader(images, 150, shuffle=True)
    _, _, answers = next(iter(TaughtLoader(loader, lambda x: weight * channel_means(x), views=2)))
    assert not answers.requires_grad


def test_much_memory_for_answers_is_said_before_it_is_taken(capsys):
    images = AlbumentationsCIFAR10(ASSETS, transform=train_transform())
    printed = []

    def teacher(pictures):
        printed.append(capsys.readouterr().out)
        return torch.zeros(1).expand(len(pictures), 1000)

    for views in (500, 2):
        loader = TaughtLoader(BatchLoader(images, 150, shuffle=True), teacher, views)
        for epoch in (1, 2):
            loader.set_epoch(epoch)
    text = "The teacher's answers to 500 views will take 4.0 GB on cpu: fewer views take less\n"
    assert printed == ["", "", text, *[""] * 13], "of 2 views nothing is said"


@pytest.mark.parametrize(
    "build",
    [lambda loader: TaughtLoader(loader, channel_means, 2), lambda loader: ProgressiveLoader(loader, 3)],
)
def test_epochs_are_counted_from_1_and_the_loader_inside_stays_as_it_was(build):
    images = AlbumentationsCIFAR10(ASSETS, train=False, transform=train_transform())
    inner = BatchLoader(images, 150, shuffle=True)
    first = next(iter(inner))[0]
    loader = build(inner)
    with pytest.raises(ValueError, match="expected an epoch from 1, found 0: count from 1, as fit does"):
        loader.set_epoch(0)
    loader.set_epoch(3)
    next(iter(loader))
    assert torch.equal(next(iter(inner))[0], first), "as the notebook's cell expects that runs again"


def test_a_loop_that_sets_no_epoch_learns_the_first_one():
    images = AlbumentationsCIFAR10(ASSETS, train=False, transform=train_transform())
    loader = TaughtLoader(BatchLoader(images, 150, shuffle=True), channel_means, views=2)
    pictures, _, answers = next(iter(loader))
    torch.testing.assert_close(answers, channel_means(pictures))
    loader.set_epoch(1)
    assert torch.equal(next(iter(loader))[0], pictures)


def test_damaged_file_is_named_and_not_deleted(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"not the published bytes")
    with pytest.raises(ValueError, match="data_batch_1"):
        find_cifar10(tmp_path)
    with pytest.raises(ValueError, match="data_batch_1"):
        AlbumentationsCIFAR10(tmp_path)
    assert (folder / "data_batch_1").read_bytes() == b"not the published bytes"


def test_without_data_or_network_find_cifar10_gives_the_sample_or_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(cifar10, "SOURCES", ("http://127.0.0.1:1/one", "http://127.0.0.1:1/two"))
    root = tmp_path / "nowhere"
    assert find_cifar10(root) == ASSETS
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "embedded sample" in lines[2]
    assert all("refused" in line for line in lines[:2])
    with pytest.raises(FileNotFoundError) as error:
        find_cifar10(root, "full")
    message = str(error.value)
    assert "\n" not in message and message.count("refused") == 2
    assert "put the folder cifar-10-batches-py" in message
    assert find_cifar10(root, "sample") == ASSETS
    with pytest.raises(ValueError, match="'some'"):
        find_cifar10(root, "some")


def test_root_is_the_argument_then_cifar10_root_and_home_is_expanded(home, monkeypatch):
    monkeypatch.setattr(cifar10, "check_files", lambda root: None)
    monkeypatch.setenv("CIFAR10_ROOT", "~/data")
    for name in ("data", "other"):
        (home / name / "cifar-10-batches-py").mkdir(parents=True)
    assert find_cifar10() == home / "data"
    assert find_cifar10("~/other") == home / "other"


def test_the_folder_of_the_files_itself_is_a_root_and_one_of_another_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "check_files", lambda root: None)
    monkeypatch.setattr(cifar10, "download", lambda root: pytest.fail("the files are there"))
    for name in ("cifar-10-batches-py", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data_batch_1").touch()
    assert find_cifar10(tmp_path / "cifar-10-batches-py") == tmp_path
    with pytest.raises(ValueError, match="found its files in .*mine: rename it to cifar-10-batches-py"):
        find_cifar10(tmp_path / "mine")


def test_a_missing_data_set_says_what_downloads_it(tmp_path):
    message = f"found no cifar-10-batches-py: find_cifar10({str(tmp_path)!r})"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        AlbumentationsCIFAR10(tmp_path)


def test_modules_copied_elsewhere_say_that_the_sample_is_missing(tmp_path, monkeypatch):
    for module in (cifar10, dataset):
        monkeypatch.setattr(module, "ASSETS", tmp_path / "assets")
    monkeypatch.setattr(cifar10, "download", lambda root: ["no network"])
    with pytest.raises(FileNotFoundError, match="expected the embedded sample in .*assets, found none: copy"):
        find_cifar10(data="sample")
    with pytest.raises(FileNotFoundError, match="tried no network: put the folder"):
        find_cifar10(tmp_path)
    with pytest.raises(FileNotFoundError, match="cifar10_sample_train.webp"):
        AlbumentationsCIFAR10(tmp_path / "assets")


def test_home_is_expanded_for_data_sets_and_folders(home):
    folder = str(home / "none")
    with pytest.raises(FileNotFoundError, match=re.escape(f"expected CIFAR-10 in {folder}")):
        AlbumentationsCIFAR10(Path("~/none"))
    with pytest.raises(FileNotFoundError, match=re.escape(repr(folder))):
        image_folder(Path("~/none"))


IMAGES = np.zeros((4, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    "images, targets, message",
    [
        (IMAGES, [0] * 5, r"expected targets of shape \(4,\), one for each image, found \(5,\)"),
        (IMAGES, [0] * 3, r"expected targets of shape \(4,\), one for each image, found \(3,\)"),
        (IMAGES, np.eye(4), r"expected targets of shape \(4,\), one for each image, found \(4, 4\)"),
        (IMAGES, [0, 1, 2, 1], "expected targets from 0 to 1, one for each class, found 2"),
        (IMAGES, [0, 1, -1, 1], "expected targets from 0 to 1, one for each class, found -1"),
        (IMAGES, ["cat"] * 4, "expected targets from 0 to 1, one for each class, found 'cat'"),
        (IMAGES / 255, [0] * 4, "expected images uint8, found float64"),
    ],
)
def test_images_and_targets_that_do_not_fit_are_refused(images, targets, message):
    with pytest.raises(ValueError, match=message):
        AlbumentationsImages(images, targets, ["cat", "dog"])


def test_targets_become_ints():
    for targets in ([0, 1, 1, 0], np.array([0, 1, 1, 0], np.uint8), torch.tensor([0, 1, 1, 0])):
        images = AlbumentationsImages(IMAGES, targets, ["cat", "dog"])
        assert images.targets == [0, 1, 1, 0] and type(images[1][1]) is int


def folder_of_pictures(root, *files):
    for i, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, i, i)).save(root / file, "BMP")


def test_hidden_folders_and_files_are_no_class_and_no_picture(tmp_path):
    files = "cat/a.bmp", "cat/b.jfif", "dog/sub/c.PNM", "dog/.sub/d.bmp", "cat/._a.bmp", ".checkpoints/e.bmp"
    folder_of_pictures(tmp_path, *files)
    (tmp_path / "dog/notes.txt").touch()
    images = image_folder(str(tmp_path))
    assert images.classes == ["cat", "dog"] and images.targets == [0, 0, 1]
    assert images.data[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_classes_have_the_same_order_where_paths_ignore_case(tmp_path, monkeypatch):
    monkeypatch.setattr(PurePath, "__lt__", lambda a, b: str(a).lower() < str(b).lower())  # as on Windows
    folder_of_pictures(tmp_path, "Dog/a.bmp", "cat/a.bmp")
    assert image_folder(tmp_path).classes == ["Dog", "cat"]


def test_a_class_without_pictures_is_named(tmp_path):
    message = f"expected a folder for each class in {tmp_path}, found none"
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        image_folder(tmp_path)
    folder_of_pictures(tmp_path, "cat/a.bmp")
    (tmp_path / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match="expected pictures in .*dog, found none"):
        image_folder(tmp_path)


@needs_links
def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog/a.bmp").symlink_to(tmp_path / "gone.bmp")
    with pytest.raises(FileNotFoundError, match="dog.+a.bmp"):
        image_folder(tmp_path)
    (tmp_path / "ant").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="ant"):
        image_folder(tmp_path)


def test_test_transform_normalizes():
    image = AlbumentationsCIFAR10(ASSETS).data[7]
    expected = (image / 255.0 - MEAN) / STD
    tensor = dataset.test_transform()(image=image)["image"]
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 32, 32)
    assert np.abs(tensor.numpy() - expected.transpose(2, 0, 1)).max() < 1e-6
    with pytest.raises(KeyError, match="named arguments"):  # Albumentations' own
        dataset.test_transform()(image)
