"""The end of a run: distances of teacher, student and real images, samples.png, and the summary."""

from pathlib import Path
from typing import Any

from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.formats.pictures import save_png, sheet
from potstill.engine.jobs.distance import Distance
from potstill.engine.jobs.gallery import Gallery
from potstill.engine.jobs.machine import device_title, versions
from potstill.engine.jobs.workplace import Workplace
from potstill.engine.models.weights import read_metadata
from potstill.engine.nets.denoiser import Denoiser

Nets = dict[str, tuple[Denoiser, Sampler]]  # {"teacher": …, "student": …}: each net and how it is sampled


def measured(nets: Nets, distance: Distance | None) -> dict[str, Any]:
    """The distance of each net and of real images from the data; without data, the number of evaluations alone."""
    if distance is None:
        return {name: {"nfe": sampler.nfe} for name, (_, sampler) in nets.items()}
    against = distance.reference
    found: dict[str, Any] = {"floor": {"fd": against.floor, "kind": against.floor_kind}}
    for name, (net, sampler) in nets.items():
        found[name] = distance.of(net, sampler, progress=f"measuring the {name}")
    return found


def draw(nets: Nets, gallery: Gallery, path: Path) -> None:
    """Real images and each net's, one sheet beside the other."""
    sheets = {} if gallery.images is None else {"real": gallery.real()}
    for name, (net, sampler) in nets.items():
        sheets[f"{name}, {sampler.nfe} evaluation{'s' * (sampler.nfe > 1)}"] = gallery.samples(net, sampler)
    save_png(sheet(sheets, columns=gallery.columns(nets["student"][0])), path)


def summary_of(
    place: Workplace, students: list[Path], teacher: Denoiser, found: dict[str, Any], graphs: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """summary.json. students: their weight files; found: what was measured; seconds: how long this call has taken."""
    metas = [read_metadata(file) for file in students]
    meta = read_metadata(place.given_teacher or place.dir / "teacher.safetensors")
    return {
        "name": place.dir.name,
        "method": place.cfg.method.name,
        **found,
        "seconds": {
            "teacher": round(meta.get("seconds", 0.0), 1),
            "student": round(sum(one["seconds"] for one in metas), 1),
            "this_call": round(seconds, 1),
        },
        "images_seen": {
            "teacher": round(1000 * meta.get("kimg", 0)),
            "student": round(sum(1000 * one["kimg"] for one in metas)),
        },
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "device": device_title(place.device),
        "precision": str(place.dtype).removeprefix("torch."),
        "graphs": graphs,
        "seed": place.cfg.seed,
        "versions": versions(),
    }


def print_result(summary: dict[str, Any], folder: Path) -> None:
    """The run in a few lines on stdout."""
    for name in ("floor", "teacher", "student"):
        if "fd" in (one := summary.get(name, {})):
            nfe = f"  NFE {one['nfe']:>3}" if "nfe" in one else "         "
            print(f"{name:8}{nfe}  FD {one['fd']:.3f}")
    seconds = summary["seconds"]
    print(f"teacher {seconds['teacher']:.0f} s, student {seconds['student']:.0f} s; look at {folder}/samples.png, {folder}/report.html")
