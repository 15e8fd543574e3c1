"""SiDA: the released code's numbers, the gradients by hand, who receives one, the order of the turns, and that it learns."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from toy import Mixture, apart, batch_of, default_dtype, draws, image, largest, learn, pretrained, reached

from potstill.engine import train
from potstill.engine.common.errors import UserError
from potstill.engine.jobs.students import check_same_part, earlier_weights
from potstill.engine.methods.base import Batch, Method, OneRank, Turn, lasting, taken_apart
from potstill.engine.methods.dmd import DMDConfig
from potstill.engine.methods.sida import SIDA, SIDAConfig
from potstill.engine.methods.sim import SIMConfig
from potstill.engine.models.partitions import Partition
from potstill.engine.models.weights import read_tensors, save_net
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.guide import Guide
from potstill.engine.skipping.apply import Skipping
from potstill.engine.skipping.blocks import blocks_of
from potstill.engine.skipping.plan import Plan
from potstill.engine.training.checkpoint import load_newest
from potstill.engine.training.optim import OptimConfig, Trained
from potstill.engine.training.ranks import ALONE
from potstill.engine.training.run import Run, Share, TrainConfig

TINY = ["train.kimg=0.1", "train.batch=16", "teacher.train.kimg=0.1", "teacher.train.batch=16", "net.model_channels=8", "eval.n=64"]
TINY += ["train.ema_ramp_up=1.0", "train.ema_kimg=0.05"]
GOLDEN = Path(__file__).parent / "golden"


# The released code's numbers.


class Recorded:
    """The random numbers of a golden file, in the order in which a turn asks for them."""

    def __init__(self, level: Tensor | None, labels: Tensor, *normals: Tensor):
        self._level, self._labels, self._normals = level, labels, list(normals)

    def level(self) -> Tensor:
        assert self._level is not None
        return self._level

    def labels(self, label_dim: int) -> Tensor:
        assert label_dim == self._labels.shape[1]
        return self._labels

    def normal(self, *shape: int) -> Tensor:
        drawn = self._normals.pop(0)
        assert drawn.shape[1:] == shape
        return drawn


class Released:
    """A golden file: its nets in our method, with the student's images and the random numbers of the file."""

    def __init__(self, name: str, **settings):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            meta = file.metadata()
        hyper, kwargs = json.loads(meta["hyper"]), json.loads(meta["kwargs"])
        assert (hyper["lsg"], hyper["lsg_gan"], hyper["tmax"]) == (100, 0.01, 800)
        nets = []
        for role in ("teacher", "fake"):
            net = from_kwargs(meta["precond"], **kwargs)
            net.load_state_dict({key.removeprefix(f"{role}."): t for key, t in self.t.items() if key.startswith(f"{role}.")})
            net.forces_norms = False  # of EDM2's nets: the released code never does it to the fake net
            nets.append(net)
        cfg = SIDAConfig(P_mean=hyper["P_mean"], P_std=hyper["P_std"], gan_fake=hyper["lsd"], **settings)
        self.method = SIDA(cfg, nets[0], nets[0], nets[1].train())
        self.x = self.t["in.images"].clone().requires_grad_()
        self.method.generate = lambda net, draws, labels, before=None: self.x if torch.is_grad_enabled() else self.x.detach()

    def student(self, share: float | None) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient for the images. share: of the GAN."""
        level = self.t["in.gen.u"].flatten()
        draws = Recorded(level, self.t["in.labels"], self.t["in.gen.unit_noise"])
        loss, _ = self.method.student_loss(Batch(torch.zeros(()), None, draws), share)
        return loss, torch.autograd.grad(loss, self.x)[0]

    def fake(self) -> dict[str, Tensor]:
        """The loss, and its gradient for each weight that has one, by name."""
        draws = Recorded(None, self.t["in.labels"], self.t["in.fake.normal_for_sigma"].flatten(), self.t["in.fake.unit_noise"])
        loss, logs = self.method.fake_loss(Batch(self.t["in.real_images"], self.t["in.labels"], draws))
        loss.backward()
        grads = {name: p.grad for name, p in self.method.fake.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), "gan": logs["gan"].detach(), "score": logs["denoise"].detach()} | grads


def close(found: Tensor, wanted: Tensor) -> None:
    """Within 2e-5 of the largest number: the files' own rounding is up to 4e-6."""
    torch.testing.assert_close(found, wanted.reshape(found.shape), rtol=0, atol=2e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(("alpha", "suffix"), [(1.0, ""), (1.2, "_alpha1.2")])
def test_the_students_losses_and_gradients_are_the_released_codes(alpha, suffix):
    file = Released("sida_losses", alpha=alpha)
    for share, name in ((None, f"sid_scaled{suffix}"), (1.0, "gan_scaled")):
        loss, grad = file.student(share)
        close(loss, file.t[f"gen.loss_{name}"])
        close(grad, file.t[f"gen.grad_images_{name}"])
    if alpha == 1:
        loss, grad = file.student(0.5)
        close(loss, file.t["gen.total"])
        close(grad, file.t["gen.grad_images_total"])


def test_the_fake_nets_losses_and_gradients_are_the_released_codes():
    file = Released("sida_losses")
    found = file.fake()
    close(found["score"], file.t["fake_step.loss_score_scaled"])
    close(found["loss"], file.t["fake_step.total"])
    wanted = {key.removeprefix("fake_step.grad."): t for key, t in file.t.items() if key.startswith("fake_step.grad.")}
    compared = [name for name, grad in wanted.items() if name in found and close(found[name], grad) is None]
    assert [name for name in wanted if name not in compared] == ["model.map_augment.weight"]  # of augmented images, which we have none of
    assert wanted["model.map_augment.weight"].abs().max() == 0


def test_the_discriminator_trains_the_encoder_and_the_embedding_alone():
    file = Released("sida_losses")
    file.method.cfg.gan_fake = 0.0
    without = file.fake()
    file = Released("sida_losses")
    both = file.fake()
    for key, wanted in file.t.items():
        if key.startswith("fake_step.grad_D_only."):
            name = key.removeprefix("fake_step.grad_D_only.")
            close(both[name] - without[name], wanted)
    for name, grad in both.items():
        if ".dec." in name:
            torch.testing.assert_close(grad, without[name], rtol=1e-6, atol=1e-6 * grad.abs().max().item())


@pytest.mark.parametrize("suffix", ["", "_nologvar"])
def test_with_edm2s_nets_losses_and_gradients_are_the_released_codes(suffix):
    file = Released("sida_edm2_losses", logvar=not suffix)
    for share, name in ((None, "loss_sid_scaled"), (1.0, "loss_gan_scaled"), (0.5, "total")):
        loss, grad = file.student(share)
        close(loss, file.t[f"gen.{name}{suffix}"])
    close(grad, file.t[f"gen.grad_images_total{suffix}"])
    found = file.fake()
    close(found["score"], file.t[f"fake_step.loss_score_scaled{suffix}"])
    close(found["loss"], file.t[f"fake_step.total{suffix}"])
    wanted = {key.removeprefix("fake_step.grad."): t for key, t in file.t.items() if key.startswith("fake_step.grad.")}
    assert "logvar_linear.weight" in wanted
    for name, grad in wanted.items() if not suffix else ():
        close(found[name], grad)


# One turn at a time, on the toy.


def sida(data: Mixture, **settings) -> SIDA:
    return SIDA(SIDAConfig(**settings), data, pretrained(data), pretrained(data))


def midway(data: Mixture, **settings) -> SIDA:
    return SIDA(SIDAConfig(**settings), data, apart(pretrained(data), 1), apart(pretrained(data), 2))


def turn(method: SIDA, number: int, batch: Batch) -> dict[str, list[Tensor | None]]:
    """Gradients of all parameters of all nets after this turn."""
    nets = {name: net for name, net in vars(method).items() if isinstance(net, nn.Module)} | method.nets
    for net in nets.values():
        net.zero_grad(set_to_none=True)
    method.turns[number].loss(batch)[0].backward()
    return {name: [p.grad for p in net.parameters()] for name, net in nets.items()}


@pytest.mark.parametrize(("settings", "label_dim"), [({}, 0), ({"alpha": 1.2, "gan_share": 0.3}, 4), ({"distance": "huber"}, 0)])
@default_dtype(torch.float64)
def test_student_gradient_by_hand(settings, label_dim):
    data = Mixture(label_dim)
    method, settings = midway(data, **settings), {"alpha": 1.0, "gan_share": 0.5, "distance": "l2"} | settings
    found = turn(method, 2, batch_of(data))["student"]

    d, student, fake = draws(16), method.nets["student"], method.nets["fake"]
    labels = nn.functional.one_hot(d.integers(0, 3), 4).double() if label_dim else None
    x = student(2.5 * d.normal(2, 1, 1), torch.full((16,), 2.5), labels)
    root = 0.002 ** (1 / 7) + 0.8 * d.uniform() * (80 ** (1 / 7) - 0.002 ** (1 / 7))
    sigma = root**7
    x_t = x + image(sigma) * d.normal(2, 1, 1)
    R, F = data(x_t, sigma, labels), fake(x_t, sigma, labels)
    delta = R - F
    if settings["distance"] == "huber":
        w = torch.ones(16)
        implicit = ((delta / (delta.square().sum((1, 2, 3), keepdim=True) + method.c**2).sqrt()) * (F - x)).sum((1, 2, 3))
    else:
        w = 1 / (x - R).abs().mean((1, 2, 3)).detach()
        implicit = w * (delta * ((R - x) - settings["alpha"] * delta)).sum((1, 2, 3))
    g = nn.functional.softplus(-fake.features(x_t, sigma, labels).mean(1)).mean()
    b = settings["gan_share"]
    loss = (1 - b) * 100 * implicit.mean() + b * 0.01 * 2 * (w * g).mean()
    wanted = torch.autograd.grad(loss, list(student.parameters()))
    torch.testing.assert_close(found, list(wanted), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("label_dim", [0, 4])
@default_dtype(torch.float64)
def test_fake_gradient_by_hand(label_dim):
    data = Mixture(label_dim)
    method, batch = midway(data, gan_fake=3.0), batch_of(data)
    found = turn(method, 0, batch)["fake"]

    d, student, fake = draws(16), method.nets["student"], method.nets["fake"]
    x = student(2.5 * d.normal(2, 1, 1), torch.full((16,), 2.5), batch.labels).detach()
    sigma = (-1.2 + 1.2 * d.normal()).exp()
    noise, weight = image(sigma) * d.normal(2, 1, 1), (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    own = (weight * (fake(x + noise, sigma, batch.labels) - x).square().sum((1, 2, 3))).mean()
    of_fake, of_real = (fake.features(one + noise, sigma, batch.labels).mean(1) for one in (x, batch.images))
    told = (nn.functional.softplus(of_fake).mean() + nn.functional.softplus(-of_real).mean()) / 2
    wanted = torch.autograd.grad(own + 3 * weight.mean() * told, list(fake.parameters()))
    torch.testing.assert_close(found, list(wanted), rtol=1e-8, atol=1e-10)


class Half(OneRank):
    """One of two ranks that have these samples."""

    count = 2

    def __init__(self, a: Tensor, b: Tensor):
        self.of_all = torch.stack([a.mean(), b.mean()]).detach()

    def average(self, tensors) -> None:
        tensors[0].copy_(self.of_all)


@default_dtype(torch.float64)
def test_what_weighs_the_gan_is_a_mean_over_all_ranks():
    """Two ranks' gradients of mean(a) mean(b), averaged, are those of one with all samples; apart they are of each half."""
    method, a, b = sida(Mixture()), torch.rand(8, requires_grad=True), torch.rand(8, requires_grad=True)
    wanted = torch.autograd.grad(a.mean() * b.mean(), [a, b])
    halves = [slice(0, 4), slice(4, 8)]
    method.ranks, method.together = Half(a, b), True
    shares = [method.product_of_means(a[n], b[n]) for n in halves]
    torch.testing.assert_close(torch.autograd.grad(sum(shares) / 2, [a, b]), wanted)
    torch.testing.assert_close(sum(shares) / 2, a.mean() * b.mean())
    method.together = False
    torch.testing.assert_close(method.product_of_means(a[:4], b[:4]), a[:4].mean() * b[:4].mean())


def test_each_turn_reaches_its_own_net():
    method = sida(Mixture())
    assert [turn.trains for turn in method.turns] == ["fake", "student", "student"]
    for number, wanted in enumerate(("fake", "student", "student")):
        assert reached(turn(method, number, batch_of(Mixture()))) == {wanted}


def test_logits_beyond_the_clamp_have_no_gradient():
    """The GAN's share alone, with an encoder whose logits are all beyond ±10: nothing moves."""
    method = midway(Mixture(), gan_share=1.0)
    assert largest(turn(method, 2, batch_of(Mixture()))["student"]) > 0
    with torch.no_grad():
        for layer in method.fake.model.enc.values():
            layer.linear.weight.mul_(30)
            layer.linear.bias.add_(100)
    assert largest(turn(method, 2, batch_of(Mixture()))["student"]) == 0


def test_a_sample_that_is_not_finite_counts_for_nothing():
    method = midway(Mixture())
    x = method.generate(method.student, draws(16), None).detach()
    x[3] = torch.nan
    x.requires_grad_()
    method.generate = lambda *given, **more: x
    loss, logs = method.turns[2].loss(batch_of(Mixture()))
    (gradient,) = torch.autograd.grad(loss, x)
    assert logs["nonfinite"] == 1
    assert loss.isfinite()
    assert gradient[[i for i in range(16) if i != 3]].isfinite().all()


@pytest.mark.parametrize(("settings", "label_dim", "iterations"), [({}, 0, 250), ({"distance": "huber"}, 0, 250), ({"alpha": 1.2}, 4, 700)])
def test_learns(settings, label_dim, iterations):
    data = Mixture(label_dim)
    before, after = learn(sida(data, student_after=1.0, gan_after=3.0, gan_fake=0.01, **settings), data, iterations)
    assert after < before / 10, f"energy distance {before:.4f} -> {after:.4f}"


def test_the_gan_alone_learns():
    """Of a data-free loss nothing is left at b = 1, and the student still comes nearer: the logits know the data."""
    data = Mixture()
    cfg = {"student_after": 1.0, "gan_after": 1.0, "gan_share": 1.0, "gan_student": 100.0, "gan_fake": 1.0}
    before, after = learn(sida(data, **cfg), data, 300)
    assert after < before, f"energy distance {before:.4f} -> {after:.4f}"


# The order of the turns.


def moves(method: SIDA, steps: int, **settings) -> tuple[Run, list[str]]:
    """A run, and what was logged of each iteration: F the fake net's turn, s L_sid's, g with the GAN."""
    optim = OptimConfig(lr=1e-3)
    run = Run(method, TrainConfig(kimg=1, batch=16, optim={"student": optim}, **settings), 0, torch.device("cpu"))
    told = []
    for step in range(steps):
        run.take(*Mixture().sample_data(16, torch.Generator().manual_seed(step)))
        read = run.meter.read()
        told.append("F" * ("fake/denoise" in read) + ("g" if "student/gan" in read else "s" if "student/implicit" in read else ""))
    return run, told


def test_the_student_begins_and_the_gan_joins_after_so_many_images():
    """As released: to 100k images seen before the iteration nothing, to 200k L_sid alone; here 32 and 64, both bounds included."""
    method = sida(Mixture(), student_after=0.032, gan_after=0.064)
    assert moves(method, 7)[1] == ["F", "F", "F", "Fs", "Fs", "Fg", "Fg"]
    assert moves(sida(Mixture(), student_after=0.0, gan_after=0.0), 2)[1] == ["Fg", "Fg"]
    assert moves(sida(Mixture(), student_after=0.0, gan_after=0.016), 3)[1] == ["Fs", "Fs", "Fg"]
    several = moves(sida(Mixture(), student_after=0.016, gan_after=0.064, fake_per_student=2), 8)[1]
    assert several == ["F", "F", "Fs", "F", "Fs", "F", "Fg", "F"]


@pytest.mark.parametrize("optimizer", ["torch", "adam_ema"])
def test_the_average_follows_through_all_parts_of_a_run(optimizer):
    """In iterations without the student's turn it stays, and AdamEMA averages in those with one; the same numbers."""
    run, _ = moves(sida(Mixture(), student_after=0.032, gan_after=0.064), 7, optimizer=optimizer, ema_kimg=0.05, ema_ramp_up=1.0)
    assert (run.averaging_optimizer is not None) == (optimizer == "adam_ema")
    other, _ = moves(sida(Mixture(), student_after=0.032, gan_after=0.064), 7, optimizer="torch", ema_kimg=0.05, ema_ramp_up=1.0)
    for a, b in zip(run.ema.net.parameters(), other.ema.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_run_that_went_on_is_the_run_that_did_not_stop():
    """Cut off in every part, with what a checkpoint holds: the same bits."""
    settings = {"student_after": 0.032, "gan_after": 0.064}
    whole, _ = moves(sida(Mixture(), **settings), 7)
    for cut in (2, 4, 6):
        first, _ = moves(sida(Mixture(), **settings), cut)
        second, _ = moves(sida(Mixture(), **settings), 0)
        second.load_state_dict(copy.deepcopy(first.state_dict()) | {"step": cut})
        for step in range(cut, 7):
            second.take(*Mixture().sample_data(16, torch.Generator().manual_seed(step)))
        for net in ("student", "fake"):
            for a, b in zip(whole.method.nets[net].parameters(), second.method.nets[net].parameters(), strict=True):
                assert torch.equal(a, b), (cut, net)
        for a, b in zip(whole.ema.net.parameters(), second.ema.net.parameters(), strict=True):
            assert torch.equal(a, b)


def test_turns_that_share_an_iteration_are_known():
    a, b = Turn("student", None, seen=(-1.0, 5.0)), Turn("student", None, seen=(5.0, 9.0))
    assert taken_apart([a, b])
    assert taken_apart([b, a])
    assert not taken_apart([a, b, Turn("student", None, seen=(8.0, 10.0))])
    assert not taken_apart([Turn("student", None), Turn("student", None)])
    assert not taken_apart([])
    assert [one.seen for one in lasting([a, Turn("student", None, seen=(9.0, float("inf")))])] == [(-1.0, float("inf"))]


def test_the_gradient_that_a_guard_compares_is_this_part_of_the_runs():
    method = sida(Mixture(), student_after=0.032, gan_after=0.064)
    run, _ = moves(method, 1)
    own = Share(*Mixture().sample_data(16, torch.Generator().manual_seed(0)))
    for step, number in ((1, 1), (4, 1), (5, 2), (30, 2)):
        run.step = step
        shared = run.batches.cut(own, step)[0]
        wanted = torch.autograd.grad(method.turns[number].loss(shared)[0], list(method.student.parameters()))
        torch.testing.assert_close(run.product_gradient(own), torch.cat([g.flatten() for g in wanted]))


# Nets of ours.


def tiny(seed: int = 1, precond: str = "EDMPrecond", **kwargs):
    torch.manual_seed(seed)
    shape = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    net = from_kwargs(precond, img_resolution=8, img_channels=1, dropout=0.0, **{"label_dim": 3} | shape | kwargs)
    with torch.no_grad():  # a fresh net hardly hears what it is told
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape)
    return net


NCSNPP = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
NETS = {
    "ddpmpp": {},
    "ncsnpp": NCSNPP,
    "adm": {"model_type": "DhariwalUNet", "model_channels": 32},
    "few": {"channel_mult": [1]},
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_estimate_and_features_in_one_forward_are_those_of_two(name, guidance):
    net, calls = tiny(**NETS[name]), []
    net.model.register_forward_hook(lambda *_: calls.append(1))
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.rand(4) + 0.1, torch.eye(3)[[0, 1, 2, 0]]
    estimate, features = net.estimate_and_features(x, sigma, labels, guidance=guidance)
    assert len(calls) == 1
    torch.testing.assert_close(features, net.features(x, sigma, labels))
    torch.testing.assert_close(estimate.denoised(), net.estimate(x, sigma, labels, guidance=guidance).denoised())
    assert features.dtype is torch.float32


def test_a_net_that_leaves_out_layers_shows_the_features_of_the_whole():
    net = tiny()
    names = list(blocks_of(net.model))
    light = Skipping(net, Plan("", 4, [0.002, 80.0], names, [2], 0.02, {}), lambda u: 0.002 + u)
    x, sigma = torch.randn(4, 1, 8, 8), torch.rand(4) + 0.1
    estimate, features = light.estimate_and_features(x, sigma, torch.eye(3)[[0, 1, 2, 0]])
    torch.testing.assert_close(features, net.features(x, sigma, torch.eye(3)[[0, 1, 2, 0]]))
    torch.testing.assert_close(estimate.raw, light.estimate(x, sigma, torch.eye(3)[[0, 1, 2, 0]]).raw)


def test_no_parameter_is_added():
    net = tiny()
    method = SIDAConfig().build(net, net)
    assert {name: p.shape for name, p in method.fake.named_parameters()} == {name: p.shape for name, p in net.named_parameters()}
    assert set(method.nets) == {"student", "fake"}


# Clipping number by number.


@pytest.mark.parametrize("implementation", ["torch", "adam_ema"])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_clip_value_is_torchs(implementation, clip):
    torch.manual_seed(0)
    start, grads = [torch.randn(5, 3), torch.randn(3)], [3 * torch.randn(5, 3), 3 * torch.randn(3)]
    grads[0][0, 0] = torch.inf
    wanted = [nn.Parameter(p.clone()) for p in start]
    optimizer = torch.optim.Adam(wanted, lr=0.1, eps=1.0)  # far from sign(g), so that its size shows
    net = nn.ParameterList([p.clone() for p in start])
    one = Trained(net, ALONE)
    one.give_optimizer(OptimConfig(lr=0.1, eps=1.0, clip=clip, clip_value=0.5), implementation, None)
    for params in (wanted, list(net)):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
    nn.utils.clip_grad_value_(wanted, 0.5)
    if clip:
        nn.utils.clip_grad_norm_(wanted, clip)
    optimizer.step()
    assert one.step().isinf()  # what the log says is from before
    torch.testing.assert_close(list(net), wanted)


# Students that go on: SiD²A.


def test_the_student_of_a_run_goes_on_and_all_else_begins_anew(tmp_path):
    """θ and its average are the earlier average, ψ the teacher; from the run's folder, or from its weight file."""
    recipe, small = "digits_sid", [*TINY, "device=cpu", "log.tensorboard=false"]
    train.main([recipe, f"run_dir={tmp_path}/sid", *small, "train.optim.student.lr=0.05"])
    teacher, still = f"teacher.checkpoint={tmp_path}/sid/teacher.safetensors", "train.optim.student.lr=1e-12"
    before = load_newest(tmp_path / "sid/checkpoints", "cpu")
    for start in ("sid", "sid/student.safetensors"):
        folder = tmp_path / start.replace("/", "-") / "next"
        more = ["method.student_after=0", "method.gan_after=0", "train.optim.fake.lr=1e-12"]
        train.main(["digits_sida", f"run_dir={folder}", *small, teacher, f"students.start={tmp_path}/{start}", still, *more])
        after = load_newest(folder / "checkpoints", "cpu")
        whole, _ = read_tensors(tmp_path / "sid/teacher.safetensors")
        for name, value in before["ema"].items():
            torch.testing.assert_close(after["nets"]["student"][name], value, rtol=0, atol=1e-8)
            torch.testing.assert_close(after["ema"][name], value, rtol=0, atol=1e-8)
            torch.testing.assert_close(after["nets"]["fake"][name], whole[name], rtol=0, atol=1e-8)
        assert any((before["ema"][name] - before["nets"]["student"][name]).abs().max() > 1e-3 for name in before["ema"])
    with pytest.raises(UserError, match=r"students.start wants the folder of a run with this method, whose nets all go on, got the file"):
        train.main(["digits_sid", f"run_dir={tmp_path}/no", *small, teacher, f"students.start={tmp_path}/sid/student.safetensors"])
    wide = [one for one in small if "model_channels" not in one] + ["net.model_channels=16"]
    with pytest.raises(UserError, match=r"students.start: net 'student' in .* is of another shape"):
        train.main(["digits_sida", f"run_dir={tmp_path}/wide", *wide, f"students.start={tmp_path}/sid", "method.student_after=0"])


def given_start(tmp_path, *more: str) -> None:
    small = [*TINY, "device=cpu", "log.tensorboard=false", f"run_dir={tmp_path}/run"]
    train.main(["digits_sida", *small, "method.student_after=0", "method.gan_after=0", *more])


def test_a_run_that_ends_before_the_student_begins_is_refused(tmp_path):
    """96 images; the student's first turn would be in the iteration that 96 come before, or 80, the last."""
    with pytest.raises(UserError, match=r"train.kimg = 0.1 is over before the student begins to learn, 0.08 thousand images later"):
        given_start(tmp_path, "method.student_after=0.08", "method.gan_after=0.08", "--dry-run")
    given_start(tmp_path, "method.student_after=0.079", "method.gan_after=0.08", "--dry-run")


def test_no_name_is_no_start(tmp_path):
    with pytest.raises(UserError, match=r"students.start wants a run or a weight file, or null for none"):
        given_start(tmp_path, "students.start=")


def test_every_student_is_looked_for_before_any_is_trained(tmp_path):
    """Of an earlier run with fewer students the last ones are not there."""
    (tmp_path / "two/student-0/checkpoints").mkdir(parents=True)
    (tmp_path / "two/student-0/checkpoints/00000001.pt").touch()
    with pytest.raises(UserError, match=r"students.start: no checkpoint in .*/two/student-1/checkpoints"):
        given_start(tmp_path, "students.count=2", f"students.start={tmp_path}/two")


def test_a_weight_file_that_is_not_there_is_called_one(tmp_path):
    with pytest.raises(UserError, match=r"students.start: no weight file at .*no.safetensors\. "):
        given_start(tmp_path, f"students.start={tmp_path}/no.safetensors")


def test_a_weight_file_of_another_preconditioning_is_refused(tmp_path):
    """The same names and shapes, and another net."""
    save_net(tmp_path / "vp.safetensors", tiny(precond="VPPrecond"), method="sim")
    method = SIDAConfig().build(tiny(), tiny())
    with pytest.raises(UserError, match=r"students.start: the net in .* is preconditioned by VPPrecond .*, the teacher by EDMPrecond"):
        earlier_weights(method, tmp_path / "vp.safetensors")
    save_net(tmp_path / "edm.safetensors", tiny(), method="sim")
    assert set(earlier_weights(method, tmp_path / "edm.safetensors")) == {"student"}
    save_net(tmp_path / "teacher.safetensors", tiny())
    with pytest.raises(UserError, match=r"students.start=.* holds a teacher, wanted a student's"):
        earlier_weights(method, tmp_path / "teacher.safetensors")


def test_a_run_that_has_begun_wants_nothing_of_the_earlier_one(tmp_path):
    """The earlier run may be gone: what it gave is in the checkpoints."""
    save_net(tmp_path / "sid.safetensors", tiny(label_dim=10), method="sim")
    weights = tmp_path / "sid.safetensors"
    teacher = tmp_path / "teacher.safetensors"
    save_net(teacher, tiny(2, label_dim=10))
    more = [f"students.start={weights}", f"teacher.checkpoint={teacher}", "train.checkpoint_kimg=0.032"]
    given_start(tmp_path, *more)
    (tmp_path / "run/student.safetensors").unlink()
    weights.unlink()
    given_start(tmp_path, *more)
    with pytest.raises(UserError, match="no weight file at"):
        given_start(tmp_path, *more, f"run_dir={tmp_path}/other")


def test_students_of_another_partition_do_not_go_on(tmp_path):
    first, second = Partition("blocks", (0, 0, 1)), Partition("random", (0, 1, 0))
    save_net(tmp_path / "student.safetensors", tiny(), method="sim", partition=first.hash, student=0)
    check_same_part(tmp_path, first)
    with pytest.raises(UserError, match=r"another partition .* students.partition=random"):
        check_same_part(tmp_path, second)


@pytest.mark.parametrize("config", [SIDAConfig, SIMConfig, partial(DMDConfig, steps=[500])])
def test_a_fake_net_has_no_guide(config):
    """A teacher without classes can be led away from a worse net; its copies are led by nothing."""
    teacher = tiny(label_dim=0)
    teacher.guide = Guide(tiny(2, label_dim=0))
    assert isinstance(config(guidance=2.0).build(teacher, teacher), Method)
    with pytest.raises(UserError, match=r"method.fake_guidance = 2.0 wants a teacher that knows classes .* one: set it to 1$"):
        config(fake_guidance=2.0).build(teacher, teacher)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"distance": "l1"}, "distance wants one of huber, l2, got 'l1'"),
        ({"distance": "huber", "alpha": 1.2}, "alpha wants to be 1 with method.distance=huber"),
        ({"gan_share": 1.5}, "gan_share wants a share in [0, 1], got 1.5"),
        ({"gan_after": 50.0}, "gan_after wants at least student_after = 100.0, got 50.0"),
        ({"student_after": -1.0}, "student_after wants at least 0, got -1.0"),
        ({"gan_fake": -1.0}, "gan_fake wants at least 0, got -1.0"),
        ({"guidance": 2.0}, "wants a teacher that knows classes or prompts"),
        ({"steps": [3, 5]}, "steps wants whole numbers"),
    ],
)
def test_bad_settings_are_refused(settings, wanted):
    with pytest.raises(UserError, match=r"^[^\n]*$") as refused:
        sida(Mixture(), **settings)
    assert wanted in str(refused.value)


def test_bad_clip_values_are_refused():
    with pytest.raises(UserError, match=r"clip_value wants more than 0, got 0"):
        OptimConfig(clip_value=0.0)
