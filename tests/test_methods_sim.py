"""SIM and SiD: the score-gradient identity by quadrature, the gradient by hand, who receives one, and that it learns."""

import pytest
import torch
from torch import Tensor, nn
from toy import (
    Mixture,
    Toy,
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
from potstill.engine.diffusion import precond
from potstill.engine.methods.base import Batch
from potstill.engine.methods.sim import SIM, SIMConfig
from potstill.kernels import Estimate, score_implicit

HUBER, L2, SID = {"distance": "huber"}, {"distance": "l2", "alpha": 1.0}, {"distance": "l2", "alpha": 1.2}


def sim(data: Mixture, **settings) -> SIM:
    return SIM(SIMConfig(**settings), data, pretrained(data), pretrained(data))


def midway(data: Mixture, **settings) -> SIM:
    return SIM(SIMConfig(**settings), data, apart(pretrained(data), 1), apart(pretrained(data), 2))


# The score-gradient identity, in one dimension: a Gaussian student against two modes, every expectation a quadrature.


class Line(Toy):
    """A denoiser on the line that gives D itself."""

    img_channels = 1

    def __init__(self, *parameters: float):
        super().__init__(label_dim=0)
        self.parameters_ = nn.ParameterList([nn.Parameter(torch.tensor(p, dtype=torch.float64)) for p in parameters])

    def estimate(self, x: Tensor, sigma: Tensor, labels=None, *, guidance: float = 1.0) -> Estimate:
        return Estimate(self.D(x, image(sigma)))


class Gaussian(Line):
    """D of N(m, a²)."""

    def D(self, x: Tensor, sigma: Tensor) -> Tensor:
        m, a = self.parameters_
        return (a**2 * x + sigma**2 * m) / (a**2 + sigma**2)


class TwoModes(Line):
    """D of ½ N(-1, 0.3²) + ½ N(1.5, 0.3²), from its score."""

    def D(self, x: Tensor, sigma: Tensor) -> Tensor:
        variance = 0.3**2 + sigma**2
        logits = torch.stack([-((x - mode) ** 2) / (2 * variance) for mode in (-1.0, 1.5)])
        score = (logits.softmax(0) * torch.stack([(mode - x) / variance for mode in (-1.0, 1.5)])).sum(0)
        return x + sigma**2 * score


def trapezoid(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights for expectations under N(0, 1); for analytic functions more accurate than any power of 1 / n."""
    nodes = torch.linspace(-8, 8, n, dtype=torch.float64)
    weights = (-(nodes**2) / 2).exp()
    return nodes, weights / weights.sum()


M, A = 0.4, 0.8  # the student is x = M + A z


def divergence_gradient(distance, sigma: float, moving: bool) -> Tensor:
    """d/d(m, a) of E distance(D_q - D_p) at x_t ~ p, the law of x_t following the parameters only if `moving`."""
    student, teacher, (u, weights) = Gaussian(M, A), TwoModes(), trapezoid(400)
    m, a = student.parameters_
    x_t = m + (a**2 + sigma**2).sqrt() * u
    x_t = (x_t if moving else x_t.detach()).reshape(-1, 1, 1, 1)
    level = torch.tensor([sigma], dtype=torch.float64)
    delta = teacher.estimate(x_t, level).raw - student.estimate(x_t, level).raw
    return torch.stack(torch.autograd.grad((weights * distance(delta).flatten()).sum(), [m, a]))


def implicit_gradient(settings: dict, sigma: float, weight: float, detach: str | None = None) -> Tensor:
    """d/d(m, a) of the method's loss with the fake net at its optimum, averaged over z and n by quadrature."""
    method = SIM(SIMConfig(**settings), TwoModes(), Gaussian(M, A), Gaussian(M, A))
    nodes, weights = trapezoid(200)
    z, n = (v.reshape(-1, 1, 1, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    m, a = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (M, A))
    x, levels = m + a * z, torch.full((z.numel(),), sigma, dtype=torch.float64)
    w = torch.full_like(levels, weight)
    if detach:
        real, fake = (net.estimate(x + sigma * n, levels) for net in (method.teacher, method.frozen_fake))
        value = score_implicit(x, real, fake, c=method.c, weight=w, detach=detach).value
    else:
        value = method.implicit_distance(x, levels, n, None, w)[0].value
    return torch.stack(torch.autograd.grad((weights.outer(weights).flatten() * value).sum(), [m, a]))


def huber(c: float, sigma: float):
    """The pseudo-Huber distance of scores, of a difference in D: y = δ / σ²."""
    return lambda delta: ((delta / sigma**2) ** 2 + c**2).sqrt() - c


@pytest.mark.parametrize("sigma", [0.8, 1.3])
def test_the_gradient_is_that_of_the_distance_of_scores(sigma):
    # c in units of scores is c σ² in units of D, and the weight 1 is 1 / σ² (arithmetic of the two forms).
    implicit = implicit_gradient({"c": 0.5 * sigma**2}, sigma, weight=sigma**-2)
    torch.testing.assert_close(implicit, divergence_gradient(huber(0.5, sigma), sigma, moving=False), rtol=0, atol=1e-6)
    squared = implicit_gradient(L2, sigma, weight=2.0)
    torch.testing.assert_close(squared, divergence_gradient(torch.square, sigma, moving=False), rtol=0, atol=1e-6)


def test_cutting_the_nets_out_of_the_graph_is_another_gradient():
    sigma = 0.8
    whole = divergence_gradient(huber(0.5, sigma), sigma, moving=False)
    cut = implicit_gradient({"c": 0.5 * sigma**2}, sigma, sigma**-2, detach="factor")
    torch.testing.assert_close(cut[0], whole[0], rtol=0, atol=1e-6)  # the shift keeps its gradient,
    torch.testing.assert_close(cut[1], whole[1] / 2, rtol=0, atol=1e-6)  # the scale loses half of its own
    assert whole[1].abs() > 0.05


@pytest.mark.parametrize(("alpha", "moving"), [(0.5, True), (1.0, False)])
def test_alpha_says_whether_the_law_of_x_t_moves(alpha, moving):
    implicit = implicit_gradient({"distance": "l2", "alpha": alpha}, 0.7, weight=2.0)
    torch.testing.assert_close(implicit, divergence_gradient(torch.square, 0.7, moving), rtol=0, atol=1e-6)
    assert (implicit - divergence_gradient(torch.square, 0.7, not moving)).abs().max() > 1e-2


# One turn at a time, on the toy.


CASES = [(HUBER, 0), (HUBER | {"guidance": 2.0}, 4), (L2, 4), (SID, 0)]


@pytest.mark.parametrize(("settings", "label_dim"), CASES)
@default_dtype(torch.float64)
def test_student_gradient_by_hand(settings, label_dim):
    data = Mixture(label_dim)
    method = midway(data, **settings)
    found = gradients(method, "student", batch_of(data))["student"]

    d, student, fake = draws(16), method.nets["student"], method.nets["fake"]
    skip_fake_turn(d, label_dim)
    labels = nn.functional.one_hot(d.integers(0, 3), 4).double() if label_dim else None
    x = student(2.5 * d.normal(2, 1, 1), torch.full((16,), 2.5), labels)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigma = (high + (1 - 0.8 * d.uniform()) * (low - high)) ** 7
    x_t = x + image(sigma) * d.normal(2, 1, 1)
    real, fake = data(x_t, sigma, labels), fake(x_t, sigma, labels)
    if settings.get("guidance"):
        real = 2 * real - data(x_t, sigma, torch.zeros_like(labels))
    delta = real - fake
    if settings["distance"] == "huber":
        c = 0.00054 * 2**0.5
        loss = (delta / (delta.square().sum((1, 2, 3), keepdim=True) + c**2).sqrt() * (fake - x)).sum((1, 2, 3))
    else:
        w = 1 / (x - real).abs().mean((1, 2, 3)).detach().clamp(min=1e-5)
        loss = w * (delta * ((real - x) - settings["alpha"] * delta)).sum((1, 2, 3))
    wanted = torch.autograd.grad(100 * loss.mean(), list(student.parameters()))
    torch.testing.assert_close(found, list(wanted), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("label_dim", [0, 4])
@default_dtype(torch.float64)
def test_fake_gradient_by_hand(label_dim):
    data = Mixture(label_dim)
    method = midway(data)
    found = gradients(method, "fake", batch_of(data))["fake"]

    d, student, fake = draws(16), method.nets["student"], method.nets["fake"]
    labels = nn.functional.one_hot(d.integers(0, 3), 4).double() if label_dim else None
    x = student(2.5 * d.normal(2, 1, 1), torch.full((16,), 2.5), labels).detach()
    sigma = (-1.2 + 1.2 * d.normal()).exp()
    error = fake(x + image(sigma) * d.normal(2, 1, 1), sigma, labels) - x
    loss = (sigma**2 + 0.25) / (0.5 * sigma) ** 2 * error.square().sum((1, 2, 3))
    wanted = torch.autograd.grad(loss.mean(), list(fake.parameters()))
    torch.testing.assert_close(found, list(wanted), rtol=1e-8, atol=1e-10)


def skip_fake_turn(d, label_dim: int) -> None:
    """Take what the fake net's turn takes: the student's own noise and labels come after it."""
    if label_dim:
        d.integers(0, 3)
    d.normal(2, 1, 1), d.normal(), d.normal(2, 1, 1)


@pytest.mark.parametrize("settings", [HUBER, L2, SID])
@default_dtype(torch.float64)
def test_nothing_moves_when_the_fake_net_is_the_teacher(settings):
    data = Mixture()
    student = pretrained(data)
    at_rest = gradients(SIM(SIMConfig(**settings), data, student, Mixture()), "student", batch_of(data))["student"]
    moving = gradients(midway(data, **settings), "student", batch_of(data))["student"]
    assert largest(at_rest) < 1e-9 * largest(moving)


@pytest.mark.parametrize("settings", [HUBER, SID])
def test_each_turn_reaches_its_own_net(settings):
    method = sim(Mixture(), **settings)
    assert [turn.trains for turn in method.turns] == ["fake", "student"]  # the order of Alg. 1
    assert reached(gradients(method, "fake", batch_of(Mixture()))) == {"fake"}
    assert reached(gradients(method, "student", batch_of(Mixture()))) == {"student"}


def test_gradients_flow_through_both_nets_to_their_input():
    method, seen = sim(Mixture()), {}
    for name in ("teacher", "frozen_fake"):
        net = getattr(method, name)
        net.estimate = remembering(net.estimate, seen, name)
    loss, _ = method.student_loss(batch_of(Mixture()))
    loss.backward()
    assert min(seen[name].raw.grad.abs().max() for name in ("teacher", "frozen_fake")) > 0


def remembering(estimate, seen: dict, name: str):
    def call(*args, **kwargs):
        seen[name] = estimate(*args, **kwargs)
        seen[name].raw.retain_grad()
        return seen[name]

    return call


def test_no_real_image_is_looked_at():
    data, method = Mixture(), sim(Mixture())
    y, labels, *_ = batch_of(data)
    for trains in ("student", "fake"):
        some, none = (gradients(method, trains, Batch(images, labels, draws(16)))[trains] for images in (y, y * torch.nan))
        torch.testing.assert_close(some, none, rtol=0, atol=0)
    assert not method.cfg.needs().data


def test_noise_levels_are_sids():
    levels, method = [], sim(Mixture())
    method.implicit_distance = lambda x, sigma, *rest: levels.append(sigma) or ((x.sum((1, 2, 3)), sigma), {})
    batch = batch_of(Mixture(), n=3)
    batch.draws.uniform = lambda: torch.tensor([0, 0.5 / 0.8, 1])
    method.student_loss(batch)
    torch.testing.assert_close(levels[0], torch.tensor([0.002, 2.5152, 24.408]), rtol=5e-5, atol=0)


def test_the_student_starts_as_the_teacher_at_sigma_init():
    c = precond.edm(torch.tensor([2.5], dtype=torch.float64))
    torch.testing.assert_close(torch.cat(c), torch.tensor([0.03846, 0.49029, 0.39223, 0.22907]).double(), rtol=0, atol=5e-6)
    method = sim(Mixture())
    assert method.sampler.nfe == 1
    z = draws(16).normal(2, 1, 1)
    sampled = method.sampler(method.nets["student"], None, draws(16))
    torch.testing.assert_close(sampled, pretrained(Mixture())(2.5 * z, torch.tensor(2.5)))


@pytest.mark.parametrize(
    ("settings", "label_dim", "iterations"),
    [(HUBER, 0, 250), (L2, 0, 250), (SID, 4, 700), ({"distance": "l2", "alpha": 0.5}, 0, 250)],
)
def test_learns(settings, label_dim, iterations):
    data = Mixture(label_dim)
    before, after = learn(sim(data, **settings), data, iterations)
    assert after < before / 10, f"energy distance {before:.4f} -> {after:.4f}"


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"distance": "l1"}, "distance wants one of huber, l2, got 'l1'"),
        ({"alpha": 1.2}, "alpha wants to be 1 with method.distance=huber"),
        ({"c": 0.0}, "c wants more than 0, got 0.0"),
        ({"t_max": 1.5}, "in (0, 1], got 1.5"),
        ({"sigma": 0.0}, "sigma wants more than 0, got 0.0"),
        ({"guidance": 2.0}, "wants a teacher that knows classes or prompts"),
    ],
)
def test_bad_settings_are_refused(settings, wanted):
    with pytest.raises(UserError, match=r"^[^\n]*$") as refused:
        sim(Mixture(), **settings)
    assert wanted in str(refused.value)
