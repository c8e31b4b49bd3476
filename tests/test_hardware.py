"""Mixed precision, compilation and CUDA graphs: faster, with the same numbers."""

import itertools

import pytest
import torch
from torch import nn

import hardware
from batches import BatchLoader
from dataset import ASSETS, AlbumentationsCIFAR10, train_transform
from hardware import GraphedStep, compiled, evaluation_mode, forward, split_for_cache
from model import Net
from muon import Muon
from training_utils import gradient_step, train


@pytest.mark.parametrize("half_seconds, fast", [(0.6, True), (0.8, False)])
def test_a_cpu_is_fast_in_bfloat16_if_that_saves_three_tenths(half_seconds, fast, monkeypatch):
    seconds = itertools.cycle([half_seconds, 1.0, 9.0, 9.0])  # every other round meets a busy machine
    monkeypatch.setattr(hardware.timeit, "timeit", lambda *args, **kwargs: next(seconds))
    assert hardware.cpu_is_fast_in_bfloat16() == fast


def test_bfloat16_is_measured_on_one_thread(monkeypatch):
    threads = []
    monkeypatch.setattr(
        hardware.timeit, "timeit", lambda *args, **kwargs: threads.append(torch.get_num_threads()) or 1.0
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    hardware.cpu_is_fast_in_bfloat16()
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert set(threads) == {1}
    assert after == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_float32_whatever_the_precision(dtype, monkeypatch):
    monkeypatch.setattr(hardware, "precision", lambda device: dtype)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    inside = []
    net[0].register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    assert forward(net, torch.zeros(2, 3, 8, 8)).dtype == torch.float32
    assert inside == [dtype]


def test_a_float64_network_stays_float64(monkeypatch):
    monkeypatch.setattr(hardware, "precision", lambda device: torch.float32)
    net = nn.Flatten().double()
    assert forward(net, torch.zeros(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64


def test_evaluation_mode_ends_with_each_module_s_own_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5).eval(), nn.BatchNorm1d(2))
    with pytest.raises(KeyboardInterrupt), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyboardInterrupt
    assert [module.training for module in (model, *model)] == [True, True, False, True]


def test_a_large_batch_is_split_on_a_cpu():
    assert [len(part) for part in split_for_cache(torch.zeros(250, 1))] == [100, 100, 50]


# ---------------------------------------------------------------- compilation


def fake_compiler(error=None):
    """A torch.compile whose network draws random numbers, and runs as the model does or raises the error."""

    def compile(model, **options):
        def network(images):
            torch.rand(3)
            if error:
                raise error
            return model(images)

        return network

    return compile


@pytest.mark.parametrize("error", [None, UnboundLocalError("as torch 2.11 raised on the CPU")], ids=repr)
def test_trying_the_compiler_changes_neither_weights_nor_random_state(error, monkeypatch):
    monkeypatch.setattr(torch, "compile", fake_compiler(error))
    net = Net()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random_state = torch.get_rng_state()
    compiled(net, torch.randn(2, 3, 32, 32, generator=torch.Generator()))
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_compiler_that_fails_is_named_and_not_used(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", fake_compiler(UnboundLocalError()))
    net = Net()
    assert compiled(net, torch.zeros(2, 3, 32, 32)) is net
    message = "torch.compile fails here (UnboundLocalError): continuing without it\n"
    assert capsys.readouterr().out == message


def test_a_compiler_that_fails_in_the_backward_pass_is_not_used(monkeypatch):
    def fail(gradient):
        raise UnboundLocalError

    def compile(model, **options):
        def network(images):
            logits = model(images)
            logits.register_hook(fail)
            return logits

        return network

    monkeypatch.setattr(torch, "compile", compile)
    net = Net()
    assert compiled(net, torch.zeros(2, 3, 32, 32)) is net


def test_batches_of_other_shapes_run_uncompiled(monkeypatch):
    shapes = []
    monkeypatch.setattr(
        torch, "compile", lambda model, **options: lambda images: shapes.append(images.shape) or model(images)
    )
    small, large = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 32, 32)
    network = compiled(Net(), small, large)
    assert shapes == [small.shape, large.shape]  # the trials
    for images in (large, torch.zeros(3, 3, 32, 32), small, torch.zeros(2, 3, 24, 24)):
        assert network(images).shape == (len(images), 10)
    assert shapes[2:] == [large.shape, small.shape]


def test_compiled_for_a_test_means_without_gradients(monkeypatch, capsys):
    needs_gradients = []

    def compile(model, **options):
        return lambda images: needs_gradients.append(torch.is_grad_enabled()) or model(images)

    monkeypatch.setattr(torch, "compile", compile)
    images = torch.zeros(2, 3, 32, 32)
    compiled(Net().eval(), images)
    compiled(Net(), images)
    assert needs_gradients == [False, True]
    assert capsys.readouterr().out.count("s for the test step") == 1


def test_compiled_network_has_the_logits_and_gradients_of_the_model(monkeypatch):
    monkeypatch.setattr(hardware, "precision", lambda device: torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(Net().stage1, nn.Flatten()).to(memory_format=torch.channels_last)
    images, fewer_images = torch.randn(8, 3, 16, 16), torch.randn(3, 3, 16, 16)
    network = compiled(model, images)
    if network is model:
        pytest.skip("the compiler fails with this version of torch")
    for batch in (images, fewer_images):  # the second runs uncompiled
        results = []
        for way in (model, network):
            model.zero_grad()
            logits = forward(way, batch)
            logits.square().mean().backward()
            results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- CUDA graphs


def fused_sgd(net):
    return torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9, fused=True)


def muon(net):
    norms = {"params": [p for p in net.parameters() if p.ndim == 1], "lr": 1e-4, "orthogonal": False}
    return Muon([{"params": [p for p in net.parameters() if p.ndim > 1]}, norms], lr=1e-4)


OPTIMIZERS = {
    "Muon": muon,
    "SGD": fused_sgd,
    "SGD with soft targets": fused_sgd,
    "SGD whose momentum cycles": fused_sgd,
    "Adam": lambda net: torch.optim.Adam(net.parameters(), 1e-5),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_graphed_step_has_the_losses_of_a_normal_step(kind, monkeypatch, capsys):
    """The learning rate falls from batch to batch, and one batch is smaller.

    Of 20 steps 5 run normally: three to warm up, the one that is recorded, and the smaller batch. All 20
    do if the momentum changes. Adam cannot be recorded, because it counts its steps outside the GPU.
    """
    monkeypatch.setattr(hardware, "precision", lambda device: torch.float32)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images = AlbumentationsCIFAR10(ASSETS, transform=train_transform())
    batches = list(BatchLoader(images, 100, shuffle=True, device="cuda"))
    if kind == "SGD with soft targets":
        batches = [(*batch, torch.randn(len(batch[1]), 10, device="cuda").softmax(1)) for batch in batches]
    batches[10] = tuple(part[:60] for part in batches[10])

    def losses_and_calls(wrap):
        net = Net.from_pretrained().cuda().to(memory_format=torch.channels_last).train()
        optimizer = OPTIMIZERS[kind](net)
        if kind == "SGD whose momentum cycles":
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-4, total_steps=20)
        else:
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=20)
        calls = []
        step = gradient_step(net, optimizer)
        wrapped = wrap(lambda *batch: calls.append(1) or step(*batch), optimizer)
        losses = [train(net, [batch], optimizer, scheduler, step=wrapped)[0] for batch in batches]
        return losses + [net.classifier.weight.norm().item()], len(calls)

    expected, _ = losses_and_calls(lambda step, optimizer: step)
    losses, calls = losses_and_calls(GraphedStep)
    assert calls == (20 if kind in ("SGD whose momentum cycles", "Adam") else 5)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == 21
    assert capsys.readouterr().out.count("continuing without it") == (kind == "Adam")
