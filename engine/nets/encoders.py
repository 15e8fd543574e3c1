"""Prompts embedded by diffusers' pipelines: each family's own `encode_prompt`, with the defaults of its own `__call__`.

An `Embed` takes a pipeline, prompts, and whether the null prompt is wanted, too: the negative one that the pipeline itself takes
where a user names none, once (None: it has none). So each family's rule for it is the pipeline's: the encoder's "" with its own
mask, zeros (SDXL), "" without the instruction that real prompts get (Sana, Lumina).
"""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from potstill.engine.common.packages import installed
from potstill.engine.nets.conditions import Text

Embed = Callable[[Any, list[str], bool], tuple[Text, Text | None]]

#: Arguments of encode_prompt for which a pipeline's call has defaults of its own.
DEFAULTS = ("max_sequence_length", "complex_human_instruction", "clean_caption", "text_encoder_out_layers")


def _encoded(pipe: Any, prompts: Any, **arguments: Any) -> Any:
    """What encode_prompt returns."""
    taken, call = signature(pipe.encode_prompt).parameters, signature(pipe.__call__).parameters
    defaults = {name: call[name].default for name in DEFAULTS if name in taken and name in call}
    if "clean_caption" in defaults:  # without these packages a pipeline cleans nothing, and says so for every prompt
        defaults["clean_caption"] &= installed("bs4") and installed("ftfy")
    with torch.no_grad():
        return pipe.encode_prompt(prompts, **(defaults | arguments))


def stable_diffusion(pipe: Any, prompts: list[str], null: bool) -> tuple[Text, Text | None]:
    """SD 1 and 2, and SDXL with its pooled second encoding; the sizes that SDXL is told follow from x."""
    if hasattr(pipe, "text_encoder_2"):
        embeds, negative, pooled, negative_pooled = _encoded(pipe, prompts, do_classifier_free_guidance=null)
        return Text(embeds, pooled=pooled), Text(negative[:1], pooled=negative_pooled[:1]) if null else None
    embeds, negative = _encoded(pipe, prompts, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=null)
    return Text(embeds), Text(negative[:1]) if null else None


def masked(pipe: Any, prompts: list[str], null: bool) -> tuple[Text, Text | None]:
    """PixArt, Sana and Lumina 2."""
    embeds, mask, negative, negative_mask = _encoded(pipe, prompts, do_classifier_free_guidance=null)
    return Text(embeds, mask.bool()), Text(negative[:1], negative_mask[:1].bool()) if null else None


def stable_diffusion_3(pipe: Any, prompts: list[str], null: bool) -> tuple[Text, Text | None]:
    embeds, negative, pooled, negative_pooled = _encoded(pipe, prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=null)
    return Text(embeds, pooled=pooled), Text(negative[:1], pooled=negative_pooled[:1]) if null else None


def flux(pipe: Any, prompts: list[str], null: bool) -> tuple[Text, None]:
    """Its guidance is embedded, and it has no null prompt."""
    embeds, pooled, _ = _encoded(pipe, prompts)
    return Text(embeds, pooled=pooled), None


def flux2(pipe: Any, prompts: list[str], null: bool) -> tuple[Text, Text | None]:
    """With an embedded guidance it has no null prompt; without one, as of [klein], that is ""."""
    wanted = null and not pipe.transformer.config.guidance_embeds
    return Text(_encoded(pipe, prompts)[0]), Text(_encoded(pipe, [""])[0]) if wanted else None


def qwen_image(pipe: Any, prompts: list[str], null: bool) -> tuple[Text, Text | None]:
    """Its null prompt is a space, as in the examples of its authors; the pipeline itself takes none."""
    texts = [Text(embeds, _mask(embeds, mask)) for embeds, mask in (_encoded(pipe, one) for one in [prompts, [" "]][: 1 + null])]
    return texts[0], texts[1] if null else None


def z_image(pipe: Any, prompts: list[str], null: bool) -> tuple[Text, Text | None]:
    """Lists of prompts of their own lengths, here filled up with zeros."""
    texts, negatives = _encoded(pipe, prompts, do_classifier_free_guidance=null)
    return _padded(texts), _padded(negatives[:1]) if null else None


def wan(pipe: Any, prompts: list[str], null: bool) -> tuple[Text, Text | None]:
    """No mask: the padding's zeros are seen."""
    embeds, negative = _encoded(pipe, prompts, do_classifier_free_guidance=null)
    return Text(embeds), Text(negative[:1]) if null else None


def _mask(embeds: Tensor, mask: Tensor | None) -> Tensor:
    """True for every token where the pipeline left the mask out, as it does where nothing is padded."""
    return embeds.new_ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask.bool()


def _padded(rows: Sequence[Tensor]) -> Text:
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    embeds = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return Text(embeds, torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None])
