"""Moment matching's student loss, fused, against float64 and its formula."""

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

from potstill.kernels import moments, reference
from potstill.kernels.modules import MomentsLoss

SMALL = Case((3, 3, 5, 7), F32)


def with_(f, *, weight=True, reduction="mean"):
    def loss(d):
        w = d.positive("weight") if weight else None
        return f(d.image("x"), d.estimate("real"), d.estimate("fake"), w, reduction=reduction)

    return loss


@everywhere("moments", CASES, ON_GPU)
def test_as_exact_as_plain(case, place):
    fused_as_exact_as_plain(with_(moments), with_(reference.moments), case, ("x",), place)


@pytest.mark.parametrize("options", [{"weight": False}, {"reduction": "sum"}, {"weight": False, "reduction": "sum"}])
@everywhere("moments")
def test_options_as_exact_as_plain(options, place):
    fused_as_exact_as_plain(with_(moments, **options), with_(reference.moments, **options), SMALL, ("x",), place)


@pytest.mark.parametrize("f", [moments, reference.moments])
def test_formula_and_gradcheck(f):
    d = Drawn(Case((2, 2, 3, 3), F64))
    x, real, fake, w = d.image("x"), d.image("real"), d.image("fake"), torch.tensor([0.5, 3.0], dtype=F64)
    expected = [w[i] * sum(a * b for a, b in zip(x[i].flatten(), (fake - real)[i].flatten(), strict=True)) for i in range(2)]
    torch.testing.assert_close(f(x, real, fake, w, reduction="sum").value, torch.stack(expected))
    torch.autograd.gradcheck(lambda x: f(x, real, fake, w).value, x.requires_grad_())


@everywhere("moments")
def test_upstream_gradient_of_stride_0(place):
    summed_like_one_by_one(with_(moments), SMALL, "x", place)


@pytest.mark.parametrize("poison", ["x", "real", "fake", "x_t", "weight", "fake_c_out"])
@pytest.mark.parametrize("number", SPOILS)
@everywhere("moments")
def test_left_out(poison, number, place):
    assert_left_out(with_(moments), Case((3, 3, 8, 8), F32), ("x",), poison, number, place)


def test_module():
    d = Drawn(SMALL)
    args = d.image("x"), d.estimate("real"), d.estimate("fake"), d.positive("weight")
    torch.testing.assert_close(MomentsLoss(per_sample="sum")(*args), moments(*args, reduction="sum").value.mean())


def test_bad_input():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"gradient for x only: wanted fake.raw without requires_grad"):
        moments(x, x, x.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"reduction to be one of"):
        moments(x, x, x, reduction="none")


@of_ops
def test_opcheck():
    d = Drawn(Case((3, 3, 8, 8), F32))
    args = [d.image("x"), d.estimate("real"), d.estimate("fake"), d.positive("w"), True]
    check_ops("moments", args, [True] + [False] * 6)


@everywhere("moments")
def test_compiles(place):
    compiles_in_one_graph(with_(moments), Case((3, 3, 8, 8), F32), ("x",), place)
