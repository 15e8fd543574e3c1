"""The checks of the public functions' arguments, and images as [N, D], the shape in which kernels read them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from potstill.kernels.estimate import Estimate


def check_tensor(op: str, name: str, t: Any, *, or_estimate: bool = False) -> None:
    """t is a tensor."""
    if not isinstance(t, Tensor):
        array = type(t).__module__ == "numpy"
        got = f"{'numpy.' * array}{type(t).__name__}" if t is not None else "None"
        how = f": torch.from_numpy({name}) makes one" if array else ""
        raise ValueError(f"{op}: wanted {name} as a torch.Tensor{' or an Estimate' * or_estimate}, got {got}{how}")


def check_image(op: str, name: str, t: Tensor, ref_name: str, ref: Tensor) -> None:
    """t is floating and has the reference's shape and device."""
    check_tensor(op, name, t)
    if t.shape != ref.shape or t.device != ref.device:
        raise ValueError(
            f"{op}: wanted {name} shaped and placed like {ref_name}, {tuple(ref.shape)} on {ref.device}, got {tuple(t.shape)} on {t.device}"
        )
    if not t.is_floating_point():
        raise ValueError(f"{op}: wanted {name} of a floating dtype like {ref_name} ({ref.dtype}), got {t.dtype}")


def check_root(op: str, name: str, x: Tensor) -> None:
    """x is floating and a batch of at least one number per sample."""
    check_tensor(op, name, x)
    if x.ndim < 2 or (x.numel() == 0 and x.shape[0] != 0):
        raise ValueError(f"{op}: wanted {name} [N, ...] with at least one number per sample, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{op}: wanted {name} of a floating dtype, got {x.dtype}")


def check_constant(op: str, name: str, t: Tensor | None, wrt: str, how: str = "detach it, or compute it under torch.no_grad()") -> None:
    """The op has no gradient for t, so t must not ask for one; how: it can be had without."""
    if t is not None and t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op} has a gradient for {wrt} only: wanted {name} without requires_grad ({how}), got requires_grad=True")


def check_per_sample(op: str, name: str, v: Tensor, ref_name: str, ref: Tensor, *, scalar: bool = False) -> Tensor:
    """v, one constant per sample of the reference, [N] or [N, 1, ..., 1], as a contiguous [N]. `scalar` also takes a 0-d tensor."""
    n = ref.shape[0]
    if not isinstance(v, Tensor) or not v.is_floating_point():
        got = v.dtype if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"{op}: wanted {name} as a floating tensor [N] (N = {n} of {ref_name}), got {got}")
    check_constant(op, name, v, "images")
    if v.device != ref.device:
        raise ValueError(f"{op}: wanted {name} on the device of {ref_name}, {ref.device}, got {v.device}")
    if v.shape == (n, *[1] * (ref.ndim - 1)):
        v = v.reshape(n)
    elif v.shape != (n,):
        if not (scalar and v.ndim == 0):
            shapes = f"[N] or [N{', 1' * (ref.ndim - 1)}]"
            raise ValueError(f"{op}: wanted {name} {shapes} with N = {n} of {ref_name}, got {tuple(v.shape)}")
        v = v.expand(n)
    return v.contiguous()


def check_estimate(op: str, name: str, e: Estimate | Tensor, ref_name: str, ref: Tensor) -> Estimate:
    """e as an Estimate whose tensors fit the reference [N, C, H, W]."""
    if isinstance(e, Tensor):
        check_image(op, name, e, ref_name, ref)
        return Estimate(e)
    if not isinstance(e, Estimate):
        check_tensor(op, name, e, or_estimate=True)
    raw, x_t, c_skip, c_out, uncond, guidance = e
    check_image(op, f"{name}.raw", raw, ref_name, ref)
    if uncond is not None:
        check_image(op, f"{name}.raw_uncond", uncond, ref_name, ref)
    elif guidance != 1.0:
        raise ValueError(f"{op}: wanted {name}.raw_uncond with {name}.guidance = {guidance}, got None")
    if x_t is None or c_skip is None or c_out is None:
        given = [field is not None for field in (x_t, c_skip, c_out)]
        if any(given):
            raise ValueError(f"{op}: wanted all or none of {name}.x_t, c_skip and c_out, got {given} of them")
        return e
    check_image(op, f"{name}.x_t", x_t, ref_name, ref)
    c_skip = check_per_sample(op, f"{name}.c_skip", c_skip, ref_name, ref)
    c_out = check_per_sample(op, f"{name}.c_out", c_out, ref_name, ref)
    return e._replace(c_skip=c_skip, c_out=c_out)


def check_estimates(op: str, real: Estimate | Tensor, fake: Estimate | Tensor, ref_name: str, ref: Tensor) -> tuple[Estimate, Estimate]:
    """Both as Estimates that fit the reference; constants that were one tensor in both still are."""
    checked, own = check_estimate(op, "real", real, ref_name, ref), check_estimate(op, "fake", fake, ref_name, ref)
    if isinstance(real, Estimate) and isinstance(fake, Estimate):
        own = own._replace(c_skip=checked.c_skip) if fake.c_skip is real.c_skip else own
        own = own._replace(c_out=checked.c_out) if fake.c_out is real.c_out else own
    return checked, own


def check_constant_estimate(op: str, name: str, e: Estimate, wrt: str) -> None:
    """The op has no gradient for the images of an estimate."""
    check_constant(op, f"{name}.raw", e.raw, wrt)
    check_constant(op, f"{name}.x_t", e.x_t, wrt, f"make x_t from {wrt}.detach()")
    check_constant(op, f"{name}.raw_uncond", e.raw_uncond, wrt)


def check_choice(op: str, name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: wanted {name} to be one of {', '.join(map(repr, choices))}, got {value!r}")


class Layout(NamedTuple):
    """The memory format of images [N, C, H, W]: how to see one as [N, D] without a copy, and back."""

    shape: torch.Size
    channels_last: bool

    def flat(self, t: Tensor | None) -> Tensor | None:
        """[N, C, H, W] -> contiguous [N, D]; copies an image of another memory format."""
        if t is None:
            return None
        t = t.permute(0, 2, 3, 1) if self.channels_last else t
        return t.reshape(self.shape[0], self.shape[1:].numel()).contiguous()  # an expanded tensor reshapes to a view

    def image(self, t_nd: Tensor) -> Tensor:
        """[N, D] -> [N, C, H, W]."""
        if not self.channels_last:
            return t_nd.view(self.shape)
        n, c, h, w = self.shape
        return t_nd.view(n, h, w, c).permute(0, 3, 1, 2)


def flattened(*given: Tensor | Estimate) -> tuple[Layout, list[Any]]:
    """The layout that these images and estimates have in common, and the same with every image as contiguous [N, D]."""
    common = layout(*[t for one in given for t in (one.images if isinstance(one, Estimate) else [one])])
    flat = []
    for one in given:
        if isinstance(one, Estimate):
            raw, x_t, uncond = map(common.flat, one.images)
            flat.append(Estimate(raw, x_t, one.c_skip, one.c_out, uncond, one.guidance))  # pyright: ignore[reportArgumentType]
        else:
            flat.append(common.flat(one))
    return common, flat


def layout(*images: Tensor | None) -> Layout:
    """The layout that the most bytes of these same-shaped images already have: NCHW, or NHWC for 4-d ones."""
    given = [t for t in images if t is not None]
    shape = given[0].shape
    bytes_nchw = sum(t.element_size() for t in given if t.is_contiguous())
    if len(shape) != 4 or bytes_nchw == sum(t.element_size() for t in given):
        return Layout(shape, False)
    bytes_nhwc = sum(t.element_size() for t in given if t.is_contiguous(memory_format=torch.channels_last))
    return Layout(shape, bytes_nhwc > bytes_nchw)
