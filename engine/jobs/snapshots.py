"""Runs that keep snapshots of what they train, to be measured afterwards: the clock of the training holds nothing else."""

from pathlib import Path
from typing import Any

from potstill.engine.diffusion.sampling import Sampler
from potstill.engine.jobs.finish import Nets
from potstill.engine.jobs.job import Job
from potstill.engine.models.opening import own_sampler
from potstill.engine.models.router import Router
from potstill.engine.models.weights import load_net
from potstill.engine.training.run import Run


class SnapshotJob(Job):
    """A run that writes its product every train.eval_kimg, and measures nothing itself."""

    def evaluate_within(self, run: Run, folder: Path) -> dict[str, float]:
        """Write the average of the weights as it is now; the file says after how many images and seconds."""
        self.save(run, folder / "snapshots" / f"{run.images_seen:010d}.safetensors")
        return {}

    def say_unused(self, teacher: Any) -> None:
        """Nothing: the teacher's file beside settings of its training is the comparison's doing, not the user's."""

    def measure(self, nets: Nets) -> dict[str, Any]:
        """Nothing: it is done for all methods at once, from the snapshots."""
        return {}


def snapshots_in(folder: Path) -> list[Path]:
    """The files that one net's training has written, the earliest first."""
    return sorted((folder / "snapshots").glob("*.safetensors"))


def snapshots_of(job: Job) -> list[list[Path]]:
    """The students' files of every moment: one, or one for each of several students that have seen as many images."""
    of_each = [snapshots_in(job.student_file(k).parent) for k in range(job.cfg.students.count)]
    return [list(files) for files in zip(*of_each, strict=True)]


def opened(job: Job, files: list[Path]) -> tuple[Any, Sampler, dict[str, Any]]:
    """The net of one moment, how it is sampled, and the images and seconds it took (of several students: the sum)."""
    loaded = [load_net(file) for file in files]
    nets, metas = [net for net, _ in loaded], [meta for _, meta in loaded]
    net = Router(nets, job.partition) if job.partition and len(nets) > 1 else nets[0]
    sampler = own_sampler(metas[0], files[0])
    assert sampler is not None
    took = {"images": round(1000 * sum(m["kimg"] for m in metas)), "seconds": round(sum(m["seconds"] for m in metas), 1)}
    return job.prepared(net).eval(), sampler, took
