"""Downloads from a server on this machine that breaks the connection, ignores ranges, or has something else."""

import hashlib
import http.server
import re
import threading

import pytest

from deploy.flash.fetch import fetch
from edge_client.errors import FlashError

DATA = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves DATA and breaks off after ``most`` bytes of an answer; the ranges that were asked for are kept."""

    def __init__(self, most=None, data=DATA, ranges=True, status=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.most, self.data, self.ranges, self.status, self.asked = most, data, ranges, status, []
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self.server_address[1]}/images/lite%20os.img.xz"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        server.asked.append(None if asked is None else int(asked[1]))
        if server.status is not None:
            self.send_error(server.status)
            return
        first = int(asked[1]) if asked and server.ranges else 0
        if first and first >= len(server.data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.data[first:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(server.data) - 1}/{len(server.data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.most])
        # Broken off in the middle of an answer.
        self.close_connection = True

    def log_message(self, *_):
        pass


def ignore(*_):
    pass


def fetched(server, folder, sha256=SHA256, report=ignore):
    return fetch(server.url, sha256, folder, report, pause=ignore)


def test_it_is_fetched_once_and_its_name_is_harmless(tmp_path):
    with Server() as server:
        told = []
        path = fetched(server, tmp_path, report=lambda *both: told.append(both))
        assert path.read_bytes() == DATA
        assert path.name == f"{SHA256[:12]}-lite_os.img.xz"
        assert told[-1] == (len(DATA), len(DATA))
        assert fetched(server, tmp_path) == path
        assert server.asked == [None]


def test_it_goes_on_where_the_connection_broke(tmp_path):
    with Server(most=300_000) as server:
        assert fetched(server, tmp_path).read_bytes() == DATA
        assert server.asked == [None, 300_000, 600_000, 900_000, 1_200_000]


def test_a_server_without_ranges_begins_anew(tmp_path):
    with Server(ranges=False) as server:
        (tmp_path / f"{SHA256[:12]}-lite_os.img.xz.part").write_bytes(b"what came earlier")
        assert fetched(server, tmp_path).read_bytes() == DATA


def test_what_had_come_whole_is_not_fetched_again(tmp_path):
    with Server() as server:
        (tmp_path / f"{SHA256[:12]}-lite_os.img.xz.part").write_bytes(DATA)
        assert fetched(server, tmp_path).read_bytes() == DATA
        assert server.asked == [len(DATA)]


def test_it_gives_up_with_what_came_kept_and_goes_on_later(tmp_path):
    with Server() as server:
        partial = tmp_path / f"{SHA256[:12]}-lite_os.img.xz.part"
        partial.write_bytes(DATA[:1000])
        server.status = 503
        with pytest.raises(FlashError, match=r"503 .*the same command goes on"):
            fetched(server, tmp_path)
        assert partial.read_bytes() == DATA[:1000]
        server.status = None
        assert fetched(server, tmp_path).read_bytes() == DATA
        assert server.asked[-1] == 1000


def test_another_file_is_refused_and_not_kept(tmp_path):
    with Server(data=DATA[:-1] + b"x") as server, pytest.raises(FlashError, match="another file, or was changed"):
        fetched(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nobody_answers(tmp_path):
    with Server() as server:
        pass
    with pytest.raises(FlashError, match="cannot be fetched"):
        fetched(server, tmp_path)


@pytest.mark.parametrize(("url", "sha256"), [("ftp://127.0.0.1/x", SHA256), ("http://127.0.0.1/x", "ABC")])
def test_a_url_or_checksum_that_is_none_is_refused(tmp_path, url, sha256):
    with pytest.raises(FlashError, match="expected"):
        fetch(url, sha256, tmp_path, ignore)
