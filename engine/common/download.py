"""A file from the web, kept in a cache: progress on stderr, resumed where it broke off, its length checked.

An unfinished file lies beside its place as NAME.part, with the server's mark of that version in NAME.part.version; the file
appears under its own name only when it is whole. Nothing is downloaded twice, and a file put there by hand is as good.

NAME.sha256 holds the file's SHA-256 from its download or first use on, and it is compared at every other. Only https is asked,
unless POTSTILL_HTTP=1: over http anybody on the way could send a file of theirs. Nothing is written through a link.
"""

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from potstill.engine.common.errors import Damaged, UserError, reading, writing

try:
    import fcntl
except ImportError:  # not on Windows, where two downloads of one file at a time are the user's own affair
    fcntl = None

ATTEMPTS = 5  # in a row that bring nothing new
PAUSE = 1.0  # seconds before the second attempt, doubled for every other
TIMEOUT = 30.0
CHUNK = 1 << 20
MOST_BYTES = 2**36  # of a file whose length the server announces
MOST_UNANNOUNCED = 2**33  # of one that might go on for ever
MOST_REDIRECTIONS = 5
PLAIN = re.compile(r"[!-\[\]-~]+")  # printable ASCII without blanks and backslashes
HOST = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
OURS = (".part", ".part.version", ".sha256")  # ends of the names of our own files beside a download


class _Broken(Exception):
    """The server's answer ended early, there was none, or it does not continue the unfinished file."""


def is_url(text: str) -> bool:
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text))


def cached_path(url: str) -> Path:
    """Where the file of a URL lies, there or not: CACHE/host/path, of an http address CACHE/host@http/path.

    CACHE is $POTSTILL_CACHE or ~/.cache/potstill. UserError for what is no https address; http is one with POTSTILL_HTTP=1.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.netloc.rpartition("@")[2], parts.port
    except ValueError as error:
        raise UserError(f"wanted the https address of a file, got {url!r} ({error})") from error
    names = [name for name in parts.path.split("/") if name not in ("", ".", "..")]
    readable = PLAIN.fullmatch(url) and HOST.fullmatch(host) and port != 0
    if parts.scheme not in ("http", "https") or not readable or not names or names[-1].endswith(OURS):
        raise UserError(f"wanted the https address of a file, got {url!r}")
    if parts.scheme == "http" and os.environ.get("POTSTILL_HTTP") != "1":
        raise UserError(
            f"{url} is not https, and anybody on the way could send another file: wanted https://…; POTSTILL_HTTP=1 in the environment allows http"
        )
    if parts.query:
        names[-1] = f"{hashlib.sha256(parts.query.encode()).hexdigest()[:8]}-{names[-1]}"
    folder = host.replace(":", "_") if parts.scheme == "https" else f"{host.replace(':', '_')}@http"
    return _cache().joinpath(folder, *names)


def _cache() -> Path:
    return Path(os.environ.get("POTSTILL_CACHE") or "~/.cache/potstill").expanduser()


def file_at(where: str, *, command: str) -> Path:
    """The file at a path, or the one that is fetched from an address."""
    return fetch(where, command=command) if is_url(where) else Path(where).expanduser()


def fetch(url: str, *, command: str, sha256: str | None = None) -> Path:
    """The file at a URL, from the cache or else from the web.

    command: what to type again, for the error messages. sha256: what the file must have, where that is known.
    Raises UserError, with where to put the file by hand if the server cannot be reached, and where the file in the cache is
    no longer what it was at its download or first use.
    """
    path = cached_path(url)
    if not path.is_file():
        part, version, _ = (path.with_name(path.name + end) for end in OURS)
        try:
            _refuse_links(path, part, version)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab", opener=_no_link) as file, _alone(file, part):
                if not path.is_file():  # else another process has just finished it
                    _download(url, file, version, path, command)
                    _pin(path, digest(part))
                    if fcntl:
                        os.replace(part, path)  # before anybody else gets the lock
            if not path.is_file():  # Windows has no such lock, and moves no file that is open
                os.replace(part, path)
            part.unlink(missing_ok=True)
            version.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; POTSTILL_CACHE names another folder") from error
    found = digest(path)
    if sha256 and found != sha256:
        raise Damaged(f"{path} has the sha256 {found}, wanted {sha256}: remove it and run this again: {command}")
    _compare(path, found, command)
    return path


def _compare(path: Path, found: str, command: str) -> None:
    """Damaged where the file is another than at its download or first use; this is the first use where there is no note of one."""
    pin = path.with_name(path.name + ".sha256")
    if pin.is_file():
        with reading(pin), pin.open("rb") as file:
            wanted = file.read(64).decode("latin1")
        if found != wanted:
            raise Damaged(
                f"{path} has the sha256 {found}, and {pin} says {wanted!r} from before: remove both and run this again: {command}; "
                "or only the latter, if you have put another file there yourself"
            )
    elif os.access(path.parent, os.W_OK) and not any(link.is_symlink() for link in _below_cache(path.parent)):
        with writing(pin):
            _pin(path, found)


def _pin(path: Path, found: str) -> None:
    """NAME.sha256, as `sha256sum -c` reads it."""
    pin = path.with_name(path.name + ".sha256")
    new = pin.with_name(f"{pin.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.write_text(f"{found}  {path.name}\n", encoding="utf-8")
    os.replace(new, pin)


def _below_cache(path: Path) -> list[Path]:
    """A folder of the cache and those above it, as far as they are the cache's."""
    cache = _cache()
    return [folder for folder in (path, *path.parents) if cache in folder.parents]


def _refuse_links(path: Path, *files: Path) -> None:
    """UserError where a download would be written through a link, to wherever that points. The cache itself may be one."""
    if link := next((place for place in (*_below_cache(path.parent), *files) if place.is_symlink()), None):
        raise UserError(f"{link} is a link, and downloads are not written through links: remove it, or put the file at {path} yourself")


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def digest(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, file: BinaryIO, version: Path, path: Path, command: str) -> None:
    """Fill the unfinished file, in as many attempts as bring it further."""
    failures, most = 0, file.seek(0, os.SEEK_END)
    while True:
        try:
            return _attempt(url, file, version)
        except urllib.error.HTTPError as error:
            if error.code not in (408, 429) and error.code < 500:
                raise UserError(
                    f"{url} answered {error.code} {error.reason}: correct the address, or put the file at {path} and run "
                    f"this again: {command}"
                ) from error
            reason = f"it answered {error.code} {error.reason}"
        except _Broken as error:
            reason = str(error)
        size = file.seek(0, os.SEEK_END)
        failures, most = 0 if size > most else failures + 1, max(size, most)
        if failures >= ATTEMPTS:
            raise UserError(f"cannot download {url} ({reason}): get it in another way, put it at {path} and run this again: {command}")
        time.sleep(PAUSE * 2**failures if failures else 0)


def _attempt(url: str, file: BinaryIO, version: Path) -> None:
    """Ask for what is missing and append it; for the whole file where it is not known which version the unfinished one is of."""
    known = version.read_bytes().decode("utf-8", "replace") if version.is_file() else ""
    start = file.seek(0, os.SEEK_END) if known else _emptied(file)
    headers = {"User-Agent": "potstill", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        answer = OPENER.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416:
            raise error from None
        if error.headers.get("Content-Range") == f"bytes */{start}" and _version(error.headers) in ("", known):
            return  # it broke off between the last byte and its name
        _emptied(file)
        raise _Broken("it has fewer bytes than before") from error
    except UserError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:  # the last: what a redirection names is no address
        raise _Broken(str(getattr(error, "reason", error)) or type(error).__name__) from error
    with answer:
        if answer.status != 206:  # the whole file, also from servers that cannot send parts
            start = _emptied(file)
            version.write_text(_version(answer.headers), encoding="utf-8")
        elif _version(answer.headers) != known or not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            _emptied(file)
            raise _Broken("it sends something else every time")
        announced = answer.headers.get("Content-Length", "")
        _receive(answer, file, start, start + int(announced) if re.fullmatch("[0-9]{1,18}", announced) else None, url)


def _receive(answer: http.client.HTTPResponse, file: BinaryIO, start: int, length: int | None, url: str) -> None:
    """Append the answer to a file that has `start` bytes and shall have `length`, if that is known."""
    most = MOST_UNANNOUNCED if length is None else MOST_BYTES
    if length is not None and length > most:
        raise UserError(f"{url} has {length:,} bytes, wanted at most {most:,}: get it in another way")
    folder = Path(file.name).parent
    free, missing = shutil.disk_usage(folder).free, (length or start) - start
    if missing > free:
        raise UserError(
            f"{folder} has {free / 2**20:,.0f} MiB free, wanted {missing / 2**20:,.0f}: make room, or name another folder in POTSTILL_CACHE"
        )
    with tqdm(
        total=length, initial=start, desc=urllib.parse.urlsplit(url).path.rpartition("/")[2], unit="B", unit_scale=True, unit_divisor=1024,
        mininterval=0.1 if sys.stderr.isatty() else 10.0, disable=os.environ.get("RANK", "0") != "0",
    ) as bar:  # fmt: skip
        while data := _read(answer):
            file.write(data)
            bar.update(len(data))
            if file.tell() > (length or most):
                break
    file.flush()
    if length is None and file.tell() > most:
        _emptied(file)
        raise UserError(f"{url} sent more than {most:,} bytes without saying how many there are: get it in another way")
    if length is not None and file.tell() > length:
        _emptied(file)
        raise _Broken(f"it sent more than the {length:,} bytes it had announced")
    if length is not None and file.tell() < length:
        raise _Broken(f"it broke off after {file.tell():,} of {length:,} bytes")


def _read(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from error


def _emptied(file: BinaryIO) -> int:
    """0, which is where the file then ends."""
    file.truncate(0)
    return file.seek(0)


def _version(headers: Message) -> str:
    """The server's mark of what it sends, "" where it has none."""
    return headers.get("ETag") or headers.get("Last-Modified") or ""


@contextlib.contextmanager
def _alone(file: BinaryIO, part: Path) -> Iterator[None]:
    """While no other process writes this file."""
    if fcntl:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is downloading {part}: wait until it is done") from error
    yield


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows some redirections, but never from https to an address that anybody on the way could answer for, nor to what is no web."""

    max_repeats = max_redirections = 2 * MOST_REDIRECTIONS  # the base class's own limits, whose sentence has several lines

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        fp.close()  # else the base class reads all that comes with it, without end where there is none
        wanted = ("https",) if req.type == "https" else ("http", "https")
        if urllib.parse.urlsplit(newurl).scheme not in wanted:
            raise UserError(f"{req.full_url} redirects to {newurl}, which is not {' or '.join(wanted)}: refused")
        if sum(getattr(req, "redirect_dict", {}).values()) >= MOST_REDIRECTIONS:
            raise UserError(f"{req.full_url} is the {MOST_REDIRECTIONS}th redirection in a row and redirects again: correct the address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


OPENER = urllib.request.build_opener(_SafeRedirects)
