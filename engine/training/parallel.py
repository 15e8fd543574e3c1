"""How a method's nets are spread over ranks: replicated with averaged gradients (ddp), or cut into shards (fsdp).

**ddp.** Every rank holds all nets; after a turn's last micro-batch its gradients are averaged in a few flat all-reduces
(`Trained.average_gradients`). Not torch's DistributedDataParallel: that wraps a module, listens to its `forward` alone and
wants to know each backward's unused weights, while a turn here runs a net several times, through `estimate`, `features` and
frozen views. The price is that communication does not overlap with backward: for 56 … 296 M float32 gradients a few
milliseconds a turn over NVLink.

**fsdp.** Nets with a U-Net are `Sharded`: weights, gradients, optimiser and average are 1 / ranks on each rank. Others, such
as GDD's discriminator, are small and are differentiated twice: they stay replicated.

Batch statistics (batch norms, instant moment matching's halves) are over a micro-batch where `micro_batch` is a number, and
over the whole batch of all ranks where it is null. So neither depends on the number of ranks.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from potstill.engine.common.checks import at_least, one_of
from potstill.engine.common.errors import UserError
from potstill.engine.methods.base import Method, modules_of
from potstill.engine.nets.denoiser import Denoiser
from potstill.engine.nets.discriminators import Critic
from potstill.engine.nets.guide import Guide
from potstill.engine.training.optim import Trained, denoisers_in
from potstill.engine.training.ranks import Ranks
from potstill.kernels.total_norm import total_norm

MODES = ("ddp", "fsdp")
TEACHERS = ("replicate", "shard")


@dataclass
class FSDPConfig:
    """How nets are sharded with train.parallel=fsdp."""

    replicas: int = 1  # copies of the shards (HSDP): as many as machines, where the network between them is slow
    reshard_after_forward: bool = True  # false: keep gathered weights until backward; faster, and takes more memory
    mixed: bool = True  # gather the blocks' weights in the precision of the run: half the traffic in bf16
    teacher: str = "replicate"  # replicate | shard (for one too large for each GPU)

    def __post_init__(self):
        at_least(self, 1, "replicas")
        one_of(self, "teacher", TEACHERS)


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


def build_trained(
    method: Method, parallel: str, cfg: FSDPConfig, ranks: Ranks, device: torch.device, *, together: bool
) -> dict[str, Trained]:
    """A method's trained nets over the ranks. together: batch statistics are over all ranks' samples.

    From here on all ranks have rank 0's weights and buffers. Sharded nets are changed in place.
    """
    if ranks.several and parallel == "fsdp" and cfg.teacher == "shard":
        own_guides(method)
    nets, held = method.nets, modules_of(method)
    for one in [one for net in nets.values() for one in denoisers_in(net)]:
        one.forces_norms = False  # not in a forward: once in an iteration, before it
    if not ranks.several:
        return {name: Trained(net, ranks) for name, net in nets.items()}
    tensors = {
        (t.data_ptr(), t.shape): t for m in (*nets.values(), *held, method.state) for t in (*m.parameters(), *m.buffers()) if t.numel()
    }
    for t in tensors.values():
        dist.broadcast(t.detach(), src=0)
    method.ranks, method.together = ranks, together
    if together:
        for module in [*nets.values(), *held]:
            for one in module.modules():
                if type(one) is nn.BatchNorm2d and not one.track_running_stats:
                    one.__class__ = GlobalBatchNorm  # views share weights and must go on doing so: change, do not replace
    if parallel == "ddp":
        return {name: Trained(net, ranks) for name, net in nets.items()}
    if cfg.replicas == 1:
        mesh = init_device_mesh(device.type, (ranks.count,), mesh_dim_names=("shards",))
    else:
        mesh = init_device_mesh(device.type, (cfg.replicas, ranks.count // cfg.replicas), mesh_dim_names=("replicas", "shards"))
    views = {name: [one for one in held if is_view(one, net)] for name, net in nets.items()}
    if cfg.teacher == "shard":
        known = {id(m) for one in (*nets.values(), *(v for each in views.values() for v in each)) for m in one.modules()}
        frozen = {id(m): m for one in held for m in one.modules() if isinstance(m, Denoiser) and id(m) not in known}
        for one in frozen.values():
            shard(one, mesh, cfg)
    with_unet = {name for name, net in nets.items() if any(isinstance(m, Denoiser) for m in net.modules())}
    return {n: Sharded(net, views[n], mesh, cfg, ranks) if n in with_unet else Trained(net, ranks) for n, net in nets.items()}


def own_guides(method: Method) -> None:
    """A guide is shared with the teacher outside of the method, which one rank alone samples: of what is cut here, the method has a copy."""
    for one in modules_of(method):
        if isinstance(one, Denoiser) and one.guide is not None:
            one.guide = Guide(copy.deepcopy(one.guide.net))


def is_view(view: nn.Module, net: nn.Module) -> bool:
    """Is it another module with the very weights of `net`?"""
    a, b = ([p.data_ptr() for p in one.parameters()] for one in (view, net))
    return view is not net and bool(a) and a == b


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


class Sharded(Trained):
    """A trained net cut into shards by FSDP2, and the frozen views of it.

    `fully_shard` is on every residual block, the rest of the U-Net and the GAN head. Gradients leave backward averaged and sharded
    (reduce-scatter, once a block and forward; before the last micro-batch they add up locally). Optimiser and average never see a
    DTensor: they get plain tensors, this rank's shards (`Shards`), which is all that elementwise arithmetic needs. A frozen view of
    a sharded net is a sharded net of its own, whose shards are copied anew after each step (1 / ranks of the weights: the cheapest
    part of a step): FSDP2 cannot share weights that are gathered for one of the two but not for the other.
    """

    def __init__(self, net: nn.Module, views: Sequence[nn.Module], mesh: DeviceMesh, cfg: FSDPConfig, ranks: Ranks):
        memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in net.parameters()}
        memo |= {id(b): b.to("meta") for b in net.buffers()}
        self.skeleton = copy.deepcopy(net, memo)  # the net without numbers
        self.group = mesh["shards"].get_group()
        directions = {id(p) for one in denoisers_in(net) for p in one.weights_of_unit_length()}
        self.directed = [id(p) in directions for p in net.parameters()]
        self.modules = [m for one in (net, *views) for m in shard(one, mesh, cfg)]
        self.full, self.views = net, list(views)
        self.names, self.parameters = zip(*net.named_parameters(), strict=True)
        kept, buffers = self.skeleton.state_dict().keys(), dict(net.named_buffers())
        self.buffers = {name: b for name, b in buffers.items() if name in kept}
        self.constants = {name: b for name, b in buffers.items() if name not in kept}  # which belong to no checkpoint
        super().__init__(Shards(self.parameters, self.buffers.values()), ranks)
        self.trained = [p for p in self.parameters if p.requires_grad]
        self.copies = [[_local(p) for p in view.parameters()] for view in self.views]

    def average_gradients(self) -> None:
        """FSDP has averaged them; hand them over from its DTensors."""
        for module in self.modules:
            module.reshard()  # weights gathered before the step must not be used after it
        for whole, own in zip(self.parameters, self.net.parameters(), strict=True):
            if whole.grad is not None:
                own.grad, whole.grad = whole.grad.to_local(), None

    def directions(self) -> list[Tensor]:
        """Shards have whole output channels, whose lengths no other rank need know."""
        return [p for p, directed in zip(self.net.parameters(), self.directed, strict=True) if directed and p.requires_grad]

    def force_norms(self) -> None:
        super().force_norms()
        if self.unit:
            self.after_step()

    def before_backward(self, *, last: bool) -> None:
        for module in self.modules:
            module.set_requires_gradient_sync(last, recurse=False)
            module.set_is_last_backward(last)

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        filled = [g for g in gradients if g.numel()]  # of a small net a rank may have nothing but empty shards
        square = total_norm(filled).square() if filled else torch.zeros((), device=_local(self.parameters[0]).device)
        dist.all_reduce(square, group=self.group)
        return square.sqrt()

    @torch.no_grad()
    def after_step(self) -> None:
        own = [p.detach() for p in self.net.parameters()]
        for module in self.modules:
            module.reshard()
        for copies in self.copies:
            torch._foreach_copy_(copies, own)  # pyright: ignore[reportPrivateImportUsage]

    def state(self, own: nn.Module) -> dict[str, Any]:
        shards = zip(self.names, self.parameters, own.parameters(), strict=True)
        weights = {name: _dtensor(p.detach(), whole) for name, whole, p in shards}
        return weights | dict(zip(self.buffers, own.buffers(), strict=True))

    @torch.no_grad()
    def load(self, own: nn.Module, state: Mapping[str, Any]) -> None:
        mine = self.state(own)
        if missing := mine.keys() ^ state.keys():
            raise KeyError(f"{min(missing)} is in one of the two only")
        for key, tensor in mine.items():
            if tensor.shape != state[key].shape:
                raise ValueError(f"{key} is {list(state[key].shape)}, wanted {list(tensor.shape)}")
            _local(tensor).copy_(_local(state[key]))

    def optimizer_state(self) -> dict[str, Any]:
        """With DTensors for what has the shape of a shard."""
        state = self.optimizer.state_dict()

        def whole(i: int, t: Any) -> Any:
            mine = isinstance(t, Tensor) and t.ndim > 0 and t.shape == _local(self.trained[i]).shape
            return _dtensor(t, self.trained[i]) if mine else t

        moments = {i: {k: whole(i, t) for k, t in one.items()} for i, one in state["state"].items()}
        return state | {"state": moments}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        moments = {i: {k: _local(t) for k, t in one.items()} for i, one in state["state"].items()}
        super().load_optimizer_state(state | {"state": moments})

    @torch.no_grad()
    def whole(self, own: nn.Module) -> nn.Module:
        net = copy.deepcopy(self.skeleton).to_empty(device=_local(self.parameters[0]).device)
        mine: dict[str, Any] = self.state(own) | self.constants
        for name, p in [*net.named_parameters(), *net.named_buffers()]:
            p.copy_(mine[name].full_tensor() if name in self.names else mine[name])
        return net.train(own.training)

    def like(self, key: str) -> Tensor | None:
        if key.isdigit():
            return self.trained[int(key)] if int(key) < len(self.trained) else None
        return dict(zip(self.names, self.parameters, strict=True)).get(key)


class Shards(nn.Module):
    """This rank's shards of a net as plain parameters, in the net's order, and its buffers."""

    def __init__(self, parameters: Iterable[Tensor], buffers: Iterable[Tensor]):
        super().__init__()
        local = [nn.Parameter(_local(p), requires_grad=p.requires_grad) for p in parameters]
        self.shards = nn.ParameterList(local)
        for i, buffer in enumerate(buffers):
            self.register_buffer(f"b{i}", buffer)


def shard(net: nn.Module, mesh: DeviceMesh, cfg: FSDPConfig) -> list[Any]:
    """Apply fully_shard to every part of a net with a U-Net; returns the parts."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    options = {"mesh": mesh, "reshard_after_forward": cfg.reshard_after_forward}
    for p in net.parameters():
        p.data = p.data.contiguous()  # which fully_shard wants; convolutions then lay their weights out themselves
    parts: list[Any] = []  # of classes that fully_shard makes
    for denoiser in [m for m in net.modules() if isinstance(m, Denoiser)]:
        wide = all(p.dtype is torch.float32 for p in denoiser.parameters())  # those of a 16-bit teacher, of which some stay in 32, are not
        low = denoiser.compute_dtype if cfg.mixed and wide and denoiser.compute_dtype is not torch.float32 else None
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        model = denoiser.model
        parts += [fully_shard(block, mp_policy=policy, **options) for block in denoiser.blocks()]
        parts.append(fully_shard(model, **options))  # the embedding stays float32, as in a run on one rank
        parts += [fully_shard(part, **options) for part in denoiser.beside()]
        for name in denoiser.forwards:
            register_fsdp_forward_method(model, name)
    heads = [m.head.layers for m in net.modules() if isinstance(m, Critic) and m.head is not None]
    parts += [fully_shard(head, **options) for head in heads]
    assert all(hasattr(p, "device_mesh") for p in net.parameters()), "a parameter is in no part"
    return parts


def _local(t: Any) -> Any:
    """This rank's part of a DTensor; anything else as it is."""
    return t.detach().to_local() if hasattr(t, "device_mesh") else t


def _dtensor(local: Tensor, like: Any) -> Any:
    """This rank's part of a tensor that is cut as `like` is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
