"""The summary of a comparison as one table: for a terminal, and as Markdown."""

from typing import Any


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
