"""The Hub's library against a Hub of our own on the loopback, which can cut a download in the middle."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.models import NoProgress, PullFailed, Store, resolve
from baton.models.hub import HubSource, download
from baton.models.source import SourceFailed, missing_tokenizer

ID = "org/tiny"
COMMIT = "a" * 40
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "model.safetensors": bytes(range(256)) * 50_000,
    "README.md": b"not needed",
    "onnx/model.onnx": b"not needed either",
    "pytorch_model.bin": b"nor this",
}


class FakeHub(http.server.ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.cut_after: int | None = None
        """Answers end after so many bytes, whatever was promised."""
        self.broken = ""
        """The file that is answered with 403."""
        self.status = 200
        self.revisions: list[str] = []
        self.sent: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.server.status != 200:
            self._send(self.server.status, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/revision/" in self.path:
            self.server.revisions.append(self.path.partition("/revision/")[2].partition("?")[0])
            if self.server.revisions[-1] == "gone":
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": name} for name in FILES]
            self._send(200, json.dumps({"id": ID, "sha": COMMIT, "siblings": siblings}).encode(), {})
        elif "/tree/" in self.path:
            tree = [{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in FILES.items()]
            self._send(200, json.dumps(tree).encode(), {})
        else:
            self._file(self.path.split(f"/resolve/{COMMIT}/", 1)[1])

    def _file(self, name: str) -> None:
        data, asked = FILES[name], self.headers.get("Range")
        if name == self.server.broken:
            self._send(403, b"", {})
            return
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "GET":
            self.server.sent.append((name, asked))
        if asked:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206, data[start:], headers)
        else:
            self._send(200, data, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            cut = self.server.cut_after
            self.wfile.write(body if cut is None else body[:cut])
            self.close_connection = cut is not None


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_only_what_is_needed(hub: FakeHub, store: Store) -> None:
    path = store.install("tiny", [HubSource(ID, hub.url)], NoProgress())
    assert {str(f.relative_to(path)) for f in path.rglob("*")} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (path / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_line_that_breaks_is_taken_up_again(hub: FakeHub, store: Store) -> None:
    hub.cut_after = 11_000_000
    path = store.install("tiny", [HubSource(ID, hub.url)], NoProgress())
    assert (path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    ranges = [asked for name, asked in hub.sent if name == "model.safetensors"]
    assert ranges[0] is None
    assert ranges[1] is not None, "fetched from the start again"


def test_what_an_interrupted_pull_has_completed_is_kept(hub: FakeHub, store: Store) -> None:
    hub.broken = "model.safetensors"
    with pytest.raises(PullFailed, match="403"):
        store.install("tiny", [HubSource(ID, hub.url)], NoProgress())
    assert not store.path("tiny").exists()
    hub.broken = ""
    path = store.install("tiny", [HubSource(ID, hub.url)], NoProgress())
    assert (path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    names = [name for name, _ in hub.sent]
    assert names.count("config.json") == names.count("tokenizer.json") == 1


def test_no_such_model(hub: FakeHub, tmp_path: Path) -> None:
    hub.status = 404
    with pytest.raises(SourceFailed, match="no such model"):
        HubSource(ID, hub.url).fetch(tmp_path, NoProgress())


def test_a_revision_is_asked_for_by_name(hub: FakeHub, tmp_path: Path) -> None:
    download(ID, False, NoProgress(), lacks=missing_tokenizer, revision="v2", into=tmp_path, endpoint=hub.url)
    assert hub.revisions == ["v2"]
    assert {name for name, _ in hub.sent} == {"config.json", "tokenizer.json"}
    with pytest.raises(SourceFailed, match='there is no revision "gone"'):
        download(ID, False, NoProgress(), revision="gone", into=tmp_path, endpoint=hub.url)


def test_out_of_reach(store: Store) -> None:
    with FakeHub() as server:
        gone = server.url
    with pytest.raises(PullFailed, match=r"Hugging Face Hub, org/tiny: not reachable: .*refused"):
        store.install("tiny", [HubSource(ID, gone)], NoProgress())


def test_progress_is_told_in_bytes(hub: FakeHub, tmp_path: Path) -> None:
    reached: list[tuple[int, int | None]] = []

    class Watch(NoProgress):
        def reached(self, done: int, total: int | None = None) -> None:
            reached.append((done, total))

    HubSource(ID, hub.url).fetch(tmp_path, Watch())
    size = sum(len(FILES[name]) for name in ("config.json", "tokenizer.json", "model.safetensors"))
    assert max(reached) == (size, size)


def test_a_hub_id_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PullFailed, match=r"could not get nobody/nothing from the Hub.*give a directory"):
        resolve("nobody/nothing")
