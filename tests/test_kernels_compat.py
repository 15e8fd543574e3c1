"""Other trainers' losses on our kernels, against their published formulas written out in float64."""

import pytest
import torch
from torch import Tensor, nn

from potstill.kernels.compat import (
    SiDLoss,
    denoising_score_matching_loss,
    distribution_matching_loss,
    gan_loss_discriminator,
    gan_loss_generator,
    sid_generator_loss,
    variational_score_distillation_loss,
)

SHAPE = (4, 3, 8, 8)


def images(*names: str) -> list[Tensor]:
    return [torch.randn(SHAPE) for _ in names]


def per(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1)


def agree(ours, formula, inputs: list[Tensor], wrt: list[int]) -> None:
    """Value and gradients of ours in float32 and of the formula in float64."""
    narrow = [t.clone().requires_grad_(i in wrt) for i, t in enumerate(inputs)]
    wide = [t.double().requires_grad_(i in wrt) for i, t in enumerate(inputs)]
    value, expected = ours(*narrow), formula(*wide)
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=1e-7)
    grads = torch.autograd.grad(value.sum(), [narrow[i] for i in wrt])
    exact = torch.autograd.grad(expected.sum(), [wide[i] for i in wrt])
    for got, want in zip(grads, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6 * want.abs().max().item())


def half_mse_to_moved(x: Tensor, g: Tensor) -> Tensor:
    return 0.5 * nn.functional.mse_loss(x, (x - g).detach())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1e-5])  # the second makes the added 1e-6 visible
def test_fastgen_vsd(scaled, spread):
    x, teacher, fake = images("x", "teacher", "fake")
    teacher, scale = x + spread * (teacher - x), torch.rand(4) + 0.5

    def formula(x, teacher, fake, scale):
        w = 1 / ((x - teacher).abs().mean((1, 2, 3)) + 1e-6)
        return half_mse_to_moved(x, (fake - teacher) * per(w * scale if scaled else w))

    def ours(x, teacher, fake, scale):
        return variational_score_distillation_loss(x, teacher, fake, scale if scaled else None)

    agree(ours, formula, [x, teacher, fake, scale], [0])


def test_fastgen_vsd_stops_gradients_to_the_score_nets():
    x, teacher, fake = (t.requires_grad_() for t in images("x", "teacher", "fake"))
    variational_score_distillation_loss(x, teacher, fake).backward()
    assert x.grad is not None and teacher.grad is None and fake.grad is None


class Schedule:
    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t)


@pytest.mark.parametrize("pred_type", ["x0", "eps", "v", "flow"])
def test_fastgen_denoising(pred_type):
    def formula(net, x0, eps, t):
        v = per(torch.cos(t)) * eps - per(torch.sin(t)) * x0
        return ((net - {"x0": x0, "eps": eps, "v": v, "flow": eps - x0}[pred_type]) ** 2).mean()

    def ours(net, x0, eps, t):
        return denoising_score_matching_loss(pred_type, net, x0, eps, Schedule(), t)

    agree(ours, formula, [*images("net", "x0", "eps"), torch.rand(4)], [0])


def test_fastgen_denoising_refuses_what_it_does_not_know():
    x = torch.randn(SHAPE)
    with pytest.raises(NotImplementedError, match=r"Unknown prediction type score"):
        denoising_score_matching_loss("score", x, x)
    with pytest.raises(ValueError, match=r"wanted all that 'flow' is made of"):
        denoising_score_matching_loss("flow", x, x)


def test_fastgen_gan():
    def log1pexp(v):
        return torch.log1p(torch.exp(v))

    fake, real = torch.randn(4, 7), torch.randn(4, 7)
    agree(gan_loss_generator, lambda v: log1pexp(-v).mean(), [fake], [0])
    agree(gan_loss_discriminator, lambda r, f: log1pexp(f).mean() + log1pexp(-r).mean(), [real, fake], [0, 1])


def test_dmd2():
    def formula(x, real, fake):
        p_real, p_fake = x - real, x - fake
        return half_mse_to_moved(x, torch.nan_to_num((p_real - p_fake) / per(p_real.abs().mean((1, 2, 3)))))

    x, real, fake = images("x", "real", "fake")
    agree(distribution_matching_loss, formula, [x, real, fake], [0])
    real[1, 0, 2, 2] = float("nan")  # nan_to_num: the sample's gradient is 0, and it still counts in the mean
    real[2], fake[2] = x[2], x[2]  # 0/0
    agree(distribution_matching_loss, formula, [x, real, fake], [0])


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid(alpha):
    def formula(y, real, fake):
        w = (y - real).abs().mean((1, 2, 3)).detach().clip(min=1e-5)
        return ((real - fake) * ((real - y) - alpha * (real - fake)) / per(w)).sum((1, 2, 3))

    agree(lambda *t: sid_generator_loss(*t, alpha), formula, images("y", "real", "fake"), [0, 1, 2])


class Net(nn.Module):
    """A denoiser with everything SiD passes one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, sigma, labels=None, augment_labels=None):
        assert sigma.shape == (4, 1, 1, 1) and labels is None
        self.augment_labels = augment_labels
        return x / (1 + sigma**2) + self.conv(x / (0.25 + sigma**2).sqrt()) * sigma / (1 + sigma)


def test_sid_class():
    """Same random numbers as SID_EDMLoss draws, and in the generator's loss gradients through both nets."""
    (images_,) = images("x")
    real, fake, loss = Net(), Net(), SiDLoss()
    ours_x, x = images_.clone().requires_grad_(), images_.clone().requires_grad_()
    torch.manual_seed(3)
    value = loss.generator_loss(real, fake, ours_x, alpha=1.2)
    torch.testing.assert_close(real.augment_labels, torch.zeros(4, 9), rtol=0, atol=0)

    torch.manual_seed(3)
    r = torch.rand(4, 1, 1, 1) * 0.8
    sigma = (80 ** (1 / 7) + (1 - r) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    n = torch.randn(SHAPE) * sigma
    y_real, y_fake = real(x + n, sigma), fake(x + n, sigma)
    w = (x - y_real).abs().mean((1, 2, 3), keepdim=True).detach().clip(min=1e-5)
    expected = (y_real - y_fake) * ((y_real - x) - 1.2 * (y_real - y_fake)) / w
    torch.testing.assert_close(value.sum(), expected.sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), t)[0] for v, t in ((value, ours_x), (expected, x))), rtol=1e-4, atol=1e-4)

    torch.manual_seed(4)
    value = loss(fake, images_)
    torch.manual_seed(4)
    sigma = (torch.randn(4, 1, 1, 1) * 1.2 - 1.2).exp()
    d = fake(images_ + torch.randn(SHAPE) * sigma, sigma)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    torch.testing.assert_close(value, (weight * (d - images_) ** 2).sum((1, 2, 3)), rtol=1e-5, atol=1e-4)


def test_bad_input():
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match=r"teacher_x0 shaped and placed like the generated images"):
        variational_score_distillation_loss(x, x[:, :2], x)
    with pytest.raises(ValueError, match=r"additional_scale \[N\] or \[N, 1, 1, 1\] with N = 4 of gen_data, got \(3,\)"):
        variational_score_distillation_loss(x, x, x, torch.ones(3))
