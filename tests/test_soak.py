"""`make soak`: its table covers what it says, its verdicts can be wrong, and one fault goes from its first call to its row."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from benches.scripts.soak import table
from benches.scripts.soak_endurance import EVERY, MOST_BYTES, judged, line_through
from benches.scripts.soak_faults import FAULTS
from benches.scripts.soak_judge import Wrong, check
from benches.scripts.soak_runs import CASES, Ended, difference, lines_lost
from potstill.engine.config.tree import load

ROOT = Path(__file__).parent.parent


def test_every_method_is_killed_stopped_and_damaged():
    """Every one that `method=` knows: a new one must be added to the cases."""

    @cache
    def of_recipe(name: str) -> str:
        return load(name, []).method.name

    def method(fault) -> str:
        recipe, *settings = CASES[fault.case.name]
        return next((text.removeprefix("method=") for text in settings if text.startswith("method=")), of_recipe(recipe))

    every = {file.stem for file in (ROOT / "configs/method").glob("*.yaml")}
    assert len(every) >= 12
    for kind in ("kill -9", "SIGTERM", "checkpoint"):
        assert {method(fault) for fault in FAULTS if fault.kind == kind} == every
    assert {(fault.case.ranks, fault.case.parallel) for fault in FAULTS} == {(1, "ddp"), (2, "ddp"), (2, "fsdp")}


def test_faults_are_many_and_no_two_have_one_name():
    assert len({str(fault) for fault in FAULTS}) == len(FAULTS) >= 100


WHOLE = {"metrics.jsonl": [{"step": 2, "loss": 0.1}, {"step": 4, "loss": 0.2}], "student.safetensors": "a", "summary.json": {"fd": 1.0}}


@pytest.mark.parametrize(
    ("name", "other", "said"),
    [
        ("metrics.jsonl", [{"step": 2, "loss": 0.1}, {"step": 4, "loss": np.nextafter(0.2, 1)}], "metrics.jsonl differs from line 2 on"),
        ("metrics.jsonl", [{"step": 2, "loss": 0.1}], "metrics.jsonl differs from line 2 on, of 2 and 1"),
        ("student.safetensors", "b", "student.safetensors differs"),
        ("summary.json", {"fd": 1.1}, "summary.json differs"),
        ("tsm.safetensors", "c", "files differ: tsm.safetensors"),
    ],
)
def test_any_difference_is_seen(name, other, said):
    assert difference(WHOLE, json.loads(json.dumps(WHOLE))) == ""
    assert said in difference(WHOLE, WHOLE | {name: other})
    assert lines_lost(WHOLE, WHOLE | {name: other}) == (name == "metrics.jsonl" and len(other) == 1)


ERROR = "error: the disk is full: make room\n"


@pytest.mark.parametrize(
    ("codes", "said", "left", "wanted", "wrong"),
    [
        ([2], ERROR, 0, "refused", ""),
        ([2], ERROR + ERROR, 0, "refused", "wanted refused"),
        ([1], ERROR, 0, "refused", "wanted refused"),
        ([2], "Traceback (most recent call last):\n  …\n" + ERROR, 0, "refused", "traceback"),
        ([143], "SIGTERM: saved 8.pt; the same command goes on from there\n", 0, "saved", ""),
        ([-15], "", 0, "saved", "wanted saved"),
        ([None, 0], "", 0, "done", "hung"),
        ([-9], "", 1, "killed", "1 processes stayed behind"),
        ([-9, 1], "error: rank 1 lost touch\n", 0, "lost", ""),
    ],
)
def test_an_end_that_is_not_as_it_must_be_is_wrong(codes, said, left, wanted, wrong):
    ended = Ended(codes, said, left)
    if not wrong:
        assert check(ended, wanted) is ended
    else:
        with pytest.raises(Wrong, match=wrong):
            check(ended, wanted)


def test_the_table_counts_each_kind():
    rows = [
        {"kind": k, "verdict": v, "fault": f"{k} {i}", "detail": "why"}
        for i, (k, v) in enumerate([("a", "FAIL"), ("a", "identical"), ("b", "identical")])
    ]
    assert table(rows).splitlines() == [
        "| fault | identical | FAIL |", "| --- | ---: | ---: |", "| a | 1 | 1 |", "| b | 1 |  |", "| **all** | **2** | **1** |", "", "- a 0: why"
    ]  # fmt: skip


@pytest.mark.parametrize(("leak", "flat"), [(0.0, True), (2 * MOST_BYTES, False)])
def test_a_leak_is_told_from_noise(leak, flat):
    noise = np.random.default_rng(0).normal(0, 2**20, 40)
    rows = [
        {"iteration": i * EVERY, "rss": 3e8 + leak * i * EVERY + noise[i], "workers": 2e8, "handles": 40 + i % 4, "threads": 5, "processes": 2}
        for i in range(40)
    ]  # fmt: skip
    found = judged(rows)
    assert found["flat"] == flat
    (slope, _), cov = np.polyfit([row["iteration"] for row in rows[10:]], [row["rss"] for row in rows[10:]], 1, cov=True)
    assert line_through([row["iteration"] for row in rows[10:]], [row["rss"] for row in rows[10:]]) == pytest.approx(
        (slope, cov[0, 0] ** 0.5)
    )
    assert not judged([row | {"threads": i} for i, row in enumerate(rows)])["flat"]


def test_one_fault_from_end_to_end(tmp_path):
    out = tmp_path / "faults.json"
    command = [
        sys.executable,
        "-m",
        "benches.scripts.soak",
        "--only",
        "SIGTERM: iteration 7 (dmd)",
        "--out",
        out,
        "--work",
        tmp_path / "work",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["verdict"] == "identical"
    assert "1 of 1 are right" in done.stdout
