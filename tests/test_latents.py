"""Latents are what the VAE makes of each picture by hand, a data set like any other, and survive what may happen to a folder.

Pipelines are tiny, random and made here (diffusers_pipelines.py).
"""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

pytest.importorskip("diffusers")

import diffusers_pipelines
from killing import killed, needs_fork
from safetensors.torch import load_file, save_file

from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.convert import main as convert
from potstill.engine.data import vae
from potstill.engine.data.captions import read_prompts
from potstill.engine.data.images import data_variance, open_images
from potstill.engine.data.sampler import Stream
from potstill.engine.data.vae import VAE, check_vae, write_latents

CPU = torch.device("cpu")
# What libraries warn of while they import one another, and of where they are put together here.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(?!potstill)", "ignore::FutureWarning:(?!potstill)")


@pytest.fixture(scope="module")
def pipeline(folders, tmp_path_factory):
    """SD's, with a scaling that suits its random VAE."""
    path = shutil.copytree(folders("sd15"), tmp_path_factory.mktemp("scaled") / "sd15")
    return diffusers_pipelines.scaled(path, 3.5)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two class folders with 4 and 3 pictures, and a caption for each."""
    root = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (7, 2, 2, 3), np.uint8)
    for k, name in enumerate(["a/0", "a/1", "a/2", "a/3", "b/0", "b/1", "b/2"]):
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise[k].repeat(32, 0).repeat(32, 1)).save(f"{root / name}.png")
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))
    (root / "metadata.jsonl").write_text("".join(json.dumps({"file_name": name, "text": f"of {name}"}) + "\n" for name in names))
    return root


def pixels(pictures):
    """[7, 3, 8, 8] in [-1, 1], by Pillow."""
    images = [np.asarray(Image.open(path)) for path in sorted(pictures.rglob("*.png"))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def converted(pictures, pipeline, out, *more):
    convert(["latents", str(pictures), str(out), "--pipeline", str(pipeline), "--device", "cpu", *more])
    return open_images(out)


# Against the VAE itself


@torch.no_grad()
def by_hand(kind, net, x):
    """Latents of x, and what the pipeline shows of them, as it is written in the pipelines of diffusers 0.42."""
    config = net.config
    if kind in ("sd15", "sdxl", "dit", "pixart"):
        z = net.encode(x).latent_dist.mean * config.scaling_factor
        return z, net.decode(z / config.scaling_factor).sample
    if kind in ("sd3", "flux", "lumina2"):
        z = (net.encode(x).latent_dist.mean - config.shift_factor) * config.scaling_factor
        return z, net.decode(z / config.scaling_factor + config.shift_factor).sample
    if kind == "sana":
        z = net.encode(x).latent * config.scaling_factor
        return z, net.decode(z / config.scaling_factor).sample
    if kind in ("qwen", "wan"):
        mean, std = (torch.tensor(value).view(1, -1, 1, 1, 1) for value in (config.latents_mean, config.latents_std))
        z = (net.encode(x.unsqueeze(2)).latent_dist.mean - mean) / std
        shown = net.decode(z * std + mean).sample[:, :, 0]
        return (z[:, :, 0] if kind == "qwen" else z), shown
    from diffusers import Flux2Pipeline

    z = Flux2Pipeline._patchify_latents(net.encode(x).latent_dist.mean)
    mean, std = net.bn.running_mean.view(1, -1, 1, 1), torch.sqrt(net.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps)
    z = (z - mean) / std
    return z, net.decode(Flux2Pipeline._unpatchify_latents(z * std + mean)).sample


@pytest.mark.parametrize("kind", ["sd15", "sd3", "flux", "sana", "qwen", "wan", "flux2"])
def test_a_vae_encodes_and_decodes_as_its_pipeline(kind, folders):
    ours = VAE(folders(kind), CPU)
    if kind == "flux2":  # statistics that are not 0 and 1
        ours.net.bn.running_mean.normal_()
        ours.net.bn.running_var.uniform_(0.5, 2)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    z, shown = by_hand(kind, ours.net, x)
    torch.testing.assert_close(ours.encode(x), z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.decode(z), shown, rtol=1e-5, atol=1e-5)


def test_a_vae_with_statistics_and_a_scale_as_some_of_sdxls(folders, tmp_path):
    path = shutil.copytree(folders("sdxl"), tmp_path / "xl")
    config = path / "vae/config.json"
    more = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.5, 2.0, 0.5, 1.0], "scaling_factor": 0.5}
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    ours, x = VAE(path, CPU), torch.rand(1, 3, 8, 8)
    mean, std = (torch.tensor(more[f"latents_{name}"]).view(1, 4, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        z = (ours.net.encode(x).latent_dist.mean - mean) * 0.5 / std
        shown = ours.net.decode(z * std / 0.5 + mean).sample  # pipeline_stable_diffusion_xl.py
    torch.testing.assert_close(ours.encode(x), z)
    torch.testing.assert_close(ours.decode(z), shown)


@pytest.mark.parametrize(("bits", "dtype", "tolerance"), [("16", np.float16, 2e-3), ("32", np.float32, 1e-5)])
def test_a_converted_set_holds_the_mean_of_the_posterior(bits, dtype, tolerance, pictures, pipeline, tmp_path, capsys):
    found = converted(pictures, pipeline, tmp_path / "latents", "--bits", bits, "--batch", "3")
    wanted, _ = by_hand("sd15", VAE(pipeline, CPU).net, pixels(pictures))
    assert (len(found), found.shape, found.dtype, found.latent, found.label_dim, found.classes) == (
        7,
        (4, 8, 8),
        dtype,
        True,
        2,
        ["a", "b"],
    )
    assert found.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    for i in range(7):
        assert found.read(i).dtype == dtype
        np.testing.assert_allclose(found.read(i), wanted[i], rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(found.pixels(), np.stack([found.read(i) for i in range(7)]))
    assert "7 4x8x8 latents, 2 classes, captions" in capsys.readouterr().out
    assert read_prompts(tmp_path / "latents") == [f"of {path.relative_to(pictures)}" for path in sorted(pictures.rglob("*.png"))]


def test_grey_pictures_without_labels_or_captions(pipeline, tmp_path):
    pipeline = diffusers_pipelines.scaled(shutil.copytree(pipeline, tmp_path / "sd15"), 14)  # of a digit's 8x8 pixels one latent is left
    write_latents(tmp_path / "latents", open_images("digits", labelled=False).thinned(5), pipeline, CPU)
    found = open_images(tmp_path / "latents")
    grey = torch.from_numpy(np.rint(load_digits().images[[0, 359, 718, 1078, 1437]] * 255 / 16)).float()[:, None] / 127.5 - 1
    wanted, _ = by_hand("sd15", VAE(pipeline, CPU).net, grey.repeat(1, 3, 1, 1))
    np.testing.assert_allclose(found.pixels(), wanted, rtol=2e-3, atol=2e-3)
    assert found.labels is None and not (tmp_path / "latents/captions.jsonl").exists()
    with pytest.raises(UserError, match=r"has no captions\.jsonl"):
        read_prompts(tmp_path / "latents")


# As a data set


@pytest.fixture
def latents(pictures, pipeline, tmp_path):
    return converted(pictures, pipeline, tmp_path / "latents", "--bits", "32")


def test_a_stream_gives_latents_as_they_are(latents):
    everything = latents.pixels()
    for memory, workers in ((2**30, 0), (0, 0), (0, 1)):
        stream = Stream(open_images(latents.source.path), batch=4, seed=1, memory=memory, workers=workers)
        for step in range(3):
            x, labels = stream.at(step)
            chosen = stream.indices(step)
            assert x.dtype == torch.float32 and torch.equal(x, torch.from_numpy(everything[chosen]))
            assert torch.equal(labels, torch.eye(2)[latents.labels[chosen]])
            x.zero_()  # the batch is the caller's own
        stream.close()
    assert np.abs(latents.pixels()).max() > 0


def test_16_bit_latents_come_as_float32(pictures, pipeline, tmp_path):
    found = converted(pictures, pipeline, tmp_path / "half")
    x, _ = Stream(found, batch=7).at(0)
    assert x.dtype == torch.float32 and np.array_equal(np.sort(x.numpy(), None), np.sort(found.pixels().astype(np.float32), None))


def test_shares_variance_and_fingerprint(latents, pictures, pipeline, tmp_path):
    part = latents.subset([1])
    assert len(part) == 3 and np.array_equal(part.read(1), latents.read(5)) and part.latent
    everything = latents.pixels().astype(np.float64)
    assert data_variance(latents) == pytest.approx(everything.var(0).mean(), rel=1e-6)
    again = converted(pictures, pipeline, tmp_path / "again", "--bits", "32")
    assert again.fingerprint() == latents.fingerprint() and json.dumps(latents.fingerprint())
    assert converted(pictures, pipeline, tmp_path / "half").fingerprint() != latents.fingerprint()
    copy = pickle.loads(pickle.dumps(latents))
    assert np.array_equal(copy.read(3), latents.read(3))


def test_unlabelled_and_the_resolution_that_is_wanted(latents):
    path = latents.source.path
    assert open_images(path, labelled=False).labels is None
    assert open_images(path, resolution=8).resolution == 8
    with pytest.raises(UserError, match=r"holds 4x8x8 latents, wanted 64x64: leave data\.resolution out"):
        open_images(path, resolution=64)


def test_what_latents_cannot_do(latents, pipeline, tmp_path):
    with pytest.raises(UserError, match=r"set data\.flips=false"):
        Stream(latents, batch=2, flips=True)
    with pytest.raises(UserError, match="holds latents, wanted pictures"):
        convert(["images", latents.source.path, str(tmp_path / "out.zip"), "--resolution", "8"])
    with pytest.raises(UserError, match="holds latents already"):
        converted(latents.source.path, pipeline, tmp_path / "twice")


def foreign(path, shapes, **more):
    path.mkdir()
    for k, shape in enumerate(shapes):
        save_file({"latents": torch.randn(shape, generator=torch.Generator().manual_seed(k))} | more, path / f"part{k}.safetensors")
    return path


def test_latents_that_somebody_else_has_made(tmp_path):
    path = foreign(tmp_path / "theirs", [(3, 4, 6, 6), (5, 4, 6, 6)])
    found = open_images(path)
    tensors = [load_file(path / f"part{k}.safetensors")["latents"] for k in range(2)]
    assert len(found) == 8 and np.array_equal(found.pixels(), torch.cat(tensors))
    labelled = open_images(foreign(tmp_path / "labelled", [(3, 4, 6, 6)], labels=torch.tensor([2, 0, 1])))
    assert labelled.labels.tolist() == [2, 0, 1] and labelled.label_dim == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t * 5.5, "standard deviation of 5.[0-9]*, wanted 0.25 to 2: was the VAE's scaling applied?"),
        (lambda t: t * 0.18, "standard deviation of 0.1[0-9]*, wanted"),
        (lambda t: t * torch.nan, "holds numbers that are not finite"),
        (lambda t: t.bfloat16(), "wanted .* in float16 or float32"),
        (lambda t: t[0, 0], "wanted .* in float16 or float32"),
    ],
)
def test_latents_that_no_net_was_trained_on(change, said, tmp_path):
    path = tmp_path / "theirs"
    path.mkdir()
    save_file({"latents": change(torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))).contiguous()}, path / "x.safetensors")
    with pytest.raises(UserError, match=said) as error:
        open_images(path)
    assert "\n" not in str(error.value)


def test_two_sizes_in_one_set(tmp_path):
    with pytest.raises(UserError, match=r"latent 3 of .* is \[4, 5, 5\] float32, wanted 4x6x6 latents float32"):
        open_images(foreign(tmp_path / "theirs", [(3, 4, 6, 6), (2, 4, 5, 5)]))


# A folder that is being written


def test_a_vae_whose_scaling_is_missing_is_named_before_anything_is_written(pictures, folders, tmp_path):
    path = diffusers_pipelines.scaled(shutil.copytree(folders("sd15"), tmp_path / "sd15"), 1e-3)
    with pytest.raises(UserError, match=r"standard deviation of .*was the VAE's scaling applied"):
        converted(pictures, path, tmp_path / "latents")
    assert not list((tmp_path / "latents").glob("*.safetensors"))


@needs_fork
def test_latents_that_were_killed_become_the_same_bytes(pictures, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "SHARD_BYTES", 2 * 4 * 8 * 8 * 2)  # two latents
    killed(lambda: converted(pictures, pipeline, tmp_path / "killed"), 3)
    assert {"00000.safetensors", "00001.safetensors", "00002.safetensors.part"} <= files_of(tmp_path / "killed").keys()
    with pytest.raises(UserError, match="is unfinished, 2 of its 4 shards are missing"):
        open_images(tmp_path / "killed")
    kept = os.stat(tmp_path / "killed/00001.safetensors").st_mtime_ns
    for out in ("killed", "whole"):
        converted(pictures, pipeline, tmp_path / out)
    whole, found = files_of(tmp_path / "whole"), open_images(tmp_path / "whole")
    assert found.labels.tolist() == [0, 0, 0, 0, 1, 1, 1] and len(found.pixels()) == 7
    assert len(whole) == 6 and files_of(tmp_path / "killed") == whole
    assert os.stat(tmp_path / "killed/00001.safetensors").st_mtime_ns == kept


def test_a_damaged_shard_is_named_and_made_again(latents, pictures, pipeline):
    path, whole = Path(latents.source.path) / "00000.safetensors", latents.pixels()
    good = path.read_bytes()
    for bad in (good[:-5], good[:-1] + bytes([good[-1] ^ 1])):
        path.write_bytes(bad)
        with pytest.raises(Damaged, match=r"00000\.safetensors is no shard as it was written .*: remove it"):
            open_images(latents.source.path).pixels()
        path.unlink()
        with pytest.raises(UserError, match="is unfinished"):
            open_images(latents.source.path)
        assert np.array_equal(converted(pictures, pipeline, latents.source.path, "--bits", "32").pixels(), whole)
        assert path.read_bytes() == good


def test_a_folder_of_something_else_is_refused(latents, pictures, pipeline, tmp_path):
    out = latents.source.path
    other = diffusers_pipelines.scaled(shutil.copytree(pipeline, tmp_path / "other"), 3.6)
    for said, source, folder, more in (
        ("another vae", pictures, other, ["--bits", "32"]),
        ("another dtype", pictures, pipeline, []),
        ("another number", "digits", pipeline, ["--bits", "32"]),
        ("another images", pictures, pipeline, ["--bits", "32", "--unlabelled"]),
    ):
        with pytest.raises(UserError, match=rf"holds latents of {said}"):
            converted(source, folder, out, *more)
    with pytest.raises(UserError, match="has no VAE"):
        converted(pictures, diffusers_pipelines.folder("unet", tmp_path / "unet"), tmp_path / "none")


def test_latents_of_another_vae(latents, pipeline, tmp_path):
    check_vae(latents, pipeline)
    check_vae(open_images("digits"), pipeline)
    check_vae(open_images(foreign(tmp_path / "theirs", [(3, 4, 6, 6)])), pipeline)
    with pytest.raises(UserError, match=r"latents of another VAE than that of .*other"):
        check_vae(latents, diffusers_pipelines.scaled(shutil.copytree(pipeline, tmp_path / "other"), 3.6))


def test_a_cache_of_prompts_is_no_data_set(pipeline, tmp_path):
    from potstill.engine.data.embeddings import write_embeddings

    write_embeddings(tmp_path / "cache", ["a"], pipeline, CPU)
    with pytest.raises(UserError, match="holds prompts, wanted latents"):
        open_images(tmp_path / "cache")
