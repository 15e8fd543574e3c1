"""Images in webdataset's shards: tar files in which KEY.png and KEY.cls, the number of its class, lie side by side.

A sample's key is its folder and the file's name up to the first dot; the rest, in lower case, is the column.

    data/train-000.tar      data/train-{000..063}.tar      data/train-*.tar

webdataset streams such files; here every image must be found by its number, for which the tars' own directory is enough:
nothing has to be installed, and nothing is unpacked.
"""

import glob
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from potstill.engine.common.errors import UserError, reading
from potstill.engine.data.files import MAX_FILE_BYTES, SUFFIXES, OpenFile, is_hidden
from potstill.engine.data.labels import IGNORE, Labels, Reader, Say, from_keys, has_class_folders, usual
from potstill.engine.data.pictures import NO_IMAGE

RANGE = re.compile(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", re.DOTALL)
SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # webdataset's: key and column meet at the file name's first dot
NUMBER = re.compile(r"[+-]?[0-9]+")
MOST_SHARDS = 100_000
LONGEST = 2**20  # bytes of a file beside an image, or of a header


class Key(NamedTuple):
    """A sample."""

    shard: int
    name: str


class Place(NamedTuple):
    """A file of a sample."""

    offset: int
    size: int
    name: str


Column = dict[Key, Place]


def shards_of(text: str) -> list[Path]:
    """The tar files that a name with {000..063} or * stands for, in order; only those that are there."""
    if match := RANGE.fullmatch(text):
        before, first, last, after = match.groups()
        numbers = range(int(first), int(last) + 1)[:MOST_SHARDS]
        return [path for n in numbers for path in shards_of(f"{before}{n:0{len(first)}}{after}")]
    place = Path(text).expanduser()
    return [place] if place.is_file() else sorted(Path(found) for found in glob.glob(str(place)))


def read_tars(text: str) -> tuple["Tars", Reader]:
    """The images of the shards, and how to read their labels. UserError where there are none, or it is unclear which."""
    shards = shards_of(text)
    wanted = RANGE.fullmatch(text)
    if wanted and len(shards) < int(wanted[3]) + 1 - int(wanted[2]) and "*" not in text:
        raise UserError(f"only {len(shards)} of the shards {text} are there: get the others, or shorten the range")
    columns = _columns(shards)
    images, others = _images_and_columns(columns, text)
    tars = Tars(Path(text), shards, images, others.get("txt", {}))
    return tars, lambda say: _labels(tars, list(images), others, say)


def _columns(shards: list[Path]) -> dict[str, Column]:
    """Where every file of every sample lies, by extension."""
    columns: dict[str, Column] = {}
    for k, shard in enumerate(shards):
        for member in _members(shard):
            name = member.name.removeprefix("./")
            split = SAMPLE.fullmatch(name)
            if split is None or is_hidden(name):
                continue
            key, kind = Key(k, split[1]), split[2].lower()
            if key in columns.setdefault(kind, {}):
                raise UserError(f"{shard} holds {key.name}.{kind} twice, wanted every sample once")
            columns[kind][key] = Place(member.offset_data, member.size, name)
    return columns


def _images_and_columns(columns: dict[str, Column], text: str) -> tuple[Column, dict[str, Column]]:
    """The images by their samples, and the other columns. KEY.seg.png is no image of its own: its sample has KEY.png."""
    images: Column = {}
    for kind in [kind for kind in columns if f".{kind}" in SUFFIXES]:
        if twice := images.keys() & columns[kind].keys():
            key = min(twice)
            raise UserError(f"{text} has two images of one sample, {images[key].name} and {columns[kind][key].name}: wanted one")
        images |= columns.pop(kind)
    for kind, places in columns.items():
        if kind.endswith(SUFFIXES) and (alone := places.keys() - images.keys()):
            key = min(alone)
            raise UserError(
                f"{text} holds {places[key].name}, but no image {key.name}.png: a sample's name ends at the first dot of the file's, "
                "and all after it names the column; rename the files"
            )
    if not images:
        raise UserError(f"no images in {text}: wanted tars with KEY.png and, if any, KEY.cls")
    return dict(sorted(images.items(), key=lambda item: (item[0].shard, item[1].offset))), columns


def _labels(tars: "Tars", keys: list[Key], columns: dict[str, Column], say: Say) -> Labels | None:
    """KEY.cls, or a number in KEY.txt, or a usual name of labels in KEY.json."""
    kinds = [*usual(columns), *(kind for kind in ("txt", "json") if kind in columns)]
    kind, found = "", {}
    for kind in kinds:
        values = {
            key: _value(tars.text(key, place), kind, f"{tars.shards[key.shard]}: {place.name}") for key, place in columns[kind].items()
        }
        found = _of_json(values) if kind == "json" else values
        if kind == "txt" and not all(type(value) is int for value in values.values()):
            found = {}  # captions
        if found:
            break
    if not found:
        if has_class_folders([f"{key.name}.png" for key in keys]):
            say(
                f"{tars.path} has no labels (KEY.cls); its folders are not taken for classes: potstill convert images on the unpacked folder does that"
            )
        elif columns:
            say(f"{tars.path} has no labels (KEY.cls); passed over: {', '.join(f'KEY.{kind}' for kind in columns)}")
        return None
    if more := [other for other in kinds if other != kind]:
        say(f"{tars.path}: labels are those of KEY.{kind}; passed over: {', '.join(f'KEY.{other}' for other in more)}")
    if alone := found.keys() - set(keys):
        key = min(alone)
        raise UserError(f"{tars.shards[key.shard]} has {key.name}.{kind} and no image {key.name}.png; {IGNORE}")
    return from_keys(found, keys, None, tars.names, f"KEY.{kind} in {tars.path}")


def _value(text: bytes, kind: str, title: str) -> Any:
    """What a small file says: a number where it is one, else its text; of KEY.json the object."""
    if kind == "json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{title} is no JSON of at most {LONGEST:,} bytes; {IGNORE}") from error
    word = text.decode("latin1").strip()
    return int(word) if NUMBER.fullmatch(word) else word


def _of_json(values: dict[Key, Any]) -> dict[Key, Any]:
    """Bare numbers, or what a usual name stands for: the first that always is a number, else the first."""
    if all(type(value) is int for value in values.values()):
        return values
    objects = {key: value for key, value in values.items() if isinstance(value, dict)}
    names = usual(dict.fromkeys(name for value in objects.values() for name in value))
    by_name = [{key: value[name] for key, value in objects.items() if name in value} for name in names]
    return next((of for of in by_name if all(type(v) is int for v in of.values())), by_name[0] if by_name else {})


class Tars:
    """The images of the shards, read as those of a `Folder`."""

    def __init__(self, path: Path, shards: list[Path], images: Column, texts: Column):
        self.path, self.shards = path, shards
        self.names = [f"{shards[key.shard].name}/{place.name}" for key, place in images.items()]
        self._places = np.array([(key.shard, place.offset, place.size) for key, place in images.items()], np.int64)
        self._texts = np.array([(key.shard, texts[key].offset, texts[key].size) for key in images if key in texts], np.int64)
        self._bytes = [OpenFile(shard) for shard in shards]

    def text(self, key: Key, place: Place) -> bytes:
        """The start of a small file."""
        return self._bytes[key.shard].read(min(place.size, LONGEST), place.offset)

    def captions(self) -> list[str] | None:
        """KEY.txt of every image; None where there are none, or all are numbers. UserError where some are missing."""
        texts = [
            self._bytes[k].read(min(size, LONGEST), offset).decode("utf-8", "replace").strip() for k, offset, size in self._texts.tolist()
        ]
        if all(map(NUMBER.fullmatch, texts)):  # also of none
            return None
        if len(texts) < len(self.names):
            raise UserError(f"{self.path} has {len(texts):,} captions (KEY.txt) for {len(self.names):,} images, wanted one for each")
        return texts

    def head(self, i: int, size: int) -> bytes:
        shard, offset, length = self._places[i].tolist()
        return self._bytes[shard].read(min(size, length), offset)

    def read(self, i: int) -> bytes:
        length = int(self._places[i, 2])
        if length > MAX_FILE_BYTES:
            raise UserError(f"{self.title(i)} has {length:,} bytes, wanted at most {MAX_FILE_BYTES:,}")
        data = self.head(i, length)
        if len(data) != length:
            raise UserError(f"{self.title(i)} is cut off: copy or download the shard again")
        return data

    def sizes(self) -> np.ndarray:
        return self._places[:, 2:]

    def title(self, i: int) -> str:
        return f"{self.shards[int(self._places[i, 0])].parent}/{self.names[i]}"


class _Headers(io.BufferedReader):
    """A tar's file, of which only headers are read: their length stands in the file, and memory is asked for as it says."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LONGEST:
            raise tarfile.ReadError(f"it has a header of {size:,} bytes")
        return super().read(size)


def _members(shard: Path) -> list[tarfile.TarInfo]:
    """The plain files in a tar, in their order."""
    try:
        with reading(shard), _Headers(io.FileIO(shard)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members: list[tarfile.TarInfo] = []
            for member in tar:
                if member.size < 0 or (members and member.offset_data <= members[-1].offset_data):  # it would never come to an end
                    raise tarfile.ReadError(f"{member.name} does not lie behind the file before it")
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} is stored with holes, wanted plain files")
                members.append(member)
            file.seek(max((-(-(m.offset_data + m.size) // 512) * 512 for m in members if m.isreg()), default=0))
            if not members or file.read(512) != bytes(512):  # tarfile passes over an end that is missing
                raise tarfile.ReadError("its end is missing" if members else "it is empty")
            return [member for member in members if member.isreg()]
    except UserError:
        raise
    except (tarfile.TarError, RecursionError, *NO_IMAGE) as error:
        raise UserError(f"{shard} is no complete, uncompressed tar ({error}): copy or download it again") from error
