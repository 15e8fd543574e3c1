"""Files of a form that is right, checksums included, with something wrong in it: what a forger writes, and no damage.

Each function takes the bytes of a valid file to a strategy for wrong ones.
"""

import io
import json
import pickletools
import random
import re
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from .mutations import MARKER, damaged, text, trees

SEEDS = st.integers(0, 2**32)


def safetensors_of(data: bytes) -> st.SearchStrategy[bytes]:
    """A header with something wrong, its metadata included; checksums of ours are left out, as a forger would; NaN among the weights."""
    size = int.from_bytes(data[:8], "little")
    header, tensors = json.loads(data[8 : 8 + size]), data[8 + size :]
    meta = {key: _loads(value) for key, value in header.pop("__metadata__", {}).items() if key != "checksum"}

    def built(changed: dict[str, Any], told: Any, weights: bytes = tensors) -> bytes:
        if isinstance(changed, dict):
            words = {k: v if isinstance(v, str) else text(v) for k, v in told.items()} if isinstance(told, dict) else told
            changed = {"__metadata__": words} | changed
        raw = text(changed).encode()
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw + weights

    def poisoned(at: int, bits: int) -> bytes:
        at = at // 4 * 4
        return built(header, meta, tensors[:at] + struct.pack("<I", bits) + tensors[at + 4 :])

    poison = st.builds(poisoned, st.integers(0, len(tensors) - 4), st.sampled_from((0x7FC00000, 0x7F800000, 0xFF800000)))
    told = trees(meta).map(lambda one: built(header, one))
    return st.one_of(told, told, told, trees(header).map(lambda one: built(one, meta)), poison)


def _loads(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def pickle_of(data: bytes) -> st.SearchStrategy[bytes]:
    """A call of a program put between two operations, which would leave the marker behind."""
    places = [at for _, _, at in pickletools.genops(data) if at]
    command = f"touch ../{MARKER}".encode()
    calls = [
        module + b"\n" + name + b"\n" + argument
        for module, name in ((b"posix", b"system"), (b"os", b"system"), (b"builtins", b"eval"), (b"torch", b"load"), (b"builtins", b"open"))
        for argument in (b"(X" + struct.pack("<I", len(command)) + command + b"t", b"(Vopen('../executed','w')\nt", b"(V../executed\nVw\nt")
    ]
    before = st.sampled_from(places).flatmap(lambda at: st.sampled_from(calls).map(lambda call: (at, b"c" + call + b"R")))
    return st.tuples(before, st.booleans()).map(lambda one: data[: one[0][0]] + one[0][1] + (b"0" if one[1] else b"") + data[one[0][0] :])


def zip_of(inner: Callable[[str, bytes], st.SearchStrategy[bytes]] | None = None) -> Callable[[bytes], st.SearchStrategy[bytes]]:
    """Members dropped, renamed, doubled or wrong inside (`inner` by a member's name) in a zip whose checksums are right."""

    def strategy(data: bytes) -> st.SearchStrategy[bytes]:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
        return _members(members, inner).map(_zipped)

    return strategy


def _members(members: list[tuple[str, bytes]], inner: Any) -> st.SearchStrategy[list[tuple[str, bytes]]]:
    def changed(k: int) -> st.SearchStrategy[list[tuple[str, bytes]]]:
        name, content = members[k]
        rest, names = (
            [*members[:k], *members[k + 1 :]],
            (f"../{name}", f"/{name}", name.upper(), "x.png", "a/b/c.png", "a\\b.png", "\x1b.png"),
        )
        ways = [
            st.just(rest), st.just([*members, members[k]]), st.just([*members, (name, members[k - 1][1])]),
            st.sampled_from((*names, members[k - 1][0])).map(lambda other: [*rest, (other, content)]),
            SEEDS.map(lambda seed: [*rest, (name, damaged(content or b"x", b"", random.Random(seed))[1])]),
        ]  # fmt: skip
        if inner and (strategy := inner(name, content)) is not None:
            ways += [strategy.map(lambda data: [*rest, (name, data)])] * 4
        return st.one_of(ways)

    return st.integers(0, len(members) - 1).flatmap(changed)


def _zipped(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that comes twice
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def tar_of(data: bytes) -> st.SearchStrategy[bytes]:
    """As a zip's; also links, and sizes in a header whose checksum is right."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(entry.name, archive.extractfile(entry).read()) for entry in archive]
        starts = [entry.offset for entry in archive]

    def tarred(content: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for name, one in content:
                entry = tarfile.TarInfo(name)
                entry.size = len(one)
                archive.addfile(entry, io.BytesIO(one))
            if kind != tarfile.REGTYPE:
                entry = tarfile.TarInfo("x.png")
                entry.type, entry.linkname = kind, "/etc/hostname"
                archive.addfile(entry)
        return out.getvalue()

    def sized(at: int, size: bytes) -> bytes:
        header = bytearray(data[at : at + 512])
        header[124:136], header[148:156] = size, b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return data[:at] + bytes(header) + data[at + 512 :]

    sizes = (b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000000001\0", b"00000000000\0", b"xxxxxxxxxxx\0")
    linked = st.sampled_from((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE))
    resized = st.builds(sized, st.sampled_from(starts), st.sampled_from(sizes))
    return _members(members, None).map(tarred) | linked.map(lambda kind: tarred(members, kind)) | resized


def npy_of(name: str, data: bytes) -> st.SearchStrategy[bytes]:
    """An array whose header tells another shape, type or order."""
    size = struct.unpack("<H", data[8:10])[0]
    header, numbers = data[10 : 10 + size].decode("latin1"), data[10 + size :]
    shapes = (
        "()",
        "(0,)",
        "(-1,)",
        "(1,)",
        f"({2**40},)",
        f"({2**62}, 2)",
        "(0, 8, 8)",
        "(1,)*99",
        "None",
        "(1.5,)",
        "(" * 300,
        "(2**99,)",
        "('x',)",
        "(True,)",
    )
    types = (
        "'|O'",
        "'<f8'",
        "'<f4'",
        "'>i8'",
        "'<c16'",
        "'<U9'",
        "'|V3'",
        "[('a', '<i4')]",
        "'|b1'",
        "'x'",
        "3",
        "'<M8[s]'",
        "'|S0'",
        "'|u1'",
        "'<i8'",
        "'<u8'",
    )

    def told(shape: str, kind: str) -> bytes:
        words = re.sub(r"'shape': \(.*?\)", lambda _: f"'shape': {shape}", header) if shape else header
        words = re.sub(r"'descr': '.*?'", lambda _: f"'descr': {kind}", words) if kind else words
        raw = words.encode()
        return data[:8] + struct.pack("<H", len(raw)) + raw + numbers

    return st.sampled_from(shapes).map(lambda s: told(s, "")) | st.sampled_from(types).map(lambda t: told("", t))


def png_of(data: bytes) -> st.SearchStrategy[bytes]:
    """A chunk with something wrong under a checksum that is right: sizes, depths, animation, no or two of a kind."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length

    def written(found: list[tuple[bytes, bytes]]) -> bytes:
        pieces = (struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in found)
        return data[:8] + b"".join(pieces)

    head = chunks[0][1]
    heads = [struct.pack(">II", w, h) + head[8:] for w in (0, 1, 8, 50_000, 2**31 - 1, 2**32 - 1) for h in (0, 8, 50_000, 2**31)]
    heads += [head[:8] + bytes((depth, colour, *head[10:])) for depth in (0, 1, 2, 4, 16, 255) for colour in (0, 2, 3, 4, 6, 255)]
    animation, odd = (b"acTL", struct.pack(">II", 2, 0)), [(b"zTXt", b"x\0\0x"), (b"iCCP", b"x\0\0"), (b"tRNS", b"\0\1"), (b"PLTE", b"abc")]
    bodies = SEEDS.map(lambda seed: damaged(chunks[1][1], b"", random.Random(seed))[1])
    return st.one_of(
        st.sampled_from(heads).map(lambda one: written([(b"IHDR", one), *chunks[1:]])),
        bodies.map(lambda body: written([chunks[0], (chunks[1][0], body), *chunks[2:]])),
        st.sampled_from((animation, chunks[0], chunks[1], (b"eXIf", b"MM"), *odd)).map(lambda one: written([chunks[0], one, *chunks[1:]])),
    )
