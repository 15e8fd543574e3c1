"""One run: the teacher is trained if need be, then the student or students, then it is measured, drawn and reported."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from potstill.engine.common.class_names import first_unlike
from potstill.engine.common.errors import harmless
from potstill.engine.config import unused
from potstill.engine.config.schema import Config
from potstill.engine.data.images import data_variance
from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.formats.newborn import write_newborn, write_trained
from potstill.engine.formats.pictures import save_png
from potstill.engine.jobs import build, preflight, told
from potstill.engine.jobs.curve import POINTS, CurveOf, size_of
from potstill.engine.jobs.finish import Distance, Gallery, Nets, Shown, draw, looked_closer, measured, print_result, summary_of
from potstill.engine.jobs.folder import check_folder, prepare, write_json
from potstill.engine.jobs.inputs import marks_of, note_inputs, text_marks
from potstill.engine.jobs.lock import COMMON, lock, lock_run
from potstill.engine.jobs.progress import tell, tell_end, telling
from potstill.engine.jobs.shares import Shares, keep_shares, read_shares, try_shares
from potstill.engine.jobs.students import earlier_place, earlier_weights, has_begun, listed
from potstill.engine.jobs.workplace import Share, Workplace
from potstill.engine.measure.report import NEIGHBOURS, write_report
from potstill.engine.methods.base import Method
from potstill.engine.methods.msd import TSM
from potstill.engine.methods.teacher import Teacher
from potstill.engine.models.decoding import first_three
from potstill.engine.models.opening import PLACE
from potstill.engine.models.origins import INDEX, OWN, is_pipeline
from potstill.engine.models.partitions import AnyPartition, Partition
from potstill.engine.models.router import MANIFEST, Router, load_router, student_folder, write_manifest
from potstill.engine.models.weights import load_net
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.diffusers import DiffusersDenoiser
from potstill.engine.nets.lora import note_of_rank
from potstill.engine.skipping.apply import Guard
from potstill.engine.training.loop import Hook, train
from potstill.engine.training.profile import Profile
from potstill.engine.training.ranks import ALONE, Ranks
from potstill.engine.training.run import Run, TrainConfig


class Job(Workplace):
    """One run folder. What is done in it already is not done again."""

    def __init__(self, cfg: Config, *, on_paper: bool = False, ranks: Ranks = ALONE):
        """Check everything that can be checked before work begins. `on_paper`: of what is there, and leave the run folder alone."""
        self.began, self.lock = time.perf_counter(), ExitStack()
        preflight.check_settings(cfg, ranks.count)
        if not on_paper:
            preflight.fetch_teacher(cfg)
        notes = check_folder(cfg)
        super().__init__(cfg, ranks)
        for note in notes:
            self.say(note)
        self.graphs: dict[str, Any] = {}  # of every stage of this call: what was replayed and what was not
        self.shown = Shown()
        self.gallery = Gallery(self.images, self.device, self.shown, self.class_names)
        measured = self.images is not None or cfg.eval.scores
        self.distance = Distance(cfg.eval, self.images, self.device, self.shown) if measured else None
        self.on_paper = preflight.check_on_paper(cfg, self.images, self.dir, ranks)
        self.partition: AnyPartition | None = self.on_paper.partition  # of prompts once these are embedded
        self.shares: Shares | None = None
        self.shown.decode = told.decode_of(cfg, self.on_paper.teacher, self.device)
        if self.shown.decode is first_three and not on_paper:
            self.say(
                "note: no VAE decodes these latents (teacher.vae): three of their channels are shown and measured as if they were pictures"
            )
        self.say_unused(self.on_paper.teacher)
        if (lora := self.on_paper.teacher.lora_of_copies) and (note := note_of_rank(self.on_paper.teacher.model, lora)):
            self.say(note)
        if (tried := self.distance) is not None:
            if self.images is not None and not (on_paper and preflight.unfetched(cfg.eval.features)):
                ranks.on_first(tried.try_features)
            prompt = told.a_prompt(cfg, self.images) if cfg.eval.scores else ""
            ranks.on_first(lambda: tried.try_scores(self.on_paper.teacher.shape, prompt))
        if preflight.without_data(cfg):
            self.say(
                f"note: no images at {cfg.data.path}: trains without, and shows pictures at its end; measure it later, with "
                f"`potstill evaluate {self.dir} --data FILE`, or by this same command once they are there"
            )
        if on_paper:
            if self.on_paper.teacher.text and cfg.students.count > 1:
                try_shares(cfg, self.images, self.dir, self.device, ranks)
            return
        preflight.check_complete(cfg)
        if not self.given_teacher and not self.exists(self.dir / "teacher.safetensors"):
            ranks.on_first(lambda: [extra.fetch() for extra in cfg.method.needs().extras])  # before hours of training, not after
        ranks.on_first(self.begin)
        if self.images is not None and (empty := self.on_paper.empty):
            self.say(f"note: {self.images.name} has no images of {listed(empty)}: left out of the grids and distances")
        if self.images is not None and (unlike := first_unlike(self.images.classes or [], self.class_names or [])):
            k, here, there = unlike
            self.say(
                harmless(f"note: class {k} is {here} in {self.images.name} and {there} to the teacher: see that both number them alike")
            )
        among = f"{ranks.count} ranks, {cfg.train.parallel}, " if ranks.count > 1 else ""
        self.say(f"{self.dir}: {among}{self.device.type}, {str(self.dtype).removeprefix('torch.')} U-Nets ({self.why_dtype})")

    def begin(self) -> None:
        """Take the run folder, and write down what the run begins with. UserError where another process works in it."""
        self.lock = lock_run(self.cfg)
        with self.shared_files():
            prepare(self.cfg)
            note_inputs(self.dir, self.on_paper.marks)
            write_json(self.dir / PLACE, {"folder": str(Path.cwd())})

    def say_unused(self, teacher: Denoiser) -> None:
        if note := unused.sentence(self.cfg, teacher, self.ranks.count):
            self.say(note)

    def run(self) -> dict[str, Any] | None:
        """Everything that is not done yet. Returns the summary; None if other students of this run are still missing."""
        with self.lock, telling(self.dir, self.ranks.several) if self.tells else nullcontext():
            return self.all_stages()

    @property
    def tells(self) -> bool:
        """Does this process keep report.html up to date while it works? Not where jobs of several students share the folder."""
        return self.ranks.first and self.cfg.student is None

    def all_stages(self) -> dict[str, Any] | None:
        with self.shared_work():
            self.open_told()
            teacher = self.teacher()
            start = self.matched_start(teacher)
            self.ranks.on_first(
                lambda: note_inputs(self.dir, marks_of(self.cfg, None, teacher) | (text_marks(self.cfg) if teacher.text else {}))
            )
        count = self.cfg.students.count
        for k in range(count) if self.cfg.student is None else (self.cfg.student,):
            student, sampler = self.distil(teacher, start, k)
        if self.partition:
            missing = [k for k in range(count) if not self.exists(self.student_file(k))]
            if missing:
                self.say(f"student {self.cfg.student} of {count} is done; the run is measured when {missing} are, too")
                return None
            partition = self.partition
            self.ranks.on_first(lambda: write_manifest(self.dir, partition))
            student = self.prepared(load_router(self.dir / MANIFEST)[0])
            self.given_null(student)
        nets = {"teacher": (teacher, build.teacher_sampler(self.cfg, teacher)), "student": (student, sampler)}
        return self.ranks.on_first(lambda: self.finish(nets))

    def shared_files(self) -> AbstractContextManager[None]:
        """While rank 0 writes what all students share: jobs of several students take turns."""
        return nullcontext() if self.cfg.student is None else lock(self.dir / COMMON, wait=True)

    @contextmanager
    def shared_work(self) -> Iterator[None]:
        """The same for all ranks."""
        with ExitStack() as stack:
            self.ranks.on_first(lambda: stack.enter_context(self.shared_files()))
            yield

    # stages

    def fresh(self, student: int = 0) -> None:
        """New weights of a stage depend on the seed and the student alone, and not on what this call has done before."""
        torch.manual_seed(self.seed_of(student))

    def seed_of(self, student: int) -> int:
        return self.cfg.seed + 1_000_003 * student

    def teacher(self) -> Denoiser:
        """The teacher of this run: the given file, the one trained here before, or a new one."""
        given, here = self.given_teacher, self.dir / "teacher.safetensors"
        if new := not given and not self.made(here):
            self.save(self.stage(self.new_teacher(), self.cfg.teacher.train, self.dir / "teacher"), here)
        teacher = self.given_null(self.prepared(self.loaded(given or here, self.weights_dtype)))
        if not given and isinstance(teacher, DiffusersDenoiser):
            self.ranks.on_first(lambda: write_trained(self.dir / OWN, teacher, again=new))
        return teacher

    def loaded(self, path: Path, dtype: torch.dtype) -> Denoiser:
        """A teacher's net, with adapters for its copies where the settings want some."""
        net = build.load_teacher(path, self.images, self.cfg.teacher, dtype=dtype)
        net.lora_of_copies = self.cfg.lora if self.cfg.lora.rank else None
        return net

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of a pipeline's own weights. What is trained is float32, or adapters that are."""
        auto = torch.bfloat16 if self.device.type == "cuda" and self.dtype is torch.bfloat16 else torch.float32
        return {"auto": auto, "fp32": torch.float32, "bf16": torch.bfloat16}[self.cfg.teacher.precision]

    def open_told(self) -> None:
        """Embed the prompts of a teacher that is told some; of one that is trained here its pipeline is made before."""
        if not self.on_paper.teacher.text:
            return
        if not self.given_teacher and not self.exists(self.dir / OWN / INDEX):
            self.ranks.on_first(self.write_pipeline)
        self.told = embedded = told.open_told(self.cfg, self.images, self.dir, self.device, self.ranks)
        self.shown.prompts, self.shown.held_out = embedded.captions or embedded.prompts, embedded.held_out
        if (count := self.cfg.students.count) > 1:
            self.ranks.on_first(lambda: keep_shares(self.cfg, embedded, self.dir))
            self.shares = read_shares(self.dir, count, embedded)
            self.partition = self.shares.partition

    def write_pipeline(self) -> None:
        assert self.images is not None
        with torch.device("meta"):
            net = build.fresh_teacher(self.cfg, self.images)
        assert isinstance(net, DiffusersDenoiser)
        write_newborn(self.dir / OWN, net, build.encoder_of(self.cfg), self.images.captions or [])

    def given_null(self, net: Denoiser | Router) -> Any:
        """A net that is told prompts, told the null prompt as well."""
        if isinstance(net, DiffusersDenoiser | Router) and self.told is not None and self.told.prompts.null is not None:
            net.null = self.told.prompts.null
        return net

    def new_teacher(self) -> Teacher:
        """The training of a teacher that knows nothing yet."""
        assert self.images is not None
        self.fresh()
        net = self.given_null(build.fresh_teacher(self.cfg, self.images))
        return Teacher(self.cfg.teacher.loss, self.prepared(net, self.cfg.teacher.train))

    def matched_start(self, teacher: Denoiser) -> Denoiser:
        """What the students start as: the teacher, or a net of another shape that has learnt its scores (TSM)."""
        students = self.cfg.students
        if students.net is None:
            whole = not self.cfg.lora.trains("student") and self.weights_dtype is not torch.float32
            again = whole and self.given_teacher is not None and is_pipeline(self.given_teacher)
            own = self.loaded(self.given_teacher, torch.float32) if again else teacher  # pyright: ignore[reportArgumentType]
            return self.given_null(self.prepared(own)) if again else teacher
        here = self.dir / "tsm.safetensors"
        if not self.made(here):
            self.fresh()
            net = self.given_null(build.student_net(students.net, teacher))
            method = TSM(teacher, self.prepared(net, students.tsm))
            self.save(self.stage(method, students.tsm, self.dir / "tsm"), here)
        return self.given_null(self.prepared(load_net(here)[0]))

    def distil(self, teacher: Denoiser, start: Denoiser, k: int) -> tuple[Denoiser, Sampler]:
        """Student k (the average of its weights), trained on its share of classes or prompts if there are several; how it is sampled."""
        self.fresh(k)
        method = self.cfg.method.build(teacher, start)
        if (earlier := earlier_place(self.cfg, k)) and not self.ranks.agree(has_begun(self.cfg, k)):
            for name, weights in earlier_weights(method, earlier).items():
                method.nets[name].load_state_dict(weights, strict=False)  # parts that it may lack stay new, and optimisers are new
        if wanted := self.cfg.method.needs().pairs:
            with self.shared_work():
                method.pairs = self.pairs(teacher, wanted)
        for note in method.notes:
            self.say(note)
        sampler = method.sampler
        share = k if self.partition else None
        curve = self.curve(teacher, sampler, share, self.student_file(k).parent)
        guard = build.lighten(method, self.cfg.skipping, self.say)
        run = self.stage(method, self.cfg.train, self.student_file(k).parent, share, guard, spare=(teacher, start), curve=curve)
        self.prepared(teacher)
        self.save(run, self.student_file(k), **self.part_of(share))
        average = run.average()
        assert isinstance(average, Denoiser)
        return average, sampler

    def part_of(self, student: int | None) -> dict[str, Any]:
        """What the weight file of one of several students says of its part."""
        return {} if student is None or self.partition is None else {"partition": self.partition.hash, "student": student}

    def student_file(self, k: int) -> Path:
        return (student_folder(self.dir, k) if self.partition else self.dir) / "student.safetensors"

    def stage(
        self, method: Method, cfg: TrainConfig, folder: Path, student: int | None = None, guard: Guard | None = None,
        spare: Sequence[Denoiser] = (), curve: CurveOf | None = None,
    ) -> Run:  # fmt: skip
        """Train a method's nets to the end of cfg, in `folder`; of several students, one on its share.

        spare: nets that wait in host memory meanwhile, where the method has them in shards. curve: what is measured in the run.
        """
        share = self.share(student)
        for net in method.nets.values():
            net.to(self.device)
        method.data_variance = data_variance(share.images)
        run = Run(method, cfg, self.seed_of(student or 0), self.device, share.classes, self.ranks)
        run.guard = guard
        if run.sharded and cfg.fsdp.teacher == "shard":
            for net in spare:
                net.cpu()
        hooks = [Hook(cfg.grid_kimg or cfg.kimg / 10, lambda run: self.draw(run, folder))]
        if cfg.eval_kimg and self.distance is not None:
            hooks.append(Hook(cfg.eval_kimg, lambda run: self.evaluate_within(run, folder)))
        if curve is not None:
            hooks.append(Hook(cfg.kimg / POINTS, lambda run: self.point(run, curve)))
        if cfg.phema:
            hooks.append(Hook(cfg.between_profiles, lambda run: self.keep_profiles(run, folder, **self.part_of(student))))
        title = method.product if folder == self.dir else folder.name
        if self.tells:
            tell(self.dir, title, run)
        hooks.append(Hook(min(hook.kimg for hook in hooks), lambda run: self.tell(run, title)))
        stream = self.stream(cfg, share, run.batches.window, method.asks)
        profile = Profile(folder) if self.cfg.profile and self.ranks.first else None
        group = self.dir.resolve().name
        train(run, stream.at, folder, title=title, log=self.cfg.log, hooks=hooks, profile=profile, group=group)
        self.graphs[title] = run.graph_report()
        return run

    def share(self, student: int | None = None) -> Share:
        """Everything there is, or what one of several students has of it."""
        whole = super().share()
        if student is None or self.partition is None:
            return whole
        if self.shares is not None:
            return self.shares.of(student, whole)
        assert isinstance(self.partition, Partition)
        classes = self.partition.classes(student)
        return Share(None if self.images is None else self.images.subset(classes), None, classes)

    def draw(self, run: Run, folder: Path) -> dict[str, float]:
        """A grid of samples from the same noise every time."""
        net, path = run.average(), folder / "samples" / f"{run.images_seen:010d}.png"
        assert isinstance(net, Denoiser)
        self.ranks.on_first(lambda: save_png(self.gallery.grid(net, run.method.sampler), path))
        return {}

    def tell(self, run: Run, title: str) -> dict[str, float]:
        """What there is by now, in report.html."""
        if self.tells:
            tell(self.dir, title, run)
        return {}

    def evaluate_within(self, run: Run, folder: Path) -> dict[str, float]:
        """The Fréchet distance now, labelled with its n, and the scores; the best average by distance so far is kept as a weight file."""
        assert self.distance is not None
        distance, net = self.distance, run.average()
        assert isinstance(net, Denoiser)
        result: Any = self.ranks.agree(self.ranks.on_first(lambda: distance.of(net, run.method.sampler)))
        if result.get("fd", math.inf) < run.best:
            run.best = result["fd"]
            chosen = {"metric": f"{result['features']}@{result['n']}", "best_of": run.times(run.cfg.eval_kimg or run.cfg.kimg)}
            self.save(run, folder / "checkpoints" / "best.safetensors", chosen_by=chosen)
        distances = {f"fd@{result['n']}": result["fd"]} if "fd" in result else {}
        return distances | {f"score/{figure}": mean for figure, mean in result.get("scores", {}).items()}

    def curve(self, teacher: Denoiser, sampler: Sampler, student: int | None, folder: Path) -> CurveOf | None:
        """What the student's distance is measured with while it learns, where no other measurement is asked for. The teacher's is noted."""
        share, cfg, walk = self.share(student), self.cfg, build.teacher_sampler(self.cfg, teacher)
        if cfg.train.eval_kimg is not None or share.images is None:
            return None
        n = size_of(share.images, self.shown.decode, cfg.train.kimg, sampler, walk)
        if n is None:
            return None
        prompts = (share.told.captions or share.told.prompts) if share.told else None
        found = CurveOf(share.images, n, min(cfg.eval.batch, cfg.train.batch), self.device, prompts, self.shown.decode)
        self.ranks.on_first(lambda: found.note_levels(folder, teacher, walk))
        return found

    def point(self, run: Run, curve: CurveOf) -> dict[str, float]:
        net = run.average()
        assert isinstance(net, Denoiser)
        return {curve.name: self.ranks.agree(self.ranks.on_first(lambda: curve.of(net, run.method.sampler)) or 0.0)}

    # the end

    def finish(self, nets: Nets) -> dict[str, Any]:
        """Measure, and write what a user looks at."""
        if self.tells:
            tell(self.dir, "measuring teacher and student")
        found = self.measure(nets)
        files = [self.student_file(k) for k in range(self.cfg.students.count)]
        summary = summary_of(self, files, nets["teacher"][0], found, self.graphs, time.perf_counter() - self.began)
        write_json(self.dir / "summary.json", summary)
        if self.tells:
            tell_end(self.dir)
        write_report(self.dir)
        print_result(summary, self.dir, given=self.given_teacher is not None)
        return summary

    def measure(self, nets: Nets) -> dict[str, Any]:
        """samples.png, and the distances of teacher, student and real images."""
        draw(nets, self.gallery, self.dir / "samples.png")
        found = measured(nets, self.distance)
        found["student"] |= looked_closer(nets, self.gallery, self.distance, self.dir / NEIGHBOURS)
        return found
