"""One run folder: its two stages (teacher, student), then the measuring, the pictures and the report."""

import json
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill.engine.config import unused
from potstill.engine.config.tree import Config
from potstill.engine.data.sampler import Stream
from potstill.engine.diffusion.sampling import Sampler, heun
from potstill.engine.formats.pictures import grid, save_png, sheet
from potstill.engine.jobs import build, preflight
from potstill.engine.jobs.folder import check_folder, prepare, write_atomically
from potstill.engine.jobs.planned import plan, taught_sampler
from potstill.engine.measure.features import Features
from potstill.engine.measure.named import features_by_name
from potstill.engine.measure.report import write_report
from potstill.engine.measure.score import Reference, reference, score
from potstill.engine.methods.base import Method
from potstill.engine.methods.dmd import DMD, Pairs
from potstill.engine.methods.msd import TSM, TSMConfig
from potstill.engine.methods.teacher import Teacher
from potstill.engine.models.generate import generate, one_hot, write_pairs
from potstill.engine.models.opening import device_named
from potstill.engine.models.router import MANIFEST, load_router, student_folder, write_manifest
from potstill.engine.models.weights import load_net, read_metadata, read_tensors, save_net
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.layers import set_checkpointing
from potstill.engine.skipping.apply import Guard
from potstill.engine.training.loop import Hook, train
from potstill.engine.training.profile import Profile
from potstill.engine.training.ranks import ALONE, Ranks
from potstill.engine.training.run import Run, TrainConfig


class Job:
    """One run folder: teacher, student or students, then the measuring."""

    def __init__(self, cfg: Config, *, on_paper: bool = False, ranks: Ranks = ALONE):
        """Check everything that can be checked before work begins. `on_paper`: of what is there, and leave the run folder alone."""
        preflight.check_settings(cfg, ranks.count)
        if not on_paper:
            preflight.check_complete(cfg)
        check_folder(cfg)
        self.cfg, self.began, self.dir = cfg, time.perf_counter(), Path(cfg.run_dir or "").expanduser()
        self.checkpoint = Path(cfg.teacher.checkpoint).expanduser() if cfg.teacher.checkpoint else None
        self.graphs: dict[str, Any] = {}  # of every stage of this call: what was replayed and what was not
        self.ranks, self.device = ranks, ranks.connect(device_named(cfg.device))
        self.dtype, why = build.precision(cfg.precision, self.device)
        algorithms = build.set_algorithms(cfg.cudnn_benchmark, cfg.deterministic, self.device)
        for note in (build.set_tf32(cfg.tf32, self.device), algorithms, build.uncompiled(self.device)):
            if note:
                self.tell(note)
        self.images = build.build_images(cfg) if preflight.data_is_there(cfg) else None
        self.planned = plan(cfg, self.images, self.dir, ranks)
        self.partition, self.without = self.planned.partition, self.planned.without
        self.tell_unused(self.planned.teacher)
        if self.images is not None and not (on_paper and preflight.unfetched(cfg.eval.features)):
            self.ranks.alone(self.check_features)
        if on_paper:
            return
        if not self.checkpoint and not self.there(self.dir / "teacher.safetensors"):
            self.ranks.alone(lambda: build.fetch_helpers(cfg.method))
        ranks.alone(lambda: prepare(cfg))
        if self.without:
            assert self.images is not None
            self.tell(f"note: {self.images.name} has no images of {build.listed(self.without)}: left out of the grids and distances")
        among = f"{ranks.count} ranks, {cfg.train.parallel}, " if ranks.count > 1 else ""
        self.tell(f"{self.dir}: {among}{self.device.type}, {str(self.dtype).removeprefix('torch.')} U-Nets ({why})")

    def tell_unused(self, teacher: Denoiser) -> None:
        if note := unused.sentence(self.cfg, teacher, self.ranks.count):
            self.tell(note)

    def check_features(self) -> None:
        """Fetch and load the features and show them one image: what fails does so before the training, not after it."""
        assert self.images is not None
        shape = (1, self.images.channels, self.images.resolution, self.images.resolution)
        with torch.no_grad():
            self.features.measure(torch.zeros(shape, dtype=torch.uint8, device=self.device))

    def run(self) -> dict[str, Any] | None:
        """Everything that is not done yet. Returns the summary; None if other students of this run are still missing."""
        torch.manual_seed(self.cfg.seed)
        teacher = self.teacher()
        start = self.matched_start(teacher)
        count = self.cfg.students.count
        for k in range(count) if self.cfg.student is None else (self.cfg.student,):
            student = self.distil(teacher, start, k)
        if self.partition:
            missing = [k for k in range(count) if not self.there(student_folder(self.dir, k) / "student.safetensors")]
            if missing:
                self.tell(f"student {self.cfg.student} of {count} is done; the run is measured when {missing} are, too")
                return None
            partition = self.partition
            self.ranks.alone(lambda: write_manifest(self.dir, partition))
            student = self.prepared(load_router(self.dir / MANIFEST)[0])
        self.student = student
        return self.ranks.alone(lambda: self.finish(teacher, student))

    def finish(self, teacher: Denoiser, student: Denoiser) -> dict[str, Any]:
        """Measure, and write what a user looks at."""
        summary = self.summary(teacher, self.measure(teacher, student))
        write_atomically(self.dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        write_report(self.dir)
        tell_result(summary, self.dir)
        return summary

    def teacher(self) -> Denoiser:
        """The teacher of this run: the given file, the one trained here before, or a new one."""
        given, here = self.checkpoint, self.dir / "teacher.safetensors"
        if not given and not self.there(here):
            assert self.images is not None
            net = build.build_net(self.cfg.net, self.images.resolution, self.images.channels, self.images.label_dim)
            method = Teacher(self.cfg.teacher.loss, self.prepared(net, self.cfg.teacher.train))
            self.save(self.stage(method, self.cfg.teacher.train, self.dir / "teacher"), here)
        return self.prepared(build.load_teacher(given or here, self.images))

    def matched_start(self, teacher: Denoiser) -> Denoiser:
        """What the students start as: the teacher, or a net of another shape that has learnt its scores (TSM)."""
        students = self.cfg.students
        if students.net is None:
            return teacher
        here = self.dir / "tsm.safetensors"
        if not self.there(here):
            net = build.build_net(students.net, teacher.img_resolution, teacher.img_channels, teacher.label_dim)
            method = TSM(TSMConfig(), teacher, self.prepared(net, students.tsm))
            self.save(self.stage(method, students.tsm, self.dir / "tsm"), here)
        return self.prepared(load_net(here)[0])

    def distil(self, teacher: Denoiser, start: Denoiser, k: int) -> Denoiser:
        """Student k (the average of its weights), trained on its share of the classes if there are several."""
        folder = student_folder(self.dir, k) if self.partition else self.dir
        method = build.build_method(self.cfg.method, teacher, start)
        if self.cfg.students.start:
            begun = Path(self.cfg.students.start).expanduser()
            build.start_from(method, student_folder(begun, k) if self.partition else begun)
        if isinstance(method, DMD) and method.cfg.regression:
            method.pairs = self.pairs(teacher)
        for note in method.notes:
            self.tell(note)
        self.sampler = method.sampler
        guard = build.lighten(method, self.cfg.skipping, self.tell)
        share = k if self.partition else None
        run = self.stage(method, self.cfg.train, folder, share, guard, spare=(teacher, start))
        self.prepared(teacher)
        about = {"partition": self.partition.hash, "student": k} if self.partition else {}
        self.save(run, folder / "student.safetensors", **about)
        average = run.average()
        assert isinstance(average, Denoiser)
        return average

    def pairs(self, teacher: Denoiser) -> Pairs:
        """Noise and the teacher's deterministic samples from it, made once for all students of the run; classes in turn."""
        path, cfg = self.dir / "pairs.safetensors", self.cfg.method
        if not self.there(path):
            self.tell(f"making {cfg.pairs} pairs with {cfg.pair_steps} steps of the teacher")
            labels = np.arange(cfg.pairs) % teacher.label_dim if teacher.label_dim else None
            sampler, batch = heun(teacher, cfg.pair_steps), self.cfg.eval.batch
            self.ranks.alone(lambda: write_pairs(path, teacher, sampler, labels, cfg.pairs, batch, self.device))
        tensors, _ = read_tensors(path)
        y = tensors["y"].to(self.device).float() / 127.5 - 1
        classes = tensors["labels"] if "labels" in tensors else None
        rows = None if classes is None else one_hot(classes.numpy(), teacher.label_dim).to(self.device)
        return Pairs(tensors["z"].to(self.device), y, rows)

    def stage(
        self, method: Method, cfg: TrainConfig, folder: Path, student: int | None = None, guard: Guard | None = None,
        spare: Sequence[Denoiser] = (),
    ) -> Run:  # fmt: skip
        """Train a method's nets to the end of cfg, in `folder`; of several students, one on its share.

        spare: nets that wait in host memory meanwhile, where the method has them in shards.
        """
        classes = self.partition.classes(student) if self.partition and student is not None else None
        for net in method.nets.values():
            net.to(self.device)
        run = Run(method, cfg, self.cfg.seed + 1_000_003 * (student or 0), self.device, classes, self.ranks)
        run.guard = guard
        if run.sharded and cfg.fsdp.teacher == "shard":
            for net in spare:
                net.cpu()
        hooks = [Hook(cfg.grid_kimg or cfg.kimg / 10, lambda run: self.draw(run, folder))]
        if cfg.eval_kimg:
            hooks.append(Hook(cfg.eval_kimg, lambda run: self.evaluate_within(run, folder)))
        title = method.product if folder == self.dir else folder.name
        stream = self.stream(cfg, classes, run.window)
        profile = Profile(folder) if self.cfg.profile and self.ranks.first else None
        group = self.dir.resolve().name
        train(run, stream.at, folder, title=title, log=self.cfg.log, hooks=hooks, profile=profile, group=group)
        self.graphs[title] = run.graph_report()
        return run

    def stream(self, cfg: TrainConfig, classes: list[int] | None, window: slice = slice(None)) -> Any:
        """This rank's images of every batch."""
        if self.images is None:
            return NoImages(len(range(*window.indices(cfg.batch))), self.device)
        data, images = self.cfg.data, self.images if classes is None else self.images.subset(classes)
        return Stream(
            images, batch=cfg.batch, seed=self.cfg.seed, flips=data.flips, workers=data.workers, device=self.device, window=window
        )

    def draw(self, run: Run, folder: Path) -> dict[str, float]:
        """A grid of samples from the same noise every time."""
        net: Any = run.average()

        def write() -> None:
            pictures = self.samples(net, run.method.sampler)
            save_png(grid(pictures, columns=self.columns(net)), folder / "samples" / f"{round(run.images_seen):010d}.png")

        self.ranks.alone(write)
        return {}

    def evaluate_within(self, run: Run, folder: Path) -> dict[str, float]:
        """The Frechet distance now, labelled with its n; the best average so far is kept as a weight file."""
        net: Any = run.average()
        result: Any = self.ranks.agree(self.ranks.alone(lambda: self.score(net, run.method.sampler)))
        if result["fd"] < run.best:
            run.best = result["fd"]
            chosen = {"metric": f"{result['features']}@{result['n']}", "best_of": run.times(run.cfg.eval_kimg or run.cfg.kimg)}
            self.save(run, folder / "checkpoints" / "best.safetensors", chosen_by=chosen)
        return {f"fd@{result['n']}": result["fd"]}

    def measure(self, teacher: Denoiser, student: Denoiser) -> dict[str, Any]:
        """Frechet distances of teacher, student and real images, and samples.png."""
        sheets: dict[str, Any] = {}
        if self.images is not None:
            shown = [int(i) for i in self.shown_images()]
            sheets["real"] = torch.from_numpy(np.stack([self.images.read(i) for i in shown]))
        nets = {"teacher": (teacher, self.teacher_sampler(teacher)), "student": (student, self.sampler)}
        for name, (net, sampler) in nets.items():
            sheets[f"{name}, {sampler.nfe} evaluation{'s' * (sampler.nfe > 1)}"] = self.samples(net, sampler)
        save_png(sheet(sheets, columns=self.columns(student)), self.dir / "samples.png")
        if self.images is None:
            return {name: {"nfe": sampler.nfe} for name, (_, sampler) in nets.items()}
        against = self._reference
        found: dict[str, Any] = {"floor": {"fd": against.floor, "kind": against.floor_kind}}
        for name, (net, sampler) in nets.items():
            found[name] = self.score(net, sampler, progress=f"measuring the {name}")
        return found

    def summary(self, teacher: Denoiser, measured: dict[str, Any]) -> dict[str, Any]:
        students = [read_metadata(f) for f in self.student_files()]
        meta = read_metadata(self.checkpoint or self.dir / "teacher.safetensors")
        teacher_seconds = meta.get("seconds", 0.0)
        return {
            "name": self.dir.name,
            "method": self.cfg.method.name,
            **measured,
            "seconds": {
                "teacher": round(teacher_seconds, 1),
                "student": round(sum(meta["seconds"] for meta in students), 1),
                "this_call": round(time.perf_counter() - self.began, 1),
            },
            "images_seen": {
                "teacher": round(1000 * meta.get("kimg", 0)),
                "student": round(sum(1000 * meta["kimg"] for meta in students)),
            },
            "parameters": sum(p.numel() for p in teacher.parameters()),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"cpu x{torch.get_num_threads()}",
            "precision": str(self.dtype).removeprefix("torch."),
            "graphs": self.graphs,
            "seed": self.cfg.seed,
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        }

    def student_files(self) -> list[Path]:
        folders = [student_folder(self.dir, k) for k in range(self.cfg.students.count)] if self.partition else [self.dir]
        return [folder / "student.safetensors" for folder in folders]

    def samples(self, net: Denoiser, sampler: Sampler) -> torch.Tensor:
        """60 images from fixed noise, classes in columns."""
        labels = np.resize(self.shown_classes(net.label_dim), self.shown) if net.label_dim else None
        return torch.cat(list(generate(net, sampler, labels, range(self.shown), device=self.device)))

    shown = 60  # divides into rows of 10 classes

    def columns(self, net: Denoiser) -> int:
        classes = len(self.shown_classes(net.label_dim))
        return classes if net.label_dim and classes > 1 else 10

    def shown_classes(self, label_dim: int) -> np.ndarray:
        """The classes in the columns of a grid: the first ten that have images; without labelled data, the first ten."""
        labels = None if self.images is None else self.images.labels
        return (np.arange(label_dim) if labels is None else np.unique(labels))[:10]

    def shown_images(self) -> np.ndarray:
        """As many real images as a grid shows; of a labelled set, classes in columns like the samples."""
        assert self.images is not None
        if self.images.labels is None:
            return np.linspace(0, len(self.images) - 1, self.shown).astype(int)
        of_class = [np.flatnonzero(self.images.labels == c) for c in self.shown_classes(self.images.label_dim)]
        columns = len(of_class)
        return np.array([of_class[i % columns][(i // columns) % len(of_class[i % columns])] for i in range(self.shown)])

    def teacher_sampler(self, teacher: Denoiser) -> Sampler:
        """EDM's Heun; a teacher that is a student of an earlier stage is sampled as it was trained."""
        own = taught_sampler(self.checkpoint) if self.checkpoint else None
        return own or heun(teacher, self.cfg.teacher.loss.sampling_steps)

    @cached_property
    def features(self) -> Features:
        return features_by_name(self.cfg.eval.features).to(self.device)

    @cached_property
    def _score_settings(self) -> dict[str, Any]:
        assert self.images is not None
        cfg = self.cfg.eval
        return {"n": cfg.n or min(len(self.images), 50_000), "seed": cfg.seed, "batch": cfg.batch, "device": self.device}

    @cached_property
    def _reference(self) -> Reference:
        assert self.images is not None
        return reference(self.images, self.features, **self._score_settings)

    def score(self, net: Denoiser, sampler: Sampler, progress: str | None = None) -> dict[str, Any]:
        """The Fréchet distance of this net's images from the data, with everything needed to repeat it."""
        assert self.images is not None
        settings = self._score_settings | {"against": self._reference, "progress": progress}
        return score(net.eval(), sampler, self.images, self.features, **settings)

    def prepared(self, net: Any, stage: TrainConfig | None = None) -> Any:
        """A net on the device, computing in the precision of this run and keeping what its stage says; null: distillation."""
        set_checkpointing(net, (stage or self.cfg.train).activation_checkpointing)
        for module in net.modules():
            if isinstance(module, Denoiser):
                module.compute_dtype = self.dtype
        return net.to(self.device)

    def save(self, run: Run, path: Path, **more: Any) -> None:
        product = run.average()
        assert isinstance(product, Denoiser)
        self.ranks.alone(lambda: save_net(
            path, product, sampler=run.method.sampler.to_dict(), kimg=run.kimg, seconds=round(run.seconds, 1),
            method=self.cfg.method.name if run.method.product == "student" else "teacher",
            data=self.images.name if self.images else "none", **self.inherited, **more,
        ))  # fmt: skip

    def there(self, path: Path) -> bool:
        """Did this file exist when rank 0 looked?"""
        return self.ranks.agree(path.exists())

    def tell(self, text: str) -> None:
        if self.ranks.first:
            tell(text)

    @cached_property
    def inherited(self) -> dict[str, Any]:
        """What a weight file of this run has from its teacher's: the licence, and which teacher it was."""
        if not (path := self.checkpoint):
            return {}
        own = read_metadata(path)
        teacher = {key: own[key] for key in ("source", "sha256") if key in own} or own.get("teacher") or {"source": path.name}
        return {"teacher": teacher} | ({"license": own["license"]} if "license" in own else {})


class NoImages:
    """The stream of a data-free run: no labels, and blank images that only say how many."""

    def __init__(self, batch: int, device: torch.device):
        self.blank = torch.zeros(batch, 1, 1, 1, device=device)

    def at(self, step: int) -> tuple[torch.Tensor, None]:
        return self.blank, None


def tell(text: str) -> None:
    print(text, file=sys.stderr)


def tell_result(summary: dict[str, Any], folder: Path) -> None:
    """The run in a few lines on stdout."""
    for name in ("floor", "teacher", "student"):
        if "fd" in (one := summary.get(name, {})):
            nfe = f"  NFE {one['nfe']:>3}" if "nfe" in one else "         "
            print(f"{name:8}{nfe}  FD {one['fd']:.3f}")
    seconds = summary["seconds"]
    print(f"teacher {seconds['teacher']:.0f} s, student {seconds['student']:.0f} s; look at {folder}/samples.png, {folder}/report.html")
