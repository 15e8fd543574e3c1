"""potstill convert edm on SFD's released students: the same net, sampled as the released code samples it.

No such file can be had here. The pickles are made in their layout: {"model": net}, a torch.nn.Module of the module
`models.networks_edm` without NVIDIA's persistence, whose attribute `training_kwargs` is a dnnlib.EasyDict.
"""

import json
import math
import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch
from test_convert_edm import mutated
from torch import nn

from potstill.engine import sample
from potstill.engine.common.errors import UserError
from potstill.engine.convert import main
from potstill.engine.diffusion.sampling import Sampler, SeedNoise, few_step
from potstill.engine.formats.edm_pickle import read_net
from potstill.engine.models.opening import open_models
from potstill.engine.models.weights import load_net, save_net
from potstill.engine.nets.edm import from_kwargs
from potstill.engine.nets.layers import FourierEmbedding

SONG = {
    "img_resolution": 8, "img_channels": 3, "label_dim": 0, "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2],
    "num_blocks": 2, "attn_resolutions": [4], "dropout": 0.13, "channel_mult_emb": 2, "augment_dim": 9,
}  # fmt: skip
NCSN = SONG | {
    "embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1], "augment_dim": 0
}  # fmt: skip
SKIP = SONG | {"encoder_type": "skip", "decoder_type": "skip", "label_dim": 4, "resample_filter": [1, 2, 2, 1]}
ADM = {
    "img_resolution": 8, "img_channels": 3, "label_dim": 5, "model_type": "DhariwalUNet", "model_channels": 32, "channel_mult": [1, 2],
    "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1,
}  # fmt: skip
KINDS = {"ddpm++": SONG, "ncsn++": NCSN, "skip": SKIP, "adm": ADM}
RANGE = {"sigma_min": 0.006, "sigma_max": 80.0, "sigma_data": 0.5, "use_fp16": False}
TOLD = {  # what SFD's train.py and training_loop.py put there
    "class_name": "training.loss.loss", "num_steps": 4, "sampler_tea": "dpmpp", "M": 3, "schedule_type": "polynomial", "schedule_rho": 7.0,
    "afs": True, "max_order": 3, "predict_x0": True, "lower_order_final": True, "use_step_condition": True, "is_second_stage": False,
    "sigma_min": 0.006, "sigma_max": 80.0, "model_source": "edm", "dataset_name": "cifar10", "guidance_type": None, "guidance_rate": 0.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """`models.networks_edm` and dnnlib, importable while pickles are written."""
    names = ("EDMPrecond", "CFGPrecond", "SongUNet", "DhariwalUNet", "UNetBlock", "Conv2d", "Linear", "GroupNorm")
    classes = {name: type(name, (nn.Module,), {}) for name in (*names, "PositionalEmbedding", "FourierEmbedding", "Attention")}
    made = {"models": {}, "models.networks_edm": classes, "dnnlib": {}, "dnnlib.util": {"EasyDict": type("EasyDict", (dict,), {})}}
    for title, contents in made.items():
        module = types.ModuleType(title)
        for name, value in contents.items():
            value.__module__, value.__qualname__ = title, name
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, title, module)


def student_of(**kwargs):
    """One of ours that knows of steps, no two tensors alike."""
    torch.manual_seed(1)
    net = from_kwargs("EDMPrecond", **kwargs | RANGE, step_condition=True).eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.08 if p.dim() > 1 else 0.3)
    return net


def plain(title, module=None, **attributes):
    """A module of `models.networks_edm` with our module's tensors and these attributes."""
    made = getattr(sys.modules["models.networks_edm"], title)()
    if module is not None:
        made._parameters |= module._parameters
        made._buffers |= module._buffers
    vars(made).update(attributes)
    return made


def layer(module):
    """A layer of ours as SFD's code has it."""
    if isinstance(module, nn.ModuleDict):
        return nn.ModuleDict({name: layer(child) for name, child in module.items()})
    title = type(module).__name__
    said = {"eps": module.eps, "num_groups": module.groups} if title == "GroupNorm" else {}
    if title == "PositionalEmbedding":
        said = {"num_channels": module.channels, "max_positions": 10000, "endpoint": module.endpoint}
    if title == "Conv2d":
        said = {k: getattr(module, k) for k in ("in_channels", "out_channels", "up", "down", "fused_resample")}
    if title == "StepAffine":
        return plain("Linear", types.SimpleNamespace(_parameters=dict(module._parameters), _buffers={}))
    if title == "UNetBlock":
        said = {
            "in_channels": module.in_channels,
            "num_heads": module.heads,
            "dropout": module.dropout,
            "adaptive_scale": module.adaptive_scale,
        }
        said |= {"skip_scale": np.sqrt(0.5) if module.skip_scale != 1 else 1}
    made = plain(title, module, **said)
    for name, child in module.named_children():
        made._modules[name] = layer(child)
    if title == "UNetBlock":
        made._modules["affine_step"] = layer(module.affine.steps)
    return made


def released(net, **told):
    """What SFD's training loop dumps."""
    unet = plain(net.kwargs["model_type"], net.model, label_dropout=0)
    for name, child in net.model.named_children():
        if name != "map_steps":
            unet._modules[name] = layer(child)
    fourier, noise = isinstance(net.model.map_noise, FourierEmbedding), net.model.map_layer0.in_features
    unet._modules["map_step"] = (
        plain("FourierEmbedding", net.model.map_steps.waves) if fourier
        else plain("PositionalEmbedding", num_channels=noise, max_positions=10000, endpoint=net.kwargs["model_type"] == "SongUNet")
    )  # fmt: skip
    unet._modules["map_step_layer0"], unet._modules["map_step_layer1"] = (
        layer(net.model.map_steps.layer0),
        layer(net.model.map_steps.layer1),
    )
    state = RANGE | {key: net.kwargs[key] for key in ("img_resolution", "img_channels", "label_dim")}
    made = plain("EDMPrecond", **state, training_kwargs=sys.modules["dnnlib.util"].EasyDict(TOLD | told))
    made._modules["model"] = unet
    return {"model": made.eval().requires_grad_(False)}


def dumped(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def converted(path, *options):
    out = path.with_suffix(".safetensors")
    main(["edm", str(path), str(out), "--force", *options])
    return load_net(out)


def refused(path, *options):
    with pytest.raises(UserError) as caught:
        converted(path, *options)
    sentence = str(caught.value)
    assert sentence.isprintable()
    assert len(sentence) < 500
    return sentence.removeprefix(str(path)).strip()


def walked(ask, z, t, afs):
    """The released sampler: Euler over the levels, the first step along x / sqrt(1 + t²) with AFS, in float64."""
    x = z.double() * t[0]
    for i, (s, s_next) in enumerate(zip(t[:-1], t[1:], strict=True)):
        d = x / math.sqrt(1 + s**2) if afs and i == 0 else (x - ask(x.float(), torch.tensor(s)).double()) / s
        x = x + (s_next - s) * d
    return x


def polynomial(n, rho=7.0):
    return [(80 ** (1 / rho) + i / (n - 1) * (0.006 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(n)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_of_several_numbers_of_steps(kind, tmp_path):
    """Every argument is read off the layers, every weight found its place; it is sampled as it says, and with other NFEs."""
    net = student_of(**KINDS[kind])
    got, meta = converted(dumped(tmp_path / "sfdv.pkl", released(net)))
    made = {"channel_mult_noise": 1, "embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard"}
    made = made | {"resample_filter": [1, 1]} if KINDS[kind]["model_type"] == "SongUNet" else {}
    defaults = made | {"channel_mult_emb": 4, "label_dropout": 0.0, "augment_dim": 0}
    assert got.kwargs == defaults | KINDS[kind] | RANGE | {"step_condition": True}
    wanted = net.state_dict()
    assert got.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in got.state_dict().items())
    assert meta["method"] == "converted"
    assert Sampler(**meta["sampler"]) == few_step(4, step_condition=True)
    noise, labels = SeedNoise([3, 4]).normal(3, 8, 8), torch.eye(5)[[0, 1], : net.label_dim] if net.label_dim else None
    for n in (4, 6):
        model = open_models(tmp_path / "sfdv.safetensors", "student", steps=n - 2)[0]
        assert model.sampler.nfe == n - 2
        with torch.no_grad():
            found = model.sampler(model.net, labels, SeedNoise([3, 4]))
            by_hand = walked(lambda x, s, n=n: net(x, s, labels, steps=n), noise, polynomial(n), afs=True)
        torch.testing.assert_close(found.double(), by_hand, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["ddpm++", "adm"])
def test_a_student_of_one_number_of_steps_has_layers_that_it_does_not_use(kind, tmp_path, capsys):
    net, plain_net = student_of(**KINDS[kind]), from_kwargs("EDMPrecond", **KINDS[kind] | RANGE)
    got, meta = converted(dumped(tmp_path / "sfd.pkl", released(net, use_step_condition=False, num_steps=5, afs=False)))
    assert not got.knows_steps
    assert got.state_dict().keys() == plain_net.state_dict().keys()
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in got.state_dict().items())
    assert Sampler(**meta["sampler"]) == few_step(5, afs=False)
    assert "left out the step condition, which is neither trained nor used" in capsys.readouterr().err
    with pytest.raises(UserError, match="was distilled for 4 evaluations, got 2"):
        open_models(tmp_path / "sfd.safetensors", "student", steps=2)


@pytest.mark.parametrize("protocol", [2, 3, 5])
def test_every_protocol_and_the_net_by_itself(protocol, tmp_path):
    net = student_of(**SONG | {"channel_mult": [1], "num_blocks": 1, "attn_resolutions": []})
    for content in (released(net), released(net)["model"]):
        got, _ = converted(dumped(tmp_path / "net.pkl", content, protocol))
        assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in got.state_dict().items())
        assert got.kwargs["resample_filter"] == [1, 1]  # nothing is resampled


SMALL = ADM | {"channel_mult": [1], "attn_resolutions": []}


@pytest.fixture(scope="module")
def small():
    return student_of(**SMALL)


def time_uniform(n, rho):
    """SFD's get_schedule: VP with t = 1 at 80 and 0.001 at 0.006, uniform in t^(1/rho)."""
    low, high = math.log(0.006**2 + 1), math.log(80.0**2 + 1)
    beta_d = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    beta_min = high - 0.5 * beta_d
    times = [(1 + i / (n - 1) * (1e-3 ** (1 / rho) - 1)) ** rho for i in range(n)]
    return [math.sqrt(math.exp(0.5 * beta_d * t**2 + beta_min * t) - 1) for t in times]


@pytest.mark.parametrize(
    ("told", "levels"),
    [
        ({"schedule_rho": 5.0}, polynomial(4, 5.0)),
        ({"schedule_type": "logsnr"}, [math.exp(math.log(80) + i / 3 * (math.log(0.006) - math.log(80))) for i in range(4)]),
        ({"schedule_type": "time_uniform", "schedule_rho": 2}, time_uniform(4, 2)),
    ],
)
def test_every_schedule_is_the_released_one(told, levels, small, tmp_path):
    """Another number of steps follows the same law; where that is not known, there is no other."""
    _, meta = converted(dumped(tmp_path / "net.pkl", released(small, **told)))
    assert meta["sampler"]["sigmas"] == pytest.approx(levels, rel=1e-9)
    assert (meta["sampler"]["solver"], meta["sampler"]["afs"], meta["sampler"]["step_condition"]) == ("euler", True, 4)
    if "schedule_type" not in told:
        other = open_models(tmp_path / "net.safetensors", "student", steps=4)[0].sampler
        assert other.sigmas == pytest.approx(polynomial(6, 5.0), rel=1e-9)
        assert Sampler(**json.loads(json.dumps(other.to_dict()))) == other
    else:
        assert open_models(tmp_path / "net.safetensors", "student", steps=2)[0].sampler.nfe == 2
        with pytest.raises(UserError, match="follow no Karras schedule: it is sampled with NFE 2 only, got 4"):
            open_models(tmp_path / "net.safetensors", "student", steps=4)


def test_a_converted_student_is_sampled_from_the_command_line(small, tmp_path, capsys):
    converted(dumped(tmp_path / "net.pkl", released(small)))
    sample.main([str(tmp_path / "net.safetensors"), "--seeds", "0-3", "--out", str(tmp_path / "x.npz"), "--device", "cpu"])
    assert "by the student" in (said := capsys.readouterr().err)
    assert "euler, NFE 2" in said
    assert np.load(tmp_path / "x.npz")["images"].shape[0] == 4


def test_what_is_not_understood_is_one_sentence(small, tmp_path):
    def refusal(change=None, *options, **told):
        content = released(small, **told)
        if change is not None:
            change(content["model"])
        return refused(dumped(tmp_path / "net.pkl", content), *options)

    block = lambda net: net.model.enc["8x8_block0"]  # noqa: E731
    assert "its net has no training_kwargs" in refusal(lambda net: vars(net).pop("training_kwargs"))
    assert "the schedule 'discrete': wanted polynomial, logsnr or time_uniform" in refusal(schedule_type="discrete")
    assert "a student of 'ldm' with the guidance 'cfg'" in refusal(model_source="ldm", guidance_type="cfg")
    assert "num_steps = 2: wanted 3 to 1000" in refusal(num_steps=2)
    assert "num_steps = 'many'" in refusal(num_steps="many")
    assert "afs = None" in refusal(afs=None)
    assert "schedule_rho = 0, which make no schedule" in refusal(schedule_rho=0)
    assert "which make no schedule" in refusal(sigma_min=90.0)
    assert "8x8_block0 has skip_scale = 0.5, wanted 1" in refusal(lambda net: vars(block(net)).update(skip_scale=0.5))
    assert "8x8_block0.norm0 has eps = 0.001, wanted 1e-05" in refusal(lambda net: vars(block(net).norm0).update(eps=1e-3))
    assert "model.map_steps.waves has endpoint = True, wanted False" in refusal(lambda net: vars(net.model.map_step).update(endpoint=True))
    fourier = lambda net: net.model._modules.update(map_step=plain("FourierEmbedding"))  # noqa: E731
    assert "has a FourierEmbedding as model.map_steps.waves" in refusal(fourier)
    assert "a DhariwalUNet without some of EDM's layers" in refusal(lambda net: net.model._modules.pop("map_layer0"))
    assert "of another architecture: it misses" in refusal(lambda net: net.model._modules.pop("map_step_layer1"))
    assert "does not say" in refusal(lambda net: vars(net).pop("training_kwargs"))
    other = lambda net: net.model._modules.update(more=plain("Attention"))  # noqa: E731
    assert "asks for models.networks_edm.Attention, which no network needs: refused" in refusal(other)
    latent = dumped(tmp_path / "sd.pkl", {"model": plain("CFGPrecond")})
    assert "student of a latent diffusion model (CFGPrecond), wanted one of an EDM net (EDMPrecond)" in refused(latent)


def test_hints_that_contradict_a_student_are_refused(small, tmp_path):
    path = dumped(tmp_path / "net.pkl", released(small))
    assert "says itself how it is sampled (euler, NFE 2), and --one-step says 80: leave it out" in refused(path, "--one-step", "80")
    save_net(tmp_path / "vp.safetensors", from_kwargs("VPPrecond", **SMALL))
    hint = "--like", str(tmp_path / "vp.safetensors")
    assert "of the class 'EDMPrecond', and --like" in refused(path, *hint)
    save_net(tmp_path / "edm.safetensors", from_kwargs("EDMPrecond", **SMALL))
    assert "made with step_condition = True, and --like" in refused(path, "--like", str(tmp_path / "edm.safetensors"))
    save_net(tmp_path / "same.safetensors", small)
    assert converted(path, "--like", str(tmp_path / "same.safetensors"))[1]["sampler"]["step_condition"] == 4


def test_mutated_students_are_refused_or_converted(tmp_path):
    """Whatever is wrong with a file is a sentence."""
    net = student_of(**SONG | {"model_channels": 4, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [], "augment_dim": 2})
    path = dumped(tmp_path / "net.pkl", released(net))
    data, dice, sentences = path.read_bytes(), random.Random(1), set()
    tensors = [t.numpy().tobytes() for t in net.state_dict().values()]
    weights = {at for t in tensors if (start := data.find(t)) >= 0 for at in range(start, start + len(t))}
    places = [at for at in range(len(data)) if at not in weights]
    for _ in range(80):
        path.write_bytes(mutated(data, places, dice))
        try:
            read_net(path)
        except UserError as error:
            sentences.add(str(error).removeprefix(str(path)))
    assert len(sentences) > 10
    assert all(sentence.isprintable() for sentence in sentences)
