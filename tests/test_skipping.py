"""Layer skipping: what the probe measures, that plans keep their budget, and that a light teacher is what its plan says."""

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo.testing

from potstill.engine import probe as command
from potstill.engine import sample, train
from potstill.engine.common.errors import UserError
from potstill.engine.diffusion.sampling import ode, one_step
from potstill.engine.diffusion.sigmas import digit_reversal, karras_at, strata
from potstill.engine.jobs.build import lighten
from potstill.engine.methods.base import Draws, frozen
from potstill.engine.methods.dmd import DMD, DMDConfig
from potstill.engine.methods.gdd import GDDConfig
from potstill.engine.methods.moment_matching import Alternating, MomentMatchingConfig
from potstill.engine.methods.sfd import SFD, SFDConfig
from potstill.engine.methods.sim import SIM, SIMConfig
from potstill.engine.methods.teacher import EDMLoss, Teacher
from potstill.engine.models.generate import generate
from potstill.engine.models.weights import save_net, weights_hash
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.skipping import freezing, picture
from potstill.engine.skipping.apply import Skipping
from potstill.engine.skipping.blocks import blocks_of
from potstill.engine.skipping.freezing import is_frozen
from potstill.engine.skipping.plan import (
    Plan,
    SkippingConfig,
    check_budget,
    check_plan,
    kl_budget,
    latency_saved,
    load_plan,
    nested_order,
    prefixes,
    save_plan,
)  # fmt: skip
from potstill.engine.skipping.probe import Material, Probed, bin_edges, joint, make_plan, spearman
from potstill.engine.skipping.probe import probe as probed
from potstill.engine.training.optim import OptimConfig
from potstill.engine.training.run import Run, Share, TrainConfig

CPU = torch.device("cpu")
SONG = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0}
NCSN = SONG | {"encoder_type": "residual", "embedding_type": "fourier", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
AUX = SONG | {"encoder_type": "skip", "decoder_type": "skip", "channel_mult": [1, 1, 2]}
ADM = {"model_type": "DhariwalUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0}


def net_of(kwargs=SONG, **more):
    """A small denoiser whose zero-initialised layers are not zero, so that every block does something."""
    torch.manual_seed(3)
    net = from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, **kwargs | more).eval().requires_grad_(False)
    for name, p in net.named_parameters():
        if any(part in name for part in ("conv1.weight", "proj.weight", "conv.weight")):
            p.copy_(0.3 * torch.randn(p.shape) / p[0].numel() ** 0.5)
    return net


def plan_for(net, prefix=(3, 2, 1, 0), bins=None):
    """A plan over made-up blocks in a made-up order, with calibration that differs in every bin."""
    order = list(blocks_of(net.model))
    random.Random(0).shuffle(order)
    channels = {n: b.out_channels for n, b in Probed(net).parts.items()}
    draw = torch.Generator().manual_seed(1)
    rows = lambda n, around: (around + 0.2 * torch.randn(len(prefix), channels[n], generator=draw)).tolist()  # noqa: E731
    affine = {n: {"a": rows(n, 0.7), "b": rows(n, 0.0)} for n in order[: max(prefix)]}
    edges = np.geomspace(0.002, 80, len(prefix) + 1).tolist()
    return Plan(weights_hash(net), 8, edges, order, list(prefix), 0.02, affine)


def inputs(n=16, seed=0, label_dim=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.eye(label_dim)[torch.randint(label_dim, (n,), generator=g)] if label_dim else None
    return torch.randn(n, 1, 8, 8, generator=g), labels


LEVELS = lambda u: karras_at(u)  # noqa: E731


# --- strata


@pytest.mark.parametrize("n", [1, 2, 6, 12, 16, 30])
def test_spread_is_a_permutation(n):
    assert sorted(digit_reversal(n)) == list(range(n))


def test_powers_of_two_are_dealt_out_by_bit_reversal():
    assert digit_reversal(16) == [int(f"{i:04b}"[::-1], 2) for i in range(16)]
    for part in (1, 2, 4, 8, 16):  # how the batch is cut changes nothing
        assert strata(16, part) == digit_reversal(16)


@pytest.mark.parametrize(("total", "part"), [(12, 4), (12, 6), (48, 16), (30, 10)])
def test_every_part_has_one_sample_in_every_slice(total, part):
    order = strata(total, part)
    assert sorted(order) == list(range(total))
    for start in range(0, total, part):
        assert [s * part // total for s in order[start : start + part]] == digit_reversal(part)


@pytest.mark.parametrize(("total", "part", "step"), [(8, 4, 2), (12, 3, 4), (16, 2, 2), (12, 6, 2)])
def test_so_has_the_share_of_a_rank_that_takes_every_so_manieth_sample(total, part, step):
    order = strata(total, part, step)
    assert sorted(order) == list(range(total))
    for start in range(0, total, part * step):
        for rank in range(step):
            share = order[start + rank : start + part * step : step]
            assert [s * part // total for s in share] == digit_reversal(part)


def draws(seed=0, total=16, window=slice(0, 16), stratified=True):
    return Draws(torch.Generator().manual_seed(seed), total, window, random.Random(0), stratified=stratified)


def test_stratified_levels_lie_in_their_slices_and_are_uniform():
    many = torch.stack([draws(seed).level() for seed in range(400)])
    low = torch.tensor(digit_reversal(16)) / 16
    assert (many - low).min() >= 0 and (many - low).max() <= 1 / 16
    within = ((many - low) * 16).flatten()
    assert within.mean().item() == pytest.approx(0.5, abs=4 * 12**-0.5 / 6400**0.5)
    whole = draws(5).level()
    assert torch.equal(torch.cat([draws(5, window=slice(0, 8)).level(), draws(5, window=slice(8, 16)).level()]), whole)
    integers = torch.stack([draws(seed).integer_level(3, 6) for seed in range(50)])
    assert torch.bincount(integers.flatten()).tolist() == [0, 0, 0, 200, 200, 200, 200]  # four of each in every batch


def test_without_a_plan_levels_are_the_plain_draws():
    assert torch.equal(draws(stratified=False).level(), draws(stratified=False).uniform())
    assert torch.equal(draws(stratified=False).integer_level(2, 900), draws(stratified=False).integers(2, 900))


# --- execution


def one_by_one(net, plan, x, sigma, labels, bins):
    """The same plan by hooks on the original net, one sample at a time: skip path times a plus b, for its own bin."""
    out = []
    for i, k in enumerate(bins):
        left = {} if k is None else set(plan.order[: plan.prefix[k]])
        view, hooks = copy.deepcopy(net), []
        for name in left:
            part, key = name.split(".")
            block = getattr(view.model, part)[key]
            a, b = (torch.tensor(plan.affine[name][c][k])[None, :, None, None] for c in "ab")

            def passed(block, args, output, a=a, b=b):
                x = torch.cat([args[0], *args[2:]], 1)  # what a decoder's block reads is in two pieces
                return a * (x if block.skip is None else block.skip(x)) + b

            hooks.append(block.register_forward_hook(passed))
        out.append(view(x[i : i + 1], sigma[i : i + 1], None if labels is None else labels[i : i + 1]))
    return torch.cat(out)


@pytest.mark.parametrize("kwargs", [SONG, NCSN, AUX, ADM], ids=["ddpmpp", "ncsnpp", "aux", "adm"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sorted_batch_is_what_every_sample_is_by_itself(kwargs, guidance):
    """Values and the gradient to the input, against hooks on the untouched net, sample by sample."""
    net = net_of(kwargs, label_dim=3)
    plan = plan_for(net)
    light = Skipping(frozen(net), plan, LEVELS)
    (x, labels), sigma = inputs(label_dim=3), karras_at(draws().level())
    bins = light.bins_of_samples(16)
    for s, k in zip(sigma.tolist(), bins, strict=True):
        assert plan.left_out(k) <= plan.left_out(plan.bin_of(s))  # never more than the sample's own level allows
    assert len({plan.left_out(k) for k in bins}) == 4 and bins != sorted(bins, key=plan.left_out)
    x = x * (1 + sigma[:, None, None, None])
    results = []
    for estimate in ("light", "by hand"):
        leaf = x.clone().requires_grad_()
        if estimate == "light":
            d = light.estimate(leaf, sigma, labels, guidance=guidance).denoised()
        else:
            d = one_by_one(net, plan, leaf, sigma, labels, bins)
            if guidance != 1:
                free = one_by_one(net, plan, leaf, sigma, torch.zeros_like(labels), bins)
                d = free + guidance * (d - free)
        d.square().sum().backward()
        results.append((d.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)
    assert (results[0][0] - net(x, sigma, labels)).abs().max() > 1e-2  # and it is not the full teacher


def test_rows_are_fixed_by_the_batch_size():
    """Shapes are known before the draw; every block saves what the plan says of the samples."""
    net = net_of()
    plan = plan_for(net)
    light = Skipping(net, plan, LEVELS)
    bins = light.bins_of_samples(16)
    blocks = light.schedule(torch.ones(16), 16).blocks
    for at, name in enumerate(plan.order):
        assert (16 if (rows := blocks[name][0]) is None else rows) == sum(plan.left_out(k) <= at for k in bins)
    seen = []
    for seed in range(2):
        light.estimate(*inputs(seed=seed)[:1], karras_at(draws(seed).level()))
        seen.append({name: block.rows for name, block in light.parts.items()})
    assert seen[0] == seen[1]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does that itself
def test_a_compiled_teacher_is_compiled_once():
    """Rows are Python numbers that every batch of one size shares: one graph without breaks, whatever the levels."""
    light, counter = Skipping(net_of(num_blocks=1, channel_mult=[1]), None, LEVELS), torch._dynamo.testing.CompileCounter()
    light.set_plan(plan_for(net_of(num_blocks=1, channel_mult=[1])))
    plain = [light(inputs(seed=seed)[0], karras_at(draws(seed).level())) for seed in range(2)]
    light.model.forward = torch.compile(light.model.forward, backend=counter, fullgraph=True, dynamic=False)
    compiled = [light(inputs(seed=seed)[0], karras_at(draws(seed).level())) for seed in range(2)]
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled, plain)


def test_one_level_for_all_leaves_whole_blocks_out():
    net = net_of()
    plan = plan_for(net)
    light, (x, _) = Skipping(net, plan), inputs(4)
    for sigma in (0.003, 0.1, 2.0, 60.0, 90.0):
        d = light(x, torch.tensor(sigma))
        by_hand = one_by_one(net, plan, x, torch.full((4,), sigma), None, [plan.bin_of(sigma)] * 4)
        torch.testing.assert_close(d, by_hand, rtol=1e-4, atol=1e-4)
    assert plan.bin_of(90.0) is None
    with pytest.raises(ValueError, match="no law"):
        light(x, torch.full((4,), 0.1))


@pytest.mark.parametrize("levels", [LEVELS, None], ids=["a law", "no law"])
@pytest.mark.parametrize("cache", [1, 2])
def test_features_are_those_of_the_net(levels, cache):
    """Also between evaluations that leave something out, or remember something, and those after them are as if there were none."""
    net, (x, _) = net_of(), inputs(4)
    light, alone = (Skipping(net, plan_for(net), levels, cache) for _ in range(2))
    sigma = torch.tensor(80.0) if levels is None else karras_at(draws(total=4).level())
    for k in range(3):
        assert torch.equal(light.features(x + k, torch.ones(4)), net.features(x + k, torch.ones(4)))
        for mine, wanted in zip(light.levels(x, torch.tensor(2.0)), net.levels(x, torch.tensor(2.0)), strict=True):
            assert torch.equal(mine, wanted)
        alone.restart()
        assert torch.equal(light(x, sigma), alone(x, sigma))


def test_an_empty_plan_and_an_inactive_one_are_the_net_itself():
    net, (x, _) = net_of(), inputs()
    sigma = karras_at(draws().level())
    for light in (Skipping(net, plan_for(net, (0, 0, 0)), LEVELS), Skipping(net, None, LEVELS)):
        assert torch.equal(light(x, sigma), net(x, sigma))
    light = Skipping(net, plan_for(net), LEVELS)
    assert not torch.equal(light(x, sigma), net(x, sigma))
    light.active = False
    assert torch.equal(light(x, sigma), net(x, sigma))
    assert [p.data_ptr() for p in light.parameters()] == [p.data_ptr() for p in net.parameters()]


# --- caching


@pytest.mark.parametrize("kwargs", [SONG, NCSN, AUX, ADM], ids=["ddpmpp", "ncsnpp", "aux", "adm"])
def test_a_cached_evaluation_with_the_same_input_is_the_full_one(kwargs):
    """What is remembered of an input is right for that input: cached and full evaluation agree bit for bit."""
    net, (x, _) = net_of(kwargs), inputs(4)
    light, sigma = Skipping(net, None, cache=3), torch.tensor(0.7)
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(light(x, sigma), net(x, sigma))


def test_every_nth_evaluation_of_a_walk_is_full_and_walks_start_afresh():
    net, (x, _) = net_of(), inputs(4)
    light, deep = Skipping(net, None, cache=2), []
    light.parts["enc.4x4_block0"].register_forward_pre_hook(lambda *_: deep.append(1))
    top = []
    light.parts["enc.8x8_block0"].register_forward_pre_hook(lambda *_: top.append(1))
    sampler = ode("euler", 5)
    with torch.no_grad():
        states = [sampler.states(light, 80 * x, None) for _ in range(2)]
    assert (len(deep), len(top)) == (2 * 3, 2 * 5)
    torch.testing.assert_close(*states, rtol=0, atol=0)
    full = sampler.states(net, 80 * x, None)
    assert torch.equal(states[0][1], full[1]) and not torch.equal(states[0][2], full[2])


def test_a_net_of_one_resolution_has_nothing_to_remember():
    with pytest.raises(UserError, match="several resolutions"):
        Skipping(net_of(channel_mult=[1]), None, cache=2)


# --- the probe, on a teacher that has learnt something


@pytest.fixture(scope="module")
def learnt():
    """A net of ten blocks that has learnt bright rectangles on dark ground for a few seconds, and images of them."""
    torch.manual_seed(0)

    def squares(n, g):
        i = torch.arange(8)[None]
        at = torch.randint(0, 5, (n, 2), generator=g)
        size = torch.randint(2, 5, (n, 2), generator=g)
        inside = [(i >= at[:, [a]]) & (i < at[:, [a]] + size[:, [a]]) for a in (0, 1)]
        return (inside[0][:, :, None] & inside[1][:, None, :])[:, None].float() * 2 - 1

    g = torch.Generator().manual_seed(0)
    net = from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, **SONG)
    cfg = TrainConfig(kimg=10, batch=64, ema_kimg=1, optim={"teacher": OptimConfig(lr=4e-3, warmup=20, schedule="linear")})
    run = Run(Teacher(EDMLoss(), net), cfg, 0, CPU)
    while run.step < run.total:
        run.take(squares(64, g), None)
    teacher = run.ema.net.eval().requires_grad_(False)
    data = Material(squares(256, g), None, batch=64)
    profile = probed(teacher, data, 4)
    profile.block_seconds[:] = np.arange(len(profile.names)) % 3 + 2.0  # latencies that do not depend on the machine
    profile.passed_seconds[:] = 1.0
    profile.net_seconds = float(profile.block_seconds.sum())
    return SimpleNamespace(teacher=teacher, data=data, profile=profile, fresh=Material(squares(256, g), None, batch=64, seed=7))


def test_taylor_ranks_blocks_and_the_residual_share_does_not(learnt):
    p = learnt.profile
    taylor = [spearman(p.taylor[:, k], p.alone[:, k]) for k in range(4)]
    share = [spearman(p.share[:, k], p.raw[:, k]) for k in range(4)]
    print("taylor", taylor, "share", share)
    assert np.mean(taylor) >= 0.9
    assert np.mean(share) < np.mean(taylor) - 0.2


def test_leave_one_out_is_the_denoising_error_of_a_net_with_that_block_replaced(learnt):
    """One entry against hooks on the net, and calibration against numpy's least squares."""
    p, k, name = learnt.profile, 2, "dec.4x4_in1"
    low, high = p.edges[k], p.edges[k + 1]
    block = learnt.teacher.model.dec["4x4_in1"]
    seen = []
    hook = block.register_forward_hook(lambda block, args, y: seen.append((args[0], y)))
    with torch.no_grad():
        for x_t, sigma, _, labels in learnt.data.part(0, 0.5).noised(low, high):
            learnt.teacher(x_t, sigma, labels)
    hook.remove()
    s, y = (torch.cat(t).double().transpose(0, 1).flatten(1).numpy() for t in zip(*seen, strict=True))
    for c in (0, 5):
        (a, b), *_ = np.linalg.lstsq(np.stack([s[c], np.ones_like(s[c])], 1), y[c], rcond=None)
        assert p.affine[name]["a"][k][c] == pytest.approx(a, rel=1e-4, abs=1e-6)
        assert p.affine[name]["b"][k][c] == pytest.approx(b, rel=1e-4, abs=1e-6)
    a, b = (torch.tensor(p.affine[name][part][k])[None, :, None, None] for part in "ab")
    far = loss = 0.0
    with torch.no_grad():
        for x_t, sigma, clean, labels in learnt.data.part(0.5, 0.75).noised(low, high):
            d = learnt.teacher(x_t, sigma, labels)
            hook = block.register_forward_hook(lambda block, args, y: a * args[0] + b)
            far += float((learnt.teacher(x_t, sigma, labels) - d).square().sum())
            hook.remove()
            loss += float((d - clean).square().sum())
    assert p.alone[p.names.index(name), k] == pytest.approx(far / loss, rel=1e-4)


def test_calibration_helps_where_it_was_not_fitted(learnt):
    p = learnt.profile
    assert np.median(p.raw / p.alone) > 1.05 and (p.alone <= p.raw * 1.05).mean() > 0.9


def test_budgets_hold_on_images_and_noise_never_seen(learnt):
    plan = make_plan(learnt.teacher, learnt.data, learnt.profile, 0.02)
    assert max(plan.prefix) >= 2
    view = Probed(learnt.teacher)
    for k, p in enumerate(plan.prefix):
        cost = joint(learnt.teacher, view, learnt.fresh, learnt.profile, plan.order[:p], k)
        assert cost["deviation"] <= 1.25 * 0.02  # 256 other images: their mean differs by about a tenth
        assert plan.report["bins"][k]["excess"] <= 0.02


def test_other_blocks_of_the_same_latency_cost_more(learnt):
    p = learnt.profile
    plan = make_plan(learnt.teacher, learnt.data, p, 0.02)
    view, latency = Probed(learnt.teacher), dict(zip(p.names, p.latency, strict=True))
    k = int(np.argmax(plan.prefix))
    chosen = plan.order[: plan.prefix[k]]
    ours = joint(learnt.teacher, view, learnt.fresh, p, chosen, k)["deviation"]
    want = sum(latency[n] for n in chosen)
    rng, others = random.Random(0), []
    while len(others) < 8:
        some = rng.sample(p.names, len(chosen))
        if set(some) != set(chosen) and abs(sum(latency[n] for n in some) - want) < 1e-6:
            others.append(joint(learnt.teacher, view, learnt.fresh, p, some, k)["deviation"])
    assert ours < min(others) and 2 * ours < np.median(others)


def test_the_heat_map_and_the_table_show_every_block(learnt, tmp_path):
    plan = make_plan(learnt.teacher, learnt.data, learnt.profile, 0.02)
    picture.heat_map(tmp_path / "plan.png", learnt.profile, plan)
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    text = picture.table(learnt.profile, plan)
    assert all(name in text for name in learnt.profile.names)


def test_freezing_trains_no_more_than_the_published_level(learnt):
    model, needs = learnt.teacher.model, freezing.need(learnt.profile)
    found = freezing.propose(model, learnt.profile)["levels"]
    for level in (1, 2, 3):
        one = found[str(level)]
        sizes = {n: p.numel() for n, p in model.named_parameters()}
        assert one["trained_published"] == sum(s for n, s in sizes.items() if not is_frozen(n, level))
        assert one["trained"] == sum(s for n, s in sizes.items() if n not in one["frozen"])
        assert one["trained"] <= one["trained_published"]
    needy = max(needs, key=needs.get)
    frozen_1 = found["1"]["frozen"]
    assert any(needy in n for n, _ in model.named_parameters() if n not in frozen_1 and is_frozen(n, 3))


def test_gdd_freezes_what_a_plan_proposes(learnt, tmp_path):
    plan = plan_for(learnt.teacher)
    plan.report["freeze"] = freezing.propose(learnt.teacher.model, learnt.profile)
    save_plan(tmp_path / "plan.json", plan)
    cfg = GDDConfig(freeze=1, freeze_plan=str(tmp_path / "plan.json"))
    student = cfg.build(learnt.teacher, learnt.teacher).student
    stays = [name for name, p in student.model.named_parameters() if not p.requires_grad]
    assert stays == plan.report["freeze"]["levels"]["1"]["frozen"]
    with pytest.raises(UserError, match="from 1 to 3"):
        replace(cfg, freeze=0).build(learnt.teacher, learnt.teacher)


# --- choosing


def test_the_nested_order_is_near_the_best_of_all_orders():
    """Against all orders of six blocks, by enumeration."""
    from itertools import permutations

    rng = np.random.default_rng(0)
    for _ in range(5):
        error, latency = rng.exponential(0.004, (6, 3)), rng.uniform(0.5, 1.5, 6)
        best = max(latency_saved(order, error, latency, 0.01) for order in permutations(range(6)))
        assert latency_saved(nested_order(error, latency, 0.01), error, latency, 0.01) >= 0.97 * best


def test_prefixes_keep_the_sum_within_the_budget():
    error = np.array([[0.1, 0.4], [0.2, 0.1], [0.3, 0.1]])
    assert prefixes([1, 2, 0], error, 0.5) == [2, 2]
    assert prefixes([0, 1, 2], error, 0.05) == [0, 0]


def test_kl_budget_is_girsanovs_integral():
    """Of a constant error: ∫ c/σ² dσ/σ over the range, by quadrature, where the bins are fine."""
    edges = np.geomspace(0.5, 2, 2001)
    middle = np.sqrt(edges[1:] * edges[:-1])
    assert kl_budget(edges.tolist(), (3 / middle**2).tolist()) == pytest.approx(1.5 * (1 / 0.25 - 1 / 4), rel=1e-5)


# --- methods and training


def method_of(name, net):
    student, fake = (copy.deepcopy(net).requires_grad_() for _ in range(2))
    match name:
        case "sim":
            return SIM(SIMConfig(), net, student, fake)
        case "dmd":
            return DMD(DMDConfig(fake_per_student=1), net, student, fake)
        case "moment_matching":
            return Alternating(MomentMatchingConfig(), net, student, fake)
        case "sfd":
            return SFD(SFDConfig(K=2), net, student)


def blank(n=8):
    return torch.zeros(n, 1, 8, 8), None


@pytest.fixture
def plan_file(tmp_path):
    net = net_of()
    save_plan(tmp_path / "plan.json", plan_for(net))
    return tmp_path / "plan.json"


@pytest.mark.parametrize("name", ["sim", "dmd", "moment_matching", "sfd"])
def test_every_sample_of_a_method_leaves_out_at_most_what_its_level_allows(name, plan_file):
    """The levels that methods really ask at, against what the schedule had assumed of them before they were drawn."""
    net = net_of()
    method = method_of(name, net)
    guard = lighten(method, SkippingConfig(plan=str(plan_file), guard_iterations=0), print)
    light = method.teacher
    assert isinstance(light, Skipping) and guard.net is light
    asked, raw = [], light._raw

    def watched(x, sigma, *rest):
        plan, n = light.plan, len(x)
        if sigma.ndim == 0:
            asked.append(plan.left_out(plan.bin_of(float(sigma))))
        else:
            for s, k in zip(sigma.tolist(), light.bins_of_samples(n), strict=True):
                assert plan.left_out(k) <= plan.left_out(plan.bin_of(s))
                asked.append(plan.left_out(k))
        return raw(x, sigma, *rest)

    light._raw = watched
    run = Run(method, TrainConfig(kimg=1, batch=8, micro_batch=4), 0, CPU)
    for _ in range(3):
        run.take(*blank())
    assert len(set(asked)) > 1


def test_the_student_is_never_light(plan_file):
    method = method_of("sim", net_of())
    lighten(method, SkippingConfig(plan=str(plan_file)), print)
    assert not any(isinstance(net, Skipping) for net in [*method.nets.values(), method.frozen_fake, method.frozen_student])


def test_guard_anneals_measures_and_shrinks(plan_file):
    said, net = [], net_of()
    method = method_of("sim", net)
    guard = lighten(method, SkippingConfig(plan=str(plan_file), guard_iterations=2, cosine=1.0, anneal=0.5), said.append)
    run = Run(method, TrainConfig(kimg=0.08, batch=8), 0, CPU)
    run.guard = guard
    active, prefix = [], []
    for _ in range(run.total):
        run.take(*blank())
        active.append(method.teacher.active)
        prefix.append(method.teacher.plan.prefix)
    assert active == [True] * 5 + [False] * 5
    assert prefix[1] == [3, 2, 1, 0] and prefix[2] == prefix[3] == [2, 1, 0, 0] and prefix[4] == [1, 0, 0, 0]
    logs = run.meter.read()
    assert -1 < logs["skipping/cosine"] < 1 and logs["skipping/norm"] > 0
    assert [words in text for words, text in zip(("cosine", "cosine", "full one"), said, strict=True)] == [True] * 3


def test_the_guards_cosine_is_that_of_two_runs(plan_file):
    """Against the gradients of two separate methods, one with the plan, one without, on the same iteration."""

    def run_of(light):
        method = method_of("sim", net_of())
        guard = lighten(method, SkippingConfig(plan=str(plan_file), guard_iterations=1, cosine=-1, norm=9.0), print) if light else None
        method.stratified = True
        run = Run(method, TrainConfig(kimg=1, batch=8, optim={"student": OptimConfig(lr=1e-3)}), 0, CPU)
        return run, guard

    (light, guard), (full, _) = run_of(True), run_of(False)
    light.guard = guard
    light.take(*blank())  # step 0: no comparison
    state = light.state_dict()
    full.load_state_dict(copy.deepcopy(state) | {"step": 1, "meter": {"sums": {}, "counts": {}}})
    a, b = (run.product_gradient(Share(*blank())).double() for run in (light, full))
    light.meter.read()
    light.take(*blank())
    logs = light.meter.read()
    assert logs["skipping/cosine"] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)
    assert logs["skipping/norm"] == pytest.approx(float(a.norm() / b.norm()), rel=1e-5)


def test_a_run_with_a_plan_resumes_exactly(plan_file):
    def run_of():
        method = method_of("sim", net_of())
        run = Run(method, TrainConfig(kimg=0.08, batch=8), 0, CPU)
        run.guard = lighten(method, SkippingConfig(plan=str(plan_file), guard_iterations=2, cosine=1.0, anneal=0.2), str)
        return run

    whole, first, second = run_of(), run_of(), run_of()
    for _ in range(7):
        whole.take(*blank())
    for _ in range(4):
        first.take(*blank())
    second.load_state_dict(copy.deepcopy(first.state_dict()) | {"step": first.step})
    assert second.guard.shrunk == first.guard.shrunk == 1
    for _ in range(3):
        second.take(*blank())
    assert second.method.teacher.plan == whole.method.teacher.plan
    for a, b in zip(whole.method.student.parameters(), second.method.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_empty_plan_trains_the_same_bits(tmp_path):
    save_plan(tmp_path / "empty.json", plan_for(net_of(), (0, 0)))
    runs, said = [], []
    for cfg in (SkippingConfig(), SkippingConfig(plan=str(tmp_path / "empty.json"))):
        method = method_of("dmd", net_of())
        assert lighten(method, cfg, said.append) is None
        runs.append(Run(method, TrainConfig(kimg=1, batch=8), 0, CPU))
        for _ in range(2):
            runs[-1].take(*blank())
    assert len(said) == 1 and "leaves out nothing" in said[0]
    for a, b in zip(*(run.method.student.parameters() for run in runs), strict=True):
        assert torch.equal(a, b)


def test_teachers_are_sampled_light_and_students_are_not(tmp_path):
    """potstill sample with a plan and a cache, against the sampler on the light net."""
    net = net_of(label_dim=10)
    save_net(tmp_path / "teacher.safetensors", net)
    save_net(tmp_path / "student.safetensors", net, method="sim", sampler=one_step(2.5).to_dict())
    save_plan(tmp_path / "plan.json", plan_for(net))
    more = ["--plan", str(tmp_path / "plan.json"), "--cache", "2", "--seeds", "0-3", "--out", str(tmp_path / "x.npz")]
    sample.main([str(tmp_path / "teacher.safetensors"), "--steps", "3", *more])
    light = Skipping(net, plan_for(net), cache=2)
    (images,) = generate(light, ode("heun", 3), np.arange(4), range(4))
    saved_images = np.load(tmp_path / "x.npz")["images"].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(saved_images, images.numpy())
    (full,) = generate(net, ode("heun", 3), np.arange(4), range(4))
    assert not np.array_equal(saved_images, full.numpy())
    with pytest.raises(UserError, match="are for teachers"):
        sample.main([str(tmp_path / "student.safetensors"), *more])


# --- what a user can get wrong


def test_plans_are_written_and_read(plan_file):
    assert load_plan(plan_file) == plan_for(net_of())


def test_wrong_plans_are_refused_in_one_sentence(plan_file, tmp_path):
    plan, net = load_plan(plan_file), net_of()
    check_plan(plan, net, "plan.json")
    with torch.no_grad():
        next(net.parameters()).add_(1)
    for broken, words in (
        (lambda: check_plan(plan, net, "plan.json"), "another teacher"),
        (lambda: check_plan(replace(plan, resolution=64), net_of(), "plan.json"), "64x64"),
        (lambda: check_budget(0.021), "at most 0.02, got 0.021"),
        (lambda: check_budget(0.0), "above 0"),
        (lambda: load_plan(tmp_path / "none.json"), "no plan at"),
        (lambda: SkippingConfig(anneal=1.5), "anneal"),
        (lambda: SkippingConfig(cache=0), "cache"),
        (lambda: probed(net, Material(torch.zeros(16, 1, 8, 8), None), 5), "5 bins of noise levels want at least 20 images"),
        (lambda: bin_edges(net, 5) and probed(net, Material(torch.zeros(16, 1, 8, 8), None), 0), "at least 1 bin"),
    ):
        with pytest.raises(UserError, match=words):
            broken()


@pytest.mark.parametrize("change", [{"format": "x"}, {"prefix": [9999, 0, 0, 0]}, {"edges": [1, 2]}, {"budget": 0.5}, {"more": 1}])
def test_damaged_plans_are_refused(plan_file, change):
    plan_file.write_text(json.dumps(json.loads(plan_file.read_text()) | change))
    with pytest.raises(UserError):
        load_plan(plan_file)


def test_methods_without_such_a_teacher_say_so(plan_file):
    net = net_of()
    method = SimpleNamespace(teacher_level=lambda u: None)
    for asked, words in ((SkippingConfig(plan=str(plan_file)), "does not"), (SkippingConfig(cache=2), "does not")):
        with pytest.raises(UserError, match=words):
            lighten(method, asked, print)
    with pytest.raises(UserError, match="teachers that walk"):
        lighten(method_of("sim", net), SkippingConfig(cache=2), print)


def test_the_command_refuses_and_probes(tmp_path, capsys):
    """The thin command on the digits: refusals, then a plan that the net itself accepts."""
    net = net_of(label_dim=10)
    save_net(tmp_path / "teacher.safetensors", net)
    line = [str(tmp_path / "teacher.safetensors"), "--data", "digits", "--out", str(tmp_path / "plan.json")]
    for more, words in (
        (["--budget", "0.03"], "budget"), (["--bins", "0"], "at least 1 bin"), (["--images", "8", "--bins", "3"], "want at least 12 images"),
        (["--out", str(tmp_path / "plan.txt")], ".json"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            command.main([*line, *more])
    command.main([*line, "--images", "32", "--bins", "2", "--batch", "8"])
    plan = load_plan(tmp_path / "plan.json")
    check_plan(plan, net, "plan.json")
    assert (tmp_path / "plan.png").exists() and "time saved" in capsys.readouterr().out
    assert set(plan.report["freeze"]["levels"]) == {"1", "2", "3"}


def test_training_refuses_before_it_begins(plan_file, tmp_path):
    """A plan of another teacher, and a method without a teacher, end before the run folder exists."""
    digits = Path(__file__).parent.parent / "configs"
    other = net_of(label_dim=10)
    save_net(tmp_path / "other.safetensors", other)
    line = [f"run_dir={tmp_path}/run", f"teacher.checkpoint={tmp_path}/other.safetensors"]
    with pytest.raises(UserError, match="another teacher"):
        train.main([str(digits / "digits.yaml"), *line, f"skipping.plan={plan_file}"])
    save_plan(plan_file, plan_for(other))
    with pytest.raises(UserError, match="GDD does not"):
        train.main([str(digits / "digits_gdd.yaml"), *line, f"skipping.plan={plan_file}"])
    with pytest.raises(UserError, match="no plan at"):
        train.main([str(digits / "digits.yaml"), *line, f"skipping.plan={tmp_path}/none.json"])
    assert not (tmp_path / "run").exists()


def test_an_iddpm_teachers_levels_are_its_own_in_every_view_of_it():
    """Its file's levels, not those that we compute; and where a walk asks it for 80 lies in a bin."""
    net = from_kwargs("iDDPMPrecond", img_resolution=4, img_channels=1, model_type="SongUNet", model_channels=8, channel_mult=[1],
                      num_blocks=1, attn_resolutions=[])  # fmt: skip
    net.load_state_dict(net.state_dict() | {"u": net.u * 1.001})
    views = Skipping(net, None), Probed(net)
    for view in views:
        torch.testing.assert_close(view.u, net.u, rtol=0, atol=0)
        assert view.round_sigma(80.0) == net.round_sigma(80.0)
    edges = bin_edges(net, 4)
    assert edges[0] <= net.round_sigma(0.002) * (1 + 1e-9)
    assert edges[-1] >= net.round_sigma(80.0) * (1 - 1e-9)
