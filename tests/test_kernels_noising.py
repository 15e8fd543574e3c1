"""The forward process, fused: known answers of the generator, the law of the numbers, layouts, and backward."""

import math

import pytest
import torch
from kernel_cases import CPU, F16, F32, F64, assert_no_worse, of_ops, poisoned_memory
from places import everywhere, on_gpu
from rehearse import REHEARSING

from potstill.kernels import Normals, add_noise, noised_input, reference
from potstill.kernels._lib import INTERPRET

SHAPES = [(3, 3, 5, 7), (4, 1, 8, 8), (2, 3, 32, 32), (2, 40, 2, 2), (5, 2), (3, 1025), (0, 3, 8, 8), (1, 4, 64, 64)]
if INTERPRET:  # which takes milliseconds a program
    SHAPES = [(2, 3, 5, 7), (1, 1, 36, 36), (1, 40, 2, 2), (3, 2), (0, 3, 8, 8)]
SOME = [(3, 3, 5, 7), (3, 1025)]  # on a GPU, where every number of channels is a kernel to compile
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


def test_philox_known_answers():
    """kat_vectors of Random123: philox4x32, 10 rounds."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    ones, zeros = ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2), ((0,) * 4, (0,) * 2)
    for (counter, key), words in (
        (zeros, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ones, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        drawn = reference.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
        assert tuple(int(w) for w in drawn) == words


def test_normals_are_box_muller_of_philox():
    """Position (n, c, pixel) -> counter (pixel // 4, c, n, offset), written out for a few positions."""
    normals = Normals(torch.tensor(0x1234567890ABCDEF), torch.tensor(77))
    drawn = normals.draw((3, 2, 5, 5))
    key = [torch.tensor(0x90ABCDEF), torch.tensor(0x12345678)]
    for n, c, pixel in ((0, 0, 0), (0, 0, 1), (2, 1, 14), (1, 0, 23), (2, 1, 24)):
        words = reference.philox([torch.tensor(v) for v in (pixel // 4, c, n, 77)], key)
        u1, u2 = ((int(w) + 0.5) / 2**32 for w in (words[:2] if pixel % 4 < 2 else words[2:]))
        turn = math.cos(2 * math.pi * u2) if pixel % 2 == 0 else math.sin(2 * math.pi * u2)
        assert drawn[n, c, pixel // 5, pixel % 5].item() == pytest.approx(math.sqrt(-2 * math.log(u1)) * turn, abs=2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_draws_what_the_reference_draws(shape):
    """Only under TRITON_INTERPRET=1 are these two implementations."""
    normals = Normals(torch.tensor(-3), torch.tensor(2**40 + 5))
    torch.testing.assert_close(normals.draw(shape), reference.normals(normals.seed, normals.offset, shape), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("place", on_gpu("noising"), indirect=True)
def test_on_a_gpu_are_drawn_the_normals_of_the_cpus_reference(shape, place):
    """Bits of Philox are the same, logarithm and cosine differ in their last; both seed and offset pass 2^32."""
    seed, offset = torch.tensor(-3), torch.tensor(2**40 + 5)
    drawn = Normals(seed.to(place), offset.to(place)).draw(shape)
    assert drawn.device.type == place.type
    torch.testing.assert_close(drawn.cpu(), reference.normals(seed, offset, shape), rtol=0, atol=2e-6)


def test_normals_are_normal_and_independent():
    side = 32 if INTERPRET else 64
    z = Normals.from_seed(1).draw((4, 3, side, side)).to(F64).flatten()
    for power, moment in enumerate((0, 1, 0, 3, 0, 15), 1):
        spread = math.sqrt((math.prod(range(2 * power - 1, 0, -2)) - moment**2) / len(z))
        assert abs((z**power).mean().item() - moment) < 4.5 * spread, power
    for lag in (1, 2, 3, 4, side, side**2):  # within a quad, between quads, rows, planes
        assert abs((z[lag:] * z[:-lag]).mean().item()) < 4.5 / math.sqrt(len(z))


@everywhere("noising")
def test_normals_depend_on_seed_and_offset_and_not_on_batch_size(place):
    first = Normals.from_seed(5, place)
    drawn = first.draw((4, 3, 6, 6))
    assert torch.equal(first.draw((2, 3, 6, 6)), drawn[:2])
    again = Normals.from_seed(5, place)
    assert torch.equal(again.draw((4, 3, 6, 6)), drawn)
    again.advance()
    assert (again.draw((4, 3, 6, 6)) - drawn).abs().mean() > 0.5
    assert (Normals.from_seed(6, place).draw((4, 3, 6, 6)) - drawn).abs().mean() > 0.5


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=str)
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@everywhere("noising")
def test_add_noise(nhwc, dtype, drawn, place):
    for shape in shapes(place):
        x, sigma, noise = inputs(shape, dtype, nhwc, place)
        normals = Normals.from_seed(3, place)
        noise = reference.normals(*normals, shape) if drawn else noise
        exact = x.to(F64) + sigma.to(F64).view(-1, *(1,) * (x.ndim - 1)) * noise.to(F64)
        x.requires_grad_()
        with poisoned_memory():
            x_t = add_noise(x, sigma, normals if drawn else noise)
        assert x_t.dtype == (F64 if dtype is F64 else F32) and lies(x_t, nhwc)
        if drawn:
            torch.testing.assert_close(x_t.to(F64), exact, rtol=0, atol=4e-6)
        else:
            assert_no_worse(x_t.detach(), reference.add_noise(x, sigma, noise).detach(), exact, str(shape))
        cotangent = torch.randn_like(x_t)
        (dx,) = torch.autograd.grad(x_t, x, cotangent)
        torch.testing.assert_close(dx, cotangent.to(dtype))


@pytest.mark.parametrize("channels_last", [False, True], ids=["to nchw", "to nhwc"])
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
@everywhere("noising")
def test_noised_input(dtype, pad, nhwc, channels_last, place):
    for shape in (s for s in shapes(place) if len(s) == 4):
        x, sigma, noise = inputs(shape, F32, nhwc, place)
        c_in, channels = 1 / (sigma**2 + 0.25).sqrt(), shape[1] + pad
        for given in (noise, Normals.from_seed(8, place)):
            x.requires_grad_()
            same = given if isinstance(given, torch.Tensor) else reference.normals(*given, shape)
            expected = reference.noised_input(x, sigma, same, c_in, dtype=dtype, channels=channels)
            with poisoned_memory():
                ours = noised_input(x, sigma, given, c_in, dtype=dtype, channels_last=channels_last, channels=channels)
            assert lies(ours.net_input, channels_last) and lies(ours.x_t, nhwc)
            assert not ours.net_input[:, shape[1] :].any()
            for ours_i, expected_i in zip(ours, expected, strict=True):
                half = 1e-3 if expected_i.dtype is F16 else 0
                torch.testing.assert_close(ours_i, expected_i, rtol=1e-5 + half, atol=4e-6)
            cotangents = [torch.randn_like(t) for t in expected]
            (dx,) = torch.autograd.grad(ours, x, cotangents)
            exact = cotangents[0].to(F64)
            exact = exact + c_in.to(F64)[:, None, None, None] * cotangents[1][:, : shape[1]].to(F64)
            (rough,) = torch.autograd.grad(expected, x, cotangents)
            assert_no_worse(dx, rough, exact, f"gradient of {shape}")


@everywhere("noising")
def test_gradient_through_either_output(place):
    x, sigma, noise = inputs((2, 3, 4, 4), place=place)
    x.requires_grad_()
    out = noised_input(x, sigma, noise, sigma, dtype=F32)
    (dx,) = torch.autograd.grad(out.x_t.sum(), x, retain_graph=True)
    torch.testing.assert_close(dx, torch.ones_like(x))
    (dx,) = torch.autograd.grad(out.net_input.sum(), x)
    torch.testing.assert_close(dx, sigma[:, None, None, None].expand_as(x))


def test_gradcheck():
    x, sigma, noise = inputs((2, 2, 3, 3), F64)
    x.requires_grad_()
    torch.autograd.gradcheck(lambda x: add_noise(x, sigma, noise), x)
    torch.autograd.gradcheck(lambda x: noised_input(x, sigma, noise, sigma, dtype=F64, channels=4), x)


@everywhere("noising")
def test_one_sigma_for_all(place):
    x, _, noise = inputs((3, 3, 4, 4), place=place)
    sigma, c_in = torch.tensor(2.5, device=place), torch.tensor(0.5, device=place)
    torch.testing.assert_close(add_noise(x, sigma, noise), x + 2.5 * noise)
    net = noised_input(x, sigma, noise, c_in, dtype=F32, channels_last=False).net_input
    torch.testing.assert_close(net, 0.5 * (x + 2.5 * noise))


def test_bad_input():
    x, sigma, noise = inputs((2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"sigma as a floating tensor .* got torch.int64"):
        add_noise(x, torch.ones(2, dtype=torch.int64), noise)
    with pytest.raises(ValueError, match=r"sigma as a floating tensor .* got float"):
        add_noise(x, 0.5, noise)
    with pytest.raises(ValueError, match=r"sigma \[N\] with N = 2 of x, got \(2, 1, 1, 1\)"):
        add_noise(x, sigma.view(2, 1, 1, 1), noise)
    with pytest.raises(ValueError, match=r"noise shaped and placed like x, \(2, 3, 4, 4\) on cpu, got \(2, 3, 4, 5\)"):
        add_noise(x, sigma, torch.randn(2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"gradient for x only: wanted noise without requires_grad"):
        add_noise(x, sigma, noise.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"seed \[\] int64 on cpu like x, got torch.float32 \(\) on cpu"):
        add_noise(x, sigma, Normals(torch.tensor(1.0), torch.tensor(0)))
    with pytest.raises(ValueError, match=r"channels at least 3, those of x, got 2"):
        noised_input(x, sigma, noise, sigma, channels=2)
    with pytest.raises(ValueError, match=r"images \[N, C, H, W\], got \(2, 48\)"):
        noised_input(x.flatten(1), sigma, noise.flatten(1), sigma)
    with pytest.raises(ValueError, match=r"floating dtype like x"):
        noised_input(x, sigma, noise, sigma, dtype=torch.int32)


@of_ops
def test_opcheck():
    ops, seed = torch.ops.potstill, torch.tensor(3)
    x, sigma, noise = torch.randn(2, 12), torch.rand(2), torch.randn(2, 12)
    torch.library.opcheck(ops.normals.default, (seed, seed, [2, 3, 2, 2]))
    torch.library.opcheck(ops.add_noise.default, (x, sigma, noise, None, None, 3, False))
    torch.library.opcheck(ops.add_noise.default, (x, sigma, None, seed, seed, 3, True))
    torch.library.opcheck(
        ops.noised_input.default, (x, sigma, noise, None, None, sigma, 3, False, F16, True, 8)
    )  # fmt: skip
    for dx_t in (x, None):
        args = (dx_t, torch.randn(2, 32, dtype=F16), sigma, 3, False, True, 8, F32)
        torch.library.opcheck(ops.noised_input_backward.default, args)


@pytest.mark.filterwarnings("ignore:.*autograd functions are all static:DeprecationWarning")  # Dynamo's own
@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@everywhere("noising")
def test_compiles(drawn, place):
    x, sigma, noise = inputs((2, 3, 4, 4), place=place)
    x.requires_grad_()

    def both(x, sigma, noise):
        x_t, net_input = noised_input(x, sigma, noise, 1 / sigma, dtype=F32, channels=8)
        return x_t.square().sum() + net_input.square().sum() + add_noise(x, sigma, noise).sum()

    noise = Normals.from_seed(2, place) if drawn else noise
    expected = torch.autograd.grad(both(x, sigma, noise), x)
    value = torch.compile(both, fullgraph=True, backend="aot_eager")(x, sigma, noise)
    torch.testing.assert_close(torch.autograd.grad(value, x), expected)
