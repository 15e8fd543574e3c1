"""A folder of safetensors shards, and a manifest that says what they are made of: written once, read row by row where they lie.

A shard is whole or absent, and its bytes follow from what it holds: work that was killed goes on at the shard where it was, and ends
with the same files. A row has a CRC-32, which is looked at whenever the row is read. Every tensor of a shard has one entry a row;
where a tensor "x.rows" stands beside "x" it says how many entries of "x" each row has.
"""

import hashlib
import json
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from potstill.engine.common.errors import Damaged, UserError
from potstill.engine.common.kinds import DICT, TEXT, check, count
from potstill.engine.common.progress import Bar
from potstill.engine.common.reading import read_json
from potstill.engine.common.writing import save_tensors, whole
from potstill.engine.readers.headers import opened

MANIFEST, FORMAT = "shards.json", "potstill-shards-1"
KINDS = {"format": TEXT, "kind": TEXT, "rows": count(1), "size": count(1), "about": DICT}
SHARD_BYTES = 2**27  # about as many, in whole rows
CRC, OF = "crc", "of"

Done = Callable[[int], None]


class Manifest(NamedTuple):
    """What a folder of shards holds: `rows` of `kind`, `size` of them a shard, made of `about` (JSON)."""

    kind: str
    rows: int
    size: int
    about: dict[str, Any]

    @property
    def shards(self) -> int:
        return -(-self.rows // self.size)

    def rows_of(self, shard: int) -> range:
        return range(shard * self.size, min((shard + 1) * self.size, self.rows))

    def tag(self, shard: int | str) -> str:
        """What ties a file to its folder and place."""
        return f"{hashlib.sha256(self._text().encode()).hexdigest()} {shard}"

    def write(self, folder: Path) -> None:
        with whole(folder / MANIFEST) as part:
            part.write_text(self._text(), encoding="utf-8")

    def _text(self) -> str:
        return json.dumps({"format": FORMAT} | self._asdict(), indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path, kind: str, advice: str) -> Manifest:
    """Damaged for what is no manifest of this kind."""
    path = folder / MANIFEST
    found = read_json(path, dict, advice)
    check(path, found, KINDS, advice)
    if found.keys() != KINDS.keys() or found["format"] != FORMAT:
        raise Damaged(f"{path} is no manifest as this version writes it: {advice}")
    if found["kind"] != kind:
        raise UserError(f"{folder} holds {found['kind']}, wanted {kind}: name another folder")
    return Manifest(kind, found["rows"], found["size"], found["about"])


def begun(folder: Path, wanted: Manifest, advice: str) -> Manifest:
    """The manifest of a folder to be filled: that of an earlier try if it was after the same, else `wanted`, now written.

    UserError where the folder holds something else, which ends in `advice`.
    """
    if not (folder / MANIFEST).exists():
        if folder.exists() and (not folder.is_dir() or any(path.suffix != ".part" for path in folder.iterdir())):
            raise UserError(f"{folder} exists and holds other files: wanted an empty folder, or a new name for one")
        wanted.write(folder)
        return wanted
    found = read_manifest(folder, wanted.kind, advice)
    refuse_other(folder, found, wanted.rows, wanted.about, advice)
    return found  # its shards may be of another size


def refuse_other(folder: Path, found: Manifest, rows: int, about: Mapping[str, Any], advice: str) -> None:
    """UserError where a folder was made of something else than `about`: one sentence that names the first difference."""
    for name, value in {"number": rows, **about}.items():
        other = {"number": found.rows, **found.about}.get(name)
        if other != value:
            raise UserError(f"{folder} holds {found.kind} of another {name} ({_short(other)}, wanted {_short(value)}): {advice}")


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 40 else text


def path_of(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05}.safetensors"


def write_shards(folder: Path, manifest: Manifest, make: Callable[[range, Done], dict[str, Tensor]], what: str) -> None:
    """Every shard that is not there yet, from the tensors that `make` returns for its rows, which tells how many it has done. `what`: a title."""
    missing = missing_of(folder, manifest)
    todo = sum(len(manifest.rows_of(k)) for k in missing)
    with Bar(what, manifest.rows, manifest.rows - todo, unit=manifest.kind) as bar:
        for k in missing:
            rows = manifest.rows_of(k)
            write_shard(path_of(folder, k), make(rows, bar.update), len(rows), manifest.tag(k))


def write_shard(path: Path, tensors: dict[str, Tensor], n: int, tag: str) -> None:
    """One file, with the rows' checksums. It has but one entry of metadata: of several safetensors writes them in any order."""
    shard = _Shard(tensors, n)
    crc = torch.tensor([_crc(shard.row(i)) for i in range(n)])
    with whole(path) as part:
        save_tensors({name: t.contiguous() for name, t in tensors.items()} | {CRC: crc}, part, {OF: tag})


def missing_of(folder: Path, manifest: Manifest) -> list[int]:
    """The shards that are not there, or shorter than they say."""
    return [k for k in range(manifest.shards) if not is_complete(path_of(folder, k))]


def is_complete(path: Path) -> bool:
    """Is the file there, as long as its header says?"""
    try:
        with opened(path):
            return True
    except UserError:
        return False


class _Shard:
    """The tensors of a file by rows."""

    def __init__(self, tensors: Mapping[str, Tensor], n: int):
        self.tensors = tensors
        self.names = sorted(name for name in tensors if name != CRC)
        self.ends = {name: tensors[f"{name}.rows"].cumsum(0).tolist() for name in tensors if f"{name}.rows" in tensors}
        for name in self.names:
            length = self.ends[name][-1] if name in self.ends else n
            if len(tensors[name]) != length:
                raise Damaged(f"{name} has {len(tensors[name]):,} entries and not {length:,}")

    def row(self, i: int) -> dict[str, Tensor]:
        """Entry i of every tensor, as views."""
        return {name: self.tensors[name][self._slice(name, i)] for name in self.names}

    def _slice(self, name: str, i: int) -> int | slice:
        if name not in self.ends:
            return i
        ends = self.ends[name]
        return slice(ends[i - 1] if i else 0, ends[i])


def _crc(row: Mapping[str, Tensor]) -> int:
    crc = 0
    for name in sorted(row):
        crc = zlib.crc32(row[name].contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


class Shards:
    """The rows of shards on disk, mapped into memory. It is pickled without what is open.

    files and the number of rows in each; tags: what their metadata must say (None: files of somebody else's, whose rows may have no
    checksum). advice: what to do about a damaged file.
    """

    def __init__(self, files: Sequence[Path], counts: Sequence[int], tags: Sequence[str] | None, advice: str):
        self.files, self.counts, self.tags, self.advice = list(files), list(counts), tags, advice
        self.starts = list(accumulate(self.counts, initial=0))
        self._open: dict[int, _Shard] = {}

    @classmethod
    def in_folder(cls, folder: Path, manifest: Manifest, advice: str) -> "Shards":
        """UserError where some are missing."""
        files = [path_of(folder, k) for k in range(manifest.shards)]
        if missing := sum(not file.exists() for file in files):
            raise UserError(f"{folder} is unfinished, {missing} of its {manifest.shards} shards are missing: {advice}")
        tags = [manifest.tag(k) for k in range(manifest.shards)]
        return cls(files, [len(manifest.rows_of(k)) for k in range(manifest.shards)], tags, advice)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def row(self, i: int) -> dict[str, Tensor]:
        """All tensors of row i, views of the file's own memory: not to be written to. Damaged where its checksum differs."""
        k = bisect_right(self.starts, i) - 1
        shard, i = self._shard(k), i - self.starts[k]
        row = shard.row(i)
        if CRC in shard.tensors and _crc(row) != int(shard.tensors[CRC][i]):
            raise self._damaged(k, f"the checksum of its row {i} differs")
        return row

    def column(self, name: str) -> Tensor | None:
        """One tensor of all rows; None where there is none. Its checksums are not looked at."""
        parts = [self._shard(k).tensors.get(name) for k in range(len(self.files))]
        return None if parts[0] is None else torch.cat([t for t in parts if t is not None])

    def _shard(self, k: int) -> _Shard:
        if k not in self._open:
            self._open[k] = self._opened(k)
        return self._open[k]

    def _opened(self, k: int) -> _Shard:
        try:
            with opened(self.files[k]) as file:
                if self.tags is not None and (file.metadata() or {}).get(OF) != self.tags[k]:
                    raise Damaged("it belongs to another folder, or to another place in it")
                return _Shard({name: file.get_tensor(name) for name in file.keys()}, self.counts[k])  # noqa: SIM118 (safe_open is no dict)
        except UserError as error:
            raise self._damaged(k, str(error)) from error

    def _damaged(self, k: int, why: str) -> Damaged:
        return Damaged(f"{self.files[k]} is no shard as it was written ({why}): {self.advice}")
