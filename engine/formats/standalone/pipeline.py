"""Images from a distilled EDM net in one or a few steps, as a diffusers pipeline: needs torch and diffusers only.

    pipe = DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)
    images = pipe(seeds=[0, 1, 2]).images

`class_labels`, one for each seed, chooses classes. A seed gives the image that `potstill sample` gives for it. Apache-2.0; the weights have their own licence.
"""

# diffusers is optional, and untyped.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image


class StudentPipeline(DiffusionPipeline):
    """`sampler` says how the student was trained to be sampled: solver, noise levels `sigmas`, start, afs, step_condition."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet, sampler: dict = None):  # noqa: RUF013  # pyright: ignore[reportArgumentType]  # diffusers reads the annotation
        super().__init__()
        self.register_modules(unet=unet)
        self.register_to_config(sampler=sampler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size=1,
        class_labels=None,
        seeds=None,
        generator=None,
        latents=None,
        num_inference_steps=None,
        output_type="pil",
        return_dict=True,
    ):
        """One image per seed, per generator (a list of them), or `batch_size` images from one generator.

        class_labels: one class, or one per image; by default image i has class i mod classes, an image from a seed
        seed mod classes. latents: standard normals [N, C, H, W] in place of the first draw. num_inference_steps: network
        evaluations, for a student that was trained for several numbers of them. output_type: "pil", "np" [N, H, W, C] and
        "pt" [N, C, H, W] in 0 … 1, or "raw": [N, C, H, W] as the net gives them, about in [-1, 1].
        """
        if seeds is not None:
            generator = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
        given = len(latents) if latents is not None else len(generator) if isinstance(generator, list) else batch_size
        labels = self.labels(class_labels, seeds if seeds is not None else range(given), given)
        noise = self.noise(given, generator)
        x = self.sample(labels, noise if latents is None else self.first(latents, noise), num_inference_steps)
        if output_type == "raw":
            images = x
        elif output_type == "pt":
            images = (x / 2 + 0.5).clamp(0, 1)
        else:
            pixels = (x * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # EDM's rounding
            images = [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
            images = images if output_type == "pil" else pixels.astype("float32") / 255
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def labels(self, given, numbers, n):
        """Rows of the identity [N, label_dim]; None for a net without classes."""
        classes = self.unet.label_dim
        if not classes:
            if given is not None:
                raise ValueError(f"this net knows no classes, got class_labels = {given}")
            return None
        wanted = torch.as_tensor([number % classes for number in numbers] if given is None else given)
        if wanted.dim() > 1 or (wanted.dim() == 1 and len(wanted) != n) or not ((wanted >= 0) & (wanted < classes)).all():
            raise ValueError(f"class_labels want one class among 0 … {classes - 1} for each of {n} images, got {given}")
        return torch.eye(classes)[wanted.expand(n)].to(self._execution_device)

    def noise(self, n, generator):
        """A function that draws standard normals [N, C, H, W]; drawn on the generator's device, so seeds are portable."""
        shape = (self.unet.img_channels, self.unet.img_resolution, self.unet.img_resolution)

        def draw():
            if isinstance(generator, list):
                z = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generator])
            else:
                device = generator.device if generator is not None else "cpu"
                z = torch.randn(n, *shape, generator=generator, device=device)
            return z.to(self._execution_device)

        return draw

    def first(self, latents, draw):
        """The same, but its first draw is `latents`."""
        waiting = [latents.to(self._execution_device, torch.float32)]
        return lambda: waiting.pop() if waiting else draw()

    def sample(self, labels, draw, steps):
        """Images [N, C, H, W] float32."""
        solver, sigmas, afs, told = (self.config.sampler.get(k) for k in ("solver", "sigmas", "afs", "step_condition"))
        if steps is not None and steps != self.nfe:
            if not told:
                raise ValueError(f"this student was trained for {self.nfe} network evaluations, got {steps}")
            told = steps + 1 + bool(afs)
            rho = self.config.sampler.get("rho", 7.0)
            if rho is None:
                raise ValueError(f"this student's levels follow no Karras schedule: {self.nfe} network evaluations only, got {steps}")
            sigmas = karras(told, sigmas[-1], sigmas[0], rho)
        if solver == "one_step":
            return self.unet(self.begin(draw(), sigmas[0]), sigmas[0], labels)
        sigmas = [self.unet.round_sigma(sigma) for sigma in sigmas]
        x = self.begin(draw(), sigmas[0]).double()
        if solver == "renoise":
            for high, low in zip(sigmas[:-1], sigmas[1:]):  # noqa: B905
                x = self.unet(x.float(), high, labels).double() + low * draw()
            return self.unet(x.float(), sigmas[-1], labels)
        if solver == "ancestral":
            for high, low in zip(sigmas[:-1], sigmas[1:]):  # noqa: B905
                r = (low / high) ** 2
                clean = self.unet(x.float(), high, labels)
                x = (1 - r) * clean + r * x + low * (1 - r) ** 0.5 * draw()
            return self.unet(x.float(), sigmas[-1], labels)
        assert solver == "euler"
        for i, (high, low) in enumerate(zip(sigmas[:-1], sigmas[1:])):  # noqa: B905
            if afs and i == 0:  # the first step without the net: data of unit variance are assumed
                slope = x / (1 + high**2) ** 0.5
            else:
                slope = (x - self.unet(x.float(), high, labels, steps=told).double()) / high
            x = x + (low - high) * slope
        return x.float()

    def begin(self, z, sigma):
        """What standard normals z are at the first level: sigma z, or ("unit") what enters the net as z."""
        if self.config.sampler.get("start", "sigma") == "sigma":
            return z * sigma
        return z / self.unet.coefficients(torch.full((1,), sigma, device=z.device))[2]

    @property
    def nfe(self):
        """Network evaluations per image."""
        sampler = self.config.sampler
        return len(sampler["sigmas"]) - (1 + bool(sampler.get("afs")) if sampler["solver"] == "euler" else 0)


def karras(n, low, high, rho=7.0):
    """n noise levels from high down to low (arXiv 2206.00364, Eq. 5)."""
    ends = high ** (1 / rho), low ** (1 / rho)
    return [(ends[0] + i / (n - 1) * (ends[1] - ends[0])) ** rho for i in range(n)]
