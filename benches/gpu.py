"""make gpu: everything that needs a GPU, in steps of under ten minutes that are not repeated once they are done.

Steps: the tests marked gpu, the kernel benches, whole iterations with and without CUDA graphs, the ladder, the FFHQ-64
recipes rehearsed; then, with DATA=FILE.zip, a teacher, every method
for a few minutes, time to quality for every switch; rehearsals for the scaling note; the table. Results go to
benches/results/<device>-<date>/: one JSON per step with device, driver, versions and commit, compare.json, curves.png,
samples.png, time_to_quality.json, scaling.json, and README.md with a table of what each step said; at last the marked
sections of the project's README are rewritten from them. Needs no network and no virtual environment.

    make gpu DATA=images-32x32.zip FEATURES=ResNet20:resnet20.pt,SqueezeNet:squeezenet.pt
    RECIPE=configs/fast64.yaml    for 64-pixel images (default configs/fast32.yaml)
    TEACHER_SECONDS=480 SECONDS=180 SWITCH_SECONDS=60
    GPU_STEPS=teacher,method:sim  some of the steps;  REDO=1 repeats those that are done;  GPU_LIST=1 only names them
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 580  # seconds a step may take
MOST_BYTES = 2 << 20  # of the pictures of a result folder
METHODS = ("dmd", "sim", "gdd_i", "moment_matching", "sfd", "msd")
SHAPES = ("cifar10", "ffhq64", "imagenet64")
LARGE = ("ffhq64_gdd_i", "imagenet64_gdd_i", "imagenet64_dmd2")


def steps(environment: Mapping[str, str], folder: Path) -> dict[str, list[str] | str]:
    """Every step by name: the arguments of its Python command, or why it cannot be run."""
    pytest = ["-m", "pytest", "-q"]
    ladder, whole = "benches/bench_ladder.py", "benches/bench_step.py"
    found: dict[str, list[str] | str] = {
        "tests": [*pytest, "-m", "gpu", "tests", f"--junitxml={folder}/tests.xml"],
        "benches": [*pytest, "benches", f"--ignore={ladder}", f"--ignore={whole}", "--benchmark", f"--benchmark-json={folder}/benches.json", f"--results={folder}"],
        "step": [*pytest, whole, "--benchmark", f"--results={folder}"],
        **{f"ladder:{shape}": [*pytest, ladder, "-k", shape, "--benchmark", f"--results={folder}/{shape}"] for shape in SHAPES},
        "recipes": ["benches/evidence.py", f"{folder}/recipes"],
    }  # fmt: skip
    return found | evidence(environment, folder) | scaling(folder)


def evidence(environment: Mapping[str, str], folder: Path) -> dict[str, list[str] | str]:
    """Teacher, methods and switches on the user's images."""
    recipe, data = environment.get("RECIPE", "configs/fast32.yaml"), environment.get("DATA")
    work = work_folder(environment, folder)
    features = environment.get("FEATURES", "pixels")
    one = ["-m", "engine.compare", recipe, f"run_dir={work}", f"features={features}", f"data.path={data}", "points=8", "teacher_points=4"]
    one += [f"teacher_seconds={environment.get('TEACHER_SECONDS', '480')}", f"seconds={environment.get('SECONDS', '180')}"]
    found: dict[str, list[str] | str] = {"teacher": [*one, "methods=teacher"]}
    found |= {f"method:{name}": [*one, f"methods={name}"] for name in METHODS}
    sys.path.insert(0, str(ROOT / "benches"))
    from time_to_quality import SWITCHES

    for switch in SWITCHES:
        found[f"time:{switch.name}"] = [
            "benches/time_to_quality.py", recipe, "--teacher", f"{work}/teacher.safetensors", "--features", features, "--only", switch.name,
            "--seconds", environment.get("SWITCH_SECONDS", "60"), "--work", f"{work}-switches", "--out", str(folder), "--", f"data.path={data}", "eval.n=2000",
        ]  # fmt: skip
    if not data:
        return dict.fromkeys(found, "wants DATA=FILE.zip: images of the recipe's size")
    return found


def scaling(folder: Path) -> dict[str, list[str] | str]:
    """Rehearsals of a small recipe over batch, resolution and width, of the large ones over batch, and what follows."""
    small = ["benches/scaling.py", "measure", f"{folder}/scaling-fast.json", "configs/fast32.yaml"]
    found: dict[str, list[str] | str] = {
        "scaling:fast": [*small, "--batch", "16,64,256", "--resolution", "32,64", "--channels", "64,128"],
    }
    for stem in LARGE:
        found[f"scaling:{stem}"] = [
            "benches/scaling.py", "measure", f"{folder}/scaling-{stem}.json", f"configs/{stem}.yaml", *(["method.features=[teacher]"] if "gdd" in stem else []),
            "--batch", "4,16,64",
        ]  # fmt: skip
    found["scaling:project"] = ["benches/scaling.py", "project", f"{folder}/scaling.json", "--measured", *(f"{folder}/scaling-{stem}.json" for stem in LARGE)]
    return found


def work_folder(environment: Mapping[str, str], folder: Path) -> Path:
    return ROOT / "runs" / f"{folder.name}-{Path(environment.get('RECIPE', 'configs/fast32.yaml')).stem}"


def main() -> None:
    name = slug(torch.cuda.get_device_name()) if torch.cuda.is_available() else "no-gpu"
    folder = ROOT / "benches/results" / f"{name}-{date.today().isoformat()}"
    known = steps(os.environ, folder)
    if os.environ.get("GPU_LIST"):
        print("\n".join(f"{name}: {' '.join(what) if isinstance(what, list) else what}" for name, what in known.items()))
        return
    if not torch.cuda.is_available():
        sys.exit("make gpu wants a CUDA device; this machine has none (make bench runs what a CPU can)")
    chosen = os.environ["GPU_STEPS"].split(",") if os.environ.get("GPU_STEPS") else list(known)
    if unknown := [name for name in chosen if name not in known]:
        sys.exit(f"GPU_STEPS wants some of {', '.join(known)}, got {unknown[0]!r}")
    folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in chosen:
        what, record = known[name], folder / f"{slug(name)}.step.json"
        if isinstance(what, str):
            print(f"{name}: not run: {what}")
            continue
        if record.exists() and json.loads(record.read_text())["code"] == 0 and not os.environ.get("REDO"):
            print(f"{name}: done before, see {record.relative_to(ROOT)}")
            continue
        failed |= step(name, what, folder, record) != 0
        write_readme(folder)
    keep_comparison(work_folder(os.environ, folder), folder)
    told = subprocess.run([sys.executable, "benches/readme.py"], cwd=ROOT, check=False)
    sys.exit(failed or told.returncode)


def keep_comparison(work: Path, folder: Path) -> None:
    """The table and the pictures of the methods, where they are there and small enough to commit."""
    if not (work / "summary.json").exists():
        return print(f"no comparison at {work} yet")
    shutil.copy(work / "summary.json", folder / "compare.json")
    pictures = [work / name for name in ("curves.png", "samples.png") if (work / name).exists()]
    if (size := sum(p.stat().st_size for p in pictures)) > MOST_BYTES:
        return print(f"pictures not kept: {size:,} bytes, wanted at most {MOST_BYTES:,}; they are in {work}")
    for picture in pictures:
        shutil.copy(picture, folder / picture.name)


def step(name: str, arguments: list[str], folder: Path, record: Path) -> int:
    """Run one step and write what it said; its exit code, 124 if it took too long (what it saved is used the next time)."""
    command = [sys.executable, *arguments]
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
    (folder / f"{slug(name)}.log").write_text(output)
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
