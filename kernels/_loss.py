"""What the per-sample losses share: two ops a loss for CUDA tensors, and the gradient that one has by the other.

    value, nonfinite, coefs, *made = potstill::<loss>(...)
    gradients = potstill::<loss>_backward([coefs, *made], g, ..., needs)

Images are flat [N, D] here. Forward leaves a few numbers per sample behind and the backward kernel reads the inputs once
more: that moves fewer bytes than writing gradients forward and scaling them backward, and holds no memory in between.
CPU tensors take kernels/reference.py, which autograd differentiates.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from potstill.kernels import cuda
from potstill.kernels._lib import INTERPRET, NAMESPACE, define, parse
from potstill.kernels.estimate import Estimate, accum

Launcher = Callable[..., Any]


def uses_reference(op: str, t: Tensor) -> bool:
    """Whether `op` of this tensor is computed by kernels/reference.py: on a CPU, and on CUDA where a user asked for it."""
    return cuda.chosen(op) == "reference" if t.is_cuda else not INTERPRET


def define_loss(
    schema: str,
    *,
    forward: Mapping[str, Launcher],
    backward: Mapping[str, Launcher],
    coefs: Callable[[int], tuple[int, ...]] = lambda n: (n,),
    makes: int = 0,
) -> Launcher:
    """Register `potstill::<loss>`, differentiable once, and `potstill::<loss>_backward`; returns the first.

    Args:
        schema: "loss(Image x, Estimate real, float eps)". Gradients may be asked for every image, those inside estimates
            included; `needs` says for which, in the order of the arguments (an estimate: raw, x_t, raw_uncond).
        forward: by backend, launcher(*arguments) -> (value [N], nonfinite [], coefs, *made).
        backward: by backend, launcher([coefs, *made], g [N] of any stride, *arguments, needs) -> gradients [N, D] of the
            images that need one.
        coefs: shape of what forward leaves behind per sample, given N.
        makes: how many images [N, D] without gradient the loss returns besides.
    """
    name, kinds, *_ = parse(schema)
    arguments = schema.partition("(")[2].removesuffix(")")

    def forward_shapes(*args: Any) -> tuple[Tensor, ...]:
        images = [t for t in _images(args, kinds) if t is not None]
        like, acc = images[0], accum(*images)
        made = [like.new_empty(like.shape, dtype=acc) for _ in range(makes)]
        n = like.shape[0]
        return like.new_empty(n, dtype=acc), like.new_empty((), dtype=torch.int32), like.new_empty(coefs(n), dtype=acc), *made

    def backward_shapes(saved: list[Tensor], g: Tensor, *args: Any) -> list[Tensor]:
        *inputs, needs = args
        return [t.new_empty(t.shape) for t, needed in zip(_images(inputs, kinds), needs, strict=True) if needed]

    tensors = ", ".join(["Tensor"] * (3 + makes))
    op = define(f"{name}({arguments}) -> ({tensors})", launchers=forward, shapes=forward_shapes)
    backward_op = define(
        f"{name}_backward(Tensor[] saved, Tensor g, {arguments}, bool[] needs) -> Tensor[]",
        launchers=backward,
        shapes=backward_shapes,
    )
    differentiate(op, backward_op, _image_positions(kinds))
    return op


def differentiate(op: Any, backward_op: Launcher, images: Sequence[int]) -> None:
    """Give an op (value, nonfinite, *saved) its gradients in the arguments at the positions `images`, by `backward_op`."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, nonfinite, *saved = output
        ctx.set_materialize_grads(False)  # else the count of non-finite samples gets a gradient: a launch
        ctx.mark_non_differentiable(nonfinite, *saved)
        given = [a if isinstance(a, Tensor) else None for a in inputs]
        ctx.save_for_backward(*saved, *given)
        ctx.saves, ctx.constants = len(saved), [None if isinstance(a, Tensor) else a for a in inputs]

    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * len(ctx.constants)
        if g is not None:
            saved, given = list(ctx.saved_tensors[: ctx.saves]), ctx.saved_tensors[ctx.saves :]
            needs = [ctx.needs_input_grad[i] for i in images]
            args = [constant if t is None else t for t, constant in zip(given, ctx.constants, strict=True)]
            made = iter(backward_op(saved, g, *args, needs))
            for i, needed in zip(images, needs, strict=True):
                gradients[i] = next(made) if needed else None
        return tuple(gradients)

    torch.library.register_autograd(f"{NAMESPACE}::{op._schema.name.partition('::')[2]}", backward, setup_context=setup_context)


def _image_positions(kinds: list[str]) -> list[int]:
    """Where the images are among the arguments of an op, an estimate counting as its six fields."""
    fields = [Estimate._fields.index(name) for name in ("raw", "x_t", "raw_uncond")]
    found, at = [], 0
    for kind in kinds:
        if kind == "Estimate":
            found += [at + field for field in fields]
        elif kind == "Image":
            found.append(at)
        at += len(Estimate._fields) if kind == "Estimate" else 1
    return found


def _images(args: Sequence[Any], kinds: list[str]) -> list[Any]:
    """The images among arguments, estimates as one, in the order of `_image_positions`."""
    images = []
    for a, kind in zip(args, kinds, strict=True):
        if kind == "Estimate":
            images += a.images
        elif kind == "Image":
            images.append(a)
    return images
