"""Data sets that contradict themselves, and files made to hurt: refused by name in one sentence, in little memory and time."""

import io
import json
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from potstill.engine.common.errors import UserError
from potstill.engine.convert import main
from potstill.engine.data.images import open_images

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)


def encoded(*pictures, kind="png", **options):
    first, *more = (Image.fromarray(picture) for picture in pictures)
    data = io.BytesIO()
    first.save(data, kind, **({"save_all": True, "append_images": more} if more else {}), **options)
    return data.getvalue()


def archive(path, files, packing=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", packing) as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, of a name that comes twice
        for name, data in files:
            out.writestr(name, data)
    return path


def refused(*arguments, **options):
    with pytest.raises(UserError) as caught:
        open_images(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def convert(src, out, *options):
    main(["images", str(src), str(out), "--resolution", "8", *options])
    return open_images(out)


# Things that are there twice


@pytest.mark.parametrize("name", ["a.png", "dataset.json"])
def test_a_name_twice_in_a_zip(tmp_path, name):
    files = [("a.png", encoded(PIXELS[0])), ("dataset.json", '{"labels": null}')]
    path = archive(tmp_path / "a.zip", [*files, (name, dict(files)[name])])
    said = f"{path} holds {name} twice, wanted every file once: write the zip anew, without the other"
    assert refused(path) == said
    for options in ([], ["--skip-corrupt"], ["--unlabelled"]):  # which of the two is meant is no damage of one picture
        with pytest.raises(UserError, match="twice"):
            convert(path, tmp_path / "out.zip", *options)
    assert not (tmp_path / "out.zip").exists()


@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "mpo"])
def test_animations_and_several_pages(tmp_path, kind, capsys):
    suffix = "jpg" if kind == "mpo" else kind
    (tmp_path / "in").mkdir()
    for name, pictures in (("a", PIXELS[:1]), ("b", PIXELS[1:4]), ("c", PIXELS[4:5])):
        data = encoded(*pictures, kind="jpeg" if kind == "mpo" and len(pictures) == 1 else kind)
        (tmp_path / "in" / f"{name}.{suffix}").write_bytes(data)
    sentence = f"{tmp_path}/in/b.{suffix} is an animation or has several pages, wanted one picture a file: save the one that is meant"
    assert refused(tmp_path / "in").startswith(sentence)
    with pytest.raises(UserError, match="is an animation"):
        convert(tmp_path / "in", tmp_path / "out.zip")
    assert len(convert(tmp_path / "in", tmp_path / "out.zip", "--skip-corrupt")) == 2
    assert f"left out: {sentence}" in capsys.readouterr().err


def test_an_animation_that_says_so_late_is_found_when_it_is_read(tmp_path):
    whole = encoded(*PIXELS[:2])
    text = b"tEXt" + bytes(5000)
    late = whole[:33] + struct.pack(">I", 5000) + text + struct.pack(">I", zlib.crc32(text)) + whole[33:]
    (tmp_path / "a.png").write_bytes(late)
    images = open_images(tmp_path)
    with pytest.raises(UserError, match="is an animation"):
        images.read(0)


# Labels that are hardly classes


def labelled(path, labels, classes=None):
    np.savez(path.with_suffix(".npz"), images=PIXELS[: len(labels)], labels=np.array(labels))
    named = {"classes": classes} if classes else {}
    pairs = [[f"{i}.png", label] for i, label in enumerate(labels)]
    pictures = [(f"{i}.png", encoded(PIXELS[i])) for i in range(len(labels))]
    archive(path.with_suffix(".zip"), [*pictures, ("dataset.json", json.dumps({"labels": pairs} | named))])
    return path.with_suffix(".npz"), path.with_suffix(".zip")


def test_two_classes_do_not_make_ninety_thousand(tmp_path):
    for path in labelled(tmp_path / "a", [0, 90_000]):
        sentence = refused(path)
        assert sentence.startswith(f"{path} has labels up to 90,000 and images of only 2 classes: number the classes from 0 on, or,")
        assert 'name them in dataset.json ("classes": [name, …])' in sentence
        assert open_images(path, labelled=False).label_dim == 0
        assert open_images(path, label_dim=100_000).label_dim == 100_000  # a net knows as many
    for labels in ([0, 999], [3, 7], [0, 1, 2, 3, 4, 590]):  # some of ImageNet's
        for path in labelled(tmp_path / "b", labels):
            assert open_images(path).label_dim == max(labels) + 1
    _, named = labelled(tmp_path / "c", [0, 4999], [str(k) for k in range(5000)])
    assert open_images(named).label_dim == 5000
