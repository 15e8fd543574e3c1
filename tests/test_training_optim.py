"""Who computes Adam does not matter: AdamEMA in the loop against PyTorch's Adam and the EMA after it, checkpoints included."""

import pytest
import torch

from benches.rehearse import GPU, REHEARSING
from potstill.engine.jobs import machine
from potstill.engine.methods.dmd import DMD, DMDConfig
from potstill.engine.methods.sim import SIM, SIMConfig
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.shadow import shadow_of
from potstill.engine.training.optim import OptimConfig, Trained, build_optimizer, implementation_for, state_for
from potstill.engine.training.ranks import ALONE
from potstill.engine.training.run import Run, TrainConfig
from potstill.engine.training.states import map_tensors
from potstill.kernels import AdamEMA, native

TINY = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
CPU = torch.device("cpu")
OPTIM = {"student": OptimConfig(lr=1e-3, betas=[0.0, 0.99], schedule="linear"), "fake": OptimConfig("adamw", weight_decay=0.1)}


def net(dtype):
    torch.manual_seed(1)
    made = from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, dropout=0.0, **TINY)
    made.compute_dtype = dtype
    return made


def new_run(method, dtype, optimizer):
    made = {
        "dmd": lambda: DMD(DMDConfig(fake_per_student=3), net(dtype), net(dtype), net(dtype)),  # the student rests twice in three
        "sim": lambda: SIM(SIMConfig(), net(dtype), net(dtype), net(dtype)),
    }[method]()
    return Run(made, TrainConfig(kimg=0.05, batch=4, optim=OPTIM, ema_kimg=0.02, ema_ramp_up=1.0, optimizer=optimizer), 0, CPU)


def advance(run, steps):
    for _ in range(steps):
        images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(run.step))
        run.take(images, None)
    return run


def assert_same(a, b):
    nets = [(x, b.method.nets[name]) for name, x in a.method.nets.items()] + [(a.ema.net, b.ema.net)]
    for x, y in nets:
        for (name, p), q in zip(x.named_parameters(), y.parameters(), strict=True):
            assert torch.equal(p, q), name


@pytest.fixture
def fused_adam(monkeypatch):
    """PyTorch's, by which AdamEMA goes on a CPU without csrc/; C++ and GPUs differ from it by rounding (test_kernels_adam_ema)."""
    monkeypatch.setattr("potstill.kernels.cuda._backend", "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["dmd", "sim"])
def test_both_train_the_same_weights_and_averages_to_the_last_bit(method, dtype, fused_adam):
    theirs, ours = (advance(new_run(method, dtype, kind), 7) for kind in ("torch", "adam_ema"))
    assert ours.averaging_optimizer is not None and theirs.averaging_optimizer is None
    assert_same(theirs, ours)
    moved = [not torch.equal(p, q) for p, q in zip(ours.ema.net.parameters(), net(dtype).parameters(), strict=True)]
    assert any(moved)
    shadowed = [p for p in ours.method.nets["student"].parameters() if shadow_of(p) is not None]
    assert bool(shadowed) == (dtype is torch.bfloat16)
    torch.testing.assert_close([shadow_of(p) for p in shadowed], [p.detach().to(dtype) for p in shadowed], rtol=0, atol=0)


@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e9])
def test_both_clip_alike(clip):
    """AdamEMA divides the gradient where it reads it; the other's is multiplied first."""
    nets = {kind: Trained(net(torch.float32), ALONE) for kind in ("torch", "adam_ema")}
    norms = []
    for kind, one in nets.items():
        one.give_optimizer(OptimConfig(eps=1.0, lr=1.0, clip=clip), kind, None)  # eps: a step follows the gradient's size
        for step in range(3):
            for k, p in enumerate(one.net.parameters()):
                g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + k)).mul_(0.1)
                p.grad = torch.empty_like(p).copy_(g)  # PyTorch's fused Adam takes memory as it lies
            norms.append(one.step().item())
    assert norms[:3] == pytest.approx(norms[3:], rel=1e-6) and norms[0] > 0.5
    for p, q in zip(*(one.net.parameters() for one in nets.values()), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("writer", "reader"), [("torch", "adam_ema"), ("adam_ema", "torch")])
def test_a_run_goes_on_under_the_other_one(writer, reader, tmp_path, fused_adam):
    """Exact resume does not ask who computed Adam."""
    first = advance(new_run("sim", torch.bfloat16, writer), 3)
    torch.save(first.state_dict() | {"step": first.step}, tmp_path / "a.pt")
    second = new_run("sim", torch.bfloat16, reader)
    second.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    assert_same(advance(first, 3), advance(second, 3))


@pytest.mark.parametrize("optimizer", ["torch", "adam_ema"])
def test_a_checkpoint_whose_tensors_lie_otherwise_goes_on_as_well(optimizer):
    """Earlier ones are contiguous; PyTorch's fused Adam takes memory as it lies (findings/fused_adam_pairs_memory.sh)."""
    first, second = (new_run("sim", torch.float32, optimizer) for _ in range(2))
    advance(first, 3)
    lying = [t for one in first.trained.values() for s in one.optimizer.state.values() for t in s.values()]
    assert not all(t.is_contiguous() for t in lying)
    second.load_state_dict(map_tensors(first.state_dict() | {"step": first.step}, lambda _, t: t.detach().clone().contiguous()))
    assert_same(advance(first, 3), advance(second, 3))


def test_a_checkpoint_does_not_say_how_it_is_read():
    """capturable and fused are of the machine: a GPU's checkpoint steps on a CPU."""
    weight = torch.nn.Linear(2, 2)
    state = AdamEMA(weight.parameters()).state_dict()
    state["param_groups"][0] |= {"capturable": True, "fused": None}
    adam = build_optimizer(weight, OptimConfig(), "torch")
    adam.load_state_dict(state_for(adam, state))
    weight(torch.ones(1, 2)).sum().backward()
    adam.step()
    assert adam.param_groups[0]["fused"] is True and adam.param_groups[0]["capturable"] is False


def test_auto_on_a_cpu_is_ours_where_its_cpp_is(monkeypatch):
    assert implementation_for("auto", net(torch.float32).parameters()) == ("adam_ema" if native.used() else "torch")
    assert implementation_for("auto", net(torch.float32).double().parameters()) == "torch"
    monkeypatch.setattr("potstill.kernels.cuda._backend", "reference")
    assert implementation_for("auto", net(torch.float32).parameters()) == "torch"
    assert isinstance(build_optimizer(net(torch.float32), OptimConfig()), torch.optim.Adam)


@pytest.mark.gpu
def test_auto_is_ours_on_a_gpu():
    assert implementation_for("auto", net(torch.float32).to(GPU).parameters()) == (
        "torch" if REHEARSING and not native.used() else "adam_ema"
    )


@pytest.fixture
def switches():
    found = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [one.fp32_precision for one in found]
    yield found
    for one, value in zip(found, before, strict=True):
        one.fp32_precision = value


def test_tf32_says_where_it_does_nothing_and_sets_both_kinds_of_product(switches):
    assert machine.set_tf32(None, torch.device("cuda")) == ""
    assert "does nothing here" in machine.set_tf32(True, CPU)
    for tf32, value in ((True, "tf32"), (False, "ieee")):
        assert "TF32" in machine.set_tf32(tf32, torch.device("cuda"))
        assert [one.fp32_precision for one in switches] == [value, value]
