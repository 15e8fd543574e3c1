"""The forward process, fused: dtypes, layouts, and backward."""

import pytest
import torch
from kernel_cases import CPU, F16, F32, F64, assert_no_worse, of_ops, poisoned_memory
from places import everywhere

from benches.rehearse import REHEARSING
from potstill.kernels import add_noise, reference
from potstill.kernels._lib import INTERPRET

SHAPES = [(3, 3, 5, 7), (4, 1, 8, 8), (2, 3, 32, 32), (2, 40, 2, 2), (5, 2), (3, 1025), (0, 3, 8, 8), (1, 4, 64, 64)]
if INTERPRET:  # which takes milliseconds a program
    SHAPES = [(2, 3, 5, 7), (1, 1, 36, 36), (1, 40, 2, 2), (3, 2), (0, 3, 8, 8)]
SOME = [(3, 3, 5, 7), (3, 1025)]  # on a GPU
LAYOUT = {False: torch.contiguous_format, True: torch.channels_last}


def lies(t, nhwc):
    return t.numel() == 0 or t.is_contiguous(memory_format=LAYOUT[nhwc and t.ndim == 4])


def shapes(place):
    if REHEARSING:
        return [(1, 3, 5, 7)]
    return SHAPES if place == CPU else SOME


def inputs(shape, dtype=F32, nhwc=False, place=CPU):
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(shape, generator=generator, dtype=F64) for _ in range(2))
    return (
        x.to(dtype, memory_format=LAYOUT[nhwc and len(shape) == 4]).to(place),
        (torch.rand(shape[0], generator=generator) + 0.1).to(place),
        noise.to(place, F32),
    )


@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=str)
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@everywhere("noising")
def test_add_noise(nhwc, dtype, place):
    for shape in shapes(place):
        x, sigma, noise = inputs(shape, dtype, nhwc, place)
        exact = x.to(F64) + sigma.to(F64).view(-1, *(1,) * (x.ndim - 1)) * noise.to(F64)
        x.requires_grad_()
        with poisoned_memory():
            x_t = add_noise(x, sigma, noise)
        assert x_t.dtype == (F64 if dtype is F64 else F32)
        assert lies(x_t, nhwc), (x_t.shape, x_t.stride())
        assert_no_worse(x_t.detach(), reference.add_noise(x, sigma, noise).detach(), exact, str(shape))
        cotangent = torch.randn_like(x_t)
        (dx,) = torch.autograd.grad(x_t, x, cotangent)
        torch.testing.assert_close(dx, cotangent.to(dtype))


def test_gradcheck():
    x, sigma, noise = inputs((2, 2, 3, 3), F64)
    torch.autograd.gradcheck(lambda x: add_noise(x, sigma, noise), x.requires_grad_())


@everywhere("noising")
def test_one_sigma_for_all(place):
    x, _, noise = inputs((3, 3, 4, 4), place=place)
    torch.testing.assert_close(add_noise(x, torch.tensor(2.5, device=place), noise), x + 2.5 * noise)


def test_bad_input():
    x, sigma, noise = inputs((2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"sigma as a floating tensor .* got torch.int64"):
        add_noise(x, torch.ones(2, dtype=torch.int64), noise)
    with pytest.raises(ValueError, match=r"sigma as a floating tensor .* got float"):
        add_noise(x, 0.5, noise)
    with pytest.raises(ValueError, match=r"sigma \[N\] or \[N, 1, 1, 1\] with N = 2 of x, got \(2, 1\)"):
        add_noise(x, sigma.view(2, 1), noise)
    with pytest.raises(ValueError, match=r"noise shaped and placed like x, \(2, 3, 4, 4\) on cpu, got \(2, 3, 4, 5\)"):
        add_noise(x, sigma, torch.randn(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"gradient for x only: wanted noise without requires_grad"):
        add_noise(x, sigma, noise.clone().requires_grad_())


@of_ops
def test_opcheck():
    torch.library.opcheck(torch.ops.potstill.add_noise.default, (torch.randn(2, 12).requires_grad_(), torch.rand(2), torch.randn(2, 12)))


@everywhere("noising")
def test_compiles(place):
    x, sigma, noise = inputs((2, 3, 4, 4), place=place)
    x.requires_grad_()
    expected = torch.autograd.grad(add_noise(x, sigma, noise).square().sum(), x)
    compiled = torch.compile(lambda x: add_noise(x, sigma, noise).square().sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), expected)
