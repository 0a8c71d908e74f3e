"""A local Hub server: enough of the HTTP API for the real `huggingface_hub` client, over plain LFS.

It stores repositories with branches of commits: models under their names; datasets, which are only read,
under "datasets/org/name". Small files are part of a commit; large files are uploaded first and referenced by
SHA-256. `fail` makes requests fail with a status or a dropped connection, either at once or halfway through
the response; `hold` blocks them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import transformers.utils.hub
from huggingface_hub import file_download
from huggingface_hub.utils import _http

from flamingo_ft.hub import errors

WRITER, READER = "hf_thewritingtoken", "hf_thereadingtoken"
LARGE = 1000  # bytes from which a file is uploaded through LFS
PAGE = 50  # entries of a folder in one response
LONG = 15.0  # seconds that a request is held at most


@dataclass
class Commit:
    """A commit. files: path -> SHA-256 of its content."""

    oid: str
    title: str
    files: dict[str, str]


@dataclass
class Repository:
    """A repository. gated: its files require accepted terms, which only `WRITER` has accepted."""

    private: bool
    gated: bool = False
    branches: dict[str, list[Commit]] = field(
        default_factory=lambda: {"main": [Commit("0" * 40, "initial commit", {})]}
    )

    @property
    def history(self) -> list[Commit]:
        """The commits of the main branch."""
        return self.branches["main"]

    def at(self, revision: str) -> Commit | None:
        """Return the newest commit of a branch, or the commit of this hash; None for an unknown revision."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((one for branch in self.branches.values() for one in branch if one.oid == revision), None)


@dataclass
class Failure:
    pattern: str
    times: int
    status: int | None
    half_way: bool


@dataclass
class Held:
    """Held requests. reached: set when a request waits. released: set it to answer the request."""

    pattern: str
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


class Hub:
    """The stored repositories and the failures to inject.

    ``requests`` lists the method and path of each request so far; ``constants`` are the values that a client
    of this server needs in `huggingface_hub.constants`.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.held: list[Held] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.url = ""
        self.constants: dict[str, Any] = {}

    def fail(self, pattern: str, times: int = 1, status: int | None = None, half_way: bool = False) -> None:
        """Fail the next ``times`` requests ("METHOD /path") that match ``pattern``.

        They get ``status``, or a dropped connection if it is None (``half_way``: after half of the content).
        """
        self.failures.append(Failure(pattern, times, status, half_way))

    def hold(self, pattern: str) -> Held:
        """Hold requests that match ``pattern`` until they are released, for at most `LONG` seconds."""
        self.held.append(Held(pattern))
        return self.held[-1]

    def wait(self, request: str) -> None:
        for held in self.held:
            if re.search(held.pattern, request):
                held.reached.set()
                held.released.wait(LONG)

    def failing(self, request: str) -> Failure | None:
        with self.lock:
            self.requests.append(request)
            matching = (one for one in self.failures if one.times and re.search(one.pattern, request))
            failure = next(matching, None)
            if failure is not None:
                failure.times -= 1
            return failure

    def store(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.contents[digest] = content
        return digest

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a repository: path -> content."""
        commit = self.repositories[repository].at(revision)
        return {path: self.contents[digest] for path, digest in commit.files.items()}

    def commit(self, repository: Repository, branch: str, lines: list[dict[str, Any]]) -> Commit:
        """Apply the lines of a commit, all or none."""
        history = repository.branches[branch]
        files, title = dict(history[-1].files), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = self.store(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "deletedFolder":
                files = {path: digest for path, digest in files.items() if not path.startswith(value["path"])}
        if missing := set(files.values()) - self.contents.keys():
            raise ValueError(f"content that was never uploaded: {sorted(missing)}")
        oid = hashlib.sha1(json.dumps([len(history), files]).encode()).hexdigest()
        history.append(Commit(oid, title, files))
        return history[-1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:  # noqa: N802
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        parts = urlsplit(self.path)
        self.query, path = parse_qs(parts.query), unquote(parts.path)
        failure = self.hub.failing(f"{self.command} {path}")
        self.hub.wait(f"{self.command} {path}")
        self.half_way = failure is not None and failure.half_way
        if failure is None or self.half_way:
            self._route(path)
        elif failure.status is None:
            self._drop()
        else:
            self._error(failure.status, f"injected failure for {self._token()}")  # a Hub that leaks the token

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _route(self, path: str) -> None:
        for methods, pattern, handle in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                return handle(self, **match.groupdict())
        self._error(404, f"no such address: {self.command} {path}")

    # --- permissions ---

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _repository(self, name: str, write: bool = False) -> Repository | None:
        """Return the repository; or send an error and return None."""
        token, repository = self._token(), self.hub.repositories.get(name)
        if token not in (None, WRITER, READER):
            return self._error(401, "Invalid credentials in Authorization header")
        if repository is None or (repository.private and token is None):
            return self._error(401 if token is None else 404, "Repository not found", "RepoNotFound")
        if write and token != WRITER:
            return self._error(403, "You don't have the rights to write to this repository")
        return repository

    # --- responses ---

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._bytes(json.dumps(value).encode(), status, **{"Content-Type": "application/json", **headers})

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        named = {"X-Error-Code": code} if code else {}
        self._json({"error": message}, status, **{"X-Error-Message": message, **named})

    def _bytes(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if self.half_way else content)
        if self.half_way:
            self._drop()

    # --- requests ---

    def whoami(self) -> None:
        if self._token() not in (WRITER, READER):
            return self._error(401, "Invalid username or password.")
        self._json({"type": "user", "name": "somebody", "auth": {"type": "access_token"}})

    def create(self) -> None:
        body = json.loads(self.body)
        name = f"{body.get('organization') or 'somebody'}/{body['name']}"
        if self._token() not in (WRITER, READER):
            return self._error(401, "Invalid username or password.")
        if name in self.hub.repositories:
            conflict = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            return self._json(conflict, 409)
        if self._token() != WRITER:
            return self._error(403, "You don't have the rights to create a model under this namespace")
        private = body.get("visibility") == "private" or bool(body.get("private"))
        self.hub.repositories[name] = Repository(private)
        self._json({"url": f"{self.hub.url}/{name}", "id": name})

    def card_is_valid(self) -> None:
        self._json({"errors": [], "warnings": []})

    def may_write(self, name: str) -> None:
        if self._repository(name, write=True):
            self._json({})

    def info(self, name: str, revision: str | None = None) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        commit = repository.at(revision or "main")
        if commit is None:
            return self._error(404, "Invalid rev id", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self._json(
            {
                "id": name.removeprefix("datasets/"),
                "sha": commit.oid,
                "private": repository.private,
                "tags": [],
                "siblings": siblings,
            }
        )

    def create_branch(self, name: str, branch: str) -> None:
        repository = self._repository(name, write=True)
        if repository is None:
            return
        if branch in repository.branches:
            return self._error(409, f"Reference already exists: refs/heads/{branch}")
        repository.branches[branch] = [*repository.history]
        self._json({})

    def preupload(self, name: str, revision: str) -> None:
        if self._repository(name, write=True) is None:
            return
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["size"] >= LARGE else "regular",
                "shouldIgnore": False,
            }
            for one in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def lfs_batch(self, name: str) -> None:
        if self._repository(name, write=True) is None:
            return
        objects = []
        for one in json.loads(self.body)["objects"]:
            is_stored = one["oid"] in self.hub.contents
            actions = (
                {} if is_stored else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            )
            objects.append({"oid": one["oid"], "size": one["size"], **actions})
        self._json(
            {"transfer": "basic", "objects": objects}, **{"Content-Type": "application/vnd.git-lfs+json"}
        )

    def lfs_upload(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            return self._error(400, "content does not match its SHA-256")
        self.hub.store(self.body)
        self._bytes(b"")

    def commit(self, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        if repository is None:
            return
        if revision not in repository.branches:
            return self._error(404, "Invalid rev id", "RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        try:
            with self.hub.lock:
                commit = self.hub.commit(repository, revision, lines)
        except (KeyError, ValueError) as error:
            return self._error(400, f"nothing was committed: {error}")
        url = f"{self.hub.url}/{name}/commit/{commit.oid}"
        self._json({"commitOid": commit.oid, "commitUrl": url, "pullRequestUrl": None})

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        commit, folder = repository.at(revision), f"{folder}/" if folder else ""
        if commit is None:
            return self._error(404, "Invalid rev id", "RevisionNotFound")
        paths = [path for path in sorted(commit.files) if path.startswith(folder)]
        if folder and not paths:
            return self._error(404, f"{folder} does not exist", "EntryNotFound")
        is_recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        if not is_recursive:
            paths = [*dict.fromkeys(folder + path.removeprefix(folder).partition("/")[0] for path in paths)]
        begin = int(self.query.get("cursor", ["0"])[0])
        page = [self._entry(path, commit.files.get(path)) for path in paths[begin : begin + PAGE]]
        path = urlsplit(self.path).path
        query = f"recursive={is_recursive}&cursor={begin + PAGE}"
        more = {"Link": f'<{self.hub.url}{path}?{query}>; rel="next"'}
        self._json(page, **(more if begin + PAGE < len(paths) else {}))

    def paths_info(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        commit = repository.at(revision)
        if commit is None:
            return self._error(404, "Invalid rev id", "RevisionNotFound")
        paths = parse_qs(self.body.decode()).get("paths", [])
        folders = {path for path in paths if any(file.startswith(f"{path}/") for file in commit.files)}
        known = [path for path in paths if path in folders or path in commit.files]
        self._json([self._entry(path, commit.files.get(path)) for path in known])

    def _entry(self, path: str, digest: str | None) -> dict[str, Any]:
        """Describe a file, or a folder, which has no digest."""
        if digest is None:
            return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
        size = len(self.hub.contents[digest])
        lfs = {"lfs": {"oid": digest, "size": size, "pointerSize": 134}} if size >= LARGE else {}
        return {"type": "file", "path": path, "oid": digest[:40], "size": size, **lfs}

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        if repository.gated and self._token() != WRITER:
            return self._error(403, f"Access to model {name} is restricted", "GatedRepo")
        commit = repository.at(revision)
        if commit is None or path not in commit.files:
            return self._error(404, "Entry not found", "EntryNotFound")
        digest = commit.files[path]
        content = self.hub.contents[digest]
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if byte_range is None:
            return self._bytes(content, **headers)
        begin, end = int(byte_range[1]), int(byte_range[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
        self._bytes(content[begin : end + 1], 206, **headers)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that were killed."""


NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
DATASET = r"(?P<name>datasets/[^/]+/[^/]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.card_is_valid),
    (("GET",), f"/api/models/{NAME}/auth-check/write", Handler.may_write),
    (("GET",), f"/api/models/{NAME}", Handler.info),
    (("GET",), f"/api/models/{NAME}/revision/{REVISION}", Handler.info),
    (("POST",), f"/api/models/{NAME}/branch/(?P<branch>.+)", Handler.create_branch),
    (("POST",), f"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    (("POST",), f"/api/models/{NAME}/commit/{REVISION}", Handler.commit),
    (("GET",), f"/api/models/{NAME}/tree/{REVISION}(/(?P<folder>.+))?", Handler.tree),
    (("POST",), f"/{NAME}.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<digest>[0-9a-f]{64})", Handler.lfs_upload),
    (("GET", "HEAD"), f"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
    (("GET",), f"/api/{DATASET}", Handler.info),
    (("GET",), f"/api/{DATASET}/revision/{REVISION}", Handler.info),
    (("GET",), f"/api/{DATASET}/tree/{REVISION}(/(?P<folder>.+))?", Handler.tree),
    (("POST",), f"/api/{DATASET}/paths-info/{REVISION}", Handler.paths_info),
    (("GET", "HEAD"), f"/{DATASET}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a Hub at ``hub.url`` during the block."""
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        for held in hub.held:
            held.released.set()
        server.shutdown()
        server.server_close()


def shorten_waits(patch: pytest.MonkeyPatch) -> None:
    """Shorten the waits between attempts, of this package and of the client."""
    patch.setattr(errors, "FIRST_WAIT", 0.01)
    for module in (_http, file_download):
        patch.setattr(module, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))


@contextmanager
def in_place_of_the_hub(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """Run a Hub that the client uses in place of the real one, with its cache in ``folder`` and no token."""
    with serving() as hub:
        values: dict[str, Any] = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        values["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        values |= {"HF_HUB_CACHE": str(folder / "hub_cache"), "HF_TOKEN_PATH": str(folder / "no_token")}
        for name, value in values.items():
            patch.setattr(huggingface_hub.constants, name, value)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)  # PEFT's client, created on import
        patch.setattr(transformers.utils.hub, "_hf_api", None)  # created on first use
        hub.constants = values
        patch.delenv("HF_TOKEN", raising=False)
        yield hub
