"""Where the time of a SIM step goes: python -m benches.scripts.profile_step RESULTS. FFHQ-64's net, B = 64, eager and as graphs.

Shares by kind of kernel, and of the time in which no kernel ran: launch gaps. Into RESULTS/profile.json.
"""

import json
import sys
import tempfile
from pathlib import Path

from torch.profiler import record_function

from benches import bench_step, harness, rehearse, rows
from potstill.engine.training.profile import STEP, Profile

METHOD = "sim"


def main(results: Path) -> None:
    batch = bench_step.BATCHES[-1]
    for graphs in ("off", "auto"):
        found = shares(batch, graphs)
        case = f"{METHOD} B={batch}, {'graphs' if graphs == 'auto' else 'eager'}"
        rows.keep(results, {"group": "profile", "kind": "cuda", "case": case} | found)
        print(case, json.dumps(found["kinds"]), f"busy {found['busy']:.3f}")


def shares(batch: int, graphs: str) -> dict:
    """What engine.training.profile says of five iterations after the captures."""
    device = harness.CUDA.device
    run, stream = bench_step.run_of(METHOD, batch, graphs, device), bench_step.images(batch, device)
    warmup, active = (2, 1) if rehearse.REHEARSING else (8, 5)
    with tempfile.TemporaryDirectory() as folder:
        profile = Profile(Path(folder), warmup=warmup, active=active)
        profile.start(device, 2 * (warmup + active))
        for _ in range(warmup + active):
            with record_function(STEP):
                run.take(*stream.at(run.step))
            profile.step(lambda text: None)
        return json.loads((Path(folder) / "profile/table.json").read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
