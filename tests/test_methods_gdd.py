"""GDD and GDD-I: published counts and shapes, losses by hand, R1 by finite differences, what stays frozen, and that it learns."""

import math
import re
import sys
import types

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, softplus
from toy import Mixture, apart, batch_of, default_dtype, draws, gradients, largest, learn, pretrained, reached

from potstill.engine.common.errors import UserError
from potstill.engine.config.tree import RECIPES, load
from potstill.engine.diffusion import precond
from potstill.engine.methods.base import Batch, frozen
from potstill.engine.methods.gdd import GDD, GDDConfig
from potstill.engine.nets.discriminators import PatchHead, ProjectedDiscriminator, Projector, SpectralConv2d
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.features import KNOWN, FeatureNet, OnlyShape, Tap, load_feature_net
from potstill.engine.skipping.freezing import freeze, is_frozen
from potstill.engine.training.optim import OptimConfig
from potstill.engine.training.run import Run, TrainConfig
from potstill.engine.training.state import ema_decay

NCSNPP = {
    "model_type": "SongUNet", "embedding_type": "fourier", "encoder_type": "residual", "decoder_type": "standard",
    "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1], "model_channels": 128,
}  # fmt: skip
CIFAR = {"img_resolution": 32, "img_channels": 3, "channel_mult": [2, 2, 2], **NCSNPP}
FFHQ = {"img_resolution": 64, "img_channels": 3, "channel_mult": [1, 2, 2, 2], **NCSNPP}
IMAGENET = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "DhariwalUNet"}
VGG, LITE0, DEIT = ([Tap(*tap) for tap in taps] for taps in KNOWN.values())


class Waves(FeatureNet):
    """Fixed random waves of a point in the plane as maps of side 4 and 2."""

    def __init__(self, channels: int = 16):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.taps = [Tap(channels, 4), Tap(channels, 2)]
        draw = lambda *shape: nn.Parameter(torch.randn(*shape, generator=generator), requires_grad=False)  # noqa: E731
        self.directions = nn.ParameterList([draw(2, tap.channels * tap.side**2) for tap in self.taps])
        self.phases = nn.ParameterList([draw(tap.channels * tap.side**2) for tap in self.taps])

    def forward(self, images: Tensor, labels=None, noise=None) -> list[Tensor]:
        x = images.flatten(1)
        waves = [(2 * x @ d.to(x) + 3 * p.to(x)).sin() for d, p in zip(self.directions, self.phases, strict=True)]
        return [w.reshape(len(x), tap.channels, tap.side, tap.side) for w, tap in zip(waves, self.taps, strict=True)]


class Blind(Waves):
    """Features in which all images look alike."""

    def forward(self, images: Tensor, labels=None, noise=None) -> list[Tensor]:
        return [0 * wave for wave in super().forward(images)]


def gdd(data: Mixture, *features: FeatureNet, **settings) -> GDD:
    settings = {"width": 4, "sum_over": 1.0} | settings
    method = GDD(GDDConfig(**settings), apart(pretrained(data), 1), features or [Waves()])
    return move(method, torch.get_default_dtype())


def move(method: GDD, dtype: torch.dtype) -> GDD:
    for net in (method.discriminator, method.frozen_discriminator):
        net.to(dtype)
    method.frozen_discriminator = frozen(method.discriminator)
    return method


def tiny(**kwargs) -> nn.Module:
    shape = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "model_type": "SongUNet"}
    return from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, **shape | kwargs)


def on_images(net, *, n: int = 4, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    labels = torch.eye(net.label_dim)[torch.arange(n) % net.label_dim] if net.label_dim else None
    return Batch(torch.rand(n, 1, 8, 8, generator=g) * 2 - 1, labels, draws(n, seed))


# The generator


def test_preconditioning_at_80_is_that_of_consistency_models():
    """gdd_sim C.1: c_skip 3.90629e-5, c_out 0.499978, c_in 0.0124998, c_noise 1.095507, with σ - 0.002 for σ."""
    ours = [c.item() for c in precond.edm(torch.tensor([80.0], dtype=torch.float64))]
    s, eps, sd = 80.0, 0.002, 0.5
    published = sd**2 / ((s - eps) ** 2 + sd**2), (s - eps) * sd / math.hypot(s, sd), 1 / math.hypot(s, sd), math.log(s) / 4
    assert published == pytest.approx((3.90629e-5, 0.499978, 0.0124998, 1.095507), rel=1e-5)
    assert ours == pytest.approx(published, rel=1e-4)


def test_student_starts_as_the_teacher_at_80():
    teacher = tiny(label_dim=3, augment_dim=9, dropout=0.3).eval()
    method = GDD(GDDConfig(), tiny(label_dim=3, augment_dim=9, dropout=0.3).without_augmentation(), [OnlyShape([(8, 8)])])
    method.student.load_state_dict({k: v for k, v in teacher.state_dict().items() if "map_augment" not in k})
    labels = on_images(teacher).labels
    z = draws(4).normal(1, 8, 8)
    torch.testing.assert_close(method.sampler(method.student.train(), labels, draws(4)), teacher(80 * z, torch.tensor(80.0), labels))
    assert method.student.kwargs["augment_dim"] == 0


@pytest.mark.parametrize(
    ("kwargs", "counts", "total"),
    [
        (CIFAR, (0, 47_597_568, 48_781_824, 51_015_168), 56_395_523),
        (CIFAR | {"label_dim": 10}, (0, 47_597_568, 48_781_824, 51_015_168), 56_398_339),
        (FFHQ, (0, 52_614_144, 53_798_400, 56_294_912), 62_758_787),
        (IMAGENET, (0, 233_065_920, 257_324_160, 266_807_616), 295_899_267),
    ],
    ids=["cifar", "cifar-cond", "64", "imagenet"],
)
def test_published_counts_of_frozen_parameters(kwargs, counts, total):
    """Level 1 is exact in the spec; levels 2 and 3 are given as 86.5/85.7/87.0 and 90.5/89.7/90.2 %."""
    for level, count in enumerate(counts):
        with torch.device("meta"):
            net = from_kwargs("EDMPrecond", **kwargs)
        assert freeze(net.model, level) == (count, total)
        assert sum(p.numel() for p in net.parameters() if p.requires_grad) == total - count
    shares = {56: (86.5, 90.5), 62: (85.7, 89.7), 295: (87.0, 90.2)}[total // 10**6]
    assert [round(100 * count / total, 1) for count in counts[2:]] == pytest.approx(shares, abs=0.051)


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("enc.32x32_conv.weight", 4), ("enc.32x32_block0.conv0.bias", 1), ("enc.16x16_down.conv1.weight", 1),
        ("enc.16x16_aux_residual.weight", 4), ("dec.8x8_in0.proj.weight", 1), ("dec.8x8_in0.qkv.weight", 2),
        ("dec.16x16_up.skip.weight", 3), ("dec.32x32_block4.affine.weight", 4), ("dec.32x32_aux_conv.weight", 4),
        ("enc.16x16_block1.norm2.weight", 4), ("map_layer0.weight", 4), ("out_conv.weight", 4),
    ],
)  # fmt: skip
def test_freeze_rule(name, level):
    assert [is_frozen(name, k) for k in range(4)] == [k >= level for k in range(4)]


# The discriminator


@pytest.mark.parametrize(
    ("taps", "logits", "sides"), [(VGG, 484, (224, 112, 56, 28)), (LITE0, 64, (112, 56, 28, 14)), (DEIT, 64, (112, 56, 28, 14))]
)
def test_published_shapes_of_the_discriminator(taps, logits, sides):
    with torch.device("meta"):
        d, maps = ProjectedDiscriminator([taps]), [torch.zeros(2, t.channels, t.side, t.side) for t in taps]
        assert [tuple(x.shape) for x in d.projectors[0](maps)] == [(2, c, s, s) for c, s in zip((64, 64, 128, 256), sides, strict=True)]
        assert [x.shape for x in d([maps])] == [(2, logits)]
        conditional = ProjectedDiscriminator([taps, LITE0], label_dim=1000)
    assert sum(p.numel() for p in d.heads.parameters()) == 10_331_328
    assert sum(p.numel() for p in conditional.heads.parameters()) == pytest.approx(27.5e6, rel=2e-3)
    assert {name.split(".")[0] for name, p in d.named_parameters() if p.requires_grad} == {"heads"}


def test_projector_by_hand():
    projector = Projector([Tap(3, 4), Tap(5, 2)], width=2)
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)
    mix = lambda conv, x: torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], x) + conv.bias[:, None, None]  # noqa: E731
    grow = lambda x: interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)  # noqa: E731
    low = mix(projector.csm[1], grow(mix(projector.ccm[1], b)))
    high = mix(projector.csm[0], grow(mix(projector.ccm[0], a) + low))
    torch.testing.assert_close(projector([a, b]), [high, low])


@pytest.mark.parametrize(("sides", "message"), [((8, 8, 4), "halving sides, got 8, 8, 4"), ((2, 1), "side 2 or more, got 1")])
def test_maps_that_do_not_fit(sides, message):
    with pytest.raises(UserError, match=message):
        ProjectedDiscriminator([[Tap(4, side) for side in sides]])


def test_maps_of_one_size_are_judged_each_by_itself():
    d = ProjectedDiscriminator([[Tap(4, 8), Tap(4, 8)]], width=4)
    maps = [torch.randn(2, 4, 8, 8) for _ in range(2)]
    first, second = d([maps])
    changed, same = d([[torch.randn(2, 4, 8, 8), maps[1]]])
    assert torch.equal(second, same) and not torch.equal(first, changed)


def test_heads_take_small_maps():
    """Digits: maps of 8 and 4 become 16 and 8, and one logit each; a lone map of 2 has no room for a strided convolution."""
    for sides, logits in (((8, 4), 2), ((4, 2), 2), ((2,), 1), ((32, 16, 8), 75)):
        d = ProjectedDiscriminator([[Tap(4, side) for side in sides]], width=4)
        assert d([[torch.randn(2, 4, side, side) for side in sides]])[0].shape == (2, logits)


def test_spectral_norm():
    conv = SpectralConv2d(3, 5, 4)
    x = torch.randn(2, 3, 4, 4)
    conv(x)
    largest_of = torch.linalg.svdvals(conv.weight.flatten(1))[0]
    expected = torch.nn.functional.conv2d(x, conv.weight / largest_of, conv.bias)
    torch.testing.assert_close(conv(x), expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        conv.weight += 0.1 * torch.randn(conv.weight.shape)
    before = conv.u.clone()
    conv(x)
    assert torch.equal(conv.u, before)  # however many forwards an update has
    for _ in range(20):
        conv.renew()
    assert (conv.u @ conv.weight.flatten(1) @ conv.v).item() == pytest.approx(
        torch.linalg.svdvals(conv.weight.flatten(1))[0].item(), rel=1e-3
    )


def test_spectral_norms_follow_every_update_of_the_discriminator():
    method = gdd(Mixture(), Waves())
    convs = [m for m in method.discriminator.modules() if isinstance(m, SpectralConv2d)]
    before = [conv.u.clone() for conv in convs]
    with torch.no_grad():
        for conv in convs:
            conv.weight += torch.randn(conv.weight.shape)
    method.after_step("student")
    torch.testing.assert_close([conv.u for conv in convs], before, rtol=0, atol=0)
    method.after_step("discriminator")
    assert [k for k, (conv, u) in enumerate(zip(convs, before, strict=True)) if len(u) > 1 and torch.equal(conv.u, u)] == []


def test_frozen_view_says_what_the_discriminator_says():
    """Batch statistics also in eval mode, and weights that follow."""
    d = ProjectedDiscriminator([[Tap(4, 4), Tap(4, 2)]], width=4)
    view, maps = frozen(d), [[torch.randn(3, 4, 4, 4), torch.randn(3, 4, 2, 2)]]
    with torch.no_grad():
        next(d.heads.parameters()).mul_(-2)
    for module in d.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    torch.testing.assert_close(view(maps), d(maps))
    assert [name for name, p in view.named_parameters() if p.requires_grad] == []


def test_class_of_a_head_is_a_row_of_its_table():
    head = PatchHead(4, 4, 1, label_dim=3)
    x, labels = torch.randn(2, 4, 8, 8), torch.eye(3)[[2, 0]]
    patches = head.layers(x).flatten(2)
    c = head.classes
    row = math.sqrt(2) * nn.functional.leaky_relu(c.table[[2, 0]] @ (c.weight / math.sqrt(320)).T + c.bias, 0.2)
    torch.testing.assert_close(head.eval()(x, labels), torch.einsum("ncl,nc->nl", head.layers(x).flatten(2), row) / 8)
    assert patches.shape == (2, 64, 1)


# The losses


def logits_by_hand(method: GDD, x: Tensor, labels: Tensor | None, view: bool) -> list[Tensor]:
    d = method.frozen_discriminator if view else method.discriminator.eval()
    return [torch.cat([h(m, labels) for h, m in zip(heads, projector(net(x)), strict=True)], 1)
            for net, projector, heads in zip(method.features, d.projectors, d.heads, strict=True)]  # fmt: skip


@pytest.mark.parametrize("label_dim", [0, 4])
@default_dtype(torch.float64)
def test_student_gradient_by_hand(label_dim):
    """L_G is the sum over samples and nets of each sample's mean over patches (gdd_sim C.5), here over a batch of 16."""
    data = Mixture(label_dim)
    method, batch = gdd(data, Waves(), Waves(8), sum_over=16.0), batch_of(data)
    found = gradients(method, "student", batch)["student"]
    x = method.student(80 * draws(16).normal(2, 1, 1), torch.full((16,), 80.0), batch.labels)
    loss = 0
    for logits in logits_by_hand(method, x, batch.labels, view=True):
        for row in logits:
            loss = loss + sum(softplus(-logit) for logit in row) / len(row)
    torch.testing.assert_close(found, list(torch.autograd.grad(loss, list(method.student.parameters()))), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["softplus", "hinge"])
@default_dtype(torch.float64)
def test_discriminator_gradient_by_hand(kind):
    data = Mixture()
    method, batch = gdd(data, Waves(), Waves(8), sum_over=32.0, loss=kind), batch_of(data)
    found = gradients(method, "discriminator", batch)["discriminator"]
    d = draws(16)
    d.normal(2, 1, 1)  # the student's turn had these
    with torch.no_grad():
        x = method.student(80 * d.normal(2, 1, 1), torch.full((16,), 80.0))
    penalty = softplus if kind == "softplus" else (lambda v: (1 + v).clamp(min=0))
    fake, real = (logits_by_hand(method, y, None, view=False) for y in (x, batch.images))
    loss = sum(penalty(f).mean(1).sum() + penalty(-r).mean(1).sum() for f, r in zip(fake, real, strict=True))
    trained = [p for p in method.discriminator.parameters() if p.requires_grad]
    expected = torch.autograd.grad(2 * loss, trained)  # 32 is twice the batch
    torch.testing.assert_close([g for g in found if g is not None], list(expected), rtol=1e-9, atol=1e-12)


@default_dtype(torch.float64)
def test_r1_by_finite_differences():
    """16 · mean γ/2 |∇ Σ l|², the slope taken pixel by pixel; and its gradient for one weight, taken by wiggling it."""
    data = Mixture(4)
    method, batch = gdd(data, r1_gamma=0.3), batch_of(data, 6)
    method.discriminator.eval()

    def score(y):
        return sum(logits.sum() for logits in logits_by_hand(method, y, batch.labels, view=False))

    def penalty():
        h, slopes = 1e-5, torch.zeros(6, 2)
        with torch.no_grad():
            for i in range(6):
                for j in range(2):
                    step = torch.zeros(6, 2, 1, 1)
                    step[i, j] = h
                    slopes[i, j] = (score(batch.images + step) - score(batch.images - step)) / (2 * h)
        return 16 * 0.3 / 2 * slopes.square().sum(1).mean()

    loss, logs = method.r1_loss(batch)
    assert loss.item() == pytest.approx(penalty().item(), rel=1e-6)
    assert logs["r1"].item() == pytest.approx(loss.item() / (8 * 0.3), rel=1e-9)
    weight = method.discriminator.heads[0][0].layers[0].weight
    (slope,) = torch.autograd.grad(loss, weight)
    values, place = [], (0, 1, 2, 3)
    for h in (1e-5, -1e-5):
        with torch.no_grad():
            weight[place] += h
            values.append(penalty())
            weight[place] -= h
    assert slope[place].item() == pytest.approx((values[0] - values[1]).item() / 2e-5, rel=1e-4)


@default_dtype(torch.float64)
def test_fixed_point():
    """Where generated and real images look alike, the loss is 2 ln 2 a net and nobody moves."""
    data = Mixture()
    method, batch = gdd(data, Blind(), Blind()), batch_of(data)
    for conv in [conv for p in method.discriminator.projectors for conv in (*p.ccm, *p.csm)]:
        nn.init.zeros_(conv.bias)  # or the borders of the maps would show
    assert largest(gradients(method, "student", batch)["student"]) == 0
    assert largest(gradients(method, "discriminator", batch)["discriminator"]) < 1e-6
    assert method.discriminator_loss(batch)[0].item() == pytest.approx(4 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("trains", ["student", "discriminator"])
def test_routing(trains):
    data = Mixture(4)
    method = gdd(data)
    assert reached(gradients(method, trains, batch_of(data))) == {trains}
    projected = [p.grad for p in method.discriminator.projectors.parameters()]
    assert largest(projected) == 0
    assert largest(p.grad for net in method.features for p in net.parameters()) == 0


def test_images_are_fresh_in_every_turn():
    data = Mixture()
    method, batch, seen = gdd(data), batch_of(data), []
    method.student.register_forward_hook(lambda net, args, out: seen.append(args[0]))
    method.student_loss(batch)
    method.discriminator_loss(batch)
    assert len(seen) == 2
    assert not torch.equal(*seen)


# The run


def test_r1_and_what_stays():
    """Five iterations of GDD-I on a U-Net with the teacher's features, R1 at every second: frozen tensors keep their bits."""
    teacher = tiny(label_dim=3, dropout=0.2)
    student = tiny(label_dim=3, dropout=0.2)
    student.load_state_dict(teacher.state_dict())
    features = [load_feature_net(name, frozen(teacher)) for name in ("teacher", "teacher:1.5")]
    method = GDD(GDDConfig(freeze=1, width=4, r1_every=2, feature_noise=True), student, features)
    before = {name: p.clone() for name, p in student.named_parameters()}
    run = Run(method, TrainConfig(kimg=1, batch=4, optim={"student": OptimConfig(lr=1e-2)}), 0, torch.device("cpu"))
    r1 = []
    for step in range(5):
        run.take(*on_images(teacher, seed=step)[:2])
        r1.append("discriminator/r1" in run.meter.read())
    assert r1 == [False, False, True, False, True]
    for net in (student, run.ema.net):
        changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
        stay = {name for name in before if is_frozen(name, 1)}
        assert changed & stay == set()
        assert changed > {"model.map_layer0.weight", "model.enc.8x8_conv.weight", "model.dec.8x8_block0.affine.weight"}
    stay, total = 0, 0
    for name, p in student.model.named_parameters():
        stay, total = stay + p.numel() * is_frozen(name, 1), total + p.numel()
    assert method.notes == [f"freeze level 1: {stay:,} of {total:,} parameters stay, {total - stay:,} train"]


@pytest.mark.parametrize(
    ("recipe", "lr"), [("cifar10_gdd_i", 1e-4), ("ffhq64_gdd_i", 4e-5), ("afhqv2_64_gdd", 4e-5), ("imagenet64_gdd_i", 4e-5)]
)
def test_discriminator_optimiser_makes_up_for_lazy_r1(recipe, lr):
    """lr·16/17 and beta2^(16/17); the losses are summed over the published batch per GPU, as large as the micro-batch."""
    cfg = load(RECIPES / f"{recipe}.yaml", [])
    optim = cfg.train.optim["discriminator"]
    assert optim.lr == pytest.approx(lr * 16 / 17, rel=1e-6)
    assert optim.betas == pytest.approx([0, 0.99 ** (16 / 17)], rel=1e-8)
    assert cfg.method.sum_over == cfg.train.micro_batch == cfg.train.batch / 4
    assert cfg.train.micro_batch == (128 if recipe.startswith("imagenet") else 64)


def test_schedule_is_published():
    """R1 on multiples of 16 but 0, the generator first, and the average's half-life 5 % of the images seen (gdd_sim C.6, C.7)."""
    turns = GDD(GDDConfig(), tiny(), [OnlyShape([(8, 8)])]).turns
    assert [(t.trains, t.every, t.after) for t in turns] == [("student", 1, 0), ("discriminator", 1, 0), ("discriminator", 16, 16)]
    assert len(GDD(GDDConfig(r1_gamma=0.0), tiny(), [OnlyShape([(8, 8)])]).turns) == 2
    assert ema_decay(256, 1_000_000, 500_000, 0.05) == pytest.approx(0.5 ** (256 / 50_000), rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": 4}, "freeze wants one of 0, 1, 2, 3, got 4"), ({"r1_gamma": -1.0}, "r1_gamma wants at least 0, got -1.0"), ({"r1_every": 0}, "r1_every wants at least 1, got 0"),
        ({"features": []}, "at least one feature net"), ({"loss": "wgan"}, "loss wants one of softplus, hinge, got 'wgan'"), ({"width": 0}, "width wants at least 1, got 0"),
        ({"feature_dtype": "fp8"}, "one of fp32, bf16"),
    ],
)  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        GDD(GDDConfig(**settings), tiny(), [OnlyShape([(8, 8)])])


@pytest.mark.parametrize(("label_dim", "freeze_level"), [(0, 0), (4, 1)])
def test_learns(label_dim, freeze_level):
    """The toy's net has no convolutions, so freezing takes nothing from it; U-Nets are frozen above."""
    data = Mixture(label_dim)
    method = GDD(GDDConfig(width=8, sum_over=1.0, r1_gamma=1e-3, freeze=freeze_level), pretrained(data), [Waves()])
    optim = {
        "student": OptimConfig(lr=1e-3, betas=[0.0, 0.99], schedule="linear"),
        "discriminator": OptimConfig(lr=2e-3, betas=[0.0, 0.99]),
    }
    before, after = learn(method, data, 150, optim=optim)
    assert after < before / 10


# Feature nets


def test_teacher_features_are_its_encoder():
    net = tiny(label_dim=3).eval()
    features = load_feature_net("teacher:0.7", frozen(net))
    x, labels = on_images(net)[:2]
    fine, coarse = features(x, labels)
    assert list(features.taps) == [(8, 8), (16, 4)] == [(m.shape[1], m.shape[2]) for m in (fine, coarse)]
    torch.testing.assert_close(coarse, net.features(x, torch.tensor(0.7), labels))
    noise = torch.randn_like(x)
    torch.testing.assert_close(features(x, labels, noise)[1], net.features(x + 0.7 * noise, torch.tensor(0.7), labels))
    assert [name for name, p in features.named_parameters() if p.requires_grad] == []


def test_teacher_features_in_bfloat16():
    net = tiny().eval()
    exact, fast = (load_feature_net("teacher", frozen(net), dtype=d) for d in (torch.float32, torch.bfloat16))
    x = on_images(net).images.requires_grad_()
    maps = fast(x)
    assert {m.dtype for m in maps} == {torch.bfloat16}
    d = ProjectedDiscriminator([exact.taps], width=4).eval()
    (logits,), (reference,) = d([maps]), d([exact(x)])
    assert logits.dtype == torch.float32
    assert (logits - reference).norm() < 0.1 * reference.norm()
    logits.sum().backward()
    assert x.grad.isfinite().all()


def test_r1_through_the_teacher():
    """Attention and norms differentiate twice: the slope's square against finite differences in one direction."""
    torch.manual_seed(3)
    net = tiny()
    method = GDD(GDDConfig(width=4, r1_gamma=2 / 16), tiny(), [load_feature_net("teacher", frozen(net))])
    method.discriminator.eval()
    batch = on_images(net, n=2)
    loss, _ = method.r1_loss(batch)
    y = batch.images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(method.logits(method.discriminator, y, batch)[0].sum(), y)
    assert loss.item() == pytest.approx(slope.square().flatten(1).sum(1).mean().item(), rel=1e-4)

    weight, values = method.discriminator.heads[0][0].layers[0].weight, []
    (exact,) = torch.autograd.grad(loss, weight)
    direction = exact / exact.norm()
    for h in (1e-3, -1e-3):
        with torch.no_grad():
            weight.add_(h * direction)
        values.append(method.r1_loss(batch)[0].item())
        with torch.no_grad():
            weight.sub_(h * direction)
    assert exact.norm().item() == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-2)


class Pyramid(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.avg_pool2d(x, 2), nn.functional.avg_pool2d(x, 4)


class Nested(nn.Module):
    def forward(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (x, x), x


class Choosy(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[2] < 100:
            raise ValueError("wants 100 pixels")
        return x, x


class Mute(nn.Module):
    @torch.jit.export
    def encode(self, x: Tensor) -> Tensor:
        return x


def scripted(module: nn.Module, path) -> str:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(path)
    return f"torchscript:{path}"


def test_torchscript_features(tmp_path):
    features = load_feature_net(scripted(Pyramid(), tmp_path / "f.pt"), tiny())
    x = on_images(tiny()).images
    assert list(features.taps) == [(3, 4), (3, 2)]
    torch.testing.assert_close(features(x), list(Pyramid()(x.expand(-1, 3, -1, -1))))
    with pytest.raises(UserError, match="tuple of square maps"):
        load_feature_net(scripted(nn.Identity(), tmp_path / "i.pt"), tiny())
    (tmp_path / "junk.pt").write_bytes(b"no script")
    with pytest.raises(UserError, match=r"junk.pt is no TorchScript net"):
        load_feature_net(f"torchscript:{tmp_path / 'junk.pt'}", tiny())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Nested(), "wants to return a tuple of square maps"),
        (Choosy(), "is no TorchScript net for 8x8 images: builtins.ValueError: wants 100 pixels"),
        (Mute(), "is no TorchScript net for 8x8 images: 'RecursiveScriptModule' object has no attribute 'forward'"),
        (b"<html>404</html>", "wanted one written by torch.jit.save; it is a web page"),
    ],
)
def test_torchscript_that_is_no_pyramid(tmp_path, module, message):
    if isinstance(module, bytes):
        (tmp_path / "f.pt").write_bytes(module)
    else:
        scripted(module, tmp_path / "f.pt")
    with pytest.raises(UserError, match=re.escape(message)):
        load_feature_net(f"torchscript:{tmp_path / 'f.pt'}", tiny())


class Stages(nn.Module):
    """What timm's features_only networks look like: four maps of strides 4 to 32."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.scale * nn.functional.avg_pool2d(x, stride) for stride in (4, 8, 16, 32)]


class Transformer(Stages):
    embed_dim, blocks = 6, range(12)

    def forward_intermediates(self, x, indices, norm, intermediates_only):
        assert (indices, norm, intermediates_only) == ([2, 5, 8, 11], False, True)
        return [self.scale * nn.functional.avg_pool2d(x, 16).repeat(1, 2, 1, 1) + i for i in indices]


@pytest.fixture
def timm(monkeypatch):
    """A timm with two networks."""
    made = []

    def create_model(name, pretrained=False, **kwargs):
        made.append((name, pretrained, kwargs))
        if name == "nonsense":
            raise RuntimeError("Unknown model (nonsense)")
        return Transformer() if name.startswith("deit") else Stages()

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    return made


def test_timm_features(timm):
    net = tiny()
    features, x = load_feature_net("timm:resnet", net), on_images(net).images
    assert timm == [("resnet", True, {"features_only": True, "out_indices": (1, 2, 3, 4)})]
    assert list(features.taps) == [(3, 56), (3, 28), (3, 14), (3, 7)]
    y = (x.expand(-1, 3, -1, -1) + 1) / 2
    y = (y - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    y = interpolate(y, (224, 224), mode="bilinear", align_corners=False)
    torch.testing.assert_close(features(x)[3], nn.functional.avg_pool2d(y, 32))
    assert {m.dtype for m in load_feature_net("timm:resnet", net, dtype=torch.bfloat16)(x)} == {torch.bfloat16}


def test_timm_transformer_has_random_readouts_that_a_checkpoint_keeps(timm):
    a, b = (load_feature_net("timm:deit_base", tiny()) for _ in range(2))
    assert list(a.taps) == [(96, 56), (192, 28), (384, 14), (768, 7)]
    x = on_images(tiny()).images
    assert not torch.equal(a(x)[3], b(x)[3])
    methods = [GDD(GDDConfig(width=4), tiny(), [one]) for one in (a, b)]
    methods[1].state.load_state_dict(methods[0].state.state_dict())
    torch.testing.assert_close(a(x), b(x), rtol=0, atol=0)


def test_feature_nets_that_cannot_be_had(timm, monkeypatch):
    with pytest.raises(UserError, match=r"timm:nonsense: Unknown model"):
        load_feature_net("timm:nonsense", tiny())
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'potstill\[timm\]'"):
        load_feature_net("timm:vgg16_bn.tv_in1k", tiny())
    with torch.device("meta"):
        assert load_feature_net("timm:vgg16_bn.tv_in1k", tiny()).taps == VGG
    for name in ("inception", "timm:", "teacher:much", "teacher:0", "torchscript:/nowhere.pt"):
        with pytest.raises(UserError, match=r"feature"):
            load_feature_net(name, frozen(tiny()))
