"""What a probe found out about a teacher, as heat maps, blocks by noise levels, and as a table."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from potstill.engine.skipping.plan import Plan
from potstill.engine.skipping.probe import ProbeResult


def heat_map(path: Path, result: ProbeResult, plan: Plan) -> None:
    """A PNG of three maps: activation relative to each block's largest, residual share, error of leaving it out alone.

    Crosses mark what the plan leaves out.
    """
    rows = max(3.0, 0.24 * len(result.names) + 1.6)
    figure = Figure((15, rows), layout="constrained")
    FigureCanvasAgg(figure)
    activation = result.activation / result.activation.max(1, keepdims=True)
    error = np.maximum(result.alone, 1e-6)
    maps = (
        ("mean |h| over the block's largest", activation, None),
        ("share of the residual branch", result.share, None),
        ("excess loss of leaving it out", error, LogNorm(1e-4, 1)),
    )
    for axes, (title, values, norm) in zip(figure.subplots(1, 3, sharey=True), maps, strict=True):
        shown = axes.imshow(values, aspect="auto", cmap="viridis", norm=norm)
        axes.set_title(title, fontsize=10)
        centres = np.sqrt(np.array(result.edges[:-1]) * np.array(result.edges[1:]))
        axes.set_xticks(range(len(centres)), [f"{c:.2g}" for c in centres], fontsize=7)
        axes.set_yticks(range(len(result.names)), result.names, fontsize=7)
        axes.set_xlabel("σ", fontsize=8)
        figure.colorbar(shown, ax=axes)
    for k, p in enumerate(plan.prefix):
        for name in plan.order[:p]:
            axes.plot(k, result.names.index(name), "x", color="red", markersize=6)
    figure.savefig(path, dpi=110)


def table(result: ProbeResult, plan: Plan) -> str:
    """The plan per bin, then the blocks: how much of the net's time, and the excess loss per bin of leaving each out alone."""
    lines = ["    σ from        to   left out   time saved   excess   summed    worst 5 %"]
    for k, one in enumerate(plan.report["bins"]):
        lines.append(
            f"{plan.edges[k]:10.4g} {plan.edges[k + 1]:9.4g} {plan.prefix[k]:5} of {len(result.names):<3}{one['latency_saved']:9.1%}"
            f"{one['excess']:11.3%}{one['summed']:9.3%}{one['worst_95']:11.3%}"
        )
    lines += ["", f"{'excess loss, alone':18} time  " + " ".join(f"{'bin ' + str(k + 1):>7}" for k in range(plan.bins))]
    for b, name in enumerate(result.names):
        cells = " ".join(f"{e:7.2%}" for e in result.alone[b])
        lines.append(f"{name:18}{result.latency[b]:5.1%}  {cells}")
    return "\n".join(lines)
