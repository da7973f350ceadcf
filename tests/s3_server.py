"""An S3 server on this machine (moto's), that notes what changes it and can be told to fail."""

from __future__ import annotations

import http.client
import io
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

HEADERS = (
    "CONTENT_TYPE",
    "HTTP_AUTHORIZATION",
    "HTTP_CONTENT_ENCODING",
    "HTTP_X_AMZ_CONTENT_SHA256",
    "HTTP_X_AMZ_DECODED_CONTENT_LENGTH",
    "HTTP_X_AMZ_TRAILER",
)
"""Of a request, that decide what becomes of its body."""


@dataclass(frozen=True)
class Request:
    """One that changed a bucket, or a `mark` of the test's own."""

    method: str
    key: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    mark: Any = None

    def __str__(self) -> str:
        return f"{self.method} {self.key}"


class Server:
    """What it holds outlives `stop` and `start`: as a service does that was away for a while."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.before: Callable[[str, str], None] = lambda method, path: None
        """Called with each request; what it raises breaks the connection."""
        self.requests: list[Request] = []
        self.port, self._client = 0, None
        self.start()

    def start(self) -> None:
        self.server = make_server("127.0.0.1", self.port, self, threaded=True)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=[0.05], daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.before(method, path)
        if method in ("PUT", "POST", "DELETE") and path.count("/") > 1:
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = io.BytesIO(body)
            assert not environ["QUERY_STRING"].startswith("upload"), "not modelled"
            headers = tuple(
                (name.removeprefix("HTTP_").replace("_", "-"), environ[name])
                for name in HEADERS
                if name in environ
            )
            self.requests.append(Request(method, path.split("/", 2)[2], headers, body))
        return self.app(environ, start_response)

    def do(self, request: Request, bucket: str) -> None:
        """Make a request again, in another bucket."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        path = f"/{bucket}/{request.key}"
        connection.request(request.method, path, request.body, dict(request.headers))
        answer = connection.getresponse()
        assert answer.status < 300, (answer.status, answer.read())
        connection.close()

    def client(self) -> Any:
        if self._client is None:  # a second or so each
            self._client = boto3.client("s3", endpoint_url=self.url)
        return self._client

    def keys(self, bucket: str) -> list[str]:
        found = self.client().list_objects_v2(Bucket=bucket).get("Contents", [])
        return [entry["Key"] for entry in found]

    def steps(self, bucket: str) -> list[int]:
        """Of the checkpoints with a manifest, in order."""
        names = [key.split("/")[-2] for key in self.keys(bucket) if key.endswith("/manifest.json")]
        return sorted(int(name.split("-")[1]) for name in names)

    def get(self, bucket: str, key: str) -> bytes:
        return self.client().get_object(Bucket=bucket, Key=key)["Body"].read()

    def put(self, bucket: str, key: str, content: bytes) -> None:
        self.client().put_object(Bucket=bucket, Key=key, Body=content)


ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "2",  # a server that is away is noticed within a second
    "no_proxy": "127.0.0.1",
}


@contextmanager
def running(patch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that this process's S3 clients, and those it starts, go to."""
    server = Server()
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url}.items():
        patch.setenv(name, value)
    try:
        yield server
    finally:
        server.stop()
