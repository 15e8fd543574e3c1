"""Methods on every family of diffusers' denoisers: twenty iterations of each, and the student's gradient by hand."""

import copy
import math

import pytest
import torch
from torch import nn

diffusers = pytest.importorskip("diffusers")
import diffusers_models  # noqa: E402
from diffusers_models import TINY  # noqa: E402
from toy import draws  # noqa: E402

from potstill.engine.common.errors import UserError  # noqa: E402
from potstill.engine.diffusion.tables import scheme_of  # noqa: E402
from potstill.engine.methods.base import Batch  # noqa: E402
from potstill.engine.methods.dmd import DMDConfig  # noqa: E402
from potstill.engine.methods.gdd import GDDConfig  # noqa: E402
from potstill.engine.methods.moment_matching import MomentMatchingConfig  # noqa: E402
from potstill.engine.methods.sfd import SFDConfig  # noqa: E402
from potstill.engine.methods.sim import SIMConfig  # noqa: E402
from potstill.engine.nets.diffusers import DiffusersDenoiser  # noqa: E402
from potstill.engine.training.run import Run, TrainConfig  # noqa: E402

METHODS = {
    "dmd": DMDConfig(steps=[999, 499], start="unit"),
    "sim": SIMConfig(levels="lognormal", P_mean=0.69, P_std=1.6, weight="one_minus_t"),
    "moment matching": MomentMatchingConfig(steps=2, levels="own", weight="own"),
    "sfd": SFDConfig(num_steps=[3], K=2, sigma_max=14.6),
}
N, ITERATIONS = 2, 20


def made(name: str) -> DiffusersDenoiser:
    scheduler = diffusers_models.scheduler(name)
    scheme = scheme_of(type(scheduler).__name__, scheduler.config)
    return DiffusersDenoiser(diffusers_models.model(name), scheme, size=TINY[name].shape[1:], null=diffusers_models.null(name))


def told(net: DiffusersDenoiser, name: str, n: int = N):
    """What a batch of n brings: captions or classes of its samples, and prompts for two asks."""
    rows = diffusers_models.condition(name, n)
    return (rows, (rows, rows)) if net.text else (rows, ())


@pytest.mark.parametrize("name", TINY)
def test_every_method_trains_every_family(name):
    """All numbers stay finite, students leave their teachers, and no bit of a teacher moves."""
    for cfg in METHODS.values():
        net = made(name)
        before = copy.deepcopy(net.state_dict())
        method = cfg.build(net, net)
        start = copy.deepcopy(method.nets["student"].state_dict())
        assert all(start[key].equal(before[key]) for key in before)
        run = Run(method, TrainConfig(batch=N, kimg=1), 0, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        for _ in range(ITERATIONS):
            run.take(torch.randn(N, *net.shape, generator=generator), *told(net, name))
        assert all(math.isfinite(value) for value in run.meter.read().values())
        moved = method.nets["student"].state_dict()
        assert any(not moved[key].equal(start[key]) for key in start)
        assert all(value.equal(before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", ["unet", "sd15", "pixart", "sd3"])
def test_a_gan_by_the_features_of_the_teacher(name):
    """GDD looks through the teacher's first half; which layers GDD-I freezes is only known of EDM's nets."""
    net = made(name)
    method = GDDConfig(sigma=14.6, r1_every=2, width=8).build(net, net)
    run = Run(method, TrainConfig(batch=4, kimg=1), 0, torch.device("cpu"))
    for _ in range(3):
        run.take(torch.randn(4, *net.shape), told(net, name, 4)[0])
    logs = run.meter.read()
    assert all(math.isfinite(value) for value in logs.values())
    assert min(logs["student/grad_norm"], logs["discriminator/r1/grad_norm"]) > 0
    with pytest.raises(UserError, match=r"^method\.freeze = 1 names layers of EDM's U-Nets, got \w+: set it to 0, [^\n]*$"):
        GDDConfig(freeze=1).build(net, net)


@pytest.mark.parametrize("name", ["sd15", "pixart", "sd3"])
def test_moments_without_a_second_net(name):
    """Instant moment matching differentiates the teacher by its weights, forwards and backwards."""
    net = made(name)
    cfg = MomentMatchingConfig(variant="instant", steps=2, levels="own", weight="own", measure_every=2, measure_batch=2)
    run = Run(cfg.build(net, net), TrainConfig(batch=4, kimg=1), 0, torch.device("cpu"))
    for _ in range(3):
        run.take(torch.randn(4, *net.shape), told(net, name, 4)[0])
    assert math.isfinite(run.meter.read()["student/grad_norm"])


# The student's gradient


def plain(net: DiffusersDenoiser, model: nn.Module, x, sigma, text):
    """D by the textbook, from a bare model of diffusers: noise, velocity or flow."""
    s = sigma.reshape(-1, 1, 1, 1)
    match net.scheme["prediction"]:
        case "epsilon":
            t = (net.known_levels - sigma[0]).abs().argmin().expand(len(x))
            return x - s * model(x / (1 + s**2).sqrt(), t, text.embeds).sample
        case "v_prediction":
            t = (net.known_levels - sigma[0]).abs().argmin().expand(len(x))
            return x / (1 + s**2) - s / (1 + s**2).sqrt() * model(x / (1 + s**2).sqrt(), t, text.embeds).sample
    t = sigma / (1 + sigma)
    told_at = torch.where(sigma < 1e5, t, 1.0)  # pure noise is t = 1, not 1 - 1e-5
    flow = model(x / (1 + s), text.embeds, text.pooled, 1000 * told_at).sample
    return x / (1 + s) - t.reshape(-1, 1, 1, 1) * flow


def guided(net, model, x, sigma, text, w):
    none = net.unconditional(text)
    return (1 - w) * plain(net, model, x, sigma, none) + w * plain(net, model, x, sigma, text)


def one_at_a_time(f, x, sigma, text):
    """Rows have levels of their own, which `plain` wants one of."""
    return torch.cat([f(x[i : i + 1], sigma[i : i + 1], text[i : i + 1]) for i in range(len(x))])


def generated(net, student, d, text, levels, start):
    """Backward simulation by hand: one of the steps for the whole batch, differentiated alone."""
    z = d.normal(*net.shape)
    last = d.host.choice(range(len(levels))) if len(levels) > 1 else 0
    first = torch.full((len(z),), levels[0])
    x = z * levels[0]
    if start == "unit":
        x = z * (1 + levels[0] if net.flow else math.sqrt(1 + levels[0] ** 2))
    for i in range(last):
        clean = plain(net, student, x, torch.full_like(first, levels[i]), text).detach()
        x = clean + levels[i + 1] * d.normal(*net.shape)
    return plain(net, student, x, torch.full_like(first, levels[last]), text)


@pytest.mark.parametrize(("name", "start"), [("sd15", "sigma"), ("sd21", "unit"), ("sd3", "unit")])
@pytest.mark.parametrize("method", ["dmd", "sim"])
def test_the_students_gradient_by_hand(method, name, start):
    """DMD's g = (D_fake - D_real) / mean|x - D_real| and SiD's <D_real - D_fake, D_real - x - α δ> / mean|x - D_real|, all guided."""
    net, w, v, seed = made(name), 2.5, 1.5, 4
    with torch.no_grad():
        fake = copy.deepcopy(net)
        for p in fake.parameters():
            p.mul_(1.02)
    steps = {"steps": [999, 749, 499], "start": start, "guidance": w, "fake_guidance": v}
    cfg = DMDConfig(**steps) if method == "dmd" else SIMConfig(**steps, distance="l2", alpha=1.2, levels="own", t_max=0.9)
    built = cfg.build(net, net)
    trained = built.nets["fake"].denoiser if method == "dmd" else built.nets["fake"]
    trained.load_state_dict(fake.state_dict())
    batch = Batch(torch.zeros(3, 1, 1, 1), None, draws(3, seed), (told(net, name, 3)[1]))
    loss, _ = built.turns[0 if method == "dmd" else 1].loss(built.begin(batch))
    student = built.nets["student"]
    ours = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)

    d, text = draws(3, seed), told(net, name, 3)[0]
    levels = [net.level(torch.tensor(i / 999, dtype=torch.float64)).item() for i in steps["steps"]]
    x = generated(net, student.model, d, text, levels, start)
    u = d.integers(20, 980) / 999 if method == "dmd" else 0.9 * d.uniform()
    sigma = net.level(u)
    x_t = x + sigma.reshape(-1, 1, 1, 1) * d.normal(*net.shape)
    real = one_at_a_time(lambda *a: guided(net, net.model, *a, w), x_t, sigma, text)
    false = one_at_a_time(lambda *a: guided(net, fake.model, *a, v), x_t, sigma, text)
    scale = 1 / (x - real).abs().flatten(1).mean(1).detach().reshape(-1, 1, 1, 1)
    if method == "dmd":
        by_hand = (x * ((false - real) * scale).detach()).flatten(1).mean(1).mean()
    else:
        by_hand = 100 * (scale * (real - false) * (real - x - 1.2 * (real - false))).flatten(1).sum(1).mean()
    wanted = torch.autograd.grad(by_hand, list(student.parameters()), allow_unused=True)
    a, b = (torch.cat([g.flatten() for g in found if g is not None]) for found in (ours, wanted))
    assert (a - b).norm() < 1e-3 * b.norm()
    assert b.norm() > 0
