"""What fit, train and test refuse: in one line, before anything is trained."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

import hardware
import training_utils
from training_utils import fit, train


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))


def batches(count=3):
    return [(torch.randn(8, 1, 1, 4), torch.arange(8) % 3) for _ in range(count)]


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def refused(error, message, function, *arguments, **options):
    with pytest.raises(error, match=message) as raised:
        function(*arguments, **options)
    text = str(raised.value)
    assert text.startswith("expected ") and " found " in text and len(text.splitlines()) == 1


def refused_by_all(error, message, batch, model=None):
    """Refused by train, by test, and by fit with either."""
    model = model or network()
    refused(error, message, train, model, [batch], sgd(model))
    refused(error, message, training_utils.test, model, [batch])
    for loaders in ([batch], batches()), (batches(), [batch]):
        refused(error, message, fit, model, *loaders, sgd(model), epochs=1)


# ---------------------------------------------------------------- optimizers and schedulers


def test_an_optimizer_of_another_model_is_refused():
    model = network()
    for function, options in ((train, {}), (fit, {"epochs": 1})):
        loaders = [batches()] * (1 + bool(options))
        message = "found 2 of 2 that are not the model's: make it after"
        refused(ValueError, message, function, model, *loaders, sgd(network()), **options)


def test_a_layer_that_was_replaced_after_the_optimizer_was_made_is_noticed():
    model = network()
    optimizer = sgd(model)
    model[1] = nn.Linear(4, 3)
    refused(ValueError, "again if a layer is replaced", fit, model, batches(), batches(), optimizer, epochs=1)


def test_an_optimizer_of_frozen_parameters_is_refused():
    model = network()
    model[1].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([model[1].bias], lr=0.1)
    refused(ValueError, "found all frozen", fit, model, batches(), batches(), optimizer, epochs=1)


@pytest.mark.parametrize("later", [False, True], ids=["alone", "after a scheduler"])
def test_steps_that_need_an_argument_are_refused(later):
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())
    if later:
        LambdaLR(optimizer, lambda step: 1.0)  # it wraps the optimizer's step
    message = "found LBFGS, whose step needs closure"
    refused(TypeError, message, fit, model, batches(), batches(), optimizer, epochs=1)
    optimizer = sgd(model)
    scheduler = ReduceLROnPlateau(optimizer)
    message = "found ReduceLROnPlateau, whose step needs metrics"
    refused(TypeError, message, fit, model, batches(), batches(), optimizer, scheduler, epochs=1)
    refused(TypeError, message, train, model, batches(), optimizer, scheduler)


def test_optional_arguments_of_a_step_are_no_fault():
    class Optimizer(torch.optim.SGD):
        def step(self, *closures, **options):
            return super().step()

    class Schedule(LRScheduler):
        def get_lr(self):
            return self.base_lrs

    model = network()
    optimizer = Optimizer(model.parameters(), lr=0.1)
    assert fit(model, batches(), batches(), optimizer, Schedule(optimizer), epochs=1)


def test_a_scheduler_of_another_optimizer_is_refused():
    model = network()
    scheduler = LambdaLR(sgd(model), lambda step: 1.0)
    message = "expected a scheduler of this optimizer, found another's"
    refused(ValueError, message, fit, model, batches(), batches(), sgd(model), scheduler, epochs=1)


def test_a_scheduler_that_would_end_before_the_run_is_refused():
    model = network()
    optimizer = sgd(model)
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=5)
    message = "expected a scheduler for 6 steps, one a batch, found 5"
    refused(ValueError, message, fit, model, batches(3), batches(), optimizer, scheduler, epochs=2)


# ---------------------------------------------------------------- batches and logits


class Output(nn.Module):
    """Logits inside an object, as transformers returns them."""

    def forward(self, logits):
        return type("ImageClassifierOutput", (), {"logits": logits})()


IMAGES, TARGETS = torch.randn(8, 1, 1, 4), torch.arange(8) % 3
WRONG_KINDS = {
    "a dict": ({"image": IMAGES, "label": TARGETS}, r"found dict: return a tuple in collate_fn"),
    "a tensor": (IMAGES, "found Tensor"),
    "images alone": ((IMAGES,), r"found \(Tensor\)"),
    "a list of numbers": ((IMAGES, TARGETS.tolist()), r"found \(Tensor, list\)"),
    "uint8 images": (((IMAGES * 9).byte(), TARGETS), "expected float images, found uint8: give the data set"),
}


@pytest.mark.parametrize("batch, message", WRONG_KINDS.values(), ids=WRONG_KINDS)
def test_batches_of_other_kinds_are_refused(batch, message):
    refused_by_all(TypeError, message, batch)


def test_a_model_that_returns_no_tensor_is_refused():
    model = nn.Sequential(*network(), Output())
    refused_by_all(TypeError, "found ImageClassifierOutput: pick its tensor", (IMAGES, TARGETS), model)


WRONG_SHAPES = {
    "more targets than images": (IMAGES, torch.arange(40) % 3),
    "a column of targets": (IMAGES, TARGETS[:, None]),
    "one-hot integers": (IMAGES, torch.eye(3, dtype=int)[TARGETS]),
    "numbers to be predicted": (IMAGES, TARGETS.float()),
    "probabilities of other classes": (IMAGES, torch.full((8, 4), 0.25)),
}


@pytest.mark.parametrize("batch", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_targets_of_other_shapes_are_refused(batch):
    refused_by_all(ValueError, r"expected .*targets?.*\(8, .*: (reshape|give)", batch)


def test_maps_of_logits_are_refused():
    model = nn.Conv2d(1, 3, 1)
    refused_by_all(ValueError, r"found \(8, 3, 1, 4\) and", (IMAGES, torch.zeros(8, 1, 4, dtype=int)), model)


def test_a_third_part_that_is_no_teacher_s_answer_is_refused_in_training_and_ignored_in_tests():
    model = network()
    for third in (torch.arange(8), [f"{i}.png" for i in range(8)]):
        batches = [(IMAGES, TARGETS, third)]
        refused(TypeError, "expected .*third part|found .*list", train, model, batches, sgd(model))
        training_utils.test(model, batches)


def test_probabilities_are_learnt_and_their_largest_is_right(monkeypatch):
    monkeypatch.setattr(hardware, "precision", lambda device: torch.float32)
    model = network()
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    soft = torch.tensor([[0.6, 0.4, 0.0]] * 8)  # as MixUp makes them
    loss, accuracy = train(model, [(IMAGES, soft)], sgd(model))
    assert (loss, accuracy) == (pytest.approx(torch.tensor(3.0).log().item()), 100)
    # The gradient of the cross-entropy is softmax minus probabilities.
    assert model[1].bias.tolist() == pytest.approx([0.1 * (share - 1 / 3) for share in (0.6, 0.4, 0.0)])
    assert training_utils.test(model, [(IMAGES, soft.double())])[1] <= 100


@pytest.mark.parametrize(
    "targets, message",
    [
        (torch.tensor([0, -100, 2]), "classes from 0 on, found -100"),
        (torch.ones(3, 3), "probabilities, found rows that are none"),
        (torch.tensor([[2.0, -1.0, 0.0]] * 3), "probabilities, found rows that are none"),
    ],
)
def test_targets_that_would_give_a_wrong_loss_are_refused(targets, message):
    refused_by_all(ValueError, message, (torch.randn(3, 1, 1, 4), targets))


def test_logits_of_a_teacher_are_refused():
    batch = torch.randn(3, 1, 1, 4), torch.arange(3), torch.randn(3, 3)
    model = network()
    refused(ValueError, "probabilities, found rows that are none", train, model, [batch], sgd(model))


def test_a_folder_in_place_of_a_file_stays_as_it_is(tmp_path):
    (tmp_path / "mine.txt").touch()
    model = network()
    for name in ("checkpoint", "history_file"):
        for resume in (True, False):
            options = {name: tmp_path, "epochs": 1, "resume": resume}
            message = "a file, found the folder"
            refused(IsADirectoryError, message, fit, model, batches(), batches(), sgd(model), **options)
    assert (tmp_path / "mine.txt").exists()


def test_one_file_for_checkpoint_and_history_is_refused(tmp_path):
    model = network()
    files = {"checkpoint": tmp_path / "a", "history_file": str(tmp_path / "a")}
    refused(ValueError, "for both", fit, model, batches(), batches(), sgd(model), epochs=1, **files)
