"""EDM2's latents zips: every step draws its own latents from the stored moments, the same ones whoever reads them."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch

from potstill.engine.common.errors import UserError
from potstill.engine.data.images import data_variance, open_images
from potstill.engine.data.sampler import Stream
from potstill.engine.jobs.students import class_means
from potstill.engine.nets.edm2_latents import STABILITY, decoded

N, SIDE = 12, 4
RAW_MEAN, RAW_STD = np.array([5.81, 3.25, 0.12, -2.15]), np.array([4.17, 4.62, 3.71, 3.28])  # of EDM2's code (training/encoders.py)


def moments(n=N, dtype=np.float32, deviation=1.0):
    """[n, 8, 4, 4] of about the size of Stable Diffusion's, deviations after the means."""
    draw = np.random.default_rng(0)
    mean = draw.normal(size=(n, 4, SIDE, SIDE)) * RAW_STD[:, None, None] + RAW_MEAN[:, None, None]
    return np.concatenate([mean, draw.uniform(0.2, 0.6, (n, 4, SIDE, SIDE)) * deviation], 1).astype(dtype)


def npy(array, **how):
    out = io.BytesIO()
    np.lib.format.write_array(out, array, **how)
    return out.getvalue()


def zipped(path, arrays, labels=True, **members):
    """As dataset_tool.py of EDM2's code writes it: 00000/img-mean-std-00000000.npy, stored."""
    names = [f"00000/img-mean-std-{k:08d}.npy" for k in range(len(arrays))]
    with zipfile.ZipFile(path, "w") as archive:
        for name, one in zip(names, arrays, strict=True):
            archive.writestr(name, one if isinstance(one, bytes) else npy(one))
        pairs = [[name, k % 3] for k, name in enumerate(names)] if labels else None
        archive.writestr("dataset.json", json.dumps({"labels": pairs}))
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def latents(tmp_path):
    return zipped(tmp_path / "img512-sd.zip", moments())


def final(raw, noise):
    """In float64, by the formulas of EDM2's code, of what stands in a zip."""
    mean, std = np.split(raw.astype(np.float64), 2, axis=-3)
    scale = (0.5 / RAW_STD)[:, None, None]
    return (mean + std * noise) * scale - (RAW_MEAN * 0.5 / RAW_STD)[:, None, None]


def test_a_latent_that_was_not_looked_at_first_may_not_be_nan(tmp_path, monkeypatch):
    monkeypatch.setattr("potstill.engine.data.latents.LOOKED_AT", 2)
    arrays = list(moments())
    arrays[3] = arrays[3] * np.float32(np.nan)
    images = open_images(str(zipped(tmp_path / "img512-sd.zip", arrays)))
    images.read(2)
    with pytest.raises(UserError, match=r"00000003\.npy.* holds numbers that are not finite: encode its picture again"):
        images.read(3)


def test_a_zip_is_a_labelled_set_of_half_its_channels(latents):
    found = open_images(latents)
    assert (len(found), found.shape, found.channels, found.resolution, found.latent, found.moments) == (
        N,
        (4, SIDE, SIDE),
        4,
        SIDE,
        True,
        True,
    )
    assert found.labels.tolist() == [0, 1, 2] * 4 and found.label_dim == 3
    assert str(found) == "img512-sd: 12 4x4x4 latents, 3 classes"
    assert found.nbytes == N * 8 * SIDE * SIDE * 4 == found.pixels().nbytes
    np.testing.assert_array_equal(found.pixels(), moments())
    np.testing.assert_allclose(found.seen(torch.from_numpy(found.read(3))), final(moments()[3], 0), atol=1e-6)
    assert open_images(latents, resolution=SIDE, label_dim=5).label_dim == 5
    part = pickle.loads(pickle.dumps(found.subset([1])))
    assert len(part) == 4 and part.moments and np.array_equal(part.read(1), moments()[4])


def test_every_step_draws_anew_by_the_formula(latents):
    found = open_images(latents)
    stream = Stream(found, batch=N, seed=3)
    drawn = {}
    for step in range(400):
        x, labels = stream.at(step)
        assert x.shape == (N, 4, SIDE, SIDE) and x.dtype == torch.float32
        for i, one, label in zip(stream.indices(step).tolist(), x, labels, strict=True):
            drawn.setdefault(i, []).append(one.double().numpy())
            assert label.argmax() == found.labels[i]
    scale = (0.5 / RAW_STD)[:, None, None]
    for i, raw in enumerate(moments().astype(np.float64)):
        noise = (np.stack(drawn[i]) - final(raw, 0)) / (raw[4:] * scale)
        assert len(np.unique(np.stack(drawn[i])[:, 0, 0, 0])) > 390  # of 24 bits two may be alike
        # of 400 draws of 64 numbers: mean 0 and variance 1 within 4.5 deviations, 1/sqrt(25600) and sqrt(2/25600)
        assert abs(noise.mean()) < 4.5 / 160 and abs(noise.var() - 1) < 4.5 * np.sqrt(2) / 160


def test_neither_workers_nor_ranks_nor_a_resumed_run_change_a_number(latents):
    whole = [Stream(open_images(latents), batch=8, seed=1).at(step) for step in range(5)]
    for memory, workers in ((2**30, 0), (0, 0), (0, 1), (0, 2)):
        for start in (0, 3):
            stream = Stream(open_images(latents), batch=8, seed=1, memory=memory, workers=workers)
            for step in range(start, 5):
                x, labels = stream.at(step)
                assert torch.equal(x, whole[step][0]) and torch.equal(labels, whole[step][1])
            stream.close()
    for windows in ([slice(0, 4), slice(4, 8)], [slice(0, 8, 2), slice(1, 8, 2)]):
        for window in windows:
            stream = Stream(open_images(latents), batch=8, seed=1, window=window)
            assert all(torch.equal(stream.at(step)[0], whole[step][0][window]) for step in range(5))
    other = Stream(open_images(latents), batch=8, seed=2)
    assert not any(torch.equal(other.at(step)[0], whole[step][0]) for step in range(5))


def test_what_is_known_of_the_set(latents, tmp_path):
    found = open_images(latents)
    many = Stream(found, batch=N, seed=0)
    drawn = torch.cat([many.at(step)[0] for step in range(2000)]).double()
    # what the spread over images is, with that of the draws: 24,000 of them
    assert data_variance(found) == pytest.approx(float(drawn.var(0, correction=0).mean()), rel=0.01)
    assert 0.2 < data_variance(found) < 0.3
    again = zipped(tmp_path / "again.zip", moments())
    assert open_images(again).fingerprint() == found.fingerprint() and json.dumps(found.fingerprint())
    assert open_images(zipped(again, moments(deviation=1.1))).fingerprint() != found.fingerprint()
    means = class_means(found, 3)
    np.testing.assert_allclose(means[1], final(moments()[1::3], 0).mean(0).reshape(-1), atol=1e-5)


def test_a_folder_unlabelled_half_precision_and_columns_first(tmp_path):
    for k, one in enumerate(moments(dtype=np.float16)):
        (tmp_path / f"{k:03d}.npy").write_bytes(npy(np.asfortranarray(one)))
    found = open_images(tmp_path)
    assert found.labels is None and found.dtype == np.float16
    np.testing.assert_array_equal(found.pixels(), moments(dtype=np.float16))
    x, labels = Stream(found, batch=5).at(0)
    assert x.dtype == torch.float32 and labels is None


def test_arrays_of_other_channels_are_latents_as_they_are(tmp_path):
    latents = final(moments(), 0).astype(np.float32)
    found = open_images(zipped(tmp_path / "final.zip", latents))
    assert (found.shape, found.latent, found.moments) == ((4, SIDE, SIDE), True, False)
    stream = Stream(found, batch=5, seed=1)
    assert torch.equal(stream.at(2)[0], torch.from_numpy(latents)[stream.indices(2)])


def test_pictures_win_over_arrays_beside_them(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "features.npy").write_bytes(npy(moments()[0]))
    assert open_images(tmp_path).shape == (3, 8, 8)


def test_flips_and_pictures_are_refused(latents, tmp_path):
    with pytest.raises(UserError, match=r"set data\.flips=false"):
        Stream(open_images(latents), batch=2, flips=True)
    with pytest.raises(UserError, match="holds latents, wanted pictures"):
        open_images(latents).source.picture(0)


def broken(change):
    arrays = list(moments())
    arrays[2] = change(arrays[2])
    return arrays


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (broken(lambda a: a[:, :2]), r"00000002.npy has 384 bytes, and .* 640: wanted latents of one size and type"),
        (broken(lambda a: a.reshape(4, 8, 4)), r"00000002.npy is \[4, 8, 4\] float32, wanted \[8, 4, 4\] float32 as "),
        (broken(lambda a: npy(a)[:-4] + b"\x93NUM"), None),  # other numbers are numbers
        (broken(lambda a: b"\x93NUMPX" + npy(a)[6:]), r"00000002.npy is no complete .npy"),
        (broken(lambda a: npy(a).replace(b"(8, 4, 4)", b"(8, 4, 9)")), r"claims 1,152 bytes of float32, the array has 512"),
        (broken(lambda a: npy(a).replace(b"(8, 4, 4)", b"(8, 4, 4(")), r"00000002.npy is no complete .npy"),
        ([npy(np.array([{}], object), allow_pickle=True)] * 3, r"no complete .npy of plain numbers"),
        (moments() * 9, r"standard deviation of 5.\d*, wanted 0.25 to 2"),
        (moments() * 0 + np.float32(np.nan), r"00000000\.npy.* holds numbers that are not finite"),
        (-moments(), r"no means and deviations, some of which are below 0"),
        (moments().astype(np.float64), r"00000000.npy is \[8, 4, 4\] float64, wanted \[C, H, W\] in float16 or float32"),
        (moments()[:, 0], r"00000000.npy is \[4, 4\] float32, wanted \[C, H, W\]"),
    ],
)
def test_what_is_no_zip_of_latents_is_refused_in_one_sentence(arrays, said, tmp_path):
    path = zipped(tmp_path / "latents.zip", arrays)
    if said is None:
        assert len(open_images(path)) == N
        return
    with pytest.raises(UserError, match=said) as error:
        open_images(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_damage_is_noticed_by_the_zips_checksum(latents):
    data = bytearray(latents.read_bytes())
    at = data.index(moments()[7].tobytes())
    data[at + 5] ^= 1
    latents.write_bytes(data)
    with pytest.raises(UserError, match=r"00000007.npy is damaged \(its checksum differs\)"):
        open_images(latents)


class Halves:
    """Stands in for a VAE of diffusers: a picture from four channels."""

    device, dtype = torch.device("cpu"), torch.float32

    def decode(self, z, return_dict):
        return (z[:, :3] * 0.1,)


def test_pictures_are_decoded_as_in_edm2s_code():
    """(x - bias) / scale, by the VAE to [0, 1], 255 times that truncated."""
    from potstill.engine.models.generate import to_uint8

    raw = torch.from_numpy(moments())
    pictures = to_uint8(decoded(Halves(), torch.from_numpy(final(moments(), 0)).float()))
    wanted = (raw[:, :3].double() * 0.1).clamp(0, 1).mul(255)
    assert ((pictures.double() - wanted.floor()).abs() <= ((wanted - wanted.round()).abs() < 1e-3)).all()  # else float32 decides
    torch.testing.assert_close(STABILITY.inverse(STABILITY(raw[:, :4])), raw[:, :4], rtol=1e-5, atol=1e-5)


def test_what_stands_in_for_latents_that_are_not_there():
    found = open_images("synthetic:8x4x5x64")
    assert (len(found), found.shape, found.latent, found.moments, found.label_dim) == (64, (4, 8, 8), True, False, 5)
    assert 0.49 < found.pixels().std() < 0.51 and found.pixels().dtype == np.float32
    assert data_variance(found) == pytest.approx(0.25, rel=0.05)
