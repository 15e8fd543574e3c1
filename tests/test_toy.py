"""The toy that methods are tested on is what it says: exact, of unit scale, and learnable."""

import pytest
import torch
from toy import Mixture, default_dtype, distance, energy_distance, image, pretrained

from potstill.engine.diffusion.sampling import ode


@pytest.mark.parametrize("label_dim", [0, 4])
@default_dtype(torch.float64)
def test_the_denoiser_is_that_of_the_density(label_dim):
    """Tweedie: D = x + σ² ∇ log p(x; σ)."""
    data, sigma = Mixture(label_dim), torch.logspace(-2.5, 1.9, 64)
    labels = data.sample_data(64, torch.Generator().manual_seed(0))[1]
    x = (torch.randn(64, 2, 1, 1) * image(0.5 + sigma)).requires_grad_()
    (score,) = torch.autograd.grad(data.log_density(x, sigma, labels).sum(), x)
    torch.testing.assert_close(data(x, sigma, labels), x + image(sigma) ** 2 * score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(data.estimate(x, sigma, labels).denoised(), data(x, sigma, labels))


def test_data_has_the_scale_of_images_and_the_classes_of_its_arcs():
    x, labels = Mixture(4).sample_data(100_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.std(0).flatten(), torch.tensor([0.5, 0.5]), rtol=1e-2, atol=0)
    angle = torch.atan2(x[:, 1, 0, 0], x[:, 0, 0, 0]).add(torch.pi / 8).remainder(2 * torch.pi)
    assert ((angle / (torch.pi / 2)).long() == labels.argmax(1)).double().mean() > 0.99


def test_energy_distance_is_zero_for_equal_laws_and_known_for_two_points():
    data = Mixture()
    same = [data.sample_data(2000, torch.Generator().manual_seed(seed))[0] for seed in (0, 1)]
    assert abs(energy_distance(*same)) < 3e-3
    assert energy_distance(torch.zeros(3, 2), torch.ones(4, 2)) == pytest.approx(2 * 2**0.5)


def test_the_learnt_net_is_a_good_teacher():
    data = Mixture()
    assert distance(data, ode("heun", 18), data) < 3e-3
    assert distance(pretrained(data), ode("heun", 18), data) < 1e-2
