"""Images in webdataset's shards: tar files in which KEY.png and KEY.cls, the number of its class, lie side by side.

    data/train-000.tar      data/train-{000..063}.tar      data/train-*.tar

webdataset streams such files; here every image must be found by its number, for which the tars' own directory is enough:
nothing has to be installed, and nothing is unpacked.
"""

import glob
import json
import os
import re
import tarfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.files import MAX_FILE_BYTES, is_image
from engine.errors import UserError

RANGE = re.compile(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", re.DOTALL)
MOST_SHARDS = 100_000
LONGEST_LABEL = 32  # bytes of a .cls


def shards_of(text: str) -> list[Path]:
    """The tar files that a name with {000..063} or * stands for, in order; only those that are there."""
    if match := RANGE.fullmatch(text):
        before, first, last, after = match.groups()
        numbers = range(int(first), int(last) + 1)[:MOST_SHARDS]
        return [path for n in numbers for path in shards_of(f"{before}{n:0{len(first)}}{after}")]
    place = Path(text).expanduser()
    return [place] if place.is_file() else sorted(Path(found) for found in glob.glob(str(place)))


class Tars:
    """`engine.data.files.Files` over the shards; class labels come as the text of a dataset.json."""

    def __init__(self, text: str):
        self.path, self.shards = Path(text), shards_of(text)
        wanted = RANGE.fullmatch(text)
        if wanted and len(self.shards) < int(wanted[3]) + 1 - int(wanted[2]) and "*" not in text:
            raise UserError(f"only {len(self.shards)} of the shards {text} are there: get the others, or shorten the range")
        self.names: list[str] = []
        places, classes = [], {}
        for k, shard in enumerate(self.shards):
            for member in _members(shard):
                key, _, kind = member.name.removeprefix("./").partition(".")  # webdataset: at the first dot
                name = f"{shard.name}/{key}.{kind}"
                if is_image(name):
                    self.names.append(name)
                    places.append((k, member.offset_data, member.size))
                elif kind == "cls":
                    classes[f"{shard.name}/{key}"] = k, member.offset_data, member.size
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self._open()
        self.metadata = self._labels(classes) if classes else None

    def head(self, i: int, size: int) -> bytes:
        shard, offset, length = self._places[i].tolist()
        return os.pread(self._fds[shard], min(size, length), offset)

    def read(self, i: int) -> bytes:
        length = int(self._places[i, 2])
        if length > MAX_FILE_BYTES:
            raise UserError(f"{self.title(i)} has {length:,} bytes, wanted at most {MAX_FILE_BYTES:,}")
        data = self.head(i, length)
        if len(data) != length:
            raise UserError(f"{self.title(i)} is cut off: copy or download the shard again")
        return data

    def title(self, i: int) -> str:
        return f"{self.shards[int(self._places[i, 0])].parent}/{self.names[i]}"

    def _labels(self, classes: dict[str, tuple[int, int, int]]) -> bytes:
        labels = []
        for name in self.names:
            shard, _, file = name.partition("/")
            found = classes.get(f"{shard}/{file.partition('.')[0]}")
            if found:
                text = os.pread(self._fds[found[0]], min(found[2], LONGEST_LABEL), found[1]).strip()
                labels.append([name, int(text) if text.isdigit() else text.decode("latin1")])
        return json.dumps({"labels": labels}).encode()

    def _open(self) -> None:
        self._fds = [os.open(shard, os.O_RDONLY) for shard in self.shards]
        for fd in self._fds:
            weakref.finalize(self, os.close, fd)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_fds"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._open()


def _members(shard: Path) -> list[tarfile.TarInfo]:
    """The plain files in a tar, in their order."""
    try:
        with tarfile.open(shard, "r:") as tar, shard.open("rb") as file:
            members = list(tar)
            file.seek(max((-(-(m.offset_data + m.size) // 512) * 512 for m in members if m.isreg()), default=0))
            if not members or file.read(512) != bytes(512):  # tarfile passes over an end that is missing
                raise tarfile.ReadError("its end is missing" if members else "it is empty")
            return [member for member in members if member.isreg()]
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{shard} is no complete, uncompressed tar ({error}): copy or download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {shard}: {error.strerror}") from error
