"""A 3×3 convolution of NHWC images on a CPU with stride 1 and padding 1, and its gradients, in C++ (csrc/conv_cpu.cpp).

By Winograd's F(4×4, 3×3): 36 multiplications for 16 pixels instead of 144. Lavin and Gray, "Fast Algorithms for Convolutional
Neural Networks", arXiv 1509.09308, with the points 0, ±√½, ±√2 and infinity in place of their 0, ±1, ±2. Its rounding is
that of float32, a few times that of a direct sum: about 1 to 3 times PyTorch's greatest error in images of many pixels, up to
9 times where a sum is short. Sums have an order that depends on shapes alone, whatever the number of threads.

No autograd here: the functions are of plain tensors, and want what `takes` says yes to.
"""

import torch
from torch import Tensor

from potstill.kernels import native

#: It is faster from this many channels on either side on, and while tiles of 4×4 hold at most so many pixels for one of the image.
CHANNELS, PIXELS = 16, 1.8


def takes(x: Tensor, weight: Tensor) -> bool:
    """Is the convolution with weight [O, C, 3, 3], or a gradient of it, one for this, and faster so?

    x is what it reads, [N, C, H, W], or the gradient [N, O, H, W], channels_last; the weight is that or contiguous. Both are
    float32 on the CPU.
    """
    return native.used() and _fits(x) and takes_weight(weight) and x.shape[1] in weight.shape[:2] and takes_sides(*x.shape[2:])


def takes_weight(weight: Tensor) -> bool:
    """`takes`, as far as the weight goes."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.shape[2:] != (3, 3) or min(weight.shape[:2]) < CHANNELS:
        return False
    return weight.is_contiguous(memory_format=torch.channels_last) or weight.is_contiguous()


def takes_sides(height: int, width: int) -> bool:
    """`takes`, as far as the image's sides go."""
    return 16 * ((height + 3) // 4) * ((width + 3) // 4) <= PIXELS * height * width


def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None, skip: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """(x ∗ weight + bias + skip)·scale, [N, O, H, W] and channels_last.

    x is [N, C, H, W], weight [O, C, 3, 3], bias [O], skip like the result: bias and skip are added as pixels are written.

    Raises:
        ValueError: bias or skip is not float32, of that shape, and contiguous or channels_last.
    """
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    if bias is not None and (bias.shape != shape[1:2] or bias.dtype != torch.float32 or not bias.is_contiguous()):
        raise ValueError(f"wanted a contiguous float32 bias [{shape[1]}], got {bias.dtype} {list(bias.shape)}")
    if skip is not None and (skip.shape != shape or not _fits(skip)):
        raise ValueError(f"wanted a channels_last float32 skip {list(shape)}, got {skip.dtype} {list(skip.shape)}")
    out = _images(x, shape)
    native.library().conv3x3(x, weight, bias, skip, scale, out)
    return out


def input_grad(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient to x [N, C, H, W], channels_last, for dy [N, O, H, W], the one to x ∗ weight; dy is channels_last."""
    dx = _images(dy, (dy.shape[0], weight.shape[1], *dy.shape[2:]))
    native.library().conv3x3_input_grad(dy, weight, dx)
    return dx


def weight_grad(x: Tensor, dy: Tensor, scale: float = 1.0, *, like: Tensor) -> Tensor:
    """scale times the gradient to weight for dy [N, O, H, W], the one to x ∗ weight. It is laid out as `like`, the weight."""
    dweight = torch.empty_like(like)
    native.library().conv3x3_weight_grad(x, dy, scale, dweight)
    return dweight


def _fits(x: Tensor) -> bool:
    fits = x.dim() == 4 and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
    return fits and x.is_contiguous(memory_format=torch.channels_last)


def _images(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
