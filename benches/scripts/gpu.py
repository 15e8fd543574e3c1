"""make gpu: everything that needs a GPU, in steps that fit into MINUTES and go on where the last call stopped.

    make gpu                                  twelve minutes of evidence (benches/scripts/plans.py says in which order)
    make gpu PLAN=quality DATA=FILE.zip       a teacher and five methods on your images
    make gpu PLAN=ladder                      the long rest
    make gpu REHEARSE=1                       the same plan on a CPU, tiny: so that nothing fails for a typo when it counts
    make gpu GPU_LIST=1                       the steps, what each is expected to take, what it would run

    MINUTES=12        no step is started that is not expected to fit; one that takes much longer than expected is ended
    PACK=FOLDER       after every row and step, all results so far in one .tar.gz there
    RESULTS=FOLDER    benches/results/<device>-<date>; a folder of an earlier call is gone on with
    GPU_STEPS=a,b     some of the steps;  REDO=1 repeats those that are done
    FEATURES=NAME:FILE,…  RECIPE=configs/fast64.yaml  TEACHER_SECONDS=300  SECONDS=70  SWITCH_SECONDS=60

The results folder holds one JSON a group of rows (each row is on disk when it is measured), steps.json, a log a step, and a
README.md; at last the marked sections of the project's README are rewritten from it. Needs no network, installs nothing.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from benches import RESULTS, ROOT, harness, rehearse, rows
from benches.scripts import plans
from benches.scripts.plans import Step

MOST_BYTES = 2 << 20  # of the pictures of a result folder
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG
LIBC = ctypes.CDLL(None)  # opened before any fork
#: As torch.profiler sets where Inductor captures: CUPTI that is torn down after a profile breaks CUDA graphs in the next.
CUPTI = {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}


def main() -> None:
    name, folder = os.environ.get("PLAN") or "evidence", results_folder()
    if not (rehearse.THERE or os.environ.get("GPU_LIST")):
        sys.exit(
            "make gpu wants a CUDA device; this machine has none (make gpu REHEARSE=1 tries the plan without one, make bench runs what a CPU can)"
        )
    if rehearse.REHEARSING:
        prepare_rehearsal(name, folder)
    try:
        plan = steps_named(plans.steps(name, os.environ, folder), os.environ.get("GPU_STEPS", ""))
        seconds = budget(name)
    except ValueError as error:
        sys.exit(f"make gpu: {error}")
    if os.environ.get("GPU_LIST"):
        return print(table(plan))
    folder.mkdir(parents=True, exist_ok=True)
    failed = run(plan, folder, time.monotonic() + seconds)
    copy_comparison(plans.work_folder(os.environ, folder), folder)
    write_readme(folder)
    rows.pack(folder)
    sys.exit(int(failed) or rewrite_project_readme(folder))


def prepare_rehearsal(plan: str, folder: Path) -> None:
    """A rehearsal that was whole begins anew, one that was killed goes on; a comparison gets a second, and images of nothing."""
    known = read_steps(folder)
    if known and all(record["code"] == 0 for record in known.values()) and (folder / "PROJECT.md").exists():
        shutil.rmtree(folder)
        shutil.rmtree(plans.work_folder(os.environ, folder), ignore_errors=True)
    if plan == "quality":
        folder.mkdir(parents=True, exist_ok=True)
        for key, value in {"DATA": str(random_images(folder)), "SECONDS": "1", "TEACHER_SECONDS": "1"}.items():
            os.environ[key] = os.environ.get(key) or value


def results_folder() -> Path:
    if given := os.environ.get("RESULTS"):
        return Path(given).absolute()
    if rehearse.REHEARSING:
        return ROOT / f"runs/rehearsals/{os.environ.get('PLAN') or 'evidence'}"
    device = slug(harness.machine(harness.CUDA)["device"]) if rehearse.THERE else "no-gpu"
    return RESULTS / f"{device}-{date.today().isoformat()}"


def budget(plan: str) -> float:
    """Seconds. ValueError for MINUTES that are no number above 0."""
    given = os.environ.get("MINUTES") or str(plans.MINUTES.get(plan, 0))
    try:
        minutes = float(given)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise ValueError(f"MINUTES wants a number above 0, got {given!r}")
    return 60 * minutes


def steps_named(plan: list[Step], names: str) -> list[Step]:
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in {step.name for step in plan}]:
        raise ValueError(f"GPU_STEPS wants some of {', '.join(step.name for step in plan)}, got {unknown[0]!r}")
    return [step for step in plan if not wanted or step.name in wanted]


def run(plan: list[Step], folder: Path, deadline: float) -> bool:
    """Every step that fits, those that were never tried before those that failed; whether any failed or was not reached."""
    known = read_steps(folder)
    redo, bad = bool(os.environ.get("REDO")), False
    for step in sorted(plan, key=lambda step: step.name in known):
        if step.why_not:
            print(f"{step.name}: not run: {step.why_not}")
        elif known.get(step.name, {}).get("code") == 0 and not redo:
            print(f"{step.name}: done before, in {known[step.name]['seconds']} s")
        elif (left := deadline - time.monotonic()) < step.seconds and not rehearse.REHEARSING:
            bad = True
            print(
                f"{step.name}: not started: expected to take {step.seconds:.0f} s, {max(left, 0):.0f} s are left; the same command goes on"
            )
        else:
            record = run_step(step, folder, left)
            known[step.name] = record
            rows.write(folder / "steps.json", {"machine": harness.machine(harness.CUDA), "steps": known})
            write_readme(folder)
            rows.pack(folder)
            bad |= record["code"] != 0
    return bad


def run_step(step: Step, folder: Path, left: float) -> dict[str, Any]:
    """Run one step; what became of it. Its output goes straight into its log. Exit code 124: it was ended for its time."""
    print(f"== {step.name}, expected to take {step.seconds:.0f} s", flush=True)
    log, start = folder / f"{slug(step.name)}.log", time.monotonic()
    most = 600.0 if rehearse.REHEARSING else min(left, 1.5 * step.seconds + 20)
    environment = os.environ | CUPTI | {"PYTHONUNBUFFERED": "1"} | (rehearsal_environment(step) if rehearse.REHEARSING else {})
    with log.open("a") as output:
        begins = output.tell()
        process = subprocess.Popen(
            [sys.executable, *step.command], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        try:
            code = process.wait(timeout=most)
        except subprocess.TimeoutExpired:
            code = 124
        finally:  # Ctrl-C too: nothing goes on behind our back
            kill(process)
    said = log.read_bytes()[begins:].decode(errors="replace").strip()
    print(said[-3000:], flush=True)
    return {
        "code": code, "seconds": round(time.monotonic() - start, 1), "expected": step.seconds, "last_line": said.rpartition("\n")[2],
        "rehearsal": rehearse.REHEARSING, **{key: harness.machine(harness.CUDA)[key] for key in ("commit", "date")},
    }  # fmt: skip


def rehearsal_environment(step: Step) -> dict[str, str]:
    """What a step finds in its environment in a rehearsal: one thread, since threads that share a busy core wait for each other,
    and the interpreter where a kernel must run. What only trains takes the kernels' definitions, as any CPU does."""
    kernels = step.name in ("kernels are right", "kernels", "nsight", "compiled")
    return {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if kernels else {})


def die_with_parent() -> None:
    """In the child: be killed when `make gpu` is, so that a new call has the folder for itself."""
    if sys.platform == "linux":
        LIBC.prctl(DIES_WITH_PARENT, signal.SIGKILL)


def kill(process: subprocess.Popen) -> None:
    """The process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def read_steps(folder: Path) -> dict[str, Any]:
    path = folder / "steps.json"
    return json.loads(path.read_text())["steps"] if path.exists() else {}


def table(plan: list[Step]) -> str:
    """The plan as text: when each step begins if all take what is expected."""
    lines, begins = [f"{'begins':>6}  {'takes':>5}  step"], 0.0
    for step in plan:
        lines.append(f"{begins:5.0f}s  {step.seconds:4.0f}s  {step.name}: {step.why_not or ' '.join(step.command)}")
        begins += 0 if step.why_not else step.seconds
    return "\n".join([*lines, f"{begins:5.0f}s         in all"])


def copy_comparison(work: Path, folder: Path) -> None:
    """The table and the pictures of the methods, where they are there and small enough to commit."""
    if not (work / "summary.json").exists():
        return
    shutil.copy(work / "summary.json", folder / "compare.json")
    pictures = [work / name for name in ("curves.png", "samples.png") if (work / name).exists()]
    if (size := sum(p.stat().st_size for p in pictures)) > MOST_BYTES:
        return print(f"pictures not kept: {size:,} bytes, wanted at most {MOST_BYTES:,}; they are in {work}")
    for picture in pictures:
        shutil.copy(picture, folder / picture.name)


def write_readme(folder: Path) -> None:
    """A table of what each step said."""
    about = ", ".join(f"{key} {value}" for key, value in harness.machine(harness.CUDA).items() if key not in ("date", "commit"))
    table = ["| step | exit code | seconds | expected | commit | last line |", "|---|---|---|---|---|---|"]
    for name, r in read_steps(folder).items():
        table.append(
            f"| {name} | {r['code']} | {r['seconds']} | {r['expected']:.0f} | {r['commit']} | {r['last_line'].replace('|', '/')[:200]} |"
        )
    (folder / "README.md").write_text(f"# {folder.name}\n\n{about}\n\n" + "\n".join(table) + "\n")


def rewrite_project_readme(folder: Path) -> int:
    """The marked sections of README.md anew; of a rehearsal, of a copy of it that lies in its folder."""
    command = [sys.executable, *plans.script("readme")]
    if rehearse.REHEARSING:
        text = (ROOT / "README.md").read_text()
        (folder / "PROJECT.md").write_text(re.sub(r"<!-- results:(?!gpu)(?s:.*?)<!-- /results -->\n", "", text))
        command += [f"--readme={folder}/PROJECT.md", f"--results={folder.parent}"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def random_images(folder: Path) -> Path:
    """A few images of nothing, to rehearse a comparison on."""
    import numpy as np

    path = folder / "images.npz"
    generator = np.random.default_rng(0)
    np.savez(path, images=generator.integers(0, 256, (24, 32, 32, 3), np.uint8), labels=np.arange(24) % 4)
    return path


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    main()
