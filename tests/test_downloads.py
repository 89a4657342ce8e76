"""Against a server on this machine: what goes wrong on the way, and that nothing broken gets its final name."""

import builtins
import errno
import hashlib
import http.server
import io
import os
import threading

import pytest

from src import downloads
from src.errors import InputError, RunError

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`; `server.cuts` holds how many bytes to send in the next answers before hanging up."""

    def do_GET(self):
        self.server.requests.append(dict(self.headers))
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        content, start = self.server.content, 0
        wanted = self.headers.get("Range")
        if wanted and self.server.ranges and self.headers.get("If-Range", self.server.tag) == self.server.tag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if self.server.tag:
            self.send_header("ETag", self.server.tag)
        if self.server.tells_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else None
        self.wfile.write(content[start:] if cut is None else content[start : start + cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.ranges, server.tag, server.status = CONTENT, True, '"one"', 200
    server.cuts, server.requests, server.tells_length = [], [], True
    server.url = f"http://127.0.0.1:{server.server_port}/some/model.pth.tar"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def starts(server):
    return [int(request.get("Range", "bytes=0-")[6:-1]) for request in server.requests]


def test_a_file_arrives_whole(server, tmp_path):
    downloads.download(server.url, tmp_path / "new" / "m.pt", size=len(CONTENT), md5="", sha256=SHA256[:8])
    assert (tmp_path / "new" / "m.pt").read_bytes() == CONTENT
    assert left(tmp_path / "new") == ["m.pt"]


def test_a_broken_connection_is_continued_within_one_command(server, tmp_path):
    server.cuts = [300_000, 200_000]
    downloads.download(server.url, tmp_path / "m.pt")
    assert (tmp_path / "m.pt").read_bytes() == CONTENT
    assert starts(server) == [0, 300_000, 500_000]
    assert left(tmp_path) == ["m.pt"]


def test_an_interrupted_transfer_is_continued_by_the_next_command(server, tmp_path):
    server.cuts = [1000, 2000, 3000]
    with pytest.raises(
        RunError, match=r"broke at 6,000 of 1,048,576 bytes: run the same command again to resume from 6,000 bytes"
    ):
        downloads.download(server.url, tmp_path / "m.pt")
    assert left(tmp_path) == [".m.pt.part", ".m.pt.part.tag"]
    downloads.download(server.url, tmp_path / "m.pt")
    assert (tmp_path / "m.pt").read_bytes() == CONTENT
    assert starts(server) == [0, 1000, 3000, 6000]


def test_a_server_that_cannot_continue_sends_all_of_it_again(server, tmp_path):
    server.ranges, server.cuts = False, [1000]
    downloads.download(server.url, tmp_path / "m.pt")
    assert (tmp_path / "m.pt").read_bytes() == CONTENT


def test_a_file_that_changed_there_is_not_mixed_with_the_old_part(server, tmp_path):
    server.cuts = [1000] * downloads.ATTEMPTS
    with pytest.raises(RunError):
        downloads.download(server.url, tmp_path / "m.pt")
    server.content, server.tag = CONTENT[::-1], '"two"'
    downloads.download(server.url, tmp_path / "m.pt")
    assert (tmp_path / "m.pt").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("tag", ['W/"weak"', ""])
def test_without_a_usable_tag_the_checksum_still_guards(server, tmp_path, tag):
    server.tag, server.cuts = tag, [1000]
    downloads.download(server.url, tmp_path / "m.pt", sha256=SHA256)
    assert all("If-Range" not in request for request in server.requests)
    assert (tmp_path / "m.pt").read_bytes() == CONTENT


@pytest.mark.parametrize("extra", [0, 7])
def test_a_part_that_is_complete_or_too_long(server, tmp_path, extra):
    (tmp_path / ".m.pt.part").write_bytes(CONTENT + b"x" * extra)
    downloads.download(server.url, tmp_path / "m.pt")
    assert (tmp_path / "m.pt").read_bytes() == CONTENT
    assert starts(server) == ([len(CONTENT) + extra, 0] if extra else [len(CONTENT)])


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"sha256": "0" * 64}, f"sha256 is {SHA256}, expected 0000"),
        ({"sha256": "12345678"}, "sha256 is .*, expected 12345678: the file was removed"),
        ({"md5": "a04e12f8"}, "md5 is .*, expected a04e12f8: the file was removed"),
    ],
)
def test_a_wrong_checksum_is_refused_and_the_file_not_kept(server, tmp_path, expected, message):
    with pytest.raises(RunError, match=message):
        downloads.download(server.url, tmp_path / "m.pt", **expected)
    assert left(tmp_path) == []


def test_a_wrong_size_is_refused_where_the_server_does_not_tell_it(server, tmp_path):
    server.tells_length = False
    with pytest.raises(RunError, match="size is 1,048,576 bytes, expected 17: the file was removed"):
        downloads.download(server.url, tmp_path / "m.pt", size=17)
    assert left(tmp_path) == []
    downloads.download(server.url, tmp_path / "m.pt", sha256=SHA256)
    assert left(tmp_path) == ["m.pt"]


def test_a_wrong_size_is_refused_before_the_transfer(server, tmp_path):
    with pytest.raises(RunError, match="the file has 1,048,576 bytes, expected 17"):
        downloads.download(server.url, tmp_path / "m.pt", size=17)
    assert left(tmp_path) == []


@pytest.mark.parametrize(("status", "requests"), [(404, 1), (403, 1), (503, downloads.ATTEMPTS)])
def test_refusals_of_the_server_are_said(server, tmp_path, status, requests):
    server.status = status
    with pytest.raises(RunError, match=rf"some/model\.pth\.tar: the server answered {status}"):
        downloads.download(server.url, tmp_path / "m.pt")
    assert left(tmp_path) == []
    assert len(server.requests) == requests


def test_no_server_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(RunError, match="no connection"):
        downloads.download("http://127.0.0.1:9/m.pt", tmp_path / "m.pt")


class FullDisk(io.FileIO):
    """A file on a disk with room for half of it."""

    def write(self, data):
        if self.tell() + len(data) > len(CONTENT) // 2:
            super().write(data[: len(CONTENT) // 2 - self.tell()])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_is_said_and_the_part_continued_later(server, tmp_path, monkeypatch):
    def open_on_full_disk(path, mode="r", *words):
        return FullDisk(path, mode) if mode in ("wb", "ab") else builtins.open(path, mode, *words)

    monkeypatch.setattr(downloads, "open", open_on_full_disk, raising=False)
    with pytest.raises(RunError, match=r"the disk is full after 524,288 of 1,048,576 bytes"):
        downloads.download(server.url, tmp_path / "m.pt")
    assert not (tmp_path / "m.pt").exists()
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "*")
    downloads.download(server.url, tmp_path / "m.pt")
    assert (tmp_path / "m.pt").read_bytes() == CONTENT
    assert starts(server) == [0, 524_288]


def test_two_processes_do_not_write_the_same_file(tmp_path):
    with (
        downloads.locked(tmp_path),
        pytest.raises(RunError, match="another process is downloading"),
        downloads.locked(tmp_path),
    ):
        pass
    with downloads.locked(tmp_path):
        pass


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(tmp_path, link):
    precious = tmp_path / "precious"
    precious.write_text("text")
    (tmp_path / "cache").mkdir()
    getattr(tmp_path / "cache" / ".lock", link)(precious)
    with (
        pytest.raises(InputError, match=r"\.lock (is a link|has a second name), expected"),
        downloads.locked(tmp_path / "cache"),
    ):
        pass
    assert precious.read_text() == "text"


def test_a_cache_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="set SELF_CLASSIFIER_CACHE to another folder"),
        downloads.locked(tmp_path / "file"),
    ):
        pass


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SELF_CLASSIFIER_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert downloads.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SELF_CLASSIFIER_CACHE")
    assert downloads.cache_folder() == tmp_path / "xdg" / "self-classifier"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert downloads.cache_folder() == tmp_path / "home" / ".cache" / "self-classifier"


def test_what_was_noted_at_the_first_download_is_compared(tmp_path):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "m.pt"
    path.write_bytes(b"first")
    downloads.check_or_record(tmp_path, path)
    downloads.check_or_record(tmp_path, path)
    assert downloads.recorded(tmp_path) == {"a/m.pt": {"size": 5, "sha256": hashlib.sha256(b"first").hexdigest()}}
    path.write_bytes(b"other")
    with pytest.raises(
        RunError, match=r"m\.pt: the sha256 is d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa"
    ):
        downloads.check_or_record(tmp_path, path)
    (tmp_path / "checksums.json").write_text("{")
    with pytest.raises(InputError, match=r"checksums\.json: the file is damaged"):
        downloads.recorded(tmp_path)
