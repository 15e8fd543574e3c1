"""Which weights of a U-Net stay as the teacher left them: the freeze levels of GDD-I (2405.20750, released code).

    0  none (GDD)
    1  the 3x3 convolutions of all residual blocks and the attentions' output projections (GDD-I): 84 % of an NCSN++
    2  the attentions' query, key and value too
    3  the 1x1 convolutions of the skips too

Norms, the maps of noise level and class, the blocks' affine maps of them, and the first and last convolutions always train.
"""

from collections.abc import Sequence

from torch import nn

from potstill.engine.common.errors import UserError

KINDS = (("conv", "proj"), ("qkv",), ("skip",))
FREEZE_LEVELS = range(len(KINDS) + 1)
PLACES = ("block", "in", "up", "down")


def is_frozen(name: str, level: int) -> bool:
    """Does a U-Net's parameter of this name stay at freeze level `level`? By the words in it, as in the released code."""
    kinds = [kind for kinds in KINDS[:level] for kind in kinds]
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
