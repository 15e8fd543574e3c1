"""How diffusers' denoisers are called, each as in the loop of its own pipeline (diffusers 0.42).

A call takes the model, its input c_in·x of the shape of x, the time as the scheduler counts it [N] (0 … 999 of a table, 1000·t of a
flow; float32), a condition (Text, class indices [N], or None) and what is fixed for the net, such as an embedded guidance scale. It
gives the raw output, with x's shape but perhaps more channels. Packing, ids of positions, and each class's own idea of time and sign
are inside of it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from potstill.engine.nets.conditions import Text

Config = Mapping[str, Any]
Call = Callable[[Any, Tensor, Tensor, Any, Config], Tensor]
VAE_SCALE = 8  # pixels a latent of the nets that are told the size of the picture


def unet(net: Any, x: Tensor, time: Tensor, classes: Tensor | None, fixed: Config) -> Tensor:
    return net(x, time, class_labels=classes, return_dict=False)[0]


def unet_condition(net: Any, x: Tensor, time: Tensor, text: Text, fixed: Config) -> Tensor:
    added = None
    if net.config.addition_embed_type == "text_time":  # SDXL: original size, crop's corner, and size of the picture
        height, width = (side * VAE_SCALE for side in x.shape[-2:])
        ids = text.extra.get("time_ids")
        ids = _row(x, height, width, 0, 0, height, width) if ids is None else ids.to(x.dtype)
        added = {"text_embeds": text.pooled, "time_ids": ids}
    return net(x, time, text.embeds, encoder_attention_mask=text.mask, added_cond_kwargs=added, return_dict=False)[0]


def dit(net: Any, x: Tensor, time: Tensor, classes: Tensor, fixed: Config) -> Tensor:
    return net(x, timestep=time, class_labels=classes, return_dict=False)[0]


def pixart(net: Any, x: Tensor, time: Tensor, text: Text, fixed: Config) -> Tensor:
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if net.use_additional_conditions:
        height, width = (side * VAE_SCALE for side in x.shape[-2:])
        added = {"resolution": _row(x, height, width), "aspect_ratio": _row(x, height / width)}
    return net(x, text.embeds, time, added, encoder_attention_mask=text.mask, return_dict=False)[0]


def sd3(net: Any, x: Tensor, time: Tensor, text: Text, fixed: Config) -> Tensor:
    return net(x, text.embeds, text.pooled, time, return_dict=False)[0]


def flux(net: Any, x: Tensor, time: Tensor, text: Text, fixed: Config) -> Tensor:
    height, width = (side // 2 for side in x.shape[-2:])
    image_ids = _ids(x, 1, height, width)
    text_ids = image_ids.new_zeros(text.embeds.shape[1], 3)
    guidance = _row(x, fixed["guidance"]).float()[:, 0] if net.config.guidance_embeds else None
    out = net(packed(x), text.embeds, text.pooled, time / 1000, image_ids, text_ids, guidance, return_dict=False)[0]
    return unpacked(out, height, width)


def sana(net: Any, x: Tensor, time: Tensor, text: Text, fixed: Config) -> Tensor:
    return net(x, text.embeds, time * net.config.timestep_scale, encoder_attention_mask=text.mask, return_dict=False)[0]


def qwen(net: Any, x: Tensor, time: Tensor, text: Text, fixed: Config) -> Tensor:
    height, width = (side // 2 for side in x.shape[-2:])
    guidance = _row(x, fixed["guidance"]).float()[:, 0] if net.config.guidance_embeds else None
    shapes = [[(1, height, width)]] * x.shape[0]
    out = net(packed(x), text.embeds, text.mask, time / 1000, shapes, guidance, return_dict=False)[0]
    return unpacked(out, height, width)


def flux2(net: Any, x: Tensor, time: Tensor, text: Text, fixed: Config) -> Tensor:
    height, width = x.shape[-2:]
    image_ids, text_ids = _ids(x, 1, height, width, 1), _ids(x, 1, 1, 1, text.embeds.shape[1])
    guidance = _row(x, fixed["guidance"]).float()[:, 0] if net.config.guidance_embeds else None
    out = net(x.flatten(2).transpose(1, 2), text.embeds, time / 1000, image_ids, text_ids, guidance, return_dict=False)[0]
    return out.transpose(1, 2).unflatten(2, (height, width))


def z_image(net: Any, x: Tensor, time: Tensor, text: Text, fixed: Config) -> Tensor:
    """Its time runs the other way. Reads the prompts' lengths on the host: a wait for the device (`Family.waits`)."""
    rows = text.embeds.unbind(0) if text.mask is None else [row[mask] for row, mask in zip(text.embeds, text.mask, strict=True)]
    out = net(list(x.unsqueeze(2).unbind(0)), (1000 - time) / 1000, list(rows), return_dict=False)[0]
    return -torch.stack(out).squeeze(2)


def lumina2(net: Any, x: Tensor, time: Tensor, text: Text, fixed: Config) -> Tensor:
    """Its time runs the other way. Reads the prompts' lengths on the host: a wait for the device (`Family.waits`)."""
    mask = text.embeds.new_ones(text.embeds.shape[:2], dtype=torch.bool) if text.mask is None else text.mask
    return -net(x, 1 - time / 1000, text.embeds, mask, return_dict=False)[0]


def wan(net: Any, x: Tensor, time: Tensor, text: Text, fixed: Config) -> Tensor:
    return net(x, time, text.embeds, return_dict=False)[0]


def packed(x: Tensor) -> Tensor:
    """[N, C, H, W] -> tokens [N, H/2·W/2, 4C] of 2×2 each, as Flux and Qwen-Image want them."""
    n, c, height, width = x.shape
    return x.reshape(n, c, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, height * width // 4, 4 * c)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed` for height × width tokens."""
    n, _, c = tokens.shape
    return tokens.reshape(n, height, width, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c // 4, 2 * height, 2 * width)


def _row(x: Tensor, *numbers: float) -> Tensor:
    """[N, len(numbers)] like x, made on its device."""
    return torch.cat([x.new_full((x.shape[0], 1), number) for number in numbers], 1)


def _ids(x: Tensor, *sizes: int) -> Tensor:
    """The places in a grid of these sizes, row by row, float32 [their product, len(sizes)]."""
    axes = [torch.arange(size, device=x.device, dtype=torch.float32) for size in sizes]
    return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], 1)
