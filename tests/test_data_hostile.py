"""Data sets that contradict themselves, and files made to hurt: refused by name in one sentence, in little memory and time."""

import io
import json
import os
import random
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from potstill.engine.common.errors import UserError
from potstill.engine.convert import main
from potstill.engine.data.files import open_files
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


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_animations_and_several_pages(tmp_path, kind, capsys):
    (tmp_path / "in").mkdir()
    for name, pictures in (("a", PIXELS[:1]), ("b", PIXELS[1:4]), ("c", PIXELS[4:5])):
        (tmp_path / "in" / f"{name}.{kind}").write_bytes(encoded(*pictures, kind=kind))
    sentence = f"{tmp_path}/in/b.{kind} is an animation or has several pages, wanted one picture a file: save the one that is meant"
    assert refused(tmp_path / "in").startswith(sentence)
    with pytest.raises(UserError, match="is an animation"):
        convert(tmp_path / "in", tmp_path / "out.zip")
    assert len(convert(tmp_path / "in", tmp_path / "out.zip", "--skip-corrupt")) == 2
    assert f"left out: {sentence}" in capsys.readouterr().err


def test_the_first_picture_of_a_cameras_jpeg_is_the_photo(tmp_path):
    """Behind it in the same file, an MPO, there are previews or depth; many cameras write nothing else."""
    whole = encoded(*PIXELS[:3], kind="mpo")
    (tmp_path / "a.jpg").write_bytes(whole)
    wanted = Image.open(io.BytesIO(whole))
    assert wanted.format == "MPO" and wanted.n_frames == 3
    assert np.array_equal(open_images(tmp_path).read(0).transpose(1, 2, 0), np.asarray(wanted))


def test_an_animation_that_says_so_late_is_found_too(tmp_path):
    whole = encoded(*PIXELS[:2])
    text = b"tEXt" + bytes(5000)
    late = whole[:33] + struct.pack(">I", 5000) + text + struct.pack(">I", zlib.crc32(text)) + whole[33:]
    (tmp_path / "a.png").write_bytes(late)
    with pytest.raises(UserError, match="is an animation"):
        open_images(tmp_path)


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


def test_an_array_twice_in_an_npz(tmp_path):
    np.savez(tmp_path / "a.npz", images=PIXELS)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as out:
        out.writestr("images", b"another")
    assert refused(tmp_path / "a.npz").startswith(f"{tmp_path}/a.npz holds an array twice (images, images), wanted every array once")


# Files made to hurt


def pax(path, *, size=None, then=b"", kind=b"x", records=b"", repeated=1):
    """A tar that begins with headers of pax (kind x) or of another kind, of `size` bytes as they claim."""
    header = tarfile.TarInfo("h")
    header.type, header.size = kind, len(records) if size is None else size
    block = header.tobuf(tarfile.GNU_FORMAT) + records + bytes(-len(records) % 512)
    path.write_bytes(block * repeated + then + bytes(1024))
    return path


def picture(name="a.png"):
    info = tarfile.TarInfo(name)
    data = encoded(PIXELS[0])
    info.size = len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def measured(work):
    """What it returns, and how many bytes it took at most."""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("tricks", "words"),
    [
        ({"size": 2**40}, "it has a header of 1,099,511,627,776 bytes"),
        ({"size": 2**40, "kind": b"L"}, "it has a header of"),
        ({"records": b"18 size=-10000000\n", "then": picture()}, "does not lie behind the file before it"),
        ({"records": b"8 a=bcd\n", "then": picture(), "repeated": 3000}, "maximum recursion depth"),
        ({"records": b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n", "then": picture()}, ""),
    ],
)
def test_tars_that_claim_too_much_or_never_end(tmp_path, tricks, words):
    sentence, peak = measured(lambda: refused(pax(tmp_path / "a.tar", **tricks)))
    assert sentence.startswith(f"{tmp_path}/a.tar is no complete, uncompressed tar (") and words in sentence
    assert peak < 2**24


def test_arrays_that_claim_terabytes_or_unpack_to_next_to_nothing(tmp_path, monkeypatch):
    whole = io.BytesIO()
    np.save(whole, PIXELS)
    claimed = whole.getvalue().replace(b"(6, 8, 8, 3)", b"(6000000000000, 8, 8, 3)").replace(b" " * 12, b"", 1)
    archive(tmp_path / "a.npz", [("images.npy", claimed)])
    assert "is no complete .npz of plain arrays (a header that claims 1,152,000,000,000,000 bytes of uint8, the array has 1,152" in refused(
        tmp_path / "a.npz"
    )
    archive(tmp_path / "b.npz", [("images.npy", b"no array")])
    assert "is no complete .npz of plain arrays (the magic string is not correct" in refused(tmp_path / "b.npz")
    monkeypatch.setattr("potstill.engine.data.arrays.BOMB", 2**20)
    np.savez_compressed(tmp_path / "c.npz", images=np.zeros((2000, 32, 32), np.uint8))
    assert f"of 'images' to {2000 * 32 * 32 + 128:,}, which pictures never do: write it with numpy.savez" in refused(tmp_path / "c.npz")


def test_a_file_in_a_zip_that_claims_gigabytes_takes_no_more_memory_than_the_zip_has_bytes(tmp_path):
    path = archive(tmp_path / "a.zip", [("a.png", encoded(PIXELS[0])), ("b.png", encoded(PIXELS[1]))])
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + 20  # the packed size, in the directory
    data[at : at + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    files = open_files(path)

    def read():
        with pytest.raises(UserError, match=r"a.png is damaged"):
            files.read(0)

    assert measured(read)[1] < 2**24


def test_a_dataset_json_far_longer_than_its_images_need(tmp_path, monkeypatch):
    monkeypatch.setattr("potstill.engine.data.files.MAX_METADATA", (1000, 256))
    text = json.dumps({"labels": [["a.png", 0]], "more": [[]] * 10_000})
    path = archive(tmp_path / "a.zip", [("a.png", encoded(PIXELS[0])), ("dataset.json", text)], zipfile.ZIP_DEFLATED)
    said = f"has {len(text):,} bytes, wanted at most 1,256 for so many images: leave it out, or write it anew"
    assert said in refused(path)
    (tmp_path / "f").mkdir()
    with zipfile.ZipFile(path) as packed:
        packed.extractall(tmp_path / "f")
    assert said in refused(tmp_path / "f")


NUMBER = '{"labels": [["a.png", ' + "9" * 5000 + "]]}"
TEXTS = ["[" * 100_000, NUMBER, "\0", "\xff\xfe", '{"labels": 3}', '{"labels": [[[], 0]]}', "[]", "1e999", ""]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_whatever_a_dataset_json_says(tmp_path, text):
    path = archive(tmp_path / "a.zip", [("a.png", encoded(PIXELS[0])), ("dataset.json", text.encode("latin1"))])
    assert refused(path).startswith(f"dataset.json in {path}")


def test_a_pipe_among_the_pictures_is_not_waited_for(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(PIXELS[0]))
    os.mkfifo(tmp_path / "b.png")
    assert refused(tmp_path) == f"{tmp_path}/b.png is no file but a pipe or a device: remove it"


def shards(kind):
    def made(path):
        with tarfile.open(path, "w", format=kind) as out:
            for i, pixels in enumerate(PIXELS):
                for name, data in ((f"ä{'x' * 120}{i}.png", encoded(pixels)), (f"ä{'x' * 120}{i}.cls", b"1")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    out.addfile(info, io.BytesIO(data))

    return made


def zipped(packing):
    pairs = [[f"d/ä{i}.png", i % 3] for i in range(6)]
    files = [(name, encoded(PIXELS[i])) for i, (name, _) in enumerate(pairs)]
    return lambda path: archive(path, [*files, ("dataset.json", json.dumps({"labels": pairs}))], packing)


def npz(save):
    return lambda path: save(path, images=PIXELS, labels=np.arange(6) % 3)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("a.zip", zipped(zipfile.ZIP_STORED)),
        ("a.zip", zipped(zipfile.ZIP_DEFLATED)),
        ("a.tar", shards(tarfile.GNU_FORMAT)),
        ("a.tar", shards(tarfile.PAX_FORMAT)),
        ("a.npz", npz(np.savez)),
        ("a.npz", npz(np.savez_compressed)),
    ],
)
def test_whatever_is_damaged_is_one_sentence(tmp_path, name, made):
    """Bytes changed, above all in headers and directories, and ends cut off: read or refused, never another exception."""
    made(tmp_path / name)
    whole, chance, sentences = (tmp_path / name).read_bytes(), random.Random(0), []
    for _ in range(80):
        data = bytearray(whole[: chance.randrange(len(whole))] if chance.random() < 0.2 else whole)
        for _ in range(chance.choice((1, 1, 3, 10))):
            places = range(len(data)), range(max(0, len(data) - 1500), len(data)), range(min(len(data), 700))
            if data:
                data[chance.choice(chance.choice(places))] = chance.choice((0, 255, ord("-"), ord("9"), chance.randrange(256)))
        (tmp_path / name).write_bytes(data)
        try:
            images = open_images(tmp_path / name)
            images.pixels(), images.fingerprint()
        except UserError as error:
            sentences.append(str(error))
    assert len(sentences) > 30 and "\n" not in "".join(sentences)
