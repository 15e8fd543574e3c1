"""FAULTS: what can happen to a run, over every method, one rank and two. A student has 16 iterations and a checkpoint every fourth."""

import signal
from pathlib import Path

from benches.scripts.soak_damage import (
    a_folder,
    a_line_without_step,
    another_net,
    back,
    cut,
    empty,
    flip,
    garbage,
    gone,
    line_of_garbage,
    newest,
    to,
    to_all,
    to_newest,
    zeros_at_end,
)  # fmt: skip
from benches.scripts.soak_damage import (
    half_a_line as half,
)
from benches.scripts.soak_damage import (
    together as all_of,
)
from benches.scripts.soak_judge import LINES, REFUSED, SAME, Fault, at_random, two_at_once
from benches.scripts.soak_moments import (
    DRAWING,
    MEASURING,
    REPORTING,
    RESUMING,
    SAVING,
    SCANNING,
    another_data_set,
    at_once,
    call_of,
    control_c,
    dies,
    fills,
    half_a_checkpoint,
    half_a_line,
    input_output_error,
    iteration,
    jumps,
    mount,
    named,
    no_handles,
    no_large_files,
    not_a_number,
    read_only,
    removes,
    together,
    twice,
    worker_dies,
)  # fmt: skip
from benches.scripts.soak_runs import CASES, Case, write_digits

METHODS = [Case(name) for name in CASES if name not in ("zip", "rare log", "rollback")]
ZIP, RARE, SECOND = Case("zip"), Case("rare log"), Case("sfd_second")
EITHER = (SAME, REFUSED)
END = iteration(-1)  # all is trained and nothing is measured yet
FINISHED = {"moment": at_once, "action": lambda _: None, "first": "done"}  # of a run that is at its end: nothing disturbs it
GIVEN, DATA = "../inputs/sfd_v.safetensors", "../inputs/digits.zip"  # seen from the run folder
EVERYWHERE = [number / 20 for number in range(4, 19)]  # of a file's bytes, between header and index
TERM, INT, USR1, TIME_OVER = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGALRM  # the last is that of max_hours


def of(name: str) -> Case:
    return Case(name)


def free_the_disk(folder: Path) -> None:
    (folder.parent / "filler").unlink(missing_ok=True)


def writable(folder: Path) -> None:
    mount("remount,rw", folder.parent)


def without_newest(folder: Path) -> None:
    gone(newest(folder))


def without_stage(folder: Path) -> None:
    gone(newest(folder).parent)


def data_back(folder: Path) -> None:
    write_digits(folder / DATA)


KILLS = [
    *(Fault("kill -9", "iteration 10", case) for case in METHODS),
    Fault("kill -9", "iteration 5 of the teacher", of("sid"), iteration(5, "teacher")),
    *(Fault("kill -9", "before the student's first checkpoint", of(name), iteration(2)) for name in ("dmd2", "gdd", "msd")),
    Fault("kill -9", "a checkpoint is half on disk", of("sfd"), half_a_checkpoint(4)),
    Fault("kill -9", "just before a checkpoint has its name", of("sim"), named("00000012.pt", after=False)),
    Fault("kill -9", "just after a checkpoint has its name", of("gdd"), named("00000012.pt", after=True)),
    Fault("kill -9", "half a line of metrics is written", of("sid"), half_a_line(9)),
    Fault("kill -9", "just before config.yaml has its name", of("dmd2"), named("config.yaml", after=False)),
    Fault("kill -9", "just after config.yaml has its name", of("sim"), named("config.yaml", after=True)),
    Fault("kill -9", "while it resumes", of("gdd_i"), again=(RESUMING, dies())),
    Fault("kill -9", "while metrics are cut to the checkpoint", of("dmd"), iteration(11), again=(named("metrics.jsonl", after=False), dies())),
    Fault("kill -9", "last iteration of the teacher", of("moment_matching"), iteration(-1, "teacher")),
    Fault("kill -9", "just before the teacher has its name", of("dmd2"), named("teacher.safetensors", after=False)),
    Fault("kill -9", "between teacher and student", of("gdd_i"), named("teacher.safetensors", after=True)),
    Fault("kill -9", "between TSM and students", of("msd_s"), named("tsm.safetensors", after=True)),
    Fault("kill -9", "between two students", of("msd"), named("student.safetensors", after=True)),
    Fault("kill -9", "last iteration of the student", of("sim"), END),
    Fault("kill -9", "while the student is saved", of("instant"), SAVING),
    Fault("kill -9", "just before the student has its name", of("sfd_v"), named("student.safetensors", after=False)),
    Fault("kill -9", "while it is measured", of("moment_matching"), MEASURING),
    Fault("kill -9", "while a grid is drawn", of("instant"), DRAWING),
    Fault("kill -9", "just before summary.json has its name", of("dmd"), named("summary.json", after=False)),
    Fault("kill -9", "while the report is written", of("sfd"), REPORTING),
    Fault("kill -9", "while the data are looked at", ZIP, SCANNING),
    Fault("kill -9", "with a worker that reads images", ZIP, iteration(7)),
    *(Fault("kill -9", f"three times, at random, {n}", of(name), play=at_random((signal.SIGKILL,) * 3)) for n, name in enumerate(
        ("dmd", "sim", "gdd", "sfd", "moment_matching", "msd", "zip", "instant"), 1
    )),
]  # fmt: skip

SIGNALS = [
    *(Fault("SIGTERM", "iteration 7", case, iteration(7), dies(TERM), "saved") for case in METHODS),
    Fault("SIGTERM", "iteration 1 of the teacher", of("gdd"), iteration(1, "teacher"), dies(TERM), "saved"),
    Fault("SIGTERM", "last iteration of the teacher", of("dmd"), iteration(-1, "teacher"), dies(TERM), "saved"),
    Fault("SIGTERM", "last iteration of the student", of("sim"), END, dies(TERM), "saved"),
    Fault("SIGTERM", "before the teacher's last checkpoint has its name", of("dmd"), named("00000008.pt", after=False), dies(TERM), "saved"),
    Fault("SIGTERM", "before a checkpoint has its name", of("sfd"), named("00000012.pt", after=False), dies(TERM), "saved"),
    Fault("SIGTERM", "while it is measured", of("gdd"), MEASURING, dies(TERM), "stopped"),
    Fault("SIGTERM", "while the data are looked at", ZIP, SCANNING, dies(TERM), "stopped"),
    Fault("SIGTERM", "with a worker that reads images", ZIP, iteration(7), dies(TERM), "saved"),
    Fault("SIGTERM", "while the report is written", of("dmd"), REPORTING, dies(TERM), "stopped"),
    Fault("SIGINT", "iteration 9", of("sid"), iteration(9), control_c, "saved"),
    Fault("SIGINT", "iteration 1 of the student", of("moment_matching"), iteration(1), control_c, "saved"),
    Fault("SIGINT", "last iteration of the student", of("instant"), END, control_c, "saved"),
    Fault("SIGINT", "twice at once", of("dmd"), iteration(9), twice(INT), "stopped"),
    Fault("SIGINT", "while it is measured", of("dmd"), MEASURING, control_c, "stopped"),
    Fault("SIGINT", "while a grid is drawn", of("sim"), DRAWING, control_c, "saved"),
    Fault("SIGINT", "while the data are looked at", ZIP, SCANNING, control_c, "stopped"),
    Fault("SIGINT", "with a worker that reads images", ZIP, iteration(7), control_c, "saved"),
    Fault("SIGINT", "while the student is saved", of("gdd_i"), SAVING, control_c, "stopped"),
    Fault("SIGINT", "while settings are read", of("sfd"), call_of("train", "load"), control_c, "stopped"),
    Fault("SIGUSR1", "iteration 9", of("dmd2"), iteration(9), dies(USR1), "saved"),
    Fault("SIGUSR1", "last iteration of the teacher", of("sfd_v"), iteration(-1, "teacher"), dies(USR1), "saved"),
    Fault("SIGUSR1", "last iteration of the student", of("gdd"), END, dies(USR1), "saved"),
    Fault("SIGUSR1", "while it is measured", of("sim"), MEASURING, dies(USR1), "stopped"),
    Fault("max_hours", "are over in iteration 7", of("gdd_i"), iteration(7), dies(TIME_OVER), "saved"),
    Fault("max_hours", "are over in the last iteration of the teacher", of("sid"), iteration(-1, "teacher"), dies(TIME_OVER), "saved"),
    Fault("max_hours", "are over while it is measured", of("instant"), MEASURING, dies(TIME_OVER), "stopped"),
    *(Fault(signum.name, f"at random, {n}", of(name), play=at_random((signum,))) for n, (signum, name) in enumerate(
        ((TERM, "dmd2"), (TERM, "sfd"), (INT, "sim"), (INT, "gdd"), (INT, "zip"), (USR1, "moment_matching")), 1
    )),
]  # fmt: skip

DISKS = [
    Fault("disk", "full at iteration 6", of("dmd"), iteration(6), fills(), "refused", repair=free_the_disk, disk=True),
    Fault("disk", "full within a checkpoint", of("sim"), iteration(6), fills(100_000), "refused", repair=free_the_disk, disk=True),
    Fault("disk", "full before it begins", of("gdd"), at_once, fills(), "refused", repair=free_the_disk, disk=True),
    Fault("disk", "full when the student is saved", of("sfd"), SAVING, fills(4096), "refused", repair=free_the_disk, disk=True),
    Fault("disk", "full when it is measured", of("dmd"), MEASURING, fills(), "refused", repair=free_the_disk, disk=True),
    Fault("disk", "turns read-only at iteration 6", of("sid"), iteration(6), read_only, "refused", repair=writable, disk=True),
    Fault(
        "disk",
        "is read-only from the start",
        of("dmd"),
        at_once,
        together(lambda f: f.mkdir(), read_only),
        "refused",
        repair=writable,
        disk=True,
    ),
    Fault("disk", "a quota that a checkpoint exceeds", of("dmd"), iteration(6), no_large_files(100_000), "refused"),
    Fault("disk", "a quota that a weight file exceeds", of("moment_matching"), SAVING, no_large_files(10_000), "refused"),
    Fault("disk", "an error when a checkpoint gets its name", of("gdd"), named("00000012.pt", after=False), input_output_error, "refused"),
    Fault("disk", "no more open files at iteration 7", of("dmd2"), iteration(7), no_handles, "refused"),
    Fault("folder", "removed at iteration 6", of("dmd"), iteration(6), removes, "refused"),
    Fault("folder", "removed while it is measured", of("sim"), MEASURING, removes, "refused"),
    Fault("folder", "checkpoints removed", of("sfd"), damage=without_stage),
    Fault("folder", "two processes at once", of("dmd"), wants=(REFUSED,), play=two_at_once),
    Fault("folder", "two processes at once, in the teacher", of("gdd"), iteration(5, "teacher"), wants=(REFUSED,), play=two_at_once),
]

CHECKPOINTS = [
    *(Fault("checkpoint", "newest cut", case, damage=to_newest(cut)) for case in METHODS),
    Fault("checkpoint", "newest empty", of("sim"), damage=to_newest(empty)),
    Fault("checkpoint", "newest ends in zeros", of("gdd"), damage=to_newest(zeros_at_end)),
    Fault("checkpoint", "newest is garbage", of("dmd2"), damage=to_newest(garbage)),
    Fault("checkpoint", "newest is a folder", of("dmd"), damage=to_newest(a_folder)),
    Fault("checkpoint", "newest is gone", of("sid"), damage=to_newest(gone)),
    *(Fault("checkpoint", f"a bit flipped {where}", of(name), damage=to_newest(flip(share))) for where, share, name in (
        ("in the header", 0.0, "dmd"), ("in the tree", 0.05, "sfd"), ("in the tree, 2", 0.12, "gdd"), ("in a tensor", 0.5, "dmd"),
        ("in a tensor, 2", 0.65, "sim"), ("in a tensor, 3", 0.8, "moment_matching"), ("in the index", 0.95, "sid"), ("at the end", 1.0, "instant"),
    )),
    Fault("checkpoint", "bits flipped all over", of("sim"), damage=to_newest(flip(*EVERYWHERE))),
    Fault("checkpoint", "all cut", of("dmd"), damage=to_all(cut), repair=without_stage, wants=EITHER),
    Fault(
        "checkpoint", "the teacher's only one cut", of("gdd"), iteration(6, "teacher"), damage=to_newest(cut), repair=without_stage,
        wants=EITHER,
    ),
]  # fmt: skip

METRICS = [
    Fault("metrics", "half a line at the end", of("dmd"), damage=to("metrics.jsonl", half)),
    *(Fault("metrics", what, of(name), damage=to("metrics.jsonl", change), repair=to("metrics.jsonl", gone), wants=(SAME, LINES, REFUSED)) for what, change, name in (
        ("a line of garbage", line_of_garbage, "sim"), ("gone", gone, "sfd"), ("empty", empty, "gdd"), ("ends in zeros", zeros_at_end, "sid"),
        ("a line without step", a_line_without_step, "dmd2"), ("all garbage", garbage, "instant"),
    )),
]  # fmt: skip

FILES = [
    *(Fault("config.yaml", what, of(name), damage=to("config.yaml", change), repair=to("config.yaml", gone), wants=EITHER) for what, change, name in (
        ("empty", empty, "dmd"), ("garbage", garbage, "sim"), ("cut", cut, "gdd"), ("gone", gone, "sfd"), ("ends in zeros", zeros_at_end, "sid"),
    )),
    Fault("teacher", "cut", of("dmd"), damage=to("teacher.safetensors", cut)),
    Fault("teacher", "a bit flipped in the header", of("sim"), damage=to("teacher.safetensors", flip(0.0))),
    Fault("teacher", "a bit flipped in a tensor", of("gdd"), damage=to("teacher.safetensors", flip(0.7))),
    Fault("teacher", "empty", of("sfd"), damage=to("teacher.safetensors", empty)),
    Fault("teacher", "gone", of("moment_matching"), damage=to("teacher.safetensors", gone)),
    Fault("teacher", "another in its place", of("dmd"), damage=to("teacher.safetensors", another_net), repair=to("teacher.safetensors", back), wants=EITHER),
    Fault("teacher", "a given one is another", SECOND, damage=to(GIVEN, another_net), repair=to(GIVEN, back), wants=(REFUSED,)),
    Fault("teacher", "TSM's result cut", of("msd_s"), damage=to("tsm.safetensors", cut)),
    Fault("student", "cut after the end", of("dmd"), damage=to("student.safetensors", cut), **FINISHED),
    Fault("student", "a bit flipped after the end", of("msd"), damage=to("student-0/student.safetensors", flip(0.7)), **FINISHED),
    Fault("summary.json", "garbage after the end", of("sid"), damage=to("summary.json", garbage), **FINISHED),
    Fault("summary.json", "and all that is drawn gone", of("gdd_i"), damage=all_of(to("summary.json", gone), to("samples", gone)), **FINISHED),
    Fault("data", "others at the same path", ZIP, damage=another_data_set, repair=data_back, wants=(REFUSED,)),
    Fault("data", "others at the same path at iteration 5", ZIP, iteration(5), another_data_set, "refused_or_done", repair=data_back, wants=EITHER),
    Fault("data", "cut", ZIP, damage=to(DATA, cut), repair=data_back, wants=(REFUSED,)),
    Fault("data", "gone", ZIP, damage=to(DATA, gone), repair=data_back, wants=(REFUSED,)),
    Fault("data", "a bit flipped in a picture", ZIP, damage=to(DATA, flip(0.3)), repair=data_back, wants=(REFUSED,)),
    Fault("data", "a worker that reads images is killed", ZIP, iteration(5), worker_dies, "refused_or_done", wants=EITHER),
]  # fmt: skip

NUMBERS = [
    Fault("clock", "set three hours ahead", of("dmd"), iteration(6), jumps(10_800, "time"), "done"),
    Fault("clock", "set three hours back", of("sim"), iteration(6), jumps(-10_800, "time"), "done"),
    Fault(
        "clock", "the machine slept for three hours", of("gdd"), iteration(6), jumps(10_800, "time", "perf_counter", "monotonic"), "done"
    ),
    Fault("NaN", "iteration 6", of("dmd"), iteration(6), not_a_number, "refused"),
    Fault("NaN", "iteration 6, with on_nonfinite=rollback", Case("rollback"), iteration(6), not_a_number, "done"),
    Fault("NaN", "iteration 2, before any checkpoint but the first", Case("rollback"), iteration(2), not_a_number, "done"),
    Fault("NaN", "iteration 5 of the teacher", of("sim"), iteration(5, "teacher"), not_a_number, "refused"),
    Fault("NaN", "iteration 6, and a checkpoint before a log line", RARE, iteration(6), not_a_number, "refused", repair=without_newest),
    Fault(
        "NaN",
        "iteration 7, and SIGTERM",
        of("sid"),
        iteration(7),
        together(not_a_number, dies(TERM)),
        "stopped_or_refused",
        repair=without_newest,
        wants=EITHER,
    ),
]

DDP = {name: Case(name, 2) for name in ("dmd", "sim", "gdd", "sfd", "moment_matching")}
FSDP = Case("dmd", 2, "fsdp")
RANKS = [
    Fault("ranks", "rank 1 is killed", DDP["dmd"], first="lost", rank=1),
    Fault("ranks", "rank 0 is killed", DDP["sim"], first="lost", rank=0),
    Fault("ranks", "both are killed", DDP["gdd"]),
    Fault(
        "ranks", "rank 0 is killed before a checkpoint has its name", DDP["sfd"], named("00000012.pt", after=False), first="lost", rank=0
    ),
    Fault("ranks", "SIGTERM to rank 1", DDP["dmd"], iteration(7), dies(TERM), "saved", rank=1),
    Fault("ranks", "SIGTERM to rank 0", DDP["moment_matching"], iteration(7), dies(TERM), "saved", rank=0),
    Fault("ranks", "SIGINT to both", DDP["gdd"], iteration(7), control_c, "saved"),
    Fault("ranks", "SIGUSR1 to rank 1", DDP["sim"], iteration(7), dies(USR1), "saved", rank=1),
    Fault("ranks", "disk full", DDP["dmd"], iteration(6), fills(), "refused", repair=free_the_disk, rank=0, disk=True),
    Fault("ranks", "NaN on rank 1", DDP["sfd"], iteration(6), not_a_number, "refused", rank=1),
    Fault("ranks", "newest checkpoint cut", DDP["sim"], damage=to_newest(cut)),
    Fault("ranks", "rank 0 is killed while it measures", DDP["dmd"], MEASURING, first="lost", rank=0),
    Fault("shards", "both are killed", FSDP),
    Fault("shards", "killed before a checkpoint has its name", FSDP, named("00000008.dcp", after=False), first="lost", rank=0),
    Fault("shards", "SIGTERM to rank 1", FSDP, iteration(7), dies(TERM), "saved", rank=1),
    Fault("shards", "a shard cut", FSDP, iteration(15), damage=to_newest(cut, "*.distcp")),
    Fault("shards", "bits flipped in a shard", FSDP, iteration(15), damage=to_newest(flip(*EVERYWHERE), "*.distcp")),
    Fault("shards", "a bit flipped in the index", FSDP, iteration(15), damage=to_newest(flip(0.5), ".metadata")),
    Fault("shards", "the index is gone", FSDP, iteration(15), damage=to_newest(gone, ".metadata")),
    Fault("shards", "what is no tensor cut", FSDP, iteration(15), damage=to_newest(cut, "rest.pt")),
]

NONE = [Fault("nothing", "the same twice", case, **FINISHED) for case in (Case("dmd"), DDP["dmd"], FSDP)]
FAULTS: list[Fault] = [*NONE, *KILLS, *SIGNALS, *DISKS, *CHECKPOINTS, *METRICS, *FILES, *NUMBERS, *RANKS]
