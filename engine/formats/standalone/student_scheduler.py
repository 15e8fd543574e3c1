"""How a distilled student of a latent or text-to-image net is sampled, as a scheduler of diffusers: needs torch and diffusers only.

The pipeline's state is the net's own input y = c_in(σ) x of x = image + σ noise, so a pipeline for any prediction can carry it, and the
levels are the student's: whatever number of steps a call names, another one than theirs is an error. Apache-2.0.

diffusers runs this file anew for every pipeline, in the same module: nothing here may ask isinstance of a class of its own.
"""

# diffusers is optional, and untyped.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


class StudentScheduler(SchedulerMixin, ConfigMixin):
    """prediction: epsilon, v_prediction, sample or flow, what the net gives.
    solver: renoise (the image, then fresh noise at the next level; one level: one step), ancestral (posterior sampling, ends with the
    image) or euler (a walk to level `end`, whose state is the image).
    sigmas, times: levels σ = noise / signal at which the net is asked, from high to low, and what the pipeline tells it there.
    first: the net's first input is this many standard normals. `scale_input`: of a pipeline without `prepare_latents`, which asks here.
    """

    order = 1
    init_noise_sigma = 1.0  # `first` is multiplied once, by pipeline.py

    @register_to_config
    def __init__(
        self,
        prediction="epsilon",
        solver="renoise",
        sigmas=(1.0,),
        times=(999.0,),
        end=0.0,
        first=1.0,
        scale_input=False,
        num_train_timesteps=1000,
    ):
        self.set_timesteps(len(sigmas))

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, sigmas=None, mu=None):
        """Begin again. A pipeline's own timesteps and sigmas are counted, and not followed."""
        given = timesteps if timesteps is not None else sigmas
        steps = len(given) if num_inference_steps is None and given is not None else num_inference_steps
        if steps != len(self.config.sigmas):
            raise ValueError(f"this student was trained for num_inference_steps={len(self.config.sigmas)}, got {steps}")
        self.num_inference_steps, self.at = steps, 0
        self.timesteps = torch.tensor(self.config.times, dtype=torch.float32, device=device)
        self.sigmas = torch.tensor(self.config.sigmas, dtype=torch.float32)

    def set_begin_index(self, begin_index=0):
        """A student's walk begins at its beginning."""

    def scale_model_input(self, sample, timestep=None):
        return sample * self.config.first if self.config.scale_input and self.at == 0 else sample

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        """The state at the next level, and the image that the net sees at this one."""
        sigma, low = (*self.config.sigmas, self.config.end)[self.at : self.at + 2]
        c_skip, c_out, c_in = self.coefficients(sigma)
        x = sample.float() / c_in
        clean = c_skip * x + c_out * model_output.float()
        keep = {"renoise": 0.0, "ancestral": (low / sigma) ** 2, "euler": low / sigma}[self.config.solver]
        state = keep * x + (1 - keep) * clean
        if low > 0 and self.config.solver != "euler":
            noise = randn_tensor(state.shape, generator=generator, device=state.device, dtype=state.dtype)
            state = state + low * (1 - keep) ** 0.5 * noise
        self.at += 1
        if self.at < len(self.config.sigmas):
            state = state * self.coefficients(low)[2]
        state, clean = state.to(sample.dtype), clean.to(sample.dtype)
        return SchedulerOutput(prev_sample=state) if return_dict else (state, clean)  # PixArt's takes the image of a single step

    def coefficients(self, sigma):
        """c_skip, c_out, c_in of image = c_skip x + c_out net(c_in x)."""
        if self.config.prediction == "flow":
            return 1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma)
        c_in = (1 + sigma**2) ** -0.5
        c_skip, c_out = {"epsilon": (1.0, -sigma), "v_prediction": (c_in**2, -sigma * c_in), "sample": (0.0, 1.0)}[self.config.prediction]
        return c_skip, c_out, c_in
