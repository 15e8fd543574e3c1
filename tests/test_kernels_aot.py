"""Compiling ahead of time: it sees spills and errors, and every shipped configuration is in the list."""

import sys

import pytest

from potstill.kernels import _norm, aot
from potstill.kernels._aot import ADM, EDM2, SIZES, SONG, AotCase
from potstill.kernels._lib import INTERPRET, REGISTERS

triton = pytest.importorskip("triton", reason="compiles with Triton, and it is not installed")
tl = triton.language
needs_compiler = pytest.mark.skipif(INTERPRET, reason="the interpreter stands in for the compiler")


@triton.jit
def _sum_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(y_ptr + tl.arange(0, SIZE), x * tl.sum(x, 0))


@triton.jit
def _cosine_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.cos(tl.load(x_ptr + i)))


@triton.jit
def _wrong_kernel(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE), tl.zeros((SIZE + 1,), tl.float32))


def case(kernel, name, size, num_warps=4, **pointers):
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    return AotCase(name, kernel, pointers | {"SIZE": "constexpr"}, {(len(pointers),): size}, aligned, num_warps, None)


@needs_compiler
def test_resources_spills_and_errors_are_told_apart():
    fits = case(_sum_kernel, "fits", 1024, x_ptr="*fp32", y_ptr="*fp32")
    spills = case(_sum_kernel, "spills", 8192, num_warps=1, x_ptr="*fp32", y_ptr="*fp32")  # 256 numbers a thread
    wrong = case(_wrong_kernel, "wrong", 64, x_ptr="*fp32")
    array = case(_cosine_kernel, "array", 128, x_ptr="*fp32", y_ptr="*fp32")  # its local memory is no spill
    a, b, c, d = (aot.usage(one, 90) for one in (fits, spills, wrong, array))
    assert (a.problem, a.spilled) == (d.problem, d.spilled) == ("", 0)
    assert 8 <= a.registers <= 255
    assert a.shared > 0
    assert b.spilled > 0
    assert b.problem == f"{b.spilled} bytes spilled"
    assert "CompilationError" in c.problem
    printed = aot.table([a, b, c]).splitlines()
    assert len({line.index("sm_90") for line in printed[1:]}) == 1
    assert "bytes spilled" in printed[2]


@needs_compiler
def test_the_registers_of_a_launch_are_those_it_is_compiled_ahead_with():
    """ptxas of some versions spills a word of this one at 48 registers, unless told that it may take REGISTERS."""
    (one,) = [c for c in aot.cases() if c.name == "score_match.partials[fp32, D % 16 = 0]"]
    ample, tight = aot.usage(one, 80), aot.usage(one._replace(maxnreg=24), 80)
    assert one.maxnreg == REGISTERS
    assert (ample.spilled, ample.problem) == (0, "")
    assert tight.registers <= 24
    assert tight.problem == f"{tight.spilled} bytes spilled" != "0 bytes spilled"


@needs_compiler
def test_two_processes_return_every_case_for_both_architectures():
    names = [c.name for c in aot.cases()][::100]
    usages = list(aot.triton_usages(names, 2))
    assert [(u.name, u.arch) for u in usages] == [(name, arch) for name in names for arch in (80, 90)]
    assert all(not u.problem for u in usages)


def test_ptxas_output_is_read():
    output = """\
ptxas info    : 11 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN8potstill49_GLOBAL__N__4f_13update_kernelIN3c108BFloat16EfEEvPKlS5_' for 'sm_80'
ptxas info    : Function properties for _ZN8potstill49_GLOBAL__N__4f_13update_kernelIN3c108BFloat16EfEEvPKlS5_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 44 registers, used 0 barriers, 412 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN8potstill12_GLOBAL__N__14forward_kernelIfLi4ELb1EEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN8potstill12_GLOBAL__N__14forward_kernelIfLi4ELb1EEEvPKT_
    16 bytes stack frame, 12 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 128 bytes smem, 412 bytes cmem[0]
"""
    first, second = aot.parse_ptxas(output, 80, "a.cu")
    assert first == aot.Usage("a.cu: update_kernel<bfloat16, float>", 80, 44, 0, 0)
    assert second == aot.Usage("a.cu: forward_kernel<float, 4, true>", 80, 64, 128, 36, "36 bytes spilled")


@needs_compiler
def test_every_kernel_of_the_package_is_compiled_in_some_case():
    """A kernel that a program launches, `name_kernel`, and that no case lists would first be compiled by a user."""
    cases = aot.cases()
    listed = {id(c.kernel) for c in cases}
    for module in {c.kernel.fn.__module__ for c in cases}:
        kernels = {n: k for n, k in vars(sys.modules[module]).items() if n.endswith("_kernel") and hasattr(k, "arg_names")}
        assert [n for n, kernel in kernels.items() if id(kernel) not in listed] == [], module


@needs_compiler
def test_every_width_of_the_edm_and_adm_networks_is_compiled():
    widths = {128, 192, 256, 384, 512, 576, 768, 960, 1152, 1344, 1536}
    assert widths == {c for c, _ in SONG + ADM}
    names = [c.name for c in aot.cases() if c.name.startswith("norm.")]
    for direction in ("forward", "backward"):
        assert widths <= {int(n.partition("[")[2].partition("x")[0]) for n in names if direction in n}


@needs_compiler
def test_every_width_of_the_edm2_networks_is_compiled():
    """model_channels·(1, 2, 3, 4) at 64, 32, 16 and 8 pixels, of XS, S, M, L, XL and XXL; a kernel depends on a few more facts than that."""
    assert {c for c, _ in EDM2} == {size * factor for size in (128, 192, 256, 320, 384, 448) for factor in (1, 2, 3, 4)}
    names = [c.name for c in aot.cases() if c.name.startswith("mp.")]
    for kernel in ("norm", "norm_grad", "silu", "silu_grad", "cat", "cat_grad"):
        compiled = {n.partition("[")[2].partition("x")[0] for n in names if n.startswith(f"mp.{kernel}[")}
        assert {str(c) for c, _ in EDM2} <= compiled, kernel


@needs_compiler
def test_what_the_networks_launch_is_among_the_cases():
    """bfloat16 images with float32 weights, everything 16-byte aligned, and losses on images of which 16 divides the size."""
    cases = {c.name: c for c in aot.cases()}
    for direction in ("forward", "backward"):
        types, divisible = (
            cases[f"norm.{direction}[256x32x32 bf16 add]"].signature,
            cases[f"norm.{direction}[256x32x32 bf16 add]"].attributes,
        )
        assert (types["x_ptr"], types["weight_ptr"], types["add_ptr"], types["add_n"]) == ("*bf16", "*fp32", "*bf16", "i32")
        kernel = _norm.forward_kernel if direction == "forward" else _norm.backward_kernel
        assert {(kernel.arg_names.index(a),) for a in ("x_ptr", "weight_ptr", "add_n")} <= divisible.keys()
    for name in ("score_match.partials", "score_match.difference", "score_implicit.partials", "score_implicit.gradient",
                 "moments.partials", "denoise.partials", "denoise.gradient"):  # fmt: skip
        for dtype in ("fp32", "bf16", "fp16"):
            odd, even = (cases[f"{name}[{dtype}, guided{size}]"] for size in SIZES)
            at = list(even.signature).index("D")
            assert (at,) in even.attributes and (at,) not in odd.attributes and even.signature["D"] == "i32"
            estimate = next(i for i, a in enumerate(even.signature) if a in ("real", "e"))
            assert {(estimate, 0), (estimate, 1)} <= even.attributes.keys(), "pointers inside an estimate"
    one_logit = cases["adversarial.forward[2 x bf16, 1 logit, softplus]"]
    assert one_logit.constexprs[(1, 0)] == one_logit.constexprs[(1, 1)] == 1


@needs_compiler
def test_gradients_of_any_stride_and_batches_of_any_size_are_compiled_too():
    cases = {c.name: c for c in aot.cases()}
    for name in ("score_match.difference", "score_implicit.gradient", "denoise.gradient"):
        of_mean, in_column = (cases[f"{name}[bf16{what}]"] for what in ("", ", gradient in a column"))
        at = (list(of_mean.signature).index("g_stride"),)
        assert (at in of_mean.attributes, at in in_column.attributes) == (True, False), name
    assert {f"norm.{kernel}[72x8x8 bf16 scale+shift, 3 images]" for kernel in ("backward", "parameters")} <= cases.keys()


def test_exit_status_is_1_when_anything_spills(monkeypatch, capsys):
    good = aot.Usage("good", 80, 32, 0, 0)
    monkeypatch.setattr(aot, "cases", list)
    monkeypatch.setattr(aot.shutil, "which", lambda name: None)
    for usages, status in (([good], 0), ([good, good._replace(name="bad", spilled=8, problem="8 bytes spilled")], 1)):
        monkeypatch.setattr(aot, "triton_usages", lambda cases, processes, usages=usages: iter(usages))
        assert aot.main() == status
        printed = capsys.readouterr().out
        assert "csrc/*.cu not checked: no nvcc on PATH" in printed
        assert ("FAILED bad for sm_80: 8 bytes spilled" in printed) == bool(status)
