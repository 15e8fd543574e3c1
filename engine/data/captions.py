"""Prompts and captions as they stand in files: one a line, JSON lines, or beside images."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from potstill.engine.common.errors import UserError, reading
from potstill.engine.common.writing import whole
from potstill.engine.data.arrays import ArraySource
from potstill.engine.data.files import Folder
from potstill.engine.data.latents import LatentSource
from potstill.engine.data.sources import Source
from potstill.engine.data.tars import Tars

KEYS = ("prompt", "caption", "text")
NAME = "file_name"  # what Hugging Face's folders of images call the image of a line
CAPTIONS = "captions.jsonl"  # beside latents
METADATA = "metadata.jsonl"  # beside images, as in Hugging Face's folders
MOST_BYTES = 2**32


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a .jsonl (one of KEYS a line), of another text file (one a line), or beside the latents in a folder.

    UserError, with the number of the line, for what is none.
    """
    path = file_of(path)
    if path.suffix == ".jsonl":
        return [_text_of(one, path, line) for line, one in _objects(path)]
    return [text for _, text in _lines(path)]


def file_of(path: str | Path) -> Path:
    """Where prompts stand: the file itself, or that beside latents. UserError for a folder of something else."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    if not (path / CAPTIONS).exists():
        raise UserError(f"{path} has no {CAPTIONS}: wanted latents with captions, a .txt with one prompt a line, or a .jsonl")
    return path / CAPTIONS


def write_captions(path: Path, captions: Sequence[str]) -> None:
    """As `read_prompts` reads them."""
    with whole(path) as part:
        part.write_text("".join(json.dumps({"caption": text}) + "\n" for text in captions), encoding="utf-8")


def hash_of_texts(texts: Sequence[str]) -> str:
    """SHA-256 of them in their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def captions_of(source: Source, file: Path | None = None) -> list[str] | None:
    """One caption an image: of `file`, else those that arrays bring along, of METADATA in a folder, KEY.txt in tars or CAPTIONS beside
    latents; None where there are none.

    A .jsonl that names images (NAME) is read by these names, all else in the images' order. UserError where one is missing.
    """
    files = getattr(source, "files", None)
    if file is None and isinstance(source, ArraySource):
        return source.captions
    if file is None and isinstance(source, LatentSource) and (Path(source.path) / CAPTIONS).is_file():
        file = Path(source.path) / CAPTIONS
    if file is None and isinstance(files, Tars):
        return files.captions()
    if file is None and isinstance(files, Folder) and (files.path / METADATA).is_file():
        file = files.path / METADATA
    if file is None:
        return None
    if file.suffix == ".jsonl" and files is not None:
        found = list(_objects(file))
        if any(NAME in one for _, one in found):
            return _by_name(found, files.names, file)
    texts = read_prompts(file)
    if len(texts) != len(source):
        what = "latents" if isinstance(source, LatentSource) else "images"
        raise UserError(f"{file} has {len(texts):,} captions, wanted one for each of the {len(source):,} {what} of {source.path}")
    return texts


def _by_name(found: list[tuple[int, dict[str, Any]]], names: Sequence[str], path: Path) -> list[str]:
    texts = {one.get(NAME): _text_of(one, path, line) for line, one in found}
    if missing := [name for name in names if name not in texts]:
        raise UserError(f"{path} has no caption for {len(missing):,} of {len(names):,} images: {missing[0]}, …; wanted one a line for each")
    return [texts[name] for name in names]


def _text_of(one: dict[str, Any], path: Path, line: int) -> str:
    key = next((key for key in KEYS if key in one), None)
    if key is None or not isinstance(one[key], str):
        got = f"keys {', '.join(one) or 'none'}" if key is None else f"{key} = {one[key]!r:.40}"
        raise UserError(f"{path}, line {line}: wanted a text called {' or '.join(KEYS)}, got {got}")
    return one[key]


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in _lines(path):
        try:
            one = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f'{path}, line {line}: no JSON ({error}), wanted an object such as {{"prompt": "a cat"}}') from error
        if not isinstance(one, dict):
            raise UserError(f'{path}, line {line}: holds a {type(one).__name__}, wanted an object such as {{"prompt": "a cat"}}')
        yield line, one


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbers and texts of the lines of a file. Only line feeds end one: a prompt may hold other characters that separate lines."""
    if not path.is_file():
        raise UserError(f"no prompts at {path}: wanted a text file with one prompt a line, a .jsonl, or a folder of latents with captions")
    with reading(path):
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} has more than {MOST_BYTES:,} bytes: wanted a file of prompts")
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise UserError(f"{path} is empty, wanted at least one prompt: line 1 is missing")
    return [(number, _decoded(line, path, number)) for number, line in enumerate(lines, 1)]


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {number}: no UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8") from error
    if not text or "\0" in text:
        raise UserError(f"{path}, line {number}: {'no text' if text else 'nothing'}, wanted a prompt: remove the line")
    return text
