"""Prompts, null prompts and latents as the pipelines themselves make them: a whole tiny pipeline runs beside our net."""

import math

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import diffusers_pipelines  # noqa: E402
from diffusers_models import TEXTS, TINY  # noqa: E402

from potstill.engine.diffusion.tables import CAP, scheme_of  # noqa: E402
from potstill.engine.nets.calls import packed, unpacked  # noqa: E402
from potstill.engine.nets.diffusers import DiffusersDenoiser  # noqa: E402
from potstill.engine.nets.latents import decode_latents, encode_latents  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a cat", "two dogs"]
W = 2.5
# Of their calls: what makes guidance linear, and of Z-Image the same as of all others.
CALLS = {
    "flux": {"guidance_scale": 3.5}, "flux2": {"guidance_scale": 4.0}, "qwen": {"true_cfg_scale": W, "negative_prompt": [" "] * 2},
    "zimage": {"guidance_scale": W - 1}, "lumina2": {"guidance_scale": W, "cfg_normalization": False}, "wan": {"guidance_scale": W, "num_frames": 5},
    "pixart": {"guidance_scale": W, "use_resolution_binning": False}, "sana": {"guidance_scale": W, "use_resolution_binning": False},
    "pixart_1024": {"guidance_scale": W, "use_resolution_binning": False},
}  # fmt: skip


def first_step(pipe, **call):
    """What the pipeline gives to its scheduler's first step: the model's output, the timestep, and the state."""
    given, step = [], pipe.scheduler.step

    def noted(output, t, sample, *arguments, **named):
        given.append((output, t, sample))
        return step(output, t, sample, *arguments, **named)

    pipe.scheduler.step = noted
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe(prompt=PROMPTS, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0), **call)
    return given[0]


def rescaled(guided, plain):
    """Qwen-Image's guidance: each token as long as without."""
    return guided * plain.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("name", TEXTS)
def test_prompts_are_embedded_as_its_pipeline_does(name):
    pipe = diffusers_pipelines.pipeline(name)
    model = pipe.unet if name.startswith("sd") and name != "sd3" else pipe.transformer
    scheme = scheme_of(type(pipe.scheduler).__name__, pipe.scheduler.config)
    net = DiffusersDenoiser(model, scheme, size=TINY[name].shape[1:])
    prompts, null = net.family.encode(pipe, PROMPTS), net.family.encode_null(pipe)
    assert len(prompts) == 2 and (null is None) == name.startswith("flux") and (prompts.mask is not None) == TINY[name].masked
    side = 8 * (getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", 0)) * (2 if name == "flux2" else 1)
    output, t, sample = first_step(pipe, height=side, width=side, **({"guidance_scale": W} | CALLS.get(name, {})))
    if net.flow:
        sigma = torch.tensor(CAP if t >= 1000 else min(float(t / (1000 - t)), CAP))
        x_in = sample
    else:
        sigma = net.table[int(t)]
        x_in = sample / (1 + sigma**2).sqrt() if type(pipe.scheduler).__name__ == "EulerDiscreteScheduler" else sample
    if name in ("flux", "qwen"):
        assert x_in.shape == (2, 16, 16)
        x_in = unpacked(x_in, 4, 4)
    elif name == "flux2":
        x_in = x_in.transpose(1, 2).unflatten(2, (8, 8))
    x = x_in / net.coefficients(sigma[None].double()).c_in.float()
    if null is not None:
        net.null = null
    with torch.no_grad():
        estimate = net.estimate(x, sigma, prompts, guidance=1.0 if null is None else W)
    plain = estimate.raw
    ours = plain if null is None else estimate.raw_uncond + W * (plain - estimate.raw_uncond)
    if name in ("flux", "qwen"):
        ours, plain = packed(ours), packed(plain)
    elif name == "flux2":
        ours = ours.flatten(2).transpose(1, 2)
    if name == "qwen":
        ours = rescaled(ours, plain)
    assert (ours - output).abs().max() <= 2e-5 * output.abs().max()
    again = net.family.encode(pipe, PROMPTS[::-1])  # the list was not changed, and rows are in its order
    assert PROMPTS == ["a cat", "two dogs"] and torch.allclose(again.embeds[::1].flip(0), prompts.embeds, atol=1e-5)


def test_sdxl_is_led_away_from_zeros_or_from_nothing_said():
    pipe = diffusers_pipelines.pipeline("sdxl")
    family = DiffusersDenoiser(pipe.unet, scheme_of("EulerDiscreteScheduler", pipe.scheduler.config)).family
    null = family.encode_null(pipe)
    assert not null.embeds.any() and not null.pooled.any()
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    said = family.encode(pipe, [""])
    null = family.encode_null(pipe)
    assert torch.allclose(null.embeds, said.embeds) and torch.allclose(null.pooled, said.pooled)


@pytest.mark.parametrize("name", ["sd15", "sd3", "sana", "qwen", "wan", "flux2"])
def test_latents_are_shifted_and_scaled_as_its_pipeline_does(name):
    vae = diffusers_pipelines.pipeline(name).vae
    if name == "flux2":
        with torch.no_grad():
            vae.bn.running_mean.normal_()
            vae.bn.running_var.uniform_(0.5, 2.0)
    shape = (2, 3, 5, 32, 32) if name == "wan" else (2, 3, 32, 32)
    pictures = torch.randn(shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        encoded = vae.encode(pictures.unsqueeze(2) if name == "qwen" else pictures)
        z = encoded.latent if name == "sana" else encoded.latent_dist.mode()
        latents = encode_latents(vae, pictures)
        match name:  # as the pipelines undo it before they decode
            case "sd15" | "sana":
                theirs = latents / vae.config.scaling_factor
            case "sd3":
                theirs = latents / vae.config.scaling_factor + vae.config.shift_factor
            case "qwen" | "wan":
                mean, std = (torch.tensor(vae.config[each]).view(1, 4, 1, 1, 1) for each in ("latents_mean", "latents_std"))
                theirs = (latents.unsqueeze(2) if name == "qwen" else latents) / (1.0 / std) + mean
            case _:
                mean, std = vae.bn.running_mean.view(1, -1, 1, 1), (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
                theirs = diffusers.Flux2Pipeline._unpatchify_latents(latents * std + mean)
        assert latents.ndim == (5 if name == "wan" else 4) and latents.dtype is torch.float32
        assert torch.allclose(theirs, z, atol=1e-5)
        decoded = vae.decode(z, return_dict=False)[0]
        assert torch.allclose(decode_latents(vae, latents), decoded[:, :, 0] if name == "qwen" else decoded, atol=1e-4)
        if name != "sana":
            draws = [encode_latents(vae, pictures, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
            assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], latents)


def test_latents_of_a_channel_by_channel_vae_have_its_scale_too():
    """As SDXL's pipeline decodes for such VAEs."""
    vae = diffusers_pipelines.vae(scaling_factor=0.5, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[2.0, 1.0, 0.5, 3.0]).eval()
    pictures = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        mean, std = (torch.tensor(vae.config[each]).view(1, 4, 1, 1) for each in ("latents_mean", "latents_std"))
        theirs = encode_latents(vae, pictures) * std / vae.config.scaling_factor + mean
        assert torch.allclose(theirs, vae.encode(pictures).latent_dist.mode(), atol=1e-5)
    assert math.isclose(vae.config.scaling_factor, 0.5)
