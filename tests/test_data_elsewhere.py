"""Images in webdataset's tars and in Hugging Face data sets: the same pixels and labels that went in."""

import io
import pickle
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.build import missing
from engine.config import load
from engine.convert import main
from engine.data import hugging_face
from engine.data.images import open_images
from engine.errors import UserError

ROOT = Path(__file__).parent.parent
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
LABELS = [i * 5 % 3 for i in range(12)]


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path, indices, *, classes=True, prefix=""):
    """A tar as webdataset's ShardWriter lays it out: KEY.cls, KEY.png, KEY.json …"""
    with tarfile.open(path, "w") as tar:
        for i in indices:
            files = {"cls": str(LABELS[i]).encode()} if classes else {}
            for kind, data in (files | {"png": png(PIXELS[i]), "json": b"{}"}).items():
                member = tarfile.TarInfo(f"{prefix}s{i:04d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def same(images, order=range(12)):
    got = np.stack([images.read(i) for i in range(len(images))]).transpose(0, 2, 3, 1)
    return np.array_equal(got, PIXELS[list(order)])


def refused(path):
    with pytest.raises(UserError) as caught:
        open_images(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_are_one_set_in_the_order_of_their_names(tmp_path):
    for k in range(3):
        shard(tmp_path / f"t-{k:03d}.tar", range(4 * k, 4 * k + 4), prefix="./" if k else "")
    for name in ("t-{000..002}.tar", "t-*.tar"):
        images = open_images(f"{tmp_path}/{name}")
        assert same(images)
        assert images.labels.tolist() == LABELS
        assert images.label_dim == 3
    assert same(pickle.loads(pickle.dumps(images)))
    assert same(open_images(tmp_path / "t-001.tar"), range(4, 8))
    assert same(images.subset([1]), [i for i in range(12) if LABELS[i] == 1])
    assert open_images(f"{tmp_path}/t-*.tar", labelled=False).labels is None
    assert "only 3 of the shards" in refused(f"{tmp_path}/t-{{000..007}}.tar")


def test_shards_become_edms_zip(tmp_path, capsys):
    shard(tmp_path / "t.tar", range(12))
    main(["images", str(tmp_path / "t.tar"), str(tmp_path / "out.zip"), "--resolution", "8"])
    images = open_images(tmp_path / "out.zip")
    assert same(images)
    assert images.labels.tolist() == LABELS


def test_shards_without_classes_or_images_or_end(tmp_path):
    shard(tmp_path / "t.tar", range(3), classes=False)
    assert open_images(tmp_path / "t.tar").labels is None
    shard(tmp_path / "e.tar", [])
    assert "it is empty" in refused(tmp_path / "e.tar")
    with tarfile.open(tmp_path / "e.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    assert "wanted tars with KEY.png and, if any, KEY.cls" in refused(tmp_path / "e.tar")
    (tmp_path / "d.tar").write_bytes(b"no tar" * 200)
    assert "is no complete, uncompressed tar" in refused(tmp_path / "d.tar")
    data = (tmp_path / "t.tar").read_bytes().rstrip(b"\0")
    for n in (len(data) // 3, len(data) // 512 * 512 - 512, 700, 512):  # in the middle, and where a file begins
        (tmp_path / "c.tar").write_bytes(data[:n])
        assert "c.tar is no complete, uncompressed tar" in refused(tmp_path / "c.tar")
    assert "no images at" in refused(tmp_path / "none.tar")


def test_a_wrong_class_is_named(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in (("a.png", png(PIXELS[0])), ("a.cls", b"cat")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert "gives t.tar/a.png the label 'cat', wanted a class" in refused(tmp_path / "t.tar")


def test_what_a_run_misses_is_known_for_shards_and_names(tmp_path):
    shard(tmp_path / "t-0.tar", range(3))
    for path, lacks in ((f"{tmp_path}/t-*.tar", False), (f"{tmp_path}/u-*.tar", True), ("hf:a/b", False)):
        cfg = load(ROOT / "configs/digits.yaml", [f"data.path={path}"])
        assert bool(missing(cfg)) == lacks, path


@pytest.mark.skipif(find_spec("datasets") is not None, reason="datasets is installed: its absence cannot be seen")
def test_without_datasets_the_extra_is_named():
    assert refused("hf:a/b") == "hf:a/b wants the package datasets: pip install 'potstill[datasets]'"


@pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed: pip install 'potstill[datasets]'")
def test_hugging_face_data_sets_are_read_from_disk(tmp_path):
    """In a process of its own: the library warns about itself, and looks for its settings when it is imported."""
    code = """if True:
        import pickle, sys
        import datasets, numpy as np
        sys.path.insert(0, "tests")
        from PIL import Image
        from engine.data.images import open_images
        from test_data_elsewhere import LABELS, PIXELS, refused, same
        root = sys.argv[1]
        kinds = datasets.Features({"n": datasets.Value("int32"), "img": datasets.Image(),
                                   "label": datasets.ClassLabel(names=["a", "b", "c"])})
        rows = {"n": range(12), "img": [Image.fromarray(p) for p in PIXELS], "label": LABELS}
        data = datasets.Dataset.from_dict(rows, features=kinds)
        data.to_parquet(root + "/pq/train.parquet")
        data.save_to_disk(root + "/disk")
        datasets.DatasetDict(train=data, test=data.select(range(4))).save_to_disk(root + "/both")
        for name in ("pq", "pq@train", "disk", "both", "both@train"):
            images = open_images(f"hf:{root}/{name}")
            assert same(images) and images.labels.tolist() == LABELS and images.classes == ["a", "b", "c"], name
            assert same(pickle.loads(pickle.dumps(images)))
        assert same(open_images(f"hf:{root}/both@test"), range(4))
        assert open_images(f"hf:{root}/pq", labelled=False).labels is None
        assert "wanted hf:NAME[:CONFIG][@SPLIT]" in refused("hf:/nowhere")
        assert "cannot be read" in refused(f"hf:{root}/pq@test")
        datasets.Dataset.from_dict({"a": [1]}).save_to_disk(root + "/none")
        assert "has no images: its columns are a, 1 rows" in refused(f"hf:{root}/none")
    """
    env = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_of_a_data_set_is_never_looked_up_without_the_library(monkeypatch):
    monkeypatch.setattr(hugging_face, "find_spec", lambda name: None)
    assert "pip install 'potstill[datasets]'" in refused("hf:some/name@train")
