"""Solvers against the closed form of a Gaussian: order of convergence, exactness where a method is exact, and one signature."""

import json
import math
from dataclasses import replace

import pytest
import torch
from toy import Mixture

from potstill.engine.diffusion.sampling import Sampler, SeedNoise, few_step, heun, ode, one_step
from potstill.engine.diffusion.sigmas import edm_weight, karras, karras_at, lognormal, with_zero
from potstill.engine.diffusion.solvers import EVALUATIONS, SOLVERS, ancestral, churned, posterior, solve, trajectory
from potstill.engine.diffusion.tables import CAP
from potstill.engine.methods.teacher import EDMLoss, Teacher
from potstill.engine.models.opening import sampler_for
from potstill.engine.models.partitions import Partition
from potstill.engine.models.router import Router
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.skipping.apply import Skipping

SD = 0.7  # the data: N(0, SD²), whose denoiser is D(x; σ) = x·SD²/(SD² + σ²)


def denoise(x, sigma):
    return x * SD**2 / (SD**2 + sigma**2)


def exact(x, sigma, sigma_next):
    """The probability flow keeps x / sqrt(SD² + σ²)."""
    return x * math.sqrt((SD**2 + sigma_next**2) / (SD**2 + sigma**2))


def error(solver, steps, low=0.5, high=5.0):
    # float64 throughout: `solve` hands the denoiser float32, so the step is walked by hand
    sigmas = torch.logspace(math.log10(high), math.log10(low), steps + 1, dtype=torch.float64)
    x, state = torch.tensor([1.3], dtype=torch.float64), None
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x, state = SOLVERS[solver](denoise, x, sigma, sigma_next, state)
    return (x - exact(1.3, high, low)).abs().item()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("dpmpp_3m", 2), ("ipndm", 2)])
def test_order_of_convergence(solver, order):
    """Halving the step divides the error by 2^order (less an eighth). A multistep solver's first step has order one, an error
    of h² that is made once: beyond order two it shows only in a single step, below."""
    ratio = error(solver, 64) / error(solver, 128)
    assert ratio > 0.875 * 2**order, ratio


def local_error(solver, h, order):
    """Of one step of size h in ln σ from the exact solution, with exact history."""
    sigmas = [3 * math.exp(h * (order - 1 - i)) for i in range(order + 1)]
    x, state = torch.tensor([1.3], dtype=torch.float64), None
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        at = [torch.tensor(s, dtype=torch.float64) for s in (sigma, sigma_next)]
        reached, state = SOLVERS[solver](denoise, x, *at, state)
        x = exact(x, sigma, sigma_next)
    return (reached - x).abs().item()


@pytest.mark.parametrize(("solver", "order", "steps"), [("dpmpp_2m", 2, 2), ("dpmpp_3m", 2, 3), ("dpmpp_3m_taylor", 3, 3)])
def test_order_of_a_single_multistep_step(solver, order, steps):
    """Its error falls by 2^(order + 1) when the step is halved, and by no more. DPM-Solver++ (3M) is published with half the
    weight on its second difference: it is of order two."""
    ratio = local_error(solver, 0.02, steps) / local_error(solver, 0.01, steps)
    assert 0.9 * 2 ** (order + 1) < ratio < 1.1 * 2 ** (order + 1), ratio


def test_third_difference_pays():
    """(3M) as published makes a sixth of (2M)'s error, with the full weight less than a tenth of that."""
    second, published, full = (local_error(s, 0.02, k) for s, k in (("dpmpp_2m", 2), ("dpmpp_3m", 3), ("dpmpp_3m_taylor", 3)))
    assert published < second / 5
    assert full < published / 10


def test_dpmpp_first_step_is_euler():
    """In λ = -ln σ the first-order step of DPM-Solver++ is Euler's in σ, exactly."""
    x, a, b = torch.tensor([1.3], dtype=torch.float64), torch.tensor(3.0), torch.tensor(2.0)
    for solver in ("dpmpp_2m", "dpmpp_3m"):
        torch.testing.assert_close(SOLVERS[solver](denoise, x, a, b, None)[0], SOLVERS["euler"](denoise, x, a, b, None)[0])


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_counted_right_and_zero_is_reached(solver):
    calls = 0

    def counting(x, sigma):
        nonlocal calls
        calls += 1
        return denoise(x, sigma)

    sampler = ode(solver, 6)
    x = solve(SOLVERS[solver], counting, torch.ones(2, 1), torch.tensor(sampler.sigmas, dtype=torch.float64))
    assert calls == sampler.nfe
    assert x.isfinite().all()
    assert EVALUATIONS[solver] in (1, 2)


MEAN = 0.4


def walked(solver, steps):
    """From pure noise down a flow's own levels, and the evaluations that took: the data are N(MEAN, SD²)."""
    t = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    sampler, calls = Sampler(solver, [*(t / (1 - t)).clamp(max=CAP).tolist(), 0.0]), []

    def noted(x, sigma):
        calls.append(sigma)
        return MEAN + denoise(x - MEAN, sigma)

    x = solve(SOLVERS[solver], noted, CAP * torch.tensor([-2.1, 0.3, 1.3]), torch.tensor(sampler.sigmas, dtype=torch.float64))
    assert len(calls) == sampler.nfe
    return x, sampler.nfe


@pytest.mark.parametrize("steps", [4, 8, 16, 32])
def test_heun_from_pure_noise_is_nearer_than_euler_of_twice_the_steps(steps):
    """The step from pure noise is infinitely long: a slope at its far end would correct it by CAP times what it is wrong."""
    wanted = MEAN + exact(CAP * torch.tensor([-2.1, 0.3, 1.3], dtype=torch.float64) - MEAN, CAP, 0)
    (heuns, nfe), (eulers, _) = walked("heun", steps), walked("euler", 2 * steps)
    assert nfe == 2 * steps - 2
    assert (heuns - wanted).abs().max() < (eulers - wanted).abs().max() < 0.3


@pytest.mark.parametrize(
    ("sigmas", "afs", "nfe"),
    [
        ([CAP, 0.0], False, 1),
        ([CAP, 1.0], False, 1),
        ([CAP, 2.0, 1.0], False, 3),
        ([CAP, 2.0, 1.0, 0.0], True, 3),
        ([80.0, 2.0, 0.0], False, 3),
    ],
)
def test_evaluations_of_heun_are_counted_from_pure_noise_too(sigmas, afs, nfe):
    calls = []

    class Counted(Mixture):
        def forward(self, *arguments, **more):
            calls.append(1)
            return super().forward(*arguments, **more)

    sampler = Sampler("heun", sigmas, afs=afs)
    sampler(Counted(), None, SeedNoise(range(2)))
    assert len(calls) == sampler.nfe == nfe


def test_trajectory_holds_every_level():
    sigmas = with_zero(karras(5))
    states = trajectory(SOLVERS["euler"], denoise, torch.ones(3, 1), sigmas)
    assert len(states) == 6
    assert {s.dtype for s in states} == {torch.float64}


def test_ancestral_sampling_of_a_gaussian_has_its_variance():
    """z_s = (1-r) D + r z_t + σ_s sqrt(1-r) ξ with D = k z_t: var_s = ((1-r) k + r)² var_t + σ_s² (1-r), step by step."""
    generator = torch.Generator().manual_seed(0)
    sigmas, n = karras(20), 40_000
    expected = sigmas[0].item() ** 2
    for s_t, s_s in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        r, k = (s_s / s_t) ** 2, SD**2 / (SD**2 + s_t**2)
        expected = ((1 - r) * k + r) ** 2 * expected + s_s**2 * (1 - r)
    x = torch.randn(n, 1, generator=generator).double() * sigmas[0]
    x = solve(ancestral(lambda: torch.randn(n, 1, generator=generator)), denoise, x, sigmas)
    assert x.var().item() == pytest.approx(expected, rel=0.02)  # the standard error is sqrt(2 / n) = 0.7 %


def test_posterior_is_bayes():
    """q(z_s | z_t, x) from the two Gaussians z_s ~ N(x, σ_s²), z_t ~ N(z_s, σ_t² - σ_s²), by their precisions."""
    x, z_t, s_t, s_s = (torch.tensor(v, dtype=torch.float64) for v in (0.3, 2.0, 1.7, 0.6))
    precision = 1 / s_s**2 + 1 / (s_t**2 - s_s**2)
    mean = (x / s_s**2 + z_t / (s_t**2 - s_s**2)) / precision
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(posterior(x, z_t, s_t, s_s, zero), mean)
    spread = posterior(x, z_t, s_t, s_s, one) - posterior(x, z_t, s_t, s_s, zero)
    torch.testing.assert_close(spread**2, 1 / precision)


def test_noise_levels_are_the_published_ones():
    """DMD2's grid, SFD's grid and SiD's map, to the digits the specifications give."""
    grid = karras_at(torch.tensor([0, 20, 100, 250, 500, 750, 900, 980, 999]) / 999)
    published = torch.tensor([0.002, 0.00323, 0.0168, 0.170, 2.53, 17.6, 45.6, 72.05, 80.0])
    torch.testing.assert_close(grid, published, rtol=5e-3, atol=0)
    torch.testing.assert_close(karras(4, 0.006), torch.tensor([80, 10.929, 0.6699, 0.006]).double(), rtol=1e-4, atol=0)
    sid = karras_at(torch.tensor([0.0, 0.5, 0.8]))
    torch.testing.assert_close(sid, torch.tensor([0.002, 2.5152, 24.408]), rtol=1e-4, atol=0)


def test_edm_weight_makes_the_raw_output_unit_weighted():
    """λ(σ)·c_out² = 1 at every level."""
    from potstill.engine.diffusion.precond import edm

    sigma = torch.logspace(-3, 2, 50)
    torch.testing.assert_close(edm_weight(sigma) * edm(sigma).c_out ** 2, torch.ones(50))


def test_lognormal_law():
    ln = lognormal(torch.randn(100_000, generator=torch.Generator().manual_seed(0))).log()
    assert ln.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert ln.std().item() == pytest.approx(1.2, abs=0.02)


def test_samplers_say_what_they_cost_and_refuse_what_they_do_not_know():
    assert [ode("heun", 18).nfe, ode("euler", 5).nfe, one_step(80).nfe, Sampler("ancestral", [80.0, 2.5]).nfe] == [35, 5, 1, 2]
    with pytest.raises(ValueError, match="solver wants one of"):
        Sampler("rk45", [80.0])


# EDM's stochastic sampler


def test_one_churned_step_by_hand():
    """2206.00364, Alg. 2, in Python's own floats: γ = S_churn/N below √2 - 1, lift, then Heun from the higher level."""
    x, s, s_next, eps, noise = 1.3, 2.0, 1.1, -0.4, 1.007
    gamma = 6 / 20
    high = s * (1 + gamma)
    lifted = x + math.sqrt(high**2 - s**2) * noise * eps

    def slope(y, t):
        return (y - y * SD**2 / (SD**2 + t**2)) / t

    euler = lifted + (s_next - high) * slope(lifted, high)
    wanted = lifted + (s_next - high) * (slope(lifted, high) + slope(euler, s_next)) / 2

    def walked(s_min, s_max, s_churn=6.0):
        step = churned(SOLVERS["heun"], lambda: torch.tensor([eps], dtype=torch.float64), 20, s_churn, s_min, s_max, noise)
        levels = (torch.tensor(level, dtype=torch.float64) for level in (s, s_next))
        return step(denoise, torch.tensor([x], dtype=torch.float64), *levels, None)[0].item()

    assert walked(0.05, 50) == pytest.approx(wanted, rel=1e-14)
    plain = walked(0.05, 50, s_churn=0)
    assert plain == walked(2.1, 50) == walked(0.05, 1.9) != pytest.approx(wanted, rel=1e-3)
    assert walked(0.05, 50, s_churn=20 * (math.sqrt(2) - 1)) == walked(0.05, 50, s_churn=1e9)  # γ ends at √2 - 1


class Noise:
    def normal(self, *shape):
        return torch.randn(20_000, *shape)


class Gaussian(torch.nn.Module):
    """The denoiser of N(0, SD²) as a net."""

    shape = (1, 1, 1)

    def forward(self, x, sigma, labels):
        return denoise(x, sigma)


def test_churn_keeps_the_distribution():
    """What churn's noise adds, the walk takes away again: with many steps the samples' spread is SD, to 1.5% (three standard
    errors of 20,000 samples)."""
    churn = Sampler("heun", ode("heun", 256).sigmas, churn=(30, 0.01, 50, 1.0))
    samples = churn(Gaussian(), None, Noise())
    assert samples.std().item() == pytest.approx(SD, rel=0.015)
    more = Sampler("heun", churn.sigmas, churn=(30, 0.01, 50, 1.3))(Gaussian(), None, Noise())
    assert more.std().item() > 1.05 * SD  # too much noise shows
    assert churn.nfe == 511


def test_churn_in_a_weight_file():
    plain, churn = ode("heun", 4), Sampler("heun", ode("heun", 4).sigmas, churn=(40, 0.05, 50, 1.003))
    assert "churn" not in plain.to_dict()
    assert Sampler(**json.loads(json.dumps(churn.to_dict()))) == churn
    for bad in ({"solver": "dpmpp_2m"}, {"churn": (1, 2, 1, 1)}, {"churn": (1, 2)}, {"churn": (-1, 0, 1, 1)}, {"afs": True}):
        with pytest.raises(ValueError, match="churn wants"):
            Sampler(**(churn.to_dict() | bad))


# Nets that know only their own noise levels: iDDPM's


def net_of(precond, **kwargs):
    torch.manual_seed(3)
    shape = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "model_type": "SongUNet"}
    net = from_kwargs(precond, img_resolution=4, img_channels=1, **shape | kwargs).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def iddpm():
    """A net out of a file: its levels are not to the bit those that we compute (EDM's own are float32 all through)."""
    net = net_of("iDDPMPrecond")
    net.load_state_dict(net.state_dict() | {"u": net.u * (1 + 1e-4)})
    return net


def rounded(net, t):
    """round_sigma of EDM's iDDPMPrecond, in NumPy's words: the entry of u that is nearest."""
    u = net.u.double().numpy()
    return float(u[abs(u - t).argmin()])


def edm_by_hand(net, z, steps, churn=(0.0, 0.0, math.inf, 1.0), second=True, rho=7.0):
    """2206.00364, Alg. 2, as its code has it: the range is the net's, t_i and t_hat are its own levels; z: the draws in
    their order. Heun, or Euler where not `second`."""
    low, high = max(0.002, net.sigma_min), min(80.0, net.sigma_max)
    t = [(high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(steps)]
    t = [rounded(net, s) for s in t] + [0.0]
    noise = iter(z)
    D = lambda x, s: net(x.float(), torch.tensor(s)).double()  # noqa: E731
    x = next(noise).double() * t[0]
    for i in range(steps):
        gamma = min(churn[0] / steps, math.sqrt(2) - 1) if churn[1] <= t[i] <= churn[2] else 0
        hat = rounded(net, t[i] * (1 + gamma))
        lifted = x + math.sqrt(hat**2 - t[i] ** 2) * churn[3] * next(noise).double() if gamma else x
        d = (lifted - D(lifted, hat)) / hat
        x = lifted + (t[i + 1] - hat) * d
        if second and t[i + 1] > 0:
            x = lifted + (t[i + 1] - hat) * (d + (x - D(x, t[i + 1])) / t[i + 1]) / 2
    return x


@pytest.mark.parametrize("churn", [None, (40.0, 0.05, 50.0, 1.003), (3.0, 0.0, math.inf, 1.0)], ids=["ode", "imagenet", "weak"])
@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_an_iddpm_net_is_walked_over_its_own_levels(iddpm, solver, churn):
    """With and without churn, at every level of the walk and at the lifted ones."""
    sampler = sampler_for("teacher", iddpm, {}, steps=14, solver=solver, churn=churn, source="teacher.safetensors")
    noise = SeedNoise([5, 6])
    z = [noise.normal(1, 4, 4) for _ in range(15)]
    wanted = edm_by_hand(iddpm, z, 14, churn or (0.0, 0.0, math.inf, 1.0), second=solver == "heun")
    asked = []
    hook = iddpm.register_forward_hook(lambda net, args, out: asked.append(float(args[1])))
    found = sampler(iddpm, None, SeedNoise([5, 6]))
    hook.remove()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max())
    assert set(asked) <= set(iddpm.u.tolist())
    assert Sampler(**json.loads(json.dumps(sampler.to_dict()))) == sampler
    if churn is None and solver == "heun":  # how a run measures its teacher and makes its pairs
        assert heun(iddpm, 14) == Teacher(EDMLoss(sampling_steps=14), iddpm).sampler == sampler
        assert heun(net_of("VEPrecond"), 14) == ode("heun", 14)


@pytest.mark.parametrize("solver", [*SOLVERS, "ancestral"])
def test_every_walk_of_an_iddpm_net_asks_it_at_levels_that_it_knows(iddpm, solver):
    """Also where two levels of the schedule are one to it, or lie below its last."""
    sampler = Sampler(solver, karras(400)[-30:].tolist()) if solver != "ancestral" else Sampler(solver, karras(9).tolist())
    levels = sampler.levels(iddpm).tolist()
    assert levels == [rounded(iddpm, max(s, iddpm.u[-2].item())) for s in sampler.sigmas]
    assert solver == "ancestral" or len(set(levels)) < len(levels)
    asked = []
    hook = iddpm.register_forward_hook(lambda net, args, out: asked.append(float(args[1])))
    found = sampler(iddpm, None, SeedNoise([1]))
    hook.remove()
    assert set(asked) <= set(levels)
    distinct = Sampler(solver, sorted(set(levels), reverse=True))
    torch.testing.assert_close(found, distinct(iddpm, None, SeedNoise([1])), rtol=1e-6, atol=1e-6)


def test_afs_routers_and_skipping_nets_walk_over_the_same_levels(iddpm):
    sampler = few_step(4)
    levels = sampler.levels(iddpm)
    assert levels.tolist() == [rounded(iddpm, s) for s in sampler.sigmas]
    assert (levels / torch.tensor(sampler.sigmas) - 1).abs().max() > 1e-3
    t, x = levels.tolist(), SeedNoise([2]).normal(1, 4, 4).double() * levels[0]
    x = x + (t[1] - t[0]) * x / math.sqrt(1 + t[0] ** 2)
    for s, s_next in ((t[1], t[2]), (t[2], t[3])):
        x = x + (s_next - s) * (x - iddpm(x.float(), torch.tensor(s)).double()) / s
    found = [sampler(net, None, SeedNoise([2])) for net in (iddpm, Skipping(iddpm, None))]
    torch.testing.assert_close(found[0], x.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(*found)
    assert sampler.levels(Router([iddpm], Partition("block", (0,)))).equal(levels)
    assert one_step(2.5).levels(iddpm).tolist() == [2.5]  # what a generator was trained at


@pytest.mark.parametrize("precond", ["EDMPrecond", "VPPrecond", "VEPrecond", "GDDPrecond"])
def test_other_nets_are_asked_at_the_schedules_levels_to_the_bit(precond):
    net = net_of(precond)
    for sampler in (ode("heun", 5), few_step(4), Sampler("ancestral", [80.0, 2.5])):
        assert sampler.levels(net).tolist() == sampler.sigmas
    churn = Sampler("heun", ode("heun", 4).sigmas, churn=(40, 0.05, 50, 1.003))
    step = churned(SOLVERS["heun"], lambda: torch.tensor([[[[0.5]]]]), 4, *churn.churn)
    known = churned(SOLVERS["heun"], lambda: torch.tensor([[[[0.5]]]]), 4, *churn.churn, known=net.round_sigma)
    t, x = torch.tensor(churn.sigmas, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert torch.equal(step(denoise, x, t[1], t[2])[0], known(denoise, x, t[1], t[2])[0])


# What text-to-image adds


class Given:
    """Noise that is known: the same tensors for whoever draws."""

    def __init__(self, *drawn):
        self.drawn = iter(drawn)

    def normal(self, *shape):
        return next(self.drawn)


def test_a_guided_walk_by_hand():
    """Euler with D = D_none + w (D_class - D_none)."""
    data, w = Mixture(4), 1.7
    labels, z = torch.eye(4)[torch.tensor([0, 3, 1])], torch.randn(3, 2, 1, 1)
    sampler = replace(ode("euler", 3), guidance=w)
    x = 80.0 * z.double()
    for s, s_next in zip(sampler.sigmas[:-1], sampler.sigmas[1:], strict=True):
        sigma = torch.full((3,), s, dtype=torch.float64)
        none, one = data(x, sigma), data(x, sigma, labels.double())
        x = x + (s_next - s) * (x - none - w * (one - none)) / s
    torch.testing.assert_close(sampler(data, labels, Given(z)).double(), x, rtol=1e-4, atol=1e-4)
    assert Sampler(**json.loads(json.dumps(sampler.to_dict()))) == sampler
    assert "guidance" not in ode("euler", 3).to_dict()


@pytest.mark.parametrize("start", ["sigma", "unit"])
def test_a_few_steps_with_fresh_noise_by_hand(start):
    """D at each level, and noise of the next on it; `unit` begins with what makes the net's input z: c_in = 1 / sqrt(σ² + 1/4)."""
    data, (z, n1, n2) = Mixture(), torch.randn(3, 5, 2, 1, 1)
    sampler = Sampler("renoise", [80.0, 10.0, 0.5], start=start)
    x = (80.0 if start == "sigma" else (80.0**2 + 0.25) ** 0.5) * z
    for level, noise in ((80.0, 10.0 * n1), (10.0, 0.5 * n2)):
        x = data(x, torch.full((5,), level)) + noise
    torch.testing.assert_close(sampler(data, None, Given(z, n1, n2)), data(x, torch.full((5,), 0.5)), rtol=1e-5, atol=1e-5)
    assert sampler.nfe == 3
