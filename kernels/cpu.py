"""The losses on CPU tensors: values and their gradients in as few passes over memory as PyTorch allows.

A function here takes images of any shape and layout and returns (value [N], nonfinite [], gradients, made): for every
image that needs one, in the order of the arguments, the gradient of its sample's value. A CPU has no stream to stall,
so "is any value not finite" is a plain `if`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from potstill.kernels.estimate import Estimate, accum

Kept = tuple[Tensor, Tensor, list[Tensor], list[Tensor]]


def _rows(x: Tensor) -> tuple[int, ...]:
    """The shape that lays [N] along the samples of x."""
    return (-1, *(1,) * (x.ndim - 1))


def _sum(x: Tensor) -> Tensor:
    """[N, ...] -> [N]."""
    return x.sum(tuple(range(1, x.ndim)))


def _reduced(x: Tensor, mean: bool) -> Tensor:
    """[N, ...] -> [N], the mean or the sum."""
    axes = tuple(range(1, x.ndim))
    return x.mean(axes) if mean else x.sum(axes)


def _size(x: Tensor) -> int:
    return x.shape[1:].numel()


def _clean(e: Estimate, x_t: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """D of an estimate, and whether it is new memory that may be written to."""
    d, new = e.raw, False
    if e.raw_uncond is not None:
        d, new = torch.lerp(e.raw_uncond.to(dtype), d.to(dtype), e.guidance), True
    if e.c_out is not None and e.c_skip is not None and x_t is not None:
        rows = _rows(d)
        out, skip = e.c_out.view(rows), e.c_skip.view(rows)
        d = (d.mul_(out) if new else torch.mul(d, out).to(dtype)).addcmul_(x_t.to(dtype), skip.to(dtype))
        new = True
    return (d, new) if d.dtype is dtype else (d.to(dtype), True)


def _clean_pair(real: Estimate, fake: Estimate, dtype: torch.dtype) -> tuple[Tensor, bool, Tensor, bool]:
    return *_clean(real, real.x_t, dtype), *_clean(fake, real.x_t if fake.x_t is None else fake.x_t, dtype)


def _sub(a: Tensor, a_new: bool, b: Tensor, b_new: bool) -> Tensor:
    """a - b, into whichever of the two may be overwritten."""
    if a_new:
        return a.sub_(b)
    return torch.sub(a, b, out=b) if b_new else torch.sub(a, b)


def _clean_difference(real: Estimate, fake: Estimate, dtype: torch.dtype) -> Tensor:
    """D_fake - D_real [N, ...], in new memory."""
    if fake.x_t is None and fake.c_skip is not None and real.raw_uncond is None and fake.raw_uncond is None:
        # one x_t for both: out_f·(F_f - F_r) + (out_f - out_r)·F_r + (skip_f - skip_r)·x_t, exactly 0 for equal estimates
        assert real.x_t is not None and real.c_skip is not None and real.c_out is not None and fake.c_out is not None
        rows, f_real = _rows(real.raw), real.raw.to(dtype)
        difference = torch.sub(fake.raw.to(dtype), f_real).mul_(fake.c_out.to(dtype).view(rows))
        if fake.c_out is not real.c_out:
            difference.addcmul_(f_real, (fake.c_out - real.c_out).to(dtype).view(rows))
        if fake.c_skip is not real.c_skip:
            difference.addcmul_(real.x_t.to(dtype), (fake.c_skip - real.c_skip).to(dtype).view(rows))
        return difference
    d_real, real_new, d_fake, fake_new = _clean_pair(real, fake, dtype)
    return _sub(d_fake, fake_new, d_real, real_new)


def _count_out(value: Tensor, gradients: Sequence[Tensor], witness: Tensor | None = None) -> Tensor:
    """How many samples are not finite; zeroes their value and gradients in place.

    `witness` [N] is a sum over absolute inputs, for losses whose value can be finite where an input is not.
    """
    witness = value if witness is None else witness
    if math.isfinite(torch.dot(value, witness).item()):
        return torch.zeros((), dtype=torch.int32)
    bad = ~(value.isfinite() & witness.isfinite())
    value.masked_fill_(bad, 0)
    for g in gradients:
        g[bad] = 0
    return bad.sum(dtype=torch.int32)


def score_match(x: Tensor, real: Estimate, fake: Estimate, eps: float, needs: Sequence[bool]) -> Kept:
    return score_match_weighted(x, real, fake, None, eps, 0.0, needs)


def score_match_weighted(
    x: Tensor, real: Estimate, fake: Estimate, weight: Tensor | None, eps: float, plus: float, needs: Sequence[bool]
) -> Kept:
    dtype, d = accum(x, *real.images, *fake.images), _size(x)
    d_real, real_new, d_fake, fake_new = _clean_pair(real, fake, dtype)
    g = _sub(d_fake, fake_new, d_real, False)
    gap = _sum(_sub(x.to(dtype), x.dtype is not dtype, d_real, real_new).abs_())
    normaliser = gap.clamp(min=eps * d)
    scale = (normaliser.add_(plus * d) if plus else normaliser).reciprocal_()
    if weight is not None:
        scale.mul_(weight)
    g.mul_(scale.view(_rows(x)))  # g/D of the formula: the gradient of the value
    value = _sum(torch.mul(g, g)).mul_(0.5 * d)
    nonfinite = _count_out(value, [g], gap)
    return value, nonfinite, [g] if needs[0] else [], []


def _raw_gradients(e: Estimate, d: Tensor, coef: Tensor | float, needs: Sequence[bool]) -> list[Tensor]:
    """Gradients of e's (raw, x_t, raw_uncond) as far as needed, given coef·d as that of D; overwrites d."""
    rows = _rows(d)

    def times(v: Tensor | None, by: float) -> Tensor | float:
        both = coef if v is None else coef * v
        both = both if by == 1 else both * by
        return both.view(rows) if isinstance(both, Tensor) else both

    x_t = torch.mul(d, times(e.c_skip, 1)) if needs[1] else None
    uncond = torch.mul(d, times(e.c_out, 1 - e.guidance)) if needs[2] else None
    raw = d.mul_(times(e.c_out, e.guidance if e.raw_uncond is not None else 1)) if needs[0] else None
    return [g for g in (raw, x_t, uncond) if g is not None]


def denoise(e: Estimate, target: Tensor, weight: Tensor | None, mean: bool, needs: Sequence[bool]) -> Kept:
    dtype = accum(*e.images, target)
    d, new = _clean(e, e.x_t, dtype)
    error = d.sub_(target) if new else torch.sub(d, target)
    value = _reduced(torch.mul(error, error), mean)
    coef = 2 / _size(target) if mean else 2.0
    if weight is not None:
        value.mul_(weight)
        coef = weight.to(dtype) * coef
    gradients = _raw_gradients(e, error, coef, needs) if True in needs else []
    return value, _count_out(value, gradients), gradients, []


def moments(x: Tensor, real: Estimate, fake: Estimate, weight: Tensor | None, mean: bool, needs: Sequence[bool]) -> Kept:
    dtype = accum(x, *real.images, *fake.images)
    g = _clean_difference(real, fake, dtype)
    if weight is not None:
        g.mul_((weight.to(dtype) / _size(x) if mean else weight.to(dtype)).view(_rows(x)))
    elif mean:
        g.div_(_size(x))
    value = _sum(torch.mul(g, x))
    return value, _count_out(value, [g]), [g] if needs[0] else [], []


def score_implicit(
    x: Tensor, real: Estimate, fake: Estimate, weight: Tensor | None, distance: str, alpha: float, c: float,
    detach: str, needs: Sequence[bool],
) -> Kept:  # fmt: skip
    dtype, rows = accum(x, *real.images, *fake.images), _rows(x)
    d_real, real_new, d_fake, fake_new = _clean_pair(real, fake, dtype)
    delta = torch.sub(d_real, d_fake)
    w = None if weight is None else weight.to(dtype)
    if distance == "l2" and weight is None:
        gap = _sum(_sub(x.to(dtype), x.dtype is not dtype, d_real, real_new).abs_())
        w = gap.div_(_size(x)).clamp_(min=1e-5).reciprocal_()
    v = _sub(d_fake, fake_new, x, False)
    past = 1 - alpha if distance == "l2" else 0.0  # the share of delta in the second factor, v + past·delta
    value = _sum(torch.mul(delta, v) if past == 0 else torch.add(v, delta, alpha=past).mul_(delta))
    square, of_delta = None, None  # gradient of D_real: factor·(v + of_delta·delta); normalised by R
    factor = w
    if distance == "huber":
        square = _sum(torch.mul(delta, delta))
        inverse = (square + c * c).rsqrt_()
        factor = inverse if w is None else inverse * w
        if detach == "":
            of_delta = (value * inverse * inverse).neg_()
    assert factor is not None
    value = value.mul_(factor)
    # with u = v + of_delta·delta, gradients are factor·u for D_real, factor·(delta - u) for D_fake, -factor·delta for x
    if True not in needs:
        gradients = []
    elif detach == "factor":
        gradients = _implicit_gradients(real, fake, delta, torch.mul(delta, past), factor, needs)
    elif of_delta is not None:
        gradients = _implicit_gradients(real, fake, delta, v.addcmul_(delta, of_delta.view(rows)), factor, needs)
    else:
        gradients = _implicit_gradients(real, fake, delta, v.add_(delta, alpha=2 * past) if past else v, factor, needs)
    return value, _count_out(value, gradients, square), gradients, []


def _implicit_gradients(real: Estimate, fake: Estimate, delta: Tensor, u: Tensor, factor: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """Gradients of x and of the images of both estimates, as far as needed; overwrites delta and u."""
    rows = _rows(delta)
    shares = needs[2] and fake.x_t is None and fake.c_skip is not None
    gradients = [torch.mul(delta, factor.neg().view(rows))] if needs[0] else []
    of_x_t = None
    if needs[2] and shares:
        assert real.c_skip is not None and fake.c_skip is not None
        of_x_t = torch.mul(u, (factor * (real.c_skip - fake.c_skip)).view(rows))
        of_x_t.addcmul_(delta, (factor * fake.c_skip).view(rows))
    of_fake = _raw_gradients(fake, delta.sub_(u), factor, needs[4:7]) if True in needs[4:7] else []
    of_real = _raw_gradients(real, u, factor, (needs[1], needs[2] and not shares, needs[3]))
    if of_x_t is not None:
        of_real.insert(int(needs[1]), of_x_t)
    return gradients + of_real + of_fake


def trajectory(
    x: Tensor, e: Estimate, sigma: Tensor, sigma_next: Tensor, target: Tensor, metric: str, c: float, mean: bool,
    needs: Sequence[bool],
) -> Kept:  # fmt: skip
    dtype, rows = accum(x, *e.images, target), _rows(x)
    ratio = (sigma_next.to(dtype) - sigma.to(dtype)).div_(sigma.to(dtype))
    d, _ = _clean(e, x if e.x_t is None else e.x_t, dtype)
    x_next = torch.lerp(x.to(dtype), d, -ratio.view(rows))  # x + ratio·(x - D)
    error = torch.sub(x_next, target)
    coef = ratio.div_(-_size(x)) if mean else ratio.neg_()
    if metric == "l1":
        value = _reduced(torch.abs(error), mean)
        error.sign_()
    elif metric == "l2":
        value, coef = _reduced(torch.mul(error, error), mean), coef.mul_(2)
    else:
        square = _sum(torch.mul(error, error))
        root = (square + c * c).sqrt_()
        value, coef = square.div_(root + c), coef.div_(root)
        if mean:
            value.div_(_size(x))
    gradients = _raw_gradients(e, error, coef, needs[1:4]) if True in needs else []
    return value, _count_out(value, gradients), gradients, [x_next]


def adversarial(logits: Sequence[Tensor], signs: Sequence[int], form: str, needs: Sequence[bool]) -> Kept:
    """Sum over nets of the mean over a net's logits of softplus(z), relu(1 + z) ("hinge") or z, z = sign·logit."""
    dtype = accum(*logits)
    value, gradients = None, []
    for logit, sign, needed in zip(logits, signs, needs, strict=True):
        z = logit.to(dtype) if sign > 0 else torch.neg(logit).to(dtype)
        if form == "softplus":
            term = functional.softplus(z)
        else:
            term = z.add(1).relu_() if form == "hinge" else z
        term = _reduced(term, True) if logit.ndim > 1 else term.clone()
        value = term if value is None else value.add_(term)
        if needed:
            scale = sign / _size(logit)
            if form == "softplus":
                gradients.append(torch.sigmoid(z).mul_(scale))
            else:
                gradients.append((z > -1).to(dtype).mul_(scale) if form == "hinge" else torch.full_like(z, scale))
    assert value is not None
    return value, _count_out(value, gradients), gradients, []


def _plain_clean(e: Estimate, x_t: Tensor | None, dtype: torch.dtype) -> Tensor:
    """D of an estimate through autograd, in few nodes."""
    d = e.raw.to(dtype)
    if e.raw_uncond is not None:
        d = torch.lerp(e.raw_uncond.to(dtype), d, e.guidance)
    if e.c_out is None or e.c_skip is None or x_t is None:
        return d
    rows = _rows(d)
    return torch.addcmul(x_t.to(dtype) * e.c_skip.to(dtype).view(rows), d, e.c_out.to(dtype).view(rows))


def plain_denoise(e: Estimate, target: Tensor, weight: Tensor | None, mean: bool) -> tuple[Tensor]:
    dtype = accum(*e.images, target)
    square = functional.mse_loss(_plain_clean(e, e.x_t, dtype), target.to(dtype), reduction="none")
    value = _reduced(square, mean)
    return (value if weight is None else value * weight.to(dtype),)


def plain_moments(x: Tensor, real: Estimate, fake: Estimate, weight: Tensor | None, mean: bool) -> tuple[Tensor]:
    dtype = accum(x, *real.images, *fake.images)
    g = _clean_difference(real, fake, dtype)  # new memory without a graph: what scales the value scales it beforehand
    if weight is not None:
        g.mul_((weight.to(dtype) / _size(x) if mean else weight.to(dtype)).view(_rows(x)))
    elif mean:
        g.div_(_size(x))
    return (_sum(x.to(dtype) * g),)


def plain_score_implicit(
    x: Tensor, real: Estimate, fake: Estimate, weight: Tensor | None, distance: str, alpha: float, c: float, detach: str
) -> tuple[Tensor] | None:
    if detach:
        return None  # some images get no gradient at all, where ours is zero
    dtype = accum(x, *real.images, *fake.images)
    d_real = _plain_clean(real, real.x_t, dtype)
    d_fake = _plain_clean(fake, real.x_t if fake.x_t is None else fake.x_t, dtype)
    x, delta = x.to(dtype), d_real - d_fake
    towards = d_fake - x
    if distance == "l2" and alpha != 1:
        towards = torch.add(towards, delta, alpha=1 - alpha)
    value = _sum(delta * towards)
    if distance == "huber":
        value = value / (_sum(delta * delta) + c * c).sqrt()
    elif weight is None:
        with torch.no_grad():
            weight = _reduced((x - d_real).abs_(), True).clamp_(min=1e-5).reciprocal_()
    return (value if weight is None else value * weight.to(dtype),)


def plain_trajectory(
    x: Tensor, e: Estimate, sigma: Tensor, sigma_next: Tensor, target: Tensor, metric: str, c: float, mean: bool
) -> tuple[Tensor, Tensor]:
    dtype, rows = accum(x, *e.images, target), _rows(x)
    x, target, sigma = x.to(dtype), target.to(dtype), sigma.to(dtype)
    back = (sigma - sigma_next).div_(sigma).to(dtype)  # x_next = x + back·(D - x)
    if e.c_skip is not None and e.x_t is None and e.raw_uncond is None:  # x_t is x: a linear combination of x and F
        of_x = torch.addcmul(1 - back, back, e.c_skip.to(dtype)).view(rows)
        assert e.c_out is not None
        x_next = torch.addcmul(x * of_x, e.raw.to(dtype), (back * e.c_out).view(rows))
    else:
        x_next = torch.lerp(x, _plain_clean(e, x if e.x_t is None else e.x_t, dtype), back.view(rows))
    if metric == "huber":
        square = _sum(functional.mse_loss(x_next, target, reduction="none"))
        value = square / ((square + c * c).sqrt() + c)
        value = value / _size(x) if mean else value
    else:
        distance = functional.l1_loss if metric == "l1" else functional.mse_loss
        value = _reduced(distance(x_next, target, reduction="none"), mean)
    return value, x_next.detach()


def plain_adversarial(logits: Sequence[Tensor], signs: Sequence[int], form: str) -> tuple[Tensor]:
    """softplus(-l) is -logsigmoid(l), which spares a negation of every logit both ways."""
    dtype, value = accum(*logits), None
    for logit, sign in zip(logits, signs, strict=True):
        logit = logit.to(dtype)
        if form == "softplus":
            term, factor = (functional.softplus(logit), 1) if sign > 0 else (functional.logsigmoid(logit), -1)
        elif form == "hinge":
            term, factor = functional.relu(1 + logit if sign > 0 else 1 - logit), 1
        else:
            term, factor = logit, sign
        term = _reduced(term, True) if logit.ndim > 1 else term
        if value is None:
            value = term if factor > 0 else -term
        else:
            value = value + term if factor > 0 else value - term
    assert value is not None
    return (value,)
