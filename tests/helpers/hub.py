"""A hub on this machine that speaks the few calls of `huggingface_hub` which adapters need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = 40 * "a"


class Hub(BaseHTTPRequestHandler):
    """Repository → path → contents, for all requests of a server."""

    repositories: dict[str, dict[str, bytes]]

    def log_message(self, *_) -> None:
        pass

    def answer(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def tell(self, **facts) -> None:
        self.answer(json.dumps(facts).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        given = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.split("?")[0].strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(given)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, {})
            return self.tell(url=f"http://{self.headers['Host']}/{name}", name=name)
        if self.path == "/api/validate-yaml":
            return self.tell(errors=[], warnings=[])
        files = self.repositories["/".join(parts[2:4])]
        if parts[4] == "preupload":
            asked = json.loads(given)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
            ]
            return self.tell(files=modes)
        for line in map(json.loads, given.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        where = f"http://{self.headers['Host']}/{'/'.join(parts[2:4])}/commit/{SHA}"
        return self.tell(commitUrl=where, commitOid=SHA, success=True)

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.repositories:
                return self.answer(status=404, X_Error_Code="RepoNotFound")
            files = self.repositories[name]
            if len(parts) > 4 and parts[4] == "tree":
                listed = [
                    {"type": "file", "path": p, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for p, b in files.items()
                ]
                return self.answer(json.dumps(listed).encode())
            return self.tell(
                id=name, modelId=name, sha=SHA, siblings=[{"rfilename": path} for path in files]
            )
        content = self.repositories["/".join(parts[:2])].get("/".join(parts[4:]))
        if content is None:
            return self.answer(status=404, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.answer(content, ETag=etag, X_Repo_Commit=SHA)

    do_HEAD = do_GET


@contextmanager
def local_hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """Its address, and what it holds."""
    held: dict[str, dict[str, bytes]] = {}
    handler = type("OneHub", (Hub,), {"repositories": held})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", held
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
