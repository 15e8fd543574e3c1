"""The shapes of the GroupNorms in EDM's networks, for which kernels/aot.py compiles the kernels of norm_silu ahead."""

from potstill.kernels._aot import AotCase, aot_case, fp32
from potstill.kernels._norm import backward_kernel, forward_kernel, parameters_kernel, plan
from potstill.kernels._triton import tl

#: (C, resolution) of every GroupNorm in the DDPM++/NCSN++ (add or nothing) and ADM (scale and shift) networks of EDM.
SONG = [(128, 64), (128, 32), (256, 32), (256, 16), (384, 32), (512, 16), (512, 8)]
ADM = [(192, 64), (384, 64), (384, 32), (576, 32), (768, 16), (960, 32), (1152, 16), (1344, 16), (1536, 8)]


def _aot_norm(
    c: int, resolution: int, dtype: str, modulated: bool, channels_last: bool, weights: str = "fp32", plain: bool = False, frozen: bool = False,
) -> list[AotCase]:  # fmt: skip
    """Forward and backward as the nets launch them: float32 weights; plain: before attention, no SiLU and nothing added."""
    image, given, stats = f"*{dtype}", f"*{dtype}" if modulated else None, "*fp32"
    size, groups = {"fp32": 4, "bf16": 2, "fp16": 2}[dtype], min(32, c // 4)
    added = None if modulated or plain else image
    strides = dict.fromkeys(("scale_n", "shift_n", "add_n"), "i32:16")  # widths of embeddings, or 0
    parameters = {"weight_ptr": f"*{weights}", "bias_ptr": f"*{weights}", "scale_ptr": given, "shift_ptr": given, "add_ptr": added}
    fixed = {"C": c, "HW": resolution**2, "G": groups, "CHANNELS_LAST": channels_last, "SILU": not plain, "ACC": tl.float32}
    words = ["plain" if plain else "scale+shift" if modulated else "add", *["NCHW"] * (not channels_last)]
    words += [f"{weights} weights"] * (weights != "fp32") + ["frozen"] * frozen
    name = f"[{c}x{resolution}x{resolution} {dtype} {' '.join(words)}]"
    plans = [plan(c, resolution**2, groups, size, channels_last, d) for d in ("forward", "backward")]
    return [
        aot_case(
            f"norm_silu.forward{name}", forward_kernel,
            {"x_ptr": image} | parameters | {"y_ptr": image, "mean_ptr": stats, "rstd_ptr": stats} | strides | {"eps": "fp32"},
            ASM=True, **fixed, **plans[0],
        ),
        aot_case(
            f"norm_silu.backward{name}", backward_kernel,
            {"dy_ptr": image, "x_ptr": image, "mean_ptr": stats, "rstd_ptr": stats} | parameters
            | {"dx_ptr": image, "dadd_ptr": added, "sums_ptr": None if frozen else stats} | strides | {"N": "i32"},
            ASM=True, **fixed, **plans[1],
        ),
    ]  # fmt: skip


def aot_cases() -> list[AotCase]:
    """Every width in bfloat16 channels-last at the largest of its resolutions; a few in float32, in NCHW, with 16-bit weights."""
    cases = [
        aot_case(
            "norm_silu.parameters", parameters_kernel,
            fp32("sums_ptr weight_ptr bias_ptr scale_ptr dweight_ptr dbias_ptr")
            | {"dscale_ptr": "*bf16", "dshift_ptr": "*bf16", "scale_n": "i32", "C": "i32"},
            N=64, ROWS=32, CB=32, ACC=tl.float32,
        ),
        aot_case(
            "norm_silu.parameters[add]", parameters_kernel,
            fp32("sums_ptr weight_ptr bias_ptr dweight_ptr dbias_ptr")
            | {"scale_ptr": None, "dscale_ptr": None, "dshift_ptr": None, "scale_n": "i32:16", "C": "i32:16"},
            N=64, ROWS=32, CB=32, ACC=tl.float32,
        ),
    ]  # fmt: skip
    for modulated, shapes in ((False, SONG), (True, ADM)):
        for c, resolution in shapes:
            cases += _aot_norm(c, resolution, "bf16", modulated, True)
    cases += _aot_norm(128, 64, "fp32", False, True)
    cases += _aot_norm(256, 32, "fp16", False, False)
    cases += _aot_norm(64, 8, "fp32", False, False)
    cases += _aot_norm(256, 16, "bf16", False, True, plain=True)
    cases += _aot_norm(256, 16, "bf16", False, True, weights="bf16")
    cases += _aot_norm(256, 16, "bf16", False, True, frozen=True)[1:]
    return cases
