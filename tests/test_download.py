"""Downloads from a server on this machine that breaks off, lies, changes its mind and cannot send parts."""

import contextlib
import fcntl
import hashlib
import io
import re
import socket
import subprocess
import threading
import types
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from potstill.engine.common import download
from potstill.engine.common.download import cached_path, fetch
from potstill.engine.common.errors import UserError
from potstill.engine.convert import main
from potstill.engine.models.weights import load_net, save_net
from potstill.engine.nets.edm import from_kwargs

DATA = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
AGAIN = "potstill convert edm URL OUT"


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's `does` says."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        does = self.server.does
        does.requests.append(dict(self.headers))
        status = does.statuses.pop(0) if does.statuses else 200
        if status != 200:
            self.send_response(status)
            if status == 302:
                self.send_header("Location", does.location)
            return self.end_headers()
        start = 0
        if does.ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(does.data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(does.data)}")
                return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(does.data) - 1}/{len(does.data)}")
        if does.etag:
            self.send_header("ETag", does.etag.replace("N", str(len(does.requests))))
        if does.announces is not None:
            self.send_header("Content-Length", str(does.announces + len(does.data) - start))
        self.end_headers()
        stop = does.stops.pop(0) if does.stops else len(does.data)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(does.data[start:stop])


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Its behaviour, with what it was asked; downloads go below tmp_path and nobody waits."""
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("POTSTILL_HTTP", "1")
    monkeypatch.setattr(download, "PAUSE", 0.0)
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.does = types.SimpleNamespace(
        data=DATA, etag='"1"', ranges=True, announces=0, stops=[], statuses=[], requests=[], location="/file.pkl"
    )
    web.does.url = f"http://127.0.0.1:{web.server_port}/nets/file.pkl"
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield web.does
    web.shutdown()
    thread.join()
    web.server_close()


def ranges(server):
    return [request.get("Range") for request in server.requests]


def files_beside(path):
    return sorted(p.name for p in path.parent.iterdir())


def failure(url, **options):
    with pytest.raises(UserError) as caught:
        fetch(url, command=AGAIN, **options)
    return str(caught.value)


def test_a_file_is_downloaded_once(server, tmp_path, capsys):
    path = fetch(server.url, command=AGAIN)
    host, _, rest = server.url.removeprefix("http://").replace(":", "_").partition("/")
    assert path == tmp_path / "cache" / f"{host}@http" / rest
    assert path.read_bytes() == DATA
    assert files_beside(path) == ["file.pkl", "file.pkl.sha256"]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "file.pkl: 100%" in printed.err
    assert fetch(server.url, command=AGAIN) == path
    assert len(server.requests) == 1


def test_a_broken_connection_is_resumed_where_it_broke(server):
    server.stops = [100_000, 250_000]
    assert fetch(server.url, command=AGAIN).read_bytes() == DATA
    assert ranges(server) == [None, "bytes=100000-", "bytes=250000-"]


def test_a_server_that_cannot_send_parts_begins_anew(server):
    server.stops, server.ranges = [100_000, 200_000], False
    assert fetch(server.url, command=AGAIN).read_bytes() == DATA
    assert ranges(server) == [None, "bytes=100000-", "bytes=200000-"]


def test_what_is_there_is_kept_for_the_next_time(server):
    server.stops = [100_000] + [100_000] * download.ATTEMPTS
    sentence = failure(server.url)
    path = cached_path(server.url)
    assert f"cannot download {server.url} (it broke off after 100,000 of 300,000 bytes)" in sentence
    assert f"put it at {path} and run this again: {AGAIN}" in sentence
    assert not path.exists()
    assert len(server.requests) == 1 + download.ATTEMPTS
    server.requests.clear()
    assert fetch(server.url, command=AGAIN).read_bytes() == DATA
    assert ranges(server) == ["bytes=100000-"]


def test_a_length_that_is_never_reached_is_an_error(server):
    server.announces, server.ranges = 10, False
    assert "(it broke off after 300,000 of 300,010 bytes)" in failure(server.url)
    assert not cached_path(server.url).exists()


def test_without_a_length_the_end_is_believed(server):
    server.announces = None
    assert fetch(server.url, command=AGAIN).read_bytes() == DATA


@pytest.mark.parametrize("etag", ['"2"', None])
def test_a_file_that_changed_meanwhile_is_not_mixed(server, etag):
    server.stops = [100_000] * 10
    failure(server.url)
    server.stops, server.etag, server.data = [], etag, DATA[::-1] + b"more"
    assert fetch(server.url, command=AGAIN).read_bytes() == DATA[::-1] + b"more"


def test_a_file_that_shrank_is_fetched_anew(server):
    server.stops = [100_000] * 10
    failure(server.url)
    server.stops, server.data = [], DATA[:50]
    assert fetch(server.url, command=AGAIN).read_bytes() == DATA[:50]


def test_a_server_that_never_sends_the_same_is_given_up(server):
    server.stops, server.etag = [100_000] * 99, '"N"'  # another one at every request
    assert "(it sends something else every time)" in failure(server.url)
    assert len(server.requests) < 40


def test_the_last_byte_may_have_been_the_last_thing_done(server):
    path = cached_path(server.url)
    path.parent.mkdir(parents=True)
    path.with_name("file.pkl.part").write_bytes(DATA)
    path.with_name("file.pkl.part.version").write_text(server.etag)
    assert fetch(server.url, command=AGAIN).read_bytes() == DATA
    assert ranges(server) == [f"bytes={len(DATA)}-"]
    assert files_beside(path) == ["file.pkl", "file.pkl.sha256"]


def test_an_unfinished_file_of_an_unknown_version_is_not_continued(server):
    path = cached_path(server.url)
    path.parent.mkdir(parents=True)
    path.with_name("file.pkl.part").write_bytes(b"something else")
    assert fetch(server.url, command=AGAIN).read_bytes() == DATA
    assert ranges(server) == [None]


def test_an_unfinished_file_of_another_version_is_not_continued(server):
    path = cached_path(server.url)
    path.parent.mkdir(parents=True)
    path.with_name("file.pkl.part").write_bytes(b"something else")
    path.with_name("file.pkl.part.version").write_text('"0"')
    assert fetch(server.url, command=AGAIN).read_bytes() == DATA
    assert ranges(server) == ["bytes=14-", None]


def test_what_the_server_says_is_passed_on(server):
    server.statuses = [404]
    assert f"{server.url} answered 404 Not Found: correct the address, or put the file at" in failure(server.url)
    assert len(server.requests) == 1
    server.statuses = [503, 503, 429]
    assert fetch(server.url, command=AGAIN).read_bytes() == DATA
    cached_path(server.url).unlink()
    server.statuses = [500] * 99
    assert "(it answered 500 Internal Server Error)" in failure(server.url)


def test_offline_says_where_to_put_the_file(server, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/edm/net.pkl"
    sentence = failure(url)
    assert sentence.startswith(f"cannot download {url} ([Errno")
    assert f"put it at {cached_path(url)} and run this again: {AGAIN}" in sentence
    cached_path(url).write_bytes(b"by hand")
    assert fetch(url, command=AGAIN).read_bytes() == b"by hand"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://host/a.pkl", "http://host/", "https:///a.pkl", "http://host/..", "https://../a.pkl", "https://./a",
        "https://h:x/a.pkl", "https://h:0/a.pkl", "https://h:99999/a.pkl", "https://[::1/a.pkl", "https://h/a b", "https://h/\u00e4", "https://h/a\0b",
        "https://h/..\\..\\a.pkl", "https://h/\x1b[2J", "https://h/a.pkl.part", "https://h/a.pkl.sha256",
    ],
)  # fmt: skip
def test_only_files_on_the_web_are_fetched(url, monkeypatch):
    monkeypatch.setenv("POTSTILL_HTTP", "1")
    assert f"wanted the https address of a file, got {url!r}" in failure(url)


def test_http_is_asked_only_where_that_is_wished(server, tmp_path, monkeypatch):
    monkeypatch.delenv("POTSTILL_HTTP")
    assert failure(server.url) == (
        f"{server.url} is not https, and anybody on the way could send another file: wanted https://…; POTSTILL_HTTP=1 in the environment "
        "allows http"
    )
    assert not server.requests and not (tmp_path / "cache").exists()


def test_what_came_over_http_is_never_taken_for_what_came_over_https(server, tmp_path):
    place = tmp_path / "cache" / server.url.removeprefix("http://").replace(":", "_")
    assert cached_path(server.url.replace("http", "https")) == place  # as it always was
    fetch(server.url, command=AGAIN)
    assert not place.exists()


def test_the_cache_is_not_left(server, tmp_path):
    for url in ("http://h/../../a.pkl", "http://u:p@h:80/./a.pkl", "http://h/%2e%2e/a.pkl?x=../b"):
        assert tmp_path / "cache" in cached_path(url).parents
        assert ".." not in cached_path(url).parts
    assert cached_path("http://h/a.pkl?v=1") != cached_path("http://h/a.pkl?v=2") != cached_path("http://h/a.pkl")
    assert "p@" not in str(cached_path("http://u:p@h/a.pkl"))


def test_redirections_stay_on_https(server):
    server.statuses = [302]
    assert fetch(server.url, command=AGAIN).read_bytes() == DATA
    handler, request = download._SafeRedirects(), urllib.request.Request("https://host/a.pkl")
    for url in ("http://host/a.pkl", "ftp://host/a.pkl", "file:///etc/passwd"):
        with pytest.raises(UserError, match=re.escape(f"redirects to {url}, which is not https: refused")):
            handler.redirect_request(request, io.BytesIO(), 302, "Found", {}, url)
    assert handler.redirect_request(request, io.BytesIO(), 302, "Found", {}, "https://other/a.pkl").full_url == "https://other/a.pkl"


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("ftp://127.0.0.1/a.pkl", "redirects to ftp://127.0.0.1/a.pkl, which is not http or https: refused"),
        ("file:///etc/passwd", "Redirection to url 'file:///etc/passwd' is not allowed"),
        ("http://[", "cannot download"),
        ("/again.pkl", "is the 5th redirection in a row and redirects again: correct the address"),
    ],
)
def test_redirections_that_lead_nowhere(server, location, words):
    server.statuses, server.location = [302] * 99, location
    sentence = failure(server.url)
    assert words in sentence and "\n" not in sentence
    assert len(server.requests) <= 1 + download.ATTEMPTS


def test_a_known_hash_is_checked(server):
    fetch(server.url, command=AGAIN, sha256=hashlib.sha256(DATA).hexdigest())
    assert "has the sha256" in failure(server.url, sha256="0" * 64)


def test_a_cached_file_that_is_another_than_at_its_download_is_noticed(server):
    path = fetch(server.url, command=AGAIN)
    pin = path.with_name("file.pkl.sha256")
    assert subprocess.run(["sha256sum", "-c", pin.name], cwd=pin.parent, capture_output=True).returncode == 0
    flipped = bytearray(DATA)
    flipped[1000] ^= 1
    path.write_bytes(flipped)
    sentence = failure(server.url)
    assert f"{path} has the sha256 {hashlib.sha256(flipped).hexdigest()}, and {pin} says '{hashlib.sha256(DATA).hexdigest()}'" in sentence
    assert f"remove both and run this again: {AGAIN}; or only the latter, if you have put another file there yourself" in sentence
    pin.unlink()
    assert fetch(server.url, command=AGAIN).read_bytes() == flipped  # put there by hand, and known from now on
    path.write_bytes(DATA)
    assert "has the sha256" in failure(server.url)
    path.unlink()
    assert fetch(server.url, command=AGAIN).read_bytes() == DATA  # a new download is a first use
    assert fetch(server.url, command=AGAIN) == path
    pin.write_bytes(b"\xff" * 100)
    assert "has the sha256" in failure(server.url)


def test_a_file_without_end_is_given_up(server, monkeypatch):
    monkeypatch.setattr(download, "MOST_UNANNOUNCED", 10_000)
    monkeypatch.setattr(download, "CHUNK", 1000)
    server.announces = None
    assert f"{server.url} sent more than 10,000 bytes without saying how many there are: get it in another way" in failure(server.url)
    assert cached_path(server.url).with_name("file.pkl.part").stat().st_size == 0
    monkeypatch.setattr(download, "MOST_BYTES", 250_000)
    server.announces = 0
    assert f"{server.url} has 300,000 bytes, wanted at most 250,000: get it in another way" in failure(server.url)


def test_more_than_was_announced_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(download, "CHUNK", 1000)
    server.announces, server.ranges = -200_000, False
    assert fetch(server.url, command=AGAIN).read_bytes() == DATA[:100_000]  # http.client reads no more than was announced


@pytest.mark.parametrize("end", [".part", ".part.version"])
def test_nothing_is_written_through_a_link(server, tmp_path, end):
    path, elsewhere = cached_path(server.url), tmp_path / "precious"
    elsewhere.write_text("kept")
    path.parent.mkdir(parents=True)
    link = path.with_name(path.name + end)
    link.symlink_to(elsewhere)
    assert f"{link} is a link, and downloads are not written through links: remove it, or put the file at {path} yourself" in failure(
        server.url
    )
    link.unlink()
    path.symlink_to(elsewhere)  # the file itself may be one: it is read, and replaced where it leads nowhere
    assert fetch(server.url, command=AGAIN).read_text() == "kept"
    path.unlink()
    path.with_name("file.pkl.sha256").unlink()
    path.with_name("file.pkl.sha256").symlink_to(elsewhere)
    assert fetch(server.url, command=AGAIN).read_bytes() == DATA
    assert elsewhere.read_text() == "kept" and not path.with_name("file.pkl.sha256").is_symlink()


def test_nothing_is_written_into_a_linked_folder_but_the_cache_may_be_one(server, tmp_path, monkeypatch):
    path, elsewhere = cached_path(server.url), tmp_path / "elsewhere"
    elsewhere.mkdir()
    path.parent.parent.mkdir(parents=True)
    path.parent.symlink_to(elsewhere)
    assert f"{path.parent} is a link" in failure(server.url)
    assert not list(elsewhere.iterdir())
    (elsewhere / "file.pkl").write_bytes(b"by hand")
    assert fetch(server.url, command=AGAIN).read_bytes() == b"by hand"
    assert files_beside(elsewhere / "file.pkl") == ["file.pkl"]
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "linked"))
    assert fetch(server.url, command=AGAIN).read_bytes() == DATA


def test_one_download_at_a_time_and_room_for_it(server, monkeypatch):
    part = cached_path(server.url).with_name("file.pkl.part")
    part.parent.mkdir(parents=True)
    with part.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process is downloading" in failure(server.url)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**16))
    assert "MiB free, wanted 0: make room, or name another folder in POTSTILL_CACHE" in failure(server.url)


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "file"))
    assert "cannot write" in failure(server.url)
    assert "POTSTILL_CACHE names another folder" in failure(server.url)


def test_the_command_converts_what_lies_on_the_web(server, tmp_path, monkeypatch):
    net = from_kwargs("EDMPrecond", img_resolution=8, img_channels=1, model_type="SongUNet", model_channels=4,
                      channel_mult=[1], num_blocks=1, attn_resolutions=[]).eval()  # fmt: skip
    save_net(tmp_path / "teacher.safetensors", net)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    server.data, out = (tmp_path / "net.pth").read_bytes(), tmp_path / "net.safetensors"
    server.stops = [10_000]
    main(["edm", server.url, str(out), "--like", str(tmp_path / "teacher.safetensors")])
    got, metadata = load_net(out)
    torch.testing.assert_close(got.state_dict(), net.state_dict(), rtol=0, atol=0)
    assert metadata["source"] == server.url
    assert metadata["sha256"] == hashlib.sha256(server.data).hexdigest()
    with pytest.raises(UserError, match=r"put it at .* and run this again: potstill convert edm http://"):
        main(["edm", "http://127.0.0.1:1/net.pkl", str(tmp_path / "new.safetensors")])
