"""LoRA (2106.09685): nets that train small adapters beside weights which are their teacher's and stay as they are.

A layer's weight W becomes W + alpha/rank · B A with A [rank, in] drawn and B [out, rank] zero, so at first the net is its teacher. The
layers are peft's. Teacher, student and fake net have W in the same memory (`engine.methods.base.copied`). `state_dict` of a net
with adapters is its adapters alone, and so is what a checkpoint and a weight file hold of it; W is the teacher's own file.
"""

# peft is optional.
# pyright: reportMissingImports=false

import copy
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from potstill.engine.common.checks import Unused, above, at_least, finite, probability, wants
from potstill.engine.common.errors import UserError
from potstill.engine.common.packages import installed

ROLES = ("student", "fake")
#: Ends of the names of attention's projections in diffusers' nets: image's and text's, and of FLUX.2's single blocks.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj", "to_out")
ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
ADAPTER = "lora_"  # in the names of peft's parameters, and of no others


@dataclass
class LoraConfig:
    """Adapters instead of whole weights (LoRA), for the nets of diffusers."""

    rank: int | None = None  # of the matrices A and B; null or 0: no adapters, whole weights are trained
    alpha: float | None = None  # a weight becomes W + alpha/rank · B A; null: the rank
    targets: list[str] | None = None  # ends of the names of layers that get one, such as to_q; null: all projections of attention
    dropout: float = 0.0  # probability, of what A is given
    of: list[str] = field(default_factory=lambda: list(ROLES))  # which nets: student, fake, or both

    def __post_init__(self):
        finite(self)
        at_least(self, 0, "rank")
        above(self, 0, "alpha")
        wants(self, "targets", self.targets is None or (len(self.targets) > 0 and all(self.targets)), "a list of ends of names, or null")
        probability(self, "dropout")
        wants(self, "of", len(self.of) > 0 and set(self.of) <= set(ROLES), f"some of {', '.join(ROLES)}")

    def trains(self, role: str) -> bool:
        """Does a net of this role get adapters?"""
        return bool(self.rank) and role in self.of

    def unused(self) -> Unused:
        return {} if self.rank else dict.fromkeys(("alpha", "targets", "dropout", "of"), "lora.rank=null")


def check_lora(cfg: LoraConfig, parallel: str, where: str = "train") -> None:
    """UserError for a missing package, and for sharded nets. parallel: ddp or fsdp; where: of which settings."""
    if not cfg.rank:
        return
    if not installed("peft"):
        raise UserError(f"package peft, for lora.rank={cfg.rank}: pip install 'potstill[diffusers]', or set lora.rank=null")
    if parallel == "fsdp":
        raise UserError(
            f"{where}.parallel=fsdp cannot be had with lora.rank={cfg.rank}: several nets share the weights that it would cut into shards; "
            f"use {where}.parallel=ddp, which sends no more than the adapters"
        )


def with_adapters(net: Any, cfg: LoraConfig) -> Any:
    """The denoiser `net`, in place, with adapters that train and other weights that do not. UserError where no layer can have one.

    Adapters are float32, also beside 16-bit weights. `net.adapters` is then what it has, alpha and targets spelt out.
    """
    check_lora(cfg, "ddp")
    from peft import LoraConfig as Peft
    from peft import inject_adapter_in_model

    assert cfg.rank and getattr(net, "adapters", None) is None
    names = layers_of(net.model, cfg.targets)
    alpha: Any = cfg.rank if cfg.alpha is None else int(cfg.alpha) if cfg.alpha == int(cfg.alpha) else cfg.alpha
    layers = sorted(name for found in names.values() for name in found)
    try:
        inject_adapter_in_model(Peft(r=cfg.rank, lora_alpha=alpha, lora_dropout=cfg.dropout, target_modules=layers), net.model)
    except ValueError as error:
        raise UserError(f"lora.targets: peft cannot adapt these layers ({' '.join(str(error).split())[:200]})") from error
    for name, p in net.named_parameters():
        if trains := ADAPTER in name:
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))  # peft makes them in the dtype of the layer's weight
        p.requires_grad_(trains)
    net.adapters = replace(cfg, alpha=alpha, targets=list(names))
    net.register_state_dict_post_hook(_adapters_alone)
    net.register_load_state_dict_pre_hook(_with_own_weights)
    return net.train(net.training)


def layers_of(model: nn.Module, targets: list[str] | None) -> dict[str, list[str]]:
    """End of a name -> names of the layers that end so and can have adapters. UserError where there are none."""
    adaptable = [name for name, layer in model.named_modules() if isinstance(layer, ADAPTABLE)]
    found = {end: [name for name in adaptable if name == end or name.endswith(f".{end}")] for end in targets or ATTENTION}
    if targets is None:
        found = {end: names for end, names in found.items() if names}
    if not found or not all(found.values()):
        end = next(iter(found), None)
        what = "no projections of attention" if end is None else f"no layer {next(e for e in found if not found[e])!r}"
        some = sorted({name.rpartition(".")[2] for name in adaptable if not name.rpartition(".")[2].isdecimal()})
        like = f"lora.targets of its own, such as {', '.join(some[:8])}" if some else "a net of diffusers, or lora.rank=null"
        raise UserError(f"lora finds {what} that peft can adapt in {type(model).__name__}: wanted {like}")
    return found


def note_of_rank(model: nn.Module, cfg: LoraConfig) -> str:
    """What to say of a rank that no adapted layer can have; "" of any other."""
    names = [name for found in layers_of(model, cfg.targets).values() for name in found]
    weights = [cast(Tensor, model.get_submodule(name).weight) for name in names]
    most = max(min(len(w), w[0].numel()) for w in weights)
    if cfg.rank is None or cfg.rank <= most:
        return ""
    return f"note: lora.rank={cfg.rank} is more than the rank of any layer that gets an adapter, at most {most}: lora.rank={most} can do the same"


def base_weights(net: Any) -> dict[str, Tensor]:
    """What the net would have for a `state_dict` without its adapters: its teacher's, by the teacher's names."""
    own = {**dict(net.named_parameters()), **_persistent(net)}
    return {name.replace(".base_layer.", "."): t for name, t in own.items() if ADAPTER not in name}


def merged(net: Any) -> Any:
    """A net like this one without adapters: they are added to copies of the weights, in float32."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    whole = copy.deepcopy(net)
    for name, layer in list(whole.model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            whole.model.set_submodule(name, layer.get_base_layer())
    del whole.model.peft_config
    whole.adapters = None
    return whole


def _persistent(net: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a state_dict."""
    passing = {f"{place}.{name}" if place else name for place, m in net.named_modules() for name in m._non_persistent_buffers_set}
    return {name: b for name, b in net.named_buffers() if name not in passing}


def _adapters_alone(net: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    if net.adapters is not None:
        for name in [name for name in state if name.startswith(prefix) and ADAPTER not in name]:
            del state[name]


def _with_own_weights(net: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """What is not in a state of adapters stays; and no state whatever writes to the weights that others share."""
    if net.adapters is not None:
        own = {**dict(net.named_parameters()), **_persistent(net)}
        state |= {prefix + name: t for name, t in own.items() if ADAPTER not in name}
