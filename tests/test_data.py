"""Image sets: what is read equals what Pillow reads, what is wrong is said in a sentence, and a stream is a pure function.

All files are made here by Pillow, zipfile and numpy themselves, never by our own writer.
"""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch
from patience import Patience, outlasted
from PIL import Image
from sklearn.datasets import load_digits

from benches.rehearse import GPU
from potstill.engine.common.errors import UserError
from potstill.engine.data.files import Zip
from potstill.engine.data.images import open_images
from potstill.engine.data.progress import in_order
from potstill.engine.data.sampler import Stream
from potstill.engine.data.sources import decode


def pixels(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def encoded(image, kind="png"):
    data = io.BytesIO()
    Image.fromarray(image).save(data, kind)
    return data.getvalue()


def write_zip(path, files, packing=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def edm_zip(path, images, labels="none", kind="png", packing=zipfile.ZIP_STORED, **metadata):
    """As EDM's tool lays it out; labels "none" writes no dataset.json."""
    names = [f"{i // 1000:05d}/img{i:08d}.{kind}" for i in range(len(images))]
    files = {name: encoded(image, kind) for name, image in zip(names, images, strict=True)}
    if labels != "none":
        pairs = None if labels is None else [[n, k] for n, k in zip(names, labels, strict=True)]
        files["dataset.json"] = json.dumps({"labels": pairs} | metadata)
    return write_zip(path, files, packing)


def write_folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def error_of(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        open_images(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(images, chw):
    assert len(images) == len(chw)
    for i in range(len(images)):
        np.testing.assert_array_equal(images.read(i), chw[i])
    np.testing.assert_array_equal(images.pixels(), chw)
    np.testing.assert_array_equal([images.read(i) for i in range(len(images))], chw)


# What is read


def test_digits_are_scikit_learns():
    images, values = open_images("digits"), load_digits().images
    assert (len(images), images.channels, images.resolution, images.label_dim) == (1797, 1, 8, 10)
    np.testing.assert_array_equal(images.labels, load_digits().target)
    # Rounded to a 255th of the range: at most half a level, 1/255 of [-1, 1], away from v/8 - 1.
    x, _ = Stream(images, batch=1797).at(0)
    assert x.min() == -1
    assert x.max() == 1
    np.testing.assert_allclose(images.pixels()[:, 0] / 127.5 - 1, values / 8 - 1, atol=1 / 255 + 1e-12)
    assert str(images) == "digits: 1,797 images 8x8 L, 10 classes"


@pytest.mark.parametrize("shape", [(6, 6, 3), (6, 6)], ids=["rgb", "grey"])
@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_edm_zip(tmp_path, shape, packing):
    images = pixels(5, *shape)
    data = open_images(edm_zip(tmp_path / "set-6x6.zip", images, [3, 0, 2, 0, 1], packing=packing))
    assert (data.name, data.resolution, data.label_dim) == ("set-6x6", 6, 4)
    same(data, images.reshape(5, 6, 6, -1).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(data.labels, [3, 0, 2, 0, 1])


def test_jpeg_zip_equals_pillow(tmp_path):
    smooth = (pixels(3, 2, 2, 3).repeat(8, 1).repeat(8, 2)).astype(np.uint8)
    files = [encoded(image, "jpeg") for image in smooth]
    data = open_images(edm_zip(tmp_path / "a.zip", smooth, None, kind="jpeg"))
    assert data.labels is None
    assert data.label_dim == 0
    same(data, np.stack([np.asarray(Image.open(io.BytesIO(f))) for f in files]).transpose(0, 3, 1, 2))


def test_a_jpeg_with_a_long_header_is_read(tmp_path):
    data = io.BytesIO()
    Image.fromarray(pixels(1, 8, 8, 3)[0]).save(data, "jpeg", exif=b"Exif\0\0" + bytes(60_000), icc_profile=bytes(60_000))
    assert open_images(write_folder(tmp_path, {"a.jpg": data.getvalue()})).resolution == 8


def test_zip_order_is_that_of_the_names_and_other_files_do_not_count(tmp_path):
    a, b, c = pixels(3, 4, 4, 3)
    files = {"z.png": encoded(c), "B.PNG": encoded(a), "a/x.png": encoded(b), "readme.txt": b"hello", ".DS_Store": b"x"}
    files |= {"__MACOSX/._z.png": b"mac", "a/._x.png": b"mac"}
    data = open_images(write_zip(tmp_path / "a.zip", files))
    same(data, np.stack([a, b, c]).transpose(0, 3, 1, 2))
    assert data.labels is None, "a zip without dataset.json has no labels, whatever its folders"


def test_a_zip_behind_other_bytes_and_with_extra_fields_is_read(tmp_path):
    image, buffer = pixels(1, 4, 4, 3)[0], io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo("a.png")
        entry.extra = struct.pack("<HH4s", 0x7777, 4, b"abcd")
        archive.writestr(entry, encoded(image))
    (tmp_path / "a.zip").write_bytes(b"#!/bin/sh\n" + buffer.getvalue())
    same(open_images(tmp_path / "a.zip"), image.transpose(2, 0, 1)[None])


def test_folder_of_classes(tmp_path):
    a, b, c = pixels(3, 4, 4, 3)
    files = {"train/dog/1.png": encoded(a), "train/cat/deep/9.png": encoded(b), "train/cat/2.png": encoded(c)}
    data = open_images(write_folder(tmp_path, files | {"train/.DS_Store": b"x", "notes.md": b"y"}))
    same(data, np.stack([c, b, a]).transpose(0, 3, 1, 2))
    assert data.classes == ["cat", "dog"]
    assert data.labels.tolist() == [0, 0, 1]
    unlabelled = open_images(tmp_path, labelled=False)
    assert unlabelled.labels is None
    assert len(unlabelled) == 3
    assert open_images(tmp_path / "train/dog").labels is None, "one folder is no class"


def test_linked_class_folders_are_followed_and_circles_are_not(tmp_path):
    write_folder(tmp_path / "store", {"a/1.png": encoded(pixels(1, 4, 4)[0]), "b/1.png": encoded(pixels(1, 4, 4)[0])})
    (tmp_path / "set").mkdir()
    for k in "ab":
        (tmp_path / "set" / k).symlink_to(tmp_path / "store" / k)
    (tmp_path / "store/a/round").symlink_to(tmp_path / "store/a")
    assert open_images(tmp_path / "set").labels.tolist() == [0, 1]


def test_folder_with_dataset_json(tmp_path):
    write_folder(tmp_path, {"00000/a.png": encoded(pixels(1, 4, 4)[0]), "00001/b.png": encoded(pixels(1, 4, 4)[0])})
    (tmp_path / "dataset.json").write_text('{"labels": [["00001/b.png", 0], ["00000/a.png", 5], ["gone.png", 7]]}')
    assert open_images(tmp_path).labels.tolist() == [5, 0]
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert open_images(tmp_path).labels is None


@pytest.mark.parametrize("keys", [("images", "labels"), ("arr_0", "arr_1")])
@pytest.mark.parametrize("layout", ["nhwc", "nchw", "nhw"])
def test_npz(tmp_path, keys, layout):
    images = pixels(4, 1 if layout == "nhw" else 3, 6, 6)
    stored = {"nhwc": images.transpose(0, 2, 3, 1), "nchw": images, "nhw": images[:, 0]}[layout]
    np.savez(tmp_path / "a.npz", **dict(zip(keys, (stored, np.array([2, 0, 1, 0], np.int32)), strict=True)))
    data = open_images(tmp_path / "a.npz")
    same(data, images)
    assert data.label_dim == 3
    assert data.labels.dtype == np.int64


def test_synthetic():
    data = open_images("synthetic:16x3x5x20")
    assert (len(data), data.channels, data.resolution, data.label_dim) == (20, 3, 16, 5)
    assert sorted(set(data.labels.tolist())) == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(data.pixels(), open_images("synthetic:16x3x5x20").pixels())
    assert open_images("synthetic:8x1").labels is None


def test_label_dim_and_class_names(tmp_path):
    path = edm_zip(tmp_path / "a.zip", pixels(2, 4, 4), [1, 0], classes=["cat", "dog", "emu"])
    assert open_images(path).classes == ["cat", "dog", "emu"]
    assert open_images(path).label_dim == 3
    assert Stream(open_images(path, label_dim=1000), batch=2).at(0)[1].shape == (2, 1000)
    assert "has 3 classes, wanted labels for a net that knows 2" in error_of(path, label_dim=2)
    assert "has no classes" in error_of("synthetic:4x1", label_dim=2)


def test_subset_keeps_the_width_of_labels():
    digits = open_images("digits")
    part = digits.subset([3, 7])
    expected = np.flatnonzero(np.isin(digits.labels, [3, 7]))
    same(part, digits.pixels()[expected])
    assert part.label_dim == 10
    assert np.unique(part.labels).tolist() == [3, 7]
    x, labels = Stream(part, batch=len(part), seed=1).at(0)
    assert x.shape == (len(expected), 1, 8, 8)
    assert labels.shape == (len(expected), 10)
    assert labels.argmax(1).unique().tolist() == [3, 7]
    with pytest.raises(UserError, match="no images of classes"):
        digits.subset([11])
    with pytest.raises(UserError, match="no labels"):
        open_images("synthetic:8x1").subset([0])


# What is wrong


def test_nothing_there(tmp_path):
    assert "no images at" in error_of(tmp_path / "missing.zip")
    assert "no images in" in error_of(tmp_path)
    assert "no images in" in error_of(write_zip(tmp_path / "a.zip", {"dataset.json": "{}"}))
    assert "wanted synthetic:" in error_of("synthetic:64")
    assert "1 or 3 channels" in error_of("synthetic:64x2")
    assert "bytes, wanted at most" in error_of("synthetic:100000x3")


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path, monkeypatch):
    write_folder(tmp_path, {"a/1.png": encoded(pixels(1, 4, 4)[0]), "b/1.png": encoded(pixels(1, 4, 4)[0])})
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert f"cannot read the folder {tmp_path}/b: Permission denied" in error_of(tmp_path)


def test_a_file_that_is_no_zip_or_half_of_one(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no zip at all")
    assert "not a complete zip" in error_of(tmp_path / "a.zip")
    whole = edm_zip(tmp_path / "b.zip", pixels(4, 8, 8), [0] * 4).read_bytes()
    (tmp_path / "b.zip").write_bytes(whole[: len(whole) // 2])
    assert "not a complete zip" in error_of(tmp_path / "b.zip")


def test_mixed_sizes_and_modes_name_two_files_and_the_command(tmp_path):
    write_folder(
        tmp_path / "my set",
        {"a.png": encoded(pixels(1, 70, 70, 3)[0]), "b.jpg": encoded(pixels(1, 9, 8, 3)[0], "jpeg")},
    )
    said = error_of(tmp_path / "my set")
    assert "a.png (70x70 RGB)" in said
    assert "b.jpg (8x9 RGB)" in said
    assert f"potstill convert images '{tmp_path}/my set' 'my set-64x64.zip' --resolution 64" in said
    write_folder(tmp_path / "modes", {"a.png": encoded(pixels(1, 4, 4, 3)[0]), "b.png": encoded(pixels(1, 4, 4)[0])})
    said = error_of(tmp_path / "modes", resolution=4)
    assert "a.png (4x4 RGB)" in said
    assert "b.png (4x4 L)" in said


def test_wrong_shape_and_resolution_give_the_command(tmp_path):
    oblong = edm_zip(tmp_path / "oblong.zip", pixels(2, 16, 12, 3))
    assert f"potstill convert images {oblong} oblong-8x8.zip --resolution 8" in error_of(oblong)
    square = edm_zip(tmp_path / "square.zip", pixels(2, 16, 16, 3))
    assert "wanted 8x8" in error_of(square, resolution=8)
    assert "square-8x8.zip --resolution 8" in error_of(square, resolution=8)
    assert "wanted 64x64" in error_of("digits", resolution=64)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1", "I;16"])
def test_other_modes_are_refused_by_name(tmp_path, mode):
    picture = Image.new("I;16", (4, 4)) if mode == "I;16" else Image.new("RGB", (4, 4)).convert(mode)
    picture.save(tmp_path / "a.png")
    assert f"a.png is of mode {mode}" in error_of(tmp_path)
    assert "potstill convert" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, -1], "img00000001.png the label -1, wanted a class from 0"),
        ([0, 10**9], "the label 1000000000, wanted"),
        ([0, 10**30], "wanted a class from 0"),
        ([0, 1.5], "the label 1.5, wanted"),
        ([0, True], "the label True"),
        ([0, None], "the label None"),
        ([[1, 0], [0, 1]], "the label [1, 0]"),
        ([0, "cat"], "the label 'cat'"),
    ],
)
def test_labels_out_of_range(tmp_path, labels, said):
    assert said in error_of(edm_zip(tmp_path / "a.zip", pixels(2, 4, 4), labels))


def test_labels_beyond_the_class_names(tmp_path):
    path = edm_zip(tmp_path / "a.zip", pixels(2, 4, 4), [0, 2], classes=["cat", "dog"])
    assert "the label 2, wanted a class from 0 to 1" in error_of(path)
    assert '"classes"' in error_of(edm_zip(tmp_path / "b.zip", pixels(2, 4, 4), [0, 1], classes=7))


@pytest.mark.parametrize("text", ["not json", "[]", "{}", '{"labels": 3}', '{"labels": [["a"]]}', "[" * 100_000, b"\xff\xfe"])
def test_unreadable_dataset_json(tmp_path, text):
    assert "dataset.json" in error_of(write_zip(tmp_path / "a.zip", {"a.png": encoded(pixels(1, 4, 4)[0]), "dataset.json": text}))


def test_labels_missing_for_some(tmp_path):
    files = {"a.png": encoded(pixels(1, 4, 4)[0]), "b.png": encoded(pixels(1, 4, 4)[0])}
    write_zip(tmp_path / "a.zip", files | {"dataset.json": '{"labels": [["a.png", 0]]}'})
    assert "no label for 1 of 2 images: b.png" in error_of(tmp_path / "a.zip")
    write_folder(tmp_path / "f", {"cat/a.png": files["a.png"], "dog/a.png": files["a.png"], "b.png": files["b.png"]})
    assert "(cat/a.png, b.png)" in error_of(tmp_path / "f")
    write_zip(tmp_path / "deep.zip", {"in/" + k: v for k, v in files.items()} | {"in/dataset.json": '{"labels": null}'})
    assert "wanted dataset.json at the top" in error_of(tmp_path / "deep.zip")


def test_one_image_has_one_label(tmp_path):
    files = {"a.png": encoded(pixels(1, 4, 4)[0])}
    twice = write_zip(tmp_path / "a.zip", files | {"dataset.json": '{"labels": [["a.png", 0], ["a.png", 1]]}'})
    assert "gives a.png two labels" in error_of(twice)
    for labels in ('[["a.png", 1], ["a.png", 1]]', '{"a.png": 1, "a.png": 1}'):
        write_zip(tmp_path / "c.zip", files | {"dataset.json": f'{{"labels": {labels}}}'})
        assert "a.png" in error_of(tmp_path / "c.zip")
        assert open_images(tmp_path / "c.zip", labelled=False).labels is None
    write_zip(tmp_path / "d.zip", files | {"dataset.json": '{"labels": [["a.png", 0]], "labels": [["a.png", 1]]}'})
    assert "'labels' is there twice" in error_of(tmp_path / "d.zip")
    write_zip(tmp_path / "b.zip", files | {"dataset.json": '{"labels": {"a.png": 1}}'})
    assert open_images(tmp_path / "b.zip").labels.tolist() == [1]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, "float32, wanted"),
        ({"images": np.zeros((2, 4, 4, 2), np.uint8)}, "1 or 3 channels"),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, "[0, 4, 4, 3]"),
        ({"pictures": np.zeros((2, 4, 4, 3), np.uint8)}, "holds pictures"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(3, int)}, "wanted [2] integers"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(2)}, "float64, wanted [2] integers"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([0, -3])}, "image 1 the label -3"),
        ({"images": np.array([print, 1], object)}, "plain arrays"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "y": np.array([0.0, 1.0])}, "labels [2] float64, wanted [2] integers; --unlabelled"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "label": np.array(["a", "b"])}, "labels [2] <U1, wanted"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.eye(2, dtype=int)}, "labels [2, 2] int64, wanted"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([True, False])}, "labels [2] bool, wanted"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.array([1, 2**63], np.uint64)}, "the label 9223372036854775808"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([None, 1], object)}, "plain arrays"),
    ],
)
def test_wrong_npz(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", **arrays)
    assert said in error_of(tmp_path / "a.npz")
    if len(arrays) > 1:  # all that is wrong are the labels
        assert open_images(tmp_path / "a.npz", labelled=False).labels is None


@pytest.mark.parametrize("name", ["label", "Labels", "y", "targets", "arr_1", "cls"])
def test_labels_under_other_names(tmp_path, name):
    np.savez(tmp_path / "a.npz", images=pixels(3, 4, 4), seeds=np.arange(3), **{name: np.array([2, 0, 2], np.uint8)})
    assert open_images(tmp_path / "a.npz").labels.tolist() == [2, 0, 2]


# Labels that are ignored, or passed over


def numbered(root, names):
    image = encoded(pixels(1, 4, 4)[0])
    return write_folder(root, dict.fromkeys(names, image))


EDM_SUBDIRS = [f"{k - k % 1000:06d}/{k:06d}.png" for k in (0, 1, 999, 1000, 2001)]


@pytest.mark.parametrize(
    ("names", "one_list"),
    [
        (EDM_SUBDIRS, True),
        ([f"{k // 1000:05d}/img{k:08d}.png" for k in (0, 999, 1000)], True),
        ([f"in/{k - k % 1000:05d}/{k:05d}.png" for k in (0, 999, 69_999)], True),
        ([f"{k // 100}/seed_{k}.jpg" for k in (3, 120, 250)], True),
        (["0/1.png", "0/2.png", "1/1.png"], False),
        (["cat/0.png", "dog/1000.png"], False),
        (["000000/000000.png", "001000/a.png"], False),
        ([f"{k % 3}/{k:05d}.png" for k in range(6)], False),
    ],
)
def test_one_long_list_cut_into_folders_is_told(tmp_path, capsys, names, one_list):
    data = open_images(numbered(tmp_path, names))
    assert data.label_dim == len({name.rpartition("/")[0] for name in names})
    said = capsys.readouterr().err
    assert ("--unlabelled (in a run: data.unlabelled=true)" in said) == one_list
    assert open_images(tmp_path, labelled=False).labels is None
    assert capsys.readouterr().err == ""


def test_what_may_hold_labels_and_is_not_read_is_told(tmp_path, capsys):
    image = encoded(pixels(1, 4, 4)[0])
    classes = {"cat/1.png": image, "dog/2.png": image}
    write_zip(tmp_path / "a.zip", classes)
    write_zip(tmp_path / "b.zip", dict.fromkeys(EDM_SUBDIRS, image))
    write_folder(tmp_path / "c", {"1.png": image, "labels.csv": b"x"})
    write_zip(tmp_path / "d.zip", {"1.png": image, "1.cls": b"0"})
    write_folder(tmp_path / "e", classes | {"labels.csv": b"x"})
    write_zip(tmp_path / "f.zip", {"1.png": image, "labels.csv": b"x", "dataset.json": '{"labels": [["1.png", 0], ["2.png", 0]]}'})
    np.savez(tmp_path / "g.npz", images=pixels(2, 4, 4), digit=np.arange(2))
    np.savez(tmp_path / "h.npz", images=pixels(2, 4, 4), labels=np.arange(2), targets=np.arange(2))
    write_folder(tmp_path / "i", {"train/cat/1.png": image, "val/cat/2.png": image})
    for name, said in (
        ("h.npz", "labels are those of array 'labels'; passed over: targets"),
        ("i", "has folders within folders; the classes are the outer ones (train, val"),
        ("a.zip", "has folders (cat/1.png) and no dataset.json: no labels"),
        ("b.zip", ""),
        ("c", "has labels.csv, which is not read"),
        ("d.zip", "has 1.cls, which is not read"),
        ("e", ""),
        ("f.zip", "labels 2 images, 1 are there"),
        ("g.npz", "has no array 'labels'; passed over: digit"),
        ("digits", ""),
    ):
        open_images(tmp_path / name if name != "digits" else name)
        told = capsys.readouterr().err
        assert said in told if said else told == "", name


def test_ignoring_labels_where_there_are_none_is_told(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", images=pixels(2, 4, 4))
    edm_zip(tmp_path / "b.zip", pixels(2, 4, 4), labels=None)
    for name in (tmp_path / "a.npz", tmp_path / "b.zip", "synthetic:4x1", numbered(tmp_path / "c", ["1.png", "2.png"])):
        open_images(name, labelled=False)
        assert capsys.readouterr().err == f"note: {name} has no labels that could be ignored: unlabelled changes nothing\n"
    deep = write_zip(tmp_path / "deep.zip", {"in/a.png": encoded(pixels(1, 4, 4)[0]), "in/dataset.json": "{"})
    broken = edm_zip(tmp_path / "d.zip", pixels(2, 4, 4), labels=[0, "cat"])
    loose = numbered(tmp_path / "loose", ["a/1.png", "2.png"])
    for name in (deep, broken, loose, "digits", "synthetic:4x1x3"):
        assert open_images(name, labelled=False).labels is None
        assert capsys.readouterr().err == ""


def test_truncated_npz(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(4, 8, 8, 3))
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    assert "no complete .npz" in error_of(tmp_path / "a.npz")


def test_damaged_headers_are_named_at_once(tmp_path):
    good = encoded(pixels(1, 8, 8, 3)[0])
    for name, data in {"b.png": b"", "c.png": b"\x89PNG\r\n\x1a\n", "d.jpg": b"text", "e.jpg": good}.items():
        write_folder(tmp_path / name, {"a.png": good, name: data})
        if name != "e.jpg":  # a PNG called .jpg is one that Pillow reads
            assert f"{name} is damaged" in error_of(tmp_path / name)
        else:
            assert len(open_images(tmp_path / name)) == 2


def test_damaged_pixels_are_named_when_read(tmp_path):
    image = pixels(1, 16, 16, 3)[0]
    png, jpeg = encoded(image), encoded(image, "jpeg")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1
    broken = {
        "cut.png": png[:-30],
        "noend.png": png[:-12],
        "flip.png": bytes(flipped),
        "cut.jpg": jpeg[:-20],
    }
    for name, data in broken.items():
        folder = open_images(write_folder(tmp_path / name, {"a.png": png, name: data}))
        folder.read(0)
        for call in (lambda f=folder: f.read(1), folder.pixels):
            with pytest.raises(UserError, match=f"{name} is damaged"):
                call()


def test_damage_inside_a_zip_is_found_by_its_checksum(tmp_path):
    path = edm_zip(tmp_path / "a.zip", pixels(3, 16, 16, 3))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        data[archive.infolist()[1].header_offset + 300] ^= 4
    path.write_bytes(data)
    images = open_images(path)
    images.read(0)
    with pytest.raises(UserError, match=r"img00000001\.png is damaged \(its checksum"):
        images.read(1)


def test_bombs_are_refused(tmp_path, monkeypatch):
    head = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    assert "200000x200000 pixels" in error_of(write_folder(tmp_path / "png", {"a.png": bomb + bytes(100)}))
    jpeg = encoded(pixels(1, 64, 64, 3)[0], "jpeg")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        assert "a.jpg" in error_of(write_folder(tmp_path / "jpeg", {"a.jpg": jpeg}))
    packed = write_zip(tmp_path / "a.zip", {"a.png": encoded(np.zeros((64, 64), np.uint8)) + bytes(10**6)}, zipfile.ZIP_DEFLATED)
    files = Zip(packed)
    files._entries[0, 2] = 5000  # a directory that lies about the size: no more than that is unpacked
    tracemalloc.start()
    with pytest.raises(UserError, match="checksum"):
        files.read(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    files._entries[0, 2] = 2**40
    with pytest.raises(UserError, match="wanted at most"):
        files.read(0)


def test_encrypted_members_are_refused(tmp_path):
    path = edm_zip(tmp_path / "a.zip", pixels(1, 4, 4))
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert "encrypted" in error_of(path)


def test_whatever_is_wrong_with_a_file_is_a_user_error():
    """A thousand damaged files: decoded or refused, never another exception. Header and pixels alike."""
    rng = np.random.default_rng(0)
    image = pixels(1, 8, 8, 3)[0]
    said = []
    for kind in ("png", "jpeg", "bmp", "ppm", "webp"):
        whole = encoded(image, kind)
        for _ in range(200):
            data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            for at in rng.integers(0, len(data), 3):
                data[at] = rng.integers(256)
            try:
                decode(bytes(data), "file", upright=True)
            except UserError as error:
                said.append(str(error))
    assert len(said) > 500
    assert all(sentence.startswith("file ") and "\n" not in sentence for sentence in said)


# The stream


def test_every_image_once_an_epoch_and_labels_stay_with_them():
    images = open_images("synthetic:4x1x3x10")
    stream = Stream(images, batch=4, seed=5)
    batches = [stream.at(step) for step in range(5)]  # two epochs
    x, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert x.dtype == torch.float32
    assert labels.dtype == torch.float32
    known = {(images.read(i) / np.float32(127.5) - 1).astype(np.float32).tobytes(): i for i in range(10)}
    order = [known[image.numpy().tobytes()] for image in x]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    torch.testing.assert_close(labels, torch.eye(3)[images.labels[order]], rtol=0, atol=0)


@pytest.mark.parametrize("memory", [0, 2**30], ids=["read", "in memory"])
def test_windows_laid_together_are_the_batch(tmp_path, memory):
    path = edm_zip(tmp_path / "a.zip", pixels(7, 4, 4, 3), list(range(7)))
    options = {"batch": 6, "seed": 3, "flips": True, "memory": memory, "workers": 0}
    whole = Stream(open_images(path), **options)
    parts = [Stream(open_images(path), window=slice(i, j), **options) for i, j in ((0, 2), (2, 5), (5, 6))]
    for step in (0, 1, 2, 9):
        for together, pieces in zip(whole.at(step), zip(*(p.at(step) for p in parts), strict=True), strict=True):
            torch.testing.assert_close(torch.cat(pieces), together, rtol=0, atol=0)


@pytest.mark.parametrize("memory", [0, 2**30], ids=["read", "in memory"])
def test_every_third_image_is_a_window_too(tmp_path, memory):
    path = edm_zip(tmp_path / "a.zip", pixels(7, 4, 4, 3), list(range(7)))
    options = {"batch": 6, "seed": 3, "flips": True, "memory": memory, "workers": 0}
    whole = Stream(open_images(path), **options)
    third = Stream(open_images(path), window=slice(1, 6, 3), **options)
    for step in (0, 1, 9):
        for of_all, some in zip(whole.at(step), third.at(step), strict=True):
            assert torch.equal(of_all[[1, 4]], some)


def test_a_fresh_stream_resumes_anywhere():
    options = {"batch": 1000, "seed": 2, "flips": True}
    old = Stream(open_images("digits"), **options)
    passed = [old.at(step) for step in range(6)]
    for step in (5, 2, 3):
        new = Stream(open_images("digits"), **options).at(step)
        for a, b, c in zip(new, passed[step], old.at(step), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
    other = Stream(open_images("digits"), **options | {"seed": 3}).at(0)
    assert not torch.equal(other[0], passed[0][0])


def test_a_batch_larger_than_the_set():
    images = open_images("synthetic:4x1x0x3")
    x, labels = Stream(images, batch=10, seed=1).at(4)
    assert x.shape == (10, 1, 4, 4)
    assert labels is None
    counts = [(x == torch.from_numpy(images.read(i)).float().div(127.5).sub(1)).flatten(1).all(1).sum() for i in range(3)]
    assert sorted(map(int, counts)) == [3, 3, 4]


def test_half_of_the_images_are_mirrored():
    images = open_images("synthetic:4x1x0x2000")
    plain, flipped = (Stream(images, batch=2000, seed=4, flips=flips).at(1)[0] for flips in (False, True))
    as_is, mirrored = (flipped == plain).flatten(1).all(1), (flipped == plain.flip(3)).flatten(1).all(1)
    assert torch.equal(as_is, ~mirrored)
    assert 900 < mirrored.sum() < 1100, "a fair coin: within 4.5 standard deviations of 1000"


def test_positions_of_the_first_images_are_uniform():
    """Over 400 epochs of 5 images every image comes first about 80 times (standard deviation 8)."""
    images = open_images("synthetic:2x1x5x5")
    stream = Stream(images, batch=5, seed=0)
    firsts = torch.stack([stream.at(step)[1][0] for step in range(400)]).sum(0)
    assert firsts.min() > 48
    assert firsts.max() < 112


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_read_what_memory_holds(tmp_path, workers):
    path = edm_zip(tmp_path / "a.zip", pixels(50, 8, 8, 3), [k % 7 for k in range(50)])
    options = {"batch": 16, "seed": 1, "flips": True, "window": slice(4, 12)}
    state = torch.get_rng_state()
    reading, held = (
        Stream(open_images(path), memory=0, workers=workers, **options),
        Stream(open_images(path), **options),
    )
    for step in (0, 1, 2, 7, 8, 1):  # in order, a jump ahead, a jump back
        for a, b in zip(reading.at(step), held.at(step), strict=True):
            assert torch.equal(a, b)
    reading.close()
    assert torch.equal(reading.at(3)[0], held.at(3)[0]), "closed streams start again"
    reading.close()
    assert torch.equal(torch.get_rng_state(), state), "reading draws nothing from the global generator"


def test_damage_found_by_a_worker_is_one_sentence(tmp_path):
    whole = encoded(pixels(1, 16, 16, 3)[0])
    images = open_images(write_folder(tmp_path, {"a.png": whole, "b.png": whole[:-30]}))
    stream = Stream(images, batch=2, memory=0, workers=1)
    with pytest.raises(UserError, match=r"b\.png is damaged") as caught:
        stream.at(0)
    assert "\n" not in str(caught.value)


def test_images_travel_to_other_processes(tmp_path):
    path = edm_zip(tmp_path / "a.zip", pixels(5, 8, 8, 3), [0] * 5)
    images = open_images(path)
    everything = images.pixels()
    sent = pickle.dumps(images)
    assert len(sent) < everything.nbytes + 5000
    received = pickle.loads(sent)
    assert received.source.files._bytes.fd != images.source.files._bytes.fd, "it opens the zip by itself"
    np.testing.assert_array_equal(received.read(3), everything[3])
    inherited, done = open_images(path), os.pipe()
    child = os.fork()
    if child == 0:  # reads the same open zip as the parent, at the same time
        ok = all(np.array_equal(inherited.read(i % 5), everything[i % 5]) for i in range(500))
        os.write(done[1], b"y" if ok else b"n")
        os._exit(0)
    np.testing.assert_array_equal(np.stack([inherited.read(i % 5) for i in range(500)]), np.tile(everything, (100, 1, 1, 1)))
    os.waitpid(child, 0)
    assert os.read(done[0], 1) == b"y"
    os.close(done[0])
    os.close(done[1])
    assert os.lseek(inherited.source.files._bytes.fd, 0, os.SEEK_CUR) == 0, "a shared file position would be a race"


def test_ctrl_c_spares_the_workers_and_an_open_stream_does_not_hold_up_the_exit(tmp_path):
    path = edm_zip(tmp_path / "a.zip", pixels(9, 4, 4, 3))
    script = f"""
import os, signal
from potstill.engine.data.images import open_images
from potstill.engine.data.sampler import Stream

stream = Stream(open_images({str(path)!r}), batch=4, memory=0, workers=1)
stream.at(0)
signal.signal(signal.SIGINT, lambda *_: None)
os.killpg(0, signal.SIGINT)
for step in range(1, 30):
    stream.at(step)
workers = stream._reader.batches._workers  # kept alive: nothing has ended them when the interpreter exits
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True, **pipes)
    try:
        _, said = outlasted(process.communicate, Patience([process.pid]))
    finally:
        process.kill()
    assert (process.returncode, said) == (0, "")


def test_a_wrong_window_is_refused():
    images = open_images("digits")
    for window in (slice(3, 3), slice(4, 0, -2), slice(9, 12)):
        with pytest.raises(ValueError, match="window"):
            Stream(images, batch=8, window=window)
    with pytest.raises(ValueError, match="seed"):
        Stream(images, batch=8, seed=-1)


@pytest.mark.gpu
def test_batches_on_the_device_equal_those_on_the_host(tmp_path):
    path = edm_zip(tmp_path / "a.zip", pixels(50, 8, 8, 3), [k % 7 for k in range(50)])
    options = {"batch": 16, "seed": 1, "flips": True}
    host = Stream(open_images(path), **options)
    for memory in (0, 2**30):
        stream = Stream(open_images(path), device=GPU, memory=memory, workers=1, **options)
        for step in (0, 3, 4):
            for a, b in zip(stream.at(step), host.at(step), strict=True):
                assert a.device.type == GPU.type
                assert torch.equal(a.cpu(), b)
        stream.close()


def test_in_order_keeps_the_order_and_stops_at_an_error():
    assert list(in_order(lambda i: i * i, 1000, "squares", chunk=7, threads=4)) == [i * i for i in range(1000)]
    assert list(in_order(str, 0, "nothing")) == []
    seen = []

    def work(i):
        seen.append(i)
        if i == 20:
            raise UserError("twenty")
        return i

    with pytest.raises(UserError, match="twenty"):
        list(in_order(work, 10_000, "work", chunk=4, threads=2))
    assert len(seen) < 200, "work ahead is bounded and cancelled"


class NoStream:
    """In a CUDA stream's place: notes what waits for what."""

    def __init__(self, device=None):
        self.waited = []

    def record_event(self):
        return object()

    def wait_event(self, event):
        assert event is not None
        self.waited.append(event)

    def wait_stream(self, stream):
        pass


def test_images_are_copied_a_step_ahead_into_two_buffers(monkeypatch):
    from contextlib import nullcontext

    from potstill.engine.data.sampler import _Ahead

    main, read = NoStream(), []
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())

    def images(step):
        read.append(step)
        if step == 5:
            raise UserError("image 5 is damaged")
        return torch.full((2,), step)

    ahead = _Ahead(images, torch.device("cpu"))
    buffers = set()
    for step in (0, 1, 2, 3, 9, 10, 3):  # 3 once more: a run that goes back
        found = ahead.at(step)
        assert found.tolist() == [step, step] and read[-1] == step + 1
        buffers.add(found.data_ptr())
    assert len(buffers) == 2 and read == [0, 1, 2, 3, 4, 9, 10, 11, 3, 4]
    assert len(main.waited) == 7 and len(ahead.stream.waited) >= 6  # a buffer in use is not written
    assert ahead.at(4).tolist() == [4, 4]  # the damage of the step after is not told yet
    with pytest.raises(UserError, match="image 5"):
        ahead.at(5)
