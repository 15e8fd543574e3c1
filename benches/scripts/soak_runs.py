"""Trainings that soak.py disturbs: a run is a forked child, killed like any process and started in no time; and what it leaves.

A case is a recipe in a size of seconds. Its reference is the same run that nobody disturbed.
"""

import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

#: A teacher of 8 iterations and a student of 16, with a log line every second and a checkpoint every fourth.
SMALL = [
    "net.model_channels=8", "net.channel_mult=[1]", "net.num_blocks=1", "net.attn_resolutions=[]", "precision=fp32", "log.tensorboard=false",
    "teacher.loss.sampling_steps=2", "teacher.train.kimg=0.064", "teacher.train.batch=8", "teacher.train.log_iterations=2",
    "teacher.train.checkpoint_kimg=0.032", "teacher.train.grid_kimg=1", "train.kimg=0.128", "train.batch=8", "train.log_iterations=2",
    "train.checkpoint_kimg=0.032", "train.keep=3", "train.grid_kimg=1", "eval.n=16", "eval.batch=16",
]  # fmt: skip
INSTANT = ["method=moment_matching_instant", "method.steps=4", "method.weight=flat", "method.measure_batch=8", "method.measure_every=8"]
TSM = [
    "students.tsm.kimg=0.064",
    "students.tsm.batch=8",
    "students.tsm.log_iterations=2",
    "students.tsm.checkpoint_kimg=0.032",
    "students.tsm.grid_kimg=1",
]
SHAPE = (
    "{precond: EDMPrecond, model_type: SongUNet, model_channels: 4, channel_mult: [1], num_blocks: 1, attn_resolutions: [], dropout: 0.0}"
)
#: {inputs}: a folder with what `prepare` puts there, one for each run.
CASES = {
    "dmd": ["digits"],
    "dmd2": ["digits", "method=dmd2"],
    "sim": ["digits_sim"],
    "sim_l2": ["digits_sim", "method=sim_l2"],
    "sid": ["digits_sim", "method=sid"],
    "sida": ["digits_sida", "method.student_after=0.032", "method.gan_after=0.064"],
    "gdd": ["digits_gdd"],
    "gdd_i": ["digits_gdd", "method=gdd_i"],
    "moment_matching": ["digits_moment_matching"],
    "instant": ["digits_sfd", *INSTANT],
    "sfd": ["digits_sfd"],
    "sfd_v": ["digits_sfd", "method=sfd_v"],
    "sfd_second": ["digits_sfd", "method=sfd_second", "method.lpips=0", "teacher.checkpoint={inputs}/sfd_v.safetensors"],
    "msd": ["digits_msd"],
    "msd_s": ["digits_msd", *TSM, f"students.net={SHAPE}"],
    "zip": ["digits", "data.path={inputs}/digits.zip", "data.workers=1"],  # by a worker process: too large for memory, it is told
    "rare log": ["digits", "train.log_iterations=10"],
    "rollback": ["digits", "train.on_nonfinite=rollback"],
}
LIMIT = 150.0  # seconds of one command before it counts as hanging; undisturbed it takes three, more on a busy machine
LEFT_BEHIND = 15.0  # seconds until processes that a run has started must have noticed that it is gone


class Case(NamedTuple):
    """Which run: a key of CASES, how many ranks, and how they share it."""

    name: str
    ranks: int = 1
    parallel: str = "ddp"

    def __str__(self) -> str:
        return self.name if self.ranks == 1 else f"{self.name}, {self.ranks} ranks, {self.parallel}"

    @property
    def key(self) -> str:
        return str(self).replace(", ", "-").replace(" ", "-")

    def arguments(self, folder: Path, extra: Sequence[str] = ()) -> list[str]:
        shared = [f"train.parallel={self.parallel}"] if self.ranks > 1 else []
        return (
            [text.replace("{inputs}", str(folder.parent / "inputs")) for text in CASES[self.name]]
            + SMALL
            + shared
            + [*extra, f"run_dir={folder}"]
        )


class Ended(NamedTuple):
    """codes: of each rank; negative: its signal. None: it hung. said: what all of them wrote."""

    codes: list[int | None]
    said: str
    left: int  # processes that were still there

    @property
    def last_line(self) -> str:
        """But for those that only belong to another."""
        return next((line for line in reversed(self.said.splitlines()) if line[:1].strip()), "")

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("error:")]


class Command:
    """`potstill train` of a case in a folder, in a process of its own for each rank.

    disturb: called in each child before it begins, with its rank. extra: other settings.
    """

    def __init__(
        self, case: Case, work: Path, folder: Path, disturb: Callable[[int], None] | None = None, extra: Sequence[str] = ()
    ):  # fmt: skip
        self.out = work / f"said/{folder.parent.name}.{time.monotonic_ns()}.txt"
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with closing(socket.socket()) as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        given = case.arguments(folder, extra), self.out, disturb
        self.ranks = [fork.Process(target=_child, args=(rank, case, port, *given)) for rank in range(case.ranks)]
        for rank in self.ranks:
            rank.start()

    def wait(self, limit: float = LIMIT) -> Ended:
        """Until all ranks have ended, or the limit has passed: then they are killed."""
        deadline = time.monotonic() + limit
        for rank in self.ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        codes = [rank.exitcode for rank in self.ranks]
        deadline = time.monotonic() + (LEFT_BEHIND if None not in codes else 0)
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.kill()
        return Ended(codes, self.out.read_text(errors="replace"), left if None not in codes else 0)

    def left(self) -> int:
        """How many processes of the ranks' sessions are still there."""
        sessions = {rank.pid for rank in self.ranks}
        found = 0
        for file in Path("/proc").glob("[0-9]*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                state, _, _, session = file.read_text().rpartition(")")[2].split()[:4]
                found += int(session) in sessions and state not in "ZX"
        return found

    def signal(self, signum: int, *, everybody: bool = False) -> None:
        """To each rank, or to all processes of its group as a terminal does it."""
        for rank in self.ranks:
            assert rank.pid is not None
            with suppress(ProcessLookupError):
                (os.killpg if everybody else os.kill)(rank.pid, signum)

    def kill(self) -> None:
        self.signal(signal.SIGKILL, everybody=True)
        for rank in self.ranks:
            rank.join()


def _child(rank: int, case: Case, port: int, arguments: list[str], out: Path, disturb: Callable[[int], None] | None) -> None:
    from potstill.engine.common.cli import run
    from potstill.engine.train import main

    with suppress(PermissionError):
        os.setsid()  # loader workers end with it when the soak kills what is left
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)
    if case.ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(case.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if case.name == "zip":
        no_memory()
    if disturb is not None:
        disturb(rank)
    run(main, arguments)


def no_memory() -> None:
    """Let every data set be too large for memory, so that worker processes read it."""
    from potstill.engine.data.sampler import Stream

    assert Stream.__init__.__kwdefaults__
    Stream.__init__.__kwdefaults__["memory"] = 0


def preload() -> None:
    """Import what a run imports, also late, so that a forked child need not. Computes nothing: no thread must be there."""
    import sklearn.datasets
    import torch
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor

    import potstill.engine.train
    from potstill.engine.data.images import open_images
    from potstill.engine.jobs.machine import set_algorithms

    torch.set_num_threads(1)  # OMP_NUM_THREADS=1 comes too late for some
    set_algorithms(None, False, torch.device("cpu"))
    open_images("digits")
    assert sklearn.datasets
    assert potstill.engine.train
    gc.freeze()  # else every child's first collection copies all pages


# what a run leaves


def results(folder: Path) -> dict[str, Any]:
    """What must be the same in two runs that shall be one: metrics without clocks, weights by their hash, distances."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("metrics.jsonl")):
        found[str(path.relative_to(folder))] = [
            {key: value for key, value in json.loads(line).items() if key not in ("seconds", "images_per_second")}
            for line in path.read_text().splitlines()
        ]
    for path in sorted(folder.rglob("*.safetensors")):
        found[str(path.relative_to(folder))] = hash_of(path)
    summary = json.loads((folder / "summary.json").read_text())
    found["summary.json"] = {name: summary[name]["fd"] for name in ("floor", "teacher", "student")}
    return found


def hash_of(path: Path) -> str:
    """Of the tensors of a safetensors file, their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def difference(wanted: dict[str, Any], got: dict[str, Any]) -> str:
    """The first difference in words; "" where there is none."""
    if wanted.keys() != got.keys():
        return f"files differ: {', '.join(sorted(wanted.keys() ^ got.keys()))}"
    for name, one in wanted.items():
        if one != got[name]:
            if not isinstance(one, list):
                return f"{name} differs"
            other = got[name]
            at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
            return f"{name} differs from line {at + 1} on, of {len(one)} and {len(other)}"
    return ""


def lines_lost(wanted: dict[str, Any], got: dict[str, Any]) -> bool:
    """Is the only difference that metrics lack lines which they had? Alarms look back at lines, so that they may differ then."""
    kept = {name: one for name, one in got.items() if not isinstance(one, list)}
    same = kept == {name: one for name, one in wanted.items() if not isinstance(one, list)}
    return same and all(
        line in wanted.get(name, ()) for name, one in got.items() if isinstance(one, list) for line in one if "alarm" not in line
    )


def reference(case: Case, work: Path) -> dict[str, Any]:
    """The results of the case undisturbed, and its seconds: run now unless that was done."""
    folder = work / "reference" / case.key / "run"
    done = folder.with_name("done.json")
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        copy_inputs(case, work, folder.parent)
        began = time.monotonic()
        ended = Command(case, work, folder).wait()
        if any(code != 0 for code in ended.codes):
            raise SystemExit(f"{case} does not even run undisturbed: {ended.codes} {ended.said}")
        done.write_text(json.dumps({"seconds": time.monotonic() - began, "results": results(folder)}))
    return json.loads(done.read_text())


def copy_inputs(case: Case, work: Path, place: Path) -> None:
    """The files that the case reads, in place/inputs."""
    if any("{inputs}" in text for text in CASES[case.name]):
        shutil.copytree(work / "inputs", place / "inputs", dirs_exist_ok=True)


def prepare(work: Path, cases: Sequence[Case]) -> None:
    """The files that cases read: a zip of digits, and a student that another goes on from."""
    write_digits(work / "inputs/digits.zip")
    if Case("sfd_second") in cases:
        reference(Case("sfd_v"), work)
        shutil.copy(work / "reference/sfd_v/run/student.safetensors", work / "inputs/sfd_v.safetensors")


def write_digits(path: Path, count: int = 200, shift: int = 0) -> None:
    """A zip of pictures with labels, in EDM's format: `count` digits from number `shift` on."""
    import io
    import zipfile

    from PIL import Image

    from potstill.engine.data.images import open_images

    images = open_images("digits")
    assert images.labels is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            picture, name = io.BytesIO(), f"00000/img{i:08d}.png"
            Image.fromarray(images.read(i + shift)[0]).save(picture, "png")
            archive.writestr(zipfile.ZipInfo(name), picture.getvalue())
            labels.append([name, int(images.labels[i + shift])])
        archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": labels}))
