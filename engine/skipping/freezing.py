"""Which weights of a one-step GAN student stay as the teacher left them.

The freeze levels of GDD-I (2405.20750, released code):

    0  none (GDD)
    1  the 3x3 convolutions of all residual blocks and the attentions' output projections (GDD-I): 84 % of an NCSN++
    2  the attentions' query, key and value too
    3  the 1x1 convolutions of the skips too

EDM2's nets have the same kinds of layers under other names (conv_res, attn_proj, attn_qkv, conv_skip), and these levels; that is ours, not
published. Norms, the maps of noise level and class, the blocks' affine maps of them, and the first and last convolutions always train.

The paper freezes by kind. `propose` is ours: at as many trained parameters as a published level, what trains is chosen by
*need*. A block that matters at some noise levels (its Taylor error) but not at the highest, where the student starts, has to
be woken up; one that matters there as much as anywhere is ready for one step and stays.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from potstill.engine.common.errors import UserError
from potstill.engine.common.kinds import is_dict, is_list, is_text
from potstill.engine.skipping.plan import Plan
from potstill.engine.skipping.probe import ProbeResult

KINDS = (("conv", "proj"), ("qkv",), ("skip",))
FREEZE_LEVELS = range(len(KINDS) + 1)
MOST = len(KINDS)  # the level whose parameters are up for choice: all that any level freezes
PLACES = ("block", "in", "up", "down")


def is_frozen(name: str, level: int) -> bool:
    """Does a U-Net's parameter of this name stay at freeze level `level`? By the words in it, as in the released code."""
    kinds = [kind for kinds in KINDS[:level] for kind in kinds]
    name = name.replace("conv_skip", "skip")  # EDM2's
    return any(kind in name for kind in kinds) and any(place in name for place in PLACES)


def freeze(model: nn.Module, level: int) -> tuple[int, int]:
    """Take the parameters of freeze level 0 … 3 out of training, for good. Returns how many numbers stay, and of how many."""
    assert level in FREEZE_LEVELS
    return freeze_named(model, [name for name, _ in model.named_parameters() if is_frozen(name, level)])


def freeze_named(model: nn.Module, names: Sequence[str]) -> tuple[int, int]:
    """The same for parameters chosen by name. UserError for a name that the model lacks."""
    parameters = dict(model.named_parameters())
    if unknown := [name for name in names if name not in parameters]:
        raise UserError(f"method.freeze_plan freezes {unknown[0]}, which this net lacks: probe this teacher with potstill probe")
    for name in names:
        parameters[name].requires_grad_(False)
    return sum(parameters[name].numel() for name in names), sum(p.numel() for p in parameters.values())


def proposed(plan: Plan, level: int) -> list[str]:
    """What a plan proposes to freeze instead of a published level."""
    found: Any = plan.report
    for name in ("freeze", "levels", str(level), "frozen"):
        found = found.get(name) if is_dict(found) else None
    if not is_list(found, is_text):
        raise UserError(f"method.freeze_plan wants method.freeze from 1 to {MOST} and a plan that potstill probe wrote, got level {level}")
    return found


def need(result: ProbeResult) -> dict[str, float]:
    """Per block in [0, 1]: 1 - its Taylor error at the highest noise levels over the largest of all levels'."""
    top = result.taylor.max(1)
    return dict(zip(result.names, (1 - result.taylor[:, -1] / np.maximum(top, 1e-30)).tolist(), strict=True))


def chosen_frozen(model: nn.Module, needs: dict[str, float], level: int) -> list[str]:
    """Parameters that stay, by name: as few trained numbers as at freeze level `level`, spent on the neediest blocks.

    A layer is trained or frozen as a whole (weight and bias); what no longer fits is passed over.
    """
    parameters = dict(model.named_parameters())
    layers: dict[str, int] = {}
    for name, p in parameters.items():
        if is_frozen(name, MOST):
            layer = name.rpartition(".")[0]
            layers[layer] = layers.get(layer, 0) + p.numel()
    allowed = sum(p.numel() for name, p in parameters.items() if is_frozen(name, MOST) and not is_frozen(name, level))
    trained = set()
    for layer in sorted(layers, key=lambda layer: -needs.get(".".join(layer.split(".")[:2]), 1.0)):
        if layers[layer] <= allowed:
            allowed -= layers[layer]
            trained.add(layer)
    return [name for name in parameters if is_frozen(name, MOST) and name.rpartition(".")[0] not in trained]


def propose(model: nn.Module, result: ProbeResult) -> dict[str, Any]:
    """For every published level: what to freeze instead, and how many numbers each of the two trains."""
    needs, levels = need(result), {}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    for level in range(1, MOST + 1):
        names = chosen_frozen(model, needs, level)
        levels[str(level)] = {
            "frozen": names,
            "trained": sum(sizes.values()) - sum(sizes[name] for name in names),
            "trained_published": sum(size for name, size in sizes.items() if not is_frozen(name, level)),
        }
    return {"need": needs, "levels": levels}
