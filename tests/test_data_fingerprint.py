"""A data set's fingerprint: the same wherever the same data lie, and another one whatever changes."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.engine.data.images import open_images

ROOT = Path(__file__).parent.parent
PIXELS = np.random.default_rng(0).integers(0, 256, (200, 4, 4, 3), np.uint8)


def png(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    return data.getvalue()


def files():
    """What a data set is made of: names, bytes and a class each."""
    return {f"{i:03d}.png": (png(pixels), i % 3) for i, pixels in enumerate(PIXELS)}


def folder(path, found):
    path.mkdir(parents=True)
    for name, (data, _) in found.items():
        (path / name).write_bytes(data)
    (path / "dataset.json").write_text(json.dumps({"labels": [[name, label] for name, (_, label) in found.items()]}))
    return path


def archive(path, found):
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as out:
        for name, (data, _) in found.items():
            out.writestr(name, data)
        out.writestr("dataset.json", json.dumps({"labels": [[name, label] for name, (_, label) in found.items()]}))
    return path


def shard(path, found):
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as out:
        for name, (data, label) in found.items():
            for member, text in ((name, data), (name.replace(".png", ".cls"), str(label).encode())):
                info = tarfile.TarInfo(member)
                info.size = len(text)
                out.addfile(info, io.BytesIO(text))
    return path


def arrays(path, found):
    path.parent.mkdir(parents=True)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data, _ in found.values()])
    np.savez(path, images=pixels, labels=np.array([label for _, label in found.values()]))
    return path


KINDS = {"set": folder, "set.zip": archive, "set.tar": shard, "set.npz": arrays}


def changed(old, **what):
    found = files()
    data, label = found.pop(old)
    renamed = {what.get("name", old): (what.get("data", data), what.get("label", label))}
    return dict(sorted((found | renamed).items()))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_data_have_equal_fingerprints_and_others_have_not(tmp_path, kind):
    def of(place, found):
        return open_images(KINDS[kind](tmp_path / place / kind, found)).fingerprint()

    one = of("a", files())
    assert of("b/c", files()) == one == json.loads(json.dumps(one))
    other = png(255 - PIXELS[0])
    relabelled = of("label", changed("117.png", label=1))
    assert relabelled["labels"] != one["labels"]
    assert relabelled | {"labels": one["labels"]} == one
    for number, name in enumerate(("000.png", "199.png")):
        assert of(f"bytes{number}", changed(name, data=other))["contents"] != one["contents"], name
    if kind != "set.npz":
        assert of("name", changed("117.png", name="117b.png"))["names"] != one["names"]
        assert of("size", changed("118.png", data=other + b"more"))["sizes"] != one["sizes"]
    if kind == "set.zip":  # its directory knows a checksum of every file
        bit = bytearray(files()["118.png"][0])
        bit[-20] ^= 1
        assert of("bit", changed("118.png", data=bytes(bit)))["sizes"] != one["sizes"]


def test_a_fingerprint_says_what_it_is_made_of_and_is_the_same_in_another_process(tmp_path):
    path = folder(tmp_path / "set", files())
    found = open_images(path).fingerprint()
    by_hand = hashlib.sha256()
    for i in sorted({round(k * 199 / 63) for k in range(64)}):
        by_hand.update(hashlib.sha256((path / f"{i:03d}.png").read_bytes()).digest())
    assert found["contents"] == by_hand.hexdigest()
    assert found["labels"] == hashlib.sha256(b"".join((i % 3).to_bytes(8, "little") for i in range(200))).hexdigest()
    assert (found["images"], found["first"], found["resolution"], found["channels"], found["label_dim"]) == (200, "4x4 RGB", 4, 3, 3)
    assert open_images(path, labelled=False).fingerprint()["labels"] is None
    code = (
        "import json, sys; from potstill.engine.data.images import open_images; print(json.dumps(open_images(sys.argv[1]).fingerprint()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == found
