"""potstill convert edm: the same net to the last bit, and nothing in a file is ever executed.

The pickles are made here in the layout of NVIDIA's persistence format: `_reconstruct_persistent_obj` called with a dictionary
of type, version, module_src, class_name and state, in which a network's attributes, parameters and layers lie.
"""

import codecs
import collections
import copy
import copyreg
import functools
import importlib
import json
import operator
import os
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from potstill.engine.common.errors import UserError
from potstill.engine.convert import main
from potstill.engine.diffusion.sampling import one_step
from potstill.engine.formats.edm_pickle import read_net
from potstill.engine.models.weights import load_net, save_net
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.readers import pickles

GOLDEN = sorted(p for p in (Path(__file__).parent / "golden").glob("*cond.safetensors") if not p.name.startswith("edm2"))
TINY = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_type": "SongUNet", "model_channels": 4,
    "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "augment_dim": 2, "channel_mult_emb": 1,
}  # fmt: skip


# What NVIDIA's modules look like from a pickle. Their source text would leave a file behind if anybody ran it.


class _Persistent:
    source = ""

    def __reduce__(self):
        title = self.__dict__.get("title", type(self).__name__)
        state = {name: value for name, value in self.__dict__.items() if name != "title"}
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": title, "state": state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


class PersistentModule(_Persistent, nn.Module):
    pass


class EDMLoss(_Persistent):
    def __init__(self):
        self.P_mean, self.table, self.weight = -1.2, np.eye(3), np.float32(0.5)


@pytest.fixture(autouse=True)
def nvidia(monkeypatch, tmp_path):
    """torch_utils.persistence and dnnlib, importable while pickles are written; executing them is an error."""

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("executed")

    modules = {
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
    }
    modules |= {"dnnlib": {}, "dnnlib.util": {"EasyDict": type("EasyDict", (dict,), {})}}
    for module, contents in modules.items():
        made = types.ModuleType(module)
        for name, value in contents.items():
            value.__module__, value.__qualname__ = module, name
            setattr(made, name, value)
        monkeypatch.setitem(sys.modules, module, made)
    monkeypatch.setattr(_Persistent, "source", f"open({str(tmp_path / 'canary')!r}, 'w').close()\n")
    yield
    assert not (tmp_path / "canary").exists()


def tiny(precond="EDMPrecond", **changes):
    net = from_kwargs(precond, **TINY | changes).eval()
    with torch.no_grad():
        for p in net.parameters():  # so that no two tensors are alike
            p.copy_(torch.randn_like(p) * 0.1)
    return net


def persistent(module, title, **attributes):
    """An nn.Module of ours as one of NVIDIA's, in the dictionaries of PyTorch 1.x."""
    if isinstance(module, nn.ModuleDict):
        return nn.ModuleDict({name: persistent(child, "UNetBlock") for name, child in module.items()})
    made = PersistentModule()
    made.title = title
    made.eval()
    made._parameters = collections.OrderedDict(module._parameters)
    made._buffers = collections.OrderedDict(module._buffers)
    children = {name: child for name, child in module._modules.items() if child is not None}
    made._modules = collections.OrderedDict((n, persistent(c, type(c).__name__)) for n, c in children.items())
    vars(made).update({"skip_scale": np.sqrt(0.5), "_init_args": (), "_init_kwargs": {}}, **attributes)
    return made


def network(net, **attributes):
    kwargs = copy.deepcopy(net.kwargs)
    return persistent(net, net.precond, **{"_init_kwargs": kwargs, "sigma_max": float("inf")} | attributes)


def snapshot(net):
    """What EDM's training loop dumps."""
    easy = sys.modules["dnnlib.util"].EasyDict(path="cifar10.zip", use_labels=True)
    data = {"class_name": "training.dataset.ImageFolderDataset", "options": easy, "max_size": np.int64(50000)}
    return {"ema": network(net), "loss_fn": EDMLoss(), "augment_pipe": None, "dataset_kwargs": data}


def dumped(path, content, protocol=4):
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))
    return path


def converted(path, *options):
    out = path.with_suffix(".safetensors") if path.suffix != ".safetensors" else path.with_name("out.safetensors")
    main(["edm", str(path), str(out), "--force", *options])
    return load_net(out)


def refused(path, *options):
    with pytest.raises(UserError) as caught:
        converted(path, *options)
    sentence = str(caught.value)
    assert sentence.isprintable()  # one line, and no escape sequences from the file
    assert len(sentence) < 600
    return sentence.removeprefix(str(path)).strip()


def assert_same(got, net):
    assert (got.precond, got.kwargs) == (net.precond, net.kwargs)
    got, wanted = got.state_dict(), net.state_dict()
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


# Right


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda p: p.stem)
def test_golden_nets_come_back_to_the_bit(golden, tmp_path, capsys):
    with safe_open(golden, "pt") as file:
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        meta = file.metadata()
    net = from_kwargs(meta["precond"], **json.loads(meta["kwargs"])).eval()
    net.load_state_dict({key.removeprefix("state."): v for key, v in t.items() if key.startswith("state.")})
    got, metadata = converted(dumped(tmp_path / "teacher.pkl", snapshot(net)))
    assert_same(got, net)
    with torch.no_grad():
        assert torch.equal(got(t["in.x"], t["in.sigma"], t.get("in.labels")), net(t["in.x"], t["in.sigma"], t.get("in.labels")))
        torch.testing.assert_close(got(t["in.x"], t["in.sigma"], t.get("in.labels")), t["out.D"], rtol=1e-4, atol=1e-5)
    assert metadata["source"] == "teacher.pkl"
    assert len(metadata["sha256"]) == 64
    assert "CC BY-NC-SA" in metadata["license"]
    assert "sampler" not in metadata
    assert "net 'ema' of EDMPrecond" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_python_3(protocol, tmp_path):
    net = tiny()
    assert_same(converted(dumped(tmp_path / "net.pkl", snapshot(net), protocol))[0], net)


@pytest.mark.parametrize("precond", ["VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_every_preconditioning(precond, tmp_path):
    net = tiny(precond)
    got, _ = converted(dumped(tmp_path / "net.pkl", snapshot(net)))
    assert_same(got, net)
    assert (got.sigma_min, got.sigma_max) == (net.sigma_min, net.sigma_max)


def test_gdds_generators_keep_their_preconditioning_and_their_level(tmp_path):
    got, metadata = converted(dumped(tmp_path / "net.pkl", {"net": network(tiny())} | snapshot(tiny("GDDPrecond"))))
    c = got.coefficients(torch.tensor([80.0], dtype=torch.float64))
    published = [3.90629e-5, 0.499978, 0.0124998, 1.095507]  # c_skip, c_out, c_in, c_noise of its code at 80
    np.testing.assert_allclose([v.item() for v in c], published, rtol=5e-6)
    start = got.coefficients(torch.tensor([0.002], dtype=torch.float64))
    assert (start.c_skip.item(), start.c_out.item()) == (1.0, 0.0)
    assert metadata["sampler"]["solver"] == "one_step"
    assert metadata["sampler"]["sigmas"] == [80.0]


class ECMLoss(_Persistent):
    """ECT's: it keeps two of its methods, and so itself, among its attributes."""

    def __init__(self):
        self.t_to_r, self.wt_fn, self.q = self.sigmoid, self.sigmoid, 2

    def sigmoid(self, t):
        raise AssertionError("executed")

    def __reduce__(self):
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": "ECMLoss", "state": self.__dict__}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


@pytest.mark.parametrize("protocol", [2, 4])
def test_ects_generators_are_read_with_their_preconditioning_and_their_loss(tmp_path, protocol):
    """D(x; 0.003) = x, and at 80 the published formula in float64 (2303.01469, App. C)."""
    net = tiny("ECMPrecond")
    got, metadata = converted(dumped(tmp_path / "ect.pkl", snapshot(net) | {"loss_fn": ECMLoss()}, protocol))
    assert_same(got, net)
    c = got.coefficients(torch.tensor([0.003, 80.0], dtype=torch.float64))
    assert (c.c_skip[0].item(), c.c_out[0].item()) == (1.0, 0.0)
    shifted, total = 80 - 0.003, (80**2 + 0.25) ** 0.5
    wanted = [0.25 / (shifted**2 + 0.25), shifted * 0.5 / total, 1 / total, np.log(80) / 4]
    np.testing.assert_allclose([v[1].item() for v in c], wanted, rtol=1e-12)
    assert (metadata["sampler"]["solver"], metadata["sampler"]["sigmas"]) == ("one_step", [80.0])


def test_methods_of_anything_else_are_refused(tmp_path):
    load = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
    for owner, words in (({}, "getattr of a dict"), (load, "getattr of torch_utils.persistence"), (torch.Size, "getattr of torch.Size")):
        assert words in refused(dumped(tmp_path / "net.pkl", {"ema": network(tiny()), "x": Evil(getattr, owner, "keys")}))
    called = Evil(load, {})
    called.call = (Evil(getattr, ECMLoss(), "sigmoid"), (1,))
    with pytest.raises(pickle.PicklingError):  # the first item of a reduction must be a name for Python; so, by hand
        pickle.dumps(called)
    method = pickle.dumps(Evil(getattr, ECMLoss(), "sigmoid"), protocol=2)[:-1]
    assert "wants to call a Inert: refused" in refused(dumped(tmp_path / "net.pkl", method + b"K\x01\x85R."))


def test_a_generator_can_be_declared(tmp_path):
    _, metadata = converted(dumped(tmp_path / "sid.pkl", {"ema": network(tiny())}), "--one-step", "2.5")
    assert metadata["sampler"]["sigmas"] == [2.5]
    assert metadata["method"] != "teacher"
    assert "above 0, got 0" in refused(tmp_path / "sid.pkl", "--one-step", "0")


def test_half_precision_slices_and_strides_are_read_as_they_lie(tmp_path):
    net = tiny()
    expected = {name: p.half().float() for name, p in net.state_dict().items()}
    for module in net.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                whole = torch.zeros(p.numel() + 7, dtype=torch.float16)
                whole[5:-2] = p.detach().half().transpose(0, -1).flatten()
                view = whole[5:-2].view(p.transpose(0, -1).shape).transpose(0, -1)
                module._parameters[name] = nn.Parameter(view, requires_grad=False)
    got, _ = converted(dumped(tmp_path / "net.pkl", snapshot(net)))
    for name, tensor in got.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name


def test_arguments_of_any_kind_are_understood(tmp_path):
    net = tiny()
    kwargs = {k: v for k, v in net.kwargs.items() if not k.startswith("img_")}
    kwargs |= {"label_dim": np.int64(3), "channel_mult": np.array([1]), "attn_resolutions": (), "use_fp16": 0}
    made = network(net, _init_args=(8, 1), _init_kwargs=kwargs)
    got, _ = converted(dumped(tmp_path / "net.pkl", {"ema": made}))
    assert got.kwargs == net.kwargs | {"use_fp16": False}


def test_a_net_of_several_is_chosen_by_name(tmp_path):
    a, b = tiny(), tiny()
    path = dumped(tmp_path / "state.pkl", {"G": network(a), "G_ema": network(b), "fake_score": network(a)})
    assert "holds several nets: G, G_ema, fake_score; choose one with --net" in refused(path)
    assert "holds no net 'ema', only: G, G_ema, fake_score" in refused(path, "--net", "ema")
    assert_same(converted(path, "--net", "G_ema")[0], b)
    assert_same(converted(dumped(tmp_path / "alone.pkl", network(a)))[0], a)


def test_a_training_state_of_torch_save_holds_nets_too(tmp_path):
    net = tiny()
    for new in (True, False):
        content = {
            "net": network(net),
            "optimizer_state": {"state": {0: {"step": torch.tensor(1.0)}}, "lr": np.float64(1)},
        }
        torch.save(content, tmp_path / "state.pt", _use_new_zipfile_serialization=new)
        assert_same(converted(tmp_path / "state.pt")[0], net)


def test_the_output_is_there_or_not(tmp_path, capsys):
    path = dumped(tmp_path / "net.pkl", snapshot(tiny()))
    out = tmp_path / "new/out.safetensors"
    main(["edm", str(path), str(out)])
    before = out.read_bytes()
    with pytest.raises(UserError, match="exists: choose another name or add --force"):
        main(["edm", str(path), str(out)])
    dumped(path, path.read_bytes()[:-50])
    with pytest.raises(UserError, match="cut off"):
        main(["edm", str(path), str(out), "--force"])
    assert out.read_bytes() == before
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        main(["edm", str(path), str(tmp_path / "out.pt")])
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.safetensors"]


# Checkpoints


def teacher(tmp_path, net):
    save_net(tmp_path / "teacher.safetensors", net)
    return "--like", str(tmp_path / "teacher.safetensors")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("prefix", ["", "module.", "_forward_module.", "model.", "net._orig_mod.", "feedforward_model.module."])
def test_checkpoints_differ_in_what_stands_before_a_name(prefix, new, tmp_path):
    net = tiny()
    content = collections.OrderedDict((prefix + name, t) for name, t in net.state_dict().items())
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    assert_same(converted(tmp_path / "a.pth", *teacher(tmp_path, net))[0], net)


def test_checkpoints_of_fastgen_and_dmd2(tmp_path, capsys):
    net, fake = tiny(label_dim=0), tiny(label_dim=0)
    head = {"model.logvar_linear.weight": torch.zeros(1, 4), "model.logvar_linear.bias": torch.zeros(1)}
    score = {f"fake_unet.{k}": t for k, t in fake.state_dict().items()} | {"cls_pred_branch.0.weight": torch.zeros(3)}
    content = {"model": {"net": net.state_dict() | head, "fake_score": score}, "iteration": 7, "callbacks": {}}
    torch.save(content, tmp_path / "0007.pth")
    like = teacher(tmp_path, net)
    assert "holds several nets: model.fake_score.fake_unet, model.net; choose" in refused(tmp_path / "0007.pth", *like)
    assert_same(converted(tmp_path / "0007.pth", "--net", "net", *like)[0], net)
    assert "left out model.logvar_linear.weight and model.logvar_linear.bias" in capsys.readouterr().err
    assert_same(converted(tmp_path / "0007.pth", "--net", "fake_unet", *like)[0], fake)


def test_a_bare_unet_and_safetensors_are_checkpoints_too(tmp_path):
    net = tiny("iDDPMPrecond")
    content = {k: t.contiguous() for k, t in net.state_dict().items()}
    save_file(content, tmp_path / "a.safetensors")
    like = teacher(tmp_path, net)
    assert_same(converted(tmp_path / "a.safetensors", *like)[0], net)
    bare = tiny()
    torch.save(bare.model.state_dict(), tmp_path / "b.pth")
    assert_same(converted(tmp_path / "b.pth", *teacher(tmp_path, bare))[0], bare)


def test_a_student_without_augmentation_labels_says_so(tmp_path, capsys):
    net = tiny()
    torch.save({k: t for k, t in net.state_dict().items() if "augment" not in k}, tmp_path / "a.pth")
    got, _ = converted(tmp_path / "a.pth", *teacher(tmp_path, net))
    assert got.kwargs == net.kwargs | {"augment_dim": 0}
    assert "without augment_dim, as the file has no model.map_augment.weight" in capsys.readouterr().err


def test_differences_are_named(tmp_path):
    net = tiny()
    like = teacher(tmp_path, net)
    state = {"module." + k: t for k, t in net.state_dict().items()}
    torch.save(state | {"module.model.extra": torch.zeros(2)}, tmp_path / "a.pth")
    assert "has model.extra and 0 more that the net lacks" in refused(tmp_path / "a.pth", *like)
    torch.save({k: t for k, t in state.items() if "map_layer1.bias" not in k}, tmp_path / "a.pth")
    assert "misses model.map_layer1.bias and 0 more" in refused(tmp_path / "a.pth", *like)
    torch.save(state | {"module.model.map_layer1.bias": torch.zeros(5)}, tmp_path / "a.pth")
    assert "model.map_layer1.bias is [5], wanted [4] (1 shapes differ)" in refused(tmp_path / "a.pth", *like)
    torch.save(state | {"module.model.map_layer1.bias": torch.zeros(4, dtype=torch.int64)}, tmp_path / "a.pth")
    assert "holds whole numbers as model.map_layer1.bias" in refused(tmp_path / "a.pth", *like)
    torch.save(state | {f"b.{k}": t for k, t in net.state_dict().items()}, tmp_path / "a.pth")
    assert "choose one with --net" in refused(tmp_path / "a.pth", *like)
    torch.save(state, tmp_path / "a.pth")
    assert "does not say of which net: add --like" in refused(tmp_path / "a.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    assert "does not say which net it holds" in refused(tmp_path / "a.pth", "--like", str(tmp_path / "b.safetensors"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    assert "holds no net of EDM's" in refused(tmp_path / "a.pth", *like)


# Refused


class Evil:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def calls(module, name, argument=b"N", protocol=b"\x80\x04"):
    """A pickle by hand: module.name(argument)."""
    return protocol + b"c" + f"{module}\n{name}\n".encode() + argument + b"\x85R."


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def evils(canary):
    """What would leave the canary behind or reach for something else, by the name it is asked for under."""
    write = f"open({str(canary)!r}, 'w')"
    touch = Evil(os.system, f"touch {canary}")
    return {
        "posix.system": touch,
        "eval": Evil(eval, write),
        "exec": Evil(exec, write),
        "compile": Evil(compile, write, "", "exec"),
        "io.open": Evil(open, str(canary), "w"),
        "__import__": Evil(__import__, "os"),
        "subprocess.Popen": Evil(subprocess.Popen, ["touch", str(canary)]),
        "subprocess.check_output": Evil(subprocess.check_output, ["touch", str(canary)]),
        "getattr": Evil(getattr, Evil(importlib.import_module, "os"), "system"),
        "importlib.import_module": Evil(importlib.import_module, "os"),
        "operator.attrgetter": Evil(operator.attrgetter("system"), touch),
        "functools.partial": functools.partial(os.getcwd),
        "torch.serialization.load": Evil(torch.load, str(canary)),
        "torch.hub.load": Evil(torch.hub.load, "a/b", "c"),
        "torch.jit._serialization.load": Evil(torch.jit.load, str(canary)),
        "codecs.open": Evil(codecs.open, str(canary), "w"),
        "_codecs.decode": Evil(codecs.decode, b"a", "zip"),
        "copyreg._reconstructor": Evil(copyreg._reconstructor, Evil, object, None),
        "_pickle.loads": Evil(pickle.loads, pickle.dumps(touch)),
        "of type 'O8'": np.array([touch], dtype=object),
        "test_convert_edm.Evil": Evil(Evil, touch),
    }


@pytest.mark.parametrize("asked", evils(""))
def test_whatever_a_pickle_asks_for_is_refused_by_name(asked, tmp_path):
    evil = evils(tmp_path / "canary")[asked]
    hooked, layered, weighted = network(tiny()), network(tiny()), network(tiny())
    hooked.model.__dict__["hook"] = evil
    layered.model._modules["extra"] = evil
    weighted.model._parameters["extra"] = evil
    argument = network(tiny(), _init_kwargs=dict(TINY, dropout=evil))
    contents = ((3, evil), (4, {"ema": hooked}), (5, {"a": evil, "ema": layered}), (4, [weighted]), (3, argument))
    for protocol, content in contents:
        sentence = refused(dumped(tmp_path / "net.pkl", content, protocol))
        assert asked in sentence or asked in ("getattr", "operator.attrgetter", "of type 'O8'"), sentence
        assert "refused" in sentence or "wanted plain numbers" in sentence
    refused(dumped(tmp_path / "net.pkl", argument, 2))
    torch.save({"ema": hooked}, tmp_path / "net.pt")
    refused(tmp_path / "net.pt")


def storage_blob(content):
    """What `torch.storage._load_from_bytes` is called with: a legacy file of torch.save, here with anything in it."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, content, []]
    return b"".join(pickle.dumps(part, protocol=2) for part in parts)


def test_nothing_but_a_storage_comes_out_of_an_embedded_blob(tmp_path):
    canary = tmp_path / "canary"
    load = torch.storage._load_from_bytes
    nested = Evil(load, storage_blob(Evil(os.system, f"touch {canary}")))
    for content, words in [
        (Evil(os.system, f"touch {canary}"), "asks for posix.system where only a storage may be"),
        (nested, "asks for torch.storage._load_from_bytes where only a storage may be"),
        (sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, "asks for torch_utils.persistence"),
        ({"a": 1}, "has a dict as a storage"),
    ]:
        path = dumped(tmp_path / "net.pkl", {"ema": Evil(load, storage_blob(content))})
        assert words in refused(path)
    for blob in (pickle.dumps(Evil(os.system, f"touch {canary}")), b"PK\x03\x04" + b"0" * 50, b"", "text"):
        refused(dumped(tmp_path / "net.pkl", Evil(load, blob)))


RECONSTRUCT = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (calls("os", "system", text("touch canary")), "asks for os.system, which no network needs: refused"),
        (calls("torch", "nn.modules.container.sys.modules"), "asks for torch.nn.modules.container.sys.modules"),
        (calls("torch_utils.persistence", "_reconstruct_persistent_obj.__globals__"), "__globals__"),
        (calls("torch.nn.modules.container", "Sequential"), "wants to call torch.nn.modules.container.Sequential"),
        (calls("dnnlib.util", "EasyDict"), "wants to call dnnlib.util.EasyDict: refused"),
        (calls("torch.nn.modules", "os.system"), "asks for torch.nn.modules.os.system, which no"),
        (calls("a\x1b[31m", "b"), "cannot be a name"),
        (calls("a" * 199, "b" * 9), "cannot be a name"),
        (b"\x80\x04ccollections\nOrderedDict\n)\x81.", "wants to create collections.OrderedDict"),
        (b"\x80\x04" + RECONSTRUCT + b"}" + text("__code__") + b"Nsb.", "has a Name as an object with a state"),
        (
            b"\x80\x04" + RECONSTRUCT + b"}" + text("version") + b"K\x07s\x85R.",
            "version 7, wanted a class of version 6",
        ),
        (b"\x80\x02(S'touch canary'\nios\nsystem\n.", "opcode 0x53"),
        (b"\x80\x02(ios\nsystem\n.", "opcode 0x69"),
        (b"\x80\x02(cos\nsystem\no.", "asks for os.system"),
        (b"\x80\x02\x82\x01.", "opcode 0x82"),
        (b"\x80\x02Pabc\n.", "opcode 0x50"),
        (b"\x80\x04NQ.", "refers to data outside of itself"),
        (b"cos\nsystem\n(S'touch canary'\ntR.", "is no pickle of protocol 2 to 5: it starts with b"),
        (b"\x80\x01N.", "protocol 1, wanted 2 to 5"),
        (b"<!DOCTYPE html><html>", "is no pickle of protocol 2 to 5: it starts with b'<!DOCTYPE html"),
        (b"", "is no pickle"),
        (b"\x80", "is cut off"),
        (b"\x80\x04.", "is damaged at byte 3 (IndexError)"),
        (b"\x80\x04N.N.", "has 2 bytes after the end of its pickle"),
        (b"\x80\x04}.", "holds no net of EDM's"),
        (b"PK\x03\x04" + b"0" * 40, "is a damaged zip archive"),
        (b"\x80\x04c_codecs\nencode\n" + text("a") + text("rot13") + b"\x86R.", "in the encoding 'rot13': refused"),
    ],
)
def test_pickles_by_hand_are_refused_by_what_they_want(data, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(dumped(tmp_path / "net.pkl", data))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.", "is cut off: 4,611,686,018,427,387,904 bytes"),
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"x.", "is cut off"),
        (b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b"x.", "is cut off"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.", "is cut off"),
        (b"\x80\x04Nr\xff\xff\xff\xff0j\xff\xff\xff\xff.", "holds no net"),  # Python's own would allocate 64 GiB
        (b"\x80\x04\x8a\xff" + b"1" * 255 + b".", "holds an integer of 255 bytes"),
        (b"\x80\x04)" + b"\x85" * 200_000 + b".", "holds no net"),  # 200,000 tuples in each other
        (b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.", "has a tuple as a key"),
        (b"\x80\x04})" + b"2\x86" * 64 + b"Ns.", "has a tuple as a key"),  # its hash would take 2^64 steps
        (b"\x80\x04" + text("a") + b"NNs.", "has a str as a dictionary"),
        (b"\x80\x04" + b"N0" * 1_100, "more than 2,000 opcodes"),
        (b"\x80\x04" + text("a" * 5_000) + b"q\x000" + b"c_codecs\nencode\nq\x010" + text("latin1") + b"q\x020"
         + b"h\x01h\x00h\x02\x86R0" * 300 + b"N.", "would unfold to many times its size"),
    ],
)  # fmt: skip
def test_bombs_are_refused_before_they_unfold(data, words, tmp_path, monkeypatch):
    if "opcodes" in words:
        monkeypatch.setattr(pickles, "MOST_OPCODES", 2_000)
    assert words in refused(dumped(tmp_path / "net.pkl", data))


def test_nets_without_an_end_and_arguments_without_measure_are_refused(tmp_path):
    def refusal(change):
        net = network(tiny())
        change(net)
        with pickle_recursion():
            return refused(dumped(tmp_path / "net.pkl", {"ema": net}))

    def doubling(net):
        layer = nn.ModuleDict()
        for _ in range(40):
            layer = nn.ModuleDict({"a": layer, "b": layer})
        net._modules["more"] = layer

    def itself(net):
        circle = nn.ModuleDict()
        circle._modules["again"] = circle
        net._modules["more"] = circle

    def argument(**kwargs):
        return lambda net: net.__dict__.update(_init_kwargs=TINY | kwargs)

    assert "has no end" in refusal(doubling)
    assert "has no end" in refusal(itself)
    assert "far larger net" in refusal(argument(model_channels=60_000))
    assert "num_blocks = 1000000000" in refusal(argument(num_blocks=10**9))
    assert "made with channel_mult = a list" in refusal(argument(channel_mult=[1] * 1000))
    assert "made with 'evil', a keyword argument that is not EDM's" in refusal(argument(evil=1))
    assert "made with dropout = a str" not in refusal(argument(dropout="x"))
    assert "model_type wants one of SongUNet" in refusal(argument(model_type="Transformer"))
    assert "cannot be built" in refusal(argument(model_channels=3))
    assert "does not say what its net was made with" in refusal(lambda net: net.__dict__.update(_init_kwargs=None))
    assert "class 'Other', wanted one of Precond, EDMPrecond" in refusal(lambda net: net.__dict__.update(title="Other"))
    assert "a layer or tensor called 'a\\nb'" in refusal(lambda net: net._parameters.update({"a\nb": None}))
    assert "of another architecture: it misses" in refusal(argument(num_blocks=2))


class pickle_recursion:
    """Python's pickler recurses deeper than Python lets it."""

    def __enter__(self):
        self.before = sys.getrecursionlimit()
        sys.setrecursionlimit(20_000)

    def __exit__(self, *error):
        sys.setrecursionlimit(self.before)


def test_tensors_that_reach_beyond_their_numbers_are_refused(tmp_path):
    rebuild = torch._utils._rebuild_tensor_v2
    storage = torch.zeros(8).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    for offset, shape, stride, words in [
        (1, (8,), (1,), "sizes [8] in 8 numbers"),
        (0, (4,), (3,), "sizes [4] in 8 numbers"),
        (0, (2**40,), (0,), "in 8 numbers"),
        (-1, (2,), (1,), "size or stride of -1"),
        (0, (2,), (-1,), "size or stride of -1"),
        (0, (2,), (1, 1), "1 sizes and 2 strides"),
        (0, (1,) * 9, (1,) * 9, "9 sizes"),
        (0, (2.0,), (1,), "has a float as a size of a tensor"),
        (0, [2], (1,), "has a list as sizes of a tensor"),
    ]:
        tensor = Evil(rebuild, storage, offset, shape, stride, False, collections.OrderedDict())
        assert words in refused(dumped(tmp_path / "net.pkl", {"ema": tensor}))


def test_archives_that_torch_would_not_write_are_refused(tmp_path):
    net = tiny()
    like = teacher(tmp_path, net)
    torch.save(net.state_dict(), tmp_path / "gœd.pth")
    assert_same(converted(tmp_path / "gœd.pth", *like)[0], net)
    torch.save(net.state_dict(), tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as good:
        members = {name: good.read(name) for name in good.namelist()}

    def refusal(change, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(tmp_path / "net.pth", "w", compression) as archive:
            for name, data in (members | change).items():
                if data is not None:
                    archive.writestr(name, data)
        return refused(tmp_path / "net.pth", *like)

    data = tmp_path / "net.pth"
    assert "has it compressed" in refusal({}, zipfile.ZIP_DEFLATED)
    assert "without the one data.pkl" in refusal({"good/data.pkl": None})
    assert "without the one data.pkl" in refusal({"bad/data.pkl": b"N."})
    assert "without 'data/3'" in refusal({"good/data/3": None})
    assert "8 bytes for 16 numbers of torch.float32" in refusal({"good/data/3": b"12345678"})
    assert "big-endian" in refusal({"good/byteorder": b"big"})
    assert "asks for os.system" in refusal({"good/data.pkl": calls("os", "system")})
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    raw = data.read_bytes()
    directory = raw.rindex(b"PK\x05\x06") + 16  # where the end of the archive says that its directory begins
    for shift in (500, 64):  # by which every member then lies before where it is, the first before the file
        moved = struct.pack("<I", struct.unpack_from("<I", raw, directory)[0] + shift)
        data.write_bytes(raw[:directory] + moved + raw[directory + 4 :])
        assert "is a damaged zip archive" in refused(data, *like)


# Mutated


def mutated(data, places, dice):
    """The file with a few bytes changed, cut out, added or doubled."""
    data = bytearray(data)
    for _ in range(dice.choice((1, 2, 3, 5, 8))):
        at, n = min(dice.choice(places), len(data) - 1), dice.choice((1, 1, 2, 8, 100))
        match dice.randrange(7):
            case 0 | 1 | 2:
                opcodes = (0, 255, ord("R"), ord("b"), 0x81, ord("."), ord("0"), ord("Q"))
                data[at] = dice.choice((*opcodes, data[at] ^ (1 << dice.randrange(8))))
            case 3:
                del data[at : at + n]
            case 4:
                data[at:at] = dice.randbytes(n)
            case 5:
                to = dice.choice(places)
                data[to:to] = data[at : at + n]
            case 6:
                data = data[: at + 1]
    return bytes(data)


def without_checksums(data):
    """A zip as who forges one writes it: without the checksums of what is in it (0), which would give every change away."""
    forged = bytearray(data)
    for match in re.finditer(rb"PK\x01\x02", data):
        forged[match.start() + 16 : match.start() + 20] = bytes(4)
    return bytes(forged)


def outside_of_numbers(data, net):
    """Where a file is something else than a weight, and here and there a weight."""
    inside = set()
    for tensor in net.state_dict().values():
        orders = (tensor.numpy().tobytes(), tensor.movedim(1, -1).contiguous().numpy().tobytes() if tensor.ndim == 4 else b"-")
        numbers = next(numbers for numbers in orders if numbers in data)  # as it lies in the file
        start = data.index(numbers)
        inside |= set(range(start, start + len(numbers)))
    return [at for at in range(len(data)) if at not in inside or at % 50 == 0]


@pytest.fixture(scope="module")
def events():
    """What the interpreter is told to do (audit events) while events.on."""
    seen = types.SimpleNamespace(on=False, names=[])
    forbidden = {"exec", "compile", "import", "pickle.find_class", "os.system", "os.exec", "os.fork", "os.posix_spawn"}
    forbidden |= {"subprocess.Popen", "socket.connect", "ctypes.dlopen", "marshal.loads", "os.remove", "shutil.rmtree"}

    def hook(event, arguments):
        if seen.on and event in forbidden:
            seen.names.append((event, arguments[:1]))

    sys.addaudithook(hook)
    yield seen
    seen.on = False


@pytest.mark.parametrize(("kind", "n"), [("pickle", 700), ("zip", 150), ("legacy", 150)])
def test_mutated_files_are_refused_or_converted_and_never_executed(kind, n, tmp_path, events):
    net = tiny(label_dim=0, augment_dim=0)
    like = None if kind == "pickle" else Path(teacher(tmp_path, net)[1])
    path = tmp_path / "net.pkl"
    if kind == "pickle":
        dumped(path, snapshot(net))
    else:
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    read_net(path, like=like)  # whatever is imported late is imported now
    data = without_checksums(path.read_bytes()) if kind == "zip" else path.read_bytes()
    places, dice, converted, sentences = outside_of_numbers(data, net), random.Random(0), 0, set()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for _ in range(n):
        path.write_bytes(mutated(data, places, dice))
        signal.alarm(60)  # for a file that never ends
        events.on = True
        try:
            found = read_net(path, like=like).net
        except UserError as error:
            sentences.add(str(error).removeprefix(str(path)))
        else:
            converted += 1
            assert [p.shape for p in found.state_dict().values()] == [p.shape for p in net.state_dict().values()]
        finally:
            events.on = False
            signal.alarm(0)
    assert events.names == []
    assert 0 < converted < n / 2  # a changed weight is still a weight
    assert len(sentences) > 10
    assert all(sentence.isprintable() for sentence in sentences)


# A file and a hint that contradict it


@pytest.mark.parametrize("own", ["GDDPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond", "ECMPrecond"])
def test_a_class_that_the_pickle_names_is_not_overridden(own, tmp_path):
    """Naming both; a hint that agrees changes nothing, the generator's sampler included."""
    net = tiny(own)
    path = dumped(tmp_path / "net.pkl", snapshot(net))
    sentence = refused(path, *teacher(tmp_path, tiny()))
    assert f"holds a net of the class '{own}', and --like " in sentence
    assert sentence.endswith("is one of EDMPrecond: leave --like out")
    assert "of the class 'EDMPrecond'" in refused(dumped(tmp_path / "edm.pkl", snapshot(tiny())), *teacher(tmp_path, net))
    alone, agreeing = converted(path), converted(path, *teacher(tmp_path, net))
    assert_same(agreeing[0], net)
    assert alone[1] == agreeing[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sigma_data": 0.7}, "sigma_data = 0.7"), ({"sigma_min": 0.01}, "sigma_min = 0.01"), ({"dropout": 0.3}, "dropout = 0.3"),
        ({"use_fp16": True}, "use_fp16 = True"), ({"label_dim": 0}, "label_dim = 0"), ({"img_resolution": 16}, "img_resolution = 16"),
        ({"augment_dim": 0}, "augment_dim = 0"), ({"model_type": "DhariwalUNet"}, "model_type = 'DhariwalUNet'"),
    ],
)  # fmt: skip
def test_nor_are_the_arguments_that_its_net_was_made_with(changes, words, tmp_path):
    net = tiny(**changes)
    path = dumped(tmp_path / "net.pkl", snapshot(net))
    sentence = refused(path, *teacher(tmp_path, tiny()))
    assert f"holds a net made with {words}, and --like " in sentence
    assert_same(converted(path)[0], net)


def test_constants_that_a_checkpoint_stores_are_those_of_its_teacher(tmp_path):
    """Weights do not tell one resampling filter or list of noise levels from another, so a wrong --like would only show here."""
    shape = {"img_resolution": 8, "channel_mult": [1, 1], "augment_dim": 0}
    net, hint = tiny(resample_filter=[1, 3, 3, 1], **shape), tiny(resample_filter=[1, 2, 2, 1], **shape)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    assert "stores another model.enc.4x4_down.conv0.resample_filter than" in refused(tmp_path / "a.pth", *teacher(tmp_path, hint))
    assert_same(converted(tmp_path / "a.pth", *teacher(tmp_path, net))[0], net)
    torch.save(tiny("iDDPMPrecond", C_2=0.08).state_dict(), tmp_path / "b.pth")
    assert "stores another u than" in refused(tmp_path / "b.pth", *teacher(tmp_path, tiny("iDDPMPrecond")))


def test_defaults_that_one_file_writes_down_and_another_does_not_agree(tmp_path):
    net = tiny()
    written = network(net, _init_kwargs=net.kwargs | {"sigma_data": 0.5, "dropout": 0.1, "attn_resolutions": (), "use_fp16": 0})
    path = dumped(tmp_path / "net.pkl", {"ema": written})
    assert converted(path, *teacher(tmp_path, net))[0].kwargs["dropout"] == 0.1
    silent = dumped(tmp_path / "silent.pkl", {"ema": network(net, _init_kwargs=None)})
    assert "does not say what its net was made with: add --like" in refused(silent)
    assert_same(converted(silent, *teacher(tmp_path, net))[0], net)
    assert "of the class 'EDMPrecond', and --like" in refused(silent, *teacher(tmp_path, tiny("VPPrecond")))


def test_a_weight_file_of_ours_is_not_converted_again(tmp_path):
    save_net(tmp_path / "gdd.safetensors", tiny("GDDPrecond"), method="converted", sampler=one_step(80).to_dict())
    hint = teacher(tmp_path, tiny())
    assert "is a weight file of ours already: use it as it is" in refused(tmp_path / "gdd.safetensors")
    assert "already, of a net of GDDPrecond (and --like of one of EDMPrecond)" in refused(tmp_path / "gdd.safetensors", *hint)


def test_a_noise_level_that_the_net_does_not_know_is_no_generators(tmp_path):
    gdd = dumped(tmp_path / "gdd.pkl", snapshot(tiny("GDDPrecond")))
    assert "GDDPrecond, which knows only the noise level 80, and --one-step says 2.5" in refused(gdd, "--one-step", "2.5")
    assert converted(gdd, "--one-step", "80")[1]["sampler"]["sigmas"] == [80.0]
    ve = dumped(tmp_path / "ve.pkl", snapshot(tiny("VEPrecond")))
    assert "for the noise levels 0.02 … 100, and --one-step says 200" in refused(ve, "--one-step", "200")
