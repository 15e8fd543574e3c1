"""AdamEMA against torch.optim.Adam and AdamW, step by step; EMA and shadows against their closed forms."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from places import needs_triton, on_gpu
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from benches.rehearse import REHEARSING
from potstill.kernels import AdamEMA
from potstill.kernels._lib import INTERPRET
from potstill.kernels.tables import CHUNK

# A bias; a weight of any length; exactly one chunk; one more; a convolution over several chunks; nothing at all.
SHAPES = [(5,), (3, 7), (CHUNK,), (CHUNK + 1,), (24, 12, 3, 3), (0, 4)]
DTYPES = [torch.float32] if INTERPRET else [torch.float32, torch.float64]  # the Triton kernel holds float32 alone
KINDS = [
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6}),
    ("AdamW", {"weight_decay": 0.1}),
    ("Adam", {"betas": (0.0, 0.9)}),  # beta1 = 0 is GAN practice
]


def parameters(dtype=torch.float32, shapes=SHAPES):
    params = [torch.randn(shape, dtype=dtype) for shape in shapes]
    params[4] = params[4].to(memory_format=torch.channels_last)
    return [p.requires_grad_() for p in params]


def copies(tensors, **to):
    return [t.detach().clone().to(**to).requires_grad_(t.requires_grad) for t in tensors]


def give_gradients(*lists):
    """The same random gradients to the parameters of every list."""
    for same in zip(*lists, strict=True):
        g = torch.randn_like(same[0])
        for p in same:
            p.grad = g.to(p.dtype).clone()


def theirs(kind, params, **options):
    return getattr(torch.optim, kind)(params, lr=3e-3, **options)


def ours(kind, params, **options):
    return AdamEMA(params, lr=3e-3, decoupled=kind == "AdamW", **options)


def assert_close(actual, expected, dtype=torch.float32):
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), e.detach().to(a.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=["adam", "adam-decay", "adamw", "adam-beta1-0"])
def test_every_step_is_adams(kind, options, dtype):
    params = parameters(dtype)
    exact = copies(params, dtype=torch.float64)
    optimizer, reference = ours(kind, params, **options), theirs(kind, exact, **options)
    for _ in range(5):
        give_gradients(params, exact)
        optimizer.step()
        reference.step()
        assert_close(params, exact, dtype)
    for p, e in zip(params, exact, strict=True):
        state, expected = optimizer.state[p], reference.state[e]
        assert state["step"] == expected["step"] == 5
        assert_close([state["exp_avg"], state["exp_avg_sq"]], [expected["exp_avg"], expected["exp_avg_sq"]], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ema_of_resting_parameters_is_geometric(dtype):
    params = parameters(dtype)
    ema = [torch.randn_like(p).detach() for p in params]
    start = copies(ema)
    optimizer = AdamEMA(params, lr=0.0, ema=ema, ema_decay=0.9)
    for _ in range(4):
        give_gradients(params)
        optimizer.step()
    assert_close(ema, [p + 0.9**4 * (e - p) for p, e in zip(params, start, strict=True)], dtype)
    optimizer.set_ema_decay(0.0)
    give_gradients(params)
    optimizer.step()
    assert_close(ema, params, dtype)


def test_ema_follows_moving_parameters_as_a_lerp_after_each_step():
    params = parameters()
    ema = [p.detach().clone() for p in params]
    expected = copies(ema, dtype=torch.float64)
    optimizer = AdamEMA(params, lr=1e-2, ema=ema, ema_decay=0.999)
    for _ in range(4):
        give_gradients(params)
        optimizer.step()
        for e, p in zip(expected, params, strict=True):
            e.lerp_(p.detach().double(), 1 - 0.999)
    assert_close(ema, expected)


SHADOWS = [torch.float16] if INTERPRET else [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", SHADOWS, ids=str)
def test_shadows_are_the_parameters_rounded_to_nearest(dtype):
    params = parameters()
    shadow = [torch.empty_like(p, dtype=dtype) for p in params]
    optimizer = AdamEMA(params, shadow=shadow)
    for step in range(3):  # from the start, too
        for s, p in zip(shadow, params, strict=True):
            assert torch.equal(s, p.detach().to(dtype)), step
        give_gradients(params)
        optimizer.step()


def test_some_parameters_may_have_no_shadow():
    params = parameters()
    twin = copies(params)
    shadow = [torch.empty_like(p, dtype=torch.float16) if k % 2 else None for k, p in enumerate(params)]
    optimizer, reference = AdamEMA(params, lr=3e-3, shadow=shadow), theirs("Adam", twin)
    for _ in range(2):
        torch.testing.assert_close(
            shadow, [None if s is None else p.detach().half() for s, p in zip(shadow, params, strict=True)], rtol=0, atol=0
        )
        give_gradients(params, twin)
        optimizer.step()
        reference.step()
    assert_close(params, twin)


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    params = parameters()
    twin = copies(params)
    ema, shadow = copies(params), [p.detach().half() for p in params]
    ema = [e.detach() for e in ema]
    optimizer = AdamEMA(params, lr=3e-3, ema=ema, ema_decay=0.5, shadow=shadow)
    reference = theirs("Adam", twin)
    for step, bad in enumerate([None, float("nan"), float("inf"), -float("inf"), None]):
        give_gradients(params, twin)
        if bad is None:
            optimizer.step()
            reference.step()
            assert_close(params, twin)
            continue
        params[3].grad[-1] = bad
        everything = [*params, *ema, *shadow, *(t for p in params for t in optimizer.state[p].values())]
        before = copies(everything)
        optimizer.step()
        torch.testing.assert_close(everything, before, rtol=0, atol=0, msg=lambda text, step=step: f"step {step}: {text}")
        assert optimizer.nonfinite == step
    give_gradients(params, twin)
    optimizer.step(found_inf=torch.ones(()))
    assert_close(params, twin)
    assert optimizer.nonfinite == 4


def test_nonfinite_ignore_lets_them_through():
    params = [torch.zeros(3, requires_grad=True)]
    optimizer = AdamEMA(params, nonfinite="ignore")
    params[0].grad = torch.tensor([0.0, float("nan"), 1.0])
    optimizer.step()
    assert params[0].isnan().tolist() == [False, True, False]
    assert optimizer.nonfinite == 0


def test_gradients_are_divided_by_grad_scale():
    params = parameters()
    twin = copies(params)
    optimizer, reference = ours("Adam", params), theirs("Adam", twin)
    for _ in range(3):
        give_gradients(params, twin)
        for p in params:
            p.grad *= 1024
        optimizer.step(grad_scale=torch.tensor(1024.0))
        reference.step()
        assert_close(params, twin)


def test_a_grad_scaler_hands_over_its_scale_and_backs_off():
    weight = torch.randn(4, 4, requires_grad=True)
    twin = weight.detach().clone().requires_grad_()
    optimizer, reference = ours("Adam", [weight]), theirs("Adam", [twin])
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale((weight**2).sum()).backward()
        if step == 1:
            weight.grad[0, 0] = float("inf")
        else:
            twin.grad = 2 * twin.detach()
            reference.step()
        scaler.step(optimizer)
        scaler.update()
        assert_close([weight], [twin])
    assert scaler.get_scale() == 128.0
    assert optimizer.nonfinite == 1


def test_learning_rate_is_a_tensor_that_schedulers_write_into():
    params = parameters()
    twin = copies(params)
    optimizer, reference = ours("Adam", params), theirs("Adam", twin)
    tensor = optimizer.param_groups[0]["lr"]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)) for o in (optimizer, reference)]
    for _ in range(4):
        give_gradients(params, twin)
        optimizer.step()
        reference.step()
        for schedule in schedules:
            schedule.step()
        assert_close(params, twin)
    assert optimizer.param_groups[0]["lr"] is tensor
    assert tensor.item() == pytest.approx(3e-3 / 5, rel=1e-12)


def test_parameter_groups_have_their_own_options_and_share_one_verdict():
    params = parameters()
    twin = copies(params)
    options = [{"weight_decay": 0.1, "lr": 1e-2}, {"betas": (0.5, 0.9)}]

    def groups(ps):
        return [{"params": half, **extra} for half, extra in zip((ps[:2], ps[2:]), options, strict=True)]

    ema = [p.detach().clone() for p in params]
    optimizer = AdamEMA(groups(params), lr=3e-3, ema=ema, ema_decay=0.5)
    reference = torch.optim.Adam(groups(twin), lr=3e-3)
    for bad in (False, True, False):
        give_gradients(params, twin)
        if bad:
            params[-2].grad[0] = float("nan")  # in the second group: the first rests too
        else:
            reference.step()
        optimizer.step()
        assert_close(params, twin)
    assert optimizer.nonfinite == 1


def test_a_parameter_without_gradient_rests_and_its_ema_still_follows():
    params = parameters()
    twin = copies(params)
    ema = [torch.zeros_like(p).detach() for p in params]
    optimizer = ours("AdamW", params, weight_decay=0.1, ema=ema, ema_decay=0.5)
    reference = theirs("AdamW", twin, weight_decay=0.1)
    for step in range(3):
        give_gradients(params, twin)
        if step == 1:
            params[0].grad = twin[0].grad = None
        optimizer.step()
        reference.step()
        assert_close(params, twin)
    assert optimizer.state[params[0]]["step"] == 2
    still = params[0].detach().clone()
    before = ema[0].clone()
    params[0].grad = None
    optimizer.step()
    assert_close([ema[0]], [(before + still) / 2])


def test_gradients_laid_out_differently_from_their_parameter():
    params = parameters()
    twin = copies(params)
    optimizer, reference = ours("Adam", params), theirs("Adam", twin)
    give_gradients(params, twin)
    params[4].grad = params[4].grad.contiguous()
    params[1].grad = params[1].grad.t().contiguous().t()
    optimizer.step()
    reference.step()
    assert_close(params, twin)


def test_parameters_may_move_between_steps():
    params = parameters()
    twin = copies(params)
    optimizer, reference = ours("Adam", params), theirs("Adam", twin)
    for _ in range(3):
        give_gradients(params, twin)
        params[2].data = params[2].data.clone()
        optimizer.step()
        reference.step()
        assert_close(params, twin)


def test_tensors_off_the_16_byte_grid():
    flat = torch.randn(4 * CHUNK + 3)
    params = [flat[1 : 1 + CHUNK].view(-1).requires_grad_(), flat[CHUNK + 2 : 3 * CHUNK + 5].view(-1).requires_grad_()]
    twin = copies(params)
    optimizer, reference = ours("Adam", params), theirs("Adam", twin)
    give_gradients(params, twin)
    optimizer.step()
    reference.step()
    assert_close(params, twin)


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_checkpoints_go_from_adam_to_us_and_back(kind, tmp_path):
    params = parameters()
    twin, untouched = copies(params), copies(params)
    reference = theirs(kind, twin, weight_decay=0.05)
    for _ in range(2):  # two steps by torch alone
        give_gradients(twin, params)
        reference.step()
    torch.save(reference.state_dict(), tmp_path / "adam.pt")

    params = copies(twin)
    optimizer = AdamEMA(params, lr=1.0, weight_decay=0.5, ema_decay=0.75)  # the file's replace all but the EMA's
    kept = [optimizer.param_groups[0]["lr"], *optimizer.state[params[0]].values()]
    optimizer.load_state_dict(torch.load(tmp_path / "adam.pt"))
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(3e-3)
    assert optimizer.param_groups[0]["ema_decay"].item() == 0.75
    now = [optimizer.param_groups[0]["lr"], *optimizer.state[params[0]].values()]
    assert [t.data_ptr() for t in now] == [t.data_ptr() for t in kept]  # a captured graph still reads them
    for _ in range(2):  # two more side by side
        give_gradients(twin, params)
        reference.step()
        optimizer.step()
        assert_close(params, twin)
    torch.save(optimizer.state_dict(), tmp_path / "ours.pt")

    back = theirs(kind, untouched)
    with torch.no_grad():
        for p, q in zip(untouched, params, strict=True):
            p.copy_(q)
    back.load_state_dict(torch.load(tmp_path / "ours.pt"))
    for _ in range(2):
        give_gradients(twin, untouched)
        reference.step()
        back.step()
        assert_close(untouched, twin)


def test_a_closure_runs_with_gradients():
    weight = torch.ones(3, requires_grad=True)
    optimizer = AdamEMA([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    assert_close([weight], [torch.full((3,), 0.9)])  # Adam's first step has length lr


def test_sharded_parameters_are_stepped_in_place():
    """FSDP2's DTensors, on a mesh of one process: local shards are what moves, state and checkpoints are DTensors."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))

        def sharded(t):
            return distribute_tensor(t.clone(), mesh, [Shard(0)])

        whole = torch.randn(8, 4)
        param, twin = torch.nn.Parameter(sharded(whole)), whole.clone().requires_grad_()
        ema, shadow = sharded(whole), sharded(whole.half())
        optimizer = AdamEMA([param], lr=3e-3, ema=[ema], ema_decay=0.0, shadow=[shadow])
        reference = theirs("Adam", [twin])
        for bad in (False, True, False):
            give_gradients([twin])
            param.grad = sharded(twin.grad)
            if bad:
                param.grad.to_local()[0] = float("nan")
            else:
                reference.step()
            optimizer.step()
            assert_close([param.full_tensor(), ema.full_tensor()], [twin, twin])
        assert torch.equal(shadow.full_tensor(), param.detach().full_tensor().half())
        assert optimizer.nonfinite == 1
        theirs("Adam", [param]).load_state_dict(optimizer.state_dict())
        assert isinstance(optimizer.state[param]["exp_avg"], DTensor)
    finally:
        torch.distributed.destroy_process_group()


def wrong(**options):
    return lambda: AdamEMA([torch.zeros(2, 3, requires_grad=True)], **options)


BAD = {
    "amsgrad": (wrong(amsgrad=True), "amsgrad=False, got True"),
    "lr": (wrong(lr=-1.0), "lr in .*got -1.0"),
    "betas": (wrong(betas=(0.9, 1.0)), "beta2 in .*got 1.0"),
    "ema_decay": (wrong(ema_decay=1.5), "ema_decay in .*got 1.5"),
    "nonfinite": (wrong(nonfinite="raise"), "'skip' or 'ignore', got 'raise'"),
    "ema count": (wrong(ema=[]), "one ema tensor a parameter, 1, got 0"),
    "ema shape": (wrong(ema=[torch.zeros(3, 2)]), r"ema \(2, 3\) .*got \(3, 2\)"),
    "ema layout": (wrong(ema=[torch.zeros(3, 2).t()]), r"strides \(3, 1\).*got \(2, 3\) with \(1, 2\)"),
    "ema dtype": (wrong(ema=[torch.zeros(2, 3).double()]), "torch.float32, got .*torch.float64"),
    "shadow dtype": (wrong(shadow=[torch.zeros(2, 3)]), "bfloat16 or torch.float16, got .*float32"),
    "gaps": (lambda: AdamEMA([torch.zeros(4, 4)[:, :2].requires_grad_()]), "without gaps in memory"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_options_name_what_was_wanted_and_what_came(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_amsgrad_checkpoints_are_refused():
    weight = torch.zeros(3, requires_grad=True)
    state = torch.optim.Adam([weight], amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="amsgrad"):
        AdamEMA([weight]).load_state_dict(state)


ON_GPU = [
    test_nonfinite_ignore_lets_them_through,  # first: a rehearsal takes it alone
    *(partial(test_every_step_is_adams, *kind, torch.float32) for kind in KINDS),
    *(partial(test_shadows_are_the_parameters_rounded_to_nearest, dtype) for dtype in SHADOWS),
    test_ema_follows_moving_parameters_as_a_lerp_after_each_step,
    test_some_parameters_may_have_no_shadow,
    test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_and_is_counted,
    test_gradients_are_divided_by_grad_scale,
    test_learning_rate_is_a_tensor_that_schedulers_write_into,
    test_parameter_groups_have_their_own_options_and_share_one_verdict,
    test_a_parameter_without_gradient_rests_and_its_ema_still_follows,
    test_gradients_laid_out_differently_from_their_parameter,
    test_parameters_may_move_between_steps,
    test_tensors_off_the_16_byte_grid,
]
NAMES = [getattr(test, "func", test).__name__.removeprefix("test_") for test in ON_GPU]


@pytest.mark.parametrize("test", ON_GPU, ids=NAMES)
def test_by_pytorchs_fused_adam(test, monkeypatch):
    """The tests above without csrc/, whose C++ float32 tensors on a CPU take where it is built."""
    monkeypatch.setattr("potstill.kernels.cuda._backend", "reference")
    test()


@pytest.mark.parametrize("place", on_gpu("adam_ema"), indirect=True)
@pytest.mark.parametrize("test", ON_GPU, ids=NAMES)
def test_on_a_gpu(test, place):
    """The tests above where new tensors are made on the GPU."""
    with place:
        test()


@pytest.mark.parametrize("place", on_gpu("adam_ema"), indirect=True)
def test_a_captured_step_reads_new_gradients_and_learning_rates(place, request):
    if REHEARSING and "triton" in request.node.name:
        pytest.skip("what stands in for CUDA graphs sees PyTorch's operations, csrc's among them, and no launch of Triton's")
    params = [p.detach().to(place).requires_grad_() for p in parameters()]
    twin = copies(params)
    shadow = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
    optimizer, reference = AdamEMA(params, lr=3e-3, shadow=shadow), torch.optim.Adam(twin, lr=3e-3)
    give_gradients(params, twin)
    static = [p.grad for p in params]
    optimizer.step()
    reference.step()
    everything = [*params, *shadow, *(t for p in params for t in optimizer.state[p].values())]
    before = copies(everything)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    with torch.no_grad():
        for t, old in zip(everything, before, strict=True):
            t.copy_(old)  # a capture changes nothing; a rehearsal's has made the step, through addresses nobody sees
    group = optimizer.param_groups[0]
    ways = [
        optimizer.set_lr,
        lambda lr: group.update(lr=lr),
        lambda lr: group["lr"].fill_(lr),
        lambda lr: group.update(lr=torch.tensor(lr, device=place)),
        lambda lr: group["lr"].fill_(lr),
    ]
    for k, give in enumerate(ways):
        give_gradients(params, twin)
        for p, g in zip(params, static, strict=True):
            g.copy_(p.grad)
            p.grad = g
        give(1e-3 * (k + 1))
        reference.param_groups[0]["lr"] = 1e-3 * (k + 1)
        graph.replay()
        reference.step()
        assert_close(params, twin)
        torch.testing.assert_close(shadow, [p.detach().bfloat16() for p in params], rtol=0, atol=0)


REFERENCE = pytest.param("reference", id="gpu-reference", marks=pytest.mark.gpu)


@pytest.mark.parametrize("place", [*on_gpu("adam_ema"), REFERENCE], indirect=True)
def test_on_the_gpu_no_backend_waits_for_the_device(place):
    params = [p.detach().to(place).requires_grad_() for p in parameters()]
    twin = copies(params)
    ema = [p.detach().clone() for p in params]
    optimizer, reference = AdamEMA(params, lr=3e-3, ema=ema, ema_decay=0.9), torch.optim.Adam(twin, lr=3e-3)
    for k in range(4):
        give_gradients(params, twin)
        torch.cuda.set_sync_debug_mode("error" if k > 1 else "default")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        reference.step()
        assert_close(params, twin)


if not INTERPRET:

    @needs_triton
    def test_all_of_this_holds_for_the_triton_kernels_under_the_interpreter(monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert done.returncode == 0, done.stdout
