"""Names of classes, from the data to weight files, pictures, cards and --labels; and sheets that have the shape of a page."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from potstill.engine import convert, evaluate, sample, train
from potstill.engine.common.class_names import LONGEST, numbers_in, plain
from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.data.images import open_images
from potstill.engine.data.labels import from_json
from potstill.engine.diffusion.sampling import one_step
from potstill.engine.formats.pictures import grid, layout, titles
from potstill.engine.models.student import Student
from potstill.engine.models.weights import load_net, read_metadata, save_net
from tests.test_sample import HEAD, tiny_net

FLOWERS = ["dandelions", "roses", "sun flowers"]


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """The folder of a run on an image folder of three classes, by way of a zip."""
    place, rng = tmp_path_factory.mktemp("flowers"), np.random.default_rng(0)
    for name in FLOWERS:
        (place / "pictures" / name).mkdir(parents=True)
        for i in range(7):
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(place / "pictures" / name / f"{i}.png")
    convert.main(["images", str(place / "pictures"), str(place / "flowers.zip"), "--resolution", "8"])
    quick = ["train.batch=4", "train.kimg=0.008", "teacher.train.batch=4", "teacher.train.kimg=0.008", "net.model_channels=16"]
    quick += ["log.tensorboard=false", "eval.n=6", "device=cpu"]
    train.main(["digits", *quick, f"data.path={place / 'flowers.zip'}", f"run_dir={place / 'run'}"])
    return place


def named(path, names, label_dim=3):
    torch.manual_seed(0)
    said = {"classes": names} if names else {}
    save_net(path, tiny_net(label_dim=label_dim), method="dmd", sampler=one_step(80).to_dict(), **said)
    return path


def read_as_edm_does(path):
    """`_load_raw_labels` of EDM's training/dataset.py, ImageFolderDataset, on a zip: the class of every image."""
    with zipfile.ZipFile(path) as file:
        fnames = sorted(name for name in file.namelist() if name.lower().endswith((".png", ".jpg")))
        labels = json.loads(file.read("dataset.json"))["labels"]
    labels = dict(labels)
    return np.array([labels[fname.replace("\\", "/")] for fname in fnames]).astype(np.int64)


def test_names_of_folders_reach_the_weights_through_edms_zip(flowers):
    with zipfile.ZipFile(flowers / "flowers.zip") as archive:
        assert json.loads(archive.read("dataset.json"))["classes"] == FLOWERS
    assert read_as_edm_does(flowers / "flowers.zip").tolist() == [0] * 7 + [1] * 7 + [2] * 7
    for role in ("teacher", "student"):
        assert read_metadata(flowers / f"run/{role}.safetensors")["classes"] == FLOWERS
    assert Student(flowers / "run").classes == FLOWERS
    assert open_images("digits").classes == list("0123456789")


def test_a_data_free_student_has_its_teachers_names(flowers, tmp_path, capfd):
    given = f"teacher.checkpoint={flowers / 'run/teacher.safetensors'}"
    quick = ["train.batch=4", "train.kimg=0.004", "log.tensorboard=false", "eval.n=6", "device=cpu"]
    train.main(["digits", *quick, "data.path=null", given, "method.regression=0", f"run_dir={tmp_path / 'free'}"])
    assert Student(tmp_path / "free").classes == FLOWERS
    capfd.readouterr()
    convert.main(["images", "synthetic:8x1x3x12", str(tmp_path / "other.zip"), "--resolution", "8"])
    with zipfile.ZipFile(tmp_path / "other.zip") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries["dataset.json"] = json.dumps(json.loads(entries["dataset.json"]) | {"classes": ["dandelions", "tulips\x1b[31m", "x"]}).encode()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    train.main(["digits", *quick, f"data.path={tmp_path / 'other.zip'}", given, "method.regression=0", f"run_dir={tmp_path / 'other'}"])
    said = capfd.readouterr().err
    assert r"note: class 1 is tulips\x1b[31m in other and roses to the teacher: see that both number them alike" in said
    assert Student(tmp_path / "other").classes == FLOWERS


def test_classes_are_chosen_by_name_or_number(flowers, tmp_path, capsys):
    run, out = str(flowers / "run"), tmp_path / "x.npz"
    student = Student(run)
    for text, wanted in ("roses,0", [1, 0]), ("sun flowers, dandelions", [2, 0]), ("number:2,name:roses", [2, 1]), ("all", [0, 1]):
        sample.main([run, "--seeds", "5,6", "--labels", text, "--out", str(out)])
        with np.load(out) as file:
            assert file["labels"].tolist() == wanted
            assert torch.equal(torch.from_numpy(file["images"]).permute(0, 3, 1, 2), student([5, 6], wanted))
    assert torch.equal(student([5, 6], ["roses", 0]), student([5, 6], [1, 0]))
    capsys.readouterr()
    scores = []
    for text in ("roses,sun flowers", "1,2"):
        evaluate.main([run, "--labels", text, "--which", "student"])
        scores.append(json.loads(capsys.readouterr().out)["student"])
    assert scores[0]["fd"] == scores[1]["fd"] and scores[0]["labels"] == scores[1]["labels"] == "1,2"


def test_a_sampled_zip_has_the_names(flowers, tmp_path):
    sample.main([str(flowers / "run"), "--seeds", "0-1", "--out", str(tmp_path / "x.zip")])
    assert open_images(tmp_path / "x.zip").classes == FLOWERS
    few = named(tmp_path / "few.safetensors", FLOWERS, 5)  # of some of its classes the names are known
    sample.main([str(few), "--seeds", "0-4", "--out", str(tmp_path / "y.zip")])
    assert (open_images(tmp_path / "y.zip").classes, open_images(tmp_path / "y.zip").label_dim) == (None, 5)


def test_unknown_names_are_one_bounded_sentence(flowers, capsys):
    for command in (["sample", "--out", "never.png"], ["evaluate", "--which", "student"]):
        main = sample.main if command[0] == "sample" else evaluate.main
        with pytest.raises(UserError) as caught:
            main([str(flowers / "run"), *command[1:], "--labels", "0,rosse"])
        assert str(caught.value) == "no class is called 'rosse'; the nearest name is roses; there are dandelions, roses, sun flowers"
    with pytest.raises(UserError, match="no class is called 'rosse'; the nearest name is roses"):
        Student(flowers / "run")([0], ["rosse"])
    many = [f"{'long' * 45} {k}" for k in range(1000)]
    with pytest.raises(UserError, match=r" … and 990 more$") as caught:
        numbers_in("x" * 10_000, 1000, many)
    assert len(str(caught.value)) < 700


CRANES = ["crane", "hen, chicken", "crane", "3", "0"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1", [1]), ("hen, chicken", [1]), ("1,hen, chicken,3", [1, 1, 3]), ("name:hen, chicken,number:0", [1, 0]), ("name:0", [4]),
        ("number:0", [0]), ("name:3", [3]), ("4", [4]), (" 3 ", [3]),
        ("crane", "'crane' is the name of 2 classes (0, 2): give the number of one"),
        ("name:crane", "'crane' is the name of 2 classes"),
        ("0", "0 is the number of a class and the name of another: write number:0, or name:0"),
        ("5", "labels want to be among 0 … 4, such as 0,1,2, or all; got '5'"),
        ("number:9", "labels want to be among 0 … 4"), ("number:x", "no class is called 'number:x'"),
        ("hen", "no class is called 'hen'"), ("", "no class is called ''"), ("9" * 5000, "labels want to be among 0 … 4"),
        ("-1", "no class is called '-1'"), ("\x1b[31m", r"no class is called '\x1b[31m'"),
    ],
)  # fmt: skip
def test_what_a_word_means(text, found):
    """Names "3" of class 3 and "0" of class 4: one word for both is refused where they differ, and never guessed."""
    if isinstance(found, list):
        assert numbers_in(text, 5, CRANES) == found
        return
    with pytest.raises(UserError) as caught:
        numbers_in(text, 5, CRANES)
    assert str(caught.value).startswith(found) and "\n" not in str(caught.value)


def test_without_names_there_are_numbers(tmp_path):
    """As in a file of an earlier potstill."""
    student = Student(named(tmp_path / "old.safetensors", None))
    assert student.classes is None
    with pytest.raises(UserError, match="these classes have no names, got 'roses': give numbers"):
        student([0], ["roses"])
    assert numbers_in("0, 2", 3, None) == numbers_in("number:0,2", 3, None) == [0, 2]
    with pytest.raises(UserError, match="labels want to be among 0 … 2, such as 0,1,2, or all; got 'roses'"):
        numbers_in("roses", 3, None)
    with pytest.raises(UserError, match="these classes have no names"):
        numbers_in("name:roses", 3, None)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", 1, "c"], "wanted a list of the classes' names"), ("abc", "wanted a list of the classes' names"),
        ([], "wanted a list of the classes' names"), (list("abcd"), "names 4 classes, and its net knows 3"),
    ],
)  # fmt: skip
def test_a_weight_file_with_other_names_is_damaged(tmp_path, names, words):
    torch.manual_seed(0)
    save_net(tmp_path / "x.safetensors", tiny_net(label_dim=3), method="dmd", sampler=one_step(80).to_dict(), classes=names)
    with pytest.raises(Damaged, match=words):
        load_net(tmp_path / "x.safetensors")


HOSTILE = ["red\x1b[31m\n", "x" * 10_000, "\u202eevil", "\ud800", "roses", "roses"]


def test_hostile_names_are_kept_on_one_line_and_short():
    text = json.dumps({"labels": [["a.png", 0]], "classes": HOSTILE}).encode()
    labels = from_json(text, ["a.png"], "dataset.json", print)
    assert labels.classes == [r"red\x1b[31m\n", "x" * (LONGEST - 1) + "…", r"\u202eevil", r"\ud800", "roses", "roses"]
    assert list(map(plain, labels.classes)) == labels.classes
    for wrong in ([1], "ab", {"a": 0}, 7, ["x"] * 100_001):
        with pytest.raises(UserError, match='has "classes" that are no list of at most 100,000 names'):
            from_json(json.dumps({"labels": [["a.png", 0]], "classes": wrong}).encode(), ["a.png"], "dataset.json", print)
    picture = layout(np.arange(60) % 6, 60, HOSTILE).draw(np.zeros((60, 1, 8, 8), np.uint8))
    assert picture.width == 6 * 50 - 2


def test_hostile_names_of_a_weight_file_reach_no_terminal(tmp_path):
    path = named(tmp_path / "x.safetensors", HOSTILE[:3])
    assert Student(path).classes == [r"red\x1b[31m\n", "x" * (LONGEST - 1) + "…", r"\u202eevil"]
    sample.main([str(path), "--seeds", "0-2", "--out", str(tmp_path / "x.png")])
    sample.main([str(path), "--seeds", "0", "--labels", r"red\x1b[31m\n", "--out", str(tmp_path / "x.png")])
    with pytest.raises(UserError) as caught:
        sample.main([str(path), "--labels", "?", "--out", str(tmp_path / "x.png")])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200


# Sheets


@pytest.mark.parametrize("side", [8, 32, 64])
@pytest.mark.parametrize("classes", [1, 3, 10, 100, 1000])
def test_a_sheet_has_about_the_shape_of_a_page(classes, side):
    """`potstill sample` with its 64 seeds, each of the class seed mod classes."""
    labels, images = np.arange(64) % classes, np.arange(64, dtype=np.uint8)[:, None, None, None].repeat(side, 2).repeat(side, 3)
    names = [f"class {k}" for k in range(classes)]
    for known in (names, None):
        how = layout(labels, 64, known)
        picture = how.draw(images)
        assert 1 / 1.6 <= picture.width / picture.height <= 1.6, picture.size
        if 1 < classes <= 10:
            assert how.heads == titles(np.arange(how.columns) % classes, known) and how.columns % classes == 0
        elif classes > 10:
            assert how.told == (titles(labels, known) if known else [])
    pixels = np.asarray(layout(labels, 64, None).draw(images))[HEAD if 1 < classes <= 10 else 0 :]
    scale = {8: 6, 32: 2, 64: 1}[side]  # a whole factor
    for i in range(64):
        row, column = divmod(i, layout(labels, 64).columns)
        top, left = row * (side * scale + 2), column * (side * scale + 2)
        assert (pixels[top : top + side * scale, left : left + side * scale] == i).all()


def test_heads_stand_over_their_columns_and_long_ones_are_cut():
    images = np.full((6, 1, 8, 8), 255, np.uint8)
    plain_grid = grid(images, 3)
    picture = grid(images, 3, heads=["", "a", "house finch, linnet, Carpodacus mexicanus and others of them"])
    top = picture.height - plain_grid.height
    pixels = np.asarray(picture)
    assert top == 3 * 12 + 2 and pixels[top:].shape == np.asarray(plain_grid).shape
    assert pixels[:top, :50].min() == 255  # no word
    assert pixels[: top - HEAD, 50:98].min() == 255 and pixels[:top, 65:83].min() < 128  # one line, at the bottom and in the middle
    assert pixels[:12, 100:].min() < 128
    assert titles([0, 1, 2, 7], ["cat", "雪豹", "chouette épervière"]) == ["cat", "1", "chouette eperviere", "7"]


def test_captions_are_drawn_on_light(flowers, tmp_path):
    sample.main([str(flowers / "run"), "--seeds", "0-8", "--out", str(tmp_path / "x.png")])
    pixels = np.asarray(Image.open(io.BytesIO((tmp_path / "x.png").read_bytes())))
    assert pixels.shape == (HEAD + 3 * 50 - 2, 3 * 50 - 2)  # in letters so small that no word is broken
    assert np.median(pixels[:HEAD]) == 255 and all(pixels[:HEAD, 50 * k : 50 * k + 48].min() < 128 for k in range(3))
