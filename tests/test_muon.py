"""Muon against its definition and against torch's SGD, and the plan of a run with it."""

import copy
import pickle

import pytest
import torch
from torch import nn

from model import Net, Teacher
from muon import Muon, fix_norms, one_cycle, orthogonalize, parameter_groups, plan


def polynomial_of_singular_values(update):
    """Jordan's polynomial, five times, on the singular values instead of on the matrix."""
    left, values, right = torch.linalg.svd(update.flatten(1), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values @ right).view_as(update)


def test_orthogonal_step_is_nesterov_momentum_through_the_polynomial():
    torch.manual_seed(0)
    shapes = (6, 4, 3, 3), (12, 6, 1, 1), (6, 4, 3, 3)  # two banks of one shape are not neighbours
    banks = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    expected = [bank.detach().clone() for bank in banks]
    momenta = [torch.zeros_like(bank) for bank in expected]
    muon = Muon(banks, lr=0.1)
    for _ in range(3):
        for i, bank in enumerate(banks):
            bank.grad = torch.randn_like(bank)
            momenta[i] = 0.95 * momenta[i] + bank.grad
            update = polynomial_of_singular_values(bank.grad + 0.95 * momenta[i])
            at_its_norm = expected[i] * len(bank) ** 0.5 / expected[i].norm()
            expected[i] = at_its_norm - 0.1 * update
        muon.step()
    for bank, value in zip(banks, expected):
        torch.testing.assert_close(bank.detach(), value, rtol=0, atol=1e-6)


def test_orthogonalized_updates_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((40, 40, 3, 3), (48, 12, 1, 1), (10, 48)):
        (update,) = orthogonalize([100 * torch.randn(shape)])
        values = torch.linalg.svdvals(update.flatten(1))
        assert update.shape == shape
        assert 0.6 < values.min() and values.max() < 1.3  # Jordan's steps end near 1, not at it
    assert orthogonalize([torch.zeros(4, 4)])[0].eq(0).all()


def test_norms_are_fixed_and_zeros_stay():
    banks = [3 * torch.ones(9, 2, 2, 2), torch.zeros(4, 4)]
    fix_norms(banks)
    assert banks[0].norm().item() == pytest.approx(3)
    assert banks[1].eq(0).all()


def test_other_groups_are_trained_as_by_sgd():
    torch.manual_seed(0)
    vector, unused = nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(2))
    twin = nn.Parameter(vector.detach().clone())
    before = unused.detach().clone()
    muon = Muon([vector, unused], lr=0.2, momentum=0.9, weight_decay=0.01, orthogonal=False)
    sgd = torch.optim.SGD([twin], lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.01)
    for _ in range(4):
        vector.grad = torch.randn_like(vector)
        twin.grad = vector.grad.clone()
        muon.step()
        sgd.step()
    torch.testing.assert_close(vector, twin)
    assert torch.equal(unused, before), "a parameter without a gradient stays"


def test_step_returns_the_loss_of_its_closure():
    weight = nn.Parameter(torch.ones(2))
    muon = Muon([weight], lr=0.1, momentum=0.0, orthogonal=False)

    def closure():
        muon.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert muon.step(closure).item() == 2
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.8))
    assert muon.step() is None


def test_a_vector_among_filter_banks_is_refused():
    bank, vector = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(7))
    message = "expected real numbers in 2 dimensions or more, found a vector: put it into a group with"
    muon = Muon([bank], lr=0.1)
    with pytest.raises(ValueError, match=message):
        muon.add_param_group({"params": [vector]})
    assert len(muon.param_groups) == 1
    muon.add_param_group({"params": [vector], "orthogonal": False})
    with pytest.raises(ValueError, match="expected real numbers .* found complex numbers"):
        Muon([nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))], lr=0.1)


@pytest.mark.parametrize(
    "options", [{"lr": -1}, {"lr": float("nan")}, {"lr": 1, "momentum": 1}, {"lr": 1, "weight_decay": -1}]
)
def test_options_out_of_range_are_refused_in_every_group(options):
    message = "expected lr >= 0, 0 <= momentum < 1 and weight_decay >= 0, found "
    bank, other = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    with pytest.raises(ValueError, match=message):
        Muon([bank], **options)
    with pytest.raises(ValueError, match=message):
        Muon([{"params": [bank]}, {"params": [other], **options}], lr=0.1)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(9, 4, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="expected dense gradients, found a sparse one: give the"):
        Muon(table.parameters(), lr=0.1).step()


def bank_with_gradient(gradient, *, weight=0.5, dtype=torch.float32):
    bank = nn.Parameter(torch.full(gradient.shape, weight, dtype=dtype))
    bank.grad = gradient.to(dtype)
    return bank


@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (6, 4, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weights_of_zeros_and_gradients_of_any_size_stay_finite(dtype, shape):
    torch.manual_seed(0)
    for weight in (0, 0.5):
        for size in (0, 1e-30, 1e-7, 1, 100):
            bank = bank_with_gradient(size * torch.randn(shape), weight=weight, dtype=dtype)
            Muon([bank], lr=0.1).step()
            assert bank.isfinite().all() and bank.dtype == dtype
    assert bank.norm().item() == pytest.approx(shape[0] ** 0.5, rel=0.2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_spoils_no_other_parameter(value):
    torch.manual_seed(0)
    good, bad = bank_with_gradient(torch.randn(8, 8)), bank_with_gradient(torch.randn(8, 8))
    bad.grad[0, 0] = value
    Muon([good, bad], lr=0.1).step()
    assert good.isfinite().all() and not bad.isfinite().all()


@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_learning_rate_in_a_tensor_is_that_number(orthogonal):
    torch.manual_seed(0)
    gradient, results = torch.randn(4, 4), []
    for lr in (0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.float64)):
        bank = bank_with_gradient(gradient)
        Muon([bank], lr=lr, orthogonal=orthogonal).step()
        results.append(bank.detach())
    assert all(torch.equal(result, results[0]) for result in results)


def test_banks_of_one_shape_may_be_on_several_devices():
    updates = orthogonalize([torch.randn(4, 4), torch.empty(4, 4, device="meta")])
    assert [update.device.type for update in updates] == ["cpu", "meta"]


def test_a_state_that_was_saved_continues_alike():
    torch.manual_seed(0)
    shapes = (4, 3, 3, 3), (5,)
    original = [nn.Parameter(torch.randn(shape)) for shape in shapes]

    def muon_for(parameters):
        bank, vector = parameters
        return Muon([{"params": [bank]}, {"params": [vector], "orthogonal": False}], lr=0.1)

    muon = muon_for(original)
    for p in original:
        p.grad = torch.randn_like(p)
    muon.step()
    copies = [nn.Parameter(p.detach().clone()) for p in original]
    resumed = muon_for(copies)
    resumed.load_state_dict(copy.deepcopy(muon.state_dict()))
    for p in original:
        p.grad = torch.randn_like(p)
    duplicates = [copy.deepcopy(muon), pickle.loads(pickle.dumps(muon))]  # with parameters of their own
    muon.step()
    for optimizer in (resumed, *duplicates):
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        for p, other in zip(original, stepped):
            other.grad = p.grad.clone()
        optimizer.step()
        assert all(torch.equal(p, other) for p, other in zip(original, stepped))
    resumed.zero_grad()
    assert all(p.grad is None for p in copies)


def test_a_state_has_the_precision_of_its_parameters_after_loading():
    bank = bank_with_gradient(torch.randn(4, 4), dtype=torch.bfloat16)
    muon = Muon([bank], lr=0.1)
    muon.step()
    other = Muon([bank], lr=0.3)
    other.load_state_dict(muon.state_dict())
    assert other.state[bank]["momentum"].dtype == torch.bfloat16
    assert torch.equal(other.state[bank]["momentum"], muon.state[bank]["momentum"])
    assert other.param_groups[0]["lr"] == 0.1


def test_hooks_run_before_and_after_a_step():
    muon, calls = Muon([bank_with_gradient(torch.randn(4, 4))], lr=0.1), []
    muon.register_step_pre_hook(lambda *arguments: calls.append("before"))
    muon.register_step_post_hook(lambda *arguments: calls.append("after"))
    muon.step()
    assert muon.step(closure=lambda: calls.append("closure") or 2) == 2
    assert calls == ["before", "after", "before", "closure", "after"]


def test_the_order_in_memory_and_its_change_do_not_matter():
    torch.manual_seed(0)
    shapes = (8, 8, 3, 3), (8, 1, 3, 3), (12, 8, 1, 1), (6, 8), ()
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(4)]

    def weights_after(*orders):
        torch.manual_seed(1)
        parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        sgd = {"params": parameters[3:], "orthogonal": False, "weight_decay": 0.1}
        muon = Muon([{"params": parameters[:3]}, sgd], lr=0.1)
        for order, step in zip(orders, gradients):
            for p, gradient in zip(parameters, step):
                p.data = p.data.contiguous(memory_format=order if p.ndim == 4 else torch.contiguous_format)
                p.grad = gradient.clone()
            muon.step()
        return [p.detach().contiguous() for p in parameters]

    plain, last = torch.contiguous_format, torch.channels_last
    expected = weights_after(plain, plain, plain, plain)
    torch.testing.assert_close(weights_after(plain, plain, last, last), expected)
    torch.testing.assert_close(weights_after(last, last, last, last), expected)


# ---------------------------------------------------------------- the plan of a run


def test_filter_banks_other_filters_and_norms_are_told_apart():
    net = Net()
    banks, filters, norms = parameter_groups(net)
    trained = {id(p): name for name, p in net.named_parameters()}
    assert sorted(trained) == sorted(id(p) for p in [*banks, *filters, *norms])
    depthwise = [f"stage{i}.separable.depthwise.weight" for i in (1, 2, 3, 4)]
    assert [trained[id(p)] for p in filters] == [*depthwise, "classifier.weight"]
    assert all("norm" in trained[id(p)] for p in norms)
    assert sum(p.numel() for p in banks) > 0.97 * sum(p.numel() for p in net.parameters())


def test_frozen_parameters_are_not_planned_for():
    teacher = Teacher(torch.zeros(24, 3, 2, 2))
    banks, filters, norms = parameter_groups(teacher)
    assert len(banks) == 6 and filters == [teacher.classifier.weight]
    assert len([*banks, *filters, *norms]) == len(list(teacher.parameters())) - 1


def test_learning_rate_rises_to_its_peak_and_falls_to_zero():
    assert [one_cycle(share) for share in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0.04, 0.52, 1, 0.5, 0])
    assert one_cycle(1.1) == 0


def test_plan_gives_each_group_its_options_and_one_schedule():
    net = Net()
    optimizer, scheduler = plan(net, 10)
    options = [(g["orthogonal"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups]
    assert options == [(True, 0.95, 0), (False, 0.9, 5e-4), (False, 0.9, 0)]
    for group, parameters in zip(optimizer.param_groups, parameter_groups(net)):
        assert [id(p) for p in group["params"]] == [id(p) for p in parameters]
    rates = []
    for _ in range(11):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx([0.04 * 0.015, 0.04 * 0.2, 0.04 * 0.2])
    assert rates[2] == pytest.approx([0.015, 0.2, 0.2])
    assert rates[10] == pytest.approx([0, 0, 0])


def test_plans_leave_learning_rates_in_tensors_as_they_are():
    rates = {"learning_rate": torch.tensor(0.015), "sgd_learning_rate": torch.tensor([0.2])}
    for _ in range(2):  # a teacher's plan, and then a student's
        optimizer, scheduler = plan(Net(), 10, **rates)
        optimizer.step()
        scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0078, 0.104, 0.104])
    assert rates["learning_rate"] == torch.tensor(0.015)


def test_plan_takes_other_options():
    options = {"learning_rate": 0.01, "sgd_learning_rate": 0.1, "weight_decay": 1e-3}
    optimizer, scheduler = plan(Net(), 10, **options)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.01, 0.1, 0.1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 1e-3, 0]
    assert [scheduler.lr_lambdas[0](step) for step in (0, 2)] == pytest.approx([0.04, 1])
