"""Adversarial losses over several nets' logits, fused, against float64, finite differences and the sums of GDD."""

import math
from typing import NamedTuple

import pytest
import torch
from kernel_cases import BF16, CPU, F16, F32, F64, assert_no_worse, of_ops, poisoned_memory
from places import everywhere
from torch.nn import functional as F

from potstill.kernels import discriminator_adversarial, generator_adversarial, reference
from potstill.kernels.modules import AdversarialLoss


class Nets(NamedTuple):
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype


#: Logits per net: GDD's lite0 and VGG heads, DMD2's single logit, a patch map, a bare [N].
SHAPES = [[(64,), (484,)], [(1,)], [(1, 5, 7), (3,), ()], [(600,)]]
#: On a GPU each is a kernel to compile for every kind and side.
NETS = [Nets(shapes, dtype) for shapes in SHAPES for dtype in (F32, F16, BF16, F64)]
SOME_NETS = [n for n in NETS if n.dtype is F32 or (n.dtype is not F64 and n.shapes is SHAPES[2])]
SIDES = [
    (lambda nets, kind: generator_adversarial(nets, kind=kind), reference.generator_adversarial),
    (
        lambda nets, kind: discriminator_adversarial(nets, [logit.flip(0) * 0.7 for logit in nets], kind=kind),
        lambda nets, kind: reference.discriminator_adversarial(nets, [logit.flip(0) * 0.7 for logit in nets], kind=kind),
    ),
]


def logits(shapes, n=4, dtype=F32, spread=5.0, place=CPU):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, *shape, generator=generator, dtype=F64) * spread).to(place, dtype) for shape in shapes]


def evaluate(loss, nets, kind, dtype=None):
    nets = [logit.detach().to(dtype or logit.dtype).requires_grad_() for logit in nets]
    value, nonfinite = loss(nets, kind=kind)
    cotangent = torch.linspace(-1, 2, len(value), dtype=value.dtype).to(value)
    return [value.detach(), *torch.autograd.grad(value, nets, cotangent)], nonfinite


@pytest.mark.parametrize("side", [0, 1], ids=["generator", "discriminator"])
@pytest.mark.parametrize("kind", ["softplus", "hinge"])
@everywhere("adversarial", NETS, gpu_cases=SOME_NETS)
def test_as_exact_as_plain(case, kind, side, place):
    (shapes, dtype), (fused, plain) = case, SIDES[side]
    for n in (4, 1, 0) if dtype is F32 else (4,):
        nets = logits(shapes, n, dtype, place=place)
        exact, rough = evaluate(plain, nets, kind, F64)[0], evaluate(plain, nets, kind)[0]
        with poisoned_memory():
            ours, nonfinite = evaluate(fused, nets, kind)
        assert nonfinite.item() == 0 and nonfinite.dtype is torch.int32
        for i, expected in enumerate(exact):
            assert ours[i].dtype == rough[i].dtype and ours[i].shape == expected.shape
            assert_no_worse(ours[i], rough[i], expected, f"{i}")


def test_sums_over_nets_of_means_over_logits():
    """arXiv 2405.20750: L_D sums, over samples and nets, the mean over that net's logits."""
    fake, real = logits([(2,), (3,)], 2, F64), logits([(3,), (1,)], 2, F64)

    def softplus(v):
        return math.log1p(math.exp(v))

    for i in range(2):
        l_g = sum(sum(softplus(-v) for v in net[i].tolist()) / net.shape[1] for net in fake)
        l_d = sum(sum(softplus(v) for v in net[i].tolist()) / net.shape[1] for net in fake)
        l_d += sum(sum(softplus(-v) for v in net[i].tolist()) / net.shape[1] for net in real)
        assert generator_adversarial(fake).value[i].item() == pytest.approx(l_g, rel=1e-12)
        assert discriminator_adversarial(fake, real).value[i].item() == pytest.approx(l_d, rel=1e-12)
        hinge = sum(sum(max(0, 1 + v) for v in net[i].tolist()) / net.shape[1] for net in fake)
        hinge += sum(sum(max(0, 1 - v) for v in net[i].tolist()) / net.shape[1] for net in real)
        assert discriminator_adversarial(fake, real, kind="hinge").value[i].item() == pytest.approx(hinge, rel=1e-12)


@everywhere("adversarial")
def test_far_logits(place):
    """softplus keeps what log(1 + exp) in float32 would round to 0 or infinity."""
    nets = [torch.tensor([[200.0], [20.0], [-200.0]], dtype=F32, device=place)]
    value = generator_adversarial(nets).value
    torch.testing.assert_close(value, torch.tensor([0.0, math.exp(-20), 200.0], device=place), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("kind", ["softplus", "hinge"])
def test_gradcheck(kind):
    fake, real = [[logit.requires_grad_() for logit in logits([(2, 2), (3,)], 2, F64)] for _ in range(2)]
    torch.autograd.gradcheck(lambda *nets: generator_adversarial(nets, kind=kind).value, fake)
    torch.autograd.gradcheck(lambda *nets: discriminator_adversarial(nets[:2], nets[2:], kind=kind).value, fake + real)


@everywhere("adversarial")
def test_only_the_gradients_asked_for(place):
    a, b = logits([(4,), (5,)], place=place)
    value = discriminator_adversarial([a.requires_grad_()], [b]).value
    (ours,) = torch.autograd.grad(value.sum(), a)  # stride 0 upstream
    torch.testing.assert_close(ours, torch.sigmoid(a.detach()) / 4)


@pytest.mark.parametrize("number", [float("nan"), -float("inf")])
@pytest.mark.parametrize("kind", ["softplus", "hinge"])
@everywhere("adversarial")
def test_left_out(kind, number, place):
    nets = logits([(4,), (5,)], place=place)
    clean, _ = evaluate(generator_adversarial, nets, kind)
    nets[1][2, 3] = number
    spoiled, nonfinite = evaluate(generator_adversarial, nets, kind)
    assert nonfinite.item() == 1
    for before, after in zip(clean, spoiled, strict=True):
        torch.testing.assert_close(after[2], torch.zeros_like(after[2]), rtol=0, atol=0)
        torch.testing.assert_close(after[[0, 1, 3]], before[[0, 1, 3]], rtol=1e-6, atol=1e-7)


@everywhere("adversarial")
def test_one_tensor_is_one_net_and_layouts_do_not_matter(place):
    (logit,) = logits([(3, 4, 4)], place=place)
    expected = F.softplus(-logit).mean((1, 2, 3))
    torch.testing.assert_close(generator_adversarial(logit).value, expected)
    torch.testing.assert_close(generator_adversarial(logit.to(memory_format=torch.channels_last)).value, expected)


def test_module():
    fake, real = logits([(4,)]), logits([(5,)])
    torch.testing.assert_close(AdversarialLoss(reduction="sum")(fake), generator_adversarial(fake).value.sum())
    expected = discriminator_adversarial(fake, real, kind="hinge").value.mean()
    torch.testing.assert_close(AdversarialLoss("hinge")(fake, real), expected)


def test_bad_input():
    a = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"logits of at least one net"):
        generator_adversarial([])
    with pytest.raises(ValueError, match=r"as many samples in logits\[1\] as in logits\[0\], 4 on cpu, got 5 on cpu"):
        generator_adversarial([a, torch.randn(5, 3)])
    with pytest.raises(ValueError, match=r"real_logits\[0\] as in fake_logits\[0\], 4 on cpu, got 4 on meta"):
        discriminator_adversarial([a], [a.to("meta")])
    with pytest.raises(ValueError, match=r"floating logits\[0\] \[N, ...\], got torch.int64"):
        generator_adversarial(a.long())
    with pytest.raises(ValueError, match=r"kind to be one of 'softplus', 'hinge', got 'wasserstein'"):
        generator_adversarial(a, kind="wasserstein")


@of_ops
def test_opcheck():
    nets, ops = logits([(4,), (5,)]), torch.ops.potstill
    args = nets, 1, "softplus"
    _, _, keep = ops.adversarial.default(*args)
    torch.library.opcheck(ops.adversarial_backward.default, [keep, torch.ones(()).expand(4), *args, [True, False]])
    for logit in nets:
        logit.requires_grad_()
    torch.library.opcheck(ops.adversarial.default, args)


@pytest.mark.filterwarnings("ignore:.*autograd functions are all static:DeprecationWarning")  # Dynamo's own
@everywhere("adversarial")
def test_compiles(place):
    nets = [logit.requires_grad_() for logit in logits([(4,), (1, 3, 3)], place=place)]

    def mean(*nets):
        value, nonfinite = generator_adversarial(nets)
        return value.mean(), nonfinite

    expected = torch.autograd.grad(mean(*nets)[0], nets)
    value, _ = torch.compile(mean, fullgraph=True, backend="aot_eager")(*nets)
    torch.testing.assert_close(torch.autograd.grad(value, nets), expected)
