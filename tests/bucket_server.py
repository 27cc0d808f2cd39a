"""Google Cloud Storage on 127.0.0.1, in memory: the calls that gcsfs, TensorStore, Orbax and ArrayRecord make.

    with BucketServer("bucket") as server:
        subprocess.run(command, env={**os.environ, **server.environment()})

Objects appear whole when their upload ends, and an upload with `ifGenerationMatch` fails as in the real service. A bucket
that was not named does not exist (404); one of `forbidden` answers 403.
"""

import base64
import http.server
import itertools
import json
import threading
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

from google_crc32c import value as crc32c


class BucketServer:
    """Buckets and their objects: name -> (content, generation)."""

    def __init__(self, *buckets: str, forbidden: tuple[str, ...] = ()):
        self.buckets: dict[str, dict[str, tuple[bytes, int]]] = {name: {} for name in (*buckets, *forbidden)}
        self.forbidden = forbidden
        self.uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}
        self.numbers, self.lock = itertools.count(1_700_000_000_000_000), threading.Lock()

    def __enter__(self) -> "BucketServer":
        server = self
        handler = type("Handler", (_Handler,), {"server_state": server})
        self.http = _Quiet(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def environment(self) -> dict[str, str]:
        """What sends each library here, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.address, "FSSPEC_GCS_TOKEN": "anon", "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "GOOGLE_CLOUD_PROJECT": "none",
            "TENSORSTORE_GCS_HTTP_URL": self.address, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.address,
        }  # fmt: skip

    def put(self, bucket: str, name: str, content: bytes, condition: str | None = None) -> dict[str, Any]:
        """Stores an object, if its generation is the one that `condition` names."""
        with self.lock:
            present = self.buckets[bucket].get(name, (b"", 0))[1]
            if condition is not None and int(condition) != present:
                raise _Answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
            self.buckets[bucket][name] = (content, next(self.numbers))
        return self.describe(bucket, name)

    def describe(self, bucket: str, name: str) -> dict[str, Any]:
        """The resource of an object."""
        content, generation = self.buckets[bucket][name]
        quoted = urllib.parse.quote(name, safe="")
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(generation / 1e6))
        return {
            "kind": "storage#object", "id": f"{bucket}/{name}/{generation}", "name": name, "bucket": bucket,
            "generation": str(generation), "metageneration": "1", "size": str(len(content)), "etag": str(generation),
            "contentType": "application/octet-stream", "storageClass": "STANDARD", "timeCreated": now, "updated": now,
            "crc32c": base64.b64encode(crc32c(content).to_bytes(4, "big")).decode(),
            "mediaLink": f"{self.address}/download/storage/v1/b/{bucket}/o/{quoted}?generation={generation}&alt=media",
            "selfLink": f"{self.address}/storage/v1/b/{bucket}/o/{quoted}",
        }  # fmt: skip

    def names(self, bucket: str, query: Mapping[str, str]) -> dict[str, Any]:
        """A listing; all of it on one page."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names = sorted(name for name in self.buckets[bucket] if name.startswith(prefix))
        names = [name for name in names if query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff")]
        prefixes = set()
        if delimiter:
            below = [name for name in names if delimiter in name[len(prefix) :]]
            prefixes = {prefix + name[len(prefix) :].split(delimiter)[0] + delimiter for name in below}
            names = [name for name in names if name not in set(below)]
        found = {"kind": "storage#objects", "items": [self.describe(bucket, name) for name in names]}
        return found | ({"prefixes": sorted(prefixes)} if prefixes else {})


class _Answer(Exception):
    """An answer that is not what was hoped for."""

    def __init__(self, code: int, value: Any):
        super().__init__(code)
        self.code, self.value = code, value


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of this server."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: BucketServer

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def handle_any(self) -> None:
        body, url = self._body(), urllib.parse.urlsplit(self.path)
        query = {name: values[-1] for name, values in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        try:
            code, headers, content = self._answer(self.command, url.path, query, body)
        except _Answer as answer:
            code, headers, content = answer.code, {"Content-Type": "application/json"}, json.dumps(answer.value).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_any  # noqa: N815 - names of http.server

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        if path.startswith("/batch/"):
            return self._batch(body)
        parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
        if "b" not in parts:
            raise _Answer(404, {"error": {"code": 404, "message": f"no such call: {method} {path}"}})
        _, bucket, *rest = parts[parts.index("b") :]
        state = self.server_state
        if bucket in state.forbidden:
            raise _Answer(403, {"error": {"code": 403, "message": f"no permission to use the bucket {bucket}"}})
        if bucket not in state.buckets:
            raise _Answer(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
        if parts[0] in ("upload", "resumable"):
            return self._upload(method, bucket, query, body)
        if not rest:
            return _json({"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US", "storageClass": "STANDARD"})
        if rest == ["o"]:
            return _json(state.names(bucket, query))
        return self._object(method, bucket, rest[1:], query)

    def _object(self, method: str, bucket: str, rest: list[str], query: dict[str, str]):
        state, name = self.server_state, rest[0]
        with state.lock:
            content, generation = state.buckets[bucket].get(name, (b"", 0))
            wanted = query.get("ifGenerationMatch")
            if method == "DELETE" and generation and wanted in (None, str(generation)):
                del state.buckets[bucket][name]
                return 204, {}, b""
        if wanted is not None and int(wanted) != generation:
            raise _Answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        if not generation:
            raise _Answer(404, {"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}})
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, {"x-goog-generation": str(generation)}, b""
        if len(rest) > 1:  # rewriteTo/b/BUCKET/o/NAME, copyTo/b/BUCKET/o/NAME or moveTo/o/NAME
            to = rest[3] if rest[1] != "moveTo" else bucket
            resource = state.put(to, rest[-1], content)
            if rest[1] == "moveTo":
                state.buckets[bucket].pop(name)
            return _json({"done": True, "resource": resource} if rest[1] == "rewriteTo" else resource)
        if query.get("alt") != "media":
            return _json(state.describe(bucket, name))
        checksum = state.describe(bucket, name)["crc32c"]
        headers = {"x-goog-generation": str(generation), "x-goog-hash": f"crc32c={checksum}", "x-goog-metageneration": "1",
                   "x-goog-stored-content-length": str(len(content)), "x-goog-stored-content-encoding": "identity",
                   "x-goog-storage-class": "STANDARD", "Content-Type": "application/octet-stream"}  # fmt: skip
        return _range(self.headers.get("Range"), content, headers)

    def _upload(self, method: str, bucket: str, query: dict[str, str], body: bytes):
        state = self.server_state
        if method == "DELETE":
            state.uploads.pop(query["upload_id"], None)
            return 499, {}, b""
        if "upload_id" in query:
            return self._part(query["upload_id"], body)
        kind = query.get("uploadType")
        if kind == "media":
            return _json(state.put(bucket, query["name"], body, query.get("ifGenerationMatch")))
        if kind == "multipart":
            boundary = b"--" + self.headers["Content-Type"].split("boundary=")[1].strip('"').encode()
            described, content = body.split(boundary)[1:3]
            described, content = (part.replace(b"\r\n\r\n", b"\n\n", 1).split(b"\n\n", 1)[1] for part in (described, content))
            content = content.removesuffix(b"\n").removesuffix(b"\r")
            return _json(state.put(bucket, json.loads(described)["name"], content, query.get("ifGenerationMatch")))
        name = query.get("name") or json.loads(body)["name"]
        number = str(next(state.numbers))
        state.uploads[number] = (bucket, name, query, bytearray())
        return 200, {"Location": f"{state.address}/upload/storage/v1/b/{bucket}/o?upload_id={number}"}, b""

    def _part(self, number: str, body: bytes):
        state = self.server_state
        bucket, name, query, content = state.uploads[number]
        content += body
        if self.headers.get("Content-Range", "*/0").endswith("/*"):
            return 308, {"Range": f"bytes=0-{len(content) - 1}"} if content else {}, b""
        del state.uploads[number]
        return _json(state.put(bucket, name, bytes(content), query.get("ifGenerationMatch")))

    def _batch(self, body: bytes):
        """Deletions, one HTTP request in each part."""
        boundary, answers = "batch_answer", []
        for line in body.decode().splitlines():
            if not line.startswith("DELETE "):
                continue
            url = urllib.parse.urlsplit(line.split()[1])
            try:
                code = self._answer("DELETE", url.path, {}, b"")[0]
            except _Answer as answer:
                code = answer.code
            answers.append(f"--{boundary}\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {code} -\r\n\r\n")
        text = "".join(answers) + f"--{boundary}--"
        return 200, {"Content-Type": f"multipart/mixed; boundary={boundary}"}, text.encode()


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _range(asked: str | None, content: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    if not asked:
        return 200, headers, content
    first, _, last = asked.removeprefix("bytes=").partition("-")
    start = int(first) if first else max(len(content) - int(last), 0)
    end = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= len(content):
        return 416, headers | {"Content-Range": f"bytes */{len(content)}"}, b""
    return 206, headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}, content[start:end]
