"""Options of AdamEMA set as users of torch.optim set them: numbers and tensors in param_groups, schedulers, copies, checkpoints."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from places import needs_triton
from torch.optim import lr_scheduler as schedules

from potstill.kernels import AdamEMA
from potstill.kernels._lib import INTERPRET

LR = 1e-2


def pair(kind="Adam", **options):
    """AdamEMA and torch.optim's Adam or AdamW over equal parameters."""
    weight = torch.randn(7, 5)
    decoupled = {"decoupled": True} if kind == "AdamW" else {}
    a, b = ([torch.nn.Parameter(weight.clone())] for _ in range(2))
    return AdamEMA(a, **{"lr": LR, **options}, **decoupled), getattr(torch.optim, kind)(b, **{"lr": LR, **options})


def params(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def step(*optimizers):
    """One step of each with the same gradients."""
    for same in zip(*map(params, optimizers), strict=True):
        gradient = torch.randn_like(same[0])
        for p in same:
            p.grad = gradient.clone()
    for optimizer in optimizers:
        optimizer.step()


def assert_same(ours, reference):
    for p, q in zip(params(ours), params(reference), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-6)


def number(options, rate):
    options["lr"] = rate


def kept_and_restored(options, rate):
    """What was read before is given back later, as it was."""
    before = options["lr"]
    options["lr"] = before * 0.5 + rate
    if options.setdefault("turn", 0) % 2:
        options["lr"] = before
    options["turn"] += 1


WAYS = {
    "number": number,
    "zero": lambda options, rate: number(options, 0),
    "NumPy scalar": lambda options, rate: number(options, np.float32(rate)),
    "0-dim array": lambda options, rate: number(options, np.array(rate)),
    "float64 tensor": lambda options, rate: number(options, torch.tensor(rate, dtype=torch.float64)),
    "float32 tensor": lambda options, rate: number(options, torch.tensor(rate)),
    "product": lambda options, rate: number(options, options["lr"] * 0.5),
    "in place": lambda options, rate: options.__setitem__("lr", options["lr"].mul_(0.5) if torch.is_tensor(options["lr"]) else options["lr"] * 0.5),
    "update": lambda options, rate: options.update(lr=rate),
    "union": lambda options, rate: options.__ior__({"lr": rate}),
    "removed": lambda options, rate: (options.pop("lr"), options.setdefault("lr", rate)),
    "betas": lambda options, rate: options.update(betas=(0.5 + rate, 0.9)),
    "betas as tensors": lambda options, rate: options.update(betas=[torch.tensor(0.5), torch.tensor(0.99)]),
    "eps": lambda options, rate: options.update(eps=np.float64(rate)),
    "weight decay": lambda options, rate: options.update(weight_decay=rate),
    "integer weight decay": lambda options, rate: options.update(weight_decay=1),
    "kept and restored": kept_and_restored,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_options_set_between_steps(way, kind):
    ours, reference = pair(kind, weight_decay=0.1)
    reference.param_groups[0]["foreach"] = False
    for k in range(3):
        rate = LR / (k + 2)
        way(ours.param_groups[0], rate)
        way(reference.param_groups[0], rate)
        if way is WAYS["betas as tensors"]:  # torch.optim takes them too, but not each
            reference.param_groups[0]["betas"] = (0.5, 0.99)
        step(ours, reference)
        assert_same(ours, reference)


def test_the_common_loop():
    ours, reference = pair()
    for k in range(3):
        for optimizer in (ours, reference):
            for group in optimizer.param_groups:
                group["lr"] = LR * (k + 1)
        step(ours, reference)
        assert_same(ours, reference)


def test_a_warm_up_from_rates_read_before():
    ours, reference = pair()
    bases = [[group["lr"] for group in optimizer.param_groups] for optimizer in (ours, reference)]
    for k in range(4):
        for optimizer, base in zip((ours, reference), bases, strict=True):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * (k + 1) / 4
        step(ours, reference)
        assert_same(ours, reference)
    assert [float(rate) for rate in bases[0]] == bases[1]


SCHEDULES = {
    "StepLR": lambda o: schedules.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda k: 1 / (k + 1)),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.1, 10),  # sets beta1, too
    "CyclicLR": lambda o: schedules.CyclicLR(o, 1e-3, 1e-2, 2),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 5),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: schedules.SequentialLR(o, [schedules.LinearLR(o, 0.1), schedules.ExponentialLR(o, 0.9)], [2]),
}


@pytest.mark.parametrize("given", [LR, torch.tensor(LR)], ids=["number", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedulers_of_torch(schedule, given):
    options = {"lr": given.clone()} if torch.is_tensor(given) else {"lr": given}
    ours, reference = pair(**options)
    reference = torch.optim.Adam(params(reference), lr=LR)
    schedulers = [schedule(ours), schedule(reference)]
    for k in range(4):
        step(ours, reference)
        for scheduler in schedulers:
            scheduler.step(*([1.0] if isinstance(scheduler, schedules.ReduceLROnPlateau) else []))
        assert_same(ours, reference)
        assert float(ours.param_groups[0]["lr"]) == pytest.approx(float(reference.param_groups[0]["lr"]), rel=1e-6)
        if k == 1:
            for optimizer in (ours, reference):
                optimizer.param_groups[0]["lr"] = LR / 3  # by hand in between; a scheduler goes on from there


def test_a_tensor_given_is_followed():
    rate = torch.tensor(LR)
    ours, reference = pair(lr=rate)
    reference = torch.optim.Adam(params(reference), lr=LR)
    for k in range(3):
        rate.fill_(LR * (k + 1))
        reference.param_groups[0]["lr"] = LR * (k + 1)
        step(ours, reference)
        assert_same(ours, reference)
    assert ours.param_groups[0]["lr"] is rate
    ours.param_groups[0]["lr"] = 0.0  # ours again
    assert rate.item() == pytest.approx(3 * LR)


def test_groups_that_share_a_tensor_part_ways():
    rate, weights = torch.tensor(LR), [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    ours = AdamEMA([{"params": [w]} for w in weights], lr=rate)
    ours.param_groups[0]["lr"] = 0.0
    step(ours)
    assert torch.equal(weights[0].detach(), torch.ones(3)) and not torch.equal(weights[1].detach(), torch.ones(3))


@pytest.mark.parametrize("decay", [0, 1, 0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])], ids=repr)
def test_ema_decay_set_between_steps(decay):
    weight = torch.nn.Parameter(torch.randn(6))
    ema = torch.zeros(6)
    ours = AdamEMA([weight], lr=0, ema=[ema], ema_decay=0.9)
    ours.param_groups[0]["ema_decay"] = decay
    step(ours)
    torch.testing.assert_close(ema, (1 - float(decay)) * weight.detach())


WRONG = {
    "a word": ("lr", "fast", "wanted lr as a number or a tensor of one element, got 'fast'"),
    "none": ("weight_decay", None, "wanted weight_decay as a number"),
    "two": ("lr", torch.ones(2), "wanted lr as a number or a tensor of one element"),
    "amsgrad": ("amsgrad", True, "wanted amsgrad=False, got True"),
    "maximize": ("maximize", True, "wanted maximize=False, got True"),
}


@pytest.mark.parametrize(("name", "value", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_when_it_is_set(name, value, message):
    ours, reference = pair()
    with pytest.raises(ValueError, match=message):
        ours.param_groups[0][name] = value
    step(ours, reference)  # nothing has changed
    assert_same(ours, reference)


def test_a_group_that_was_refused_is_not_there():
    ours, reference = pair()
    with pytest.raises(ValueError, match="lr"):
        ours.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": -1.0})
    step(ours, reference)
    assert_same(ours, reference)


def test_groups_added_later_and_put_in_anew():
    ours, reference = pair()
    step(ours, reference)
    for optimizer in (ours, reference):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(4))], "lr": 0.1, "betas": (0.5, 0.9)})
    step(ours, reference)
    for optimizer in (ours, reference):
        optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.05}
    step(ours, reference)
    assert_same(ours, reference)
    ours.param_groups.append({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.1})
    with pytest.raises(ValueError, match="by add_param_group"):
        ours.step()


@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5), np.float64(0.5)], ids=["number", "tensor", "NumPy scalar"])
def test_a_checkpoint_of_adams_with_any_rate(rate):
    ours, reference = pair()
    step(ours, reference)
    state = copy.deepcopy(reference.state_dict())
    state["param_groups"][0]["lr"] = rate
    ours.load_state_dict(state)
    ours.param_groups[0]["lr"] = 0.25
    reference.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert reference.param_groups[0]["lr"] == 0.25
    step(ours, reference)
    assert_same(ours, reference)


def saved(optimizer):
    torch.save(optimizer, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda o: pickle.loads(pickle.dumps(o)), "torch.save": saved}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_goes_on_as_the_original_would(copied):
    weights = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    ema, shadow = [w.detach().clone() for w in weights], [w.detach().half() for w in weights]
    original = AdamEMA([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.1}], lr=LR, ema=ema, ema_decay=0.5, shadow=shadow)
    step(original)
    weights[0].grad[0] = torch.nan
    original.step()
    everything, again = copied({"optimizer": original, "ema": ema, "shadow": shadow}), None
    again = everything["optimizer"]
    for optimizer in (original, again):
        optimizer.param_groups[0]["lr"] = 0.03
    step(original, again)
    assert_same(again, original)
    assert again.nonfinite == original.nonfinite == 1
    assert [s["step"] for s in again.state.values()] == [2, 2]
    if copied is copy.deepcopy:  # memory is shared within a copy as within the original, and not with it
        for a, b in zip([*ema, *shadow], [*everything["ema"], *everything["shadow"]], strict=True):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    again.load_state_dict(original.state_dict())
    step(original, again)
    assert_same(again, original)


if not INTERPRET:

    @needs_triton
    def test_this_holds_for_the_triton_kernels_under_the_interpreter(monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        some = "number-AdamW or product-AdamW or kept or OneCycleLR-number or followed or part_ways or ema_decay_set or pickle"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", some, str(Path(__file__))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert done.returncode == 0, done.stdout
