"""potstill convert edm of EDM2's files: the same net to the last bit, its encoder's constants beside it, nothing executed.

The pickles are made as in tests/test_convert_edm.py, in the layout of EDM2's snapshots (training_loop.py of its code).
"""

import copy
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_convert_edm import _Persistent, assert_same, converted, dumped, nvidia, persistent, pickle_recursion, refused, teacher
from torch import nn

from potstill.engine import convert
from potstill.engine.common.errors import UserError
from potstill.engine.formats.edm2_pickle import encoder_in, named_averages
from potstill.engine.formats.edm2_snapshots import images_at, snapshots_in
from potstill.engine.models.weights import load_net
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.edm2_layers import MPBlock
from potstill.engine.readers.pickles import Unreadable
from potstill.engine.readers.torch_pickles import Persistent
from potstill.engine.training.phema import gamma_of

__all__ = ["nvidia"]  # a fixture: nothing in a file is executed

GOLDEN = sorted((Path(__file__).parent / "golden/edm2").glob("*cond.safetensors"))
TINY = {
    "img_resolution": 8, "img_channels": 4, "label_dim": 3, "model_channels": 4, "channel_mult": [1, 2], "num_blocks": 1,
    "attn_resolutions": [4], "channels_per_head": 4, "logvar_channels": 6, "use_fp16": False,
}  # fmt: skip


def tiny2(**changes):
    net = from_kwargs("EDM2Precond", **TINY | changes).eval()
    with torch.no_grad():
        for p in net.parameters():  # so that no two tensors are alike, and all are float16's
            p.copy_((torch.randn_like(p) * 0.1).half())
        for b in net.buffers():
            b.copy_(b.half())
    return net


class StabilityVAEEncoder(_Persistent):
    def __init__(self, **kwargs):
        self._init_args, self._init_kwargs = (), kwargs
        raw_mean, raw_std = kwargs.get("raw_mean", [5.81, 3.25, 0.12, -2.15]), kwargs.get("raw_std", [4.17, 4.62, 3.71, 3.28])
        self.scale = np.float32(0.5) / np.float32(raw_std)
        self.bias = np.float32(0) - np.float32(raw_mean) * self.scale
        self.vae_name, self.batch_size, self._vae = "stabilityai/sd-vae-ft-mse", 8, None


class StandardRGBEncoder(_Persistent):
    def __init__(self):
        self._init_args, self._init_kwargs = (), {}


class EDM2Loss(_Persistent):
    def __init__(self):
        self.P_mean, self.P_std, self.sigma_data = -0.4, 1.0, np.float64(0.5)


def titled(module, name):
    """What EDM2 calls a layer of ours."""
    return {"EDM2UNet": "UNet", "MPBlock": "Block"}.get(type(module).__name__, type(module).__name__)


def network2(net, **attributes):
    """As EDM2's code keeps it: gains without a size, a block's constants among its attributes, all numbers float16."""
    kwargs = copy.deepcopy(net.kwargs)
    made = persistent(net, "Precond", **{"_init_kwargs": kwargs, "sigma_data": 0.5} | attributes)
    for (_, theirs), (_, ours) in zip(made.named_modules(), net.named_modules(), strict=True):
        if "title" in vars(theirs):
            theirs.title = "Precond" if ours is net else titled(ours, "")
        for name, p in theirs._parameters.items():
            value = p.detach().half()
            theirs._parameters[name] = nn.Parameter(value.reshape(()) if name.endswith("gain") else value.clone(), requires_grad=False)
        theirs._buffers.update({name: b.half() for name, b in theirs._buffers.items()})
        if isinstance(ours, MPBlock):
            style = ours.style
            vars(theirs).update(res_balance=style.res_balance, attn_balance=style.attn_balance, clip_act=style.clip_act, flavor="enc")
            vars(theirs).update(resample_filter=[1, 1], num_heads=ours.heads)
    return made


def snapshot2(net, encoder=None, **attributes):
    """What EDM2's training loop dumps."""
    easy = sys.modules["dnnlib.util"].EasyDict
    data = easy(class_name="training.dataset.ImageFolderDataset", path="img512-sd.zip", use_labels=True)
    encoder = StabilityVAEEncoder() if encoder is None else encoder
    return easy(encoder=encoder, dataset_kwargs=data, loss_fn=EDM2Loss(), ema=network2(net, **attributes))


# Right


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda p: p.stem)
def test_golden_nets_come_back_to_float16(golden, tmp_path, capsys):
    with safe_open(golden, "pt") as file:
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        meta = file.metadata()
    net = from_kwargs("EDM2Precond", **json.loads(meta["kwargs"]) | {"use_fp16": False}).eval()
    net.load_state_dict({key.removeprefix("state."): v for key, v in t.items() if key.startswith("state.")})
    net.load_state_dict({name: v.half().float() for name, v in net.state_dict().items()})
    got, metadata = converted(dumped(tmp_path / "network-snapshot-0000001-0.050.pkl", snapshot2(net)))
    assert_same(got, net)
    assert all(v.dtype == torch.float32 for v in got.state_dict().values())
    with torch.no_grad():
        x, sigma, labels = t["in.x"], t["in.sigma"], t.get("in.labels")
        assert torch.equal(got(x, sigma, labels), net(x, sigma, labels))
        scale = t["out.D"].abs().max()
        assert (got(x, sigma, labels) - t["out.D"]).abs().max() < 5e-3 * scale  # weights of 11 bits, through a dozen layers
    assert "CC BY-NC-SA" in metadata["license"] and "EDM2" in metadata["license"]
    assert "sampler" not in metadata
    assert "net 'ema' of EDM2Precond, EDM2UNet" in capsys.readouterr().out


def test_the_encoders_constants_are_kept(tmp_path):
    _, metadata = converted(dumped(tmp_path / "a.pkl", snapshot2(tiny2())))
    wanted = [0.5 / 4.17, 0.5 / 4.62, 0.5 / 3.71, 0.5 / 3.28]
    assert (metadata["encoder"]["class"], metadata["encoder"]["vae"]) == ("StabilityVAEEncoder", "stabilityai/sd-vae-ft-mse")
    np.testing.assert_allclose(metadata["encoder"]["scale"], wanted, rtol=1e-12)
    np.testing.assert_allclose(metadata["encoder"]["bias"], np.array([-5.81, -3.25, -0.12, 2.15]) * wanted, rtol=1e-12)
    other = StabilityVAEEncoder(raw_std=[1.0, 2.0, 4.0, 8.0])
    _, metadata = converted(dumped(tmp_path / "a.pkl", snapshot2(tiny2(), other)))
    assert metadata["encoder"]["scale"] == [0.5, 0.25, 0.125, 0.0625]
    _, metadata = converted(dumped(tmp_path / "a.pkl", snapshot2(tiny2(img_channels=3), StandardRGBEncoder())))
    assert metadata["encoder"] == {"class": "StandardRGBEncoder"}
    _, metadata = converted(dumped(tmp_path / "a.pkl", {"ema": network2(tiny2())}))
    assert "encoder" not in metadata


def test_arguments_that_a_snapshot_leaves_out_are_edm2s(tmp_path):
    kwargs = {name: value for name, value in TINY.items() if name != "use_fp16"}
    kwargs |= {"channel_mult_noise": None, "channel_mult_emb": None, "clip_act": 256, "resample_filter": [1, 1], "res_balance": 0.3}
    got, _ = converted(dumped(tmp_path / "a.pkl", snapshot2(tiny2(), _init_kwargs=kwargs)))
    assert got.kwargs["use_fp16"] is True and got.kwargs["channel_mult_emb"] is None
    assert got.compute_dtype == torch.bfloat16
    net = tiny2(clip_act=None, channel_mult_noise=2, channel_mult_emb=3, resample_filter=[1, 3, 3, 1], label_dim=0)
    got, _ = converted(dumped(tmp_path / "b.pkl", snapshot2(net)))
    assert_same(got, net)


def test_a_generator_of_edm2s_can_be_declared(tmp_path):
    _, metadata = converted(dumped(tmp_path / "sida.pkl", {"ema": network2(tiny2())}), "--one-step", "2.5")
    assert metadata["sampler"]["sigmas"] == [2.5]


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_training_states_hold_a_net_and_several_averages(new, tmp_path):
    """As EDM2's checkpoints: torch.save of state dictionaries, of the averages a list."""
    net, narrow, wide = (tiny2() for _ in range(3))
    easy = sys.modules["dnnlib.util"].EasyDict
    content = {
        "state": easy(cur_nimg=8192, total_elapsed_time=1.5), "net": net.state_dict(), "loss_fn": {"P_mean": -0.4},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"params": [0], "lr": 1e-2}]},
        "ema": {"stds": [0.05, 0.1], "emas": [narrow.state_dict(), wide.state_dict()]},
    }  # fmt: skip
    path = tmp_path / "training-state-0000008.pt"
    torch.save(content, path, _use_new_zipfile_serialization=new)
    like = teacher(tmp_path, net)
    assert "holds several nets: ema.0.050, ema.0.100, net; choose one with --net" in refused(path, *like)
    assert_same(converted(path, "--net", "ema.0.100", *like)[0], wide)
    assert_same(converted(path, "--net", "ema.0.050", *like)[0], narrow)
    assert_same(converted(path, "--net", "net", *like)[0], net)
    assert "does not say of which net: add --like" in refused(path, "--net", "net")


@pytest.mark.parametrize("prefix", ["", "module.", "net.", "G_ema._orig_mod."])
def test_state_dictionaries_are_found_whatever_stands_before_their_names(prefix, tmp_path):
    net = tiny2()
    torch.save({prefix + name: t for name, t in net.state_dict().items()}, tmp_path / "a.pt")
    assert_same(converted(tmp_path / "a.pt", *teacher(tmp_path, net))[0], net)
    torch.save(dict(net.unet.state_dict()), tmp_path / "a.pt")
    assert "misses logvar_fourier.freqs and 2 more" in refused(tmp_path / "a.pt", *teacher(tmp_path, net))


# Several snapshots


def test_snapshots_of_a_folder_are_listed_in_their_order(tmp_path):
    net = tiny2()
    for name in ("0000016-0.100", "0000008-0.100", "0000008-0.050"):
        dumped(tmp_path / f"network-snapshot-{name}.pkl", snapshot2(net))
    for name in ("network-snapshot-0000008.pkl", "training-state-0000008.pt", "network-snapshot-0000008-0.050.pkl.part", "stats.jsonl"):
        (tmp_path / name).write_bytes(b"")
    found = list(snapshots_in(tmp_path))
    assert [(one.images, one.std, one.path.name[17:24]) for one in found] == [
        (8192, 0.05, "0000008"), (8192, 0.1, "0000008"), (16384, 0.1, "0000016")
    ]  # fmt: skip
    tensors = found[0].tensors()
    assert tensors.keys() == net.state_dict().keys()
    assert all(torch.equal(tensors[name], t) for name, t in net.state_dict().items())
    with pytest.raises(UserError, match="holds no snapshot of EDM2's"):
        list(snapshots_in(Path(__file__).parent))


def test_a_files_name_says_how_many_images_it_has_seen():
    """2 ** 31 images are EDM2's training; snapshots come every 8 Mi images."""
    assert images_at(2147483) == 2**31
    assert [images_at(2**23 * k // 1000) for k in range(1, 256)] == [2**23 * k for k in range(1, 256)]


# Refused


def test_what_makes_no_net_is_refused_in_one_sentence(tmp_path):
    def refusal(net=None, encoder=None, **kwargs):
        made = snapshot2(net or tiny2(), encoder, **({"_init_kwargs": TINY | kwargs} if kwargs else {}))
        with pickle_recursion():
            return refused(dumped(tmp_path / "a.pkl", made))

    assert "far larger net" in refusal(model_channels=30_000)
    assert "made with channels_per_head = 0, wanted a whole number from 1 to" in refusal(channels_per_head=0)
    assert "made with clip_act = -1" in refusal(clip_act=-1)
    assert "made with res_balance = 2" in refusal(res_balance=2)
    assert "made with num_blocks = None" in refusal(num_blocks=None)
    assert "made with 'evil', a keyword argument that is not EDM's" in refusal(evil=1)
    assert "cannot be built" in refusal(model_type="SongUNet")
    assert "has num_heads = 2, wanted 8" in refusal(channels_per_head=1)
    assert "has res_balance = 0.3, wanted 0.5" in refusal(res_balance=0.5)
    assert "has clip_act = 256.0, wanted 128.0" in refusal(clip_act=128)
    assert "of another architecture: it misses" in refusal(num_blocks=2)
    assert "of another architecture: it has unet.emb_label.weight" in refusal(label_dim=0)
    wrong = network2(tiny2())
    wrong.title = "EDM2Precond"
    assert "of the class 'EDM2Precond', wanted one of Precond, EDMPrecond" in refused(dumped(tmp_path / "a.pkl", {"ema": wrong}))
    assert "wanted StabilityVAEEncoder or StandardRGBEncoder" in refusal(encoder=EDM2Loss())
    assert "with raw_std = a list, wanted 4 numbers above 0" in refusal(encoder=StabilityVAEEncoder(raw_std=[1.0, -1.0, 1.0, 1.0]))
    lying = StabilityVAEEncoder()
    lying.scale = lying.scale * 2
    assert "with another scale than its arguments make" in refusal(encoder=lying)
    broken = tiny2()
    with torch.no_grad():
        broken.unet.out_conv.weight[0, 0, 0, 0] = float("inf")
    assert "not finite in unet.out_conv.weight" in refusal(broken)


def test_like_and_a_snapshot_may_not_contradict_each_other(tmp_path):
    net = tiny2()
    path = dumped(tmp_path / "a.pkl", snapshot2(net))
    assert_same(converted(path, *teacher(tmp_path, net))[0], net)
    assert "made with concat_balance = 0.5, and --like" in refused(path, *teacher(tmp_path, tiny2(concat_balance=0.4)))
    edm = from_kwargs("EDMPrecond", **{k: TINY[k] for k in ("img_resolution", "img_channels", "label_dim")} | {"model_channels": 8})
    assert "of the class 'EDM2Precond', and --like" in refused(path, *teacher(tmp_path, edm))


@pytest.mark.parametrize(
    "averages",
    [
        {"stds": [0.05], "emas": []}, {"stds": [0.05, 0.05], "emas": [{}, {}]}, {"stds": ["x"], "emas": [{}]}, {"stds": None, "emas": [{}]},
        {"stds": [0.05] * 99, "emas": [{}] * 99}, {"stds": [float("nan")], "emas": [{}]},
    ],
)  # fmt: skip
def test_averages_without_their_widths_are_refused(averages):
    with pytest.raises(Unreadable, match="whose widths are not told"):
        named_averages({"ema": averages})
    assert named_averages({"ema": {"a": 1}}) == {"ema": {"a": 1}} and named_averages([1]) == [1]


@pytest.mark.parametrize(
    "state", [{"_init_kwargs": None}, {"_init_args": 3}, {"scale": "abc"}, {"bias": [1e9] * 4}, {"_init_args": ("a\nb",)}]
)
def test_an_encoder_that_is_none_is_refused(state):
    with pytest.raises(Unreadable):
        encoder_in({"encoder": Persistent("StabilityVAEEncoder", state)})
    assert encoder_in({"encoder": 3}) is None and encoder_in(None) is None


class Runs:
    """Pickles as a call of eval."""

    def __reduce__(self):
        return eval, ("open('canary', 'w')",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_program_anywhere_in_a_snapshot_is_refused(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder, net = StabilityVAEEncoder(), snapshot2(tiny2())
    encoder.scale = Runs()
    layered = network2(tiny2())
    layered.unet._parameters["out_gain"] = Runs()
    for content in (net | {"encoder": encoder}, net | {"loss_fn": Runs()}, net | {"ema": layered}, net | {"more": [Runs()]}):
        path = dumped(tmp_path / "a.pkl", pickle.dumps(content, protocol=protocol))
        assert "asks for builtins.eval" in refused(path).replace("__builtin__.", "builtins.")
        assert not (tmp_path / "canary").exists()


def test_what_was_converted_is_sampled(tmp_path):
    """The weight file is a teacher as any other: made again from its own words, in another process's terms."""
    net, _ = converted(dumped(tmp_path / "a.pkl", snapshot2(tiny2())))
    again, metadata = load_net(tmp_path / "a.safetensors")
    assert_same(again, net)
    assert metadata["precond"] == "EDM2Precond"
    assert net(torch.zeros(1, 4, 8, 8), torch.ones(1)).shape == (1, 4, 8, 8)


def test_an_average_of_any_length_comes_out_of_a_folder_of_snapshots(tmp_path, capsys):
    """θ(t) = t/T: the average of std with exponent γ at time t is (γ+1)/(γ+2)·t/T, and that of one that was not kept as well."""
    net = tiny2()
    for kimg in range(4, 36, 4):
        for std in (0.05, 0.1):
            gamma, t = gamma_of(std), images_at(kimg) / images_at(32)
            with torch.no_grad():
                for p in net.parameters():
                    p.fill_((gamma + 1) / (gamma + 2) * t)
            dumped(tmp_path / f"network-snapshot-{kimg:07d}-{std:.3f}.pkl", snapshot2(net))
    out = tmp_path / "mixed.safetensors"
    convert.main(["phema", str(tmp_path), str(out), "--std", "0.08"])
    made, metadata = load_net(out)
    wanted = (gamma_of(0.08) + 1) / (gamma_of(0.08) + 2)
    assert all((p - wanted).abs().max() < 1e-3 * wanted for p in made.parameters())  # kept as float16: 5e-4 each
    assert metadata["precond"] == "EDM2Precond" and metadata["reconstructed"]["std"] == 0.08 and "CC BY-NC-SA" in metadata["license"]
    assert torch.equal(made.logvar_fourier.freqs, net.logvar_fourier.freqs)
