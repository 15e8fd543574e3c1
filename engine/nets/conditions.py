"""What a net is told besides noise levels: classes, a tensor of one-hot rows [N, K], or embedded prompts (Text)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from potstill.engine.common.errors import UserError


@dataclass(frozen=True, eq=False)
class Text:
    """N embedded prompts. It is indexed by rows like the tensor of classes that it stands for; its fields are read by name."""

    embeds: Tensor  # [N, L, C]
    mask: Tensor | None = None  # [N, L] bool: True is a token, False padding; None: the net takes no mask
    pooled: Tensor | None = None  # [N, P]: what the net takes of the prompt as a whole
    extra: dict[str, Tensor] = field(default_factory=dict)  # more rows by the net's own names, such as SDXL's time_ids [N, 6]

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> "Text":
        """The rows of a slice, or of a tensor of indices or truth values [N]."""
        return self.map(lambda t: t[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> "Text":
        """`change` of every tensor."""
        mask, pooled = (t if t is None else change(t) for t in (self.mask, self.pooled))
        return Text(change(self.embeds), mask, pooled, {name: change(t) for name, t in self.extra.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Text":
        """On a device, with its floating-point tensors in `dtype`."""
        return self.map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def filled(self, length: int) -> "Text":
        """With zeros, which its mask hides, up to so many tokens; itself if it has no mask, or is as long."""
        if self.mask is None or self.embeds.shape[1] >= length:
            return self
        more = length - self.embeds.shape[1]
        embeds, mask = torch.nn.functional.pad(self.embeds, (0, 0, 0, more)), torch.nn.functional.pad(self.mask, (0, more))
        return replace(self, embeds=embeds, mask=mask)

    def feature(self) -> Tensor:
        """What says of each prompt where it belongs, [N, D] float32: `pooled` where the net takes one, else the mean over its tokens."""
        if self.pooled is not None:
            return self.pooled.float()
        if self.mask is None:
            return self.embeds.float().mean(1)
        tokens = self.embeds.float().where(self.mask[:, :, None], 0)
        return tokens.sum(1) / self.mask.sum(1, keepdim=True).clamp(min=1)


Condition = Tensor | Text


def cat(first: Condition, *others: Condition) -> Condition:
    """All rows one below another; masked prompts are filled up to the longest.

    UserError for texts of which one has what another lacks, of other widths, or of other lengths where no mask hides what is filled up.
    """
    if isinstance(first, Tensor):
        return torch.cat([first, *others])  # pyright: ignore[reportArgumentType]
    texts = [text for text in (first, *others) if isinstance(text, Text)]
    longest = max(text.embeds.shape[1] for text in texts)
    leaves, forms = zip(*(_pytree.tree_flatten(text.filled(longest)) for text in texts), strict=True)
    shapes = {tuple(t.shape[1:] for t in each) for each in leaves}
    if len(texts) <= len(others) or len(shapes) > 1 or any(form != forms[0] for form in forms):
        raise UserError(
            f"embedded prompts of one batch want the same tensors of the same sizes, got {' and '.join(map(_told, (first, *others)))}: "
            "encode them with one text encoder and one number of tokens"
        )
    return _pytree.tree_unflatten([torch.cat(each) for each in zip(*leaves, strict=True)], forms[0])


def expanded(row: Condition, n: int) -> Condition:
    """One row n times, as a view."""
    expand: Callable[[Tensor], Tensor] = lambda t: t.expand(n, *t.shape[1:])  # noqa: E731
    return row.map(expand) if isinstance(row, Text) else expand(row)


def _told(one: Condition) -> str:
    if not isinstance(one, Text):
        return f"classes {list(one.shape)}"
    named = {"embeds": one.embeds, "mask": one.mask, "pooled": one.pooled, **one.extra}
    return ", ".join(f"{name} {list(t.shape)}" for name, t in named.items() if t is not None)


def _flatten(text: Text) -> tuple[list[Tensor], tuple[bool, bool, tuple[str, ...]]]:
    """The tensors there are, and which those are: None is left out, as not every user of a tree keeps it."""
    names = tuple(sorted(text.extra))
    whole = [t for t in (text.mask, text.pooled) if t is not None]
    return [text.embeds, *whole, *(text.extra[name] for name in names)], (text.mask is not None, text.pooled is not None, names)


def _unflatten(leaves: Iterable[Any], form: Any) -> Text:
    masked, pooled, names = form
    rest = iter(leaves)
    return Text(next(rest), next(rest) if masked else None, next(rest) if pooled else None, dict(zip(names, rest, strict=True)))


_pytree.register_pytree_node(Text, _flatten, _unflatten, serialized_type_name="potstill.Text")
