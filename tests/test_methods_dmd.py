"""DMD and DMD2: the gradient by hand and as a difference of scores, who receives one and when, and that it learns."""

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from toy import Mixture, ToyNet, apart, batch_of, default_dtype, draws, gradients, image, largest, learn, pretrained, reached

from potstill.engine.diffusion import precond
from potstill.engine.diffusion.sigmas import edm_weight
from potstill.engine.methods.dmd import DMD, DMDConfig
from potstill.engine.methods.parts import grid_level
from potstill.engine.nets.discriminators import Critic
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.training.run import Run, TrainConfig
from potstill.kernels import add_noise, score_match


def dmd(data: Mixture, **settings) -> DMD:
    return DMD(DMDConfig(**settings), data, apart(pretrained(data), 1), apart(pretrained(data), 2))


def by_hand(d, low: int, high: int) -> torch.Tensor:
    """Levels of EDM's 1000-point grid, ascending."""
    u = (999 - d.integers(low, high).double()) / 999
    return (80 ** (1 / 7) + u * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7


@pytest.mark.parametrize("label_dim", [0, 4])
@default_dtype(torch.float64)
def test_student_gradient_by_hand(label_dim):
    data = Mixture(label_dim)
    guidance = 1.5 if label_dim else 1.0
    method = dmd(data, gan=True, gan_student=0.3, guidance=guidance)
    found = gradients(method, "student", batch_of(data))["student"]

    d, student, critic = draws(16), method.nets["student"], method.nets["fake"]
    labels = nn.functional.one_hot(d.integers(0, 3), 4).double() if label_dim else None
    x = student(80 * d.normal(2, 1, 1), torch.full((16,), 80.0), labels)
    sigma = by_hand(d, 20, 980)
    with torch.no_grad():
        x_t = x + image(sigma) * d.normal(2, 1, 1)
        real, fake = data(x_t, sigma, labels), critic.denoiser(x_t, sigma, labels)
        if label_dim:
            nothing = data(x_t, sigma, torch.zeros_like(labels))
            real = nothing + guidance * (real - nothing)
        m = (x - real).abs().mean((1, 2, 3), keepdim=True)
        g = (fake - real) / m
    level = by_hand(d, 0, 999)
    logits = critic.head(critic.denoiser.features(x + image(level) * d.normal(2, 1, 1), level, labels))
    # the surrogate ½ mean (x - sg(x - g))² has the gradient g / (B·C·H·W)
    match = torch.autograd.grad(x, list(student.parameters()), g / x.numel(), retain_graph=True)
    gan = torch.autograd.grad(0.3 * softplus(-logits).mean(), list(student.parameters()))
    torch.testing.assert_close(found, [a + b for a, b in zip(match, gan, strict=True)], rtol=1e-8, atol=1e-12)


def test_a_teacher_evaluated_under_inference_mode_teaches_the_same():
    data, found = Mixture(), []
    for inferring in (False, True):
        method = dmd(data)
        if inferring:
            method.teacher.estimate = torch.inference_mode()(method.teacher.estimate)
        found.append(gradients(method, "student", batch_of(data))["student"])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("label_dim", [0, 4])
@default_dtype(torch.float64)
def test_fake_gradient_by_hand(label_dim):
    data, method = Mixture(label_dim), dmd(Mixture(label_dim), gan=True, gan_fake=0.2)
    y, real_labels, d, *_ = batch_of(data)
    shared = method.begin(batch_of(data))
    method.nets["fake"].zero_grad()
    method.fake_loss(shared)[0].backward()  # a turn in which the student's is not due

    student, critic = method.nets["student"], method.nets["fake"]
    labels = nn.functional.one_hot(d.integers(0, 3), 4).double() if label_dim else None
    x = student(80 * d.normal(2, 1, 1), torch.full((16,), 80.0), labels).detach()
    sigma = by_hand(d, 0, 999)
    d_fake = critic.denoiser(x + image(sigma) * d.normal(2, 1, 1), sigma, labels)
    loss = ((1 / sigma**2 + 4) * (d_fake - x).square().mean((1, 2, 3))).mean()

    def logits(images, labels):
        level = by_hand(d, 0, 999)
        return critic.head(critic.denoiser.features(images + image(level) * d.normal(2, 1, 1), level, labels))

    loss = loss + 0.2 * (softplus(logits(x, labels)) + softplus(-logits(y, real_labels))).mean()
    parameters = list(critic.parameters())
    wanted = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close([p.grad for p in parameters], list(wanted), rtol=1e-8, atol=1e-12)


@default_dtype(torch.float64)
def test_with_the_optimal_fake_net_it_is_the_difference_of_scores():
    """Images of one mixture, judged by its own exact denoiser and by that of another: g m / σ² = s_real - s_fake, reversed."""
    theirs, ours = Mixture(), Mixture(components=5, std=0.2)
    x, _ = ours.sample_data(64, torch.Generator().manual_seed(0))
    x.requires_grad_()
    sigma = 0.05 + torch.rand(64) * 3
    x_t = add_noise(x.detach(), sigma, torch.randn(x.shape)).requires_grad_()
    score = [torch.autograd.grad(law.log_density(x_t, sigma).sum(), x_t)[0] for law in (theirs, ours)]
    loss, _ = score_match(x, theirs.estimate(x_t.detach(), sigma), ours.estimate(x_t.detach(), sigma))
    (g,) = torch.autograd.grad(loss.sum() * x[0].numel(), x)
    m = (x - theirs(x_t, sigma)).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(g * m / image(sigma) ** 2, score[1] - score[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("label_dim", [0, 4])
def test_nothing_moves_when_the_fake_net_is_the_teacher(label_dim):
    data = Mixture(label_dim)
    method = DMD(DMDConfig(), pretrained(data), apart(pretrained(data), 1), pretrained(data))
    assert largest(gradients(method, "student", batch_of(data))["student"]) == 0
    assert largest(gradients(dmd(data), "student", batch_of(data))["student"]) > 0


@pytest.mark.parametrize("gan", [False, True])
def test_each_turn_reaches_its_own_net(gan):
    data, method = Mixture(), dmd(Mixture(), gan=gan)
    assert reached(gradients(method, "student", batch_of(data))) == {"student"}
    assert reached(gradients(method, "fake", batch_of(data))) == {"fake"}
    assert method.cfg.needs().data is gan


def test_the_student_moves_on_every_fifth_iteration_and_the_fake_net_on_all():
    data, method = Mixture(), dmd(Mixture(), gan=True)
    run = Run(method, TrainConfig(kimg=1, batch=16), seed=0, device=torch.device("cpu"))
    moved = {"student": [], "fake": []}
    for _ in range(11):
        before = {name: [p.clone() for p in net.parameters()] for name, net in method.nets.items()}
        run.take(*data.sample_data(16, torch.Generator()))
        for name, net in method.nets.items():
            moved[name].append(any(not torch.equal(p, q) for p, q in zip(before[name], net.parameters(), strict=True)))
    assert moved == {"student": [i % 5 == 0 for i in range(11)], "fake": [True] * 11}


def test_the_fake_net_learns_from_the_images_the_student_was_trained_on():
    method = dmd(Mixture())
    wanted = method.student(80 * draws(16).normal(2, 1, 1), torch.full((16,), 80.0)).detach()
    it = method.begin(batch_of(Mixture()))
    method.student_loss(it)
    with torch.no_grad():
        method.student.model.out.bias += 1.0  # an optimiser's step, after which it would make others
    method.fake_loss(it)
    assert torch.equal(it.images, wanted)


def test_levels_and_weight():
    levels = grid_level(net := ToyNet(), torch.tensor([0, 20, 100, 250, 500, 750, 900, 980, 999]).double())
    published = torch.tensor([0.002, 0.00323, 0.0168, 0.170, 2.53, 17.6, 45.6, 72.05, 80]).double()
    torch.testing.assert_close(levels, published, rtol=4e-3, atol=0)
    drawn = draws(200_000).integers(*DMDConfig().match_index)
    assert (drawn.min(), drawn.max()) == (20, 980)
    every = grid_level(net, torch.arange(1000).double())
    torch.testing.assert_close(edm_weight(every) * precond.edm(every).c_out ** 2, torch.ones_like(every))


def test_the_head_has_dmd2s_size():
    with torch.device("meta"):
        adm = from_kwargs(
            "EDMPrecond", img_resolution=64, img_channels=3, label_dim=1000, model_type="DhariwalUNet",
            model_channels=192, channel_mult=[1, 2, 3, 4],
        )  # fmt: skip
        critic = Critic(adm, with_head=True)
        x, sigma, labels = torch.empty(2, 3, 64, 64), torch.empty(2), torch.empty(2, 1000)
        assert adm.taps()[-1] == (768, 8, 8)
        assert adm.features(x, sigma, labels).shape == (2, 768, 8, 8)
        assert critic.logits(x, sigma, labels).shape == (2, 1)
    assert sum(p.numel() for p in critic.head.parameters()) == 2 * (16 * 768**2 + 3 * 768) + 768 + 1  # 18.88 M


@pytest.mark.parametrize(
    ("settings", "iterations"),
    [({"fake_per_student": 1}, 250), ({"fake_per_student": 5}, 400), ({"gan": True}, 400)],
    ids=["dmd", "ttur", "dmd2"],
)
def test_learns(settings, iterations):
    data = Mixture()
    method = DMD(DMDConfig(**settings), data, pretrained(data), pretrained(data))
    before, after = learn(method, data, iterations, lr=2e-3)
    assert after < before / 10, f"energy distance {before:.4f} -> {after:.4f}"
