"""What a net's eager training costs on a GPU, counted without one, on tensors that hold no numbers.

`on_a_gpu()` makes tensors of the device "meta" take the way that CUDA tensors take: fused ops, NHWC images, fused dropout and
attention, random numbers of the device. Within it a `Counter` adds up, for every op below autograd, bytes and kernels launched.
`kept_by` looks at what autograd keeps for backward.

Not counted: what is inside a convolution, such as its weight put in NHWC order, copies between host and device, and the second
reading of images that norm_silu does not hold in registers.
"""

import math
from collections import Counter as Tally
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from potstill.engine.nets.layers import UNetBlock

META = torch.device("meta")
aten = torch.ops.aten

CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
#: Matrix products and attention, whose bytes are not counted either.
PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_backward.default, aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
}  # fmt: skip
#: Ops that touch no memory, though their schemas say nothing of a view.
FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "detach", "lift_fresh", "_reshape_alias"}
#: Ops that write their first argument without reading it.
FILLS = {"fill_", "zero_", "copy_", "normal_", "uniform_", "random_", "bernoulli_"}
#: Kernels of our own ops where it is not one. A loss: sums of parts, then their sum; backward is one.
OURS = {"denoise": 2, "score_implicit": 2}


class Counter(TorchDispatchMode):
    """bytes: by op, without convolutions and products; casts: of weights, bytes; launches: by op. weights: parameters' storages."""

    def __init__(self, *nets):
        super().__init__()
        self.bytes, self.launches, self.casts = Tally(), Tally(), 0
        self.weights = {storage(p) for net in nets for p in net.parameters()}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = as_cuda(op, args, kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(t.device == META for t in (*given, *tree_leaves(out)) if isinstance(t, torch.Tensor)):
            self.count(op, args, given, [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
        return out

    def count(self, op, args, given, out):
        name = op._schema.name.partition("::")[2]
        writes = [t for a, info in zip(args, op._schema.arguments, strict=False) if info.is_write for t in tree_leaves(a)]
        if name in FREE or op.is_view or (not writes and all(any(o is g for g in given) for o in out)):
            return
        if not any(t.numel() for t in (*out, *writes)):
            return
        self.launches[label(name, args)] += launched(op, name, args)
        if op in CONVOLUTIONS:
            self.bytes["bias of a convolution"] += bias_bytes(op, args, out)
        elif op not in PRODUCTS:
            read = {(storage(t), t.storage_offset(), t.shape, t.stride()): t for t in (given[1:] if name in FILLS else given)}
            cost = sum(map(size, read.values())) + sum(size(t) for t in (writes or out))
            if name == "_to_copy" and storage(args[0]) in self.weights:
                self.casts += cost
            else:
                self.bytes[label(name, args)] += cost


def label(name, args):
    """The op's name, whether it is of images, and whether it runs in backward."""
    if name == "convolution" and args[2] is not None:
        return "convolution with bias"
    if isinstance(args[0] if args else None, torch.Tensor) and args[0].ndim == 4 and min(args[0].shape[2:]) > 3:
        name += " of images"
    backward = torch._C._current_graph_task_id() != -1 and "backward" not in name
    return name + ", backward" * backward


def bias_bytes(op, args, out):
    """What a GPU moves for the bias: a pass over the output forward, and one over its gradient backward."""
    if op is aten.convolution.default:
        return 0 if args[2] is None else 2 * size(out[0])
    return size(args[0]) if args[-1][2] else 0


def launched(op, name, args):
    if op is aten.convolution.default:
        return 1 + (args[2] is not None)
    if op is aten.convolution_backward.default:
        return sum(args[-1])
    if name == "norm_silu_backward":
        return 1 + any(args[-2][:3])
    if name.startswith("_foreach_"):
        return foreach(args, name)
    return OURS.get(name, 1)


def foreach(args, name):
    """Launches of a multi-tensor op: at most so many tensors and 320 pieces of 65536 numbers each."""
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], torch.Tensor)]
    most = {1: 110, 2: 64, 3: 48}[len(lists)]
    pieces = sum(math.ceil(t.numel() / 65536) for t in lists[0])
    return max(math.ceil(len(lists[0]) / most), math.ceil(pieces / 320)) + 2 * ("norm" in name)  # its sums: zeroed, and summed


def as_cuda(op, args, kwargs):
    """The op on tensors without numbers, with outputs as CUDA makes them."""
    if op is aten.native_dropout.default and args[0].device == META:
        return torch.empty_like(args[0]), torch.empty_like(args[0], dtype=torch.bool)
    if op is aten.native_dropout_backward.default and args[0].device == META:
        return torch.empty_like(args[0])
    out = op(*args, **kwargs)
    if op in CONVOLUTIONS and args[0].device == META:  # of NHWC images cuDNN makes NHWC images, and gradients of weights laid out so
        return tree_map(lambda t: t.contiguous(memory_format=torch.channels_last) if t is not None and t.ndim == 4 else t, out)
    return out


def storage(t):
    return t.untyped_storage()._cdata


def size(t):
    """Bytes of t that there are: an expanded axis is not."""
    return t.element_size() * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)


class DeviceDraws(TorchFunctionMode):
    """Random numbers of a generator lie on "meta", for which there is none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.pop("generator", None) is not None:
            kwargs["device"] = META
        return function(*args, **kwargs)


def attention(q, k, v):
    if q.dtype is torch.float32:
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, torch.is_grad_enabled())[0]
    return aten._scaled_dot_product_flash_attention(q, k, v)[0]


def dropout(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, True)[0] if training and p else x


@contextmanager
def on_a_gpu():
    """Within it tensors of the device "meta" are treated as on CUDA. Yields the kernels that AdamEMA launches, to be called."""
    adam = Tally()

    def launcher(name):
        return lambda *_: adam.update({name: 1})

    with ExitStack() as stack:
        stack.enter_context(patch("potstill.kernels._loss.INTERPRET", True))
        stack.enter_context(patch("potstill.kernels.adam_ema.INTERPRET", True))
        stack.enter_context(patch("potstill.kernels.adam_ema.LAUNCHERS", {"triton": [launcher(n) for n in ("check", "coefs", "update")]}))
        stack.enter_context(patch("potstill.engine.nets.ops.memory_format", lambda device: torch.channels_last))
        stack.enter_context(patch("potstill.engine.nets.ops.attention", attention))
        stack.enter_context(patch("torch.nn.functional.dropout", dropout))
        stack.enter_context(patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True))
        stack.enter_context(DeviceDraws())
        yield adam


def kept_by(loss, nets):
    """Bytes of all memory that autograd holds after loss(), each piece once, without weights and their shadows.

    nets: by name. By (net, layer in its block), where "block" keeps its dropout's mask and its attention; ("loss", "") is the rest.
    """
    weights = {storage(t) for net in nets.values() for t in [*net.parameters(), *net.buffers()]}
    weights |= {storage(p._shadow.tensor) for net in nets.values() for p in net.parameters() if hasattr(p, "_shadow")}
    names = {
        layer: (name, "block" if isinstance(layer, UNetBlock) else path.rpartition(".")[2])
        for name, net in nets.items() for path, layer in net.named_modules()
    }  # fmt: skip
    within, kept, sums = [("loss", "")], {}, Tally()

    def keep(t):
        if storage(t) not in weights and storage(t) not in kept:
            kept[storage(t)] = t  # held, so that nothing else gets its name
            sums[within[-1]] += t.untyped_storage().nbytes()
        return t

    with ExitStack() as stack:
        for layer, name in names.items():
            stack.callback(layer.register_forward_pre_hook(lambda *_, name=name: within.append(name)).remove)
            stack.callback(layer.register_forward_hook(lambda *_: within.pop() and None).remove)
        stack.enter_context(Counter())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t))
        loss()
    return sums
