"""SiDA: the released code's numbers, the gradients by hand, who receives one, the order of the turns, and that it learns."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from potstill.engine.methods.base import Batch
from potstill.engine.methods.sida import SIDA, SIDAConfig
from potstill.engine.nets.edm import from_kwargs

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
        self.method.generate = lambda net, draws, labels: self.x if torch.is_grad_enabled() else self.x.detach()

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
