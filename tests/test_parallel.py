"""Several ranks do what one does: every method step by step, resuming on fewer, and ends that are clean on all of them.

The ranks are forked from a server that has imported everything, so a world of them starts in a second.
"""

import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import parallel_cases as cases
import pytest
import torch
from patience import Patience, outlasted, until

from benches.rehearse import GPU, REHEARSING
from potstill.engine.common.errors import UserError
from potstill.engine.training import ranks as speech
from potstill.engine.training.checkpoint import checkpoints, load_newest
from potstill.engine.training.memory import fitting_micro_batch, peak_memory, sizes
from potstill.engine.training.parallel import FSDPConfig, check_shares, largest_part
from potstill.engine.training.ranks import ALONE
from potstill.engine.training.run import Run, Share, TrainConfig

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs/digits.yaml")
pytestmark = pytest.mark.parallel

# (method, parallel, settings): what several ranks do, compared with one process of these settings.
JOBS = [(method, parallel, {}) for method in cases.METHODS for parallel in ("ddp", "fsdp")]
MICRO = [
    ("gdd", "ddp", {"micro_batch": 2}),
    ("instant", "ddp", {"micro_batch": 2}),
    ("dmd", "fsdp", {"micro_batch": 1, "optimizer": "adam_ema"}),
    ("light", "ddp", {"micro_batch": 4}),
    ("sim", "ddp", {"micro_batch": 8}),
    ("sida", "ddp", {"micro_batch": 2}),
    ("few", "ddp", {"micro_batch": 2}),
]
COMPILED = [("sim", "ddp", {"compile": "net"}), ("sim", "fsdp", {"compile": "blocks"}), ("sida", "ddp", {"compile": "net"})]
OPTIONS = [
    ("sim", "fsdp", {"fsdp": FSDPConfig(reshard_after_forward=False, teacher="shard")}),
    ("dmd", "fsdp", {"fsdp": FSDPConfig(replicas=2)}),
]


@dataclass
class Ended:
    """What a world of ranks left behind."""

    codes: list[int | None]
    stderr: list[str]
    result: object


def world(tmp: Path, count: int, work: str, *arguments, quiet: float = 60, beats=None, ends: bool = False, preload=()) -> Ended:
    """Run work(ranks, *arguments) in `count` processes. When all stand still for `quiet` seconds those that are left are killed;
    unless `ends`, a test fails. preload: what the server imports besides."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["parallel_cases", "potstill.engine.train", *preload])
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    out = tmp / f"{work}{count}-{port}"
    given = (count, port, str(out), work, arguments, beats)
    ranks = [context.Process(target=cases.process, args=(rank, *given), daemon=True) for rank in range(count)]
    for rank in ranks:
        rank.start()
    patience, lost = Patience([rank.pid for rank in ranks], quiet=quiet, most=3600), ""
    while any(rank.is_alive() for rank in ranks) and not lost:
        next(rank for rank in ranks if rank.is_alive()).join(0.2)
        lost = patience.lost()
    late = [i for i, rank in enumerate(ranks) if rank.is_alive()]
    for i in late:
        ranks[i].kill()
        ranks[i].join()
    errors = "".join(file.read_text() for file in sorted(tmp.glob(out.name + ".*.error")))
    said = [Path(f"{out}.{i}.stderr").read_text() for i in range(count)]
    assert ends or not (late or errors), f"ranks {late} did not end: {lost}; {errors}{said}"
    codes = [None if i in late else rank.exitcode for i, rank in enumerate(ranks)]
    return Ended(codes, said, pickle.loads(out.read_bytes()) if out.exists() else None)


# --- the same numbers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    """One process, by method and micro_batch."""
    kinds = {(name, settings.get("micro_batch")) for name, _, settings in JOBS + MICRO + OPTIONS} - {("dmd", 1)}
    found = {}
    for name, micro in kinds:
        run = cases.new_run(name, ALONE, micro_batch=micro)
        found[name, micro] = cases.advance(run, cases.STEPS), cases.weights(run)
    return found | {("dmd", 1): found["dmd", None]}


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """All jobs on 2 and on 4 ranks."""
    tmp = tmp_path_factory.mktemp("several")
    return {count: world(tmp, count, "run_all", jobs(count)).result for count in (2, 4)}


def jobs(count: int) -> list[tuple[str, str, dict]]:
    return JOBS + (MICRO + COMPILED if count == 2 else OPTIONS)


@pytest.mark.parametrize(
    ("count", "job"),
    [(n, job) for n in (2, 4) for job in jobs(n)],
    ids=lambda v: "-".join(map(str, cases.key(*v))) if isinstance(v, tuple) else f"{v}",
)
def test_parallel_runs_match_the_run_of_one_process(alone, several, count, job):
    """Every logged number of 20 iterations, gradient norms included, and the weights and their average after them."""
    name, _, settings = job
    (curve, weights), (ours, our_weights) = alone[name, settings.get("micro_batch")], several[count][cases.key(*job)]
    assert len(ours) == cases.STEPS
    for step, (wanted, got) in enumerate(zip(curve, ours, strict=True)):
        assert wanted.keys() == got.keys(), step
        for key, value in wanted.items():
            assert got[key] == pytest.approx(value, rel=1e-5, abs=1e-5), f"{key} at iteration {step}"
    assert weights.keys() == our_weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(our_weights[key], value, rtol=0, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


# --- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", [("fsdp", "fsdp"), ("ddp", "fsdp")], ids="-".join)
def test_parallel_resume_on_fewer_ranks_continues_the_curve(tmp_path, alone, modes):
    """7 iterations on 4 ranks, 7 on 2, the rest in one process; shards and whole files are read by either."""
    folder, found = tmp_path / "checkpoints", []
    for count, mode in zip((4, 2), modes, strict=True):
        curve, _ = world(tmp_path, count, "part", str(folder), mode, 7).result
        found += curve
    assert [p.suffix for p in checkpoints(folder)] == [".pt" if mode == "ddp" else ".dcp" for mode in modes]
    run = cases.new_run("dmd", ALONE)
    run.load_state_dict(load_newest(folder, cases.CPU))
    assert run.meter.read() == {"x/loss": 0.5, "x/nonfinite": 2}  # ranks 0 and 1 were in the middle of a log interval
    found += cases.advance(run, cases.STEPS - 14)
    curve, weights = alone["dmd", None]
    for wanted, got in zip(curve, found, strict=True):
        got = {key: value for key, value in got.items() if not key.startswith("x/")}
        assert got == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    for key, value in cases.weights(run).items():
        torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-5)


def test_parallel_signal_to_one_rank_stops_all_at_one_iteration_with_a_checkpoint(tmp_path):
    steps = world(tmp_path, 2, "interrupted", str(tmp_path / "run")).result
    assert steps[0] == steps[1] in (6, 7)
    assert load_newest(tmp_path / "run/checkpoints", "cpu")["step"] == steps[0]
    lines = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines == [2, 4, 6]  # once, though two ranks ran


def test_parallel_checkpoint_index_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    folder = tmp_path / "checkpoints/00000001.dcp"
    folder.mkdir(parents=True)
    torch.save({"step": 1}, folder / "rest.pt")
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(
        UserError, match=r"asks for posix\.mkdir, which no tensor needs: it is no index of tensors, and nothing in it was executed"
    ):
        load_newest(tmp_path / "checkpoints", "cpu")
    assert not (tmp_path / "owned").exists()


# --- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.batch=33"], "train.batch = 33 does not divide among 2 ranks: use 32 or 34"),
        (
            [str(ROOT / "configs/digits_gdd.yaml"), "train.micro_batch=64"],
            "train.micro_batch = 64, over which this method takes batch statistics, does not divide the 32 images of each of 2 ranks (train.batch = 64): use 32, or null",
        ),
        (["train.batch=1"], "2 ranks want at least as many images per iteration, got train.batch = 1"),
        (["train.parallel=zero"], "train.parallel wants one of ddp, fsdp, got 'zero'"),
        (["train.micro_batch=all"], "train.micro_batch wants a number, auto or null, got 'all'"),
        (["train.parallel=fsdp", "train.fsdp.teacher=half"], "train.fsdp.teacher wants one of replicate, shard, got 'half'"),
        (["train.parallel=fsdp", "train.fsdp.replicas=3"], "train.fsdp.replicas = 3 does not divide the 2 ranks"),
        (["train.parallel=fsdp", "train.micro_batch=auto"], "train.micro_batch=auto cannot try sizes with sharded nets"),
        (
            [str(ROOT / "configs/cifar10_gdd_i.yaml"), "train.micro_batch=null", "train.parallel=fsdp", "train.fsdp.teacher=shard"],
            "train.fsdp.teacher=shard cannot be had with method gdd",
        ),
        (
            ["train.parallel=fsdp", "train.compile=net"],
            "train.compile=net wants whole nets, and train.parallel=fsdp cuts them at every block",
        ),
        (["train.parallel=fsdp", "skipping.cache=2"], "skipping compares gradients of whole nets, which train.parallel=fsdp does not have"),
        (["data.path={one}"], "one has 1 image, a run wants at least 2"),
        (["run_dir={file}/run"], "cannot write to run folder"),
        (["--dry-run"], "--dry-run and rehearse=true are for one process, got 2"),
    ],
    ids=lambda v: "" if isinstance(v, str) else v[-1],
)
def test_parallel_bad_input_is_one_sentence_and_code_2_on_all_ranks(tmp_path, arguments, words):
    (tmp_path / "file").write_text("")
    one_image(tmp_path / "one")
    given = [a.format(one=tmp_path / "one", file=tmp_path / "file") for a in arguments]
    recipe = given.pop(0) if given[0].endswith(".yaml") else DIGITS
    ended = world(tmp_path, 2, "command", recipe, f"run_dir={tmp_path}/run", "train.batch=64", *given)
    assert ended.codes == [2, 2], ended
    said = "".join(ended.stderr)
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert words in said


def test_parallel_fewer_images_than_ranks(tmp_path):
    settings = [f"run_dir={tmp_path}/run", "train.batch=66", "teacher.train.batch=66", "data.path=synthetic:8x1x0x2", "method.gan=false"]
    ended = world(tmp_path, 3, "command", DIGITS, *settings)
    assert ended.codes == [2, 2, 2]
    assert "".join(ended.stderr) == "error: 3 ranks want as many images, synthetic:8x1x0x2 has 2: start fewer\n"


def one_image(folder: Path) -> None:
    from PIL import Image

    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "a.png")


def test_parallel_error_of_one_rank_ends_all(tmp_path):
    ended = world(tmp_path, 2, "one_refuses", beats=(1.0, 600.0, 1.0), ends=True)
    assert ended.codes == [2, 2]
    assert "".join(ended.stderr) == "error: only rank 1 has seen this\n"


def test_parallel_rank_that_hangs_is_given_up(tmp_path):
    """STALE is 30 s in earnest; here as long as this machine takes for a start of two, since signs of life are as late."""
    begun = time.monotonic()
    world(tmp_path, 2, "meets")
    stale = round(max(2.0, 2 * (time.monotonic() - begun)))
    ended = world(tmp_path, 2, "one_hangs", quiet=3 * stale, beats=(0.2, stale, 5.0), ends=True)
    assert ended.codes == [1, None]  # rank 1 stands still until it is killed
    assert ended.stderr[0].startswith(f"error: rank 1 has given no sign of life for {stale} s")


def test_parallel_missing_backends(monkeypatch):
    monkeypatch.setattr(speech.dist, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="want the NCCL backend"):
        speech.check_backends("cuda")
    monkeypatch.setattr(speech.dist, "is_gloo_available", lambda: False)
    with pytest.raises(UserError, match="want PyTorch's gloo backend"):
        speech.check_backends("cpu")


def test_parallel_shares_that_fit_are_let_through():
    check_shares(64, 8, 4, "fsdp", FSDPConfig(replicas=2), "train")
    check_shares(64, "auto", 4, "ddp", FSDPConfig(replicas=3), "train")
    check_shares(280, 40, 8, "ddp", FSDPConfig(), "train")  # DMD2's recipe on eight GPUs: 35 images each, in one go
    assert [largest_part(*of) for of in ((35, 40), (140, 40), (64, 32), (7, 4))] == [35, 35, 32, 1]
    with pytest.raises(UserError, match=r"does not divide the 35 images of each of 8 ranks .*: use 35, or null"):
        check_shares(280, 40, 8, "ddp", FSDPConfig(), "train", statistics=True)


def test_parallel_buckets_keep_the_order(monkeypatch):
    monkeypatch.setattr(speech, "BUCKET", 40)
    tensors = [
        torch.zeros(n, dtype=d)
        for n, d in ((5, torch.float32), (5, torch.float32), (1, torch.float32), (1, torch.float64), (99, torch.float64))
    ]
    groups = list(speech.buckets(tensors))
    assert [len(group) for group in groups] == [2, 1, 1, 1]
    assert [id(t) for group in groups for t in group] == [id(t) for t in tensors]


def test_parallel_auto_micro_batch_takes_all_on_a_cpu_and_says_so():
    said = []
    run = cases.new_run("dmd", ALONE, micro_batch="auto")
    assert fitting_micro_batch(run, (torch.zeros(8, 1, 4, 4), None), said.append) is None
    assert "the whole share of 8 images is taken" in said[-1]
    assert [line.partition(":")[0] for line in said[:-1]] == ["memory, student", "memory, fake", "memory, frozen nets"]
    assert list(sizes(40)) == [40, 20, 10, 5, 2, 1]
    assert list(sizes(9)) == [9, 3, 1]


@pytest.mark.gpu
def test_parallel_auto_micro_batch_leaves_a_run_as_it_was():
    """On a GPU sizes are tried for real; nothing of that may be left in the run."""
    device = GPU
    runs = []
    for micro in (None, "auto"):
        method = cases.made("gdd", device)
        run = Run(method, TrainConfig(kimg=1, batch=8, micro_batch=micro), 0, device)
        images = torch.rand(8, 1, 4, 4, device=device), torch.eye(2, device=device)[torch.arange(8) % 2]
        if micro == "auto":
            before = [t.clone() for net in method.nets.values() for t in net.state_dict().values()]
            assert fitting_micro_batch(run, images, print) == (None if REHEARSING else 8)
            peak_memory(run, Share(*images), 4)
            after = [t for net in method.nets.values() for t in net.state_dict().values()]
            torch.testing.assert_close(after, before, rtol=0, atol=0)
        run.take(*images)
        runs.append(run.meter.read())
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


SMALL = [
    "net.model_channels=8", "net.channel_mult=[1]", "net.num_blocks=1", "net.attn_resolutions=[]", "precision=fp32",
    "teacher.train.kimg=0.032", "teacher.train.batch=32", "teacher.loss.sampling_steps=2", "teacher.train.grid_kimg=1",
    "train.kimg=60", "train.batch=32", "train.checkpoint_kimg=0.2", "train.grid_kimg=60", "train.eval_kimg=null",
    "log.tensorboard=false",
]  # fmt: skip


def test_parallel_killed_rank_ends_the_job_and_leaves_a_checkpoint(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "engine.train", DIGITS]
    command += [f"run_dir={tmp_path}/run", "train.parallel=fsdp", "device=cpu", *SMALL]
    kept, log = tmp_path / "run/checkpoints", tmp_path / "log"
    with log.open("w") as file:  # ends with torchrun's own report
        job = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        until(lambda: checkpoints(kept) or job.poll() is not None, Patience([job.pid]), log.read_text)
        assert job.poll() is None, log.read_text()
        os.kill(children(job.pid)[-1], signal.SIGKILL)
        code = outlasted(job.wait, Patience([job.pid]))
    finally:
        job.kill()
    assert code != 0
    sentence = "lost touch with another rank, which died or hangs"
    assert log.read_text().count(sentence) == 1, log.read_text()
    state = load_newest(kept, "cpu")
    assert state is not None and state["step"] > 0
    assert state["nets"]["student"].keys() == state["ema"].keys()


def children(pid: int) -> list[int]:
    """Process ids, oldest first."""
    return sorted(int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
