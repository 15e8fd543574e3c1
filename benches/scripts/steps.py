"""Whole training steps on one CPU thread, this checkout's against another's, in turns:

    python -m benches.scripts.steps --against ../before [--rounds 9] [--out benches/results/cpu-steps/against.json]

A case is one iteration of a method (loss, backward, optimiser, average) on synthetic images, each checkout in a process of its own.
Recorded is the processor's time, in the dtype that precision=auto takes in that checkout and in float32: on a machine that
others use as well it moves less than the clock. Ratios are medians over rounds of neighbours.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

DIGITS: dict[str, Any] = {
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.0,
    "side": 8,
    "channels": 1,
}
SMALL: dict[str, Any] = {
    "model_channels": 64,
    "channel_mult": [1, 2, 2],
    "num_blocks": 2,
    "attn_resolutions": [16],
    "dropout": 0.13,
    "side": 32,
    "channels": 3,
}
SID = {"name": "sim", "distance": "l2"}
#: Method, net, batch, iterations a round.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "SiD, digits, batch 64": (SID, DIGITS, 64, 3),
    "SiD, digits, batch 1": (SID, DIGITS, 1, 5),
    "SiD, 32 px, batch 16": (SID, SMALL, 16, 1),
    "GDD, 32 px, batch 4": ({"name": "gdd"}, SMALL, 4, 2),
}


def serve(case: str, dtype: str) -> None:
    """In the checkout that is the working folder: seconds of the processor of n iterations for each n on standard input."""
    sys.path.insert(0, os.getcwd())
    import torch

    from potstill.engine.config.schema import NetConfig
    from potstill.engine.data.images import open_images
    from potstill.engine.data.sampler import Stream
    from potstill.engine.jobs.build import build_net
    from potstill.engine.jobs.machine import precision
    from potstill.engine.methods.table import METHODS
    from potstill.engine.training.run import Run, TrainConfig

    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings, net, batch, _ = CASES[case]
    net = dict(net)
    side, channels, cpu = net.pop("side"), net.pop("channels"), torch.device("cpu")
    teacher = build_net(NetConfig(model_type="SongUNet", **net), side, channels, 0)
    teacher.compute_dtype = precision(dtype, cpu)[0]
    method = METHODS[settings["name"]](**settings).build(teacher, teacher)
    run = Run(method, TrainConfig(kimg=batch * 1e3, batch=batch, graphs="off"), 0, cpu)
    stream = Stream(open_images(f"synthetic:{side}x{channels}"), batch=batch, device=cpu)

    def iterate(n: int) -> float:
        start = time.process_time()
        for _ in range(n):
            run.take(*stream.at(run.step))
        return time.process_time() - start

    iterate(2)
    print(str(teacher.compute_dtype).removeprefix("torch."), flush=True)
    for line in sys.stdin:
        print(iterate(int(line)), flush=True)


def compare(case: str, dtype: str, folders: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Milliseconds of an iteration in each checkout, and how many times as long the other one's is."""
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", case, dtype]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    servers = {name: subprocess.Popen(command, cwd=folder, **pipes) for name, folder in folders.items()}
    dtypes = {name: server.stdout.readline().strip() for name, server in servers.items() if server.stdout}
    n, seconds = CASES[case][3], {name: [] for name in servers}
    for _ in range(rounds):
        for name, server in servers.items():
            assert server.stdin and server.stdout
            server.stdin.write(f"{n}\n")
            server.stdin.flush()
            seconds[name].append(float(server.stdout.readline()) / n)
    for server in servers.values():
        server.communicate()
    ratio = median(before / now for before, now in zip(seconds["before"], seconds["now"], strict=True))
    found = {name: {"ms": round(1e3 * median(each), 1), "dtype": dtypes[name]} for name, each in seconds.items()}
    return {"case": case, "precision": dtype, **found, "before/now": round(ratio, 2), "rounds": rounds}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--against", type=Path, metavar="CHECKOUT", help="the other checkout, its csrc/ compiled")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--out", type=Path)
    p.add_argument("--serve", nargs=2, metavar=("CASE", "PRECISION"), help=argparse.SUPPRESS)
    given = p.parse_args()
    if given.serve:
        return serve(*given.serve)
    if given.against is None or not (given.against / "potstill").is_dir():
        p.error("wanted --against CHECKOUT, the folder of another checkout of potstill")
    from benches import harness

    folders = {"before": given.against.resolve(), "now": Path(__file__).resolve().parents[2]}
    head = ["git", "rev-parse", "--short", "HEAD"]
    commits = {
        name: subprocess.run(head, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
        for name, folder in folders.items()
    }
    rows = []
    for case in CASES:
        for dtype in ("auto", "fp32"):
            rows.append(compare(case, dtype, folders, given.rounds))
            print(rows[-1], flush=True)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(
            json.dumps({"machine": harness.machine(harness.CPU) | {"threads": 1}, "commits": commits, "rows": rows}, indent=1) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
