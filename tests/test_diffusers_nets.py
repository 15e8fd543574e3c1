"""Every family of diffusers' denoisers: its D against the loop of its own pipeline, written out here, and what a run asks of a net."""

import gc
import json
import math
import weakref

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")
import diffusers_models  # noqa: E402
from diffusers_models import TEXTS, TINY  # noqa: E402

from potstill.engine.common.errors import UserError  # noqa: E402
from potstill.engine.diffusion.tables import scheme_of  # noqa: E402
from potstill.engine.methods.base import frozen  # noqa: E402
from potstill.engine.nets.conditions import Text, cat, expanded  # noqa: E402
from potstill.engine.nets.diffusers import DiffusersDenoiser  # noqa: E402
from potstill.engine.nets.discriminators import BottleneckHead, Critic  # noqa: E402

# Torch on RMSNorm of bfloat16 with float32 weights, which is slower.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

N = 3
GUIDED = [name for name in TINY if TINY[name].text or name == "dit"]
FLUX, FLUX2, QWEN = diffusers.FluxPipeline, diffusers.Flux2Pipeline, diffusers.QwenImagePipeline


def made(name, **more):
    scheduler = diffusers_models.scheduler(name)
    scheme = scheme_of(type(scheduler).__name__, scheduler.config)
    return DiffusersDenoiser(diffusers_models.model(name), scheme, size=TINY[name].shape[1:], null=diffusers_models.null(name), **more)


def inputs(net, name, n=N):
    x = torch.randn(n, *net.shape, generator=torch.Generator().manual_seed(3))
    sigma = torch.tensor([0.4, 1.7, 9.0]).repeat(math.ceil(n / 3))[:n]
    return x * (1 + sigma.reshape(-1, *[1] * len(net.shape))), sigma, diffusers_models.condition(name, n)


def close(a, b):
    return (a - b).abs().max() <= 2e-6 * b.abs().max()


def loop(name, model, latents, t, c):
    """What the pipeline gives to its scheduler's step: latents are its model's input unpacked, t a timestep of the scheduler."""
    n, times = len(latents), t.expand(len(latents))
    match TINY[name].pipeline:
        case "DDPMPipeline":
            labels = {"class_labels": c.argmax(1)} if TINY[name].classes else {}
            return model(latents, t, **labels).sample
        case "StableDiffusionPipeline":
            return model(latents, t, encoder_hidden_states=c.embeds, timestep_cond=None, return_dict=False)[0]
        case "StableDiffusionXLPipeline":
            added = {"text_embeds": c.pooled, "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]]).repeat(n, 1)}
            return model(latents, t, encoder_hidden_states=c.embeds, added_cond_kwargs=added, return_dict=False)[0]
        case "DiTPipeline":
            return model(latents, timestep=times, class_labels=c.argmax(1)).sample.split(latents.shape[1], 1)[0]
        case "PixArtAlphaPipeline":
            added = {"resolution": None, "aspect_ratio": None}
            if name == "pixart_1024":
                added = {"resolution": torch.tensor([[64.0, 64.0]]).repeat(n, 1), "aspect_ratio": torch.ones(n, 1)}
            out = model(
                latents, encoder_hidden_states=c.embeds, encoder_attention_mask=c.mask.long(), timestep=times, added_cond_kwargs=added
            )
            return out.sample.chunk(2, dim=1)[0]
        case "StableDiffusion3Pipeline":
            return model(hidden_states=latents, timestep=times, encoder_hidden_states=c.embeds, pooled_projections=c.pooled).sample
        case "FluxPipeline":
            height, width = latents.shape[2:]
            out = model(
                hidden_states=FLUX._pack_latents(latents, n, latents.shape[1], height, width),
                timestep=times / 1000,
                guidance=torch.full([1], 3.5).expand(n),
                pooled_projections=c.pooled,
                encoder_hidden_states=c.embeds,
                txt_ids=torch.zeros(c.embeds.shape[1], 3),
                img_ids=FLUX._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", torch.float32),
            ).sample
            return FLUX._unpack_latents(out, 8 * height, 8 * width, 8)
        case "SanaPipeline":
            times = times * model.config.timestep_scale
            return model(latents, encoder_hidden_states=c.embeds, encoder_attention_mask=c.mask.long(), timestep=times).sample
        case "QwenImagePipeline":
            height, width = latents.shape[2:]
            out = model(
                hidden_states=QWEN._pack_latents(latents, n, latents.shape[1], height, width),
                timestep=times / 1000,
                guidance=None,
                encoder_hidden_states_mask=c.mask.long(),
                encoder_hidden_states=c.embeds,
                img_shapes=[[(1, height // 2, width // 2)]] * n,
            ).sample
            return QWEN._unpack_latents(out, 8 * height, 8 * width, 8)[:, :, 0]
        case "Flux2Pipeline":
            ids = FLUX2._prepare_latent_ids(latents)
            out = model(
                hidden_states=FLUX2._pack_latents(latents),
                timestep=times / 1000,
                guidance=torch.full([1], 4.0).expand(n),
                encoder_hidden_states=c.embeds,
                txt_ids=FLUX2._prepare_text_ids(c.embeds),
                img_ids=ids,
            ).sample
            return FLUX2._unpack_latents_with_ids(out, ids)
        case "ZImagePipeline":
            prompts = [row[mask] for row, mask in zip(c.embeds, c.mask, strict=True)]
            out = model(list(latents.unsqueeze(2).unbind(0)), (1000 - times) / 1000, prompts).sample
            return -torch.stack(out).squeeze(2)
        case "Lumina2Pipeline":
            return -model(
                hidden_states=latents, timestep=1 - times / 1000, encoder_hidden_states=c.embeds, encoder_attention_mask=c.mask
            ).sample
        case "WanPipeline":
            return model(hidden_states=latents, timestep=times, encoder_hidden_states=c.embeds).sample
    raise AssertionError(name)


@pytest.mark.parametrize("time", [70, 830])
@pytest.mark.parametrize("name", TINY)
def test_d_is_what_its_pipeline_would_step_to(name, time):
    net, kind = made(name), TINY[name].scheduler[0]
    x, _, condition = inputs(net, name)
    if net.flow:
        t = time / 1000
        sigma = torch.tensor(t / (1 - t))
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[t])
        latents = (1 - t) * x
        raw = loop(name, net.model, latents, scheduler.timesteps[0], condition)
        theirs = scheduler.step(raw, scheduler.timesteps[0], latents).prev_sample  # all the way to t = 0
    else:
        scheduler = diffusers.DDIMScheduler.from_config(getattr(diffusers, kind)(**TINY[name].scheduler[1]).config, clip_sample=False)
        scheduler.set_timesteps(1000)
        sigma = net.table[time]
        latents = scheduler.alphas_cumprod[time].sqrt() * x
        raw = loop(name, net.model, latents, torch.tensor(time), condition)
        theirs = scheduler.step(raw, time, latents).pred_original_sample
    ours = net(x, sigma, condition)
    assert ours.dtype is torch.float32 and ours.shape == x.shape
    assert close(ours, theirs)


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_is_one_doubled_batch_and_1_is_none(name):
    net = made(name)
    x, sigma, condition = inputs(net, name)
    with torch.no_grad():
        plain = net.estimate(x, sigma, condition)
        alone, guided = net.estimate(x, sigma, condition, guidance=1.0), net.estimate(x, sigma, condition, guidance=2.5)
        null = condition * 0 if name == "dit" else expanded(net.null, N)
        uncond = net(x, sigma, null)
        assert alone.raw_uncond is None and torch.equal(alone.raw, plain.raw)
        assert torch.equal(net(x, sigma, condition), plain.denoised())
        combined = uncond + 2.5 * (plain.denoised() - uncond)
    assert (guided.denoised() - combined).abs().max() <= 1e-5 * combined.abs().max()
    assert (uncond - plain.denoised()).abs().max() > 1e-4


@pytest.mark.parametrize("name", TINY)
def test_a_batch_is_its_rows_one_by_one(name):
    net = made(name)
    x, sigma, condition = inputs(net, name)
    with torch.no_grad():
        batch = net(x, sigma, condition)
        rows = [net(x[i : i + 1], sigma[i], None if condition is None else condition[i : i + 1]) for i in range(N)]
    assert torch.allclose(batch, torch.cat(rows), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in TEXTS if TINY[name].masked])
def test_what_a_mask_hides_is_not_seen(name):
    net = made(name)
    x, sigma, condition = inputs(net, name)
    longer = condition.filled(11)
    noisy = Text(torch.where(longer.mask[:, :, None], longer.embeds, 100.0), longer.mask)
    with torch.no_grad():
        assert torch.allclose(net(x, sigma, condition), net(x, sigma, noisy), rtol=1e-4, atol=2e-5)
        short = Text(net.null.embeds[:, :2], net.null.mask[:, :2] | True)
        net.null = short
        guided = net.estimate(x, sigma, condition, guidance=2.0)
        assert torch.allclose(
            guided._replace(raw=guided.raw_uncond, raw_uncond=None).denoised(), net(x, sigma, short), rtol=1e-4, atol=2e-5
        )


def test_one_row_of_a_condition_is_for_all():
    for name in ("pixart", "dit"):
        net = made(name)
        x, sigma, condition = inputs(net, name)
        with torch.no_grad():
            one = net(x, sigma, condition[:1])
            assert torch.equal(one, net(x, sigma, cat(condition[:1], condition[:1], condition[:1])))
            none = net.null if name == "pixart" else torch.zeros(1, 4)
            assert torch.equal(net(x, sigma), net(x, sigma, none))


@pytest.mark.parametrize("name", TINY)
def test_a_frozen_view_shares_the_weights(name):
    net = made(name)
    x, sigma, condition = inputs(net, name)
    view = frozen(net)
    assert [p.data_ptr() for p in view.parameters()] == [p.data_ptr() for p in net.parameters()]
    with torch.no_grad():  # where weights ask for no gradient, torch multiplies some matrices by other kernels
        d = view(x, sigma, condition)
        assert close(d, net(x, sigma, condition))
    view(x.requires_grad_(), sigma, condition).square().sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0 and all(p.grad is None for p in (*view.parameters(), *net.parameters()))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.01)
        assert close(view(x, sigma, condition), net(x, sigma, condition)) and not close(view(x, sigma, condition), d)


@pytest.mark.parametrize("name", TINY)
def test_a_folder_and_a_description_make_the_same_net(name, tmp_path):
    net = made(name)
    x, sigma, condition = inputs(net, name)
    folder = diffusers_models.folder(name, tmp_path)
    read = DiffusersDenoiser.from_folder(folder, size=TINY[name].shape[1:])
    assert not read.training and read.scheme == net.scheme and read.null is None
    described = json.loads(json.dumps(read.description()))
    assert str(tmp_path) not in json.dumps(described)
    torch.manual_seed(5)
    again = DiffusersDenoiser.from_description(described).eval()
    assert (again.shape, again.fixed, again.scheme) == (net.shape, net.fixed, net.scheme)
    with torch.no_grad():
        d = net(x, sigma, condition)
        assert all(map(torch.equal, read.state_dict().values(), net.state_dict().values()))
        assert close(read(x, sigma, condition), d)  # not bit for bit: a file's weights begin at other addresses
        assert not close(again(x, sigma, condition), d)
        again.load_state_dict(read.state_dict())
        assert close(again(x, sigma, condition), d)
    with torch.device("meta"):
        planned = DiffusersDenoiser.from_description(described)
    assert {k: v.shape for k, v in planned.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


def test_sizes_and_what_is_fixed_are_kept(tmp_path):
    folder = diffusers_models.folder("flux", tmp_path)
    assert DiffusersDenoiser.from_folder(folder).shape == (4, 128, 128)
    net = DiffusersDenoiser.from_folder(folder, size=(4, 6), fixed={"guidance": 2.0})
    again = DiffusersDenoiser.from_description(net.description())
    assert again.shape == (4, 4, 6) and again.fixed == {"guidance": 2.0}
    x, sigma, condition = torch.randn(1, 4, 4, 6), torch.tensor(1.0), diffusers_models.condition("flux", 1)
    with torch.no_grad():
        d = net(x, sigma, condition)
        net.fixed["guidance"] = 3.5
        assert d.shape == x.shape and not torch.equal(net(x, sigma, condition), d)


@pytest.mark.parametrize("name", TINY)
def test_16_bit_weights_are_used_as_they_were_loaded(name, tmp_path):
    net = made(name)
    x, sigma, condition = inputs(net, name)
    read = DiffusersDenoiser.from_folder(diffusers_models.folder(name, tmp_path), dtype=torch.bfloat16, size=TINY[name].shape[1:])
    assert read.compute_dtype is torch.bfloat16 and (name != "wan" or read.model.scale_shift_table.dtype is torch.float32)
    with torch.no_grad():
        estimate, d = read.estimate(x, sigma, condition), net(x, sigma, condition)
        assert estimate.raw.dtype is torch.bfloat16 and estimate.x_t.dtype is torch.float32
        told = read(x, read.told(sigma), condition)
    assert read(x, sigma, condition).dtype is torch.float32 and (told - d).abs().max() <= 0.1 * d.abs().max()


@pytest.mark.parametrize("name", TINY)
def test_float32_weights_compute_in_16_bits(name):
    net = made(name)
    x, sigma, condition = inputs(net, name)
    with torch.no_grad():
        d = net(x, sigma, condition)
    net.compute_dtype = torch.bfloat16
    estimate = net.estimate(x, sigma, condition)
    assert estimate.raw.dtype is torch.bfloat16
    low = estimate.denoised()
    assert 0 < (low - d).abs().max() <= 0.1 * d.abs().max()
    low.square().mean().backward()
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(p.grad.dtype is torch.float32 for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", TINY)
def test_recomputing_blocks_changes_no_gradient(name):
    net = made(name).train()
    x, sigma, condition = inputs(net, name)

    def gradients():
        net.zero_grad()
        net(x, sigma, condition).square().mean().backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    kept = gradients()
    net.recompute("blocks")
    assert any(getattr(m, "gradient_checkpointing", False) for m in net.modules())
    again = gradients()
    net.recompute("off")
    assert not any(getattr(m, "gradient_checkpointing", False) for m in net.modules())
    assert len(again) == len(kept) and all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def hooked(net, name, x, sigma, condition):
    """The states of a whole forward where `levels` looks, found by hooks on the net's own modules."""
    model, seen = net.model, []
    note = lambda module, args, out: seen.append(out[1] if isinstance(out, tuple) else out)  # noqa: E731  (text, image) or the image
    if TINY[name].name.startswith("UNet"):
        handles = [
            model.down_blocks[0].downsamplers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0])),
            model.mid_block.register_forward_hook(note),
        ]
    else:
        stacks = [getattr(model, each, ()) for each in ("transformer_blocks", "single_transformer_blocks", "layers", "blocks")]
        blocks = [block for stack in stacks for block in stack]
        handles = [blocks[i - 1].register_forward_hook(note) for i in sorted({max(len(blocks) // 4, 1), len(blocks) // 2})]
    with torch.no_grad():
        net(x, sigma, condition)
    for handle in handles:
        handle.remove()
    if TINY[name].name.startswith("UNet"):
        return seen
    grid = {"sana": (8, 8), "flux2": (8, 8), "wan": (2, 4, 4)}.get(name, (4, 4))
    count, maps = math.prod(grid), []
    for tokens in seen:
        first = condition.mask.sum(1).tolist() if name == "lumina2" else [0 if name == "zimage" else tokens.shape[1] - count] * N
        image = torch.stack([row[i : i + count] for row, i in zip(tokens, first, strict=True)])
        maps.append(image.transpose(1, 2).reshape(N, -1, *grid))
    return maps


@pytest.mark.parametrize("name", TINY)
def test_levels_are_what_the_whole_net_sees_half_way(name):
    net = made(name)
    x, sigma, condition = inputs(net, name)
    wanted = hooked(net, name, x, sigma, condition)
    keys = list(net.state_dict())
    for mode in ("off", "blocks"):
        net.recompute(mode)
        levels = net.levels(x, sigma, condition)
        assert name == "wan" or [tuple(m.shape[1:]) for m in levels] == net.taps()
        assert [m.shape for m in levels] == [m.shape for m in wanted] and all(map(torch.equal, levels, wanted))
    assert torch.equal(net.features(x, sigma, condition), levels[-1]) and list(net.state_dict()) == keys
    x.requires_grad_()
    frozen(net).features(x, sigma, condition).square().sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_a_tapped_net_keeps_nothing_that_it_saw():
    net = made("sd3")
    gc.disable()
    try:
        seen = [weakref.ref(level) for level in net.levels(*inputs(net, "sd3"))]
        assert all(each() is None for each in seen)
    finally:
        gc.enable()


def test_levels_of_a_deep_net_are_a_quarter_and_a_half():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    model = diffusers.FluxTransformer2DModel(**TINY["flux"].config | {"num_layers": 3, "num_single_layers": 6}).eval()
    net = DiffusersDenoiser(model, scheme_of("FlowMatchEulerDiscreteScheduler", scheduler.config), size=(8, 8))
    x, sigma, condition = inputs(net, "flux")
    wanted = hooked(net, "flux", x, sigma, condition)  # after blocks 2 and 4 of 9: the second is a single one
    assert len(wanted) == 2 and all(map(torch.equal, net.levels(x, sigma, condition), wanted))
    calls = []
    for block in net.blocks():
        block.register_forward_hook(lambda *_: calls.append(1))
    net.levels(x, sigma, condition)
    assert len(calls) == 4


@pytest.mark.parametrize("name", TINY)
def test_blocks_are_innermost_and_most_of_the_net(name):
    net = made(name)
    blocks = net.blocks()
    inside = [part for block in blocks for part in block.modules() if part is not block]
    assert not {id(block) for block in blocks} & {id(part) for part in inside}
    assert {type(block).__name__ for block in blocks} <= set(net.family.blocks)
    first = net.model.transformer_blocks[0] if name == "dit" else None
    assert all(block is not first for block in blocks) and len(blocks) == len({id(block) for block in blocks}) > 0


def test_a_dit_in_training_forgets_no_class():
    net = made("dit")
    x, sigma, condition = inputs(net, "dit", 30)
    with torch.no_grad():
        assert torch.equal(net.train()(x, sigma, condition), net.eval()(x, sigma, condition))


def test_the_null_prompt_is_no_weight():
    net = made("sdxl")
    assert not [key for key in net.state_dict() if "null" in key or key == "table"]
    view = frozen(net)
    assert view.null.embeds.data_ptr() == net.null.embeds.data_ptr() and set(view.null.extra) == {"time_ids"}


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("pixart", lambda c: Text(c.embeds[..., :5], c.mask), "takes embeds of 12 numbers of a prompt, got 5"),
        ("flux", lambda c: Text(c.embeds), "FluxTransformer2DModel takes pooled of 10 numbers of a prompt, got none"),
        ("sdxl", lambda c: Text(c.embeds, pooled=c.pooled[:, :3]), "takes pooled of 10 numbers of a prompt, got 3"),
        ("sd15", lambda c: torch.eye(3), "wants embedded prompts, got classes"),
        ("sd3", lambda c: None, "wants prompts, got none"),
        ("unet_classes", lambda c: None, "wants one-hot labels, got none"),
    ],
)
def test_conditions_of_another_encoder_are_one_sentence(name, wrong, said):
    net = DiffusersDenoiser(diffusers_models.model(name), made(name).scheme, size=TINY[name].shape[1:])
    x, sigma, condition = inputs(net, name)
    with pytest.raises(UserError, match=said):
        net(x, sigma, wrong(condition))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sd15", "guidance wants the null prompt of UNet2DConditionModel, got none"),
        ("unet_classes", "guidance wants a net that was also trained without classes"),
    ],
)
def test_guidance_without_a_null_is_one_sentence(name, said):
    net = DiffusersDenoiser(diffusers_models.model(name), made(name).scheme)
    x, sigma, condition = inputs(net, name)
    net.estimate(x, sigma, condition, guidance=1.0)
    with pytest.raises(UserError, match=said):
        net.estimate(x, sigma, condition, guidance=3.0)
    with pytest.raises(ValueError, match="wants class labels or prompts, got none"):
        net.estimate(x, sigma, None, guidance=3.0)


def test_a_null_of_another_encoder_or_of_many_rows_is_one_sentence():
    net = made("sd15")
    with pytest.raises(UserError, match="the null prompt is one row, got 2"):
        net.null = diffusers_models.condition("sd15", 2)
    with pytest.raises(UserError, match="takes embeds of 12 numbers of a prompt, got 3"):
        net.null = Text(torch.zeros(1, 7, 3))


class Transformer2DModel(nn.Module):
    config = {"in_channels": 4}  # noqa: RUF012


def test_nets_that_are_no_plain_denoisers_are_one_sentence():
    scheme = made("sd15").scheme
    with pytest.raises(
        UserError, match=r"^Transformer2DModel is no denoiser that potstill knows how to call: wanted one of UNet2DModel, .*Wan"
    ):
        DiffusersDenoiser(Transformer2DModel(), scheme)
    for changes, said in [
        ({"in_channels": 9}, r"wants more than a noisy sample .*\(9 channels in and 4 out\)"),
        ({"time_cond_proj_dim": 8}, r"\(its settings time_cond_proj_dim\)"),
        ({"addition_embed_type": "text"}, r"\(its settings encoder_hid_dim_type, addition_embed_type\)"),
    ]:
        settings = {"encoder_hid_dim": 64, "cross_attention_dim": 64} if changes.get("addition_embed_type") else {}
        with pytest.raises(UserError, match=said):
            DiffusersDenoiser(diffusers.UNet2DConditionModel(**TINY["sd15"].config | settings | changes), scheme)


def test_an_embedded_scale_of_guidance_must_be_fixed():
    with pytest.raises(UserError, match="FluxTransformer2DModel is told a scale of guidance: fix one"):
        made("flux", fixed={})


def test_heads_want_pictures_whose_sides_can_be_halved():
    video = DiffusersDenoiser(diffusers_models.model("wan"), made("wan").scheme, size=(2, 8, 8))
    with pytest.raises(UserError, match="heads on a net's features want pictures"):
        video.taps()
    odd = DiffusersDenoiser(diffusers_models.model("flux"), made("flux").scheme, size=(8, 6))
    with pytest.raises(UserError, match="powers of two from 2, and at most 4 times one another, got 4x3"):
        Critic(odd, with_head=True)
    with pytest.raises(UserError, match="got 2x16"):
        BottleneckHead(8, 2, 16)


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("pixart", (8, 7), r"2 sides are multiples of \[2, 2\], got \[8, 7\]"),
        ("wan", (8, 8), r"3 sides are multiples of \[1, 2, 2\], got \[8, 8\]"),
        ("flux", (9, 8), r"multiples of \[2, 2\], got \[9, 8\]"),
    ],
)
def test_a_size_that_its_patches_do_not_divide_is_one_sentence(name, size, said):
    with pytest.raises(UserError, match=said):
        DiffusersDenoiser(diffusers_models.model(name), made(name).scheme, size=size)


def test_folders_without_what_is_needed_are_one_sentence(tmp_path):
    def refused(said):
        with pytest.raises(UserError, match=said) as caught:
            DiffusersDenoiser.from_folder(folder)
        assert "\n" not in str(caught.value)

    folder = tmp_path / "none"
    refused("none is no folder of a diffusers pipeline: model_index.json cannot be read")
    folder = diffusers_models.folder("pixart", tmp_path / "pixart")
    index = json.loads((folder / "model_index.json").read_text())

    def indexed(**changes):
        (folder / "model_index.json").write_text(json.dumps({k: v for k, v in (index | changes).items() if v}))

    indexed(transformer=None)
    refused("wants a unet or transformer and a scheduler in its model_index.json, got scheduler")
    indexed(transformer_2=["diffusers", "WanTransformer3DModel"])
    refused("has two denoisers, transformer and transformer_2")
    indexed(transformer=["diffusers", "HunyuanDiT2DModel"])
    refused("HunyuanDiT2DModel is no denoiser that potstill knows")
    indexed(scheduler=["diffusers", "EDMEulerScheduler"])
    refused("the noise levels of EDMEulerScheduler with prediction_type 'epsilon' are not known")
    indexed(scheduler=["somebody", "TheirScheduler"])
    refused("the noise levels of TheirScheduler with prediction_type 'epsilon' are not known")
    indexed()
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    refused("diffusion_pytorch_model.safetensors is not a complete safetensors file")
    weights.rename(weights.with_suffix(".bin"))
    refused("has no weights as safetensors, and no pickle is read")


def test_a_description_that_no_class_takes_is_one_sentence():
    described = made("pixart").description()
    with pytest.raises(UserError, match="cannot be built from these settings"):
        DiffusersDenoiser.from_description(described | {"config": described["config"] | {"norm_type": "novel"}})
    with pytest.raises(UserError, match="Router is no denoiser that potstill knows"):
        DiffusersDenoiser.from_description(described | {"class": "Router"})
