"""What every per-sample loss of this package shares: two registered ops and one autograd.Function around them.

A loss is an op `value, nonfinite, saved, images = loss(..., needs)` and an op `grads = loss_backward(saved, g, ...,
needs)` on flat [N, D] tensors. On CUDA `saved` is a few numbers per sample and the backward kernel reads the inputs
once more: that moves fewer bytes than writing gradients forward and scaling them backward, and holds no memory in
between. CPU tensors have no such op: they take kernels/reference.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from potstill.kernels import cuda
from potstill.kernels._args import layout
from potstill.kernels._lib import INTERPRET, define, parse
from potstill.kernels.estimate import Estimate, accum

#: Fields of a flattened Estimate that are images.
_IMAGE_FIELDS = (Estimate._fields.index("raw"), Estimate._fields.index("x_t"), Estimate._fields.index("raw_uncond"))


def define_loss(
    schema: str,
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    saves: Callable[[int, int], list[tuple[int, ...]]] = lambda n, d: [(n,)],
    makes: int = 0,
) -> Callable[..., Any]:
    """Register `potstill::<loss>` and `potstill::<loss>_backward`, and return the differentiable function.

    Args:
        schema: "loss(Image x, Estimate real, float eps)": what the loss is a function of. Gradients may be asked for
            every image, those inside estimates included; `needs` says for which, in the order of the arguments
            (an estimate: raw, x_t, raw_uncond).
        forward: launcher (*arguments, needs) -> (value [N], nonfinite [], saved, images).
        backward: launcher (saved, g [N] of any stride, *arguments, needs) -> gradients [N, D] of the needed images.
            What forward made is at the end of what it saved.
        saves: shapes of what the forward launcher saves, given N and D.
        makes: how many images without gradient the loss returns besides.

    Returns:
        function(*arguments as in the schema, estimates as one) -> (value, nonfinite, *images).
    """
    name, kinds, *_ = parse(schema + " -> Tensor")
    slots = _image_slots(kinds)
    arguments = schema.partition("(")[2].removesuffix(")")

    def fake_forward(*given: Any) -> Any:
        *args, _ = given
        images = [a for a in _images(args, kinds) if a is not None]
        (n, d), like, acc = images[0].shape, images[0], accum(*images)
        saved = [like.new_empty(shape, dtype=acc) for shape in saves(n, d)]
        made = [like.new_empty((n, d), dtype=acc) for _ in range(makes)]
        return like.new_empty(n, dtype=acc), like.new_empty((), dtype=torch.int32), saved, made

    def fake_backward(saved: Any, g: Any, *given: Any) -> Any:
        *args, needs = given
        return [a.new_empty(a.shape) for a, needed in zip(_images(args, kinds), needs, strict=True) if needed]

    forward_op = define(
        f"{name}({arguments}, bool[] needs) -> (Tensor, Tensor, Tensor[], Tensor[])",
        triton=forward,
        fake=fake_forward,
    )
    backward_op = define(
        f"{name}_backward(Tensor[] saved, Tensor g, {arguments}, bool[] needs) -> Tensor[]",
        triton=backward,
        fake=fake_backward,
    )

    class Loss(Function):
        @staticmethod
        def forward(ctx, where, constants, *tensors):
            images = [where[i] for i in slots if where[i] >= 0]
            lay = layout(*[tensors[k] for k in images])
            flat = [lay.flat(t) if k in images else t for k, t in enumerate(tensors)]
            needs = [where[i] >= 0 and ctx.needs_input_grad[2 + where[i]] for i in slots]
            args = [flat[k] if k >= 0 else constants[i] for i, k in enumerate(where)]
            value, nonfinite, saved, made = forward_op(*args, needs)
            ctx.set_materialize_grads(False)  # else the count of non-finite samples gets a gradient: a launch
            ctx.save_for_backward(*saved, *made, *flat)
            ctx.saves, ctx.needs, ctx.layout = len(saved) + len(made), needs, lay
            ctx.where, ctx.constants = where, constants
            made = [lay.image(m) for m in made]
            ctx.mark_non_differentiable(nonfinite, *made)
            return value, nonfinite, *made

        @staticmethod
        @once_differentiable
        def backward(ctx, g, *_):
            saved, flat = list(ctx.saved_tensors[: ctx.saves]), list(ctx.saved_tensors[ctx.saves :])
            grads: list[Tensor | None] = [None] * len(flat)
            if g is not None:
                args = [flat[k] if k >= 0 else ctx.constants[i] for i, k in enumerate(ctx.where)]
                made = iter(backward_op(saved, g, *args, ctx.needs))
                for i, needed in zip(slots, ctx.needs, strict=True):
                    if needed:
                        grad, k = ctx.layout.image(next(made)), ctx.where[i]
                        grads[k] = grad if grads[k] is None else grads[k] + grad
            return None, None, *grads

    def loss(*args: Any) -> Any:
        return Loss.apply(*_distinct(_spread(args)))

    return loss


def uses_reference(op: str, t: Tensor) -> bool:
    """Whether `op` of this tensor is computed by kernels/reference.py: on a CPU, and on CUDA where a user asked for it."""
    return cuda.chosen(op) == "reference" if t.is_cuda else not INTERPRET


def _image_slots(kinds: list[str]) -> list[int]:
    """Where the images are among the arguments of an op, an estimate counting as its six fields."""
    slots, at = [], 0
    for kind in kinds:
        if kind == "Estimate":
            slots += [at + field for field in _IMAGE_FIELDS]
        elif kind == "Image":
            slots.append(at)
        at += len(Estimate._fields) if kind == "Estimate" else 1
    return slots


def _images(args: Any, kinds: list[str]) -> list[Any]:
    """The images among grouped arguments, in the order of `_image_slots`."""
    images = []
    for a, kind in zip(args, kinds, strict=True):
        if kind == "Estimate":
            images += [a.raw, a.x_t, a.raw_uncond]
        elif kind == "Image":
            images.append(a)
    return images


def _spread(args: tuple[Any, ...]) -> list[Any]:
    """Grouped arguments as the op's schema counts them: an estimate as its six fields."""
    flat: list[Any] = []
    for a in args:
        flat.extend(a) if isinstance(a, Estimate) else flat.append(a)
    return flat


def _distinct(args: list[Any]) -> tuple[Any, ...]:
    """(where, constants, *tensors): each tensor once, and for each argument which tensor it is, or -1.

    One x_t serves two estimates, one sigma two coefficients; Dynamo wants each tensor once in Function.apply.
    """
    tensors: list[Tensor] = []
    where = []
    for a in args:
        k = -1
        if isinstance(a, Tensor):
            k = next((k for k, t in enumerate(tensors) if t is a), len(tensors))
            if k == len(tensors):
                tensors.append(a)
        where.append(k)
    return tuple(where), tuple(None if isinstance(a, Tensor) else a for a in args), *tensors
