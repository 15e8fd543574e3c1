"""LoRA: one copy of the weights for all nets, adapters that alone train and are saved, and the formula by hand."""

import copy
import multiprocessing
import os
import re
import socket

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from toy import Mixture, ToyNet, batch_of, default_dtype, gradients, reached

peft = pytest.importorskip("peft")

from potstill.engine.common.errors import UserError  # noqa: E402
from potstill.engine.methods.base import copied, frozen, modules_of  # noqa: E402
from potstill.engine.methods.dmd import DMD, DMDConfig  # noqa: E402
from potstill.engine.methods.moment_matching import MomentMatchingConfig  # noqa: E402
from potstill.engine.methods.sim import SIM, SIMConfig  # noqa: E402
from potstill.engine.nets.edm import from_kwargs  # noqa: E402
from potstill.engine.nets.lora import LoraConfig, base_weights, check_lora, merged, note_of_rank, with_adapters  # noqa: E402
from potstill.engine.training import memory  # noqa: E402
from potstill.engine.training.optim import OptimConfig  # noqa: E402
from potstill.engine.training.ranks import ALONE, Ranks, meet  # noqa: E402
from potstill.engine.training.run import Run, TrainConfig  # noqa: E402

CPU = torch.device("cpu")
LINEAR = LoraConfig(rank=4, alpha=12, targets=["linear"])  # of ToyNet's hidden layers
METHODS = {"sim": (SIM, SIMConfig()), "dmd": (DMD, DMDConfig(fake_per_student=2, gan=True))}


def toy(seed: int = 0) -> ToyNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ToyNet().eval()
    net.lora_of_copies = LINEAR
    return net


def method_of(name: str, teacher, seed: int = 0):
    """Of a teacher whose copies have adapters; theirs are drawn, B too, so that fake and student are not their teacher."""
    kind, cfg = METHODS[name]
    torch.manual_seed(seed)
    method = kind(cfg, teacher, student=copied(teacher), fake=copied(teacher, "fake"))
    with torch.no_grad():
        for net in method.nets.values():
            for name, p in net.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.05)
    return method


def run_of(method, steps: int = 20, ranks: Ranks = ALONE) -> Run:
    cfg = TrainConfig(kimg=steps * 16 / 1000, batch=16, optim={"student": OptimConfig(lr=1e-2)})
    return Run(method, cfg, 0, CPU, ranks=ranks)


def takes(run: Run, steps: int) -> None:
    for _ in range(steps):
        run.take(batch_of(Mixture(), seed=run.step).images[run.batches.window], None)


def state_of(run: Run) -> dict:
    return copy.deepcopy(run.state_dict() | {"step": run.step})


def where(net: nn.Module) -> set[int]:
    """Addresses of a denoiser's weights that are no adapters; a GAN's head has its own."""
    return {p.data_ptr() for name, p in net.named_parameters() if "lora_" not in name and not name.startswith("head.")}


@pytest.mark.parametrize("name", METHODS)
def test_all_nets_share_the_teachers_weights_which_stay(name):
    teacher = toy()
    before = {key: t.clone() for key, t in teacher.state_dict().items()}
    method = method_of(name, teacher)
    run = run_of(method)
    for net in [*modules_of(method), run.ema.net]:
        assert where(net) == where(teacher)
    adapters = {key: t.clone() for key, t in run.state_dict()["nets"]["student"].items()}
    average = {key: t.clone() for key, t in run.state_dict()["ema"].items()}
    takes(run, 5)
    for key, t in teacher.state_dict().items():
        assert torch.equal(t, before[key])
    for state in (run.state_dict()["nets"]["student"], run.state_dict()["ema"]):
        assert all("lora_" in key for key in state)
    assert not any(torch.equal(t, run.state_dict()["nets"]["student"][key]) for key, t in adapters.items())
    assert not any(torch.equal(t, run.state_dict()["ema"][key]) for key, t in average.items())
    assert all(p.requires_grad for p in teacher.parameters())  # another net's business


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_are_shared_get_no_gradient(name):
    teacher = toy()
    method = method_of(name, teacher)
    for turn in method.turns:
        found = gradients(method, turn.trains, batch_of(Mixture()))
        assert reached(found) & method.nets.keys() == {turn.trains}
        names = [key for key, _ in method.nets[turn.trains].named_parameters()]
        with_gradient = {key for key, g in zip(names, found[turn.trains], strict=True) if g is not None}
        assert with_gradient == {key for key in names if "lora_" in key or key.startswith("head.")}


def test_a_copy_starts_as_its_teacher():
    """Bit for bit, as the methods see it (`frozen`: PyTorch multiplies otherwise with weights that want a gradient)."""
    teacher = toy()
    batch = batch_of(Mixture())
    sigma = torch.linspace(0.1, 5, len(batch.images))
    assert torch.equal(copied(teacher)(batch.images, sigma), frozen(teacher)(batch.images, sigma))


class Adapted(nn.Module):
    """W + alpha/rank · B A, written by hand."""

    def __init__(self, A: torch.Tensor, B: torch.Tensor, scale: float):
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A.clone()), nn.Parameter(B.clone()), scale

    def forward(self, W: torch.Tensor) -> torch.Tensor:
        return W + self.scale * self.B @ self.A


def by_hand(teacher: ToyNet, net) -> ToyNet:
    """The teacher with the adapters of `net` as a parametrisation of PyTorch's."""
    net, peers = net if isinstance(net, ToyNet) else net.denoiser, frozen(teacher)
    for name, layer in net.named_modules():
        if hasattr(layer, "lora_A"):
            A, B = (one["default"].weight.detach() for one in (layer.lora_A, layer.lora_B))
            parametrize.register_parametrization(peers.get_submodule(name), "weight", Adapted(A, B, 12 / 4))
    return peers


@default_dtype(torch.float64)
def test_three_steps_equal_the_formula():
    """In float64, both turns of SIM."""
    teacher = toy()
    method = method_of("sim", teacher)
    assert {p.dtype for p in method.student.parameters()} == {torch.float64}
    peer = SIM(SIMConfig(), teacher, student=by_hand(teacher, method.student), fake=by_hand(teacher, method.fake))
    runs = run_of(method), run_of(peer)
    for run in runs:
        takes(run, 3)
    for role in ("student", "fake"):
        ours = [p for p in method.nets[role].parameters() if p.requires_grad]
        theirs = [p for p in peer.nets[role].parameters() if p.requires_grad]
        assert len(ours) == len(theirs) == 6
        for a, b in zip(sorted(ours, key=torch.norm), sorted(theirs, key=torch.norm), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_merged_is_the_same_net_without_adapters():
    net = method_of("sim", toy()).student
    teacher = {key: t.clone() for key, t in base_weights(net).items()}
    whole, batch = merged(net), batch_of(Mixture())
    assert whole.state_dict().keys() == teacher.keys()
    torch.testing.assert_close(whole(batch.images, torch.tensor(1.0)), net(batch.images, torch.tensor(1.0)), rtol=1e-5, atol=1e-5)
    weight = "model.enc.2x2_block1.linear.weight"
    layer = net.model.enc["2x2_block1"].linear
    wanted = teacher[weight] + 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(whole.state_dict()[weight], wanted)
    assert all(torch.equal(t, teacher[key]) for key, t in base_weights(net).items())  # it was no merging in place


@pytest.mark.parametrize("name", METHODS)
def test_resuming_is_exact(name):
    whole, first = (run_of(method_of(name, toy())) for _ in range(2))
    takes(whole, 6)
    takes(first, 3)
    second = run_of(method_of(name, toy(), seed=1))
    second.load_state_dict(state_of(first))
    takes(second, 3)
    ours, theirs = second.state_dict(), whole.state_dict()
    for kind in ("nets", "ema"):
        torch.testing.assert_close(ours[kind], theirs[kind], rtol=0, atol=0)


def test_a_state_of_other_weights_never_reaches_the_shared_ones():
    teacher = toy()
    net, before = copied(teacher), copy.deepcopy(teacher.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        net.load_state_dict({name: torch.zeros_like(t) for name, t in teacher.state_dict().items()})
    net.load_state_dict({f"{name}": torch.zeros_like(p) for name, p in net.named_parameters()})
    assert all(torch.equal(t, before[key]) for key, t in teacher.state_dict().items())


def one_of_two(rank: int, port: int, out: str) -> None:
    """A process of two; each draws adapters of its own, and those of the first are everybody's."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    ranks = meet()
    ranks.connect(CPU)
    run = run_of(method_of("sim", toy(), seed=rank), ranks=ranks)
    takes(run, 3)
    torch.save(run.state_dict()["nets"], f"{out}/{rank}.pt")
    ranks.close()


@pytest.mark.parallel
def test_two_ranks_do_what_one_does(tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    both = [context.Process(target=one_of_two, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for one in both:
        one.start()
    run = run_of(method_of("sim", toy()))
    takes(run, 3)
    for rank, one in enumerate(both):
        one.join(300)
        assert one.exitcode == 0
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), run.state_dict()["nets"], rtol=1e-5, atol=1e-6)


def storages(*nets: nn.Module) -> int:
    """Bytes of all distinct memory that parameters and buffers of these nets lie in."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for net in nets for t in (*net.parameters(), *net.buffers())}
    return sum(found.values())


def test_weights_are_held_once(monkeypatch):
    """Bytes: the teacher's, and of student, fake and average the adapters alone; and so a run says before it begins."""
    teacher = toy()
    base = storages(teacher)
    method = method_of("sim", teacher)
    run = run_of(method)
    adapters = sum(t.nbytes for t in method.student.state_dict().values())
    assert storages(teacher, *modules_of(method), run.ema.net) == base + 3 * adapters
    takes(run, 1)
    moments = sum(t.nbytes for one in run.trained.values() for s in one.optimizer.state.values() for t in s.values() if t.ndim)
    assert moments == 2 * 2 * adapters
    monkeypatch.setattr(memory, "gib", str)
    total = sum(int(re.search(r": (\d+) GiB", line)[1]) for line in memory.estimate(run))
    assert total == sum(p.nbytes for p in teacher.parameters()) + adapters * (3 + 2 + 4)  # gradients and moments of two nets


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"rank": -1}, "rank wants at least 0"),
        ({"rank": 4, "alpha": 0.0}, "alpha wants more than 0"),
        ({"rank": 4, "targets": []}, "targets wants a list of ends of names, or null"),
        ({"rank": 4, "dropout": 1.0}, "dropout wants a probability"),
        ({"rank": 4, "of": ["teacher"]}, "of wants some of student, fake"),
    ],
)
def test_settings_that_no_run_can_use(settings, wanted):
    with pytest.raises(UserError, match=wanted):
        LoraConfig(**settings)


def test_a_rank_that_no_layer_can_have_is_named():
    """A convolution of 3 x 3 x 2 inputs and 20 outputs is a matrix of rank 18 at most, a linear layer of 4 to 30 one of 4."""
    model = nn.ModuleDict({"a": nn.Conv2d(2, 20, 3), "b": nn.Linear(4, 30), "c": nn.Linear(99, 99)})
    note = note_of_rank(model, LoraConfig(rank=19, targets=["a", "b"]))
    assert note == "note: lora.rank=19 is more than the rank of any layer that gets an adapter, at most 18: lora.rank=18 can do the same"
    assert note_of_rank(model, LoraConfig(rank=18, targets=["a", "b"])) == ""


def test_who_has_adapters():
    teacher = toy()
    teacher.lora_of_copies = LoraConfig(rank=4, targets=["linear"], of=["fake"])
    assert all(p.requires_grad for p in copied(teacher).parameters())
    assert copied(teacher, "fake").adapters == LoraConfig(rank=4, alpha=4, targets=["linear"], of=["fake"])
    for cfg in (SIMConfig(), DMDConfig(), MomentMatchingConfig()):
        nets = cfg.build(teacher, teacher).nets
        fake = getattr(nets["fake"], "denoiser", nets["fake"])
        assert fake.adapters is not None and getattr(nets["student"], "adapters", None) is None
    teacher.lora_of_copies = LoraConfig(rank=0)
    assert all(p.requires_grad for p in copied(teacher, "fake").parameters())
    assert LoraConfig().unused() and not LINEAR.unused()


def test_dropout_is_the_trained_nets_alone():
    teacher = toy()
    teacher.lora_of_copies = LoraConfig(rank=4, targets=["linear"], dropout=0.5)
    method = method_of("sim", teacher)
    batch = batch_of(Mixture())
    student, view = method.student.train(), method.frozen_student
    with torch.no_grad():
        first, second = (student(batch.images, torch.tensor(1.0)) for _ in range(2))
        assert not torch.equal(first, second)
        assert torch.equal(*(view(batch.images, torch.tensor(1.0)) for _ in range(2)))


def test_errors():
    edm = from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, model_type="SongUNet", model_channels=8, num_blocks=1)
    with pytest.raises(UserError, match="no projections of attention that peft can adapt in SongUNet: wanted a net of diffusers"):
        with_adapters(edm, LoraConfig(rank=4))
    with pytest.raises(
        UserError, match=r"no layer 'to_x' that peft can adapt in MLP: wanted lora\.targets of its own, such as linear, out"
    ):
        with_adapters(toy(), LoraConfig(rank=4, targets=["linear", "to_x"]))
    with pytest.raises(UserError, match=r"train\.parallel=fsdp cannot be had with lora\.rank=4.*use train\.parallel=ddp"):
        check_lora(LINEAR, "fsdp")
    check_lora(LINEAR, "ddp")
    check_lora(LoraConfig(), "fsdp")
