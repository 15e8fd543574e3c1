"""What the residual blocks of a U-Net read of its embedding, all blocks' maps of it in one matrix product."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Modulation:
    """Stands for the embedding [N, emb]: `of(block)` is block.affine of it, and with conv0's bias where the block adds the two.

    Like a tensor it can be cut to rows, for blocks that run on a part of the batch.
    """

    def __init__(self, maps: dict[int, Tensor], rows: slice = slice(None)):
        self.maps, self.rows = maps, rows

    def __getitem__(self, rows: slice) -> "Modulation":
        assert self.rows == slice(None)
        return Modulation(self.maps, rows)

    def of(self, block: nn.Module) -> Tensor:
        """[N, C] or [N, 2C], float32."""
        maps = self.maps[id(block)]
        return maps if self.rows == slice(None) else maps[self.rows]


def modulation(emb: Tensor, blocks: Sequence[Any]) -> Tensor | Modulation:
    """The maps of these blocks, or `emb` where a block makes its own: a part that is compiled or sharded, or no plain linear map."""
    if not all(block.maps_plainly for block in blocks):
        return emb
    bias = torch.cat([block.affine.bias for block in blocks])
    bias0 = None if blocks[0].adaptive_scale else torch.cat([block.conv0.bias for block in blocks])
    maps = _Linear.apply(emb, bias, bias0, *(block.affine.weight for block in blocks)).split(
        [len(block.affine.bias) for block in blocks], 1
    )
    return Modulation({id(block): each for block, each in zip(blocks, maps, strict=True)})


class _Linear(Function):
    """emb [N, E] by all weights [C, E], one after the other, which are put together once more in backward and not kept so."""

    @staticmethod
    def forward(ctx, emb, bias, bias0, *weights):
        ctx.save_for_backward(emb, *weights)
        return F.linear(emb, torch.cat(weights), bias if bias0 is None else bias + bias0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):
        emb, *weights = ctx.saved_tensors
        needs_emb, needs_bias, needs_bias0, *needs = ctx.needs_input_grad
        demb = dy @ torch.cat(weights) if needs_emb else None
        dweights = (dy.T @ emb).split([len(w) for w in weights]) if any(needs) else [None] * len(weights)
        dbias = dy.sum(0) if needs_bias or needs_bias0 else None
        dbias0 = dbias.clone() if dbias is not None and needs_bias0 else None  # clipping writes to each
        return demb, dbias if needs_bias else None, dbias0, *(d if need else None for d, need in zip(dweights, needs, strict=True))
