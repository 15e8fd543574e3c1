"""EDM2's operations on images against its formulas in PyTorch, one by one in the images' dtype: never more than twice their error."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from kernel_cases import BF16, F16, F32, F64, Case, made_of, of_ops, off_the_grid, op_as_exact_as_plain, poisoned_memory
from places import everywhere
from torch.nn import functional as F

from potstill import kernels
from potstill.kernels import _mp, reference
from potstill.kernels._aot import EDM2
from potstill.kernels._lib import INTERPRET
from potstill.kernels.norm_silu import kept

# The interpreter meets exp(100) where the GPU says infinity, and 0/0 where a kernel then takes another number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KEY, DROPOUT, CLIP = -0x123456789ABCDEF, 0.13, 1.2


def silu(x):
    return F.silu(x) / 0.596


def pixel_norm(x):
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=F64 if x.dtype is F64 else F32)
    return x / (1e-4 + norm / x.shape[1] ** 0.5).to(x.dtype)


def pixel_norm_silu(x):
    n = pixel_norm(x)
    return n, silu(n)


def mp_silu(x, scale=None, key=None):
    y = silu(x if scale is None else x * scale.view(*scale.shape, *[1] * (x.ndim - 2)))
    if key is None:
        return y
    n, c, h, w = (*x.shape, 1, 1)[:4]
    return torch.where(kept(key, torch.Size((n, c, h, w)), DROPOUT).view(x.shape), y / (1 - DROPOUT), 0)


def mp_sum(x, y):
    return (0.7 * x + 0.3 * y) / (0.7**2 + 0.3**2) ** 0.5


def clipped(x, y):
    """In float32, so that it clips what the exact one clips."""
    wide = F64 if x.dtype is F64 else F32
    return mp_sum(x.to(wide), y.to(wide)).clip(-CLIP, CLIP).to(x.dtype)


def mp_cat_silu(x, b):
    t = 0.4
    scale = ((x.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2)) ** 0.5
    cat = torch.cat([scale * (1 - t) / x.shape[1] ** 0.5 * x, scale * t / b.shape[1] ** 0.5 * b], 1)
    return cat, silu(cat)


class Op(NamedTuple):
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    arguments: str = "x"


OPS = {
    "pixel_norm": Op(kernels.pixel_norm, pixel_norm),
    "pixel_norm_silu": Op(kernels.pixel_norm_silu, pixel_norm_silu),
    "mp_silu": Op(kernels.mp_silu, mp_silu),
    "mp_silu of a scale": Op(kernels.mp_silu, mp_silu, "x scale"),
    "mp_silu with dropout": Op(lambda x, scale, key: kernels.mp_silu(x, scale, DROPOUT, key), mp_silu, "x scale key"),
    "mp_sum": Op(lambda x, y: kernels.mp_sum(x, y, 0.3), mp_sum, "x y"),
    "mp_sum with a clip": Op(lambda x, y: kernels.mp_sum(x, y, 0.3, CLIP), clipped, "x y"),
    "mp_cat_silu": Op(lambda x, b: kernels.mp_cat_silu(x, b, 0.4), mp_cat_silu, "x b"),
}
CASES = [
    Case((2, 192, 3, 4), BF16, "nhwc"),
    Case((3, 7, 5, 3), F16, "nhwc"),  # nothing divides anything
    Case((2, 20, 5, 7), F32),  # not NHWC
    Case((1, 72, 3, 8), BF16, "nhwc", unaligned=True),
    Case((5, 33), F32),  # vectors
    Case((2, 6, 3, 3), F64, "nhwc"),
    Case((0, 8, 4, 4), F32, "nhwc"),
    Case((1, 2, 1, 1), F32),  # and not one channel, which is its own norm: its gradient is what rounding leaves of 0
    Case((1, 130, 2, 3), F32, "nhwc"),  # more channels than a tile
    Case((1, 12, 37, 40), F16, "nhwc"),  # more pixels than the tiles of one program
]
#: What the networks have.
ON_GPU = [Case((2, c, r, r), dtype, "nhwc") for c, r in EDM2 for dtype in (BF16, F16)]


def image(case, generator, c=None):
    shape = list(case.shape)
    shape[1] = c or shape[1]
    t = torch.randn(shape, generator=generator, dtype=F64).to(case.dtype)
    return t.contiguous(memory_format=torch.channels_last) if case.layout == "nhwc" else t


def inputs(op, case, place="cpu"):
    generator = torch.Generator().manual_seed(0)
    c = case.shape[1]
    makers = {
        "x": lambda: image(case, generator) * 1.5,
        "y": lambda: image(case, generator),
        "b": lambda: image(case, generator, c // 2 + 1),
        "scale": lambda: 1 + torch.randn(case.shape[0], c, generator=generator, dtype=F64).to(case.dtype),
        "key": lambda: torch.tensor([KEY]),
    }
    tensors = {name: makers[name]().to(place) for name in op.arguments.split()}
    return {name: off_the_grid(t) if case.unaligned and t.is_floating_point() else t for name, t in tensors.items()}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@everywhere("mp", CASES, ON_GPU)
def test_no_worse_than_pytorch(op, case, place):
    made = op_as_exact_as_plain(op.ours, op.plain, inputs(op, case, place))
    if case.layout == "nhwc" and case.shape[0] > 0:
        of_kernels = (INTERPRET or place.type == "cuda") and case.dtype is not F64  # a definition's gradients lie as autograd makes them
        ours = [t for name, t in made.items() if t.ndim == 4 and (of_kernels or "output" in name)]
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in ours)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@everywhere("mp")
def test_the_gradient_of_a_sum_has_stride_zero_and_views_are_copied(op, place):
    case = Case((2, 6, 4, 6), F32, "nhwc")
    tensors = inputs(op, case, place)
    views = {name: torch.stack([t, t], -1)[..., 0] if t.is_floating_point() else t for name, t in tensors.items()}
    assert not views["x"].is_contiguous() and not views["x"].is_contiguous(memory_format=torch.channels_last)

    def total(**given):
        out = op.ours(**given)
        return sum(t.sum() for t in out) if isinstance(out, tuple) else out.sum()

    exact = made_of(lambda **given: sum(t.sum() for t in _tuple(op.plain(**given))), tensors, exact=True)
    for given in (tensors, views):
        for name, found in made_of(total, given).items():
            torch.testing.assert_close(found.double(), exact[name], rtol=1e-5, atol=1e-5 * exact[name].abs().max().item())


def _tuple(out):
    return out if isinstance(out, tuple) else (out,)


PARTS = [
    (kernels.pixel_norm_silu, reference.pixel_norm_silu, "pixel_norm"),
    (lambda x, b: kernels.mp_cat_silu(x, b, 0.4), lambda x, b: reference.mp_cat_silu(x, b, 0.4), "mp_cat_silu"),
]


@pytest.mark.parametrize(("ours", "definition", "name"), PARTS, ids=[part[-1] for part in PARTS])
@everywhere("mp")
def test_one_of_two_outputs_has_a_gradient_alone(ours, definition, name, place):
    tensors = inputs(OPS[name], Case((2, 12, 3, 5), F32, "nhwc"), place)
    for i in (0, 1):
        exact = made_of(lambda **given: definition(**given)[i], tensors, exact=True)
        with poisoned_memory():
            found = made_of(lambda **given: ours(**given)[i], tensors)
        for key, t in found.items():
            torch.testing.assert_close(t.double(), exact[key], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("op", [op for op in OPS.values() if " " in op.arguments], ids=[n for n, op in OPS.items() if " " in op.arguments])
@everywhere("mp")
def test_one_of_two_inputs_has_a_gradient_alone(op, place):
    tensors = inputs(op, Case((2, 12, 3, 5), F32, "nhwc"), place)
    both = made_of(op.ours, tensors)
    for name in [n for n, t in tensors.items() if t.is_floating_point()]:
        rest = {n: t for n, t in tensors.items() if n != name}
        with poisoned_memory():
            alone = made_of(lambda leaf, rest=rest, name=name: op.ours(**{name: leaf}, **rest), {"leaf": tensors[name]})
        assert torch.equal(alone["gradient of leaf"], both[f"gradient of {name}"])


@everywhere("mp")
def test_a_zero_pixel_and_large_numbers_have_a_norm(place):
    x = torch.zeros(2, 8, 3, 3, device=place).contiguous(memory_format=torch.channels_last).requires_grad_()
    n, s = kernels.pixel_norm_silu(x)
    assert torch.equal(n, torch.zeros_like(n)) and torch.equal(s, torch.zeros_like(s))
    (dx,) = torch.autograd.grad(n.sum(), x)
    torch.testing.assert_close(dx, torch.full_like(dx, 1e4))
    large = torch.full((1, 64, 2, 2), 60000.0, dtype=F16, device=place)  # its square is infinite in float16
    torch.testing.assert_close(kernels.pixel_norm(large), torch.ones_like(large))


@everywhere("mp")
def test_magnitudes_are_preserved(place):
    """What the operations are made for, by numbers and not by formulas: of normal numbers each makes numbers of mean square 1."""
    x, y, b = (torch.randn(1, c, 64, 64, generator=torch.Generator().manual_seed(i)).to(place) for i, c in enumerate((12, 12, 36)))
    made = [kernels.mp_silu(x), kernels.mp_sum(x, y, 0.3), kernels.pixel_norm(7 * x), kernels.mp_silu(x, None, 0.0)]
    for t in made:
        assert abs(t.square().mean() - 1) < 0.03  # five standard deviations of 49152 numbers
    cat, _ = kernels.mp_cat_silu(x, b, 0.5)
    of_x, of_b = cat.split([12, 36], 1)
    assert abs(of_x.square().sum() / of_b.square().sum() - 1) < 0.05  # both add as much to what reads them
    assert abs(cat.square().mean() - 1) < 0.03


@everywhere("mp")
def test_clipped_numbers_have_no_gradient_and_nan_stays(place):
    values = [0.5, 1.0, 1.0001, -1.0, -3.0, float("nan"), float("inf"), -float("inf"), 0.0]
    x = torch.tensor([values], device=place, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out = kernels.mp_sum(x, y, 0.5, 2**0.5)  # (x + y)/√2 = √2·x
    torch.testing.assert_close(out.detach() / 2**0.5, torch.tensor([values], device=place).clamp(-1, 1), equal_nan=True)
    for grad in torch.autograd.grad(out.sum(), (x, y)):
        inside = [0, 8] + [i for i in (1, 3) if abs(out[0, i].item()) < 2**0.5]  # 1 is clipped or not as its rounding falls
        expected = torch.tensor([[2**-0.5 if i in inside else 0.0 for i in range(9)]], device=place)
        settled = [0, 2, 4, 5, 6, 7, 8]
        torch.testing.assert_close(grad[:, settled], expected[:, settled])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@everywhere("mp")
def test_what_is_not_finite_stays_and_spoils_its_own_pixel_alone(op, number, place):
    tensors = inputs(op, Case((2, 6, 3, 3), F32, "nhwc"), place)
    clean = made_of(op.ours, tensors)
    tensors["x"] = tensors["x"].clone()
    tensors["x"][1, 2, 1, 1] = number
    found, expected = made_of(op.ours, tensors), made_of(op.plain, tensors)
    for name in found:
        if found[name].ndim == 4:
            ours, before = (t[name].permute(0, 2, 3, 1).flatten(0, 2) for t in (found, clean))  # by pixel, of which it was number 13
            assert torch.equal(ours[:13], before[:13]) and torch.equal(ours[14:], before[14:])
        if name.startswith("output"):
            assert torch.equal(found[name].isnan(), expected[name].isnan())
            assert torch.equal(found[name].isinf(), expected[name].isinf())


@everywhere("mp")
def test_dropouts_mask_is_that_of_norm_silu(place):
    x, key = torch.ones(2, 12, 5, 3, device=place), torch.tensor([KEY], device=place)
    for dropout in (0.13, 0.5):
        y = kernels.mp_silu(x, None, dropout, key)
        assert torch.equal(y != 0, kept(key, x.shape, dropout))
    assert torch.equal(kernels.mp_silu(x, None, 0.0, key), kernels.mp_silu(x))


@of_ops
def test_what_is_kept():
    """Beside what the block holds anyway: 4 bytes a pixel, nothing, a bit a number with a clip, nothing."""
    case = Case((2, 64, 4, 4), F16, "nhwc")
    numbers, pixels = 2 * 64 * 16, 2 * 16
    for name, expected in {
        "pixel_norm_silu": {F16: numbers, F32: pixels},
        "mp_silu with dropout": {F16: numbers + 2 * 64, torch.int64: 1},
        "mp_sum": {torch.uint8: 0},
        "mp_sum with a clip": {torch.uint8: numbers // 8},
        "mp_cat_silu": {F16: 2 * (64 + 33) * 16},
    }.items():
        saved = []
        tensors = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in inputs(OPS[name], case).items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            OPS[name].ours(**tensors)
        found = {dtype: sum(t.numel() for t in saved if t.dtype is dtype) for dtype in {t.dtype for t in saved}}
        assert found == expected, name
    bits = torch.ops.potstill.mp_sum.default(*inputs(OPS["mp_sum"], case).values(), 0.3, CLIP, False)[1]
    assert bits.numel() == 0  # nobody will ask


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_gradcheck(op):
    """Of the definitions, twice: they are what CPU tensors and `definitions()` take."""
    case = Case((2, 3, 2, 2), F64, "nhwc")
    tensors = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in inputs(op, case).items()}
    call = lambda *given: op.ours(**dict(zip(tensors, given, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(call, list(tensors.values()))
    assert torch.autograd.gradgradcheck(call, list(tensors.values()))


@of_ops
def test_opcheck():
    """Each op once whole, and its other forms without what takes an interpreter minutes: compiling them for sizes not known ahead."""
    ops, done = torch.ops.potstill, set()

    def check(op, given):
        first = () if op in done else ("test_aot_dispatch_dynamic",)
        torch.library.opcheck(op, given, test_utils=("test_schema", "test_autograd_registration", "test_faketensor", *first))
        done.add(op)

    x, y = (torch.randn(2, 6, 2, 2).contiguous(memory_format=torch.channels_last).requires_grad_() for _ in range(2))
    scale, key = torch.randn(2, 6, requires_grad=True), torch.tensor([KEY])
    g, r = x.detach(), torch.rand(8)
    for activated in (True, False):
        check(ops.pixel_norm.default, (x, 1e-4, activated))
    for dn, ds in ((g, g), (g, None), (None, g)):
        check(ops.pixel_norm_backward.default, (dn, ds, g, r, 1e-4))
        check(ops.mp_cat_silu_backward.default, (dn, ds, g, 0.5, 2, [dn is not None, True]))
    check(ops.mp_cat_silu.default, (x, y, 0.5))
    for given in ((None, 0.0, None), (scale, 0.0, None), (scale, 0.1, key)):
        check(ops.mp_silu.default, (x, *given))
    for wanted in ([True, True], [True, False], [False, True]):
        check(ops.mp_silu_backward.default, (g, g, scale.detach(), 0.1, key, wanted))
        check(ops.mp_sum_backward.default, (g, torch.zeros(6, dtype=torch.uint8), 0.3, wanted))
    for clip, keep in ((None, True), (1.0, True), (1.0, False)):
        check(ops.mp_sum.default, (x, y, 0.3, clip, keep)) if keep else ops.mp_sum.default(x, y, 0.3, clip, keep)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@everywhere("mp")
def test_compiles_into_one_graph(op, place):
    torch.compiler.reset()
    tensors = inputs(op, Case((2, 6, 4, 4), F32, "nhwc"), place)
    expected = made_of(op.ours, tensors)
    for name, found in made_of(torch.compile(op.ours, fullgraph=True, backend="aot_eager"), tensors).items():
        torch.testing.assert_close(found, expected[name])  # the compiler differentiates a definition by other formulas


def test_a_tile_of_every_width_keeps_its_loads_whole():
    for c, _ in EDM2:
        p = _mp._tile(c, 2048)
        assert (c % p["CB"], p["CB"] * p["ROWS"]) == (0, 2048)
        p = _mp._rows(c, 4096)
        assert c <= p["CB"] < 2 * c and p["CB"] * p["ROWS"] <= 32 * 32 * p["num_warps"]


IMAGE = torch.zeros(2, 8, 4, 4)
BAD = {
    "axes": (lambda: kernels.pixel_norm(IMAGE[0]), r"pixel_norm: wanted a floating x \[N, C, H, W\] or \[N, C\].* got torch.float32 \(8, 4, 4\)"),
    "integers": (lambda: kernels.pixel_norm_silu(IMAGE.int()), "floating x .* got torch.int32"),
    "no channel": (lambda: kernels.mp_silu(IMAGE[:, :0]), r"C at least 1, got torch.float32 \(2, 0, 4, 4\)"),
    "scale": (lambda: kernels.mp_silu(IMAGE, torch.zeros(8)), r"floating scale \(2, 8\) on cpu, got torch.float32 \(8,\)"),
    "dropout": (lambda: kernels.mp_silu(IMAGE, dropout=1.0), r"dropout in \[0, 1\), got 1.0"),
    "key": (lambda: kernels.mp_silu(IMAGE, dropout=0.1), r"with dropout a key \[1\] in int64 on cpu, got none"),
    "key's dtype": (lambda: kernels.mp_silu(IMAGE, dropout=0.1, key=torch.ones(1)), r"got torch.float32 \(1,\) on cpu"),
    "y": (lambda: kernels.mp_sum(IMAGE, IMAGE.half(), 0.3), "a y like x, torch.float32 .* got torch.float16"),
    "clip": (lambda: kernels.mp_sum(IMAGE, IMAGE, 0.3, 0.0), "a clip above 0, got 0.0"),
    "b": (lambda: kernels.mp_cat_silu(IMAGE, IMAGE[:, :, :2], 0.5), r"a b like a but for its channels, .* got torch.float32 \(2, 8, 2, 4\)"),
    "b's axes": (lambda: kernels.mp_cat_silu(IMAGE, IMAGE[:, :, 0, 0], 0.5), "a b like a but for its channels"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
