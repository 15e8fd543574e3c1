"""DMD's distribution matching loss, fused, against float64 and against its formula written out."""

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

from potstill.kernels import Estimate, moments, reference, score_match
from potstill.kernels.modules import ScoreMatchLoss
from potstill.kernels.score_match import weighted


def with_(f, **options):
    return lambda d: f(d.image("x"), d.estimate("real"), d.estimate("fake"), **options)


@everywhere("score_match", CASES, ON_GPU)
def test_as_exact_as_plain(case, place):
    fused_as_exact_as_plain(with_(score_match), with_(reference.score_match), case, ("x",), place)


def test_formula():
    d = Drawn(Case((3, 2, 4, 4), F64))
    x, real, fake = d.image("x").requires_grad_(), d.image("real"), d.image("fake")
    value, _ = score_match(x, real, fake)
    value.sum().backward()
    for i in range(3):
        m = sum(abs(a - b) for a, b in zip(x[i].flatten().tolist(), real[i].flatten().tolist(), strict=True)) / 32
        g = (fake[i] - real[i]) / m
        torch.testing.assert_close(value[i], 0.5 * (g**2).mean(), rtol=1e-12, atol=0)
        torch.testing.assert_close(x.grad[i], g / 32, rtol=1e-12, atol=0)


def test_eps_bounds_the_normaliser():
    x = torch.ones(1, 1, 2, 2, dtype=F64, requires_grad=True)
    value, nonfinite = score_match(x, torch.ones_like(x).detach(), torch.full((1, 1, 2, 2), 3.0, dtype=F64), eps=0.5)
    value.sum().backward()
    assert value.item() == pytest.approx(0.5 * (2 / 0.5) ** 2) and nonfinite.item() == 0
    torch.testing.assert_close(x.grad, torch.full_like(x, 2 / 0.5 / 4))


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("plus", [0.0, 0.5])
@everywhere("score_match")
def test_weighted_as_exact_as_plain(weighed, plus, place):
    """What kernels.compat asks for."""

    def with_weight(f):
        options = {"eps": 0.01, "plus": plus}
        return lambda d: f(d.image("x"), d.estimate("real"), d.estimate("fake"), weight=d.positive("w") if weighed else None, **options)

    fused_as_exact_as_plain(with_weight(weighted), with_weight(reference.score_match), Case((3, 3, 5, 7), F32), ("x",), place)


@everywhere("score_match")
def test_upstream_gradient_of_stride_0(place):
    summed_like_one_by_one(with_(score_match), Case((3, 3, 5, 7), F32), "x", place)


@pytest.mark.parametrize("poison", ["x", "real", "fake", "x_t", "real_c_skip", "fake_c_out"])
@pytest.mark.parametrize("number", SPOILS)
@everywhere("score_match")
def test_left_out(poison, number, place):
    assert_left_out(with_(score_match), Case((3, 3, 8, 8), F32), ("x",), poison, number, place)


@everywhere("score_match")
def test_c_skip_held_by_both_estimates_cancels(place):
    d = Drawn(Case((3, 3, 8, 8), F32), place)
    real, fake, x = d.estimate("real"), d.estimate("fake"), d.image("x").requires_grad_()
    assert isinstance(real, Estimate) and isinstance(fake, Estimate)
    fake = fake._replace(c_skip=real.c_skip)
    (ours,) = torch.autograd.grad(score_match(x, real, fake).value.sum(), x)
    (plain,) = torch.autograd.grad(reference.score_match(x, real, fake).value.sum(), x)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("same_coefficients", [False, True])
@everywhere("score_match")
def test_equal_estimates_give_exactly_nothing(same_coefficients, place):
    """Before the fake score's first step it is the teacher; Adam would make a full step of a rounding error."""
    d = Drawn(Case((3, 3, 5, 7), F32), place)
    real, x = d.estimate("real"), d.image("x").requires_grad_()
    assert isinstance(real, Estimate)
    fake = real if same_coefficients else real._replace(c_skip=real.c_skip.clone(), c_out=real.c_out.clone())
    for loss in (score_match(x, real, fake), moments(x, real, fake)):
        torch.testing.assert_close(torch.autograd.grad(loss.value.sum(), x)[0], torch.zeros_like(x), rtol=0, atol=0)


def test_module():
    d = Drawn(Case((3, 3, 8, 8), F32))
    loss = ScoreMatchLoss(reduction="mean")
    x = d.image("x").requires_grad_()
    torch.testing.assert_close(
        loss(x, d.estimate("real"), d.estimate("fake")),
        score_match(x, d.estimate("real"), d.estimate("fake")).value.mean(),
    )
    assert loss.nonfinite.item() == 0


def test_bad_input():
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    c = torch.ones(2)
    with pytest.raises(ValueError, match=r"real shaped and placed like x, \(2, 3, 4, 4\) on cpu, got \(2, 3, 4, 5\)"):
        score_match(x, torch.randn(2, 3, 4, 5), y)
    with pytest.raises(ValueError, match=r"fake of a floating dtype like x"):
        score_match(x, y, y.int())
    with pytest.raises(ValueError, match=r"like x, .* on cpu, got .* on meta"):
        score_match(x, y, y.to("meta"))
    with pytest.raises(ValueError, match=r"gradient for x only.*real.raw without requires_grad"):
        score_match(x, y.clone().requires_grad_(), y)
    with pytest.raises(ValueError, match=r"gradient for x only.*fake.x_t without requires_grad"):
        score_match(x, y, Estimate(y, x.clone().requires_grad_(), c, c))
    with pytest.raises(ValueError, match=r"all or none of real.x_t, c_skip and c_out"):
        score_match(x, Estimate(y, x), y)
    with pytest.raises(ValueError, match=r"real.c_skip \[N\] or \[N, 1, 1, 1\] with N = 2 of x, got \(3,\)"):
        score_match(x, Estimate(y, x, torch.ones(3), c), y)
    with pytest.raises(ValueError, match=r"real.c_out as a floating tensor"):
        score_match(x, Estimate(y, x, c, torch.ones(2, dtype=torch.int64)), y)
    with pytest.raises(ValueError, match=r"real.raw_uncond with real.guidance = 3.0, got None"):
        score_match(x, Estimate(y, guidance=3.0), y)
    with pytest.raises(ValueError, match=r"at least one number per sample"):
        score_match(torch.randn(2, 0), torch.randn(2, 0), torch.randn(2, 0))
    with torch.no_grad():  # nobody asks for gradients here
        score_match(x, y.clone().requires_grad_(), y)


@of_ops
def test_opcheck():
    d = Drawn(Case((3, 3, 8, 8), F32))
    args = [d.image("x"), d.estimate("real"), d.estimate("fake"), d.positive("w"), 1e-6, 0.1]
    check_ops("score_match", args, [True] + [False] * 6)


@everywhere("score_match")
def test_compiles(place):
    compiles_in_one_graph(with_(score_match), Case((3, 3, 8, 8), F32), ("x",), place)
