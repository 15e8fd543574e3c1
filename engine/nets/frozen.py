"""Which weights of a U-Net stay as the teacher left them: the freeze levels of GDD-I (2405.20750, released code).

    0  none (GDD)
    1  the 3x3 convolutions of all residual blocks and the attentions' output projections (GDD-I): 84 % of an NCSN++
    2  the attentions' query, key and value too
    3  the 1x1 convolutions of the skips too

Norms, the maps of noise level and class, the blocks' affine maps of them, and the first and last convolutions always train.
"""

from torch import nn

from engine.errors import UserError

KINDS = (("conv", "proj"), ("qkv",), ("skip",))
PLACES = ("block", "in", "up", "down")


def is_frozen(name: str, level: int) -> bool:
    """Does a U-Net's parameter of this name stay at freeze level `level`? By the words in it, as in the released code."""
    kinds = [kind for kinds in KINDS[:level] for kind in kinds]
    return any(kind in name for kind in kinds) and any(place in name for place in PLACES)


def freeze(model: nn.Module, level: int) -> tuple[int, int]:
    """Take the parameters of freeze level 0 … 3 out of training, for good. Returns how many numbers stay, and of how many."""
    if level not in range(len(KINDS) + 1):
        raise UserError(f"method.freeze wants a level from 0 (train all) to {len(KINDS)}, got {level}")
    frozen = [p for name, p in model.named_parameters() if is_frozen(name, level)]
    for p in frozen:
        p.requires_grad_(False)
    return sum(p.numel() for p in frozen), sum(p.numel() for p in model.parameters())
