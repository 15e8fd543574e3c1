"""Files of prompts and captions: every line is a prompt, and a line that is none is named."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from potstill.engine.common.errors import UserError
from potstill.engine.data.captions import captions_of, read_prompts
from potstill.engine.data.images import open_images
from potstill.engine.data.sources import open_source


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a cat\r\n  two\u2028dogs \n\n"),  # U+2028 separates lines for str.splitlines
        ("p.txt", "\ufeffa cat\ntwo\u2028dogs"),
        ("p.jsonl", '{"prompt": "a cat", "text": "not this"}\n{"caption": "two\\u2028dogs", "id": 3}\n'),
    ],
)
def test_prompts_are_the_lines_of_a_file(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == ["a cat", "two\u2028dogs"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", b"", "p.txt is empty, wanted at least one prompt: line 1 is missing"),
        ("p.txt", b"\n \n", "p.txt is empty"),
        ("p.txt", b"a\n\nb", "line 2: nothing, wanted a prompt"),
        ("p.txt", b"a\nb\0", "line 2: no text"),
        ("p.txt", b"a\n\xff", "line 2: no UTF-8"),
        ("p.jsonl", b'{"text": "a"}\n{"text": ', "line 2: no JSON"),
        ("p.jsonl", b'{"text": "a"}\n["b"]', "line 2: holds a list"),
        ("p.jsonl", b'{"text": "a"}\n{"txt": "b"}', "line 2: wanted a text called prompt or caption or text, got keys txt"),
        ("p.jsonl", b'{"prompt": 3, "text": "a"}', "line 1: wanted a text called prompt or caption or text, got prompt = 3"),
        ("p.jsonl", b"[" * 100_000, "line 1: no JSON"),
    ],
)
def test_what_is_no_prompt_is_named_with_its_line(name, text, said, tmp_path):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / name)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_no_file_and_a_folder_without_captions(tmp_path):
    with pytest.raises(UserError, match="no prompts at"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"has no captions\.jsonl"):
        read_prompts(tmp_path)


def png(value):
    data = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(data, "png")
    return data.getvalue()


def folder_of(path, names):
    for k, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(png(k))
    return path


def lines(*objects):
    return "".join(json.dumps(one) + "\n" for one in objects)


def test_captions_beside_a_folder_by_name(tmp_path):
    folder_of(tmp_path / "set", ["a.png", "b/c.png"])
    found = lines({"file_name": "b/c.png", "text": "of c"}, {"file_name": "a.png", "text": "of a"})
    (tmp_path / "set/metadata.jsonl").write_text(found)
    assert captions_of(open_source(tmp_path / "set", labelled=False)) == ["of a", "of c"]

    (tmp_path / "set/metadata.jsonl").write_text(lines({"file_name": "a.png", "text": "of a"}))
    with pytest.raises(UserError, match=r"no caption for 1 of 2 images: b/c\.png"):
        captions_of(open_source(tmp_path / "set", labelled=False))


def test_captions_of_the_classes(tmp_path):
    """By a text with {} for their names, or by a file with one for each; also of some of the images."""
    folder = folder_of(tmp_path / "set", ["red fox/1.png", "red fox/2.png", "zebra/3.png"])
    by_name = open_images(folder, captions="a photo of a {}")
    assert by_name.captions == ["a photo of a red fox"] * 2 + ["a photo of a zebra"]
    assert pickle.loads(pickle.dumps(by_name)).__dict__.keys() == by_name.__dict__.keys() - {"captions"}, "a worker reads pictures only"
    assert by_name.part(np.array([2, 0])).captions == ["a photo of a zebra", "a photo of a red fox"]
    (tmp_path / "two.txt").write_text("it is red\nit is striped\n")
    assert open_images(folder, captions=str(tmp_path / "two.txt")).captions == ["it is red"] * 2 + ["it is striped"]
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    assert open_images(folder, captions=str(tmp_path / "three.txt")).captions == ["a", "b", "c"]
    np.savez(tmp_path / "numbers.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.array([0, 1]))
    with pytest.raises(UserError, match="wants the names of classes, and numbers has none"):
        _ = open_images(tmp_path / "numbers.npz", captions="a {}").captions


def test_captions_of_a_file_in_the_order_of_the_images(tmp_path):
    source = open_source(folder_of(tmp_path / "set", ["a.png", "b.png"]))
    assert captions_of(source) is None
    (tmp_path / "c.txt").write_text("of a\nof b\n")
    assert captions_of(source, tmp_path / "c.txt") == ["of a", "of b"]
    (tmp_path / "c.txt").write_text("of a\n")
    with pytest.raises(UserError, match="has 1 captions, wanted one for each of the 2 images"):
        captions_of(source, tmp_path / "c.txt")


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ({"a": "of a\n", "b": "of é"}, ["of a", "of é"]),
        ({"a": "3", "b": "4"}, None),  # numbers of classes
        ({}, None),
    ],
)
def test_captions_in_tars(texts, found, tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for key in "ab":
            for kind, data in (("png", png(1)), ("txt", texts.get(key, "").encode())):
                if data:
                    entry = tarfile.TarInfo(f"{key}.{kind}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    assert captions_of(open_source(str(tmp_path / "t.tar"))) == found


def test_a_tar_with_one_caption_too_few(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in (("a.png", png(1)), ("b.png", png(2)), ("b.txt", b"of b")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    with pytest.raises(UserError, match=r"1 captions \(KEY.txt\) for 2 images"):
        captions_of(open_source(str(tmp_path / "t.tar")))
