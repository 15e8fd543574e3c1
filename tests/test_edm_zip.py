"""EDM's dataset zips both ways: what its tool writes we read, and what we write its loader reads; bytes and labels."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.engine import convert
from potstill.engine.data.images import open_images

N = 1003  # more than one bucket of a thousand


def edm_zip(path: Path, images: np.ndarray, labels: list[int] | None) -> Path:
    """Written from the description of the format alone: stored, uncompressed PNGs, buckets of a thousand, labels by name."""
    pairs = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i, image in enumerate(images):
            name, data = f"{i // 1000:05d}/img{i:08d}.png", io.BytesIO()
            Image.fromarray(image).save(data, format="png", compress_level=0, optimize=False)
            archive.writestr(name, data.getvalue())
            pairs.append([name, labels[i] if labels else None])
        archive.writestr("dataset.json", json.dumps({"labels": pairs if labels else None}))
    return path


def edm_load(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read as its loader does: names sorted, [C, H, W], labels looked up by name as int64."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        images = [np.array(Image.open(io.BytesIO(archive.read(name)))) for name in names]
        labels = json.loads(archive.read("dataset.json"))["labels"]
    images = np.stack([i[None] if i.ndim == 2 else i.transpose(2, 0, 1) for i in images])
    return images, None if labels is None else np.array([dict(labels)[name] for name in names], np.int64)


def entries(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module", params=[3, 1], ids=["RGB", "grey"])
def pictures(request):
    pixels = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), np.uint8)
    return pixels if request.param == 3 else pixels[..., 0]


@pytest.mark.parametrize("labelled", [True, False])
def test_there_and_back(tmp_path, pictures, labelled):
    labels = [int(i * 7 % 5) for i in range(N)] if labelled else None
    theirs, ours = edm_zip(tmp_path / "theirs.zip", pictures, labels), tmp_path / "ours.zip"
    data = open_images(theirs)
    whole = pictures[:, None] if pictures.ndim == 3 else pictures.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(np.stack([data.read(i) for i in range(N)]), whole)
    assert (data.labels.tolist() if labelled else data.labels) == labels
    convert.main(["images", str(theirs), str(ours), "--resolution", "8"])
    before, after = entries(theirs), entries(ours)
    assert list(before) == list(after)
    assert json.loads(before.pop("dataset.json"))["labels"] == json.loads(after.pop("dataset.json"))["labels"]
    assert before == after, "the PNGs differ in their bytes"
    loaded, loaded_labels = edm_load(ours)
    np.testing.assert_array_equal(loaded, whole)
    assert (loaded_labels.tolist() if labelled else loaded_labels) == labels


def test_a_class_subset_keeps_pictures_and_numbers(tmp_path, pictures):
    labels = [int(i * 7 % 5) for i in range(N)]
    theirs = edm_zip(tmp_path / "theirs.zip", pictures, labels)
    part = open_images(theirs).subset([1, 4])
    where = [i for i in range(N) if labels[i] in (1, 4)]
    images, all_labels = edm_load(theirs)
    assert len(part) == len(where) and part.label_dim == 5
    assert part.labels.tolist() == all_labels[where].tolist()
    np.testing.assert_array_equal(np.stack([part.read(i) for i in range(len(part))]), images[where])
