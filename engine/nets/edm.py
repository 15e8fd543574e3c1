"""EDM's way of naming a net: a preconditioning class and keyword arguments, as its pickles store them."""

import math
from inspect import signature
from typing import Any

import torch

from potstill.engine.diffusion.precond import iddpm_levels, vp_sigma
from potstill.engine.nets.edm2 import EDM2Denoiser, EDM2UNet
from potstill.engine.nets.edm_denoiser import EDMDenoiser
from potstill.engine.nets.steps import add_step_condition
from potstill.engine.nets.unet import DhariwalUNet, SongUNet

UNETS: dict[str, type[SongUNet] | type[DhariwalUNet]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}

# EDM's keyword arguments of each preconditioning class, with its defaults. GDD's and ECT's generators have classes of their own.
SCHEMES: dict[str, dict[str, Any]] = {
    "EDMPrecond": {"sigma_min": 0.0, "sigma_max": math.inf, "sigma_data": 0.5, "model_type": "DhariwalUNet"},
    "VPPrecond": {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5, "model_type": "SongUNet"},
    "VEPrecond": {"sigma_min": 0.02, "sigma_max": 100.0, "model_type": "SongUNet"},
    "GDDPrecond": {"sigma_min": 0.0, "sigma_max": math.inf, "sigma_data": 0.5, "model_type": "DhariwalUNet"},
    "ECMPrecond": {"sigma_min": 0.003, "sigma_max": math.inf, "sigma_data": 0.5, "model_type": "DhariwalUNet"},
    "EDM2Precond": {"sigma_data": 0.5, "logvar_channels": 128},
    "iDDPMPrecond": {"C_1": 0.001, "C_2": 0.008, "M": 1000, "model_type": "DhariwalUNet"},
}


def from_kwargs(precond: str, **kwargs: Any) -> EDMDenoiser:
    """The denoiser that EDM builds from the same class name and keyword arguments, freshly initialised.

    "EDM2Precond" is EDM2's class, which is called Precond there. `use_fp16=True` runs the U-Net in bfloat16 (EDM's float16
    diverges in distillation; set `compute_dtype` to choose).
    One keyword is ours: `step_condition=True` for the nets of `engine.nets.steps`.
    Raises ValueError for an unknown class, U-Net or keyword.
    """
    kwargs = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in kwargs.items()}  # numpy's, as plain numbers
    if "label_dim" in kwargs:
        kwargs["label_dim"] = kwargs["label_dim"] or 0  # None: no classes
    if precond not in SCHEMES:
        raise ValueError(f"precond wants one of {', '.join(SCHEMES)}, got {precond!r}")
    defaults = SCHEMES[precond]
    scheme = {name: kwargs.get(name, default) for name, default in defaults.items()}
    model_type = scheme.pop("model_type", None)
    if model_type is not None and model_type not in UNETS:
        raise ValueError(f"model_type wants one of {', '.join(UNETS)}, got {model_type!r}")
    image = {"img_resolution", "img_channels"}
    if missing := image - kwargs.keys():
        raise ValueError(f"{precond} wants {' and '.join(sorted(missing))}")
    model_kwargs = {k: v for k, v in kwargs.items() if k not in {*defaults, *image, "use_fp16", "step_condition"}}
    resolution, channels = kwargs["img_resolution"], kwargs["img_channels"]
    try:
        if model_type is None:
            if kwargs.get("step_condition"):
                raise ValueError("EDM2's nets have no step condition, got step_condition=True")
            logvar_channels = scheme.pop("logvar_channels")
            model = EDM2UNet(img_resolution=resolution, img_channels=channels, **model_kwargs)
            net = EDM2Denoiser(model, scheme | {"sigma_min": 0.0, "sigma_max": math.inf}, dict(kwargs), logvar_channels)
        else:
            out_channels = channels * (2 if precond == "iDDPMPrecond" else 1)
            model = UNETS[model_type](img_resolution=resolution, in_channels=channels, out_channels=out_channels, **model_kwargs)
            net = EDMDenoiser(model, precond, scheme | _sigma_range(precond, scheme), dict(kwargs))
    except TypeError as error:
        raise ValueError(f"{model_type or 'EDM2UNet'} does not take these keyword arguments: {error}") from error
    net.compute_dtype = torch.bfloat16 if kwargs.get("use_fp16") else torch.float32
    return add_step_condition(net) if kwargs.get("step_condition") else net


def all_kwargs(precond: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every keyword argument that `from_kwargs(precond, **kwargs)` makes a net with, defaults included; tuples as lists."""
    made = SCHEMES.get(precond, {}) | kwargs
    unet = EDM2UNet if precond == "EDM2Precond" else UNETS.get(made.get("model_type", ""))
    given = signature(unet).parameters.values() if unet else ()
    defaults = {p.name: p.default for p in given if p.default is not p.empty} | {"use_fp16": False, "step_condition": False}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in (defaults | made).items()}


def _sigma_range(precond: str, scheme: dict[str, Any]) -> dict[str, float]:
    """The noise levels a scheme was trained for, where they follow from its other constants."""
    if precond == "VPPrecond":
        times = (scheme["epsilon_t"], 1.0)
        low, high = (vp_sigma(t, scheme["beta_d"], scheme["beta_min"]) for t in times)
        return {"sigma_min": low, "sigma_max": high}
    if precond == "iDDPMPrecond":
        levels = iddpm_levels(scheme["M"], scheme["C_1"], scheme["C_2"])
        return {"sigma_min": levels[-2].item(), "sigma_max": levels[0].item()}
    return {}
