"""A hub on this machine with a few data sets: enough of its interface for its own clients to list, fetch and check files."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """sets: name -> folder of its files. cut: file -> bytes after which the first answer with its content breaks off. asked: the
    files whose content was asked for, with the first byte wanted. stated: file -> content whose sum is told in its place."""

    sets: Mapping[str, Path]
    cut: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)
    stated: dict[str, bytes] = field(default_factory=dict)
    address: str = ""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:  # noqa: N802
        self.do_GET(False)

    def do_POST(self) -> None:  # noqa: N802
        length = int(self.headers.get("Content-Length", 0))
        asked = json.loads(self.rfile.read(length) or b"{}").get("paths", [])
        name = unquote(urlsplit(self.path).path).removeprefix("/api/datasets/").partition("/paths-info")[0]
        self._json([entry for entry in self._entries(self.hub.sets[name]) if entry["path"] in asked])

    def do_GET(self, body: bool = True) -> None:  # noqa: N802
        path = unquote(urlsplit(self.path).path)
        for name, root in self.hub.sets.items():
            api, resolve = f"/api/datasets/{name}", f"/datasets/{name}/resolve/"
            if path.startswith(resolve):
                self._file(root, path.removeprefix(resolve).partition("/")[2], body)
                return
            if path.startswith(f"{api}/tree"):
                inside = path.removeprefix(f"{api}/tree/").partition("/")[2]
                self._json([entry for entry in self._entries(root) if not inside or entry["path"].startswith(f"{inside}/")])
                return
            if path in (api, f"{api}/revision/main", f"{api}/revision/{SHA}"):
                siblings = [{"rfilename": entry["path"]} for entry in self._entries(root) if entry["type"] == "file"]
                self._json({"id": name, "sha": SHA, "private": False, "tags": [], "downloads": 0, "siblings": siblings})
                return
        self._json({"error": "not found"}, 404)

    def _entries(self, root: Path) -> list[dict[str, Any]]:
        files = [path for path in sorted(root.rglob("*"))]
        return [self._entry(path, path.relative_to(root).as_posix()) for path in files]

    def _entry(self, path: Path, name: str) -> dict[str, Any]:
        """As the hub tells it: text by its git sum, all else by its sha256 (LFS)."""
        if path.is_dir():
            return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}
        content = self.hub.stated.get(name, path.read_bytes())
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": name, "size": len(content), "oid": git}
        if path.suffix not in (".md", ".json"):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def _file(self, root: Path, name: str, body: bool) -> None:
        file = root / name
        if not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, entry = file.read_bytes(), self._entry(file, name)
        first, last = 0, len(content) - 1
        wanted = self.headers.get("Range")
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{entry.get("lfs", entry)["oid"]}"')
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if body:
            self.hub.asked.append((name, first))
            self.wfile.write(content[first : min(last + 1, first + self.hub.cut.pop(name, len(content)))])

    def _json(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def hub_of(hub: Hub) -> Iterator[Hub]:
    """Serves the sets; `address` is what HF_ENDPOINT takes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    Thread(target=server.serve_forever, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def hub_with(root: Path, name: str) -> Iterator[str]:
    """Serves the files of a folder as the data set `name`; gives the address for HF_ENDPOINT."""
    with hub_of(Hub({name: root})) as hub:
        yield hub.address
