"""Which run it is: what changes a result changes the description, and nothing else does."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from identity import complete_recipe, describe, digest


def recipe_of(change=lambda parts: None, **changes):
    """The recipe of a small run, after a change of one of its parts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parts = {
        "recipe": {"data": "ours"},
        "model": model,
        "optimizer": optimizer,
        "scheduler": LambdaLR(optimizer, changes.pop("rate", lambda step: 1.0)),
        "loaders": [[0] * 4, [0] * 2, None],
        "epochs": 3,
        "ema_decay": 0.9,
        "seed": 0,
    }
    change(parts)
    return complete_recipe(**parts | changes)


def trained_once(parts):
    for p in parts["model"].parameters():
        p.grad = torch.zeros_like(p)
    parts["optimizer"].step()


def steps_of_schedule(parts):
    parts["optimizer"].step()  # without gradients it changes nothing
    parts["scheduler"].step()


def next_float(layer):
    layer.bias.data = torch.nextafter(layer.bias.data, torch.tensor(9.0))


CHANGES = {
    "the last bit of a weight": ("starting weights", {"change": lambda parts: next_float(parts["model"][0])}),
    "a running mean": ("starting weights", {"change": lambda parts: parts["model"][1].running_mean.add_(1)}),
    "momentum at the start": ("start of the optimizer", {"change": trained_once}),
    "a schedule half done": ("start of the optimizer", {"change": steps_of_schedule}),
    "a frozen norm": ("modules in evaluation mode", {"change": lambda parts: parts["model"][1].eval()}),
    "a function of the schedule": ("schedule", {"rate": lambda step: 0.5 if step == 12 else 1.0}),
    "torch's seed": ("torch's seed", {"seed": 1}),
    "another test": ("loaders", {"loaders": [[0] * 4, [0] * 3, None]}),
    "other statistics": ("statistics", {"loaders": [[0] * 4, [0] * 2, [0]]}),
}


@pytest.mark.parametrize("key, options", CHANGES.values(), ids=CHANGES)
def test_all_that_changes_a_result_is_part_of_the_recipe(key, options):
    before, after = recipe_of(), recipe_of(**options)
    assert before == recipe_of()
    assert key in [name for name in before if before[name] != after[name]]


def test_a_batch_size_is_part_of_the_recipe():
    images = torch.utils.data.TensorDataset(torch.zeros(10, 1))
    loaders = [[torch.utils.data.DataLoader(images, size), [0], None] for size in (5, 6)]
    first, second = (recipe_of(loaders=three) for three in loaders)
    assert {key for key in first if first[key] != second[key]} == {"loaders"}


def test_a_digest_does_not_depend_on_the_memory_layout():
    images = torch.randn(2, 3, 4, 4)
    assert digest({"w": images}) == digest({"w": images.to(memory_format=torch.channels_last)})
    assert len({digest(x) for x in (images, images.bfloat16(), images.view(3, 2, 4, 4))}) == 3
    assert digest([torch.tensor(True), torch.zeros(0)]) != digest([torch.tensor(False), torch.zeros(0)])


def test_a_learning_rate_in_a_tensor_is_described_to_the_last_digit():
    texts = [describe(torch.optim.SGD([weight()], torch.tensor(lr)), None) for lr in (0.1, 0.1000001)]
    assert texts[0] != texts[1]
    assert "tensor" not in str(texts)


def test_the_rate_counts_without_a_schedule_even_if_there_was_one():
    optimizers = [torch.optim.SGD([weight()], 0.1) for _ in range(2)]
    for optimizer, rate in zip(optimizers, (0.1, 0.2)):
        LambdaLR(optimizer, lambda step: 1.0)
        optimizer.param_groups[0]["lr"] = rate
    assert describe(optimizers[0], None) != describe(optimizers[1], None)


def test_a_function_that_ends_with_its_part_of_the_schedule_is_described():
    optimizer = torch.optim.SGD([weight()], 0.1)
    warm_up = LambdaLR(optimizer, lambda step: [0.1, 0.5, 1.0][step])
    assert describe(optimizer, SequentialLR(optimizer, [warm_up, LinearLR(optimizer)], [2]))


def weight():
    return nn.Parameter(torch.zeros(1))


def test_schedules_of_several_parts_are_told_apart():
    def describe_schedule(warm_up, length):
        optimizer = torch.optim.SGD([weight()], lr=1.0)
        parts = [LinearLR(optimizer, 0.1, total_iters=warm_up), CosineAnnealingLR(optimizer, length)]
        schedule = SequentialLR(optimizer, parts, [5])
        before = describe(optimizer, schedule)
        for _ in range(7):
            optimizer.step()
            schedule.step()
        assert describe(optimizer, schedule) == before, "steps do not change it"
        return before

    assert describe_schedule(5, 10) == describe_schedule(5, 10)
    assert describe_schedule(5, 10) != describe_schedule(5, 20)
    assert describe_schedule(5, 10) != describe_schedule(4, 10)


def test_a_momentum_that_cycles_is_not_part_of_the_description():
    optimizer = torch.optim.SGD([weight()], lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=10)
    before = describe(optimizer, schedule)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert describe(optimizer, schedule) == before


def test_without_a_schedule_the_learning_rate_is_described():
    first, second = (describe(torch.optim.SGD([weight()], lr), None) for lr in (0.1, 0.2))
    assert "'lr': 0.1" in first["parameters 0"]
    assert first != second


def test_frozen_parameters_are_described():
    first, second = weight(), weight().requires_grad_(False)
    assert describe(torch.optim.SGD([first], 0.1), None) != describe(torch.optim.SGD([second], 0.1), None)


def test_a_function_is_described_without_its_address():
    class Schedule(LRScheduler):
        def __init__(self, optimizer):
            self.rule = lambda step: 1.0
            super().__init__(optimizer)

        def get_lr(self):
            return [self.rule(self.last_epoch)]

    first, second = (torch.optim.SGD([weight()], 0.1) for _ in range(2))
    assert describe(first, Schedule(first)) == describe(second, Schedule(second))


def test_a_function_of_the_schedule_is_not_called():
    calls = []

    def rate(step):
        calls.append(step)
        return 1.0

    optimizer = torch.optim.SGD([weight()], 0.1)
    schedule = LambdaLR(optimizer, rate)
    describe(optimizer, schedule)
    assert calls == [0], "the scheduler's own call"


def test_what_a_function_encloses_is_described():
    def decay(factor):
        return lambda step: factor**step

    def twice(rate):
        return lambda step: 2 * rate(step)

    optimizer = torch.optim.SGD([weight()], 0.1)
    rates = decay(0.9), decay(0.8), twice(decay(0.9)), twice(decay(0.8)), decay(0.9)
    texts = [describe(optimizer, LambdaLR(optimizer, rate))["schedule"] for rate in rates]
    assert len(set(texts)) == 4 and texts[0] == texts[-1]


def test_what_a_function_uses_of_its_module_is_described():
    def schedule(start=0.1, shape="share + 0", unused=0):
        module = {}
        lines = [f"START, UNUSED = {start}, {unused}", f"def rise(share): return START + ({shape})"]
        exec("\n".join([*lines, "rate = lambda step: [rise(x) for x in [step]][0]"]), module)
        optimizer = torch.optim.SGD([weight()], 0.1)
        return describe(optimizer, LambdaLR(optimizer, module["rate"]))["schedule"]

    assert schedule() == schedule(unused=1)
    assert len({schedule(), schedule(start=0.2), schedule(shape="share * 2")}) == 3


def test_functions_that_use_each_other_are_described():
    module = {}
    exec("def odd(n): return n and even(n - 1)\ndef even(n): return not n or odd(n - 1)", module)
    optimizer = torch.optim.SGD([weight()], 0.1)
    assert "functions" in describe(optimizer, LambdaLR(optimizer, module["even"]))["schedule"]
