"""The end of a run: the Fréchet distances of teacher, student and real images, their pictures, and the summary."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from potstill.engine.common.progress import Bar
from potstill.engine.config.schema import EvalConfig
from potstill.engine.data.images import Images
from potstill.engine.data.prompts import Prompts
from potstill.engine.data.vae import AT_ONCE
from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.formats.caveats import caveats
from potstill.engine.formats.pictures import captioned, columns_of, grid, save_png, side_by_side, stacked, titles
from potstill.engine.jobs.machine import device_title, versions
from potstill.engine.jobs.workplace import Workplace
from potstill.engine.measure.features import Features
from potstill.engine.measure.neighbours import by_class, looked_up
from potstill.engine.measure.networks import features_by_name
from potstill.engine.measure.score import Reference, picture_shape, reference, score, scored, shown
from potstill.engine.measure.scores import Score, figures_of, open_score
from potstill.engine.models.generate import Decode, generate
from potstill.engine.models.origins import metadata_of_origin
from potstill.engine.models.weights import read_metadata
from potstill.engine.nets.denoiser import Denoiser

MOST = 50_000  # images, unless eval.n asks for more
MOST_CLASSES = 10  # on a sheet


@dataclass
class Shown:
    """How samples become pictures: what nets are told, if that is prompts, and the VAE that decodes latents."""

    prompts: Prompts | None = None
    decode: Decode | None = None
    held_out: Prompts | None = None  # those that are scored apart


class Distance:
    """From these images, and the scores of pictures and their prompts; nothing is loaded before it is asked for."""

    def __init__(self, cfg: EvalConfig, images: Images | None, device: torch.device, shown: Shown):
        self.cfg, self.images, self.device, self.shown = cfg, images, device, shown

    @property
    def settings(self) -> dict[str, Any]:
        """Of all that is measured."""
        known = self.images or self.shown.prompts
        n = self.cfg.n or min(len(known) if known else MOST, MOST)
        return {
            "n": n, "seed": self.cfg.seed, "batch": self.cfg.batch, "device": self.device, "decode": self.shown.decode, "scores": self.scores
        }  # fmt: skip

    @cached_property
    def features(self) -> Features:
        return features_by_name(self.cfg.features).to(self.device)

    @cached_property
    def scores(self) -> list[Score]:
        return [open_score(name, self.device) for name in self.cfg.scores]

    @cached_property
    def reference(self) -> Reference:
        assert self.images is not None
        captions = self.images.captions if self.cfg.scores else None
        return reference(self.images, self.features, **self.settings, captions=captions)

    def try_features(self) -> None:
        """Fetch and load the features and show them one image: what fails does so before the training, not after it."""
        assert self.images is not None
        self.features.try_on(picture_shape(self.images.shape, self.shown.decode), self.device)

    def try_scores(self, shape: tuple[int, ...], prompt: str) -> None:
        """The same of the scores, with a picture of samples of this shape. Until they are wanted they take no memory again."""
        for name in self.cfg.scores:
            picture = torch.zeros(1, *picture_shape(shape, self.shown.decode), dtype=torch.uint8)
            figures_of(open_score(name, self.device), picture, [prompt])

    def of(self, net: Denoiser, sampler: Sampler, progress: str | None = None) -> dict[str, Any]:
        """The distance of this net's images and their scores, with everything needed to repeat it."""
        prompts = self.shown.prompts
        settings: dict[str, Any] = self.settings | {"progress": progress}
        if self.images is not None:
            return score(net.eval(), sampler, self.images, self.features, **settings, against=self.reference, prompts=prompts)
        assert prompts is not None
        return scored(net.eval(), sampler, settings.pop("scores"), prompts, **settings)

    def of_held_out(self, net: Denoiser, sampler: Sampler, progress: str | None = None) -> dict[str, Any]:
        """The scores of as many images of the prompts that are held out."""
        settings: dict[str, Any] = self.settings | {"progress": progress}
        assert self.shown.held_out is not None
        return scored(net.eval(), sampler, settings.pop("scores"), self.shown.held_out, **settings)


class Gallery:
    """What one data set's pictures show; `images` is None for a data-free run. names: of the classes, where they have some."""

    def __init__(self, images: Images | None, device: torch.device, shown: Shown, names: list[str] | None = None):
        self.images, self.device, self.shown, self.names = images, device, shown, names

    @property
    def count(self) -> int:
        """About so many: sixty divide into rows of 10 classes; beside their captions fewer can be looked at."""
        return 24 if self.shown.prompts else 60

    def whole_rows(self, label_dim: int) -> int:
        """So many, of a net or data with these classes."""
        columns = self.columns_of(label_dim)
        return self.count if self.shown.prompts else max(1, round(self.count / columns)) * columns

    def grid(self, net: Denoiser, sampler: Sampler) -> Image:
        """Generated images, each with its prompt where there are some."""
        images, prompts, columns = self.samples(net, sampler), self.shown.prompts, self.columns(net)
        if prompts is None:
            return grid(images, columns, heads=self.heads(net.label_dim))
        return captioned(images, [prompts.text(i % len(prompts)) for i in range(len(images))], columns)

    def grid_of_real(self, columns: int) -> Image:
        """As many real images, with their captions or classes."""
        assert self.images is not None
        told = self.images.captions if self.shown.prompts else None
        if told:
            return captioned(self.real(), [told[i] for i in self.real_places()], columns)
        dim = 0 if self.shown.prompts else self.images.label_dim
        return grid(self.real(), columns, heads=self.heads(dim) if columns == self.columns_of(dim) else [])

    def heads(self, label_dim: int) -> list[str]:
        """What stands over the columns; nothing where they are of no class or of one without a name."""
        classes = self.classes(label_dim) if label_dim else np.arange(0)
        if len(classes) == 1:
            return titles(classes, self.names) if self.names else []
        return titles(np.resize(classes, self.columns_of(label_dim)), self.names) if len(classes) else []

    def said(self, label_dim: int) -> str:
        """Which part of the classes is shown, if not all."""
        shown, there = (len(self.classes(label_dim)), len(self.all_classes(label_dim))) if label_dim else (0, 0)
        return f", {shown} of {there:,} classes" if shown < there else ""

    def samples(self, net: Denoiser, sampler: Sampler) -> torch.Tensor:
        """Generated images [whole_rows, C, H, W], uint8."""
        n = self.whole_rows(net.label_dim)
        labels = np.resize(self.classes(net.label_dim), n) if net.label_dim else self.shown.prompts
        decode = self.shown.decode
        how: dict[str, Any] = {"batch": AT_ONCE, "decode": decode} if decode else {}
        return torch.cat(list(generate(net, sampler, labels, range(n), device=self.device, **how)))

    def real(self) -> torch.Tensor:
        """As many real images, uint8."""
        assert self.images is not None
        rows = torch.from_numpy(np.stack([self.images.read(int(i)) for i in self.real_places()]))
        return shown(self.images, rows.to(self.device), self.shown.decode)

    def real_places(self) -> np.ndarray:
        """Where these lie in the data set; of a labelled one, classes in columns like the samples."""
        assert self.images is not None
        if self.shown.prompts is not None and self.images.captions:
            return np.arange(self.count) % len(self.images)
        if self.images.labels is None:
            return np.linspace(0, len(self.images) - 1, self.whole_rows(0)).astype(int)
        of_class = [np.flatnonzero(self.images.labels == c) for c in self.classes(self.images.label_dim)]
        columns = len(of_class)
        return np.array([of_class[i % columns][(i // columns) % len(of_class[i % columns])] for i in range(self.whole_rows(len(of_class)))])

    def columns(self, net: Denoiser) -> int:
        """How many pictures stand side by side."""
        return self.columns_of(net.label_dim)

    def columns_of(self, label_dim: int) -> int:
        """A multiple of the classes that are shown, so that each has columns of its own."""
        if self.shown.prompts:
            return 4
        classes = len(self.classes(label_dim)) if label_dim else 0
        return columns_of(classes, self.count) if classes > 1 else 10

    def classes(self, label_dim: int) -> np.ndarray:
        """The classes in the columns: ten at most, evenly taken from all."""
        there = self.all_classes(label_dim)
        return there[np.linspace(0, len(there) - 1, min(len(there), MOST_CLASSES)).round().astype(int)]

    def all_classes(self, label_dim: int) -> np.ndarray:
        """Those that have images; without labelled data all that there are."""
        labels = None if self.images is None else self.images.labels
        return np.arange(label_dim) if labels is None else np.unique(labels)


Nets = dict[str, tuple[Denoiser, Sampler]]  # {"teacher": …, "student": …}: each net and how it is sampled


def measured(nets: Nets, distance: Distance | None) -> dict[str, Any]:
    """The distance of each net and of real images from the data, and their scores; without either, the number of evaluations alone."""
    if distance is None:
        return {name: {"nfe": sampler.nfe} for name, (_, sampler) in nets.items()}
    found: dict[str, Any] = {}
    if distance.images is not None:
        found["floor"] = {"fd": distance.reference.floor, "kind": distance.reference.floor_kind}
        found |= {"real": real} if (real := distance.reference.scores) else {}
    for name, net in nets.items():
        found[name] = distance.of(*net, progress=f"measuring the {name}")
        if distance.shown.held_out is not None:
            found[name]["held_out"] = distance.of_held_out(*net, progress=f"measuring the {name} on held-out prompts")
    return found


def draw(nets: Nets, gallery: Gallery, path: Path) -> None:
    """Real images and each net's, one sheet beside the other."""
    part = gallery.said(nets["student"][0].label_dim)
    grids = {} if gallery.images is None else {f"real{part}": gallery.grid_of_real(gallery.columns(nets["student"][0]))}
    with Bar(f"drawing {path.name}", len(nets), unit="nets") as bar:
        for name, (net, sampler) in nets.items():
            grids[f"{name}, {sampler.nfe} evaluation{'s' * (sampler.nfe > 1)}{part}"] = gallery.grid(net, sampler)
            bar.update()
    save_png(side_by_side(grids), path)


def looked_closer(nets: Nets, gallery: Gallery, distance: Distance | None, path: Path) -> dict[str, Any]:
    """Of the student's pictures: how near they are to training images, which `path` shows, and each class's distance. {} where data and
    samples are no pictures of one kind.
    """
    images, (net, sampler) = gallery.images, nets["student"]
    if images is None or images.latent or gallery.shown.decode is not None or images.shape != net.shape:
        return {}
    both, found = looked_up(gallery.samples(net, sampler), images, gallery.device)
    rows = dict(zip(("student", "the nearest of the training images"), both.chunk(2), strict=True))
    save_png(stacked([side_by_side({title: grid(row, len(row))}) for title, row in rows.items()]), path)
    if distance is None or gallery.shown.prompts is not None:
        return {"neighbours": found}
    how: dict[str, Any] = {name: distance.settings[name] for name in ("n", "seed", "batch", "device")}
    return {"neighbours": found} | ({"classes": each} if (each := by_class(net, sampler, images, distance.features, **how)) else {})


def summary_of(
    place: Workplace, students: list[Path], teacher: Denoiser, found: dict[str, Any], graphs: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """summary.json. students: their weight files; found: what was measured; seconds: how long this call has taken."""
    metas = [read_metadata(file) for file in students]
    meta = metadata_of_origin(place.given_teacher or place.dir / "teacher.safetensors")
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


def print_result(summary: dict[str, Any], folder: Path, *, given: bool = False) -> None:
    """The run in a few lines on stdout. given: the teacher was, and its time was not this run's."""
    for name in ("floor", "real", "teacher", "student"):
        one = summary.get(name, {})
        figures = [f"FD {one['fd']:.3f}"] if "fd" in one else []
        figures += [f"{figure} {mean:.4g}" for figure, mean in one.get("scores", {}).items()]
        figures += [f"{figure} of held-out prompts {mean:.4g}" for figure, mean in one.get("held_out", {}).get("scores", {}).items()]
        if figures:
            nfe = f"  NFE {one['nfe']:>3}" if "nfe" in one else "         "
            print(f"{name:8}{nfe}  {', '.join(figures)}")
    for sentence in caveats(summary):
        print(f"note: {sentence}")
    seconds = summary["seconds"]
    teacher = "" if given else f"teacher {seconds['teacher']:.0f} s, "
    print(f"{teacher}student {seconds['student']:.0f} s; look at {folder}/samples.png, {folder}/report.html")
