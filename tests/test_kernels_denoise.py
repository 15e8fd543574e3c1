"""The weighted denoising loss, fused, against float64 and finite differences."""

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

from potstill.kernels import Estimate, denoise, reference
from potstill.kernels.modules import DenoiseLoss

SMALL = Case((3, 3, 5, 7), F32)
ALL = ("net", "x_t", "net_x_t", "net_uncond")


def with_(f, *, weight=True, reduction="mean"):
    return lambda d: f(d.estimate("net"), d.image("target"), d.positive("weight") if weight else None, reduction=reduction)


@everywhere("denoise", CASES, ON_GPU)
def test_as_exact_as_plain(case, place):
    fused_as_exact_as_plain(with_(denoise), with_(reference.denoise), case, ALL, place)


@pytest.mark.parametrize("options", [{"weight": False}, {"reduction": "sum"}, {"weight": False, "reduction": "sum"}])
@everywhere("denoise", [SMALL, Case((3, 3, 5, 7), F32, guided=True)])
def test_options_as_exact_as_plain(case, options, place):
    fused_as_exact_as_plain(with_(denoise, **options), with_(reference.denoise, **options), case, ALL, place)


@pytest.mark.parametrize("wrt", [("net",), ("x_t",), ("net_uncond",), ("x_t", "net_uncond")])
@everywhere("denoise")
def test_only_the_gradients_asked_for(wrt, place):
    case = Case((3, 3, 5, 7), F32, guided=True)
    fused_as_exact_as_plain(with_(denoise), with_(reference.denoise), case, wrt, place)


def test_edm_weight_turns_into_a_unit_loss_on_f():
    """arXiv 2206.00364: lambda(sigma)·c_out² = 1, so the loss is |F - (target - c_skip·x_t)/c_out|²."""
    d = Drawn(Case((4, 3, 4, 4), F64))
    sigma, sd = torch.tensor([0.002, 0.3, 5.0, 80.0], dtype=F64), 0.5
    c_skip, c_out = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2).sqrt()
    target, raw = d.image("target"), d.image("raw")
    x_t = target + sigma[:, None, None, None] * d.image("noise")
    value, _ = denoise(Estimate(raw, x_t, c_skip, c_out), target, (sigma**2 + sd**2) / (sigma * sd) ** 2)
    f = (target - c_skip[:, None, None, None] * x_t) / c_out[:, None, None, None]
    torch.testing.assert_close(value, ((raw - f) ** 2).mean((1, 2, 3)))


@pytest.mark.parametrize("f", [denoise, reference.denoise])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(f, reduction):
    d, loss = Drawn(Case((2, 1, 2, 3), F64, guided=True)), with_(f, reduction=reduction)
    loss(d)
    names = [name for name in ALL if name in d.tensors]

    def values(*tensors):
        d.tensors |= dict(zip(names, tensors, strict=True))
        return loss(d).value

    torch.autograd.gradcheck(values, [d.tensors[name].requires_grad_() for name in names])


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@everywhere("denoise")
def test_inputs_in_any_memory(layout, place):
    """Expanded over the batch, cut out of more channels, transposed: the same numbers as from contiguous memory."""
    d = Drawn(Case((3, 3, 6, 6), F32, layout), place)
    x_t, target = d.image("x_t")[:1].expand(3, 3, 6, 6), d.image("target")[:1].expand(3, 3, 6, 6)
    raw = torch.cat([d.image("raw"), d.image("other")], 1)[:, 1:4].requires_grad_()
    ours, plain = (f(Estimate(raw, x_t.mT, d.positive("c_skip"), d.positive("c_out")), target) for f in (denoise, reference.denoise))
    torch.testing.assert_close(ours.value, plain.value)
    torch.testing.assert_close(*(torch.autograd.grad(losses.value.sum(), raw)[0] for losses in (ours, plain)), rtol=1e-5, atol=1e-7)


@everywhere("denoise")
def test_upstream_gradient_of_stride_0(place):
    for name in ("net", "x_t"):
        summed_like_one_by_one(with_(denoise), SMALL, name, place)


@pytest.mark.parametrize("poison", ["net", "x_t", "target", "weight", "net_c_out"])
@pytest.mark.parametrize("number", SPOILS)
@everywhere("denoise")
def test_left_out(poison, number, place):
    assert_left_out(with_(denoise), Case((3, 3, 8, 8), F32), ("net", "x_t"), poison, number, place)


def test_module():
    d = Drawn(SMALL)
    loss = DenoiseLoss(per_sample="sum", reduction="sum")
    torch.testing.assert_close(
        loss(d.estimate("net"), d.image("target")),
        denoise(d.estimate("net"), d.image("target"), reduction="sum")[0].sum(),
    )


def test_bad_input():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"estimate of a floating dtype like target"):
        denoise(x.int(), x)
    with pytest.raises(ValueError, match=r"gradient for the estimate only: wanted target without requires_grad"):
        denoise(x, x.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"reduction to be one of 'mean', 'sum', got 'max'"):
        denoise(x, x, reduction="max")
    with pytest.raises(ValueError, match=r"weight as a floating tensor \[N\] .* got float"):
        denoise(x, x, 1.0)
    with pytest.raises(ValueError, match=r"weight as a floating tensor \[N\] .* got torch.int64"):
        denoise(x, x, torch.ones(2, dtype=torch.int64))


@of_ops
def test_opcheck():
    d = Drawn(Case((3, 3, 8, 8), F32, guided=True))
    check_ops("denoise", [d.estimate("net"), d.image("target"), d.positive("weight"), True], [True, True, True, False])


@everywhere("denoise")
def test_compiles(place):
    case = Case((3, 3, 8, 8), F32, guided=True)
    compiles_in_one_graph(with_(denoise), case, ("net", "x_t", "net_uncond"), place)
