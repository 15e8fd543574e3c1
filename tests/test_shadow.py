"""Shadow weights: the same bits as casting, in every use, whatever has happened to the weight in between."""

import copy
from contextlib import contextmanager

import pytest
import torch

from potstill.engine.methods.base import frozen
from potstill.engine.methods.moment_matching import Instant, MomentMatchingConfig
from potstill.engine.methods.sim import SIM, SIMConfig
from potstill.engine.nets import ops, shadow
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.shadow import give_shadows, renew_stale, shadow_of
from potstill.engine.training.run import Run, TrainConfig
from potstill.kernels import AdamEMA

TINY = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def every_weight(monkeypatch):
    """Also those that a CPU would rather cast."""
    monkeypatch.setattr(shadow, "SMALL", 0)


def net(dtype=torch.bfloat16, seed=1, **kwargs):
    torch.manual_seed(seed)
    made = from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, dropout=0.0, **TINY | kwargs)
    made.compute_dtype = dtype
    return made


def gradients(model, x):
    loss = (model(x, torch.tensor(1.0)) ** 2).sum() + (model(x * 0.5, torch.tensor(0.3)) ** 2).sum()  # used twice
    return [loss, *torch.autograd.grad(loss, [x, *model.parameters()])]


def assert_same(model, plain, x=None):
    x = torch.randn(2, 1, 8, 8) if x is None else x
    for a, b in zip(gradients(model, x.clone().requires_grad_()), gradients(plain, x.clone().requires_grad_()), strict=True):
        assert torch.equal(a, b)


@contextmanager
def by_layers(monkeypatch):
    """No residual block is one node of autograd, as where a compiler looks."""
    with monkeypatch.context() as patch:
        patch.setattr(ops, "fuses", lambda x: False)
        yield


@pytest.mark.parametrize("dtype", shadow.SIXTEEN_BIT)
def test_loss_and_gradients_are_those_of_casting_bit_for_bit(dtype, monkeypatch):
    plain, shadowed = net(dtype), net(dtype)
    weights = give_shadows([shadowed])
    assert {id(w) for w in weights} >= {id(w) for w in shadowed.parameters() if w.ndim == 4}
    assert_same(shadowed, plain)
    with by_layers(monkeypatch):
        assert_same(shadowed, plain)
    used = []
    monkeypatch.setattr(shadow._StraightThrough, "forward", lambda ctx, w, s: used.append(w) or s.detach() + 1)
    with by_layers(monkeypatch):
        gradients(shadowed, torch.randn(2, 1, 8, 8, requires_grad=True))
    assert len(used) == 2 * len(weights)  # the comparison above was of shadows, not of casts


def test_float32_nets_have_none_and_state_dict_keys_stay():
    assert give_shadows([net(torch.float32)]) == []
    shadowed = net()
    give_shadows([shadowed])
    assert shadowed.state_dict().keys() == net().state_dict().keys()


WRITES = {
    "in place": lambda n: [p.add_(0.5) for p in n.parameters()],
    "load_state_dict": lambda n: n.load_state_dict(net(seed=2).state_dict()),
    "data": lambda n: [setattr(p, "data", p.data * 2) for p in n.parameters()],
    "layout": lambda n: n.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writes_show_at_once(write):
    plain, shadowed = net(), net()
    give_shadows([shadowed])
    with torch.no_grad():
        write(plain), write(shadowed)
    assert_same(shadowed, plain)


OPTIMISERS = {
    "fused": lambda ps: torch.optim.Adam(ps, fused=True),  # does not move the version counter
    "foreach": lambda ps: torch.optim.Adam(ps, foreach=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "adam_ema": lambda ps: AdamEMA(ps, shadow=[shadow_of(p) for p in ps]),
    "adam_ema alone": lambda ps: AdamEMA(ps),
}


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_steps_show_at_once_in_the_net_and_in_its_frozen_views(make, monkeypatch):
    shadowed = net()
    view = frozen(shadowed)
    weights = give_shadows([shadowed, view])
    addresses = {shadow_of(w).data_ptr() for w in weights}
    assert len(addresses) == len(weights) // 2  # shared
    optimizer = make(list(shadowed.parameters()))
    monkeypatch.setattr(shadow.Shadow, "renew", None)  # the step does it, not the next use
    for _ in range(2):
        for p in shadowed.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        plain = net()
        plain.load_state_dict(shadowed.state_dict())
        assert_same(shadowed, plain)
        x = torch.randn(2, 1, 8, 8)
        assert torch.equal(view(x, torch.tensor(1.0)), plain(x, torch.tensor(1.0)))
        assert {shadow_of(w).data_ptr() for w in weights} == addresses  # a captured graph still reads them


def test_a_graph_from_before_a_step_cannot_go_backward():
    """It would mix old activations with new weights; float32 in-place operations are refused alike."""
    for make in OPTIMISERS.values():
        shadowed = net()
        give_shadows([shadowed])
        optimizer = make(list(shadowed.parameters()))
        loss = shadowed(torch.randn(2, 1, 8, 8), torch.tensor(1.0)).sum()
        for p in shadowed.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_copies_and_functional_calls_have_no_shadow_of_the_original():
    shadowed = net()
    give_shadows([shadowed])
    twin = copy.deepcopy(shadowed)
    assert not any(shadow_of(p) is not None for p in twin.parameters())
    moved = {name: p.detach() + 0.25 for name, p in shadowed.named_parameters()}
    x = torch.randn(2, 1, 8, 8)
    called = torch.func.functional_call(shadowed, moved, (x, torch.tensor(1.0)))
    twin.load_state_dict(moved, strict=False)
    assert torch.equal(called, twin(x, torch.tensor(1.0)))


@pytest.mark.filterwarnings("ignore:.*autograd functions are all static:DeprecationWarning")  # Dynamo's own
def test_compiled_nets_read_the_renewed_shadow(monkeypatch):
    plain, shadowed = (net(channel_mult=[1], attn_resolutions=[]) for _ in range(2))
    weights = give_shadows([shadowed])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    shadowed.compile(backend="eager", dynamic=False, fullgraph=True)
    optimizer = torch.optim.Adam(shadowed.parameters(), lr=0.1, fused=True)
    monkeypatch.setattr(ops, "fuses", lambda x: False)
    for k in range(3):
        assert_same(shadowed, plain, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(k)))
        if k == 0:
            for p in shadowed.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        else:
            with torch.no_grad():
                shadowed.model.dec["8x8_aux_conv"].weight.mul_(2)
            renew_stale(weights)
        plain.load_state_dict(shadowed.state_dict())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def trained(method, shadows, optimizer="torch", steps=3):
    run = Run(method, TrainConfig(kimg=1, batch=4, shadows=shadows, optimizer=optimizer), 0, CPU)
    logs = []
    for step in range(steps):
        images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        run.take(images, None)
        logs.append(run.meter.read())
    return run, logs


METHODS = {
    "sim": lambda: SIM(SIMConfig(), net(), net(), net()),
    "instant": lambda: Instant(MomentMatchingConfig(variant="instant", measure_every=2), net(), net()),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_training_is_bit_identical_with_and_without(method):
    (with_, logs), (without, expected) = (trained(method(), shadows) for shadows in (True, False))
    assert with_.weights_with_shadows and not without.weights_with_shadows
    assert logs == expected
    for a, b in zip(with_.ema.net.parameters(), without.ema.net.parameters(), strict=True):
        assert torch.equal(a, b)
