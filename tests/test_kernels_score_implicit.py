"""SIM's and SiD's generator loss, fused, against float64, against finite differences, and against what it is for."""

import math

import numpy as np
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

from potstill.kernels import Estimate, reference, score_implicit
from potstill.kernels.modules import ScoreImplicitLoss

SMALL = Case((3, 3, 5, 7), F32)
ESTIMATES = ("raw", "x_t", "raw_uncond")
ALL = ("x", "x_t", *(p + s for p in ("real", "fake") for s in ("", "_x_t", "_uncond")))
OPTIONS = [
    {},
    {"weight": True, "c": 1.0},
    {"detach": "normaliser"},
    {"detach": "factor"},
    {"distance": "l2"},
    {"distance": "l2", "alpha": 1.2},
    {"distance": "l2", "alpha": 1.2, "weight": True},
    {"distance": "l2", "alpha": 1.2, "detach": "factor"},
]


def with_(f, *, weight=False, **options):
    def loss(d):
        w = d.positive("weight") if weight else None
        return f(d.image("x"), d.estimate("real"), d.estimate("fake"), weight=w, **options)

    return loss


@everywhere("score_implicit", CASES, ON_GPU)
@pytest.mark.parametrize("options", [{}, {"distance": "l2", "alpha": 1.2}], ids=str)
def test_as_exact_as_plain(case, options, place):
    fused, plain = with_(score_implicit, **options), with_(reference.score_implicit, **options)
    fused_as_exact_as_plain(fused, plain, case, ALL, place)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@everywhere("score_implicit", [SMALL, Case((3, 3, 5, 7), F32, guided=True, own_x_t=True)])
def test_options_as_exact_as_plain(case, options, place):
    fused, plain = with_(score_implicit, **options), with_(reference.score_implicit, **options)
    fused_as_exact_as_plain(fused, plain, case, ALL, place)


@pytest.mark.parametrize("wrt", [("x",), ("real",), ("fake",), ("x_t",), ("x", "fake"), ("real", "x_t")])
@everywhere("score_implicit")
def test_only_the_gradients_asked_for(wrt, place):
    fused_as_exact_as_plain(with_(score_implicit), with_(reference.score_implicit), SMALL, wrt, place)


def test_formulas():
    d = Drawn(Case((2, 2, 4, 4), F64))
    x, real, fake = (d.image(name).numpy() for name in ("x", "real", "fake"))
    huber = score_implicit(*map(torch.from_numpy, (x, real, fake)), c=0.3).value
    l2 = score_implicit(*map(torch.from_numpy, (x, real, fake)), distance="l2", alpha=1.2).value
    for i in range(2):
        delta = real[i] - fake[i]
        first = delta / math.sqrt((delta**2).sum() + 0.3**2)  # SIM, pseudo-Huber
        assert huber[i].item() == pytest.approx(np.vdot(first, fake[i] - x[i]), rel=1e-12)
        sid = np.vdot(delta, (real[i] - x[i]) - 1.2 * delta) / max(np.abs(x[i] - real[i]).mean(), 1e-5)  # SiD
        assert l2[i].item() == pytest.approx(sid, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"c": 1.0, "weight": True}, {"distance": "l2", "alpha": 1.2, "weight": True}], ids=str)
@pytest.mark.parametrize("f", [score_implicit, reference.score_implicit])
def test_gradcheck(f, options):
    d = Drawn(Case((2, 1, 2, 3), F64, guided=True))
    loss = with_(f, **options)
    loss(d)
    names = [name for name in ALL if name in d.tensors]

    def values(*tensors):
        d.tensors |= dict(zip(names, tensors, strict=True))
        return loss(d).value

    torch.autograd.gradcheck(values, [d.tensors[name].requires_grad_() for name in names])


@pytest.mark.parametrize("c", [0.5, 2.0, None])
def test_gradient_is_that_of_the_divergence_between_scores(c):
    """arXiv 2410.16794: d/dtheta of E_{x_t ~ sg[p_theta]} d(s_theta(x_t) - s_q(x_t)), by quadrature in one dimension.

    The generator is x = theta·z + 0.3, q a mixture of two Gaussians; both scores are exact. c None: squared distance.
    """
    sigma, theta = 0.8, torch.tensor(0.7, dtype=F64, requires_grad=True)
    nodes = torch.linspace(-8, 8, 401, dtype=F64)
    z, n = (a.reshape(-1, 1) for a in torch.meshgrid(nodes, nodes, indexing="ij"))
    w = (torch.exp(-(z**2 + n**2) / 2) / (2 * math.pi) * (nodes[1] - nodes[0]) ** 2)[:, 0]  # trapezoid rule

    def score_p(x_t, theta):
        return -(x_t - 0.3) / (theta**2 + sigma**2)

    def score_q(x_t):
        logits = torch.stack([-((x_t - m) ** 2) / 2 / (0.5**2 + sigma**2) for m in (-1.5, 1.0)])
        pull = torch.stack([-(x_t - m) / (0.5**2 + sigma**2) for m in (-1.5, 1.0)])
        return (logits.softmax(0) * pull).sum(0)

    x = theta * z + 0.3
    x_t = x + sigma * n
    y = score_p(x_t.detach(), theta) - score_q(x_t.detach())
    distance = y**2 if c is None else (y**2 + c**2).sqrt() - c
    (true,) = torch.autograd.grad((w * distance[:, 0]).sum(), theta)

    fake = x_t + sigma**2 * score_p(x_t, theta.detach())  # parameters stopped, x_t not
    real = x_t + sigma**2 * score_q(x_t)
    if c is None:
        value = score_implicit(x, real, fake, distance="l2", weight=2 * w / sigma**4).value
    else:
        value = score_implicit(x, real, fake, c=c * sigma**2, weight=w / sigma**2).value
    (ours,) = torch.autograd.grad(value.sum(), theta)
    assert ours.item() == pytest.approx(true.item(), rel=1e-6) and abs(true.item()) > 0.01


def test_a_shift_of_everything_changes_nothing():
    d = Drawn(SMALL)
    tensors = [d.image(name).requires_grad_() for name in ("x", "a", "b")]
    grads = torch.autograd.grad(score_implicit(*tensors).value.sum(), tensors)
    torch.testing.assert_close(sum(grads), torch.zeros_like(grads[0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("distance", ["huber", "l2"])
@everywhere("score_implicit")
def test_upstream_gradient_of_stride_0(distance, place):
    for name in ("x", "real", "x_t"):
        summed_like_one_by_one(with_(score_implicit, distance=distance), SMALL, name, place)


@pytest.mark.parametrize("distance", ["huber", "l2"])
@pytest.mark.parametrize("poison", ["x", "real", "fake", "x_t", "real_c_skip", "weight"])
@pytest.mark.parametrize("number", SPOILS)
@everywhere("score_implicit")
def test_left_out(distance, poison, number, place):
    loss = with_(score_implicit, distance=distance, weight=poison == "weight")
    assert_left_out(loss, Case((3, 3, 8, 8), F32), ("x", "x_t", "real", "fake"), poison, number, place)


def test_module():
    d = Drawn(SMALL)
    args = d.image("x"), d.estimate("real"), d.estimate("fake")
    loss = ScoreImplicitLoss("l2", alpha=1.2, reduction="none")
    torch.testing.assert_close(loss(*args), score_implicit(*args, distance="l2", alpha=1.2).value)
    assert loss.nonfinite.item() == 0 and "alpha=1.2" in repr(loss)


def test_bad_input():
    x, c = torch.randn(2, 3, 4, 4), torch.ones(2)
    with pytest.raises(ValueError, match=r"distance to be one of 'huber', 'l2', got 'l1'"):
        score_implicit(x, x, x, distance="l1")
    with pytest.raises(ValueError, match=r"detach to be one of 'normaliser', 'factor', got 'all'"):
        score_implicit(x, x, x, detach="all")
    with pytest.raises(ValueError, match=r"alpha with distance='l2'"):
        score_implicit(x, x, x, alpha=1.2)
    with pytest.raises(ValueError, match=r"detach='normaliser' with distance='huber'"):
        score_implicit(x, x, x, distance="l2", detach="normaliser")
    with pytest.raises(ValueError, match=r"weight \[N\] or \[N, 1, 1, 1\] with N = 2 of x, got \(3,\)"):
        score_implicit(x, x, x, weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"gradient for images only: wanted weight without requires_grad"):
        score_implicit(x, x, x, weight=c.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"wanted real.c_skip without requires_grad"):
        score_implicit(x, Estimate(x, x, c.clone().requires_grad_(), c), x)


@of_ops
def test_opcheck():
    d = Drawn(Case((3, 3, 8, 8), F32, guided=True))
    real, fake = d.estimate("real"), d.estimate("fake")
    assert isinstance(fake, Estimate)
    args = [d.image("x"), real, fake._replace(x_t=None), None, "huber", 1.0, 0.03, ""]
    check_ops("score_implicit", args, [True, True, True, False, True, False, True])


@pytest.mark.parametrize("distance", ["huber", "l2"])
@everywhere("score_implicit")
def test_compiles(distance, place):
    wrt = ("x", "x_t", "real", "fake")
    compiles_in_one_graph(with_(score_implicit, distance=distance), Case((3, 3, 8, 8), F32), wrt, place)
