"""What a comparison shows of its summary: every method's distance against seconds and against images, with floor and teacher as
lines, and one table, for a terminal and as Markdown."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # a file is all that is wanted, also where there is no display
from matplotlib import pyplot as plt

from potstill.engine.common.writing import whole

AXES = {"seconds": "seconds of training", "images": "thousand images"}
SCALE = {"seconds": 1.0, "images": 1e-3}


def plot_comparison(summary: dict[str, Any], path: Path) -> None:
    """A PNG with one row per features; columns: the teacher's own training if it was watched, then seconds, then images.

    Every drawn method has a "curve" of points {"seconds", "images", "scores": {title: distance}}.
    """
    titles, teacher = list(summary["floor"]["scores"]), summary["teacher"]
    learnt = teacher.get("curve") or []
    columns = ([("teacher", "seconds")] if len(learnt) > 1 else []) + [("methods", "seconds"), ("methods", "images")]
    size = (4.2 * len(columns), 3.1 * len(titles))
    figure, grid = plt.subplots(len(titles), len(columns), figsize=size, squeeze=False, layout="constrained")
    for title, row in zip(titles, grid, strict=True):
        for (what, axis), ax in zip(columns, row, strict=True):
            curves = {"teacher": learnt} if what == "teacher" else {k: m["curve"] for k, m in summary["methods"].items()}
            for i, (name, curve) in enumerate(curves.items()):
                xs, ys = [p[axis] * SCALE[axis] for p in curve], [p["scores"][title] for p in curve]
                ax.plot(xs, ys, marker=".", color="black" if what == "teacher" else f"C{i}", label=name)
            ax.axhline(teacher["scores"][title], color="black", linestyle="--", linewidth=1, label=f"teacher, NFE {teacher['nfe']}")
            ax.axhline(summary["floor"]["scores"][title], color="grey", linestyle=":", linewidth=1, label="floor: real against real")
            ax.set(xlabel=AXES[axis], ylabel=title, yscale=scale(summary, title))
            ax.set_title(f"{what}: {title}, n = {summary['n']:,}", fontsize=9)
            ax.grid(alpha=0.3)
    grid[0][-1].legend(fontsize=7)
    with whole(path) as part:
        figure.savefig(part, dpi=90, format="png")
    plt.close(figure)


def scale(summary: dict[str, Any], title: str) -> str:
    """Logarithmic where all distances are above 0 and span more than a factor of five."""
    values = [summary["floor"]["scores"][title], summary["teacher"]["scores"][title]]
    values += [p["scores"][title] for m in summary["methods"].values() for p in m["curve"]]
    return "log" if min(values) > 0 and max(values) > 5 * min(values) else "linear"


def rows(summary: dict[str, Any]) -> list[list[str]]:
    """The table as text, the head first."""
    titles = list(summary["floor"]["scores"])
    found = [["method", "NFE", *titles, "seconds", "images", "img/s", "peak GiB"]]
    found.append(["floor", "", *(short(summary["floor"]["scores"][t]) for t in titles), "", "", "", ""])
    for name, one in [("teacher", summary["teacher"]), *summary["methods"].items()]:
        speed, peak = one["images_per_second"], one["peak_memory_gib"]
        found.append([
            name, str(one["nfe"]), *(short(one["scores"][t]) for t in titles), f"{one['seconds']:.0f}", f"{one['images']:,}",
            "" if speed is None else f"{speed:.0f}", "" if peak is None else f"{peak:.2f}",
        ])  # fmt: skip
    return found


def short(value: float) -> str:
    """Three or four digits."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def markdown(summary: dict[str, Any]) -> str:
    head, *body = rows(summary)
    lines = [head, ["---"] * len(head), *body]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def plain(summary: dict[str, Any]) -> str:
    """In columns as wide as what stands in them."""
    table = rows(summary)
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [[cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))] for line in table]
    return "\n".join("  ".join(line) for line in lines)
