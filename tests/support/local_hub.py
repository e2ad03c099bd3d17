"""A hub on this machine with one data set: enough of its interface for its own clients to list and fetch files."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    root: Path
    name: str

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:  # noqa: N802
        self.do_GET(False)

    def do_POST(self) -> None:  # noqa: N802
        length = int(self.headers.get("Content-Length", 0))
        asked = json.loads(self.rfile.read(length) or b"{}").get("paths", [])
        self._json([entry for entry in self._entries() if entry["path"] in asked])

    def do_GET(self, body: bool = True) -> None:  # noqa: N802
        path, api, resolve = unquote(urlsplit(self.path).path), f"/api/datasets/{self.name}", f"/datasets/{self.name}/resolve/"
        if path.startswith(resolve):
            self._file(self.root / path.removeprefix(resolve).partition("/")[2], body)
        elif path.startswith(f"{api}/tree"):
            inside = path.removeprefix(f"{api}/tree/").partition("/")[2]
            self._json([entry for entry in self._entries() if not inside or entry["path"].startswith(f"{inside}/")])
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{SHA}"):
            siblings = [{"rfilename": entry["path"]} for entry in self._entries() if entry["type"] == "file"]
            self._json({"id": self.name, "sha": SHA, "private": False, "tags": [], "downloads": 0, "siblings": siblings})
        else:
            self._json({"error": "not found"}, 404)

    def _entries(self) -> list[dict[str, Any]]:
        files = [path for path in sorted(self.root.rglob("*"))]
        return [
            {
                "type": "directory" if path.is_dir() else "file",
                "path": path.relative_to(self.root).as_posix(),
                "size": 0 if path.is_dir() else path.stat().st_size,
                "oid": hashlib.sha1(str(path).encode()).hexdigest(),
            }
            for path in files
        ]

    def _file(self, file: Path, body: bool) -> None:
        if not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        first, last = 0, len(content) - 1
        wanted = self.headers.get("Range")
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if body:
            self.wfile.write(content[first : last + 1])

    def _json(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def hub_with(root: Path, name: str) -> Iterator[str]:
    """Serves the files of a folder as the data set `name`; gives the address for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"root": root, "name": name}))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
