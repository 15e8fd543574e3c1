"""`pytest benches --benchmark`: runs the benches this machine can, prints one table, writes JSON; says what it left out.

--benchmark        run them (without it they are skipped)
--compiled         time torch.compile of the plain version too (on a CPU a C++ build for every row, on a GPU Triton's)
--results DIR      where the JSON goes (.benchmarks), each row when it is measured
--resume           leave out what DIR has rows of
--ladder-seconds S what one ladder of bench_ladder.py may take (10)
--at-least R       fail a row whose eager/ours is below R

Warnings of a bench are shown and fail nothing: they are of PyTorch, Inductor or Triton, and a number is worth more.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benches import harness, rehearse
from benches import rows as on_disk

COLUMNS = ("case", "ours us", "eager", "formula", "compiled", "copy", "eager/ours", "GB/s", "of copy", "launches")
ROWS: list[dict[str, Any]] = []
PLACES = {place.kind: place for place in (harness.CPU, harness.CUDA)}
RUNGS = ("rung", "ms", "img/s", "of published", "of the one below", "of all", "ops", "launches", "kept MB", "peak MB", "MFU")
LEFT_OUT: set[str] = set()  # rungs of the ladder that this tree or device does not have, and why


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("potstill benches")
    group.addoption("--benchmark", action="store_true", help="run the benches")
    group.addoption("--compiled", action="store_true", help="time torch.compile of the plain version too")
    group.addoption("--results", default=".benchmarks", type=Path, help="folder the JSON is written to")
    group.addoption("--resume", action="store_true", help="leave out what the results folder has rows of")
    group.addoption("--ladder-seconds", type=float, default=10.0, help="what one ladder may take, warm-up apart")
    group.addoption("--at-least", type=float, default=0.0, help="fail a row whose eager/ours is below this")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = config.option.verbose < 1  # pytest-benchmark's own table only with -v


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):  # pytest itself takes files by name
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.match("bench_*.py")]
    for item in here:
        item.add_marker(pytest.mark.filterwarnings("default"))
        if not config.option.benchmark:
            item.add_marker(pytest.mark.skip(reason="benches run with --benchmark"))
        elif item.get_closest_marker("gpu") and not rehearse.THERE:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if config.option.resume:
        folder = config.option.results
        known = {row.get("test") for path in folder.glob("*.json") for row in json.loads(path.read_text()).get("rows", [])}
        done = [item for item in here if item.name in known]
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item not in done]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Two threads on a busy machine time the scheduler."""
    torch.set_num_threads(1)


@pytest.fixture
def record(request, benchmark):
    """record(row, ours): adds the row to the table, and `ours` to what pytest-benchmark stores and compares."""

    def add(row: dict[str, Any], ours: harness.Run) -> None:
        ROWS.append(row | {"test": request.node.name})
        on_disk.keep(request.config.option.results, ROWS[-1])
        benchmark.group = f"{row['group']} {row['kind']}"
        benchmark.extra_info.update(row)
        benchmark.pedantic(
            _synchronised(ours, row["kind"]), rounds=1 if rehearse.REHEARSING else 10, warmup_rounds=0 if rehearse.REHEARSING else 1
        )
        floor = request.config.option.at_least
        assert row["eager/ours"] >= floor, f"{row['case']}: eager/ours is {row['eager/ours']:.2f}, wanted {floor}"

    return add


@pytest.fixture
def record_ladder(request):
    """record_ladder(case, rows, why, kind): one ladder for the table and the JSON."""

    def add(case: str, rows: list[dict[str, Any]], why: list[str], kind: str) -> None:
        LEFT_OUT.update(f"{kind}: {reason}" for reason in why)
        for row in rows:
            ROWS.append({"group": "ladder", "kind": kind, "case": case, "test": request.node.name} | row)
            on_disk.keep(request.config.option.results, ROWS[-1])

    return add


def _synchronised(ours: harness.Run, kind: str):
    def once() -> None:
        ours(0)
        harness.wait(harness.CUDA if kind == "cuda" else harness.CPU)

    return once


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    line = terminalreporter.write_line
    if not config.option.benchmark:
        line("benches not run: pytest benches --benchmark runs them")
        return
    for kind in ("cpu", "cuda"):
        rows = [row for row in ROWS if row["kind"] == kind and row["group"] != "ladder"]
        if rows:
            _table(rows, kind, line)
        _ladders([row for row in ROWS if row["kind"] == kind and row["group"] == "ladder"], kind, line)
    if not rehearse.THERE:
        skipped = terminalreporter.stats.get("skipped", [])
        line(f"GPU groups not run ({len(skipped)} rows): torch {torch.__version__} sees no CUDA device")
    if not config.option.compiled:
        line("compiled not timed: --compiled does it, with a build for each row")
    for path in sorted({on_disk.place_of(config.option.results, row["group"], row["kind"]) for row in ROWS}):
        line(f"written: {path}")


def _table(rows: list[dict[str, Any]], kind: str, line) -> None:
    line("")
    line(", ".join(f"{k} {v}" for k, v in harness.machine(PLACES[kind]).items()))
    line("us per forward + backward, medians of interleaved rounds; eager: the same outputs in plain PyTorch; formula: the")
    line("same without leaving out non-finite samples; copy: a copy moving as many bytes as ours, GB/s counts those")
    _columns(rows, COLUMNS, line)


def _ladders(rows: list[dict[str, Any]], kind: str, line) -> None:
    if rows:
        line("")
        line(", ".join(f"{k} {v}" for k, v in harness.machine(PLACES[kind]).items()))
        line("a step or a net, medians of interleaved rounds; ratios are speed over that of another rung; kept: for backward")
        for reason in sorted(LEFT_OUT):
            line(f"left out on {reason}")
    for case in dict.fromkeys(row["case"] for row in rows):
        line("")
        line(case)
        some = [row for row in rows if row["case"] == case]
        _columns(some, tuple(c for c in RUNGS if any(row.get(c) is not None for row in some)), line)


def _columns(rows: list[dict[str, Any]], columns: tuple[str, ...], line) -> None:
    shown = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(r[i]) for r in [list(columns), *shown]) for i in range(len(columns))]
    for cells in [list(columns), *shown]:
        line("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) and value >= 10 else f"{value:.2f}" if isinstance(value, float) else str(value)
