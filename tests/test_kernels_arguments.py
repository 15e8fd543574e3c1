"""What the public losses take: one number per sample as [N] and as EDM's [N, 1, 1, 1], and a sentence for all else."""

import numpy as np
import pytest
import torch

import potstill
from potstill.kernels import Estimate, add_noise, compat, denoise, moments, reference, score_implicit, score_match, trajectory

N, SHAPE = 3, (3, 2, 4, 4)
#: Each loss of (images x, two estimates, one number per sample).
LOSSES = {
    "score_match": lambda m, x, real, fake, w: m.score_match(x, real, fake),
    "score_implicit": lambda m, x, real, fake, w: m.score_implicit(x, real, fake, weight=w),
    "moments": lambda m, x, real, fake, w: m.moments(x, real, fake, weight=w),
    "denoise": lambda m, x, real, fake, w: m.denoise(fake, x.detach(), w),
    "trajectory": lambda m, x, real, fake, w: m.trajectory(x.detach(), fake, w + 1, w, x.detach() / 2)[0],
}
CONSTANT = ("score_match", "moments")  # which have no gradient for an estimate


def estimates(draw, wide, grad):
    """Two estimates with one x_t and one c_skip, and what they are made of."""
    per = (N, 1, 1, 1) if wide else (N,)
    x_t, raws = draw(*SHAPE), [draw(*SHAPE).requires_grad_(grad) for _ in range(2)]
    c_skip, c_outs = draw(N).reshape(per), [draw(N).reshape(per) for _ in range(2)]
    return raws, [Estimate(raw, x_t, c_skip, c_out) for raw, c_out in zip(raws, c_outs, strict=True)]


@pytest.mark.parametrize("module", [potstill, reference], ids=["public", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_one_number_per_sample_may_have_the_shape_of_images(name, module):
    found = []
    for wide in (False, True):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape, g=generator: torch.randn(*shape, generator=g)  # noqa: E731
        raws, (real, fake) = estimates(draw, wide, name not in CONSTANT)
        x = draw(*SHAPE).requires_grad_()
        weight = draw(N).abs().reshape((N, 1, 1, 1) if wide else (N,))
        value, nonfinite = LOSSES[name](module, x, real, fake, weight)
        assert value.shape == (N,)
        assert nonfinite == 0
        value.sum().backward()
        found.append([value, *[t.grad for t in (x, *raws) if t.grad is not None]])
    assert len(found[0]) > 1, "nothing was differentiated"
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_noise_levels_and_weights_of_other_trainers_too():
    x, noise, sigma = torch.randn(SHAPE), torch.randn(SHAPE), torch.rand(N)
    assert torch.equal(add_noise(x, sigma.reshape(N, 1, 1, 1), noise), add_noise(x, sigma, noise))
    assert torch.equal(add_noise(x.flatten(1), sigma[:, None], noise.flatten(1)), add_noise(x, sigma, noise).flatten(1))
    with pytest.raises(ValueError, match=r"add_noise: wanted sigma \[N\] or \[N, 1, 1, 1\] with N = 3 of x, got \(3, 1\)"):
        add_noise(x, sigma[:, None], noise)


def test_constants_that_both_estimates_share_stay_shared():
    """So that c_skip·x_t cancels before it is rounded, for either shape."""
    raw, x_t, x = torch.randn(SHAPE), 1e6 * torch.randn(SHAPE), torch.randn(SHAPE)
    for per in ((N,), (N, 1, 1, 1)):
        c_skip, c_out = torch.full(per, 0.7), torch.full(per, 0.1)
        value, _ = score_match(x, Estimate(raw, x_t, c_skip, c_out), Estimate(raw, x_t, c_skip, c_out))
        assert value.tolist() == [0.0] * N


X = torch.randn(SHAPE)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: score_match(X, None, X), "score_match: wanted real as a torch.Tensor or an Estimate, got None"),
        (lambda: score_match(X, X, (X, X)), "score_match: wanted fake as a torch.Tensor or an Estimate, got tuple"),
        (lambda: score_match(X, Estimate(None), X), "score_match: wanted real.raw as a torch.Tensor, got None"),
        (lambda: score_match(X.numpy(), X, X), "score_match: wanted x as a torch.Tensor, got numpy.ndarray: torch.from_numpy(x) makes one"),
        (lambda: moments(X, X.numpy(), X), "moments: wanted real as a torch.Tensor or an Estimate, got numpy.ndarray: torch.from_numpy(real) makes one"),
        (lambda: denoise(X, [1.0]), "denoise: wanted target as a torch.Tensor, got list"),
        (lambda: add_noise(X, torch.ones(N), np.zeros(SHAPE)), "add_noise: wanted noise as a torch.Tensor, got numpy.ndarray: torch.from_numpy(noise) makes one"),
        (lambda: trajectory(X, None, torch.ones(N), torch.ones(N), X), "trajectory: wanted estimate as a torch.Tensor or an Estimate, got None"),
        (lambda: score_implicit(X, X, 3), "score_implicit: wanted fake as a torch.Tensor or an Estimate, got int"),
        (
            lambda: score_match(X.clone().requires_grad_(), Estimate(X, (2 * X).requires_grad_(), torch.ones(N), torch.ones(N)), X),
            "score_match has a gradient for x only: wanted real.x_t without requires_grad (make x_t from x.detach()), got requires_grad=True",
        ),
    ],
)  # fmt: skip
def test_what_is_no_tensor_or_has_a_gradient_too_many(call, sentence):
    with pytest.raises(ValueError) as refused:
        call()
    assert str(refused.value) == sentence


def test_the_shapes_are_said_where_one_looks():
    assert "[N] or, as EDM's preconditioning has them, [N, 1, 1, 1]" in Estimate.__doc__


def test_everything_of_compat_is_listed():
    own = {name for name, one in vars(compat).items() if getattr(one, "__module__", "") == compat.__name__ and not name.startswith("_")}
    assert set(compat.__all__) == own
