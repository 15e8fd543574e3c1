"""norm_silu against GroupNorm and SiLU of PyTorch in float64: never more than twice plain PyTorch's own error."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from kernel_cases import off_the_grid, poisoned_memory
from places import everywhere, needs_triton, on_gpu

from potstill.kernels import _norm, native, norm_silu
from potstill.kernels._aot import ADM, SONG
from potstill.kernels._lib import INTERPRET
from potstill.kernels.norm_silu import plain

module = sys.modules["potstill.kernels.norm_silu"]  # the package's attribute of that name is the function

# The interpreter rounds float32 to bfloat16 towards zero, and it meets exp(100) where the GPU says infinity.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRET)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


needs_kernels = pytest.mark.skipif(not INTERPRET, reason="without the C++ a CPU takes the definition")


class Case(NamedTuple):
    n: int
    c: int
    h: int
    w: int
    groups: int
    last: bool = True  # channels-last
    extras: tuple[str, ...] = ()
    silu: bool = True
    offset: float = 0.0  # mean of x

    @property
    def shape(self) -> tuple[int, ...]:
        return self.n, self.c, self.h, self.w


MODULATED = ("scale", "shift")
CASES = {
    "digits": Case(2, 32, 8, 8, 8),
    "digits NCHW": Case(2, 32, 8, 8, 8, last=False, extras=("add",)),
    "96 channels": Case(1, 96, 4, 4, 24, extras=MODULATED),
    # EDM's and ADM's widths have 32 groups; fewer groups of the same width are the same programs, but not as many
    "4 a group": Case(1, 64, 16, 16, 16, extras=("add",)),
    "6 a group": Case(2, 48, 8, 8, 8, extras=MODULATED),
    "192 channels": Case(1, 192, 4, 4, 32, extras=MODULATED),
    "18 a group": Case(1, 72, 4, 4, 4, extras=MODULATED),
    "30 a group": Case(1, 120, 4, 4, 4, last=False, extras=MODULATED),
    "42 a group": Case(1, 168, 4, 4, 4, extras=MODULATED),
    "48 a group": Case(1, 96, 2, 2, 2),
    "two passes": Case(1, 32, 64, 64, 8, extras=("add",)),
    "two passes masked": Case(1, 36, 40, 41, 6, extras=(*MODULATED, "add")),
    "two passes NCHW": Case(1, 12, 64, 64, 3, last=False, extras=MODULATED),
    "one group, odd": Case(2, 7, 5, 3, 1, extras=("scale",)),
    "one channel a group": Case(2, 6, 5, 7, 6, extras=("shift",), silu=False),
    "no SiLU": Case(1, 32, 8, 8, 8, extras=MODULATED, silu=False),
    "far from zero": Case(1, 32, 40, 40, 8, offset=30.0),
    "one sample, one row": Case(1, 8, 1, 9, 2, last=False),
}


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory is NaN."""
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def without_the_cpp(monkeypatch):
    """csrc's C++ for CPUs is tests/test_native.py's."""
    monkeypatch.setattr(native, "_built", False)


def inputs(case, dtype=torch.float32, device="cpu"):
    """x, the upstream gradient, and the parameters and extras by name."""
    layout = torch.channels_last if case.last else torch.contiguous_format
    x, g = (torch.randn(case.n, case.c, case.h, case.w) for _ in range(2))
    given = {"weight": torch.randn(case.c) + 1, "bias": torch.randn(case.c)}
    given |= {name: torch.randn(case.n, case.c) for name in case.extras}
    x, g = (t.to(device, dtype).contiguous(memory_format=layout) for t in (x + case.offset, g))
    return x, g, {k: v.to(device, dtype) for k, v in given.items()}


def outputs(function, case, x, g, given, dtype=None):
    """y and the gradients of everything, by name."""
    tensors = {"x": x, **given}
    tensors = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in tensors.items()}
    x, weight, bias = (tensors[k] for k in ("x", "weight", "bias"))
    extras = {k: tensors[k] for k in case.extras}
    y = function(x, weight, bias, case.groups, 1e-5, silu=case.silu, **extras)
    gradients = torch.autograd.grad(y, list(tensors.values()), g.to(y.dtype))
    return {"y": y.detach(), **{f"d{k}": d for k, d in zip(tensors, gradients, strict=True)}}


def error(actual, exact):
    return (actual.double() - exact).abs().max().item() if exact.numel() else 0.0


def check(case, dtype, function=norm_silu, device="cpu"):
    x, g, given = inputs(case, dtype, device)
    exact = outputs(plain, case, x, g, given, torch.float64)
    torchs, ours = (outputs(f, case, x, g, given) for f in (plain, function))
    for name, expected in exact.items():
        assert ours[name].dtype == dtype
        # 1e-6: where PyTorch happens to be exact. n numbers added one by one, as the interpreter does, stray by
        # sqrt(n) roundings; PyTorch adds in pairs.
        n = 1 if expected.ndim == 4 else x.numel() // case.c
        allowed = 2 * error(torchs[name], expected) + max(1e-6, 6e-8 * n**0.5) * max(1.0, expected.abs().max().item())
        assert error(ours[name], expected) <= allowed, f"{name}: {error(ours[name], expected):.1e} > {allowed:.1e}"
    return ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_worse_than_pytorch(case, dtype):
    ours = check(case, dtype)
    layout = torch.channels_last if case.last else torch.contiguous_format
    assert ours["y"].is_contiguous(memory_format=layout)
    assert ours["dx"].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("place", [pytest.param("cpu", id="cpu", marks=needs_kernels), *on_gpu("norm_silu")], indirect=True)
def test_bfloat16_weight_gradient_at_the_width_where_pytorch_was_wrong(place):
    """128 channels, 64 x 64, channels-last: PyTorch's CUDA kernel once lost it silently (pytorch#140913)."""
    case = Case(2, 128, 64, 64, 32) if not INTERPRET else Case(1, 32, 64, 64, 8)
    x, g, given = inputs(case, DTYPES[-1], place)
    exact = outputs(plain, case, x, g, given, torch.float64)
    ours = outputs(norm_silu, case, x, g, given)
    for name in ("dweight", "dbias"):
        assert error(ours[name], exact[name]) <= 4e-3 * exact[name].abs().max()  # half a unit of bfloat16


@everywhere("norm_silu")
def test_wide_range_of_layouts_gives_the_same_numbers(place):
    case = CASES["6 a group"]
    x, g, given = inputs(case, device=place)
    expected = outputs(norm_silu, case, x, g, given)
    wide = torch.randn(case.n, 2 * case.c, device=place)
    wide[:, ::2], wide[:, 1::2] = given["scale"], given["shift"]
    stacked = torch.cat([given["scale"], given["shift"]], 1)
    views = [
        {"scale": wide[:, ::2], "shift": wide[:, 1::2]},  # every second number
        dict(zip(MODULATED, stacked.chunk(2, 1), strict=True)),  # halves of the embedding's rows
    ]
    for view in views:
        y = norm_silu(x, given["weight"], given["bias"], case.groups, 1e-5, **view)
        assert torch.equal(y, expected["y"])
    strided = torch.randn(case.n, case.c, 2 * case.h, case.w, device=place)[:, :, ::2].copy_(x)
    torch.testing.assert_close(
        norm_silu(strided, given["weight"], given["bias"], case.groups, 1e-5, scale=given["scale"], shift=given["shift"]),
        expected["y"], rtol=1e-6, atol=2e-6,
    )  # fmt: skip


@everywhere("norm_silu")
def test_the_gradient_of_a_sum_has_stride_zero(place):
    case = CASES["4 a group"]
    x, _, given = inputs(case, device=place)
    ours, exact = (t.detach().to(d).requires_grad_() for t, d in ((x, torch.float32), (x, torch.float64)))
    norm_silu(ours, given["weight"], given["bias"], case.groups, 1e-5).sum().backward()
    plain(exact, given["weight"], given["bias"], case.groups, 1e-5).sum().backward()
    assert error(ours.grad, exact.grad) <= 1e-5 * exact.grad.abs().max()


@everywhere("norm_silu")
def test_empty_batch(place):
    case = CASES["digits"]._replace(n=0, extras=(*MODULATED, "add"))
    ours = outputs(norm_silu, case, *inputs(case, device=place))
    assert ours["y"].shape == ours["dx"].shape == (0, 32, 8, 8)
    assert ours["dweight"].tolist() == [0.0] * 32
    assert ours["dbias"].tolist() == [0.0] * 32


def float32_beside_16_bit(place):
    """Parameters in float32 and images in 16 bits, as nets have them."""
    case = CASES["6 a group"]
    x, g, given = inputs(case, device=place)
    x16 = x.to(DTYPES[-1])
    exact = outputs(plain, case, x16, g, given, torch.float64)
    ours = outputs(norm_silu, case, x16, g, given)
    assert ours["y"].dtype == x16.dtype
    assert ours["dweight"].dtype == torch.float32
    assert error(ours["dweight"], exact["dweight"]) <= 1e-2 * exact["dweight"].abs().max()


def test_parameters_may_be_float32_beside_16_bit_images():
    float32_beside_16_bit("cpu")


@pytest.mark.parametrize("place", on_gpu("norm_silu"), indirect=True)
def test_on_a_gpu_parameters_may_be_float32_beside_16_bit_images(place):
    float32_beside_16_bit(place)


@pytest.mark.parametrize("place", on_gpu("norm_silu"), indirect=True)
def test_on_a_gpu_images_off_the_16_byte_grid(place):
    case = CASES["digits"]
    x, g, given = inputs(case, device=place)
    expected = outputs(norm_silu, case, x, g, given)["y"]
    ours = norm_silu(off_the_grid(x), given["weight"], given["bias"], case.groups, 1e-5)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_only_x_and_statistics_are_kept():
    case = CASES["6 a group"]
    x, _, given = inputs(case)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_silu(
            x.requires_grad_(), *(given[k] for k in ("weight", "bias")), case.groups, 1e-5, scale=given["scale"],
            shift=given["shift"],
        )  # fmt: skip
    statistics = [t.numel() for t in kept if t.shape == (case.n, case.groups)]
    assert len(statistics) in (0, 2)  # 0: all is computed again
    assert sum(t.numel() == x.numel() for t in kept) == 1
    assert sum(t.numel() for t in kept) == x.numel() + sum(statistics) + 2 * case.c + 2 * case.n * case.c


@needs_kernels
def test_frozen_weights_have_nothing_computed_for_them(monkeypatch):
    case = CASES["6 a group"]
    x, g, given = inputs(case)
    asked, op = [], module.backward_op
    monkeypatch.setattr(module, "backward_op", lambda *args: asked.append(args[-2]) or op(*args))
    y = norm_silu(x.requires_grad_(), given["weight"], given["bias"], case.groups, 1e-5, shift=given["shift"])
    y.backward(g)
    assert asked == [[False, False, False, False]]
    made = op(g, x.detach(), *(torch.ones(case.n, case.groups) for _ in range(2)), given["weight"], given["bias"],
              None, None, None, case.groups, True, 0.0, None, 1.0, None, 1.0, False, asked[0], 0)  # fmt: skip
    assert [t.numel() for t in made[1:]] == [0] * 7


@needs_kernels
@pytest.mark.parametrize(("c", "groups", "split", "side"), [(48, 8, 32, 4), (24, 4, 12, 6), (96, 24, 64, 40)])
def test_dx_in_two_images_is_dx(c, groups, split, side):
    x, g = (torch.randn(2, c, side, side).to(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.randn(2, c)
    _, mean, rstd = module.forward_op(x, weight, bias, None, None, None, groups, 1e-5, True, 0.0, None)
    given = (g, x, mean, rstd, weight, bias, None, None, None, groups, True, 0.0, None, 1.0, g, 0.5, True, [True, False, False, False])
    whole, parts = (module.backward_op(*given, at) for at in (0, split))
    assert torch.equal(parts[0], whole[0][:, :split]) and torch.equal(parts[7], whole[0][:, split:])
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (parts[0], parts[7]))
    assert all(torch.equal(a, b) for a, b in zip(parts[1:7], whole[1:7], strict=True))


@pytest.mark.parametrize("last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.skipif(INTERPRET, reason="finite differences of the definition, not of the kernels")
def test_gradcheck(last):
    case = Case(2, 6, 3, 2, 2, last=last, extras=(*MODULATED, "add"))
    x, _, given = inputs(case, torch.float64)
    names = ("weight", "bias", *MODULATED, "add")
    tensors = [t.requires_grad_() for t in (x, *(given[name] for name in names))]

    def function(x, weight, bias, scale, shift, add):
        return norm_silu(x, weight, bias, case.groups, 1e-5, scale=scale, shift=shift, add=add)

    assert torch.autograd.gradcheck(function, tensors)


@needs_kernels
def test_opcheck():
    case = Case(2, 12, 3, 3, 2, extras=MODULATED)
    x, g, given = inputs(case)
    parameters = (given["weight"], given["bias"], given["scale"], given["shift"], None, case.groups)
    torch.library.opcheck(module.forward_op, (x, *parameters, 1e-5, True, 0.0, None))
    _, mean, rstd = module.forward_op(x, *parameters, 1e-5, True, 0.0, None)
    block, alone = (0.5, torch.tensor([7]), 2.0, x, 0.5, True), (0.0, None, 1.0, None, 1.0, False)
    for wanted, more, split in (([True] * 3 + [False], block, 4), ([False] * 4, alone, 0)):
        torch.library.opcheck(module.backward_op, (g, x, mean, rstd, *parameters, True, *more, wanted, split))


# Dynamo's own doing, when it meets an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@everywhere("norm_silu")
def test_compiles_into_one_graph(place):
    case = CASES["digits"]
    x, g, given = inputs(case, device=place)
    compiled = torch.compile(norm_silu, fullgraph=True, backend="aot_eager")
    expected = outputs(norm_silu, case, x, g, given)
    for name, got in outputs(compiled, case, x, g, given).items():
        assert torch.equal(got, expected[name]), name


IMAGE = torch.zeros(2, 8, 4, 4)
BAD = {
    "axes": ({"x": IMAGE[0]}, r"x \[N, C, H, W\], got torch.float32 \(8, 4, 4\)"),
    "integers": ({"x": IMAGE.int()}, "floating x .* got torch.int32"),
    "groups": ({"groups": 3}, "groups to divide C = 8 .* got 3"),
    "weight": ({"weight": torch.zeros(4)}, r"weight \(8,\) .* got torch.float32 \(4,\)"),
    "scale": ({"scale": torch.zeros(2, 8, 1, 1)}, r"scale \(2, 8\) .* got torch.float32 \(2, 8, 1, 1\)"),
    "add": ({"add": torch.zeros(1, 8)}, r"add \(2, 8\) .* got .* \(1, 8\)"),
    "device": ({"shift": torch.zeros(2, 8, device="meta")}, "on cpu .* got .* on meta"),
}


@pytest.mark.parametrize(("wrong", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(wrong, message):
    arguments = {"x": IMAGE, "weight": torch.ones(8), "bias": torch.zeros(8), "groups": 2, "eps": 1e-5} | wrong
    with pytest.raises(ValueError, match=message):
        norm_silu(**arguments)


def test_every_shipped_width_has_a_plan_whose_channels_fit():
    for direction, last, size in itertools.product(("forward", "backward", "block"), (True, False), (2, 4)):
        for c, resolution in SONG + ADM:
            k = c // 32
            plan = _norm.plan(c, resolution**2, 32, size, last, direction)
            assert 32 % plan["KG"] == 0
            assert plan["KG"] * k <= plan["CB"] <= 2 * plan["KG"] * k
            # a lane never waits for more than half of its neighbours' channels
            assert plan["CB"] * plan["ROWS"] <= 64 * 32 * plan["num_warps"]


#: Every width of the EDM and ADM networks as they run, and what is odd in float32; float16 takes bfloat16's ways.
ODD = (
    "digits",
    "digits NCHW",
    "18 a group",
    "42 a group",
    "two passes masked",
    "two passes NCHW",
    "one group, odd",
    "no SiLU",
    "far from zero",
    "one sample, one row",
)
SHIPPED = [Case(2, c, r, r, 32, extras=MODULATED) for c, r in ADM]
SHIPPED += [Case(2, c, r, r, 32, extras=("add",)) for c, r in SONG]
GPU_CHECKS = [(CASES[name], torch.float32) for name in ODD]
GPU_CHECKS += [(CASES[name], DTYPES[-1]) for name in ("digits", "two passes masked", "two passes NCHW", "one group, odd")]
GPU_CHECKS += [(case, DTYPES[-1]) for case in SHIPPED]
GPU_CHECKS += [(CASES[name], torch.float16) for name in ("digits NCHW", "18 a group", "two passes")]


@pytest.mark.parametrize("place", on_gpu("norm_silu"), indirect=True)
@pytest.mark.parametrize(("case", "dtype"), GPU_CHECKS, ids=lambda v: "x".join(map(str, v[:5])) if isinstance(v, Case) else str(v))
def test_on_the_gpu_no_worse_than_pytorch(case, dtype, place):
    check(case, dtype, device=place)


if not INTERPRET:

    @needs_triton
    def test_all_of_this_holds_for_the_triton_kernels_under_the_interpreter(monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert done.returncode == 0, done.stdout
