"""The networks against what EDM's own code computes: golden vectors, and the published parameter counts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine.diffusion.sigmas import edm_weight, karras, with_zero
from engine.diffusion.solvers import heun, solve
from engine.nets.edm import from_kwargs

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))


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


def test_denoiser_and_its_gradients_are_edms(golden):
    net, t, order = golden
    x = t["in.x"].requires_grad_()
    d = net(x, t["in.sigma"], t.get("in.labels"))
    assert relative(d, t["out.D"]) < 1e-5
    d.square().sum().backward()
    assert relative(x.grad, t["out.dx_sum_D2"]) < 1e-4
    named = dict(net.named_parameters())
    norms = torch.stack([named[name].grad.norm() for name in order])
    assert relative(norms, t["out.param_grad_norms"]) < 1e-4


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
