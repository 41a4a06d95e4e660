"""A server on this machine that stands for the Hugging Face hub: it answers what huggingface_hub and datasets ask.

Models and data sets are downloaded from it as from the hub (commits, branches, the tree, large files by a redirect to
another address, ranges), and pushed to it. It records what it is asked, and can refuse, redirect, and cut downloads.
"""

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

from huggingface_hub import ModelCard

LARGE = (".safetensors", ".parquet")  # stored apart from git, as by LFS


class Hub(ThreadingHTTPServer):
    """The server, in a thread of its own.

    Attributes:
        url: for HF_ENDPOINT. asked: "METHOD PATH" of each request. tokens: the Authorization headers that were sent.
        refs: "models/OWNER/NAME" or "datasets/..." -> {branch: commit}; trees: commit -> {path: content} (`add`).
        renamed: "models/OLD/NAME" -> "models/NEW/NAME". gated: token that may read "models/OWNER/NAME".
        refusal: (status, headers) of the first `refusals` answers to what has `refuses` in its path.
        cut: file -> the bytes after which its first download is cut; `ends`: and the server is gone. slow: seconds
            between pieces of a large file.
        ranges: those that were asked for. large_tokens: what was sent to the other address.
        role, fails, repos, files: of pushes: the token's role, a path that is refused, OWNER/NAME -> private, and
            OWNER/NAME -> path -> content.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.elsewhere = self.url.replace("127.0.0.1", "localhost")  # another origin, to which no token is sent
        self.role, self.fails = "write", ""
        self.repos: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.refs: dict[str, dict[str, str]] = {}
        self.trees: dict[str, dict[str, bytes]] = {}
        self.renamed: dict[str, str] = {}
        self.gated: dict[str, str] = {}
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.refusals, self.refuses = 10**9, ""
        self.cut: dict[str, int] = {}
        self.slow, self.ends, self.gone = 0.0, False, False
        self.ranges: list[str] = []
        self.large_tokens: set[str] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def add(self, repo: str, files: Path | dict[str, bytes], branch: str = "main") -> str:
        """A commit on a branch of "models/OWNER/NAME" or "datasets/OWNER/NAME"; returns its hash."""
        if isinstance(files, Path):
            files = {p.name: p.read_bytes() for p in files.iterdir()}
        digest = hashlib.sha1(repo.encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        commit = digest.hexdigest()
        self.trees[commit] = files
        self.refs.setdefault(repo, {})[branch] = commit
        return commit

    def close(self) -> None:
        """The server is gone at once, also for those that are connected."""
        self.gone = True
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        self.send(value if isinstance(value, bytes) else json.dumps(value).encode(), status, **headers)

    def send(self, body: bytes, status: int = 200, **headers: object) -> None:
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        if self.command == "HEAD":
            return
        server, path = self.server, self.path.partition("?")[0]
        cut = server.cut.pop(path.rpartition("/")[2], len(body)) if status in (200, 206) else len(body)
        for start in range(0, cut, 2**16):
            self.wfile.write(body[start : min(start + 2**16, cut)])
            time.sleep(server.slow * path.startswith("/large/"))
        if cut < len(body):
            self.close_connection = True
            if server.ends:
                server.close()

    def do_GET(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, server = unquote(self.path.partition("?")[0]), self.server
        if server.gone:
            self.close_connection = True
            return
        server.asked.append(f"{self.command} {path}")
        token = self.headers.get("Authorization", "")
        (server.large_tokens if path.startswith("/large/") else server.tokens).add(token)
        if server.refusal and server.refusals > 0 and server.refuses in path:
            server.refusals -= 1
            status, headers = server.refusal
            return self.answer({"error": "no"}, status, **headers)
        if path.startswith("/large/"):
            _, _, commit, file = path.split("/", 3)
            return self.content(server.trees[commit][file])
        api = path.startswith("/api/")
        repo, rest = self.repository(path.removeprefix("/api"), api)
        if repo in server.renamed:
            return self.answer({}, 307, Location=self.path.replace(*self.names(repo, server.renamed[repo])))
        if repo not in server.refs:
            return self.push(path)
        if server.gated.get(repo, token.removeprefix("Bearer ")) != token.removeprefix("Bearer "):
            return self.answer({"error": "gated"}, 403 if token else 401, X_Error_Code="GatedRepo")
        self.download(repo, *(rest or [""]))

    do_POST = do_HEAD = do_GET

    @staticmethod
    def repository(path: str, api: bool) -> tuple[str, list[str]]:
        """("models/OWNER/NAME", the parts of the path behind it)."""
        parts = path.strip("/").split("/")
        if not api and parts[0] != "datasets":
            parts = ["models", *parts]
        return "/".join(parts[:3]), parts[3:]

    @staticmethod
    def names(old: str, new: str) -> tuple[str, str]:
        return old.removeprefix("models/"), new.removeprefix("models/")

    def download(self, repo: str, what: str, revision: str = "main", *path: str) -> None:
        server, name = self.server, repo.partition("/")[2]
        commit = server.refs[repo].get(revision, revision)
        if commit not in server.trees:
            return self.answer({"error": f"Invalid rev id: {revision}"}, 404, X_Error_Code="RevisionNotFound")
        tree, file = server.trees[commit], "/".join(path)
        if what in ("", "revision", "auth-check"):
            siblings = [{"rfilename": f} for f in tree]
            return self.answer({"_id": "1", "id": name, "sha": commit, "private": False, "siblings": siblings})
        if what == "tree":
            return self.answer(self.listed(tree, file, "recursive=true" in self.path.lower()))
        if what == "paths-info":
            asked = json.loads(self.body)["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
            listed = self.listed(tree, "", True)
            return self.answer([entry for entry in listed if entry["path"] in asked])
        if what != "resolve" or file not in tree:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        body = tree[file]
        if not file.endswith(LARGE):
            return self.content(body, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(body).hexdigest()}"')
        linked = {"X_Linked_ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Linked_Size": len(body)}
        self.answer({}, 302, Location=f"{server.elsewhere}/large/{commit}/{file}", X_Repo_Commit=commit, **linked)

    def content(self, body: bytes, **headers: str) -> None:
        """A file, or the range of it that is asked for."""
        if not (asked := self.headers.get("Range", "")):
            return self.send(body, Accept_Ranges="bytes", **headers)
        self.server.ranges.append(asked)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = body[int(first) : int(last) + 1 if last else None]
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
        self.send(part, 206, Content_Range=span, **headers)

    @staticmethod
    def listed(tree: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
        """The files and folders in a folder, as the hub lists them."""
        found: dict[str, dict] = {}
        for path, body in tree.items():
            inner = path.removeprefix(f"{folder}/") if folder else path
            if folder and inner == path:
                continue
            for n in [n for n, c in enumerate(inner) if c == "/"]:
                name = path[: len(path) - len(inner) + n]
                if recursive or "/" not in inner[:n]:
                    found[name] = {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
            if recursive or "/" not in inner:
                found[path] = {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                if path.endswith(LARGE):
                    large = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
                    found[path]["lfs"] = large
        return list(found.values())

    def push(self, path: str) -> None:
        """What a push asks for: who am I, a repository's state, making one, and a commit."""
        server, body = self.server, self.body
        if server.fails and server.fails in path:
            return self.answer({"error": "Forbidden: over quota"}, 403)
        if path == "/api/whoami-v2":
            auth = {"accessToken": {"role": server.role}}
            return self.answer({"name": "me", "orgs": [{"name": "lab"}], "auth": auth})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            if name in server.repos:
                return self.answer({"url": f"{server.url}/{name}", "error": "exists"}, 409)
            server.repos[name] = "private" in (asked.get("visibility"), asked.get("private") and "private")
            server.files[name] = {}
            return self.answer({"url": f"{server.url}/{name}"})
        if path == "/api/validate-yaml":
            ModelCard(json.loads(body)["content"])
            return self.answer({"errors": [], "warnings": []})
        repo, rest = self.repository(path.removeprefix("/api"), True)
        name = repo.partition("/")[2]
        if name not in server.repos:
            return self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
        if rest[:1] == ["preupload"]:
            asked = json.loads(body)["files"]
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            return self.answer({"files": files})
        if rest[:1] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    server.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{server.url}/{name}/commit/1", "commitOid": "1", "success": True})
        siblings = [{"rfilename": f} for f in [".gitattributes", *server.files[name]]]
        self.answer({"id": name, "private": server.repos[name], "siblings": siblings, "sha": "0" * 40})
