"""Runs of EDM2's nets on its latents: what is shown of them, what weight files say, what is refused before anything begins."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_convert_edm2 import tiny2
from test_moments import final, moments, zipped

from potstill.engine import train
from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.config.tree import load
from potstill.engine.config.unused import sentence
from potstill.engine.jobs.build import build_net
from potstill.engine.models import decoding
from potstill.engine.models.decoding import decoder_of
from potstill.engine.models.generate import to_uint8
from potstill.engine.models.weights import load_net, read_metadata, save_net
from potstill.engine.nets.edm2_latents import ENCODER
from potstill.engine.sample import main as sample

CPU = torch.device("cpu")
NET = [
    "net.precond=EDM2Precond", "net.model_channels=4", "net.channel_mult=[1,2]", "net.attn_resolutions=[4]", "net.channels_per_head=4",
    "net.logvar_channels=6",
]  # fmt: skip


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Of a latent of 8x8 one picture of 64x64, from a random AutoencoderKL."""
    pytest.importorskip("diffusers")
    import diffusers_pipelines

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae") / "sd-vae-ft-mse"
    diffusers_pipelines.vae().save_pretrained(path)
    return path


@pytest.fixture
def latents(tmp_path):
    return zipped(tmp_path / "latents.zip", np.tile(moments(), (1, 1, 2, 2)))


@pytest.fixture
def teacher(tmp_path):
    net = tiny2()
    with torch.no_grad():
        net.unet.gain.fill_(1.0)
    save_net(tmp_path / "teacher.safetensors", net, encoder=ENCODER, license="CC BY-NC-SA 4.0")
    return tmp_path / "teacher.safetensors"


def run(tmp_path, latents, *more):
    small = ["train.kimg=0.016", "train.batch=8", "eval.n=8", "eval.batch=8", "data.flips=false", "device=cpu"]
    train.main(["digits", f"run_dir={tmp_path}/run", f"data.path={latents}", *small, *more])
    return tmp_path / "run"


# Settings


def test_the_settings_of_a_net_of_edm2s_are_its_arguments():
    cfg = load("digits", [*NET, "net.clip_act=128", "net.res_balance=0.4", "net.resample_filter=[1,3,3,1]", "net.dropout=0.1"])
    net = build_net(cfg.net, 8, 4, 3)
    assert (net.precond, net.kwargs["logvar_channels"], net.unet.enc["8x8_block0"].style.clip_act) == ("EDM2Precond", 6, 128)
    style = net.unet.enc["4x4_down"].style
    assert (style.resample_filter, style.channels_per_head, style.dropout, style.res_balance) == ((1, 3, 3, 1), 4, 0.1, 0.4)
    with pytest.raises(UserError, match=r"net: EDM2UNet does not take these keyword arguments: .*'augment_dim'"):
        build_net(load("digits", [*NET, "net.augment_dim=9"]).net, 8, 4, 3)
    with pytest.raises(UserError, match=r"net: SongUNet does not take these keyword arguments: .*'clip_act'"):
        build_net(load("digits", ["net.clip_act=128"]).net, 8, 4, 3)
    for wrong in ("net.clip_act=0", "net.res_balance=1.5", "net.channels_per_head=0", "data.channels=0", "teacher.vae=''"):
        with pytest.raises(UserError):
            load("digits", [wrong])


def test_settings_that_do_nothing_are_named(teacher):
    cfg = load("digits", [*NET, "net.model_type=DhariwalUNet", "teacher.vae=x"])
    net = build_net(cfg.net, 8, 1, 3)
    assert "net.model_type (net.precond=EDM2Precond)" in sentence(cfg, net)
    assert "teacher.vae (the teacher's samples are pictures)" in sentence(cfg, net)
    same = load("digits", [*NET, "net.num_blocks=1", f"teacher.checkpoint={teacher}", "net.concat_balance=0.5"])
    assert "is another" not in sentence(same, load_net(teacher)[0])
    other = load("digits", [*NET, "net.num_blocks=1", f"teacher.checkpoint={teacher}", "net.concat_balance=0.4"])
    assert f"net.concat_balance (the net in {teacher} is another)" in sentence(other, load_net(teacher)[0])


def test_a_rehearsal_has_latents_of_that_many_channels(capsys):
    train.main(["digits", "rehearse=true", "data.path=latents.zip", "data.resolution=8", "data.channels=4", *NET])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["parameters"] == sum(p.numel() for p in tiny2(label_dim=1000, num_blocks=1).parameters())


# Runs


def test_a_run_shows_latents_by_its_vae_and_its_files_say_what_they_are(tmp_path, latents, teacher, vae, capsys):
    folder = run(tmp_path, latents, f"teacher.checkpoint={teacher}", f"teacher.vae={vae}")
    metadata = read_metadata(folder / "student.safetensors")
    assert metadata["encoder"] == ENCODER and metadata["license"] == "CC BY-NC-SA 4.0"
    sample([str(folder), "--out", str(tmp_path / "a.npz"), "--seeds", "0-3"])
    assert np.load(tmp_path / "a.npz")["images"].shape == (4, 64, 64, 3)
    said = capsys.readouterr()
    assert "no VAE decodes" not in said.err and "FD " in said.out
    net, _ = load_net(folder / "student.safetensors")
    assert net.shape == (4, 8, 8)


def test_without_a_vae_three_channels_are_shown(tmp_path, latents, capsys):
    folder = run(tmp_path, latents, *NET, "teacher.train.kimg=0.016", "teacher.train.batch=8")
    said = capsys.readouterr()
    assert "no VAE decodes these latents (teacher.vae): three of their channels are shown" in said.err
    assert "FD " in said.out
    assert read_metadata(folder / "teacher.safetensors")["encoder"] == read_metadata(folder / "student.safetensors")["encoder"] == ENCODER
    sample([str(folder), "--out", str(tmp_path / "a.npz"), "--seeds", "0-3"])
    assert np.load(tmp_path / "a.npz")["images"].shape == (4, 8, 8, 4)


def test_what_does_not_go_together_is_refused_before_the_run(tmp_path, latents, teacher):
    with pytest.raises(UserError, match=r"eval.features=inception is of pictures, .* set teacher.vae, or eval.features=pixels"):
        run(tmp_path, latents, f"teacher.checkpoint={teacher}", "eval.features=inception")
    with pytest.raises(UserError, match=r"latents have 4 channels|4 channels, data.channels wants 16"):
        run(tmp_path, latents, f"teacher.checkpoint={teacher}", "data.channels=16")
    with pytest.raises(UserError, match=r"(?s)thing is missing:.*VAE: nothing at .*no-such-vae"):
        run(tmp_path, latents, f"teacher.checkpoint={teacher}", f"teacher.vae={tmp_path}/no-such-vae")
    save_net(teacher, tiny2(), encoder=ENCODER | {"scale": [1.0] * 4})
    with pytest.raises(UserError, match="was trained on latents of another scale than EDM2's"):
        run(tmp_path, latents, f"teacher.checkpoint={teacher}")
    assert not (tmp_path / "run").exists()


def test_latents_that_are_not_square_are_refused_before_a_teacher_is_trained_for_them(tmp_path):
    wide = zipped(tmp_path / "wide.zip", np.tile(moments(), (1, 1, 1, 2)))
    with pytest.raises(UserError, match=r"nets for squares \[C, H, H\], data wide has \[4, 4, 8\]"):
        run(tmp_path, wide, *NET, "teacher.train.kimg=0.016", "teacher.train.batch=8")
    assert not (tmp_path / "run").exists()


# Decoding


def test_the_vae_gives_pictures_between_0_and_1(vae):
    """By hand, with diffusers' own AutoencoderKL, as training/encoders.py of EDM2's code decodes."""
    from diffusers import AutoencoderKL

    x = torch.from_numpy(final(moments(2), 0)).float()
    scale, bias = torch.tensor(ENCODER["scale"]).view(4, 1, 1), torch.tensor(ENCODER["bias"]).view(4, 1, 1)
    with torch.no_grad():
        pixels = AutoencoderKL.from_pretrained(vae).decode((x - bias) / scale).sample.clamp(0, 1).mul(255)
    decode = decoder_of(str(vae), {}, CPU)
    assert decode is not None
    difference = to_uint8(decode(x)).float() - pixels.to(torch.uint8).float()
    assert difference.abs().max() <= 1 and difference.abs().mean() < 1e-3  # floats on the edge of two bytes
    assert pixels.std() > 0
    other = decoder_of(str(vae), {"encoder": ENCODER | {"scale": [1.0] * 4, "bias": [0.0] * 4}}, CPU)
    assert other is not None and not torch.equal(other(x), decode(x))


def test_a_vae_that_is_not_here_decodes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "cached", lambda name: None)
    assert decoder_of(None, {"encoder": ENCODER}, CPU) is None and decoder_of(None, {}, CPU) is None
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="holds 'AutoencoderTiny', wanted diffusers' AutoencoderKL"):
        decoder_of(str(tmp_path), {}, CPU)


@pytest.mark.parametrize(
    "encoder", [3, {"class": 1}, {"scale": [1.0] * 4}, {"scale": [0.0] * 4, "bias": [0.0] * 4}, {"scale": "a", "bias": "b"}]
)
def test_a_weight_file_with_an_encoder_that_is_none_is_damaged(encoder, tmp_path):
    save_net(tmp_path / "a.safetensors", tiny2(), encoder=encoder)
    with pytest.raises(Damaged):
        load_net(tmp_path / "a.safetensors")
