"""EDM2's weights against its formula in PyTorch, one operation at a time: never more than twice its error."""

import pytest
import torch
from kernel_cases import BF16, F16, F32, F64, Case, made_of, of_ops, off_the_grid, op_as_exact_as_plain, poisoned_memory
from places import everywhere

from potstill import kernels
from potstill.kernels import mp_weights, reference
from potstill.kernels.mp_weights import plan
from potstill.kernels.tables import Rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def normalized(weight, gain=1.3):
    """EDM2's, in float32 until the images' dtype."""
    norm = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
    n = weight[0].numel() if len(weight) else 1
    return weight / (1e-4 + norm * n**-0.5) * (gain / n**0.5)


CASES = [
    Case((5, 3, 3, 3), F32),  # rows of 27
    Case((7, 128), F32),  # an embedding's, several rows a program
    Case((16, 64, 3, 3), BF16, "nhwc"),
    Case((3, 17), F16, unaligned=True),
    Case((1, 2), F32),  # and not one number, which is its own norm: its gradient is what rounding leaves of 0
    Case((2, 1830, 3, 3), F16),  # longer than what stays in registers
    Case((3, 4, 2, 2), F64),
    Case((0, 4), F32),
]
ON_GPU = [Case((192, c, k, k), BF16) for c, k in ((128, 3), (192, 1), (768, 1), (896, 3), (1792, 3), (3584, 3))]


def inputs(case, place="cpu"):
    """The case's dtype is that of the images."""
    weight = torch.randn(case.shape, generator=torch.Generator().manual_seed(0), dtype=F64).to(F64 if case.dtype is F64 else F32)
    weight = weight.contiguous(memory_format=torch.channels_last) if case.layout == "nhwc" else weight
    weight = weight.to(place)
    return off_the_grid(weight) if case.unaligned else weight


@pytest.mark.parametrize("learnt", [False, True], ids=["number", "gain"])
@everywhere("mp_weights", CASES, ON_GPU)
def test_no_worse_than_pytorch(learnt, case, place):
    tensors = {"weight": inputs(case, place)} | ({"gain": torch.tensor(1.3, device=place)} if learnt else {})

    def plain(weight, gain=1.3):
        return normalized(weight, gain).to(case.dtype if weight.dtype is F32 else F64)

    def ours(weight, gain=1.3):
        return kernels.normalized_weight(weight, gain, case.dtype)

    made = op_as_exact_as_plain(ours, plain, tensors)
    assert made["output 0"].dtype is case.dtype
    if case.shape[0]:
        assert made["output 0"].stride() == tensors["weight"].stride()


@everywhere("mp_weights")
def test_views_and_the_gradient_of_a_sum(place):
    weight = torch.randn(6, 5, 3, 3, device=place)
    for given in (
        weight,
        weight.transpose(0, 1),
        weight[::2],
        weight[:, 1:3],
        weight[:, :, ::2],
        torch.randn(5, 1, device=place).expand(5, 4),
    ):
        exact = made_of(lambda w: reference.normalized_weight(w, 1.0, F64).sum(), {"w": given}, exact=True)
        found = made_of(lambda w: kernels.normalized_weight(w, 1.0, F32).sum(), {"w": given})
        for name, t in found.items():
            torch.testing.assert_close(t.double(), exact[name], rtol=1e-5, atol=1e-5)


@everywhere("mp_weights", CASES, ON_GPU)
def test_the_gradient_alone_is_that_of_the_whole(case, place):
    weight = inputs(case, place).requires_grad_()
    g = torch.randn(case.shape, generator=torch.Generator().manual_seed(1)).to(place, case.dtype)
    (wanted,) = torch.autograd.grad(kernels.normalized_weight(weight, 1.0, case.dtype), weight, g)
    found = mp_weights.normalized_weight_grad(g, weight.detach())
    assert found.dtype is weight.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@everywhere("mp_weights")
def test_gain_or_weight_may_have_a_gradient_alone(place):
    weight, gain = torch.randn(6, 40, device=place), torch.tensor(0.7, device=place)
    both = made_of(lambda weight, gain: kernels.normalized_weight(weight, gain, F16), {"weight": weight, "gain": gain})
    with poisoned_memory():
        of_weight = made_of(lambda weight: kernels.normalized_weight(weight, gain, F16), {"weight": weight})
        of_gain = made_of(lambda gain: kernels.normalized_weight(weight, gain, F16), {"gain": gain})
    assert (of_gain["gradient of gain"].shape, of_gain["gradient of gain"].dtype) == ((), F32)
    for name, t in of_weight.items():
        torch.testing.assert_close(t, both[name], rtol=1e-3, atol=1e-6)  # cotangents of the dtype of what is given first: all float32
    torch.testing.assert_close(of_gain["gradient of gain"], both["gradient of gain"], rtol=1e-3, atol=1e-6)


def test_a_gain_of_16_bits_has_a_gradient_of_16_bits():
    gain = torch.tensor(0.7, dtype=F16, requires_grad=True)
    (found,) = torch.autograd.grad(kernels.normalized_weight(torch.ones(2, 4), gain, F32).sum(), gain)
    torch.testing.assert_close(found, torch.tensor(8 / 1.0001 / 2, dtype=F16))


@everywhere("mp_weights")
def test_a_row_of_zeros_has_a_gradient(place):
    weight = torch.zeros(2, 9, device=place, requires_grad=True)
    out = kernels.normalized_weight(weight, 3.0, F32)
    (dw,) = torch.autograd.grad(out.sum(), weight)
    assert out.abs().sum() == 0
    torch.testing.assert_close(dw, torch.full_like(dw, 1e4))


@everywhere("mp_weights")
def test_what_is_not_finite_stays_in_its_row(place):
    for number in (float("nan"), float("inf")):
        weight = torch.randn(4, 30, device=place)
        clean = kernels.normalized_weight(weight, 1.0, F32)
        weight[2, 5] = number
        found = kernels.normalized_weight(weight, 1.0, F32)
        assert torch.equal(found[2].isnan(), normalized(weight)[2].isnan()) and found[2].isnan().any()
        forced = weight.clone()
        kernels.force_weight_norm_([forced])
        assert torch.equal(forced.isnan(), found.isnan())
        assert torch.equal(found[[0, 1, 3]], clean[[0, 1, 3]])


SHAPES = [(5, 3, 3, 3), (8, 64), (16, 1), (1, 7), (3, 1024), (2, 1200), (2, 5000), (2, 1840, 3, 3), (0, 4)]


def some_weights(place):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(place) for shape in SHAPES]
    nhwc = torch.randn(6, 16, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last).to(place)
    view = torch.randn(6, 10, generator=generator).to(place)[:, ::2]
    return [*weights, nhwc, view, off_the_grid(weights[0]), weights[1].to(F16), weights[1].to(F64)]


@everywhere("mp_weights")
def test_weights_are_forced_in_place(place):
    weights = some_weights(place)
    before, versions = [w.clone() for w in weights], [w._version for w in weights]
    leaves = [w.requires_grad_() for w in weights]
    kernels.force_weight_norm_(leaves)
    for w, old, version in zip(weights, before, versions, strict=True):
        n = w[0].numel() if len(w) else 1
        exact, plain = (normalized(t, n**0.5) for t in (old.double(), old.float() if w.dtype is F16 else old))
        if len(w):
            error, allowed = ((t.detach().double() - exact).abs().max() for t in (w, plain.to(w.dtype)))
            assert error <= 2 * allowed + 1e-6
            rms = w.detach().double().square().mean(tuple(range(1, w.ndim))).sqrt()
            torch.testing.assert_close(rms, torch.ones_like(rms), rtol=0, atol=4e-3 if n == 1 or w.dtype is F16 else 1e-3)
            assert w._version > version, "autograd shall see that what it saved was changed"
    again = [w.detach().clone() for w in weights]
    kernels.force_weight_norm_(leaves)
    for w, once in zip(weights, again, strict=True):
        torch.testing.assert_close(w.detach(), once, rtol=1e-3, atol=1e-3)
    kernels.force_weight_norm_([])


@everywhere("mp_weights")
def test_weights_made_under_inference_mode_are_forced_too(place):
    with torch.inference_mode():
        weight = torch.randn(4, 30, device=place)
        expected = normalized(weight, 30**0.5)
        kernels.force_weight_norm_([weight])
        torch.testing.assert_close(weight, expected)


def test_training_mode_equals_what_is_evaluated_after_it():
    """The forward of EDM2's train mode: forced, then normalised again, as eval does with what was forced."""
    weight = torch.randn(6, 16, 3, 3)
    kernels.force_weight_norm_([weight])
    train = kernels.normalized_weight(weight, 1.0, F32)
    assert torch.equal(train, kernels.normalized_weight(weight.clone(), 1.0, F32))
    torch.testing.assert_close(train.flatten(1).norm(dim=1), torch.ones(6), rtol=2.1e-4, atol=0)  # eps twice


@of_ops
def test_few_launches_and_a_table_made_once(monkeypatch):
    launched, rows = [], Rows()
    kernel = mp_weights.force_kernel

    class Counting:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(mp_weights, "force_kernel", Counting())
    monkeypatch.setattr(mp_weights, "_rows", rows)
    weights = [torch.randn(8, n) for n in (16, 48, 1024, 2048, 3072, 4096, 8192) for _ in range(3)]
    kernels.force_weight_norm_(weights)
    assert len(launched) == 3
    tables = dict(rows._made)
    kernels.force_weight_norm_(weights)
    assert len(launched) == 6 and rows._made.keys() == tables.keys()
    assert all(rows._made[key][0] is table[0] for key, table in tables.items())
    for _ in range(40):
        rows([torch.empty(2, 2)], 1)
    assert len(rows._made) <= 32  # of weights that are gone, no more than a few


@pytest.mark.parametrize("learnt", [False, True])
def test_gradcheck(learnt):
    weight, gain = torch.randn(3, 5, dtype=F64, requires_grad=True), torch.tensor(0.7, dtype=F64, requires_grad=learnt)
    call = lambda w, g: kernels.normalized_weight(w, g, F64)  # noqa: E731
    assert torch.autograd.gradcheck(call, (weight, gain))
    assert torch.autograd.gradgradcheck(call, (weight, gain))


@of_ops
def test_only_the_weight_is_kept():
    weight, saved = torch.randn(6, 30, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernels.normalized_weight(weight, 2.0, F16)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]


@of_ops
def test_opcheck():
    check, ops = torch.library.opcheck, torch.ops.potstill
    weight, gain = torch.randn(5, 20, requires_grad=True), torch.tensor(1.3, requires_grad=True)
    for g in (gain, None):
        check(ops.normalized_weight.default, (weight, g, 1.5, F16, 1e-4))
    for wanted in ([True, True], [True, False], [False, True]):
        check(ops.normalized_weight_backward.default, (torch.randn(5, 20), weight.detach(), gain.detach(), 1.0, 1e-4, wanted))
    check(ops.force_weight_norm_.default, ([torch.randn(5, 20), torch.randn(2, 3000)], 1e-4))


@everywhere("mp_weights")
def test_compiles_into_one_graph(place):
    torch.compiler.reset()
    tensors = {"weight": torch.randn(5, 4, 3, 3, device=place), "gain": torch.tensor(1.3, device=place)}

    def call(weight, gain):
        return kernels.normalized_weight(weight, gain, F16)

    expected = made_of(call, tensors)
    for name, found in made_of(torch.compile(call, fullgraph=True, backend="aot_eager"), tensors).items():
        torch.testing.assert_close(found, expected[name])  # the compiler differentiates a definition by other formulas
    weights = [torch.randn(5, 20, device=place), torch.randn(2, 3, 3, 3, device=place)]
    copies = [w.clone() for w in weights]
    kernels.force_weight_norm_(weights)
    torch.compile(kernels.force_weight_norm_, fullgraph=True, backend="aot_eager")(copies)
    for a, b in zip(weights, copies, strict=True):
        assert torch.equal(a, b)


def test_a_program_has_few_enough_numbers_for_its_registers():
    for n in (1, 27, 64, 768, 1152, 16128, 16384, 16385, 32256):
        p, backward = plan(n), plan(n, 2048)
        assert p["COLS"] * p["ROWS"] <= 32 * 32 * p["num_warps"]  # 32 a thread
        assert backward["COLS"] * backward["ROWS"] <= 16 * 32 * backward["num_warps"] or n > 8192  # of each of two
        assert p["ONCE"] == (n <= 16384) and (p["COLS"] >= n or not p["ONCE"])


WEIGHT = torch.zeros(2, 8)
BAD = {
    "axes": (lambda: kernels.normalized_weight(WEIGHT[0], 1.0, F32), r"normalized_weight: wanted a floating weight \[N, ...\] .* got torch.float32 \(8,\)"),
    "nothing": (lambda: kernels.normalized_weight(WEIGHT[:, :0], 1.0, F32), r"at least one number per output, got torch.float32 \(2, 0\)"),
    "dtype": (lambda: kernels.normalized_weight(WEIGHT, 1.0, torch.int32), "a floating dtype, got torch.int32"),
    "gain": (lambda: kernels.normalized_weight(WEIGHT, torch.ones(1), F32), r"a floating 0-dim tensor on cpu, got torch.float32 \(1,\)"),
    "list": (lambda: kernels.force_weight_norm_([WEIGHT, WEIGHT[0]]), r"force_weight_norm_: wanted a floating weights\[1\] \[N, ...\]"),
    "devices": (lambda: kernels.force_weight_norm_([WEIGHT, WEIGHT.to("meta")]), "weights on one device, got cpu and meta"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
