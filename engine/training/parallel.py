"""How a method's nets are spread over ranks: replicated with averaged gradients (ddp), or cut into shards (fsdp).

**ddp.** Every rank holds all nets; after a turn's last micro-batch its gradients are averaged in a few flat all-reduces
(`Trained.average_gradients`). Not torch's DistributedDataParallel: that wraps a module, listens to its `forward` alone and
wants to know each backward's unused weights, while a turn here runs a net several times, through `estimate`, `features` and
frozen views. The price is that communication does not overlap with backward: for 56 … 296 M float32 gradients a few
milliseconds a turn over NVLink.

**fsdp.** Nets with a U-Net are `Sharded`. Others, such as GDD's discriminator, are small and are differentiated twice: they
stay replicated.

Batch statistics (batch norms, instant moment matching's halves) are over a micro-batch where `micro_batch` is a number, and
over the whole batch of all ranks where it is null. So neither depends on the number of ranks.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from potstill.engine.common.errors import UserError
from potstill.engine.methods.base import Alone, Method, modules_of
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.training.ranks import Ranks
from potstill.engine.training.sharded import FSDPConfig, Sharded, shard
from potstill.engine.training.trained import Trained

MODES = ("ddp", "fsdp")


def check_shares(
    batch: int, micro: int | str | None, ranks: int, parallel: str, cfg: FSDPConfig, where: str, *, statistics: bool = False
) -> None:
    """UserError for a batch or a mesh that this many ranks cannot share evenly. statistics: are there any over a micro-batch?"""
    if ranks > batch:
        raise UserError(f"{ranks} ranks want at least as many images per iteration, got {where}.batch = {batch}: start fewer, or raise it")
    if batch % ranks:
        raise UserError(
            f"{where}.batch = {batch} does not divide among {ranks} ranks: use {batch - batch % ranks} or {batch + -batch % ranks}"
        )
    share = batch // ranks
    if statistics and isinstance(micro, int) and share % micro:
        raise UserError(
            f"{where}.micro_batch = {micro}, over which this method takes batch statistics, does not divide the {share} images of "
            f"each of {ranks} ranks ({where}.batch = {batch}): use {largest_part(share, micro)}, or null for statistics over all ranks"
        )
    if parallel == "fsdp" and ranks % cfg.replicas:
        raise UserError(f"{where}.fsdp.replicas = {cfg.replicas} does not divide the {ranks} ranks")


def largest_part(share: int, most: int) -> int:
    """The largest divisor of `share` that is at most `most`."""
    return max(part for part in range(1, min(share, most) + 1) if share % part == 0)


def spread(method: Method, parallel: str, cfg: FSDPConfig, ranks: Ranks, device: torch.device, *, together: bool) -> dict[str, Trained]:
    """A method's trained nets over the ranks. together: batch statistics are over all ranks' samples.

    From here on all ranks have rank 0's weights and buffers. Sharded nets are changed in place.
    """
    nets, held = method.nets, modules_of(method)
    if not ranks.several:
        return {name: Trained(net, ranks) for name, net in nets.items()}
    same_everywhere([*nets.values(), *held, method.state])
    method.others = Others(ranks, together)
    if together:
        for module in [*nets.values(), *held]:
            for one in module.modules():
                if type(one) is nn.BatchNorm2d and not one.track_running_stats:
                    one.__class__ = GlobalBatchNorm  # views share weights and must go on doing so: change, do not replace
    if parallel == "ddp":
        return {name: Trained(net, ranks) for name, net in nets.items()}
    mesh = _mesh(device, ranks.count, cfg.replicas)
    views = {name: [one for one in held if is_view(one, net)] for name, net in nets.items()}
    if cfg.teacher == "shard":
        known = {id(m) for one in (*nets.values(), *(v for each in views.values() for v in each)) for m in one.modules()}
        frozen = {id(m): m for one in held for m in one.modules() if isinstance(m, Denoiser) and id(m) not in known}
        for one in frozen.values():
            shard(one, mesh, cfg)
    return {name: Sharded(net, views[name], mesh, cfg, ranks) if has_unet(net) else Trained(net, ranks) for name, net in nets.items()}


def _mesh(device: torch.device, count: int, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(device.type, (count,), mesh_dim_names=("shards",))
    return init_device_mesh(device.type, (replicas, count // replicas), mesh_dim_names=("replicas", "shards"))


def has_unet(net: nn.Module) -> bool:
    return any(isinstance(m, Denoiser) for m in net.modules())


def is_view(view: nn.Module, net: nn.Module) -> bool:
    """Is it another module with the very weights of `net`?"""
    a, b = ([p.data_ptr() for p in one.parameters()] for one in (view, net))
    return view is not net and bool(a) and a == b


@torch.no_grad()
def same_everywhere(modules: Iterable[nn.Module]) -> None:
    """Overwrite weights and buffers by rank 0's."""
    tensors = {(t.data_ptr(), t.shape): t for m in modules for t in (*m.parameters(), *m.buffers()) if t.numel()}
    for t in tensors.values():
        dist.broadcast(t.detach(), src=0)


class Others(Alone):
    """What a method may know of the other ranks."""

    def __init__(self, ranks: Ranks, together: bool):
        self.count, self.together, self.ranks = ranks.count, together, ranks

    def average(self, tensors: Sequence[Tensor]) -> None:
        self.ranks.average(tensors)


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch statistics of all ranks' samples, of which each has as many; differentiable twice, which torch's SyncBatchNorm is not."""

    def forward(self, input: Tensor) -> Tensor:
        centred = input - _over_ranks(input)
        scale = (_over_ranks(centred.square()) + self.eps).rsqrt()
        return centred * scale * self.weight[:, None, None] + self.bias[:, None, None]


def _over_ranks(x: Tensor) -> Tensor:
    """The mean over samples, pixels and ranks: [1, C, 1, 1]."""
    return _Sum.apply(x.mean((0, 2, 3), keepdim=True)) / dist.get_world_size()


class _Sum(Function):
    """The sum over ranks. What a rank contributes is felt by the losses of all, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _Sum.apply(g)
