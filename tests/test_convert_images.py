"""potstill convert images: right pixels, EDM's layout, and nothing left behind when it fails."""

import io
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from potstill.engine.common.errors import UserError
from potstill.engine.convert import main
from potstill.engine.data.images import open_images
from potstill.engine.formats.images import dataset_zip, fitted, png


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(path, **options)


def convert(src, out, *options, resolution=8):
    main(["images", str(src), str(out), "--resolution", str(resolution), *options])
    return open_images(out)


def refused(src, out, *options, **kwargs):
    with pytest.raises(UserError) as caught:
        convert(src, out, *options, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    """Three pictures that fit already, in two classes."""
    for k, name in enumerate(("cat/1.png", "cat/2.png", "dog/1.png")):
        save(tmp_path / "src" / name, pixels(8, 8, 3, seed=k))
    return tmp_path / "src"


def test_what_fits_keeps_its_pixels(folder, tmp_path, capsys):
    images = convert(folder, tmp_path / "sub/out.zip")
    for k in range(3):
        np.testing.assert_array_equal(images.read(k), pixels(8, 8, 3, seed=k).transpose(2, 0, 1))
    assert images.labels.tolist() == [0, 0, 1]
    assert images.classes == ["cat", "dog"]
    printed = capsys.readouterr()
    assert "3 images 8x8 RGB" in printed.out
    assert "2 classes" in printed.out
    assert printed.err == ""
    again = convert(tmp_path / "sub/out.zip", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "sub/out.zip").read_bytes(), "the same images, the same file"
    assert again.classes == images.classes
    assert os.listdir(tmp_path / "sub") == ["out.zip"]


def test_the_layout_is_edms(folder, tmp_path):
    convert("synthetic:8x1x4x1003", tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert names[0] == "00000/img00000000.png"
        assert names[1002] == "00001/img00001002.png"
        assert names[1003] == "dataset.json"
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        metadata = json.loads(archive.read("dataset.json"))
        assert metadata == {"labels": [[name, k % 4] for k, name in enumerate(names[:-1])]}
        data = archive.read(names[5])
        assert Image.open(io.BytesIO(data)).mode == "L"
        assert len(png(Image.new("L", (64, 64)))) > 64 * 64, "not compressed"
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o644}, "readable once unpacked"
    convert(folder, tmp_path / "plain.zip", "--unlabelled")
    with zipfile.ZipFile(tmp_path / "plain.zip") as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}


def test_box_is_the_mean_over_areas(tmp_path):
    image = pixels(24, 32, 3)
    save(tmp_path / "src/a.png", image)
    expected = image[:, 4:28].reshape(8, 3, 8, 3, 3).mean((1, 3))
    got = convert(tmp_path / "src", tmp_path / "out.zip").read(0).transpose(1, 2, 0)
    assert np.abs(got - expected).max() <= 1, "rounded once along each axis"


def test_centre_crop_cuts_before_it_filters(tmp_path):
    """Lanczos looks beyond a pixel's area, but not at what was cut away."""
    image = np.zeros((16, 40, 3), np.uint8)
    image[:, 12:28] = 200
    save(tmp_path / "src/a.png", image)
    for name in ("box", "lanczos"):
        images = convert(tmp_path / "src", tmp_path / f"{name}.zip", "--filter", name)
        np.testing.assert_array_equal(images.read(0), 200)


def test_lanczos_is_pillows(tmp_path):
    image = pixels(32, 32, 3)
    save(tmp_path / "src/a.png", image)
    got = convert(tmp_path / "src", tmp_path / "out.zip", "--filter", "lanczos").read(0)
    expected = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(got, expected.transpose(2, 0, 1))


def test_fits():
    picture = Image.fromarray(np.full((4, 8, 3), 100, np.uint8))
    np.testing.assert_array_equal(np.asarray(fitted(picture, 4, "stretch")), 100)
    padded = np.asarray(fitted(picture, 8, "pad"))
    np.testing.assert_array_equal(padded[2:6], 100)
    np.testing.assert_array_equal(padded[:2], 0)
    np.testing.assert_array_equal(padded[6:], 0)
    small = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2) * 60)
    smooth = len(np.unique(np.asarray(fitted(small, 8, "centre-crop"))))
    blocks = len(np.unique(np.asarray(fitted(small, 8, "centre-crop", "box"))))
    assert blocks == 4
    assert smooth > 10, "enlarged by lanczos unless box is asked for"


def test_every_mode_becomes_rgb_or_grey(tmp_path):
    grey, colour = pixels(8, 8), pixels(8, 8, 3)
    src = tmp_path / "src"
    save(src / "a.png", grey)
    save(src / "b.png", Image.fromarray(grey).convert("1"))
    assert convert(src, tmp_path / "grey.zip").channels == 1
    save(src / "c.png", colour)
    glass = np.dstack([colour, np.zeros((8, 8), np.uint8)])
    save(src / "d.png", Image.fromarray(glass))
    save(src / "e.png", Image.fromarray(colour).quantize(256))
    save(src / "f.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)))
    save(src / "g.png", Image.fromarray(np.dstack([grey, np.full((8, 8), 255, np.uint8)])))
    images = convert(src, tmp_path / "rgb.zip")
    assert images.channels == 3
    assert len(images) == 7
    np.testing.assert_array_equal(images.read(0), np.stack([grey] * 3))
    np.testing.assert_array_equal(images.read(2), colour.transpose(2, 0, 1))
    np.testing.assert_array_equal(images.read(3), 255, "the transparent lies on white")
    np.testing.assert_array_equal(images.read(4), np.asarray(Image.open(src / "e.png").convert("RGB")).transpose(2, 0, 1))
    red, green, blue = images.read(5).astype(int)
    assert red.min() > 200
    assert green.max() < 60
    assert blue.max() < 60
    np.testing.assert_array_equal(images.read(6), np.stack([grey] * 3))


def test_sixteen_bits_are_refused(tmp_path):
    Image.new("I;16", (8, 8)).save(tmp_path / "a.png")
    assert "a.png is of mode I;16" in refused(tmp_path, tmp_path / "out.zip")


@pytest.mark.parametrize(("mark", "turned"), [(1, lambda x: x), (3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1))])
def test_pictures_are_turned_as_the_camera_was_held(tmp_path, mark, turned):
    image = np.repeat(np.repeat(pixels(2, 2, 3), 8, 0), 8, 1)
    exif = Image.Exif()
    exif[0x0112] = mark
    save(tmp_path / "src/a.png", image, exif=exif)
    got = convert(tmp_path / "src", tmp_path / "out.zip", resolution=16).read(0)
    np.testing.assert_array_equal(got.transpose(1, 2, 0), turned(image))


def test_npz_and_digits(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(3, 10, 16, 3), labels=[2, 0, 2])
    images = convert(tmp_path / "a.npz", tmp_path / "out.zip", resolution=4)
    assert images.labels.tolist() == [2, 0, 2]
    assert images.label_dim == 3
    digits = convert("digits", tmp_path / "digits.zip")
    np.testing.assert_array_equal(digits.pixels(), open_images("digits").pixels())
    assert digits.classes == list("0123456789")
    assert len(convert("digits", tmp_path / "few.zip", "--max-images", "5")) == 5


@pytest.fixture
def damaged(folder):
    whole = (folder / "cat/2.png").read_bytes()
    (folder / "cat/2.png").write_bytes(whole[:-40])
    (folder / "dog/9.png").write_bytes(b"")
    return folder


def test_a_damaged_picture_is_named_and_nothing_is_left_behind(damaged, tmp_path):
    assert "dog/9.png is damaged" in refused(damaged, tmp_path / "out.zip")
    (damaged / "dog/9.png").unlink()
    assert "cat/2.png is damaged" in refused(damaged, tmp_path / "out.zip")
    assert os.listdir(tmp_path) == ["src"]


def test_skip_corrupt_keeps_the_labels_of_the_others(damaged, tmp_path, capsys):
    images = convert(damaged, tmp_path / "out.zip", "--skip-corrupt")
    assert images.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(images.read(1), pixels(8, 8, 3, seed=2).transpose(2, 0, 1))
    printed = capsys.readouterr()
    assert "2 left out" in printed.out
    assert "cat/2.png" in printed.err
    assert "dog/9.png" in printed.err
    for name in ("cat/1.png", "dog/1.png"):
        (damaged / name).write_bytes(b"")
    assert "not one of the 4 pictures" in refused(damaged, tmp_path / "none.zip", "--skip-corrupt")
    assert not (tmp_path / "none.zip").exists()


def test_overwriting_needs_force(folder, tmp_path):
    (tmp_path / "out.zip").write_text("precious")
    assert "--force" in refused(folder, tmp_path / "out.zip")
    assert "no images" in refused(tmp_path / "gone", tmp_path / "out.zip", "--force")
    assert (tmp_path / "out.zip").read_text() == "precious"
    assert len(convert(folder, tmp_path / "out.zip", "--force")) == 3
    assert len(convert(tmp_path / "out.zip", tmp_path / "out.zip", "--force", resolution=4)) == 3, "onto itself"


def test_outputs_that_cannot_be(folder, tmp_path):
    assert "ends in .zip" in refused(folder, tmp_path / "out.tar")
    (tmp_path / "dir.zip").mkdir()
    assert "exists" in refused(folder, tmp_path / "dir.zip", "--force")
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(folder, tmp_path / "file/out.zip")
    assert "at least 1" in refused(folder, tmp_path / "out.zip", resolution=0)


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    assert "No space left on device" in refused(folder, tmp_path / "out.zip")
    assert os.listdir(tmp_path) == ["src"]


def test_ctrl_c_leaves_nothing(tmp_path):
    def stopped():
        with dataset_zip(tmp_path / "out.zip") as writer:
            writer.add(png(Image.fromarray(pixels(4, 4))), 0)
            assert len(os.listdir(tmp_path)) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert os.listdir(tmp_path) == []


def test_names_inside_a_zip_never_become_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../../up.png", png(Image.fromarray(pixels(8, 8))))
        archive.writestr("/tmp/abs.png", png(Image.fromarray(pixels(8, 8))))
    assert len(convert(tmp_path / "evil.zip", tmp_path / "out.zip")) == 2
    assert sorted(os.listdir(tmp_path)) == ["evil.zip", "out.zip"]
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.namelist() == ["00000/img00000000.png", "00000/img00000001.png", "dataset.json"]


def test_the_command_ends_with_one_line_and_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "engine.convert",
        "images",
        tmp_path / "gone",
        tmp_path / "out.zip",
        "--resolution",
        "8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no images at")
    assert done.stderr.count("\n") == 1
