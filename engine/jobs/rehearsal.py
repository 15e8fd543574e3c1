"""What a recipe costs before it runs: sizes on paper (--dry-run), a few iterations for real (rehearse=true), images in so many seconds."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.kinds import check, number
from potstill.engine.common.reading import read_json
from potstill.engine.config.chosen import as_lines, chosen
from potstill.engine.config.schema import Config
from potstill.engine.config.tree import defaults_under
from potstill.engine.data.sampler import Stream
from potstill.engine.jobs import build, preflight
from potstill.engine.jobs.folder import write_atomically
from potstill.engine.jobs.job import Job
from potstill.engine.jobs.machine import device_title, peak_gib, synchronize
from potstill.engine.jobs.workplace import Workplace
from potstill.engine.methods.base import Pairs, lasting
from potstill.engine.models.origins import is_pipeline, is_there, local_path
from potstill.engine.nets.guide import Guide
from potstill.engine.training.ranks import ALONE
from potstill.engine.training.run import Run

LENGTH = {"kimg": number(0), "seconds": number(0)}  # what is remembered of a run that is as long as it takes
#: Dense bf16 FLOP/s of the chips whose figures the vendor gives.
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


def dry_run(cfg: Config) -> None:
    """Make every check that the run makes before it trains, then print what is set, and as comments sizes and what is missing."""
    job = Job(cfg, on_paper=True)
    print("\n".join(as_lines(list(chosen(cfg, defaults_under(cfg.method.name))))))
    print("# every other setting is at its default: `potstill settings` lists all")
    for line in preflight.missing(cfg):
        print(f"# missing {line}")
    sizes(cfg, job)
    preflight.check_complete(cfg, on_paper=True)


def sizes(cfg: Config, job: Job) -> None:
    """Print, as comments, how large everything is."""
    net, method, *_ = job.on_paper
    if cfg.data.path and not preflight.without_data(cfg) and (url := preflight.unfetched(cfg.eval.features)):
        print(f"# will be downloaded: {url}")
    iterations = f"# iterations: {round(cfg.train.kimg * 1000 / cfg.train.batch):,} of batch {cfg.train.batch}"
    if preflight.to_come(cfg):
        return print(f"# teacher: not there yet, so sizes and memory are not known\n{iterations}")
    checkpoint = cfg.teacher.checkpoint
    there = checkpoint and is_there(checkpoint)
    parameters = sum(p.numel() for p in net.parameters())
    print(f"# teacher: {parameters:,} parameters ({checkpoint if there else 'not there yet' if checkpoint else 'to be trained'})")
    trained = {name: sum(p.numel() for p in one.parameters() if p.requires_grad) for name, one in method.nets.items()}
    for note in method.notes:
        print(f"# {note}")
    print("# trained: " + ", ".join(f"{name} {n:,}" for name, n in trained.items()))
    # weights, gradients, two Adam moments in float32; the teacher's weights; the averages
    product = method.nets[method.product]
    average = trained[method.product] if cfg.lora.rank else sum(p.numel() for p in product.parameters())
    size = 16 * sum(trained.values()) + 4 * average * (1 + len(cfg.train.lengths)) + job.weights_dtype.itemsize * parameters
    print(f"# memory without activations: {size / 2**30:.2f} GiB")
    print(iterations)


def rehearse(cfg: Config) -> None:
    """A few iterations of the recipe on random weights and synthetic images: what it costs on this machine."""
    checkpoint = cfg.teacher.checkpoint
    if not checkpoint and build.is_text(cfg.net):
        raise UserError(
            f"rehearse=true makes nets of EDM's, and net.model_type is {cfg.net.model_type}: train it with a small teacher.train.kimg"
        )
    if checkpoint and (is_pipeline(local_path(checkpoint)) or preflight.to_come(cfg)):
        short = f"train.kimg={cfg.train.batch / 100:g} run_dir=runs/short"
        raise UserError(f"rehearse=true makes nets of EDM's, and {checkpoint} is a pipeline: {short} is a run of ten iterations")
    preflight.check_settings(cfg)
    place = Workplace(cfg, ALONE)
    images, device, dtype = place.images, place.device, place.dtype
    assert images is not None
    batch = cfg.train.micro_batch if isinstance(cfg.train.micro_batch, int) else cfg.train.batch
    why = f", which train.micro_batch={batch} makes of the recipe's {cfg.train.batch}" if batch != cfg.train.batch else ", the recipe's"
    if device.type == "cpu" and batch > 8:
        batch = 2  # enough to time; what fits and pays on a GPU would take minutes here
        why = f" at once in place of the recipe's batch of {cfg.train.batch}, which would take minutes on a CPU"
    net = place.prepared(build.build_net(cfg.net, images.resolution, images.channels, images.label_dim))
    if cfg.teacher.guide:
        net.guide = Guide(net)  # as large as the teacher, at most
    method = cfg.method.build(net, net)
    for one in method.nets.values():
        one.to(device)
    method.turns = lasting(method.turns)
    period = max(turn.every for turn in method.turns if turn.every < 50)
    # On a GPU every turn is run eagerly three times and then captured before the clock starts.
    warmup, timed = (5 * period, period * -(-10 // period)) if device.type == "cuda" else (1, period)
    settings = dataclasses.replace(cfg.train, batch=batch, micro_batch=None, kimg=batch * (period + warmup + timed) / 1000)
    run, stream = Run(method, settings, cfg.seed, device), Stream(images, batch=batch, seed=cfg.seed, device=device)
    method.pairs = stand_in_pairs(cfg, stream)
    place.say(f"rehearsing {cfg.run_dir}: random weights, synthetic images, {batch} images{why}, {str(dtype).removeprefix('torch.')}")
    flops = counted(run, stream, period)
    seconds_taken(run, stream, range(period, period + warmup))
    seconds = seconds_taken(run, stream, range(period + warmup, period + warmup + timed)) / timed
    hours = seconds / batch * cfg.train.kimg * 1000 / 3600
    found = {
        "images_per_second": round(batch / seconds, 2),
        "seconds_per_iteration": round(seconds, 4),
        "batch": batch,
        "peak_memory_gib": peak_gib(device),
        "parameters": sum(p.numel() for p in net.parameters()),
        "projected_hours": round(hours, 2),
        "graphs": run.graph_report(),
        "gflop_per_image": round(flops / batch / 1e9, 2),
        "mfu": mfu(flops / seconds, device),
        "device": device_title(device),
    }
    place.say(
        f"projected_hours: train.kimg={cfg.train.kimg:g} at {found['images_per_second']:g} images a second, as measured with {batch} at once; "
        f"an iteration of the recipe is {cfg.train.batch}"
    )
    print(json.dumps(found))


def counted(run: Run, stream: Stream, iterations: int) -> float:
    """Floating-point operations of one iteration: convolutions, matrix products and attention, forward and backward."""
    graphs, run.graphs = run.graphs, None
    with FlopCounterMode(display=False) as counter:
        for step in range(iterations):
            run.take(*stream.at(step))
    run.graphs = graphs
    return counter.get_total_flops() / iterations


def mfu(flops_per_second: float, device: torch.device) -> float | None:
    """The share of the GPU's dense bf16 peak that is reached; None where the peak is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for chip, peak in PEAKS.items() if chip in name), None)
    return None if peak is None else round(flops_per_second / peak, 4)


def kimg_in(seconds: float, cfg: Config, stored: Path, *, of_teacher: bool, job_of: type[Job] = Job) -> float:
    """Thousands of images that this machine trains on in `seconds`; remembered in the file `stored`. job_of: what will be run."""
    if stored.exists():
        again = "remove it, and the time of an iteration is measured again"
        before = read_json(stored, dict, again)
        if not before.keys() >= LENGTH.keys():
            raise Damaged(f"{stored} does not hold {' and '.join(LENGTH)}: {again}")
        check(stored, before, LENGTH, again)
        if before["seconds"] != seconds:
            raise UserError(f"{stored.parent} holds a run of {before['seconds']:g} seconds, got {seconds:g}: give another run_dir=")
        return before["kimg"]
    job, stage = job_of(cfg, on_paper=True), cfg.teacher.train if of_teacher else cfg.train
    stream = job.stream(stage, job.share())
    if of_teacher:
        method = job.new_teacher()
    else:
        teacher = job.teacher()
        method = cfg.method.build(teacher, teacher)
        method.pairs = stand_in_pairs(cfg, stream)
    method.turns = lasting(method.turns)
    kimg = seconds / seconds_per_iteration(Run(method, stage, cfg.seed, job.device), stream, 0.03 * seconds) * stage.batch / 1000
    write_atomically(stored, json.dumps({"kimg": kimg, "seconds": seconds}))
    return kimg


def seconds_per_iteration(run: Run, stream: Any, least: float) -> float:
    """By whole periods of the method's turns, for at least `least` seconds, after two iterations that do not count."""
    for net in run.method.nets.values():
        net.to(run.device)
    period = max(turn.every for turn in run.method.turns)
    seconds_taken(run, stream, range(2))
    seconds, step, rounds = 0.0, 2, period * max(1, round(8 / period))
    while step == 2 or seconds < least:
        seconds += seconds_taken(run, stream, range(step, step + rounds))
        step += rounds
    return seconds / (step - 2)


def seconds_taken(run: Run, stream: Any, steps: range) -> float:
    """How long these iterations take, the device's work included."""
    start = time.perf_counter()
    for step in steps:
        run.take(*stream.at(step))
    synchronize(run.device)
    return time.perf_counter() - start


def stand_in_pairs(cfg: Config, stream: Any) -> Pairs | None:
    """Pairs of the right shapes where only time and memory count: the first batch's images instead of samples; None if not needed."""
    if not cfg.method.needs().pairs:
        return None
    images, labels = stream.at(0)
    return Pairs(torch.randn_like(images), images, labels)
