"""The forward process x_t = x + sigma·noise: one pass reads x and the noise and writes x_t in float32 for the loss's c_skip·x_t.

Source: arXiv 2206.00364, Eq. 7 and Table 1.
"""

# Triton's launches and device functions are untyped.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.kernels import reference
from potstill.kernels._args import check_constant, check_image, check_per_sample, check_root, flattened
from potstill.kernels._inference import takes_inference_tensors
from potstill.kernels._lib import BLOCK, cdiv, define, tl_dtype
from potstill.kernels._loss import uses_reference
from potstill.kernels._tl import block_of, load
from potstill.kernels._triton import tl, triton
from potstill.kernels.estimate import accum


@triton.jit
def _add_noise_kernel(x_ptr, sigma_ptr, noise_ptr, x_t_ptr, D, chunks, BLOCK: tl.constexpr, ACC: tl.constexpr):
    n, i, mask = block_of(tl.program_id(0), D, chunks, BLOCK)
    sigma = tl.load(sigma_ptr + n).to(ACC)
    tl.store(x_t_ptr + i, load(x_ptr, i, mask, ACC) + sigma * load(noise_ptr, i, mask, ACC), mask=mask)


def _shapes(x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=accum(x))


def _launch(x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    x_t, (n, d) = _shapes(x, sigma, noise), x.shape
    if n > 0:
        chunks = cdiv(d, BLOCK)
        _add_noise_kernel[(n * chunks,)](x, sigma, noise, x_t, d, chunks, BLOCK=BLOCK, ACC=tl_dtype(x_t.dtype), num_warps=4)
    return x_t


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


@once_differentiable
def _backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
    return g.to(ctx.dtype), None, None


_add_noise = define("add_noise(Image x, Tensor sigma, Image noise) -> Tensor", launchers={"triton": _launch}, shapes=_shapes)
torch.library.register_autograd("potstill::add_noise", _backward, setup_context=_setup_context)


@takes_inference_tensors
def add_noise(x: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x_t = x + sigma·noise in float32 (float64 for float64 x), differentiable in x.

    Args:
        x: clean images [N, C, H, W].
        sigma: noise levels, [N], [N, 1, 1, 1] or a scalar tensor, floating.
        noise: standard normals [N, C, H, W].

    Returns:
        x_t [N, C, H, W], NHWC where x is.

    Raises:
        ValueError: shapes or devices differ, sigma is not floating, or anything but x asks for a gradient.
    """
    check_root("add_noise", "x", x)
    check_image("add_noise", "noise", noise, "x", x)
    check_constant("add_noise", "noise", noise, "x")
    sigma = check_per_sample("add_noise", "sigma", sigma, "x", x, scalar=True)
    if uses_reference("add_noise", x):
        return reference.add_noise(x, sigma, noise)
    layout, (flat_x,) = flattened(x)
    return layout.image(_add_noise(flat_x, sigma, layout.flat(noise)))
