"""make gpu: everything that needs a GPU, in steps of under ten minutes that are not repeated once they are done.

Steps: the tests marked gpu, the benches, whole iterations with and without CUDA graphs, the FFHQ-64 recipes rehearsed. Results go to benches/results/<device>-<date>/: one JSON per step with device,
driver, versions and commit, and README.md with a table of what each step said. Needs no network and no virtual environment.
GPU_STEPS=benches runs some of the steps; REDO=1 repeats those that are done.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 580  # seconds a step may take
STEPS = {
    "tests": ["-m", "pytest", "-q", "-m", "gpu", "tests", "--junitxml={folder}/tests.xml"],
    "benches": ["-m", "pytest", "-q", "benches", "--benchmark", "--benchmark-json={folder}/benches.json", "--ignore=benches/bench_step.py"],
    "step": ["-m", "pytest", "-q", "benches/bench_step.py", "--benchmark", "--results={folder}"],
    "evidence": ["benches/evidence.py", "{folder}/recipes"],
}


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("make gpu wants a CUDA device; this machine has none (make bench runs what a CPU can)")
    folder = ROOT / "benches/results" / f"{slug(torch.cuda.get_device_name())}-{date.today().isoformat()}"
    folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in os.environ.get("GPU_STEPS", ",".join(STEPS)).split(","):
        record = folder / f"{name}.step.json"
        if record.exists() and json.loads(record.read_text())["code"] == 0 and not os.environ.get("REDO"):
            print(f"{name}: done before, see {record.relative_to(ROOT)}")
            continue
        failed |= step(name, folder, record) != 0
        write_readme(folder)
    sys.exit(failed)


def step(name: str, folder: Path, record: Path) -> int:
    """Run one step and write what it said; its exit code, 124 if it took too long."""
    command = [sys.executable, *(part.format(folder=folder) for part in STEPS[name])]
    start = time.time()
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        code, output = 124, (late.stdout or b"").decode()
    print(output[-4000:])
    text = {
        "step": name,
        "code": code,
        "seconds": round(time.time() - start, 1),
        "last_line": output.strip().splitlines()[-1] if output.strip() else "",
        **machine(),
    }
    record.write_text(json.dumps(text, indent=2) + "\n")
    (folder / f"{name}.log").write_text(output)
    return code


def machine() -> dict[str, str]:
    def said(*command: str) -> str:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "device": torch.cuda.get_device_name(),
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "commit": said("git", "rev-parse", "--short", "HEAD") or "unknown",
        "date": date.today().isoformat(),
    }


def write_readme(folder: Path) -> None:
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.step.json"))]
    about = ", ".join(f"{key} {records[0][key]}" for key in ("device", "driver", "torch", "triton", "cuda", "python"))
    rows = [f"| {r['step']} | {r['code']} | {r['seconds']} | {r['commit']} | {r['last_line']} |" for r in records]
    table = ["| step | exit code | seconds | commit | last line |", "|---|---|---|---|---|", *rows]
    (folder / "README.md").write_text(f"# {folder.name}\n\n{about}\n\n" + "\n".join(table) + "\n")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    main()
