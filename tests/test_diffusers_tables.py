"""Levels, coefficients and walks of diffusers' denoisers against diffusers' own schedulers."""

import math

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
import diffusers_models  # noqa: E402

from potstill.engine.common.errors import UserError  # noqa: E402
from potstill.engine.diffusion.solvers import SOLVERS, solve  # noqa: E402
from potstill.engine.diffusion.tables import CAP, scheme_of, shift_of, sigmas_of  # noqa: E402
from potstill.engine.nets.diffusers import DiffusersDenoiser  # noqa: E402

# NumPy on diffusers' EulerDiscreteScheduler, and torch on RMSNorm of bfloat16 with float32 weights, which is slower.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
]

SCHEDULES = {
    "sd": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "pixart": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


def net_of(scheduler, name="pixart"):
    return DiffusersDenoiser(diffusers_models.model(name), scheme_of(type(scheduler).__name__, scheduler.config))


def table_net(schedule="sd", prediction="epsilon", **settings):
    return net_of(diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False, **SCHEDULES[schedule], **settings))


def flow_net(name="sd3", **settings):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    return DiffusersDenoiser(
        diffusers_models.model(name),
        scheme_of("FlowMatchEulerDiscreteScheduler", scheduler.config),
        size=diffusers_models.TINY[name].shape[1:],
    )


def from_coefficients(net, sigma, x, raw):
    """D, the net's input, and the time it is told."""
    c = net.coefficients(sigma)
    c_skip, c_out, c_in = (each.reshape(-1, 1, 1, 1) for each in c[:3])
    return c_skip * x + c_out * raw, c_in * x, c.c_noise


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_d_is_the_schedulers_at_every_timestep(schedule, prediction, kind):
    scheduler = getattr(diffusers, kind)(prediction_type=prediction, clip_sample=False, **SCHEDULES[schedule])
    net, draws = net_of(scheduler), torch.Generator().manual_seed(0)
    if kind == "DDIMScheduler":
        scheduler.set_timesteps(1000)
    x_0, noise, raw = torch.randn(3, 1000, 1, 4, 4, generator=draws)
    sigma = net.table
    d, x_in, time = from_coefficients(net, sigma, x_0 + sigma.reshape(-1, 1, 1, 1) * noise, raw)
    assert torch.equal(time, torch.arange(1000.0))
    theirs = torch.stack([scheduler.step(raw[t], t, x_in[t], generator=draws).pred_original_sample for t in range(1000)])
    largest = theirs.abs().amax((1, 2, 3))
    assert ((d - theirs).abs().amax((1, 2, 3)) / largest).max() <= 1e-6
    assert (scheduler.add_noise(x_0, noise, torch.arange(1000)) - x_in).abs().max() <= 1e-5


def test_trained_betas_are_a_table_too():
    betas = np.linspace(0.001, 0.3, 40).tolist()
    scheduler = diffusers.EulerDiscreteScheduler(num_train_timesteps=40, trained_betas=betas)
    assert torch.allclose(net_of(scheduler).table, scheduler.sigmas[:-1].flip(0), rtol=1e-6)


def test_zero_signal_at_the_end_is_the_cap():
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, rescale_betas_zero_snr=True, **SCHEDULES["sd"])
    net, draws = net_of(scheduler), torch.Generator().manual_seed(0)
    assert net.sigma_max == CAP
    scheduler.set_timesteps(1000)
    x_0, noise, raw = torch.randn(3, 1000, 1, 4, 4, generator=draws)
    d, x_in, _ = from_coefficients(net, net.table, x_0 + net.table.reshape(-1, 1, 1, 1) * noise, raw)
    theirs = torch.stack([scheduler.step(raw[t], t, x_in[t]).pred_original_sample for t in range(1000)])
    assert (d - theirs).abs().max() <= 3e-5 * theirs.abs().max()


def walked(net, sigmas, z, condition):
    with torch.no_grad():
        return solve(SOLVERS["euler"], lambda x, s: net(x, s, condition), z * sigmas[0], sigmas).float()


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 1), ("trailing", 4), ("trailing", 25), ("leading", 4), ("linspace", 28)])
def test_our_euler_is_theirs_on_a_table(spacing, steps):
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing=spacing, **SCHEDULES["sd"])
    net, condition = net_of(scheduler), diffusers_models.condition("pixart", 2)
    scheduler.set_timesteps(steps)
    z = torch.randn(2, *net.shape, generator=torch.Generator().manual_seed(0))
    x = z * scheduler.sigmas[0]
    for t in scheduler.timesteps:
        raw = net.model(scheduler.scale_model_input(x, t), condition.embeds, t.expand(2), {"resolution": None, "aspect_ratio": None},
                        encoder_attention_mask=condition.mask, return_dict=False)[0][:, :4]  # fmt: skip
        x = scheduler.step(raw.detach(), t, x).prev_sample
    ours = walked(net, scheduler.sigmas, z, condition)
    assert (ours - x).abs().max() <= 1e-5 * x.abs().max()
    if spacing == "trailing":
        assert torch.allclose(net.sampling_levels(steps).float(), scheduler.sigmas[:-1], rtol=1e-6)


@pytest.mark.parametrize(("first", "error"), [(0.98, 1e-5), (1.0, 1e-4)])  # at t = 1 our σ is the cap
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_our_euler_is_theirs_on_a_flow(shift, first, error):
    net, condition = flow_net(shift=shift), diffusers_models.condition("sd3", 2)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(first, 0.1, 7).tolist())
    times = scheduler.sigmas.double()
    sigmas = (times / (1 - times)).clamp(max=CAP)
    z = torch.randn(2, *net.shape, generator=torch.Generator().manual_seed(0))
    x = z * scheduler.sigmas[0]
    for t in scheduler.timesteps:
        raw = net.model(x, condition.embeds, condition.pooled, t.expand(2), return_dict=False)[0]
        x = scheduler.step(raw.detach(), t, x).prev_sample
    ours = walked(net, sigmas, z, condition)
    assert (ours - x).abs().max() <= error * x.abs().max()


def times_of(net, steps):
    sigmas = net.sampling_levels(steps).float()
    return sigmas / (1 + sigmas)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_a_flows_own_schedule_has_its_shift(steps):
    even = np.linspace(1.0, 1 / steps, steps).tolist()
    for shift in (1.0, 3.0):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=even)
        assert torch.allclose(times_of(flow_net(shift=shift), steps), scheduler.sigmas[:-1], atol=2e-5)
    for kind in ("exponential", "linear"):
        settings = {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.3, "time_shift_type": kind, "base_image_seq_len": 10}
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
        scheduler.set_timesteps(sigmas=even, mu=diffusers.pipelines.flux.pipeline_flux.calculate_shift(16, 10, 4096, 0.4, 1.3))
        assert torch.allclose(times_of(flow_net(**settings), steps), scheduler.sigmas[:-1], atol=2e-5)


@pytest.mark.parametrize(("size", "steps"), [((8, 8), 4), ((64, 64), 50), ((80, 80), 50)])
def test_flux2_has_a_shift_of_its_own(size, steps):
    settings = {"use_dynamic_shifting": True}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
    mu = diffusers.pipelines.flux2.pipeline_flux2.compute_empirical_mu(math.prod(size), steps)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    net = DiffusersDenoiser(diffusers_models.model("flux2"), scheme_of("FlowMatchEulerDiscreteScheduler", settings), size=size)
    assert torch.allclose(times_of(net, steps), scheduler.sigmas[:-1], atol=2e-5)


def test_a_shift_is_a_factor_and_a_logit_normal_a_log_normal():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    sigma, scheduler = t / (1 - t), diffusers.FlowMatchEulerDiscreteScheduler()
    for s, shifted in ((3.0, 3 * t / (1 + 2 * t)), (math.exp(0.7), scheduler.time_shift(0.7, 1.0, t))):
        assert torch.allclose(shifted / (1 - shifted), s * sigma, rtol=1e-12)
    assert torch.allclose(torch.logit(t), sigma.log(), rtol=1e-10, atol=1e-12)
    scheme = scheme_of("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "base_shift": 0.7, "max_shift": 0.7})
    assert shift_of(scheme, 777) == pytest.approx(math.exp(0.7))
    assert shift_of(scheme_of("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 5.0}), 777) == 5


def test_the_tables_that_papers_name():
    sd, pixart = table_net("sd"), table_net("pixart")
    assert (sd.sigma_min, sd.sigma_max) == pytest.approx((0.02917, 14.6146), rel=1e-4)
    assert (pixart.sigma_min, pixart.sigma_max) == pytest.approx((0.01000, 157.407), rel=2e-4)
    half = torch.tensor([2.5])
    assert sd.time(half).item() == 625 and pixart.time(half).item() == 440
    assert sd.told(half).item() == pytest.approx(2.50171, rel=1e-5) and pixart.told(half).item() == pytest.approx(2.50233, rel=1e-5)
    assert pixart.table[400].item() == pytest.approx(2.0411, rel=1e-4)


def test_simplified_betas_of_sim_round_to_its_timestep():
    """SIM's own table, counted from the noisy end: u[j] after betas j + 1 … 1000 of beta(j) = 0.02 + (1e-4 - 0.02) j / 1000."""
    beta = 0.02 + (1e-4 - 0.02) * torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha_bar = (1 - beta.flip(0)).cumprod(0).flip(0)
    u = ((1 - alpha_bar) / alpha_bar).sqrt()
    assert u[0].item() == pytest.approx(156.6155, rel=1e-6) and u[559].item() == pytest.approx(2.49951, rel=1e-5)
    assert table_net("pixart").time(u[559:560]).item() == 440


def test_told_levels_are_told_as_they_are():
    sigma = torch.exp(torch.linspace(-8, 14, 3001))
    for net in (table_net("sd"), table_net("cosine"), table_net("sd", "v_prediction", rescale_betas_zero_snr=True), flow_net()):
        once = net.told(sigma)
        assert torch.equal(net.told(once), once) and (once <= net.sigma_max).all()
        assert [net.round_sigma(s) for s in sigma[::100].tolist()] == pytest.approx(once[::100].tolist(), rel=1e-6)
    table = table_net("sd")
    nearest = (sigma[:, None].double() - table.table.double()).abs().amin(1)
    assert torch.allclose((table.told(sigma).double() - sigma.double()).abs(), nearest, rtol=1e-4, atol=1e-6)
    assert torch.equal(table.told(table.table), table.table)


@pytest.mark.parametrize(("name", "weights", "levels"), [("flux", False, 4), ("qwen", False, 4), ("flux2", False, 25), ("flux2", True, 4), ("sd3", True, 25)])  # fmt: skip
def test_time_in_16_bits_has_few_levels(name, weights, levels):
    net = flow_net(name)
    if weights:
        net.model.to(torch.bfloat16)
        net.to("cpu")
    else:
        net.compute_dtype = torch.bfloat16
    t = torch.linspace(0.95, 0.96, 25)
    once = net.told(t / (1 - t))
    assert torch.equal(net.told(once), once) and len(once.unique()) == levels
    condition = diffusers_models.condition(name, 1)
    x = torch.randn(1, *net.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # the input is the same: c_in·x = x_in
        outs = {net.estimate(x * (1 + s), s[None], condition).raw.float().numpy().tobytes() for s in (t / (1 - t))}
        again = {net.estimate(x * (1 + s), s[None], condition).raw.float().numpy().tobytes() for s in once.unique()}
    if levels == 4:  # what the net can be told is what makes a difference to it, but for roundings of its input
        assert len(again) == 4 and len(outs) < 20
    assert net.told(torch.tensor([1e9])).item() == pytest.approx(CAP)
    own = net.level(torch.linspace(0, 1, 101))  # at which methods add noise
    assert torch.equal(net.told(own), own)


def test_levels_are_uniform_in_the_nets_own_time():
    u = torch.linspace(0, 1, 11)
    net = table_net("sd")
    assert torch.equal(net.level(u), net.table[[0, 100, 200, 300, 400, 500, 599, 699, 799, 899, 999]])
    sigma = flow_net().level(u)
    assert torch.allclose(sigma / (1 + sigma), 0.001 + 0.999 * u, atol=2e-5) and sigma[-1] == CAP
    assert flow_net().time(torch.tensor([1.0, CAP])).tolist() == [500, 1000]  # pure noise is told as such


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_weighted_errors_of_d_are_those_of_the_raw_output(prediction):
    net = flow_net() if prediction == "flow" else table_net("sd", prediction)
    sigma, draws = torch.tensor([0.03, 0.7, 5.0]), torch.Generator().manual_seed(0)
    x, raw, target = torch.randn(3, 3, 1, 4, 4, generator=draws)
    d, d_target = (from_coefficients(net, sigma, x, f)[0] for f in (raw, target))
    weighted = net.weight(sigma).reshape(-1, 1, 1, 1) * (d - d_target) ** 2
    assert torch.allclose(weighted, (raw - target) ** 2, rtol=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "config", "said"),
    [
        ("EDMEulerScheduler", {"prediction_type": "epsilon"}, "EDMEulerScheduler with prediction_type 'epsilon' are not known"),
        ("SCMScheduler", {"prediction_type": "trigflow"}, "wanted a table from betas or flow matching"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "are not known"),
        ("DDPMScheduler", {"prediction_type": "novel"}, "'novel'"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "are not known"),
    ],
)
def test_a_scheduler_without_levels_is_one_sentence(scheduler, config, said):
    with pytest.raises(UserError, match=said):
        scheme_of(scheduler, config)


def test_unknown_betas_are_one_sentence():
    with pytest.raises(UserError, match="beta_schedule 'sigmoid' is not known: wanted linear"):
        sigmas_of(scheme_of("DDPMScheduler", {"beta_schedule": "sigmoid"}))
