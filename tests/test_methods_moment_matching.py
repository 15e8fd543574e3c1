"""Moment matching: jumps, both algorithms by hand, the estimator without bias, who receives gradients, and that it learns."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from toy import (
    Mixture,
    apart,
    batch_of,
    default_dtype,
    draws,
    gradients,
    image,
    largest,
    learn,
    pretrained,
    reached,
)

from potstill.engine.common.errors import UserError
from potstill.engine.methods.base import Method
from potstill.engine.methods.moment_matching import WEIGHTS, Alternating, Instant, Jump, MomentMatchingConfig
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.weight_space import WeightSpace
from potstill.engine.training.run import Run, TrainConfig


def alternating(data: Mixture, **settings) -> Alternating:
    return Alternating(MomentMatchingConfig(**settings), data, apart(pretrained(data), 1), apart(pretrained(data), 2))


def instant(data: Mixture, **settings) -> Instant:
    """With a v that has been measured once."""
    method = Instant(MomentMatchingConfig(variant="instant", **settings), pretrained(data), apart(pretrained(data), 1))
    method.measure(method.begin(batch_of(data, n=256)))
    return method


def jump_of(method: Method, data: Mixture, n: int = 16, seed: int = 0) -> Jump:
    return method.begin(batch_of(data, n, seed))


# Jumps.


def test_landing_is_the_posterior_of_the_variance_preserving_process():
    u = torch.rand(2, 1000, dtype=torch.float64)
    a_s, a_t = (0.02 + 0.97 * u.amax(0)).double(), (0.01 + 0.97 * u.amin(0)).double()
    s_s, s_t = (1 - a_s**2).sqrt(), (1 - a_t**2).sqrt()
    x, z_t, xi = torch.randn(3, 1000, 2, 1, 1, dtype=torch.float64).unbind(0)
    a, v = a_t / a_s, s_t**2 - (a_t / a_s) ** 2 * s_s**2
    V = 1 / (1 / s_s**2 + a**2 / v)
    wanted = image(V) * (image(a / v) * z_t + image(a_s / s_s**2) * x) + image(V.sqrt()) * xi
    jump = Jump(z_t / image(a_t), s_t / a_t, s_s / a_s, xi, None, batch_of(Mixture()))
    torch.testing.assert_close(alternating(Mixture()).state_at_s(jump, x) * image(a_s), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_times_are_drawn_per_sample_with_the_right_mass_at_one(k):
    n = 40_000
    jump = jump_of(alternating(Mixture(), steps=k, levels="log_uniform"), Mixture(), n)
    s, t = (torch.log(S / 0.002) / math.log(80 / 0.002) for S in (jump.S_s, jump.S_t))
    at_one, wanted = (jump.S_t > 79.999).double().mean().item(), 1 / (2 * k)
    assert abs(at_one - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / n)
    assert (t - s).min() > -1e-5
    assert (t - s).max() < 1 / k + 1e-5
    quantiles = s.quantile(torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9]), atol=0.02, rtol=0)
    residual = (jump.z_t - batch_of(Mixture(), n).images) / image(jump.S_t)
    torch.testing.assert_close(residual.std(), torch.tensor(1.0), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("levels", "published"),
    [
        ("karras", [80, 39.02, 17.53, 7.10, 2.515, 0.743, 0.170, 0.0261]),
        ("cosine", [80, 5.03, 2.41, 1.50, 1.00, 0.668, 0.414, 0.199]),
        ("log_uniform", [80, 21.3, 5.66, 1.50, 0.40, 0.106, 0.0283, 0.0075]),
    ],
)
def test_students_visit_these_levels(levels, published):
    for k in (1, 2, 4, 8):
        sampler = alternating(Mixture(), steps=k, levels=levels).sampler
        torch.testing.assert_close(sampler.sigmas, [float(S) for S in published[:: 8 // k]], rtol=5e-3, atol=0)
        assert (sampler.solver, sampler.nfe) == ("ancestral", k)


def test_weights_in_terms_of_the_log_snr():
    S, cfg = torch.logspace(-2.5, 1.8, 9, dtype=torch.float64), MomentMatchingConfig(sigmoid_bias=-2.0)
    lam = -2 * S.log()
    wanted = {
        "flat": S**0,
        "snr": lam.exp(),
        "edm": lam.exp() / 0.25 * (0.25 + S**2),
        "sqrt_karras": (lam.exp() / 0.25 * (0.25 + S**2)).sqrt(),
        "sigmoid": lam.exp() * (-2.0 - lam).sigmoid(),
    }
    assert wanted.keys() == WEIGHTS.keys()
    for name, w in wanted.items():
        torch.testing.assert_close(WEIGHTS[name](S, cfg), w)


# Algorithm 2.

CASES = [(0, 1.0, "sqrt_karras"), (4, 1.5, "edm"), (4, 1.0, "flat")]


def jump_by_hand(method: Alternating, data: Mixture) -> tuple[Tensor, ...]:
    """z_t, S_t, x̃ (with its graph), z_s, S_s, labels and w, of a four-step student on Karras' map."""
    (y, labels, *_), d = batch_of(data), draws(16)
    s = d.uniform()
    t = (s + d.uniform() / 4).clamp(max=1)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    S_s, S_t = ((low + u * (high - low)) ** 7 for u in (s, t))
    z_t = y + image(S_t) * d.normal(2, 1, 1)
    x = method.student(z_t, S_t, labels)
    r = image(S_s / S_t) ** 2
    z_s = ((1 - r) * x + r * z_t + image(S_s) * (1 - r).sqrt() * d.normal(2, 1, 1)).detach()
    edm = (S_s**2 + 0.25) / (0.5 * S_s) ** 2
    w = {"flat": torch.ones_like(S_s), "sqrt_karras": edm.sqrt(), "edm": edm}[method.cfg.weight]
    return x, z_s, S_s, labels, w


def guided(data: Mixture, guidance: float, z: Tensor, S: Tensor, labels: Tensor | None) -> Tensor:
    if guidance == 1:
        return data(z, S, labels)
    return guidance * data(z, S, labels) + (1 - guidance) * data(z, S, torch.zeros_like(labels))


@pytest.mark.parametrize(("label_dim", "guidance", "weight"), CASES)
@default_dtype(torch.float64)
def test_both_gradients_by_hand(label_dim, guidance, weight):
    data = Mixture(label_dim)
    method = alternating(data, steps=4, guidance=guidance, weight=weight)
    x, z_s, S_s, labels, w = jump_by_hand(method, data)
    real, fake = guided(data, guidance, z_s, S_s, labels), method.fake(z_s, S_s, labels)

    to_both = (x.detach() - fake).square().sum((1, 2, 3)) + (real - fake).square().sum((1, 2, 3))
    wanted = torch.autograd.grad((w * to_both).mean(), list(method.fake.parameters()))
    found = gradients(method, "fake", batch_of(data))["fake"]
    torch.testing.assert_close(found, list(wanted), rtol=1e-8, atol=1e-10)

    fake = method.fake(z_s, S_s, labels)
    inner = (x * (fake - real).detach()).sum((1, 2, 3))
    wanted = torch.autograd.grad((w * inner).mean(), list(method.student.parameters()))
    found = gradients(method, "student", batch_of(data))["student"]
    torch.testing.assert_close(found, list(wanted), rtol=1e-8, atol=1e-10)


def test_one_net_a_batch_the_fake_net_first():
    data, method = Mixture(), alternating(Mixture())
    run, moved = Run(method, TrainConfig(kimg=1, batch=16), seed=0, device=torch.device("cpu")), []
    for _ in range(6):
        before = {name: [p.clone() for p in net.parameters()] for name, net in method.nets.items()}
        run.take(*data.sample_data(16, torch.Generator()))
        moved.append([name for name, net in method.nets.items()
                      if any(not torch.equal(p, q) for p, q in zip(before[name], net.parameters(), strict=True))])  # fmt: skip
    assert moved == [["fake"], ["student"]] * 3


def test_each_turn_reaches_its_own_net():
    for trains in ("fake", "student"):
        assert reached(gradients(alternating(Mixture()), trains, batch_of(Mixture()))) == {trains}
    assert reached(gradients(instant(Mixture()), "student", batch_of(Mixture()))) == {"student"}


def test_the_student_rests_when_the_fake_net_is_the_teacher():
    data = Mixture(4)
    method = Alternating(MomentMatchingConfig(), pretrained(data), apart(pretrained(data), 1), pretrained(data))
    assert largest(gradients(method, "student", batch_of(data))["student"]) == 0
    assert largest(gradients(alternating(data), "student", batch_of(data))["student"]) > 0


# The fixed point of both algorithms: if x̃ is the data itself, the exact teacher's expected gradient is zero.


class Exact(Mixture):
    """The exact denoiser as a function of its means, so that it has a gradient to be zero."""

    def __init__(self):
        super().__init__()
        means = self.means
        del self.means
        self.means = nn.Parameter(means)


@default_dtype(torch.float64)
def test_nothing_moves_when_the_student_makes_data():
    teacher, data, n = Exact(), Mixture(), 400
    method = Instant(MomentMatchingConfig(steps=4, weight="flat"), teacher, apart(pretrained(data), 1))
    phi = Alternating(MomentMatchingConfig(steps=4, weight="flat"), teacher, method.student, Exact())

    def moments(guess) -> tuple[Tensor, Tensor]:
        """μ and φ's gradient, each [n, 8·2], on n batches of their own."""
        method.guess = phi.guess = guess
        mu, of_phi = [], []
        for seed in range(n):
            jump = jump_of(method, data, n=32, seed=seed)
            mu.append(method.moment(jump)[0].flatten())
            of_phi.append(torch.autograd.grad(phi.fake_loss(jump)[0], phi.fake.means)[0].flatten())
        return torch.stack(mu), torch.stack(of_phi)

    def surprise(samples: Tensor) -> float:
        """The largest mean in units of its standard error."""
        return (samples.mean(0).abs() * n**0.5 / samples.std(0)).max().item()

    assert max(map(surprise, moments(lambda jump: jump.batch.images))) < 4
    assert min(map(surprise, moments(lambda jump: 1.3 * jump.batch.images))) > 8


# Algorithm 3.


@default_dtype(torch.float64)
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_on_one_batch_it_descends_half_the_squared_norm_of_mu(guidance):
    data = Mixture(4)
    method = instant(data, steps=4, guidance=guidance)
    jump = jump_of(method, data)
    loss, logs = method.matched(jump, jump)
    found = torch.autograd.grad(2 * loss, list(method.student.parameters()))

    # μ as a function of x̃, z_s held, with the teacher written out on its own
    x, teacher = method.guess(jump), apart(pretrained(data), 3)
    teacher.load_state_dict(method.teacher.net.state_dict())
    d = guided(teacher, guidance, method.state_at_s(jump, x), jump.S_s, jump.labels)
    error = (method.weight(jump.S_s) * (x - d).square().sum((1, 2, 3))).mean()
    mu = torch.autograd.grad(error, list(teacher.parameters()), create_graph=True)
    scaled = [m.square() / (v.sqrt() + 1e-8) for m, v in zip(mu, method.state.v, strict=True)]
    half_norm = 0.5 * sum(m.sum() for m in scaled)
    wanted = torch.autograd.grad(half_norm, list(method.student.parameters()))
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(logs["moment"], half_norm.detach())


@default_dtype(torch.float64)
def test_two_halves_are_unbiased_and_one_batch_twice_is_not():
    """Over six jumps as the whole population, so that the expectation is a sum over all 36 pairs of halves."""
    data, jumps = Mixture(), range(6)
    method = instant(data, steps=2, weight="flat")
    everyone = jump_of(method, data, n=6)
    whole = vector(method, method.matched(everyone, everyone))
    pairs = torch.stack([vector(method, method.student_loss(pick(everyone, [a, b]))) for a in jumps for b in jumps])
    torch.testing.assert_close(pairs.mean(0), whole, rtol=1e-7, atol=1e-10)
    same = torch.stack([vector(method, method.matched(pick(everyone, [a]), pick(everyone, [a]))) for a in jumps])
    assert (same.mean(0) - whole).norm() > 0.1 * whole.norm()

    # and as it runs: halves of eight drawn at random, within the standard error of their mean
    drawn = torch.randint(6, (150, 8), generator=torch.Generator().manual_seed(0))
    along = torch.stack([vector(method, method.student_loss(pick(everyone, i))) for i in drawn]) @ (whole / whole.norm())
    assert (along.mean() - whole.norm()).abs() < 3 * along.std() / len(drawn) ** 0.5


def vector(method: Instant, result: tuple[Tensor, dict]) -> Tensor:
    """The student's gradient, flat."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(result[0], list(method.student.parameters()))])


def pick(jump: Jump, index) -> Jump:
    return Jump(jump.z_t[index], jump.S_t[index], jump.S_s[index], jump.xi[index], None, jump.batch)


def test_the_derivative_in_weight_space_agrees_with_a_difference():
    net = from_kwargs(
        "EDMPrecond", img_resolution=8, img_channels=1, label_dim=3, model_type="SongUNet", model_channels=16,
        channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], augment_dim=2,
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():  # the last layers start at zero
            p += 0.05 * torch.randn_like(p)
    space = WeightSpace(net.eval(), guidance=1.5)
    z, sigma, labels = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 0.5, 2.0, 10.0]), torch.eye(3)[[0, 1, 2, 0]]
    nu = space.gradient(space(z, sigma, labels).square().sum())
    assert min(n.abs().max() for n in nu) == 0  # map_augment is not used
    forward, difference = (space.derivative(nu, z, sigma, labels, mode) for mode in ("forward", "difference"))
    assert largest([forward]) > 1
    assert (forward - difference).norm() < 0.1 * forward.norm()
    # <J ν, D> is also half the derivative of |D|² along ν, that is ½ |ν|²
    inner = (forward * space(z, sigma, labels)).sum()
    torch.testing.assert_close(inner, 0.5 * sum(n.square().sum() for n in nu), rtol=1e-3, atol=0)
    assert [name for name, p in net.named_parameters() if p.grad is not None] == []


@default_dtype(torch.float64)
def test_the_difference_converges_to_the_derivative():
    space, z, sigma = WeightSpace(pretrained(Mixture())), torch.randn(5, 2, 1, 1), torch.linspace(0.1, 3, 5)
    nu = [torch.randn_like(p) for p in space.parameters()]
    forward, difference = (space.derivative(nu, z, sigma, None, mode) for mode in ("forward", "difference"))
    torch.testing.assert_close(forward, difference, rtol=1e-4, atol=1e-4)


@default_dtype(torch.float64)
def test_v_is_the_mean_square_of_the_teachers_gradients_on_real_data():
    data = Mixture(4)
    method = Instant(MomentMatchingConfig(measure_batch=8), pretrained(data), pretrained(data))
    (y, labels, d, _), teacher = batch_of(data, n=24), pretrained(data)
    sigma = (-1.2 + 1.2 * d.normal()).exp()
    x_t = y + image(sigma) * d.normal(2, 1, 1)
    squares = []
    for n in (slice(0, 8), slice(8, 16), slice(16, 24)):
        error = (teacher(x_t[n], sigma[n], labels[n]) - y[n]).square().sum((1, 2, 3))
        loss = ((1 / sigma[n] ** 2 + 4) * error).mean()
        squares.append(torch.cat([g.flatten().square() for g in torch.autograd.grad(loss, list(teacher.parameters()))]))
    assert method.measure(Jump(y, sigma, sigma, y, labels, batch_of(data, n=24))) is None
    found = torch.cat([v.flatten() for v in method.state.v])
    torch.testing.assert_close(found, torch.stack(squares).mean(0))


def test_v_is_measured_at_the_start_and_every_so_often_and_survives_a_restart():
    data, cfg = Mixture(), TrainConfig(kimg=1, batch=16)

    def start() -> Run:
        settings = MomentMatchingConfig(variant="instant", measure_every=3, measure_batch=4)
        return Run(Instant(settings, pretrained(data), pretrained(data)), cfg, seed=0, device=torch.device("cpu"))

    run, counts = start(), []
    for _ in range(5):
        run.take(*data.sample_data(16, torch.Generator()))
        counts.append(int(run.method.state.count))
    assert counts == [4, 4, 4, 8, 8]
    again = start()
    again.load_state_dict(copy.deepcopy({"step": run.step} | run.state_dict()))
    for one in (run, again):
        one.take(*data.sample_data(16, torch.Generator()))
    ours, theirs = (list(one.method.student.parameters()) for one in (run, again))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# Everything together.


@pytest.mark.parametrize(
    ("settings", "label_dim", "iterations", "lr"),
    [
        ({"steps": 1, "weight": "edm"}, 0, 500, 2e-3),
        ({"steps": 2}, 4, 600, 2e-3),
        ({"steps": 4, "levels": "cosine", "weight": "edm"}, 0, 500, 1e-3),
        ({"steps": 8, "levels": "log_uniform", "weight": "edm"}, 0, 500, 1e-3),
    ],
    ids=lambda v: f"k={v['steps']}" if isinstance(v, dict) else "",
)
def test_alternating_learns(settings, label_dim, iterations, lr):
    data = Mixture(label_dim)
    method = Alternating(MomentMatchingConfig(**settings), data, pretrained(data), pretrained(data))
    before, after = learn(method, data, iterations, lr=lr, clip=1.0, betas=(0.0, 0.99))
    assert after < before / 10, f"energy distance {before:.4f} -> {after:.4f}"


@pytest.mark.parametrize(
    ("settings", "iterations", "lr"),
    [
        ({"steps": 1, "weight": "edm"}, 300, 1e-3),
        ({"steps": 2}, 300, 1e-3),
        ({"steps": 4}, 500, 3e-4),
        ({"steps": 8, "levels": "log_uniform"}, 400, 1e-3),
    ],
    ids=lambda v: f"k={v['steps']}" if isinstance(v, dict) else "",
)
def test_instant_learns(settings, iterations, lr):
    data = Mixture()
    method = Instant(MomentMatchingConfig(variant="instant", **settings), pretrained(data), pretrained(data))
    before, after = learn(method, data, iterations, lr=lr, clip=1.0, betas=(0.0, 0.99))
    assert after < before / 10, f"energy distance {before:.4f} -> {after:.4f}"


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"steps": 0}, "steps wants at least 1, got 0"),
        ({"weight": "huber"}, "weight wants one of flat, sqrt_karras, edm, snr, sigmoid, own, got 'huber'"),
        ({"levels": "linear"}, "levels wants one of karras, cosine, log_uniform, own, got 'linear'"),
        ({"variant": "both"}, "variant wants one of alternating, instant, got 'both'"),
        ({"jvp": "reverse"}, "jvp wants one of forward, difference, got 'reverse'"),
        ({"guidance": 1.5}, "wants a teacher that knows classes or prompts"),
        ({"sigma_min": 90.0}, "sigma_max wants more than sigma_min = 90.0, got 80.0"),
        ({"dropout": 1.0}, "dropout wants a probability in [0, 1), got 1.0"),
        ({"measure_every": 0}, "measure_every wants at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings, wanted):
    with pytest.raises(UserError, match=r"^[^\n]*$") as refused:
        alternating(Mixture(), **settings)
    assert wanted in str(refused.value)


def test_one_image_cannot_be_halved():
    with pytest.raises(UserError, match="wanted 2 images or more per rank and micro-batch, got 1"):
        gradients(instant(Mixture()), "student", batch_of(Mixture(), n=1))
