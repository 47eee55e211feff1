"""A server on this machine that answers huggingface_hub as the Hub does: a model's files, its tree, and refusals."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """models: ORG/NAME → directory. gated: names that are refused. downloads: the files that were sent, in order."""

    models: dict[str, Path]
    gated: tuple[str, ...] = ()
    revisions: tuple[str, ...] = ("main", COMMIT)
    downloads: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
        words = unquote(urlsplit(path).path).strip("/").split("/")
        is_api = words[:2] == ["api", "models"]
        words = words[2:] if is_api else words
        name, rest = "/".join(words[:2]), words[2:]
        if name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, b""
        if name not in self.models:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"}, b""
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in self.revisions:
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b""
        directory = self.models[name]
        files = sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())
        if is_api and rest[:1] == ["tree"]:
            return self._json([self._entry(directory, file) for file in files])
        if is_api:
            return self._json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})
        file = "/".join(rest[2:])
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b""
        content = (directory / file).read_bytes()
        if method == "GET":
            self.downloads.append(file)
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, content

    @staticmethod
    def _entry(directory: Path, file: str) -> dict[str, Any]:
        content = (directory / file).read_bytes()
        return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    @staticmethod
    def _json(value: object) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve `hub`; its `url` says where."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._send("HEAD")

        def do_GET(self) -> None:
            self._send("GET")

        def _send(self, method: str) -> None:
            status, headers, body = hub.answer(method, self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if method == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
