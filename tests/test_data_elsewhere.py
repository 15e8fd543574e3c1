"""Images in webdataset's tars and in Hugging Face data sets: the same pixels and labels that went in."""

import io
import json
import pickle
import subprocess
import sys
import tarfile
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.engine.common.errors import UserError
from potstill.engine.config.tree import load
from potstill.engine.convert import main
from potstill.engine.data import hugging_face
from potstill.engine.data.images import open_images
from potstill.engine.jobs.preflight import missing

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


def assert_pixels(images, order=range(12)):
    """The images are those of PIXELS in this order."""
    np.testing.assert_array_equal(np.stack([images.read(i) for i in range(len(images))]).transpose(0, 2, 3, 1), PIXELS[list(order)])


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
        assert_pixels(images)
        assert images.labels.tolist() == LABELS
        assert images.label_dim == 3
    assert_pixels(pickle.loads(pickle.dumps(images)))
    assert_pixels(open_images(tmp_path / "t-001.tar"), range(4, 8))
    assert_pixels(images.subset([1]), [i for i in range(12) if LABELS[i] == 1])
    assert open_images(f"{tmp_path}/t-*.tar", labelled=False).labels is None
    assert "only 3 of the shards" in refused(f"{tmp_path}/t-{{000..007}}.tar")


def test_shards_become_edms_zip(tmp_path, capsys):
    shard(tmp_path / "t.tar", range(12))
    main(["images", str(tmp_path / "t.tar"), str(tmp_path / "out.zip"), "--resolution", "8"])
    images = open_images(tmp_path / "out.zip")
    assert_pixels(images)
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


def tar(path, files):
    """A tar of these files, in their order; numbers and objects as text."""
    with tarfile.open(path, "w") as out:
        for name, data in files:
            data = data if isinstance(data, bytes) else data.encode() if isinstance(data, str) else json.dumps(data).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return path


def samples(labels, kind="cls", prefix="", image="png"):
    """Images that come with KEY.kind; None: without."""
    files = [[(f"{prefix}{i:04d}.{image}", png(PIXELS[i])), (f"{prefix}{i:04d}.{kind}", label)] for i, label in enumerate(labels)]
    return [(name, data) for pair in files for name, data in pair if data is not None]


@pytest.mark.parametrize("prefix", ["", "a/", "imagenet-1.0/", "./v1.2/a.b/", "../v2.0/"])
@pytest.mark.parametrize(("kind", "image"), [("cls", "png"), ("CLS", "PNG")])
def test_a_key_ends_at_the_first_dot_of_the_files_name(tmp_path, prefix, kind, image):
    images = open_images(tar(tmp_path / "a.tar", samples([0, 2, 1, 2], kind, prefix, image)))
    assert images.labels.tolist() == [0, 2, 1, 2]
    assert_pixels(images, range(4))


def test_a_column_of_masks_is_no_image(tmp_path):
    masks = [(f"{i:04d}.{kind}", png(PIXELS[0])) for i in range(3) for kind in ("seg.png", "depth.jpg")]
    images = open_images(tar(tmp_path / "a.tar", samples([1, 0, 1]) + masks))
    assert images.labels.tolist() == [1, 0, 1]
    assert_pixels(images, range(3))
    assert "holds 0000.depth.jpg, but no image 0000.png" in refused(tar(tmp_path / "b.tar", masks[1:]))
    assert "holds img.0000.png, but no image img.png" in refused(tar(tmp_path / "c.tar", samples([0, 1], prefix="img.")))
    two = [("a.png", png(PIXELS[0])), ("a.jpg", png(PIXELS[1]))]
    assert "two images of one sample, a.png and a.jpg" in refused(tar(tmp_path / "d.tar", two))
    hidden = [("__MACOSX/0000.png", b"x"), ("._0000.cls", b"x"), (".git/a.cls", b"x"), ("README", b"x")]
    assert open_images(tar(tmp_path / "e.tar", samples([1, 0, 1]) + hidden)).labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("class", [2, 0, 1]),
        ("label", ["2\n", " 0", "+1"]),
        ("txt", [2, 0, 1]),
        ("json", [2, 0, 1]),
        ("json", [{"label": 2}, {"label": 0, "w": 3}, {"label": 1}]),
        ("json", [{"class_id": k, "class": "cat", "width": 8} for k in (2, 0, 1)]),
        ("json", [{"Target": k} for k in (2, 0, 1)]),
    ],
)
def test_labels_in_other_columns(tmp_path, kind, values):
    assert open_images(tar(tmp_path / "a.tar", samples(values, kind))).labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (samples([0, None, 1]), "KEY.cls in {} has no label for 1 of 3 images: a.tar/0001.png, …; --unlabelled"),
        (samples([{"label": 0}, {"w": 1}, {"label": 1}], "json"), "KEY.json in {} has no label for 1 of 3 images"),
        ([*samples([0, 1]), ("0007.cls", "1")], "has 0007.cls and no image 0007.png; --unlabelled"),
        ([*samples([0, 1]), ("0001.cls", "0")], "holds 0001.cls twice"),
        ([*samples([0, 1]), ("0001.png", png(PIXELS[0]))], "holds 0001.png twice"),
        (samples([0, "1.5"]), "gives a.tar/0001.png the label '1.5', wanted a class"),
        (samples([0, "0 1"]), "the label '0 1'"),
        (samples([0, ""]), "the label ''"),
        (samples([0, -1]), "the label -1, wanted a class from 0"),
        (samples([0, 1234567]), "the label 1234567, wanted a class from 0 to 99999"),
        (samples([{"label": "cat"}, {"label": "dog"}], "json"), "the label 'cat'"),
        (samples([{"label": [0, 1]}, {"label": [1, 0]}], "json"), "the label [0, 1]"),
        (samples([{"label": None}, {"label": 0}], "json"), "the label None"),
        (samples(["{", "{"], "json"), "0000.json is no JSON"),
    ],
)
def test_labels_that_are_none_are_refused_and_can_be_ignored(tmp_path, files, words):
    path = tar(tmp_path / "a.tar", files)
    assert words.format(path) in refused(path)
    if "twice" not in words:
        assert open_images(path, labelled=False).labels is None


def test_what_is_passed_over_is_told(tmp_path, capsys):
    captions = samples(["a cat", "2"], "txt") + samples([{"width": 8}, {}], "json")[1::2]
    assert open_images(tar(tmp_path / "a.tar", captions)).labels is None
    assert capsys.readouterr().err == f"note: {tmp_path}/a.tar has no labels (KEY.cls); passed over: KEY.txt, KEY.json\n"
    two = [("a.png", png(PIXELS[0])), ("a.cls", "1"), ("a.json", {"label": 2})]
    assert open_images(tar(tmp_path / "c.tar", two)).labels.tolist() == [1]
    assert capsys.readouterr().err == f"note: {tmp_path}/c.tar: labels are those of KEY.cls; passed over: KEY.json\n"
    assert open_images(tar(tmp_path / "d.tar", [("cat/1.png", png(PIXELS[0])), ("dog/2.png", png(PIXELS[1]))])).labels is None
    assert "its folders are not taken for classes" in capsys.readouterr().err
    open_images(tar(tmp_path / "b.tar", samples([0, 1])))
    open_images(tmp_path / "b.tar", labelled=False)
    assert capsys.readouterr().err == ""
    open_images(tar(tmp_path / "c.tar", samples([None, None])), labelled=False)
    assert capsys.readouterr().err == f"note: {tmp_path}/c.tar has no labels that could be ignored: unlabelled changes nothing\n"


def test_shards_of_one_name_keep_their_own_labels(tmp_path):
    """And shards with labels do not hide that others have none."""
    for folder, labels in (("x", [0, 1]), ("y", [3, 2])):
        (tmp_path / folder).mkdir()
        tar(tmp_path / folder / "a.tar", samples(labels))
    assert open_images(f"{tmp_path}/*/a.tar").labels.tolist() == [0, 1, 3, 2]
    tar(tmp_path / "y/a.tar", samples([None, None]))
    assert "no label for 2 of 4 images" in refused(f"{tmp_path}/*/a.tar")


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
        from potstill.engine.data.images import open_images
        from test_data_elsewhere import LABELS, PIXELS, assert_pixels, refused
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
            assert_pixels(images) and images.labels.tolist() == LABELS and images.classes == ["a", "b", "c"], name
            assert_pixels(pickle.loads(pickle.dumps(images)))
        assert_pixels(open_images(f"hf:{root}/both@test"), range(4))
        assert open_images(f"hf:{root}/pq", labelled=False).labels is None
        assert "wanted hf:NAME[:CONFIG][@SPLIT]" in refused("hf:/nowhere")
        assert "cannot be read" in refused(f"hf:{root}/pq@test")
        plain = data.cast_column("label", datasets.Value("int64"))
        plain.with_format("numpy").save_to_disk(root + "/plain")
        assert open_images(f"hf:{root}/plain").labels.tolist() == LABELS
        plain.cast_column("label", datasets.Value("string")).save_to_disk(root + "/words")
        assert "gives image 0 the label '0', wanted a class" in refused(f"hf:{root}/words")
        datasets.Dataset.from_dict({"a": [1]}).save_to_disk(root + "/none")
        assert "has no images: its columns are a, 1 rows" in refused(f"hf:{root}/none")
    """
    env = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Rows:
    """An imitation of a data set of Hugging Face: `columns` are its columns, `features` their types."""

    def __init__(self, columns, features):
        self.columns, self.features = columns, features

    def __len__(self):
        return len(next(iter(self.columns.values()), []))

    def __getitem__(self, at):
        return self.columns[at] if isinstance(at, str) else {name: values[at] for name, values in self.columns.items()}

    def with_format(self, kind):
        return self

    def select_columns(self, names):
        return Rows({name: self.columns[name] for name in names}, {name: self.features[name] for name in names})

    def cast_column(self, name, kind):
        return self


@pytest.fixture
def hub(monkeypatch):
    """Gives hf:SET, whose images are PIXELS and which has these columns of (type, values) too."""
    library = types.ModuleType("datasets")
    library.Image = type("Image", (), {"__init__": lambda self, **options: None})
    library.ClassLabel = type("ClassLabel", (), {"dtype": "int64"})
    library.exceptions = types.ModuleType("datasets.exceptions")
    library.exceptions.DatasetsError = RuntimeError
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setitem(sys.modules, "datasets.exceptions", library.exceptions)
    monkeypatch.setattr(hugging_face, "find_spec", lambda name: library)

    def made(**columns):
        kinds = {
            name: library.ClassLabel() if isinstance(kind, list) else types.SimpleNamespace(dtype=kind)
            for name, (kind, _) in columns.items()
        }
        for name, (kind, _) in columns.items():
            if isinstance(kind, list):
                kinds[name].names = kind
        pictures = [{"bytes": png(image)} for image in PIXELS[:4]]
        rows = Rows({"image": pictures} | {name: values for name, (_, values) in columns.items()}, {"image": library.Image()} | kinds)
        library.load_dataset = lambda name, config, split: rows
        return "hf:set"

    return made


@pytest.mark.parametrize(
    ("columns", "labels", "classes"),
    [
        ({"label": ("int64", [0, 2, 1, 2])}, [0, 2, 1, 2], None),
        ({"Class": ("uint8", [3, 4, 5, 5])}, [3, 4, 5, 5], None),
        ({"label": ("string", list("abab")), "class_id": ("int32", [1, 2, 0, 0])}, [1, 2, 0, 0], None),
        ({"label": ("int64", [0, 0, 0, 0]), "fine": (["a", "b", "c"], [0, 2, 0, 2])}, [0, 2, 0, 2], ["a", "b", "c"]),
        ({"digit": ("int64", [0, 2, 1, 2])}, None, None),
        ({}, None, None),
    ],
)
def test_columns_of_labels(hub, capsys, columns, labels, classes):
    images = open_images(hub(**columns))
    assert_pixels(images, range(4))
    assert (images.labels.tolist() if labels else images.labels, images.classes) == (labels, classes)
    assert images.label_dim == (len(classes) if classes else max(labels or [-1]) + 1)
    said = capsys.readouterr().err
    assert ("passed over: digit" in said) == ("digit" in columns)
    assert ("column 'class_id'; passed over: label" in said) == ("class_id" in columns)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        ("int64", [0, None, 1, 0], "column 'label' of hf:set gives image 1 the label None, wanted a class from 0 to 99999; --unlabelled"),
        (["a", "b"], [0, None, 1, 0], "the label None, wanted a class from 0 to 1"),
        (["a", "b"], [0, -1, 1, 0], "gives image 1 the label -1, wanted a class from 0 to 1"),
        (["a", "b"], [0, 1, 2, 0], "gives image 2 the label 2"),
        ("int64", [7654321, 1, 2, 3], "the label 7654321"),
        ("float32", [0.0, 1.0, 1.0, 0.0], "the label 0.0"),
        ("string", ["cat", "dog", "cat", "cat"], "the label 'cat'"),
        ("bool", [True, False, True, True], "the label True"),
        ("list", [[0, 1], [1, 0], [0, 1], [0, 1]], "the label [0, 1]"),
    ],
)
def test_columns_that_are_no_labels_are_refused_and_can_be_ignored(hub, kind, values, words):
    name = hub(label=(kind, values))
    assert words in refused(name)
    assert open_images(name, labelled=False).labels is None


def test_a_name_of_a_data_set_is_never_looked_up_without_the_library(monkeypatch):
    monkeypatch.setattr(hugging_face, "find_spec", lambda name: None)
    assert "pip install 'potstill[datasets]'" in refused("hf:some/name@train")


def test_a_damaged_table_is_one_sentence(hub):
    class Damaged(dict):
        def __getitem__(self, name):
            raise OSError("Expected to be able to read 4816 bytes for message body,\ngot 512")

    column = hugging_face.Encoded("hf:SET", [Damaged()], "image")
    with pytest.raises(
        UserError, match=r"^image 0 of hf:SET cannot be read \(Expected to be able to read 4816 bytes for message body, got 512\): "
    ):
        column.read(0)
