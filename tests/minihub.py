"""A Hub on the loopback address, in a thread: what huggingface_hub needs to create, upload, list and download models.

    with MiniHub() as hub:
        environment = {**os.environ, **hub.environment, "HF_TOKEN": hub.token}

Commits are whole or absent, as on the Hub. `cut_uploads` and `cut_commits` break that many connections half way.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt")
"""Ends of the names of files that go through the large file storage."""
EMPTY = "0" * 40
Files = dict[str, tuple[bytes, bool]]
"""path -> (content, whether it is a large file)."""


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repository:
    """branches: name -> commits, the last of them the head; a commit is (id, message, files)."""

    private: bool = False
    branches: dict[str, list[tuple[str, str, Files]]] = field(default_factory=lambda: {"main": [(EMPTY, "", {})]})

    def at(self, revision: str) -> tuple[str, str, Files] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c[0] == revision), None)


class MiniHub:
    """The server and what it holds: `repositories` by "user/name", `blobs` by SHA-256, `log` of requests."""

    def __init__(self, user: str = "user", token: str = "hf_test_not_a_secret") -> None:
        self.user, self.token = user, token
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[str] = []
        self.cut_uploads = self.cut_commits = 0
        self.lock = threading.Lock()

    def __enter__(self) -> "MiniHub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *unused: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that shall talk to this Hub and no other."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}


class _Cut(Exception):
    """The connection ends here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: MiniHub

    def log_message(self, *unused: Any) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.hub.log.append(f"{self.command} {path}")
        try:
            body = self.read_body(path)
            with self.hub.lock:
                self.route(path, query, body)
        except _Cut:
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    def read_body(self, path: str) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            out = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        length = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT" and self.hub.cut_uploads > 0:
            self.hub.cut_uploads -= 1
            self.rfile.read(length // 2)
            raise _Cut
        return self.rfile.read(length)

    def send(self, code: int, body: Any = b"", kind: str = "application/json", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code: int, kind: str, message: str) -> None:
        self.send(code, {"error": message}, X_Error_Code=kind, X_Error_Message=message)

    @property
    def is_authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        hub = self.hub
        if path == "/control":
            # tests that run elsewhere set how many connections break
            vars(hub).update(json.loads(body))
            return self.send(200, {"commits": {n: len(r.branches["main"]) - 1 for n, r in hub.repositories.items()}})
        if path == "/api/whoami-v2":
            who = {"type": "user", "name": hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
            return self.send(200, who) if self.is_authorized else self.refuse(401, "", "Invalid token")
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.startswith("/lfs/"):
            name = path.removeprefix("/lfs/")
            if sha256(body) != name:
                return self.refuse(400, "", "another content was announced")
            hub.blobs[name] = body
            return self.send(200, {})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.large_files(json.loads(body)["objects"])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", path):
            repository = self.find(match[1])
            return None if repository is None else self.download(repository, match[2], match[3])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([\w-]+)(?:/([^/]+|refs/pr/\d+)(?:/(.*))?)?)?", path):
            repository = self.find(match[1])
            return None if repository is None else self.model(repository, *match.groups(default=""), query, body)
        return self.refuse(404, "", f"no route {path}")

    def find(self, name: str) -> Repository | None:
        """The repository, if this request may see it; answers with an error otherwise."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.is_authorized):
            # the Hub does not tell whether a private one is there
            self.refuse(404 if self.is_authorized else 401, "RepoNotFound", "Repository not found")
            return None
        return repository

    def create(self, wanted: dict[str, Any]) -> None:
        if not self.is_authorized:
            return self.refuse(401, "", "Invalid token")
        name = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        is_new = name not in self.hub.repositories
        if is_new:
            self.hub.repositories[name] = Repository(
                private=bool(wanted.get("private")) or wanted.get("visibility") == "private"
            )
        error = {} if is_new else {"error": "You already created this model repo"}
        return self.send(200 if is_new else 409, {"url": f"{self.hub.url}/{name}", "name": name, "id": name, **error})

    def large_files(self, objects: list[dict[str, Any]]) -> None:
        answers = []
        for wanted in objects:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            answers.append({**wanted, **({} if wanted["oid"] in self.hub.blobs else {"actions": upload})})
        self.send(200, {"transfer": "basic", "objects": answers}, "application/vnd.git-lfs+json")

    def model(
        self, repository: Repository, name: str, action: str, revision: str, rest: str, query: Any, body: bytes
    ) -> None:
        revision = revision or "main"
        if action in ("commit", "branch") and not self.is_authorized:
            return self.refuse(401, "", "Invalid token")
        if action == "branch":
            is_new = revision not in repository.branches
            repository.branches.setdefault(revision, list(repository.branches["main"]))
            return self.send(200 if is_new else 409, {})
        if action == "refs":
            heads = [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c[-1][0]} for n, c in repository.branches.items()
            ]
            return self.send(200, {"branches": heads, "tags": [], "converts": []})
        if (commit := repository.at(revision)) is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        head, _, files = commit
        if action == "preupload":
            return self.send(200, {"files": [_mode(entry["path"], files) for entry in json.loads(body)["files"]]})
        if action == "commit":
            return self.commit(repository, name, revision, "create_pr" in query, body)
        if action == "tree":
            shown = [_entry(path, files) for path in sorted(files) if path.startswith(rest)]
            return self.send(200, shown)
        if action == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            return self.send(200, [_entry(path, files) for path in wanted if path in files])
        if action in ("", "revision"):
            facts = {"_id": name, "id": name, "modelId": name, "author": name.split("/")[0], "sha": head, "tags": []}
            facts |= {"private": repository.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
            return self.send(200, {**facts, "siblings": [{"rfilename": path} for path in files]})
        return self.refuse(404, "", f"no action {action}")

    def commit(self, repository: Repository, name: str, revision: str, is_pull_request: bool, body: bytes) -> None:
        if self.hub.cut_commits > 0:
            self.hub.cut_commits -= 1
            raise _Cut
        files, message = dict(repository.branches[revision][-1][2]), ""
        for line in body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = (base64.b64decode(value["content"]), False)
                case "lfsFile":
                    files[value["path"]] = (self.hub.blobs[value["oid"]], True)
                case "deletedFile":
                    del files[value["path"]]
        if is_pull_request:
            number = sum(branch.startswith("refs/pr/") for branch in repository.branches) + 1
            repository.branches[f"refs/pr/{number}"] = list(repository.branches[revision])
            revision = f"refs/pr/{number}"
        commits = repository.branches[revision]
        head = hashlib.sha1(
            f"{len(commits)} {revision} {sorted((p, git_id(c)) for p, (c, _) in files.items())}".encode()
        )
        commits.append((head.hexdigest(), message, files))
        url = f"{self.hub.url}/{name}"
        done = {"success": True, "commitOid": head.hexdigest(), "commitUrl": f"{url}/commit/{head.hexdigest()}"}
        if is_pull_request:
            done["pullRequestUrl"] = f"{url}/discussions/{revision.rpartition('/')[2]}"
        self.send(200, {**done, "hookOutput": ""})

    def download(self, repository: Repository, revision: str, path: str) -> None:
        if (commit := repository.at(revision)) is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        head, _, files = commit
        if path not in files:
            return self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=head)
        content, is_large = files[path]
        headers = {"X_Repo_Commit": head, "ETag": f'"{sha256(content) if is_large else git_id(content)}"'}
        headers["Accept_Ranges"] = "bytes"
        span = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and self.command == "GET":
            first, last = int(span[1]), int(span[2] or len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.send(206, content[first : last + 1], "application/octet-stream", **headers)
        return self.send(200, content, "application/octet-stream", **headers)


def _mode(path: str, files: Files) -> dict[str, Any]:
    """How a file is to be uploaded, and the id of what is there under its name."""
    known = None
    if path in files:
        content, is_large = files[path]
        known = sha256(content) if is_large else git_id(content)
    mode = "lfs" if path.endswith(LARGE) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known}


def _entry(path: str, files: Files) -> dict[str, Any]:
    content, is_large = files[path]
    large = {"lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 134}} if is_large else {}
    return {"type": "file", "path": path, "size": len(content), "oid": git_id(content), **large}
