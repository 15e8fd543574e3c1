"""Every kernel in the configurations that are shipped, for kernels/aot.py, which compiles them for GPUs that are not there.

The launchers are called on tensors without memory, and Triton says how it would compile each call: types, constants, and
what 16 divides. So a kernel is compiled ahead exactly as it is launched.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from potstill.kernels import mp_weights, residual
from potstill.kernels._adam import LAUNCHERS
from potstill.kernels._lib import TRITON, cdiv
from potstill.kernels._triton import triton
from potstill.kernels.adam_ema import AdamEMA
from potstill.kernels.estimate import Estimate

#: (C, resolution) of every GroupNorm in the DDPM++/NCSN++ (add or nothing) and ADM (scale and shift) networks of EDM.
SONG = [(128, 64), (128, 32), (256, 32), (256, 16), (384, 32), (512, 16), (512, 8)]
ADM = [(192, 64), (384, 64), (384, 32), (576, 32), (768, 16), (960, 32), (1152, 16), (1344, 16), (1536, 8)]
#: (C, resolution) of all blocks of EDM2's networks, XS (128) to XXL (448).
EDM2 = sorted({(size * (i + 1), 64 >> i) for size in (128, 192, 256, 320, 384, 448) for i in range(4)})
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: N and D. Triton compiles a kernel once more for integers that 16 divides, and once more for a 1, which is then a constant.
SIZES = {"": (63, 3 * 63 * 63), ", D % 16 = 0": (64, 3 * 64 * 64)}


class AotCase(NamedTuple):
    """One kernel in one shipped configuration, as `triton.compile(ASTSource(kernel, signature, ...))` wants it."""

    name: str  # "score_match.partials[bf16]"
    kernel: Any  # the triton.JITFunction
    signature: dict[str, Any]  # argument -> "*bf16", "i32", "fp32", "constexpr", or a (named) tuple of those
    constexprs: dict[tuple[int, ...], Any]  # (argument position,) or (argument position, position inside it) -> value
    attributes: dict[tuple[int, ...], Any]  # the same -> [["tt.divisibility", 16]]
    num_warps: int
    maxnreg: int | None


class NoGPU:
    """As much of a driver as Triton asks for before it compiles."""

    def get_current_device(self) -> Any:
        return self  # Triton remembers for each device what it has compiled

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)  # pyright: ignore[reportAttributeAccessIssue]  # a submodule


def cases() -> list[AotCase]:
    """The kernels of every op, names unique; of calls that Triton compiles once, the first."""
    found: dict[tuple[Any, str], AotCase] = {}

    def record(label: str, *, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        name = f"{fn.module.rpartition('.')[2].strip('_')}.{fn.name.strip('_').removesuffix('_kernel')}[{label}]"
        attributes = {path: what for path, what in compile["configs"][0].items() if what}
        case = AotCase(
            name, fn.jit_function, compile["signature"], compile["constants"], attributes, options["num_warps"], options["maxnreg"]
        )
        found.setdefault((fn.jit_function, key), case)
        return True  # neither compile nor launch

    driver, runtime = triton.runtime.driver, triton.knobs.runtime  # pyright: ignore[reportAttributeAccessIssue]  # a submodule
    before = driver._active, runtime.jit_cache_hook
    driver._active = NoGPU()  # pyright: ignore[reportAttributeAccessIssue]  # ours answers what is asked
    try:
        for label, launch in _launches():
            runtime.jit_cache_hook = partial(record, label)
            launch()
    finally:
        driver._active, runtime.jit_cache_hook = before
    names = [case.name for case in found.values()]
    assert len(set(names)) == len(names), "two AOT cases of one name"
    return list(found.values())


def _launches() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What to call each configuration, and the calls. Losses: outputs in each dtype, with guidance and without; the rest float32."""
    for dtype, (even, shape) in product(DTYPES, SIZES.items()):
        yield f"{dtype}{even}", partial(_losses, DTYPES[dtype], False, *shape)
        yield f"{dtype}, guided{even}", partial(_losses, DTYPES[dtype], True, *shape)
        for metric in ("l1", "l2", "huber"):
            yield f"{metric}, {dtype}{even}", partial(_trajectory, metric, DTYPES[dtype], *shape)
    for dtype in DTYPES:
        yield f"{dtype}, gradient in a column", partial(_losses, DTYPES[dtype], False, *SIZES[""], column=True)
    for even, shape in SIZES.items():  # SiD's is another finishing kernel
        yield (
            f"l2{even}",
            partial(TRITON["score_implicit"], _empty(*shape), *_estimates(torch.float32, False, *shape), None, "l2", 1.2, 0.0, ""),
        )
    counts = [(nets, 49) for nets in (1, 2, 4)] + [(1, 1), (2, 1)]  # nets and logits of each; DMD2 has one
    for (nets, logits), form, dtype in product(counts, ("softplus", "hinge"), DTYPES):
        yield f"{nets} x {dtype}{', 1 logit' * (logits == 1)}, {form}", partial(_adversarial, nets, logits, form, DTYPES[dtype])
    for c, resolution in SONG:
        yield f"{c}x{resolution}x{resolution} bf16 add", partial(_norm_silu, c, resolution, "add")
    for c, resolution in ADM:
        yield f"{c}x{resolution}x{resolution} bf16 scale+shift", partial(_norm_silu, c, resolution, "scale+shift")
    yield "72x8x8 bf16 scale+shift", partial(_norm_silu, 72, 8, "scale+shift")
    yield "128x64x64 fp32 add", partial(_norm_silu, 128, 64, "add", "fp32")
    yield "256x32x32 fp16 add NCHW", partial(_norm_silu, 256, 32, "add", "fp16", layout=torch.contiguous_format)
    yield "64x8x8 fp32 add NCHW", partial(_norm_silu, 64, 8, "add", "fp32", layout=torch.contiguous_format)
    yield "256x16x16 bf16 plain", partial(_norm_silu, 256, 16, "plain")
    yield "256x16x16 bf16 add bf16 weights", partial(_norm_silu, 256, 16, "add", weights="bf16")
    yield "72x8x8 bf16 scale+shift, 3 images", partial(_norm_silu, 72, 8, "scale+shift", n=3)
    yield "256x32x32 bf16 add dropout, block", partial(_norm_silu, 256, 32, "add", dropout=0.13, block=True)
    yield "256x16x16 bf16 add dropout, block", partial(_norm_silu, 256, 16, "add", dropout=0.13, block=True)
    yield "192x64x64 bf16 scale+shift dropout, block", partial(_norm_silu, 192, 64, "scale+shift", dropout=0.1, block=True)
    yield "256x32x32 bf16 plain, block", partial(_norm_silu, 256, 32, "plain", block=True)
    yield "72x8x8 fp32 add dropout, block", partial(_norm_silu, 72, 8, "add", "fp32", dropout=0.13, block=True)
    yield (
        "64x8x8 fp16 add dropout, block NCHW",
        partial(_norm_silu, 64, 8, "add", "fp16", layout=torch.contiguous_format, dropout=0.13, block=True),
    )
    yield "512x32x32 bf16 plain, block of two", partial(_norm_silu, 512, 32, "plain", block=True, split=256)
    yield "384x64x64 bf16 plain, block of two", partial(_norm_silu, 384, 64, "plain", block=True, split=192)
    yield "384x32x32 bf16 plain, block of 256 and 128", partial(_norm_silu, 384, 32, "plain", block=True, split=256)
    yield "256x16x16 bf16 add frozen", partial(_norm_silu, 256, 16, "add", trained=False)
    for (dtype, biased), layout in product((("fp32", True), ("bf16", True), ("bf16", False)), ("NHWC", "NCHW")):
        yield f"{dtype}{', biases' * biased}, {layout}", partial(_residual, dtype, biased, layout)
    for c, resolution in EDM2:
        yield f"{c}x{resolution}x{resolution} bf16", partial(_mp, c, resolution)
    for c, resolution, dtype in ((192, 64, "fp16"), (192, 64, "fp32"), (1792, 8, "fp32"), (72, 3, "bf16"), (7, 5, "fp32")):
        yield f"{c}x{resolution}x{resolution} {dtype}", partial(_mp, c, resolution, dtype)
    for (c, resolution), form in product(((192, 64), (1792, 8)), ("bare", "first", "second")):
        yield f"{c}x{resolution}x{resolution} bf16, {form}", partial(_mp, c, resolution, form=form)
    for n in (64, 576, 768, 1152, 1728, 3456, 4608, 8064, 16128, 32256):  # 1x1 and 3x3 of 64 to 3584 channels, an embedding's 768
        yield f"rows of {n}, bf16", partial(_mp_weights, 192, n, "bf16", False)
    for n, dtype, learnt in product((576, 3456, 16128, 32256), DTYPES, (True, False)):
        yield f"rows of {n}, {dtype}{', gain' * learnt}", partial(_mp_weights, 192, n, dtype, learnt)
    for dtype, learnt in (("bf16", False), ("fp32", True)):  # the first convolution's: 9 numbers of 4 channels and of the ones beside them
        yield f"rows of 45, {dtype}{', gain' * learnt}", partial(_mp_weights, 192, 45, dtype, learnt)
    for dtype, full in product(("fp32", "bf16"), (True, False)):
        yield f"{dtype}, {'ema + shadow' if full else 'bare'}", partial(_adam_ema, DTYPES[dtype], full)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _estimates(dtype: torch.dtype, guided: bool, n: int, d: int) -> tuple[Estimate, Estimate]:
    """The real one holds the x_t of both."""
    raw, uncond, of_fake = (_empty(n, d, dtype=dtype) for _ in range(3))
    real = Estimate(raw, _empty(n, d), _empty(n), _empty(n), uncond if guided else None)
    return real, Estimate(of_fake, None, _empty(n), _empty(n))


def _losses(dtype: torch.dtype, guided: bool, n: int, d: int, *, column: bool = False) -> None:
    x, w, (real, fake) = _empty(n, d), _empty(n), _estimates(dtype, guided, n, d)
    g = _empty(n, 3)[:, 0] if column else _empty(1).expand(n)  # the stride of a mean's gradient is 0
    TRITON["add_noise"](_empty(n, d, dtype=dtype), w, x)
    _, _, coef = TRITON["score_match"](x, real, fake, w, 1e-6, 0.0)
    TRITON["score_match_backward"]([coef], g, x, real, fake)
    TRITON["moments"](x, real, fake, w, True)
    sim = x, real, fake, None, "huber", 1.0, 0.03, ""
    _, _, coefs = TRITON["score_implicit"](*sim)
    TRITON["score_implicit_backward"]([coefs], g, *sim, [True] * 7)
    _, _, coef = TRITON["denoise"](real, x, w, True)
    TRITON["denoise_backward"]([coef], g, real, x, w, True, [True] * 4)


def _trajectory(metric: str, dtype: torch.dtype, n: int, d: int) -> None:
    x, w, (_, e) = _empty(n, d), _empty(n), _estimates(dtype, False, n, d)
    given = x, e, w, w, _empty(n, d), metric, 0.03, True
    _, _, *saved = TRITON["trajectory"](*given)
    TRITON["trajectory_backward"](saved, _empty(1).expand(n), *given, [False, True, False, False, False])


def _adversarial(nets: int, size: int, form: str, dtype: torch.dtype) -> None:
    logits = [_empty(63, size, dtype=dtype) for _ in range(nets)]
    _, _, keep = TRITON["adversarial"](logits, nets // 2, form)
    TRITON["adversarial_backward"](keep, _empty(1).expand(63), logits, nets // 2, form, [True] * nets)


def _norm_silu(
    c: int, resolution: int, added: str, dtype: str = "bf16", *, n: int = 64, weights: str = "fp32", trained: bool = True,
    layout: torch.memory_format = torch.channels_last, dropout: float = 0.0, block: bool = False, split: int = 0,
) -> None:  # fmt: skip
    """As the nets launch it; "plain": before attention, no SiLU and nothing added; block: with skip and y, as a block's backward."""
    x = _empty(n, c, resolution, resolution, dtype=DTYPES[dtype]).to(memory_format=layout)
    weight, add = _empty(c, dtype=DTYPES[weights]), _empty(n, c, dtype=x.dtype) if added == "add" else None
    scale, shift = _empty(n, 2 * c, dtype=x.dtype).chunk(2, 1) if added == "scale+shift" else (None, None)
    given = weight, weight, scale, shift, add, min(32, c // 4)
    drop = dropout, _empty(1, dtype=torch.int64) if dropout else None
    _, mean, rstd = TRITON["norm_silu"](x, *given, 1e-5, added != "plain", *drop)
    wanted = trained, scale is not None, shift is not None, add is not None
    TRITON["norm_silu_backward"](x, x, mean, rstd, *given, added != "plain", *drop, 1.0, x if block else None, 1.0, block, wanted, split)


def _residual(dtype: str, biased: bool, layout: str) -> None:
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    h, bias = _empty(64, 256, 32, 32, dtype=DTYPES[dtype]).to(memory_format=memory_format), _empty(256) if biased else None
    residual._launch(h, h, bias, bias, 0.5**0.5)


def _mp(c: int, resolution: int, dtype: str = "bf16", *, form: str = "") -> None:
    """Encoder, middle and end of a block, and the beginning of a decoder's on half as many channels beside them, with all they have.

    bare: no SiLU after the norm, no scale, no clip; first and second: gradients of one output or to one input alone, no dropout.
    """
    x = _empty(64, c, resolution, resolution, dtype=DTYPES[dtype]).to(memory_format=torch.channels_last)
    of_first, of_second = (None if form == word else x for word in ("second", "first"))
    wanted = [form != "second", form != "first"]
    n, _, r = TRITON["pixel_norm"](x, 1e-4, form != "bare")
    TRITON["pixel_norm_backward"](of_first, of_second, n, r, 1e-4)
    scale = None if form == "bare" else _empty(64, c, dtype=x.dtype)
    drop = (0.0, None) if form else (0.1, _empty(1, dtype=torch.int64))
    TRITON["mp_silu"](x, scale, *drop)
    TRITON["mp_silu_backward"](x, x, scale, *drop, [wanted[0], wanted[1] and scale is not None])
    _, bits = TRITON["mp_sum"](x, x, 0.3, None if form == "bare" else 256.0, form != "first")
    TRITON["mp_sum_backward"](x, bits, 0.3, wanted)
    cat, _ = TRITON["mp_cat_silu"](x, x[:, : cdiv(c, 2)], 0.5)
    TRITON["mp_cat_silu_backward"](*(None if t is None else cat for t in (of_first, of_second)), cat, 0.5, c, wanted)


def _mp_weights(rows: int, n: int, dtype: str, learnt: bool) -> None:
    """A weight for images of a dtype, its gain learnt or a number; and in place, on the 16-byte grid or off it."""
    weight, gain = _empty(rows, n), _empty() if learnt else None
    out = TRITON["normalized_weight"](weight, gain, 1.0, DTYPES[dtype], 1e-4)
    TRITON["normalized_weight_backward"](out, weight, gain, 1.0, 1e-4, [True, learnt])
    table, programs = _empty(3, 3, dtype=torch.int64), _empty(9, 2, dtype=torch.int32)
    mp_weights.launch_force(table, programs, 1e-4, torch.float32, n, not learnt)


def _adam_ema(dtype: torch.dtype, full: bool) -> None:
    """One step of three tensors, with all that a recipe has (EMA, bfloat16 shadow, weight decay, clipping) or without."""
    params = [torch.zeros(2048) for _ in range(3)]
    companions = {"ema": params, "shadow": [p.bfloat16() for p in params], "weight_decay": 0.01, "decoupled": True} if full else {}
    optimizer = AdamEMA(params, **companions)
    if full:
        optimizer._all_flags.grad_scale = optimizer._all_flags.found_inf = torch.zeros(())
    for part in optimizer._parts:
        part.grads = [p.to(dtype) for p in params]
    optimizer._step_fused(*LAUNCHERS["triton"])
