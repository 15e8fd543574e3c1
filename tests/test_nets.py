"""The networks against what EDM's own code computes: golden vectors, and the published parameter counts; and that what is
kept for backward, how images lie in memory and whether blocks are computed twice change no number.
"""

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from potstill.engine.diffusion.sigmas import edm_weight, karras, with_zero
from potstill.engine.diffusion.solvers import heun, solve
from potstill.engine.methods.base import Batch, Draws
from potstill.engine.methods.sim import SIM, SIMConfig
from potstill.engine.nets import ops
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.layers import BlockStyle, Init, UNetBlock
from potstill.engine.skipping.freezing import freeze

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*cond.safetensors"))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request):
    with safe_open(request.param, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        meta = file.metadata()
    net = from_kwargs(meta["precond"], **json.loads(meta["kwargs"])).eval()
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    net.load_state_dict(state, strict=True)
    return net, tensors, json.loads(meta["param_order"])


@pytest.fixture(params=["NCHW", "NHWC"])
def layout(request, monkeypatch):
    """Either memory format, whatever this device would choose."""
    chosen = torch.channels_last if request.param == "NHWC" else torch.contiguous_format
    monkeypatch.setattr(ops, "memory_format", lambda device: chosen)
    return chosen


def test_denoiser_and_its_gradients_are_edms(golden, layout):
    net, t, order = golden
    x = t["in.x"].requires_grad_()
    d = net(x, t["in.sigma"], t.get("in.labels"))
    assert relative(d, t["out.D"]) < 1e-5
    d.square().sum().backward()
    assert relative(x.grad, t["out.dx_sum_D2"]) < 1e-4
    named = dict(net.named_parameters())
    norms = torch.stack([named[name].grad.norm() for name in order])
    assert relative(norms, t["out.param_grad_norms"]) < 1e-4


@pytest.mark.parametrize("level", [1, 3])
def test_half_frozen_nets_have_edms_gradients_where_they_train(golden, level, layout):
    net, t, order = golden
    freeze(net.model, level)
    x = t["in.x"].requires_grad_()
    net(x, t["in.sigma"], t.get("in.labels")).square().sum().backward()
    assert relative(x.grad, t["out.dx_sum_D2"]) < 1e-4
    named = dict(net.named_parameters())
    trained = torch.tensor([named[name].requires_grad for name in order])
    norms = torch.stack([named[name].grad.norm() for name in order if named[name].requires_grad])
    assert 0 < trained.sum() < len(order)
    assert relative(norms, t["out.param_grad_norms"][trained]) < 1e-4


def test_a_frozen_net_has_edms_gradient_to_its_input(golden, layout):
    net, t, _ = golden
    net.requires_grad_(False)
    x = t["in.x"].requires_grad_()
    net(x, t["in.sigma"], t.get("in.labels")).square().sum().backward()
    assert relative(x.grad, t["out.dx_sum_D2"]) < 1e-4


def test_bfloat16_is_within_a_hundredth(golden, layout):
    net, t, _ = golden
    net.compute_dtype = torch.bfloat16
    d = net(t["in.x"], t["in.sigma"], t.get("in.labels"))
    assert relative(d, t["out.D"]) < 1e-2


def test_the_first_layer_lays_out_the_images_of_all(golden, layout):
    net, t, _ = golden
    net.to("cpu")  # a convolution makes images that lie as its weight does
    weights = [p for p in net.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=layout) for p in weights)
    seen = []
    for block in [*net.model.enc.values(), *net.model.dec.values()]:
        block.register_forward_hook(lambda block, args, out: seen.append(out))
    net(t["in.x"], t["in.sigma"], t.get("in.labels"))
    wide = [out for out in seen if out.shape[1] > 3 and out.shape[-1] > 1]
    assert len(wide) > 5
    assert [out.is_contiguous(memory_format=layout) for out in wide] == [True] * len(wide)


def test_heun_sampler_is_edms(golden):
    net, t, _ = golden
    sigmas = with_zero(karras(6))
    with torch.no_grad():
        x = solve(heun, lambda x, s: net(x, s, t.get("in.labels")), t["in.z"].double() * sigmas[0], sigmas)
    assert relative(x.float(), t["out.heun6"]) < 1e-4


def test_weighted_denoising_loss_is_edms(golden):
    net, t, _ = golden
    sigma = t["in.sigma"]
    noisy = t["in.y"] + sigma[:, None, None, None] * t["in.eps"]
    error = net(noisy, sigma, t.get("in.labels")) - t["in.y"]
    assert relative(edm_weight(sigma)[:, None, None, None] * error**2, t["out.edm_loss"]) < 1e-5


def test_estimate_is_the_denoiser_unformed(golden):
    net, t, _ = golden
    estimate = net.estimate(t["in.x"], t["in.sigma"], t.get("in.labels"))
    torch.testing.assert_close(estimate.denoised(), net(t["in.x"], t["in.sigma"], t.get("in.labels")))


def test_noise_levels_of_vp_and_iddpm_are_edms_float32_ones():
    """Near σ = 0 float32 leaves 3 digits of exp(s) - 1: 1 + 1.001e-6 is 1 + 8 units of 2⁻²³, so VP begins at sqrt(2⁻²⁰)."""
    vp = from_kwargs("VPPrecond", **TINY_SONG)
    assert (vp.sigma_min, vp.sigma_max) == (2**-10, pytest.approx(math.sqrt(math.exp(9.95 + 0.1) - 1), rel=1e-6))
    f, j = np.float32, np.arange(1001, dtype=np.float32)
    alpha_bar = np.sin((f(np.pi / 2) * j / f(1000) / f(1.008)).astype(np.float64)).astype(np.float32) ** 2
    levels = np.zeros(1001, np.float32)
    for n in range(1000, 0, -1):
        levels[n - 1] = np.sqrt((levels[n] ** 2 + f(1)) / max(alpha_bar[n - 1] / alpha_bar[n], f(0.001)) - f(1))
    iddpm = from_kwargs("iDDPMPrecond", **TINY_SONG)
    assert iddpm.sigma_min == pytest.approx(math.sqrt(346 / 2**23), rel=1e-6)  # 347 from an exact sine
    np.testing.assert_allclose(iddpm.u, levels, rtol=1e-4)
    assert iddpm.sigma_max == pytest.approx(levels[0], rel=1e-5)


TINY_SONG = {"img_resolution": 8, "img_channels": 1, "model_type": "SongUNet", "model_channels": 4, "channel_mult": [1], "num_blocks": 1}
SONG_64 = {"img_resolution": 64, "img_channels": 3, "model_type": "SongUNet", "channel_mult": [1, 2, 2, 2]}
NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
PUBLISHED = {  # parameters of EDM's checkpoints without augmentation labels
    "cifar10-ncsnpp": (56_395_523, NCSNPP | {"img_resolution": 32, "img_channels": 3, "channel_mult": [2, 2, 2]}),
    "ffhq64-ncsnpp": (62_758_787, SONG_64 | NCSNPP),
    "imagenet64-adm": (
        295_899_267,
        {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "DhariwalUNet"},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    count, kwargs = PUBLISHED[name]
    with torch.device("meta"):
        net = from_kwargs("EDMPrecond", **{"model_type": "SongUNet"} | kwargs)
    assert sum(p.numel() for p in net.parameters()) == count


CONVOLUTIONS = {
    "3x3": ((4, 6, 3, 3), {"padding": 1}),
    "1x1": ((4, 6, 1, 1), {}),
    "wide": ((4, 6, 3, 3), {"padding": 2}),
    "halving filter": ((6, 1, 4, 4), {"stride": 2, "padding": 1}),
    "halving filter, odd": ((6, 1, 4, 4), {"stride": 2}),
}


@pytest.mark.parametrize(("shape", "given"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_frozen_convolution_is_pytorchs_and_keeps_no_image(shape, given):
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((2, 6, 5, 7), shape, shape[:1]))
    x.requires_grad_()
    groups = 6 // shape[1]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.convolution(x, weight, bias, frozen=True, **given)
    assert [t.shape for t in kept] == [weight.shape]
    expected = F.conv2d(x, weight, bias, groups=groups, **given)
    assert torch.equal(y, expected)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g))
    assert torch.autograd.gradgradcheck(lambda x: ops.convolution(x, weight, bias, frozen=True, **given) ** 2, x)


def test_fixed_resampling_has_pytorchs_gradients():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    filters = torch.rand(1, 1, 4, 4, dtype=torch.float64).expand(3, 1, -1, -1)
    ways = [
        (ops.average_pool, lambda x: F.avg_pool2d(x, 2)),
        (lambda x: ops.upsample(x, filters, 1), lambda x: F.conv_transpose2d(x, filters, stride=2, padding=1, groups=3)),
    ]
    for ours, theirs in ways:
        g = torch.randn_like(theirs(x))
        torch.testing.assert_close(torch.autograd.grad(ours(x), x, g), torch.autograd.grad(theirs(x), x, g))
        assert torch.autograd.gradcheck(ours, x)
        assert torch.autograd.gradgradcheck(lambda x, ours=ours: ours(x) ** 2, x)


def test_attention_is_pytorchs():
    q, k, v = torch.randn(3, 2, 3, 10, 8, dtype=torch.float64)
    torch.testing.assert_close(ops.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_heads_interleave_q_k_and_v_as_in_edm():
    """2206.00364's released code: channel = (head, channel in head, {q, k, v}); written out in float64."""
    style = BlockStyle(8, 0.0, 4, 1.0, 1e-5, (1, 1), False, True, Init(), Init(), Init())
    block = UNetBlock(24, 24, style, attention=True).double()
    x = torch.randn(2, 24, 3, 5, dtype=torch.float64)
    w, b = block.qkv.weight[:, :, 0, 0], block.qkv.bias
    y = torch.einsum("oc,ncs->nos", w, x.flatten(2)) + b[:, None]
    q, k, v = y.reshape(2, 4, 6, 3, 15).unbind(3)
    weights = torch.einsum("nhcq,nhck->nhqk", q, k / 6**0.5).softmax(-1)
    a = torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(2, 24, 3, 5)
    torch.testing.assert_close(block._attention(x), F.conv2d(a, block.proj.weight, block.proj.bias))


SMALL = {"img_resolution": 8, "img_channels": 3, "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
NETS = {
    "DDPM++": SMALL | {"model_type": "SongUNet", "attn_resolutions": [4]},
    "NCSN++": SMALL | NCSNPP | {"model_type": "SongUNet", "attn_resolutions": [4]},
    "ADM": SMALL | {"model_type": "DhariwalUNet", "model_channels": 64, "attn_resolutions": [4], "label_dim": 5},
}


def bytes_kept(loss, nets):
    """Bytes of all memory that autograd holds after loss(), each piece once, but for the nets' own weights."""
    weights = {t.untyped_storage().data_ptr() for net in nets for t in [*net.parameters(), *net.buffers()]}
    kept = {}

    def keep(t):
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss()
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)


@pytest.mark.parametrize("name", NETS)
def test_the_students_turn_keeps_at_most_six_tenths_of_the_naive_bytes(name, layout):
    """Naive: weight gradients everywhere, PyTorch's own GroupNorm and SiLU."""
    net = from_kwargs("EDMPrecond", **NETS[name])
    sim = SIM(SIMConfig(), net, copy.deepcopy(net), copy.deepcopy(net))
    nets = [sim.teacher, sim.student, sim.frozen_fake]

    def loss():
        draws = Draws(torch.Generator().manual_seed(0), 4, slice(0, 4), random.Random(0))
        sim.student_loss(Batch(torch.zeros(4, 1, 1, 1), None, draws))

    ours = bytes_kept(loss, nets)
    for one in nets:
        one.recompute("blocks")
    assert bytes_kept(loss, nets) < 0.5 * ours
    for one in nets:
        one.requires_grad_(True)
    with ops.definitions():
        naive = bytes_kept(loss, nets)
    assert ours <= 0.6 * naive


@pytest.mark.parametrize("name", NETS)
def test_checkpointing_changes_no_bit_of_dropout_or_gradients(name):
    net = from_kwargs("EDMPrecond", **NETS[name] | {"dropout": 0.3})
    for p in net.parameters():  # the last layers start at zero
        torch.nn.init.normal_(p, std=0.05)
    x, sigma = torch.randn(4, 3, 8, 8), torch.rand(4) + 0.1

    def gradients(kept):
        net.recompute(kept)
        torch.manual_seed(1)
        d = net.train()(x, sigma)
        return [d, *torch.autograd.grad(d.square().sum(), list(net.parameters()), allow_unused=True), torch.rand(1)]

    off, blocks = gradients("off"), gradients("blocks")
    assert not torch.equal(off[0], net.eval()(x, sigma))  # there is dropout
    for a, b in zip(off, blocks, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_definitions_have_any_number_of_derivatives_and_the_fused_norm_says_that_it_has_one():
    net = from_kwargs("EDMPrecond", **NETS["DDPM++"])
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    block = net.double().model.enc["4x4_block0"].eval()
    x = torch.randn(1, block.in_channels, 2, 2, dtype=torch.float64, requires_grad=True)
    emb = torch.randn(1, block.affine.in_features, dtype=torch.float64)
    with ops.definitions():
        assert torch.autograd.gradgradcheck(lambda x: block(x, emb).square().mean(), x)
    (slope,) = torch.autograd.grad(block(x, emb).square().mean(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


# Dynamo's own doing, when it meets an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("trains", [True, False])
def test_a_block_compiles_into_one_graph_trained_and_frozen(trains):
    block = from_kwargs("EDMPrecond", **NETS["DDPM++"]).model.enc["4x4_block0"].requires_grad_(trains)
    x, emb = torch.randn(2, block.in_channels, 4, 4, requires_grad=True), torch.randn(2, block.affine.in_features)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    ours, eager = (torch.autograd.grad(f(x, emb).square().sum(), x)[0] for f in (compiled, block))
    torch.testing.assert_close(ours, eager)
