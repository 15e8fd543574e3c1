"""Adam, an exponential moving average and 16-bit shadow weights of a network's parameters, in one pass over memory.

    g <- grad / grad_scale   (+ weight_decay·p, unless decoupled: then p <- (1 - lr·weight_decay)·p first)
    m <- m + (1 - beta1)·(g - m)            v <- beta2·v + (1 - beta2)·g²
    p <- p - lr/(1 - beta1^t) · m / (sqrt(v)/sqrt(1 - beta2^t) + eps)
    ema <- ema + (1 - ema_decay)·(p - ema)  shadow <- p rounded to 16 bits

Per float32 parameter Adam reads 16 and writes 12 bytes, the EMA adds 8, a 16-bit shadow 2, the look for non-finite
gradients 4. CUDA: two or three launches a parameter group (kernels/_adam.py) and no host sync. CPU: the same in C++ for float32,
or PyTorch's fused Adam.
Sources: arXiv 1412.6980 Alg. 1; arXiv 1711.05101 Alg. 2 (decoupled).
"""

# torch._foreach_* and torch._fused_adam_ are what torch.optim itself is made of.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from potstill.kernels import cuda, native
from potstill.kernels._adam import LAUNCHERS, in_torch, round_
from potstill.kernels._groups import RATES, Group, check_companions, check_options, check_params, split_over_groups
from potstill.kernels._lib import INTERPRET
from potstill.kernels.tables import Flags, Part, local, same_layout


class AdamEMA(torch.optim.Optimizer):
    """torch.optim.Adam (AdamW with decoupled=True) that also keeps an EMA and 16-bit shadows of the parameters.

    Its state_dict is Adam's (step, exp_avg, exp_avg_sq), plus one key a group, ema_decay: either loads the other's. EMA and
    shadow tensors are the caller's and are saved by whoever owns them. Nothing waits for the device, so step() can
    be captured in a CUDA graph, once for each eager step before. Learning rate and EMA decay may change between replays,
    assigned in param_groups or by a scheduler; betas, eps and weight decay are those of the capture (kernels/_groups.py).

    Args:
        params: parameters or parameter groups. On CUDA they are float32: a 16-bit network keeps its 16-bit weights as
            the shadow of float32 ones.
        lr, betas, eps, weight_decay: as in torch.optim.Adam.
        decoupled: weight decay as in AdamW.
        ema: one tensor a parameter, in the order of params over all groups, of the same dtype and memory layout.
        ema_decay: EMA <- ema_decay·EMA + (1 - ema_decay)·p after each step.
        shadow: one bfloat16 or float16 tensor a parameter, likewise, or None for a parameter that has none. Written at
            once, and after each step.
        nonfinite: "skip": a step in which any gradient is not finite changes nothing, EMA included, and is counted
            in `self.nonfinite`, a 0-dim int32 device tensor; "ignore" saves the look at the gradients.

    Raises:
        ValueError: an option out of range, amsgrad, or tensors that do not match.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then hands over grad_scale and found_inf and does not wait

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = False,
        amsgrad: bool = False,
        ema: Iterable[Tensor] | None = None,
        ema_decay: float | Tensor = 0.0,
        shadow: Iterable[Tensor | None] | None = None,
        nonfinite: str = "skip",
    ):
        if nonfinite not in ("skip", "ignore"):
            raise ValueError(f"AdamEMA wanted nonfinite 'skip' or 'ignore', got {nonfinite!r}")
        self._skips = nonfinite == "skip"
        self._groups: list[Group] = []
        self._flags: Flags | None = None
        groups = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        split_over_groups(groups, "ema", ema)
        split_over_groups(groups, "shadow", shadow)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad, "maximize": False,
            "foreach": None, "capturable": False, "differentiable": False, "fused": None,
            "decoupled_weight_decay": decoupled, "ema_decay": ema_decay,
        }  # fmt: skip
        super().__init__(groups, defaults)

    @property
    def nonfinite(self) -> Tensor:
        """The number of steps skipped because a gradient was not finite: 0-dim int32 on the device."""
        return self._all_flags.nonfinite

    @property
    def _all_flags(self) -> Flags:
        assert self._flags is not None
        return self._flags

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; the group may bring `ema` and `shadow`, lists aligned with its params."""
        group = dict(param_group)
        ema, shadow = group.pop("ema", None), group.pop("shadow", None)
        super().add_param_group(group)
        try:
            self.param_groups[-1] = self._own(self.param_groups[-1], ema, shadow)
        except ValueError:
            self.param_groups.pop()
            raise
        self.refresh_shadow()

    def _own(self, options: dict[str, Any], ema: list[Tensor] | None, shadow: list[Tensor | None] | None) -> Group:
        """torch.optim's group as one of ours."""
        check_options(options)
        params = options["params"]
        device = local(params[0]).device
        flags = self._flags or Flags(device)
        check_params(params, flags.flag.device)
        check_companions("ema", ema, params, lambda p: (p.dtype,))
        check_companions("shadow", shadow, params, lambda p: (torch.bfloat16, torch.float16))
        group = Group(options | {"capturable": device.type == "cuda"}, device)
        group.part = self._part(params, ema, shadow, device)
        self._flags = flags
        self._groups.append(group)
        return group

    @property
    def _parts(self) -> list[Part]:
        return [group.part for group in self._own_groups()]

    def _own_groups(self) -> list[Any]:
        """param_groups, after it took over the options of groups that somebody has put in the place of ours."""
        for i, group in enumerate(self.param_groups):
            if not isinstance(group, Group):
                params = [id(p) for p in group["params"]]
                ours = next((g for g in self._groups if [id(p) for p in g["params"]] == params), None)
                if ours is None:
                    raise ValueError("AdamEMA wanted groups of new parameters by add_param_group, got one in param_groups")
                ours.update(group)
                self.param_groups[i] = ours
        return self.param_groups

    def _part(self, params: list[Tensor], ema: list[Tensor] | None, shadow: list[Tensor | None] | None, device: torch.device) -> Part:
        """Make the state of every parameter now, since a captured step must not allocate it. State from a copy stays."""
        steps = torch.zeros(len(params), dtype=torch.float32, device=device)
        for p, step in zip(params, steps.unbind(), strict=True):
            state = self.state[p]
            if state:
                step.copy_(state["step"])
            else:
                state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            state["step"] = step
        with torch.no_grad():
            return Part(
                [local(p) for p in params],
                [local(self.state[p]["exp_avg"]) for p in params],
                [local(self.state[p]["exp_avg_sq"]) for p in params],
                None if ema is None else [local(t) for t in ema],
                None if shadow is None else [None if t is None else local(t) for t in shadow],
                steps,
            )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which have EMA and shadow tensors of their own, or those copied along with them."""
        companions = [(part.ema, part.shadow) for part in self._parts]
        return super().__getstate__() | {"skips": self._skips, "nonfinite": self.nonfinite, "companions": companions}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: state[name] for name in ("defaults", "state", "param_groups") if name in state})
        if "companions" in state:  # not load_state_dict
            self._skips, self._flags, self._groups = state["skips"], None, []
            pairs = zip(self.param_groups, state["companions"], strict=True)
            self.param_groups = [self._own(group, ema, shadow) for group, (ema, shadow) in pairs]
            self._all_flags.nonfinite.copy_(state["nonfinite"])

    @torch.no_grad()
    def refresh_shadow(self) -> None:
        """Round the parameters into the shadows again, after something else (a checkpoint) has changed them."""
        for part in self._parts:
            round_(part)

    @property
    def written_shadows(self) -> set[int]:
        """Addresses of the shadows that step() writes."""
        return {s.data_ptr() for part in self._parts for s in part.shadow or () if s is not None}

    @torch.no_grad()
    def set_lr(self, lr: float | Tensor) -> None:
        """The learning rate of every group from the next step on, also in a captured CUDA graph."""
        for group in self.param_groups:
            group["lr"].fill_(lr)

    @torch.no_grad()
    def set_ema_decay(self, ema_decay: float | Tensor) -> None:
        """The EMA decay of every group from the next step on, also in a captured CUDA graph."""
        for group in self.param_groups:
            group["ema_decay"].fill_(ema_decay)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Any:
        """One step; returns what closure returned.

        Args:
            grad_scale: 0-dim float32 device tensor the gradients are divided by (a GradScaler's scale, or the norm over
                the norm wanted, for clipping). The gradients themselves may be overwritten.
            found_inf: 0-dim float32 device tensor; anything but 0 skips the step and counts it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        flags = self._all_flags
        flags.grad_scale = _scalar(self, "grad_scale", grad_scale)
        flags.found_inf = _scalar(self, "found_inf", found_inf)
        for group in self._own_groups():
            group.refresh_addresses()
            group.part.params = [local(p) for p in group["params"]]
            group.part.grads = [_like_param(p) for p in group["params"]]
        device = flags.flag.device
        backend = self._backend()
        try:
            if backend == "reference":
                self._step_reference()
            elif device.type == "cuda":
                with torch.cuda.device(device):
                    self._step_fused(*LAUNCHERS[backend])
            else:
                self._step_fused(*LAUNCHERS[backend])
        finally:
            for part in self._parts:
                part.grads = []  # else they would stay in memory next to those of the next step
        return loss

    def _backend(self) -> str:
        """Who makes this step: a name among LAUNCHERS, or "reference"."""
        if self._all_flags.flag.is_cuda or INTERPRET:
            return cuda.chosen("adam_ema")
        return "cpu" if native.used() and all(part.float32 for part in self._parts) else "reference"

    def _step_fused(self, check: Callable[..., None], coefs: Callable[..., None], update: Callable[..., None]) -> None:
        flags = self._all_flags
        for part in self._parts:
            part.refresh_addresses()
        if self._skips:
            for part in self._parts:
                check(part, flags)
            self._share_flag()
        groups = self._own_groups()
        for i, group in enumerate(groups):
            coefs(group.part, flags, group, i == 0)
        for group in groups:
            update(group.part, flags, group)

    def _step_reference(self) -> None:
        """The same step in PyTorch's own fused operations; also right on CUDA, where it does not wait either."""
        flags = self._all_flags
        bad = flags.flag.zero_()
        grads = [g for part in self._parts for g in part.grads if g is not None]
        if self._skips and grads:
            torch._amp_foreach_non_finite_check_and_unscale_(grads, bad, torch.ones_like(bad))
            self._share_flag()
        if flags.found_inf is not None:
            bad = torch.maximum(bad, (flags.found_inf != 0).to(bad.dtype).reshape(()))
        flags.nonfinite.add_((bad != 0).to(torch.int32))
        if bad.device.type == "cpu" and bad != 0:
            return
        for group in self._own_groups():
            in_torch(group, group.part, bad, flags.grad_scale)

    def _share_flag(self) -> None:
        """Where parameters are sharded, every process must skip the step if one does."""
        mesh = getattr(self.param_groups[0]["params"][0], "device_mesh", None)
        if mesh is not None:
            for axis in range(mesh.ndim):
                torch.distributed.all_reduce(self._all_flags.flag, op=torch.distributed.ReduceOp.MAX, group=mesh.get_group(axis))

    def state_dict(self) -> dict[str, Any]:
        """Adam's state_dict, with lr and ema_decay as numbers; reading them waits for the device."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group.update({name: float(group[name]) for name in RATES})
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From AdamEMA, torch.optim.Adam or AdamW. Values are copied into the tensors in use, so captured graphs stay valid.

        Raises:
            ValueError: the state is of an Adam with amsgrad or maximize, or of other parameters.
        """
        for group in state_dict["param_groups"]:
            check_options(group)
        groups = self._own_groups()
        states = [{p: self.state[p] for p in group["params"]} for group in groups]
        super().load_state_dict(state_dict)
        loaded_groups, self.param_groups = self.param_groups, groups
        for group, loaded_group, state in zip(groups, loaded_groups, states, strict=True):
            for name in loaded_group.keys() - {"params", "capturable"}:
                group.load(name, loaded_group[name])
            for p, tensors in state.items():
                loaded = self.state.get(p, {})
                for key, t in tensors.items():
                    t.copy_(torch.as_tensor(loaded[key])) if key in loaded else t.zero_()
                self.state[p] = tensors


def _scalar(optimizer: AdamEMA, name: str, given: Tensor | None) -> Tensor | None:
    """The argument of step(), or the attribute a GradScaler has set, as 0-dim float32."""
    value = getattr(optimizer, name, None) if given is None else given
    return None if value is None else value.to(torch.float32).reshape(())


def _like_param(p: Tensor) -> Tensor | None:
    """The gradient, in the memory format of its parameter."""
    grad = p.grad
    if grad is None:
        return None
    if not same_layout(local(grad), local(p)):
        p.grad = grad = torch.empty_like(p, dtype=grad.dtype).copy_(grad)
    return local(grad)
