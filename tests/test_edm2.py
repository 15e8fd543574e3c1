"""EDM2's networks: what EDM2's own code computes (golden vectors), published sizes, and that training, skipping and guidance know them."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from toy import draws

from potstill.engine.common.errors import UserError
from potstill.engine.methods.base import Batch, copied, frozen, modules_of
from potstill.engine.methods.sfd import SFD, SFDConfig
from potstill.engine.methods.sim import SIM, SIMConfig
from potstill.engine.methods.teacher import EDMLoss, Teacher
from potstill.engine.models.weights import load_net, save_net
from potstill.engine.nets import edm2_layers as layers
from potstill.engine.nets import shadow
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.guide import led_by
from potstill.engine.skipping.apply import Skipping
from potstill.engine.skipping.blocks import blocks_of
from potstill.engine.skipping.freezing import freeze, is_frozen
from potstill.engine.skipping.plan import Plan
from potstill.engine.skipping.probe import Material, probe
from potstill.engine.training.optim import OptimConfig
from potstill.engine.training.parallel import own_guides
from potstill.engine.training.run import Run, TrainConfig
from potstill.kernels import normalized_weight

GOLDEN = Path(__file__).parent / "golden/edm2"
CPU = torch.device("cpu")
SMALL = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1,
    "attn_resolutions": [4], "channels_per_head": 8, "logvar_channels": 16,
}  # fmt: skip
# Of 12 EDM2 nets in float32 no number was further off than 2e-6 of the largest (summation order).
EXACT = 2e-5


def net_of(seed=0, **kwargs):
    """A small net whose gains, which begin at zero, are not, so that every block and the output do something."""
    torch.manual_seed(seed)
    net = from_kwargs("EDM2Precond", **SMALL | kwargs)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "gain" in name:
                p += 0.7
    return net.eval()


def inputs(n=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    sigma = torch.randn(n, generator=g).exp()
    x = torch.randn(n, 1, 8, 8, generator=g) * (sigma**2 + 0.25).sqrt()[:, None, None, None]
    return x, sigma, F.one_hot(torch.arange(n) % 3, 3).float()


def error(got, wanted):
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@pytest.fixture(params=["cond", "uncond"])
def golden(request):
    with safe_open(GOLDEN / f"{request.param}.safetensors", "pt") as file:
        meta, t = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    net = from_kwargs(meta["precond"], **json.loads(meta["kwargs"]))
    net.load_state_dict({name.removeprefix("state."): v for name, v in t.items() if name.startswith("state.")}, strict=True)
    return net.eval(), t


def test_denoiser_input_gradient_and_uncertainty_are_edm2s(golden):
    net, t = golden
    x = t["in.x"].requires_grad_()
    denoised, logvar = net(x, t["in.sigma"], t.get("in.labels"), return_logvar=True)
    assert error(denoised, t["out.D"]) < EXACT and error(logvar, t["out.logvar"]) < EXACT
    assert error(torch.autograd.grad(denoised.square().sum(), x)[0], t["out.dx_sum_D2"]) < 1e-4
    if "in.labels" in t:
        assert error(net(x, t["in.sigma"]), t["out.D_labels_none"]) < EXACT


def test_bfloat16_is_within_a_hundredth(golden):
    net, t = golden
    net.compute_dtype = torch.bfloat16
    assert error(net(t["in.x"], t["in.sigma"], t.get("in.labels")), t["out.D"]) < 1e-2


def test_training_mode_forces_the_norms_as_edm2_does(golden):
    net, t = golden
    given = t["in.x"], t["in.sigma"], t.get("in.labels")
    net.train()
    assert error(net(*given), t["out.D_train_mode"]) < EXACT
    net.eval()
    state = net.state_dict()
    for name, wanted in t.items():
        if name.startswith("forced."):
            assert math.isclose(state[name[7:-7]].square().sum().item(), wanted.item(), rel_tol=EXACT)
        if name.startswith("forced_full."):
            assert error(state[name[12:]], wanted) < EXACT
    x = given[0].requires_grad_()
    denoised = net(*given)
    assert error(denoised, t["out.D_after_forced_norm"]) < EXACT
    assert error(torch.autograd.grad(denoised.square().sum(), x)[0], t["out.dx_sum_D2_after_forced_norm"]) < 1e-4


def test_keys_and_shapes_are_edm2s(golden):
    net, t = golden
    assert {k: v.shape for k, v in net.state_dict().items()} == {k[6:]: v.shape for k, v in t.items() if k.startswith("state.")}


@pytest.mark.parametrize(
    ("channels", "millions"), [(64, 31.31), (128, 124.71), (192, 280.21), (256, 497.81), (320, 777.50), (384, 1119.28), (448, 1523.16)]
)
def test_sizes_are_the_published_ones(channels, millions):
    with torch.device("meta"):
        net = from_kwargs("EDM2Precond", img_resolution=64, img_channels=4, label_dim=1000, model_channels=channels)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
@pytest.mark.parametrize("way", ["up", "down"])
def test_resampling_is_a_convolution_with_the_filter_for_each_channel(taps, way):
    style = layers.MPStyle(8, 0.5, taps, 8, 0.0, 0.3, 0.3, None)
    block = layers.MPBlock(6, 6, style, decoder=True, **{way: True})
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    f = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    f, pad = f.outer(f).expand(6, 1, -1, -1), (len(taps) - 1) // 2
    wanted = (
        F.conv2d(x, f, stride=2, padding=pad, groups=6) if way == "down" else F.conv_transpose2d(x, 4 * f, stride=2, padding=pad, groups=6)
    )
    assert error(block._resampled(x), wanted) < 1e-7  # float32 filters


def test_magnitudes_are_preserved():
    a = torch.randn(64, 24, 16, 16)
    assert math.isclose(layers.MPConv(24, 32, (3, 3))(a)[..., 1:-1, 1:-1].square().mean().sqrt().item(), 1, rel_tol=5e-2)
    block = layers.MPBlock(24, 24, layers.MPStyle(8, 0.5, (1, 1), 8, 0.0, 0.3, 0.3, 256.0), attention=True)
    assert math.isclose(block(a, torch.randn(64, 8)).square().mean().sqrt().item(), 1, rel_tol=0.1)


def test_gradients_of_weights_and_gains_are_those_of_numerical_differences():
    net = net_of(clip_act=None).double()
    x, sigma, labels = inputs()
    f = lambda: net.model(x.double(), sigma.double(), labels.double()).square().mean()  # noqa: E731
    f().backward()
    for name, p in net.named_parameters():
        if p.grad is None:
            assert name.startswith("logvar")
            continue
        direction = torch.randn(p.shape, dtype=p.dtype)
        with torch.no_grad():
            p += 1e-5 * direction
            high = f()
            p -= 2e-5 * direction
            low = f()
            p += 1e-5 * direction
        assert math.isclose(((high - low) / 2e-5).item(), (p.grad * direction).sum().item(), rel_tol=1e-4, abs_tol=1e-8), name


def test_recomputed_blocks_give_the_same_gradients_with_the_same_dropout():
    found = []
    for mode in ("off", "blocks"):
        net = net_of(dropout=0.2).train()
        net.forces_norms = False
        net.recompute(mode)
        torch.manual_seed(5)
        net(*inputs()).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    assert all(a is b or torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_features_and_estimate_of_one_forward_are_those_of_two():
    net, given = net_of(), inputs()
    estimate, features = net.estimate_and_features(*given)
    assert torch.allclose(estimate.denoised(), net(*given), atol=1e-6) and torch.allclose(features, net.features(*given), atol=1e-6)
    assert [(c, h, w) for c, h, w in net.taps()] == [tuple(one.shape[1:]) for one in net.levels(*given)]


def test_files_keep_the_gains_without_dimensions(tmp_path):
    net = net_of()
    save_net(tmp_path / "net.safetensors", net)
    again, meta = load_net(tmp_path / "net.safetensors")
    assert meta["precond"] == "EDM2Precond" and torch.equal(again(*inputs()), net(*inputs()))
    assert again.state_dict()["unet.out_gain"].shape == () and again.unet.out_gain.shape == (1,)


def test_the_teachers_loss_learns_its_own_uncertainty():
    net = net_of()
    net.forces_norms = False
    method = Teacher(EDMLoss(P_mean=-0.4, P_std=1.0), net)
    y = torch.randn(4, 1, 8, 8)
    labels = F.one_hot(torch.arange(4) % 3, 3).float()
    loss, logs = method.loss(Batch(y, labels, draws(4, seed=3)))
    again = draws(4, seed=3)
    sigma = (-0.4 + again.normal()).exp()
    x_t = y + sigma[:, None, None, None] * again.normal(1, 8, 8)
    square = (net(x_t, sigma, labels) - y).square().mean((1, 2, 3)) * (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    v = net.logvar(sigma)
    assert math.isclose(loss.item(), (square / v.exp() + v).mean().item(), rel_tol=1e-5)
    assert math.isclose(logs["denoise"].item(), square.mean().item(), rel_tol=1e-5)
    (grad,) = torch.autograd.grad(loss, net.logvar_linear.weight)
    (wanted,) = torch.autograd.grad((square.detach() / v.exp() + v).mean(), net.logvar_linear.weight)
    assert error(grad, wanted) < 1e-4


def lengths(net):
    return torch.cat([p.detach().flatten(1).square().mean(1).sqrt() for p in net.weights_of_unit_length()])


@pytest.mark.parametrize("optimizer", ["torch", "adam_ema"])
def test_the_trainer_forces_norms_before_every_iteration_and_only_where_it_is_asked(optimizer):
    optim = {"student": OptimConfig(lr=1e-2), "fake": OptimConfig(lr=1e-2, forced_norm=False)}
    run = Run(
        SIM(SIMConfig(scale=1.0), net_of(1), net_of(2), net_of(3)), TrainConfig(kimg=0.1, batch=4, optim=optim, optimizer=optimizer), 0, CPU
    )
    images = torch.zeros(4, 1, 8, 8)
    for _ in range(3):
        before = copy.deepcopy(run.method.student)
        layers.force_norms(before.weights_of_unit_length())
        run.take(images, None)
        moved = run.method.student
        # what the step began with had unit length; one step of Adam at 1e-2 moves each number by 1e-2 at most
        assert all(
            (a - b).abs().max() < 1.5e-2 for a, b in zip(moved.weights_of_unit_length(), before.weights_of_unit_length(), strict=True)
        )
    for one in run.trained.values():
        one.force_norms()
    assert (lengths(run.method.student) - (1 - 1e-4)).abs().max() < 1e-5
    assert (lengths(run.method.fake) - (1 - 1e-4)).abs().max() > 1e-3


def test_shadows_change_no_bit_of_a_16_bit_run():
    found = []
    for shadows in (True, False):
        nets = [net_of(seed) for seed in (1, 2, 3)]
        for net in nets:
            net.compute_dtype = torch.bfloat16
        run = Run(
            SIM(SIMConfig(scale=1.0), *nets),
            TrainConfig(kimg=0.1, batch=4, shadows=shadows, optim={"student": OptimConfig(lr=1e-2)}),
            0,
            CPU,
        )
        for _ in range(3):
            run.take(torch.zeros(4, 1, 8, 8), None)
        assert bool(run.weights_with_shadows) is shadows
        found.append([p.detach().clone() for p in run.method.student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_gradient_of_a_shadow_is_that_of_normalizing(monkeypatch):
    monkeypatch.setattr(shadow, "SMALL", 0)  # else a small weight on a CPU is normalised after all
    weight = nn.Parameter(torch.randn(6, 5, 3, 3))
    g, own = torch.randn(6, 5, 3, 3).bfloat16(), shadow.UnitShadow(weight, torch.bfloat16)
    assert torch.equal(own.of(weight), normalized_weight(weight, 1.0, torch.bfloat16))
    (kept,) = torch.autograd.grad(own.of(weight), weight, g)
    (wanted,) = torch.autograd.grad(normalized_weight(weight, 1.0, torch.bfloat16), weight, g)
    assert error(kept, wanted) < 1e-5
    with torch.no_grad():
        weight.mul_(-1)
    assert torch.equal(own.of(weight), normalized_weight(weight, 1.0, torch.bfloat16))


def test_two_forwards_before_one_backward_do_not_spoil_each_other():
    net = net_of().train()
    first, second = net(*inputs(seed=1)), net(*inputs(seed=2))
    (first.sum() + second.sum()).backward()


# Skipping and freezing


def test_skipping_nothing_is_the_net_and_a_left_out_block_is_its_scaled_skip_path():
    net, given = net_of(), inputs()
    names = list(blocks_of(net.model))
    whole = Skipping(net, None)
    assert torch.equal(whole(*given), net(*given))
    name = "enc.8x8_block0"
    plan = Plan("", 8, [0.002, 80.0], [name, *(n for n in names if n != name)], [1], 0.02, {})
    light = Skipping(net, plan)
    out = light(given[0], torch.tensor(1.0), given[2])
    by_hand = copy.deepcopy(net)
    block = by_hand.unet.enc["8x8_block0"]
    block.forward = lambda x, emb: block.shortcut(x) * (0.7 / math.sqrt(0.7**2 + 0.3**2))
    assert torch.allclose(out, by_hand(given[0], torch.tensor(1.0), given[2]), atol=1e-6)


def test_the_probe_measures_these_nets():
    x, _, labels = inputs(16)
    result = probe(net_of(), Material(x, labels[:16], batch=8), 2)
    assert len(result.names) == len(blocks_of(net_of().model)) and (result.alone >= 0).all()


def test_freeze_levels_keep_the_same_kinds_of_layers_as_in_edms_nets():
    net = net_of(channel_mult=[1, 2])
    kinds = {level: {n.split(".")[-2] for n, _ in net.unet.named_parameters() if is_frozen(n, level)} for level in range(4)}
    assert kinds[0] == set() and kinds[1] == {"conv_res0", "conv_res1", "attn_proj"}
    assert kinds[2] == kinds[1] | {"attn_qkv"} and kinds[3] == kinds[2] | {"conv_skip"}
    stay, total = freeze(net.unet, 1)
    assert 0.5 < stay / total < 0.95
    assert not any("conv_res" in n for n, p in net.unet.named_parameters() if p.requires_grad)


# Guidance


def test_autoguidance_leads_away_from_the_worse_net():
    net, guide = net_of(1), net_of(2, model_channels=8, channel_mult=[1])
    x, sigma, labels = inputs()
    wanted = guide(x, sigma, labels) + 2.1 * (net(x, sigma, labels) - guide(x, sigma, labels))
    led_by(net, guide, "guide.safetensors")
    assert torch.allclose(net.estimate(x, sigma, labels, guidance=2.1).denoised(), wanted, atol=1e-5)
    assert torch.equal(net.estimate(x, sigma, labels).denoised(), frozen(net).estimate(x, sigma, labels).denoised())
    assert frozen(net).guide is net.guide and copied(net).guide is None and Skipping(net, None).guide is net.guide
    assert not any("guide" in name for name in net.state_dict())
    method = SIM(SIMConfig(guidance=2.0), net, copied(net), copied(net))
    assert any(m is guide for m in modules_of(method))
    unconditional = net_of(3, label_dim=0)
    led_by(unconditional, net_of(4, label_dim=0), "g")
    SIM(SIMConfig(guidance=2.0), unconditional, copied(unconditional), copied(unconditional))


def test_a_method_whose_guide_is_cut_into_shards_leaves_the_teachers_own_whole():
    """One rank alone samples the teacher after the run: with a guide in shards it waited for the others for ever."""
    teacher = led_by(net_of(1), net_of(2), "guide.safetensors")
    method, (x, sigma, labels) = SIM(SIMConfig(guidance=2.0), frozen(teacher), copied(teacher), copied(teacher)), inputs()
    own_guides(method)
    assert teacher.guide is not None and all(m is not teacher.guide.net for m in modules_of(method))
    denoised = [one.estimate(x, sigma, labels, guidance=2.0).denoised() for one in (teacher, method.teacher)]
    assert torch.equal(*denoised)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"img_resolution": 16}, "worse net of the same data"),
        ({"label_dim": 4}, "worse net of the same data"),
        ({"sigma_data": 1.0}, "preconditioned"),
    ],
)
def test_a_guide_of_another_task_is_refused(other, says):
    with pytest.raises(UserError, match=says):
        led_by(net_of(), net_of(**other), "guide.safetensors")


def test_an_edm_net_may_guide_an_edm2_net():
    song = from_kwargs(
        "EDMPrecond", img_resolution=8, img_channels=1, label_dim=3, model_type="SongUNet", model_channels=8, channel_mult=[1]
    )
    led_by(net_of(), song, "guide.safetensors")


def test_the_step_condition_is_refused_in_one_sentence():
    net = net_of()
    with pytest.raises(UserError, match="step_condition"):
        SFD(SFDConfig(num_steps=[4, 5], step_condition=True), net, copied(net))


def test_numpys_numbers_and_no_classes_are_plain_in_a_file(tmp_path):
    net = net_of(channel_mult=np.array([1, 2]), model_channels=np.int64(8), label_dim=None)
    save_net(tmp_path / "net.safetensors", net)
    again, meta = load_net(tmp_path / "net.safetensors")
    assert meta["kwargs"]["channel_mult"] == [1, 2] and meta["kwargs"]["label_dim"] == 0 == again.label_dim


def test_the_log_variance_of_one_level_is_one_number():
    net, (x, sigma, labels) = net_of(), inputs()
    assert net(x, sigma, labels, return_logvar=True)[1].shape == (4, 1, 1, 1)
    assert net(x, sigma[0], labels, return_logvar=True)[1].shape == (1, 1, 1, 1)


@pytest.mark.parametrize("bad", [{"resample_filter": [1, 2, 1]}, {"channels_per_head": 0}])
def test_what_cannot_be_is_said_when_the_net_is_made(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} wants"):
        from_kwargs("EDM2Precond", **SMALL | bad)


@pytest.mark.parametrize("bad", [{"model_type": "SongUNet"}, {"channels_per_heads": 8}, {"step_condition": True}])
def test_unknown_keywords_are_refused(bad):
    with pytest.raises(ValueError, match="EDM2"):
        from_kwargs("EDM2Precond", **SMALL | bad)


def test_a_head_of_no_channels_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="channels_per_head wants a number from 1"):
        net_of(channels_per_head=0)
