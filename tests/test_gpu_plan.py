"""make gpu without a GPU: what fits is started, what was measured is kept, what is there is not done again."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from itertools import pairwise
from pathlib import Path

import pytest

from benches import rows
from benches.scripts import gpu, gpu_section, nsight, plans, readme
from potstill.engine.config.library import file_of

ROOT = Path(__file__).parent.parent
MACHINE = {"device": "Some GPU", "torch": "2.11.0", "driver": "580.1", "commit": "abc", "date": "2026-01-02 03:04"}


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    """Of a machine that there is not."""
    monkeypatch.setattr(rows.harness, "machine", lambda place: MACHINE)
    monkeypatch.delenv("PACK", raising=False)
    for name in ("REDO", "MINUTES", "PLAN", "GPU_STEPS", "DATA"):
        monkeypatch.delenv(name, raising=False)


def row(case, **more):
    return {"group": "losses", "kind": "cuda", "case": case, "ours us": 1.5} | more


def step(name, seconds, code):
    return plans.Step(name, seconds, ["-c", code])


# rows


def test_a_row_is_on_disk_and_in_the_pack_when_it_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PACK", str(tmp_path / "pack"))
    folder = tmp_path / "some-2026-01-02"
    for one in (row("a"), row("b"), row("a", **{"ours us": 2.5})):
        rows.keep(folder, one)
    told = json.loads((folder / "losses.json").read_text())
    assert told == {"machine": MACHINE, "rows": [row("b"), row("a", **{"ours us": 2.5})]}
    with tarfile.open(tmp_path / "pack/some-2026-01-02.tar.gz") as archive:
        assert json.load(archive.extractfile("some-2026-01-02/losses.json")) == told
        assert [Path(name).name for name in archive.getnames() if Path(name).name.startswith(".")] == []


KEEPS = """
import sys, time
from benches import rows
from itertools import pairwise
from pathlib import Path
rows.harness.machine = lambda place: {}
for i in range(1000):
    rows.keep(Path(sys.argv[1]), {"group": "losses", "kind": "cuda", "case": str(i)})
    print(i, flush=True)
"""


def test_a_killed_process_loses_no_row_that_it_told_of_and_leaves_whole_files(tmp_path):
    environment = os.environ | {"PACK": str(tmp_path / "pack")}
    with subprocess.Popen(
        [sys.executable, "-c", KEEPS, str(tmp_path / "f")], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        told = [process.stdout.readline() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read().splitlines()
    (path,) = (tmp_path / "f").glob("*.json")
    assert len(rows.rows_in(path)) >= len([line for line in told if line.strip()]) >= 20
    with tarfile.open(tmp_path / "pack/f.tar.gz") as archive:
        assert len(json.load(archive.extractfile(f"f/{path.name}"))["rows"]) >= 20


BENCH = """
import pathlib
import pytest
ran = []
@pytest.mark.parametrize("case", ["a", "b"])
def test_one(case, record):
    import warnings
    warnings.warn("a library's", FutureWarning)
    record({"group": "made", "kind": "cpu", "case": case, "eager/ours": 1.0}, lambda k: ran.append(case))
    pathlib.Path("ran-" + case).touch()
"""


def test_a_bench_outlives_warnings_and_leaves_out_what_has_a_row(tmp_path):
    (tmp_path / "bench_made.py").write_text(BENCH)
    (tmp_path / "conftest.py").write_text((ROOT / "benches/conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\nmarkers = gpu: x\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark", "--results=out", "--resume"]
    # pytest-benchmark warns at the end of a session whose environment says that it is xdist's first worker.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")} | {"PYTHONPATH": str(ROOT)}
    first = subprocess.run([*command, "bench_made.py::test_one[a]"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    second = subprocess.run([*command, "bench_made.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (first.returncode, second.returncode) == (0, 0), first.stdout + second.stdout
    assert "1 passed, 1 deselected" in second.stdout
    assert "a library's" in first.stdout
    assert {path.name for path in tmp_path.glob("ran-*")} == {"ran-a", "ran-b"}
    assert [one["case"] for one in json.loads((tmp_path / "out/made.json").read_text())["rows"]] == ["a", "b"]


# the plan


def test_only_what_fits_is_started_and_the_next_call_goes_on(tmp_path, capsys):
    plan = [step("short", 1, "print('one')"), step("long", 600, "print('two')"), step("last", 2, "print('three')")]
    assert gpu.run(plan, tmp_path, time.monotonic() + 60) is True
    assert "long: not started: expected to take 600 s" in capsys.readouterr().out
    assert {name: one["code"] for name, one in gpu.read_steps(tmp_path).items()} == {"short": 0, "last": 0}
    assert gpu.run(plan, tmp_path, time.monotonic() + 700) is False
    assert "short: done before" in capsys.readouterr().out
    known = gpu.read_steps(tmp_path)["long"]
    assert (known["code"], known["last_line"], known["expected"]) == (0, "two", 600)
    assert (tmp_path / "long.log").read_text() == "two\n"


def test_what_failed_is_tried_again_after_what_was_never_tried(tmp_path):
    order = tmp_path / "order"
    write = "open({!r}, 'a').write({!r} + ' '); raise SystemExit({})"
    fails = step("fails", 1, write.format(str(order), "fails", 3))
    assert gpu.run([fails], tmp_path, time.monotonic() + 60) is True
    gpu.run([fails, step("new", 1, write.format(str(order), "new", 0))], tmp_path, time.monotonic() + 60)
    assert order.read_text().split() == ["fails", "new", "fails"]
    assert gpu.read_steps(tmp_path)["fails"]["code"] == 3


def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    child = (
        f"import subprocess, sys; p = subprocess.Popen(['sleep', '300']); open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); p.wait()"
    )
    start = time.monotonic()
    record = gpu.run_step(step("hangs", 300, child), tmp_path, left=3)
    assert record["code"] == 124
    assert time.monotonic() - start < 200  # and not the 300 s that it would take
    for _ in range(600):  # the child of a killed process is reaped by init
        status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("a process was left behind")


TAKES = """
import sys
from itertools import pairwise
from pathlib import Path
from benches.scripts import gpu, plans
gpu.run_step(plans.Step("waits", 9, ["-c", {waits!r}]), Path({folder!r}), 300)
"""


def test_a_killed_plan_leaves_no_step_behind(tmp_path):
    waits = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    code = TAKES.format(waits=waits, folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    for _ in range(600):
        status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the step goes on")


@pytest.mark.parametrize("plan", ["evidence", "quality"])
def test_a_plan_fits_into_its_minutes_and_names_files_that_are_there(plan, tmp_path):
    steps = plans.steps(plan, {"DATA": "a.zip"}, tmp_path, results=tmp_path)
    assert sum(one.seconds for one in steps) <= 60 * plans.MINUTES[plan]
    assert len({one.name for one in steps}) == len(steps)
    for one in steps:
        scripts = [f"{word.replace('.', '/')}.py" for word in one.command if word.startswith("benches.")]
        files = [*scripts, *(word for word in one.command if word.startswith(("benches/", "tests/", "configs/")))]
        assert files
        assert all((ROOT / file).exists() or file_of(ROOT / file) for file in files), files


def test_every_bench_has_its_place_in_a_plan(tmp_path):
    named = {word for plan in ("evidence", "ladder") for one in plans.steps(plan, {}, tmp_path, tmp_path) for word in one.command}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "benches").glob("bench_*.py")} <= named


def test_without_images_a_comparison_says_what_it_wants(tmp_path):
    assert {one.why_not for one in plans.steps("quality", {}, tmp_path)} == {"wants DATA=FILE, images of the recipe's size"}
    known = {
        one.name: one
        for one in plans.steps("quality", {"DATA": "a.zip", "RECIPE": "configs/fast64.yaml", "SECONDS": "7"}, tmp_path, tmp_path)
    }
    told = [*known["method sfd"].command, *map(" ".join, pairwise(known["method sfd"].command))]
    assert {"configs/fast64.yaml", "data.path=a.zip", "--seconds 7", "--methods sfd"} <= set(told)
    assert known["method sfd"].seconds == 17


def test_the_last_real_run_corrects_what_is_expected(tmp_path):
    for name, seconds, code, rehearsal in (
        ("a-2026-01-01", 11, 0, False),
        ("a-2026-02-01", 22, 0, False),
        ("b-2026-03-01", 33, 124, False),
        ("c-2026-04-01", 44, 0, True),
    ):
        rows.write(tmp_path / name / "steps.json", {"steps": {"kernels": {"code": code, "seconds": seconds, "rehearsal": rehearsal}}})
    assert {one.name: one.seconds for one in plans.steps("evidence", {}, tmp_path, tmp_path)}["kernels"] == 22


@pytest.mark.parametrize(
    ("given", "words"),
    [({"PLAN": "all"}, "PLAN wants one of evidence, quality, ladder, got 'all'"), ({"MINUTES": "soon"}, "MINUTES wants a number above 0, got 'soon'"), ({"GPU_STEPS": "kernel"}, "GPU_STEPS wants some of .*, got 'kernel'")],
)  # fmt: skip
def test_what_is_given_wrongly_is_one_sentence(given, words, tmp_path, monkeypatch):
    for key, value in (given | {"GPU_LIST": "1", "RESULTS": str(tmp_path)}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit, match=words):
        gpu.main()
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    done = subprocess.run(
        ["make", "gpu", f"RESULTS={tmp_path}/r", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2
    assert "wants a CUDA device; this machine has none (make gpu REHEARSE=1" in done.stderr
    assert not (tmp_path / "r").exists()


# what becomes of the results


NCU = """\
==PROF== Connected to process 71
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","71","python3.12","127.0.0.1","_partials_kernel","1","7","(128, 1, 1)","(2048, 1, 1)","0","9.0","Command line profiler metrics","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","88.25"
"0","71","python3.12","127.0.0.1","_partials_kernel","1","7","(128, 1, 1)","(2048, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","us","1,234.5"
"1","71","python3.12","127.0.0.1","void at::native::vectorized_elementwise_kernel<4>(int)","1","7","(128, 1, 1)","(1, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","us","2"
"2","71","python3.12","127.0.0.1","void potstill::norm_kernel<float>(float *)","1","7","(128, 1, 1)","(1, 1, 1)","0","9.0","Command line profiler metrics","launch__registers_per_thread","register/thread","40"
"""


def test_nsights_table_becomes_a_row_a_launch_of_ours():
    assert list(nsight.kernels_in(NCU.splitlines())) == [
        {"case": "_partials_kernel (0)", "% of memory peak": 88.25, "ns": 1234500.0},
        {"case": "void potstill::norm_kernel<float>(float *) (2)", "registers": 40.0},
    ]


def test_the_readmes_section_holds_what_there_is_and_names_what_there_is_not(tmp_path):
    folder = tmp_path / "some-gpu-2026-01-02"
    rows.keep(folder, row("sim", **{"eager/ours": 1.234, "of copy": 0.876, "launches": "3 / 40"}))
    rows.write(
        folder / "steps.json",
        {
            "machine": MACHINE,
            "steps": {"kernels are right": {"code": 0, "last_line": "== 70 passed in 60.12s =="}, "nsight": {"code": 1, "last_line": ""}},
        },
    )
    rows.write(tmp_path / "some-gpu-2026-01-01/steps.json", {"machine": {"device": "before"}, "steps": {}})
    rows.write(tmp_path / "cpu-kernels/losses.json", {"machine": {"device": "a CPU"}, "rows": [row("no")]})
    text, sources = gpu_section.section(tmp_path)
    assert text.startswith("**Some GPU** (driver 580.1, torch 2.11.0, commit abc, date 2026-01-02 03:04).")
    assert "Tests there: kernels are right: 70 passed in 60.12s." in text
    assert "Not whole: nsight (exit code 1)." in text
    assert "| sim | 1.5 | 1.23 | 0.88 | 3 / 40 |" in text
    assert "Not measured there: rates, norm_silu, optimiser, EDM2's operations, whole iterations, recipes, layouts, nsight" in text
    assert "before" not in text
    assert "a CPU" not in text
    assert readme.unsourced(text, sources) == []
    assert gpu_section.newest(tmp_path) == [folder]
