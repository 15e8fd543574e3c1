"""16-bit shadows: a weight in the dtype its net computes in, rounded once a step and not once a forward.

A layer asks `in_dtype(weight, x.dtype)` (engine.nets.layers); where the weight has a shadow, that is the answer, the same
bits as a cast and with the same gradient. EDM2's layers compute with `normalized_weight(weight)`, and so are their shadows: a teacher's
weights are normalised once for all, a trained net's once a step. All parameters that share memory (engine.methods.base.frozen) share it. It
cannot be stale: any optimiser's step renews the shadows of what it moved (fused ones do not count as a write); any other
write moves a weight's version counter or address, which eager use compares; compiled code and CUDA graphs cannot, so
`renew_stale` does it for them before an iteration. A tensor that only stands in for a weight (functional_call) has none.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.compiler import is_compiling
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from potstill.kernels.mp_weights import normalized_weight, normalized_weight_grad

SIXTEEN_BIT = (torch.bfloat16, torch.float16)

#: On a CPU, smaller weights that want a gradient are cast after all: PyTorch's own node costs less than one in Python.
SMALL = 1 << 16


class Shadow:
    """The rounded copy of one weight, in the same memory for as long as the weight keeps its layout."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.dtype = dtype
        self.tensor = self.computed(weight.detach())
        self.seen = _state(weight)

    def computed(self, weight: Tensor) -> Tensor:
        """What it is a copy of, differentiable."""
        return weight.to(self.dtype)

    def attached(self, weight: Tensor) -> Tensor:
        """The shadow, with the gradient of `computed`."""
        return _StraightThrough.apply(weight, self.tensor)

    def of(self, weight: Tensor) -> Tensor:
        """The weight in this shadow's dtype, differentiable where the weight is."""
        if not is_compiling() and self.seen != _state(weight):
            self.renew(weight)
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return self.tensor
        if not is_compiling() and weight.device.type == "cpu" and weight.numel() < SMALL:
            return self.computed(weight)
        return self.attached(weight)

    @torch.no_grad()
    def renew(self, weight: Tensor) -> None:
        if self.tensor.stride() == weight.stride():
            self.write(weight)
        else:  # laid out anew, as a cast would be
            self.tensor = self.computed(weight)
        self.seen = _state(weight)

    def write(self, weight: Tensor) -> None:
        """Renew the memory as it is."""
        self.tensor.copy_(weight)


class UnitShadow(Shadow):
    """The normalised copy of one of EDM2's weights."""

    def computed(self, weight: Tensor) -> Tensor:
        return normalized_weight(weight, 1.0, self.dtype)

    def attached(self, weight: Tensor) -> Tensor:
        return _Normalized.apply(weight, self.tensor)

    def write(self, weight: Tensor) -> None:
        self.tensor.copy_(self.computed(weight))


class _Normalized(Function):
    """(weight, shadow) -> the shadow, with the gradient of `normalized_weight`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shadow: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return shadow.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return normalized_weight_grad(g, *ctx.saved_tensors), None


class _StraightThrough(Function):
    """(weight, shadow) -> the shadow, with the gradient of a cast."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shadow: Tensor) -> Tensor:
        return shadow.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.float(), None


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 weight as a layer computes with it."""
    if weight.dtype is dtype:
        return weight
    shadow = getattr(weight, "_shadow", None)
    return weight.to(dtype) if shadow is None or shadow.tensor.dtype is not dtype else shadow.of(weight)


def shadow_of(weight: Tensor) -> Tensor | None:
    """The memory of a weight's shadow, if it has one that is a cast: what kernels.AdamEMA writes."""
    shadow = getattr(weight, "_shadow", None)
    return shadow.tensor if type(shadow) is Shadow else None


def give_shadows(nets: Iterable[nn.Module]) -> list[Tensor]:
    """Give the weights of all 16-bit denoisers among these modules a shadow; returns the weights that have one.

    Those are the convolutions' (a layer says which kind of shadow, `shadow_kind`): linear layers work on the embedding, which stays
    float32, and a norm's weights are a few numbers. Sharded parameters have none: FSDP2 casts its local copies itself.
    """
    known: dict[Any, Shadow] = {}
    for net in nets:
        for denoiser in net.modules():
            dtype = getattr(denoiser, "compute_dtype", None)
            if dtype not in SIXTEEN_BIT or not getattr(denoiser, "casts_weights", False):
                continue
            for p, kind in _cast_parameters(denoiser):
                key = (p.device, p.data_ptr(), p.shape, p.stride())
                if key not in known:
                    known[key] = kind(p, dtype)
                p._shadow = known[key]  # pyright: ignore[reportAttributeAccessIssue]
    return list({id(p): p for net in nets for p in net.parameters() if hasattr(p, "_shadow")}.values())


def renew_stale(weights: Iterable[Tensor]) -> None:
    """Renew what something other than an optimiser has written to; a comparison of numbers for the rest."""
    for p in weights:
        shadow: Shadow = p._shadow  # pyright: ignore[reportAttributeAccessIssue]
        if shadow.seen != _state(p):
            shadow.renew(p)


def _cast_parameters(net: nn.Module) -> Iterable[tuple[nn.Parameter, type[Shadow]]]:
    for layer in net.modules():
        own, kind = list(layer.parameters(recurse=False)), getattr(layer, "shadow_kind", Shadow)
        if kind is not None and any(p.ndim == 4 for p in own):
            yield from ((p, kind) for p in own if p.dtype is torch.float32 and not hasattr(p, "device_mesh"))


def _state(weight: Tensor) -> tuple[int, int]:
    """What changes when a weight does."""
    return weight._version, weight.data_ptr()


@torch.no_grad()
def _renew_after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Runs after every optimiser's step(), inside a captured one too."""
    moved = [p for group in optimizer.param_groups for p in group["params"] if hasattr(p, "_shadow")]
    if not moved:
        return
    written = getattr(optimizer, "written_shadows", ())  # kernels.AdamEMA's
    done = [p for p in moved if p._shadow.tensor.data_ptr() in written]
    left = [p for p in moved if p._shadow.tensor.data_ptr() not in written] if done else moved
    if done:  # raw writes: a graph that still holds the old shadow must not go backward
        torch.autograd.graph.increment_version([p._shadow.tensor for p in done])
    if casts := [p for p in left if shadow_of(p) is not None]:
        torch._foreach_copy_([p._shadow.tensor for p in casts], casts)  # pyright: ignore[reportPrivateImportUsage]
    for p in left:
        if shadow_of(p) is None:
            p._shadow.write(p)
    for p in moved:
        p._shadow.seen = _state(p)


register_optimizer_step_post_hook(_renew_after_step)
