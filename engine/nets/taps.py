"""The first half of a diffusers model, sharing all of its modules, and what its blocks see in an input.

No hook is set on a block: blocks are sharded and compiled one by one, and a compiled one does not look for new hooks. The model is
copied shallowly instead, its later blocks are left out, and others, which only note what they are given, put between and after.
"""

from functools import cache
from itertools import accumulate
from typing import Any, TypeVar

from torch import Tensor, nn

from potstill.engine.nets.families import Family

M = TypeVar("M", bound=nn.Module)


class Noted(nn.Module):
    """Appends its first input to a list, and passes it on: with the text beside it, if so do the blocks that it stands between."""

    def __init__(self, seen: list[Tensor], pair: bool = False):
        super().__init__()
        self.seen, self.pair = seen, pair

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any = None, *others: Any, **named: Any) -> Any:
        self.seen.append(hidden_states)
        return (encoder_hidden_states, hidden_states) if self.pair else hidden_states


def tapped(model: nn.Module, family: Family) -> tuple[nn.Module, list[Tensor]]:
    """A view of the model without its later half, and the list that a call of it fills; the first of what it returns means nothing.

    A call also returns what it noted: a sharded model gathers its weights for backward when a gradient comes to what it returned.
    """
    seen: list[Tensor] = []
    view = (_half_transformer if family.stacks else _encoder)(model, family, seen)
    view.__class__, view.__dict__["seen"] = _returning(type(model)), seen
    return view, seen


@cache
def _returning(kind: type[nn.Module]) -> type[nn.Module]:
    """The class with a forward that also returns what was seen. (One put into a view would be a circle, which keeps what it saw.)"""

    class Tapped(kind):
        def forward(self, *inputs: Any, **named: Any) -> tuple[Any, ...]:
            return (*super().forward(*inputs, **named), *self.__dict__["seen"])

    return Tapped


def depths(model: nn.Module, family: Family) -> set[int]:
    """After how many of a transformer's blocks: a quarter of them, and half."""
    count = sum(len(getattr(model, name)) for name in family.stacks)
    return {max(count // 4, 1), max(count // 2, 1)}


def _encoder(model: nn.Module, family: Family, seen: list[Tensor]) -> nn.Module:
    """A U-Net up to its middle: notes what goes into each downsampling, and what comes out of the middle."""
    view = _shallow(model)
    view.down_blocks = nn.ModuleList(_noting(block, seen) for block in view.down_blocks)  # pyright: ignore
    view.up_blocks = nn.ModuleList()
    view.conv_norm_out, view.conv_act, view.conv_out = Noted(seen), nn.Identity(), nn.Identity()
    return view


def _noting(block: nn.Module, seen: list[Tensor]) -> nn.Module:
    if block.downsamplers is None:
        return block
    block = _shallow(block)
    block.downsamplers = nn.ModuleList([Noted(seen), *block.downsamplers])  # pyright: ignore
    return block


def _half_transformer(model: nn.Module, family: Family, seen: list[Tensor]) -> nn.Module:
    """A transformer's first half: notes what comes out of a quarter of its blocks, and of half of them."""
    view, stacks = _shallow(model), {name: list(getattr(model, name)) for name in family.stacks}
    wanted = depths(model, family)
    starts = accumulate(map(len, stacks.values()), initial=0)
    for start, (name, blocks) in zip(starts, stacks.items(), strict=False):
        kept: list[nn.Module] = []
        for i, block in enumerate(blocks, start + 1):
            if i <= max(wanted):
                kept.append(block)
            if i in wanted:
                kept.append(Noted(seen, family.stacks[name]))
        setattr(view, name, nn.ModuleList(kept))
    return view


def _shallow(module: M) -> M:
    """The module again with the same modules and tensors in it, of which the modules can be replaced."""
    view = object.__new__(type(module))  # copy.copy would call the class, which FSDP's take for another wish
    view.__dict__ = {name: value for name, value in module.__dict__.items() if name != "_compiled_call_impl"}
    view.__dict__["_modules"] = dict(module._modules)
    return view
