import functools
import hashlib
import http.server
import threading

import albumentations as A
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

import dataset
from batches import BatchLoader
from cifar10 import find_cifar10
from dataset import ASSETS, CLASSES, MEAN, STD, AlbumentationsCIFAR10, AlbumentationsImages, train_transform


def test_embedded_sample_is_lossless_and_balanced():
    digests = []
    for train, count in ((True, 200), (False, 50)):
        sample = AlbumentationsCIFAR10(ASSETS, train=train)
        assert sample.data.shape == (10 * count, 32, 32, 3) and sample.data.dtype == np.uint8
        assert np.bincount(sample.targets).tolist() == [count] * 10
        digests.append(hashlib.sha256(sample.data.tobytes()).hexdigest()[:16])
    assert digests == ["dc47658d128215b5", "f02c6a9bda947b45"]
    assert sum(path.stat().st_size for path in ASSETS.glob("*.webp")) < 6e6


def test_sample_is_the_first_images_of_each_class(cifar10_root):
    for train, count in ((True, 200), (False, 50)):
        full, sample = (AlbumentationsCIFAR10(root, train=train) for root in (cifar10_root, ASSETS))
        first = np.concatenate([np.flatnonzero(np.array(full.targets) == c)[:count] for c in range(10)])
        assert np.array_equal(full.data[first], sample.data)
        assert full.classes == list(CLASSES)


class Plain(AlbumentationsCIFAR10):
    """The data set as most repositories write it: Albumentations is left to draw by itself."""

    def __getitem__(self, index):
        return self.transform(image=self.data[index])["image"], self.targets[index]


def epochs_of(images, batch_size, workers, epochs):
    """What a loader delivers, one tensor an epoch, with workers started anew for each, as DataLoader's default is."""
    delivered = []
    for epoch in epochs:
        images.set_epoch(epoch)
        loader = DataLoader(Subset(images, range(0, 2000, 40)), batch_size, num_workers=workers)
        delivered.append(torch.cat([batch for batch, _ in loader]))
    return delivered


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")  # more than this machine's cores, on purpose
@pytest.mark.parametrize("workers, batch_size", [(1, 50), (2, 8), (4, 3)])
def test_augmentation_follows_from_seed_epoch_and_index_alone(workers, batch_size):
    images = AlbumentationsCIFAR10(ASSETS, transform=train_transform(), seed=3)
    expected = epochs_of(images, 50, 0, [1, 2])
    assert not torch.equal(*expected)
    found = epochs_of(images, batch_size, workers, [2, 1])
    assert torch.equal(found[1], expected[0]) and torch.equal(found[0], expected[1])
    other_seed = AlbumentationsCIFAR10(ASSETS, transform=train_transform(), seed=4)
    assert not torch.equal(epochs_of(other_seed, 50, 0, [1])[0], expected[0])


def test_epochs_differ_with_real_workers_where_plain_albumentations_repeats_itself():
    def distinct(kind):
        """How many different pictures 2 workers make of one and the same image, 64 times in 3 epochs."""
        images = kind(ASSETS, transform=train_transform())
        images.data[:] = images.data[:1]
        pictures = torch.cat([torch.cat([b for b, _ in DataLoader(Subset(images, range(64)), 8, num_workers=2)])
                              for epoch in range(3) if images.set_epoch(epoch) is None])
        return len({picture.numpy().tobytes() for picture in pictures})

    assert distinct(AlbumentationsCIFAR10) > 150  # of 192; half are not warped, and of their 162 crops some coincide
    assert distinct(Plain) <= 64  # what this test is there to tell apart


def test_running_workers_see_the_next_epoch():
    images = AlbumentationsCIFAR10(ASSETS, transform=train_transform())
    loader = DataLoader(Subset(images, range(16)), 8, num_workers=2, persistent_workers=True)
    first = torch.cat([batch for batch, _ in loader])
    images.set_epoch(1)
    second = torch.cat([batch for batch, _ in loader])
    images.set_epoch(0)
    again = torch.cat([batch for batch, _ in loader])
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_batch_loader_visits_every_image_once_in_an_order_of_its_own_each_epoch():
    images = AlbumentationsCIFAR10(ASSETS, train=False, transform=dataset.test_transform())
    images.targets = list(range(500))  # so that a target says which image it is
    loader = BatchLoader(images, 150, shuffle=True)
    orders = []
    for epoch in (1, 2, 1):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert [len(targets) for _, targets in batches] == [150, 150, 150, 50] and len(loader) == 4
        orders.append(torch.cat([targets for _, targets in batches]).tolist())
        assert sorted(orders[-1]) == list(range(500))
    assert orders[0] == orders[2] != orders[1]
    pictures, targets = next(iter(BatchLoader(images, 500, shuffle=False)))
    expected = torch.stack([images[i][0] for i in range(500)])
    assert targets.tolist() == list(range(500)) and (pictures - expected).abs().max() < 1e-5
    assert [len(targets) for _, targets in BatchLoader(images, 499, shuffle=True)] == [499], "one image is no batch"
    with pytest.raises(ValueError, match="batch_size >= 1"):
        BatchLoader(images, -1, shuffle=True)
    for wrong in (AlbumentationsCIFAR10(ASSETS, train=False), Subset(images, range(9))):
        with pytest.raises(ValueError, match=f"expected AlbumentationsImages with a transform, found {type(wrong).__name__} without"):
            BatchLoader(wrong, 10, shuffle=True)
    large = np.zeros((4, 64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match=r"expected images of \(32, 32\), found \(64, 64\)"):  # a DataLoader's would be scaled
        BatchLoader(AlbumentationsImages(large, [0] * 4, CLASSES, train_transform()), 2, shuffle=True)
    kept = AlbumentationsImages(large, [0] * 4, CLASSES, A.Compose(list(dataset.test_transform())))
    assert next(iter(BatchLoader(kept, 2, shuffle=True)))[0].shape == (2, 3, 64, 64)


@pytest.mark.parametrize("views", [2, None])
def test_the_teacher_is_asked_once_about_each_view_and_its_answers_follow_the_pictures(views):
    images, asked = AlbumentationsCIFAR10(ASSETS, transform=train_transform()), []

    def teacher(pictures):
        asked.append(len(pictures))
        return pictures.mean((2, 3))

    loader, seen = BatchLoader(images, 150, shuffle=True, teacher=teacher, views=views), []
    for epoch in range(1, 5):
        loader.set_epoch(epoch)
        pictures, targets, answers = (torch.cat(parts) for parts in zip(*loader))
        torch.testing.assert_close(answers, pictures.mean((2, 3)))
        seen.append((targets.tolist(), answers.sort(0).values))
    assert sum(asked) == 2000 * (views or 4)
    assert all(seen[0][0] != targets for targets, _ in seen[1:]), "the order is new in each epoch"
    same = [torch.equal(seen[0][1], answers) for _, answers in seen]
    assert same == [True, False, bool(views), False]
    alone = BatchLoader(images, 150, shuffle=False)
    for epoch in (1, 2):  # those that a teacher has learnt from in its epochs come again
        alone.set_epoch(epoch)
        own = torch.cat([pictures.mean((2, 3)) for pictures, _ in alone])
        torch.testing.assert_close(own.sort(0).values, seen[epoch - 1][1])
    loader.set_epoch(1)
    begun = iter(loader)
    next(begun)
    loader.set_epoch(2)  # what has begun goes on with the answers that belong to its pictures
    pictures, _, answers = (torch.cat(parts) for parts in zip(*begun))
    torch.testing.assert_close(answers, pictures.mean((2, 3)))
    asked.clear()
    loader.teacher = lambda pictures: -teacher(pictures)
    pictures, _, answers = next(iter(loader))
    torch.testing.assert_close(answers, -pictures.mean((2, 3)))
    assert sum(asked) == 2000 and len(loader.taught) == 1, "another teacher is asked anew, the first one's answers are gone"


def test_damaged_file_is_named_and_nothing_deleted(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"not the published bytes")
    with pytest.raises(ValueError, match="data_batch_1"):
        find_cifar10(tmp_path)
    with pytest.raises(ValueError, match="data_batch_1"):
        AlbumentationsCIFAR10(tmp_path)
    assert (folder / "data_batch_1").read_bytes() == b"not the published bytes"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Two sources, on loopback, that have nothing: requests get a 404."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(dataset, "SOURCES", tuple(f"http://127.0.0.1:{httpd.server_port}/{name}" for name in ("one", "two")))
    yield
    httpd.shutdown()
    httpd.server_close()


def test_without_data_or_network_the_sample_or_one_line(server, tmp_path, capsys):
    root = tmp_path / "nowhere"
    assert find_cifar10(root) == ASSETS
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("Error 404" in line for line in lines[:2]) and "embedded sample" in lines[2]
    with pytest.raises(FileNotFoundError) as error:
        find_cifar10(root, "full")
    message = str(error.value)
    assert "\n" not in message and message.count("Error 404") == 2 and "put the folder cifar-10-batches-py" in message
    assert find_cifar10(root, "sample") == ASSETS
    with pytest.raises(ValueError, match="'some'"):
        find_cifar10(root, "some")


def test_test_transform_normalises():
    image = AlbumentationsCIFAR10(ASSETS).data[7]
    expected = (image / 255.0 - MEAN) / STD
    found = dataset.test_transform()(image=image)["image"]
    assert found.dtype == torch.float32 and found.shape == (3, 32, 32)
    assert np.abs(found.numpy() - expected.transpose(2, 0, 1)).max() < 1e-6
    with pytest.raises(KeyError, match="named arguments"):  # Albumentations' own
        dataset.test_transform()(image)
