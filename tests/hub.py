"""A stand-in for the Hugging Face hub: the part of its HTTP API that putting a model there takes, on this machine."""

import json
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_" + "a1B2" * 8


class Hub(ThreadingHTTPServer):
    """What the hub holds and was asked. `private` and `files` are by model, `refusals` by a part of a path."""

    daemon_threads = True

    def __init__(self, large: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.large = large  # ends of the names of files that go to the store for large ones
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.stored: dict[str, bytes] = {}  # large files, by their SHA-256
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, Authorization
        self.refusals: dict[str, tuple[int, str]] = {}  # status and message

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, private: bool, **files: bytes) -> None:
        """Have a model there, as one that is made on the hub's pages."""
        self.private[name], self.files[name] = private, {".gitattributes": b"", **files}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def serve(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = self.headers.get("Authorization")
        self.server.asked.append((self.command, path, token))
        for part, (status, message) in self.server.refusals.items():
            if part in path:
                return self.answer(status, {"error": message})
        if path.startswith("/store/"):  # as at the hub, whoever has the address may put the file there
            assert sha256(body).hexdigest() == path.removeprefix("/store/")
            self.server.stored[path.removeprefix("/store/")] = body
            return self.answer(200)
        if token != f"Bearer {TOKEN}":
            message = "Invalid credentials in Authorization header"
            return self.answer(401, {"error": message}, X_Error_Message=message)
        match path.strip("/").split("/"):
            case ["api", "repos", "create"]:
                self.create(**json.loads(body))
            case ["api", "validate-yaml"]:
                self.answer(200, {"errors": [], "warnings": []})
            case ["api", "models", owner, name, *rest]:
                self.model(f"{owner}/{name}", rest, body)
            case [_, _, "info", "lfs", "objects", "batch"]:
                self.batch(json.loads(body)["objects"])
            case _:
                self.answer(404, {"error": f"no {path}"})
        return None

    do_GET = do_POST = do_PUT = serve  # noqa: N815  # names that http.server looks for

    def create(self, name: str, organization: str, visibility: str = "public", **_: Any) -> None:
        whole = f"{organization}/{name}"
        found = {"url": f"{self.server.address}/{whole}"}
        if whole in self.server.files:
            return self.answer(409, found | {"error": "You already created this model repo"})
        self.server.add(whole, visibility == "private")
        return self.answer(200, found)

    def model(self, name: str, rest: list[str], body: bytes) -> None:
        if name not in self.server.files:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        held = self.server.files[name]
        match rest:
            case []:
                siblings = [{"rfilename": file} for file in held]
                self.answer(200, {"id": name, "private": self.server.private[name], "siblings": siblings})
            case ["preupload", "main"]:
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(self.server.large or "/") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                self.answer(200, {"files": modes})
            case ["commit", "main"]:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        held[value["path"]] = b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        held[value["path"]] = self.server.stored[value["oid"]]
                address = f"{self.server.address}/{name}/commit/{'0' * 40}"
                self.answer(200, {"commitUrl": address, "commitOid": "0" * 40, "success": True})
            case _:
                self.answer(404, {"error": f"no {rest}"})
        return None

    def batch(self, wanted: list[dict[str, Any]]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.address}/store/{one['oid']}"}}} for one in wanted
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})


@contextmanager
def serving(large: tuple[str, ...] = ()) -> Iterator[Hub]:
    """Have a hub on this machine."""
    with Hub(large) as hub:
        thread = Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
