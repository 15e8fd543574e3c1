"""SFD's Euler step and comparison, fused, against float64, finite differences and the step itself."""

import pytest
import torch
from kernel_cases import (
    CASES,
    F32,
    F64,
    ON_GPU,
    SPOILS,
    Case,
    Drawn,
    assert_left_out,
    check_ops,
    compiles_in_one_graph,
    fused_as_exact_as_plain,
    of_ops,
    summed_like_one_by_one,
)
from places import everywhere

from potstill.kernels import Estimate, reference, trajectory
from potstill.kernels.modules import TrajectoryLoss

SMALL = Case((3, 3, 5, 7), F32)
ALL = ("net", "net_uncond")
METRICS = ["l1", "l2", "huber"]


def with_(f, *, metric="l1", reduction="mean", x_t="x", c=0.03):
    def loss(d):
        e = d.estimate("net", x_t)
        sigma, sigma_next = d.positive("sigma"), d.positive("sigma_next")
        return f(
            d.image("x"), e, sigma, sigma_next, d.image("target"), metric=metric, reduction=reduction, c=c
        )  # fmt: skip

    return loss


@everywhere("trajectory", CASES, ON_GPU)
def test_as_exact_as_plain(case, place):
    fused_as_exact_as_plain(with_(trajectory), with_(reference.trajectory), case, ALL, place)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_huber_as_exact_as_plain(case):
    """On a GPU among the options below: each case is three more kernels to compile."""
    fused, plain = with_(trajectory, metric="huber"), with_(reference.trajectory, metric="huber")
    fused_as_exact_as_plain(fused, plain, case, ALL)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("options", [{"reduction": "sum"}, {"c": 1.0}, {"x_t": "another x_t"}], ids=str)
@everywhere("trajectory")
def test_options_as_exact_as_plain(metric, options, place):
    fused, plain = (with_(f, metric=metric, **options) for f in (trajectory, reference.trajectory))
    fused_as_exact_as_plain(fused, plain, Case((3, 3, 5, 7), F32, guided=True), ALL, place)


def test_formula():
    d = Drawn(Case((2, 2, 3, 3), F64))
    x, clean, target = d.image("x"), d.image("clean"), d.image("target")
    sigma, sigma_next = torch.tensor([10.929, 0.6699], dtype=F64), torch.tensor(0.006, dtype=F64)
    losses, x_next = trajectory(x, clean, sigma, sigma_next, target, reduction="sum")
    huber = trajectory(x, clean, sigma, sigma_next, target, metric="huber", c=0.5, reduction="sum")[0]
    for i in range(2):
        direction = (x[i] - clean[i]) / sigma[i]
        torch.testing.assert_close(x_next[i], x[i] + (0.006 - sigma[i]) * direction)
        e = x_next[i] - target[i]
        torch.testing.assert_close(losses.value[i], e.abs().sum())
        torch.testing.assert_close(huber.value[i], ((e**2).sum() + 0.25).sqrt() - 0.5)
    assert not x_next.requires_grad


def test_huber_keeps_small_distances():
    """sqrt(s + c²) - c is 0 in float32 for s = 1e-10, c = 1; s/(2c) is right."""
    x = torch.zeros(1, 1, 1, 4)
    losses, _ = trajectory(
        x, x, torch.ones(1), torch.ones(1), x + 5e-6, metric="huber", c=1.0, reduction="sum"
    )  # fmt: skip
    assert losses.value.item() == pytest.approx(4 * 25e-12 / 2, rel=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("f", [trajectory, reference.trajectory])
def test_gradcheck(f, metric):
    d, loss = Drawn(Case((2, 1, 2, 3), F64, guided=True)), with_(f, metric=metric)
    loss(d)

    def values(*tensors):
        d.tensors |= dict(zip(ALL, tensors, strict=True))
        return loss(d)[0].value

    torch.autograd.gradcheck(values, [d.tensors[name].requires_grad_() for name in ALL])


@pytest.mark.parametrize("metric", METRICS)
@everywhere("trajectory")
def test_upstream_gradient_of_stride_0(metric, place):
    summed_like_one_by_one(lambda d: with_(trajectory, metric=metric)(d)[0], SMALL, "net", place)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("poison", ["net", "x", "target", "sigma", "sigma_next"])
@pytest.mark.parametrize("number", SPOILS)
@everywhere("trajectory")
def test_left_out(metric, poison, number, place):
    assert_left_out(with_(trajectory, metric=metric), Case((3, 3, 8, 8), F32), ("net",), poison, number, place)


def test_module():
    d = Drawn(SMALL)
    args = d.image("x"), d.estimate("net", "x"), d.positive("sigma"), d.positive("sigma_next"), d.image("target")
    loss, x_next = TrajectoryLoss("l2")(*args)
    losses, expected = trajectory(*args, metric="l2")
    torch.testing.assert_close((loss, x_next), (losses.value.mean(), expected))


def test_bad_input():
    x, c, s = torch.randn(2, 3, 4, 4), torch.ones(2), torch.ones(())
    with pytest.raises(ValueError, match=r"raw outputs only: wanted x without requires_grad"):
        trajectory(x.clone().requires_grad_(), x, s, s, x)
    with pytest.raises(ValueError, match=r"raw outputs only: wanted estimate.x_t without requires_grad"):
        trajectory(x, Estimate(x, x.clone().requires_grad_(), c, c), s, s, x)
    with pytest.raises(ValueError, match=r"sigma as a floating tensor .* got torch.int64"):
        trajectory(x, x, torch.tensor(3), s, x)
    with pytest.raises(ValueError, match=r"sigma_next as a floating tensor .* got float"):
        trajectory(x, x, s, 0.5, x)
    with pytest.raises(ValueError, match=r"metric to be one of 'l1', 'l2', 'huber', got 'lpips'"):
        trajectory(x, x, s, s, x, metric="lpips")


@of_ops
def test_opcheck():
    d = Drawn(Case((3, 3, 8, 8), F32, guided=True))
    e = d.estimate("net", "x")
    assert isinstance(e, Estimate)
    args = [d.image("x"), e._replace(x_t=None), d.positive("s"), d.positive("t"), d.image("y"), "l1", 0.1, True]
    check_ops("trajectory", args, [False, True, False, True, False])


@everywhere("trajectory")
def test_compiles(place):
    compiles_in_one_graph(with_(trajectory), Case((3, 3, 8, 8), F32), ("net",), place)
