"""Buckets of Google's and Amazon's kind on this machine, for tests: fixtures and their servers.

`gcs_bucket` and `s3_bucket` are the URL of a new, empty bucket, such as "gs://test-1a2b"; `bucket`
is the one, then the other. Who asks for one has the environment variables by which gcsfs, s3fs and
TensorStore find the server, in this process and in those it starts. `gcs_server`, `s3_server` and
`bucket_server` are the servers, which count, delay and refuse requests when they are told to.

They are gcp-storage-emulator and moto, each in a process of its own until the tests end; where they
aren't installed the tests are skipped. What the first one lacks:

  it lists a bucket in one page, however long; moto has pages of 1,000 as Amazon has
  it knows neither preconditions nor x-goog-generation: `_gcs` below adds them
  it loses the "\\r" at the end of what is uploaded in one request: `_read_data` below doesn't
  it answers a range beyond the end of an object with an empty part, where Google answers 416
  it has no gRPC, by which gcsfs asks for the kind of a bucket unless it is told not to
  it fails where an empty object is written by uploadType=media
  it serves one request at a time; here it has a thread for each, and a lock
"""

import functools
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

KEY = "testing"  # of the account that everybody has

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read when gcsfs is imported


class Server:
    """A server of buckets in a process of its own.

    Attributes:
      url: where it is, "http://127.0.0.1:PORT".
      environment: the variables by which clients find it.
    """

    def __init__(self, kind: str, folder: Path):
        self.kind, self._folder = kind, folder
        self._process = subprocess.Popen(
            [sys.executable, __file__, kind, folder],
            stdin=subprocess.PIPE,  # whose end is the server's: it doesn't outlive the tests
            stdout=subprocess.PIPE,
            text=True,
        )
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            raise RuntimeError(f"the server of {kind} has ended")
        self.environment = {
            "gcs": {
                "STORAGE_EMULATOR_HOST": self.url,
                "TENSORSTORE_GCS_HTTP_URL": self.url,
                "FSSPEC_GCS_TOKEN": "anon",  # else gcsfs looks for Google's machines
                "FSSPEC_GCS_CHECK_CONNECTION": "false",
            },
            "s3": {
                "AWS_ENDPOINT_URL": self.url,
                "AWS_ACCESS_KEY_ID": KEY,
                "AWS_SECRET_ACCESS_KEY": KEY,
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            },
        }[kind]

    def new_bucket(self) -> str:
        """The URL of an empty bucket."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        if self.kind == "gcs":
            request = urllib.request.Request(
                f"{self.url}/storage/v1/b?project=test",
                json.dumps({"name": name}).encode(),
                {"Content-Type": "application/json"},
            )
        else:
            request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()
        return f"{'gs' if self.kind == 'gcs' else 's3'}://{name}"

    def faults(self, *, seconds: float = 0, fail: int = 0, status: int = 503) -> None:
        """From now on every request waits so long, and of `fail` the answer is `status`."""
        control = self._folder / "new.json"
        control.write_text(json.dumps({"seconds": seconds, "fail": fail, "status": status}))
        control.rename(self._folder / "control.json")

    def requests(self) -> list[str]:
        """The requests since the last call, "GET /path?query" each."""
        log = self._folder / "requests.txt"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def reads(self) -> int:
        """The objects and parts of them that were read since the last call."""
        kind = "alt=media" if self.kind == "gcs" else "GET /"
        return sum(kind in line and "list-type" not in line for line in self.requests())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)


def _server(kind: str, packages: tuple[str, ...], tmp_path_factory):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    server = Server(kind, tmp_path_factory.mktemp(kind))
    yield server
    server.close()


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory):
    """The server of `gcs_bucket`."""
    yield from _server("gcs", ("gcp_storage_emulator", "gcsfs"), tmp_path_factory)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """The server of `s3_bucket`."""
    yield from _server("s3", ("moto", "s3fs"), tmp_path_factory)


def _bucket(server: Server, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    _forget_clients()
    server.faults()
    url = server.new_bucket()
    server.requests()
    yield url
    server.faults()
    _forget_clients()


def _forget_clients() -> None:
    """Makes fsspec read the environment again, which it does once for a process."""
    import fsspec
    from etils import epath
    from fsspec.config import set_conf_env

    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    for protocol in ("gcs", "s3"):
        fsspec.config.conf.pop(protocol, None)
    set_conf_env(fsspec.config.conf)
    for protocol in ("gs", "s3"):
        if protocol in fsspec.registry:
            fsspec.get_filesystem_class(protocol).clear_instance_cache()


@pytest.fixture
def gcs_bucket(gcs_server, monkeypatch):
    """The URL of a new, empty bucket of Google's kind."""
    yield from _bucket(gcs_server, monkeypatch)


@pytest.fixture
def s3_bucket(s3_server, monkeypatch):
    """The URL of a new, empty bucket of Amazon's kind."""
    yield from _bucket(s3_server, monkeypatch)


@pytest.fixture(params=["gcs", "s3"])
def bucket(request):
    """The URL of a new, empty bucket, of each kind."""
    return request.getfixturevalue(f"{request.param}_bucket")


@pytest.fixture
def bucket_server(bucket, request):
    """The server of `bucket`."""
    return request.getfixturevalue("gcs_server" if bucket.startswith("gs:") else "s3_server")


# What follows runs in a server's own process.


_DENIAL = {  # what the stores say to who may not read
    "gcs": b'{"error": {"code": 403, "message": "Caller does not have storage.objects.list access '
    b'to the Google Cloud Storage bucket."}}',
    "s3": b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
}


class _Requests:
    """What every request goes through: written down, delayed, refused as the control file says."""

    def __init__(self, kind: str, folder: Path):
        self._kind, self._folder, self._lock, self._read = kind, folder, threading.Lock(), 0
        self._control: dict = {}

    def refuse(self, handler: http.server.BaseHTTPRequestHandler) -> bool:
        """Answers a request if it is to fail; False where it is to be served."""
        with self._lock:
            with (self._folder / "requests.txt").open("a") as log:
                log.write(f"{handler.command} {handler.path}\n")
            control = self._folder / "control.json"
            changed = control.stat().st_mtime_ns if control.exists() else 0
            if changed != self._read:
                self._read, self._control = changed, json.loads(control.read_text())
            seconds, fail = self._control.get("seconds", 0), self._control.get("fail", 0)
            self._control["fail"] = max(0, fail - 1)
        time.sleep(seconds)
        if not fail:
            return False
        handler.close_connection = True
        status = self._control["status"]
        body = _DENIAL[self._kind] if status in (401, 403) and handler.command != "HEAD" else b""
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
        return True


def _serve(kind: str, folder: Path) -> None:
    """Serves until standard input ends; says first where."""
    requests = _Requests(kind, folder)

    def through(handler: type) -> type:
        """The same handler, whose requests go through `requests`."""

        class Handler(handler):
            def parse_request(self):
                return super().parse_request() and not requests.refuse(self)

            def log_message(self, *arguments):
                pass

            log = log_request = log_message

        return Handler

    if kind == "gcs":
        server = _gcs(through)
    else:
        from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        app, handler = DomainDispatcherApplication(create_backend_app), through(MotoRequestHandler)
        server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()
    os._exit(0)


def _gcs(through) -> http.server.HTTPServer:
    from gcp_storage_emulator import server as emulator
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.storage import Storage

    class PreconditionFailed(Exception):
        pass

    class Store(Storage):
        """That has preconditions, of the request that is served."""

        query: dict = {}

        def generation(self, bucket: str, name: str) -> str:
            try:
                return self.get_file_obj(bucket, name)["generation"]
            except NotFound:
                return "0"

        def check(self, bucket: str, name: str) -> None:
            if self.query.get("ifGenerationMatch", now := self.generation(bucket, name)) != now:
                raise PreconditionFailed

        def create_file(self, bucket_name, file_name, *arguments, **options):
            self.check(bucket_name, file_name)
            return super().create_file(bucket_name, file_name, *arguments, **options)

        def delete_file(self, bucket_name, file_name, *arguments, **options):
            self.check(bucket_name, file_name)
            return super().delete_file(bucket_name, file_name, *arguments, **options)

    store, lock = Store(use_memory_fs=True), threading.Lock()

    class Gcs(emulator.RequestHandler):
        generation = None  # of the object that is read

        def serve(self, method: str) -> None:
            url = urlsplit(self.path)
            with lock:
                store.query = {key: found[-1] for key, found in parse_qs(url.query).items()}
                is_read = method == "GET" and re.fullmatch(r".*/b/([^/]+)/o/([^/]+)", url.path)
                if is_read:
                    place = [*map(unquote, is_read.groups())]
                    self.generation = store.generation(*place)
                try:
                    if is_read:
                        store.check(*place)
                        if store.query.get("ifGenerationNotMatch") == self.generation:
                            return self.answer(304)
                    emulator.Router(self).handle(method)
                except PreconditionFailed:
                    self.answer(412)

        def answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def end_headers(self) -> None:
            if self.generation is not None:
                self.send_header("x-goog-generation", self.generation)
            super().end_headers()

        do_GET = functools.partialmethod(serve, "GET")
        do_POST = functools.partialmethod(serve, "POST")
        do_PUT = functools.partialmethod(serve, "PUT")
        do_PATCH = functools.partialmethod(serve, "PATCH")
        do_DELETE = functools.partialmethod(serve, "DELETE")

    emulator._read_data = functools.partial(_read_data, emulator._read_data)
    handler = functools.partial(through(Gcs), store)
    http.server.ThreadingHTTPServer.request_queue_size = 128  # connections that wait
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # of clients that have gone
    return server


def _read_data(read, request, query):
    """A request's body; in place of `read`, whose parser of e-mails changes what ends in "\\r"."""
    kind = request.headers.get("Content-Type") or ""
    if not kind.startswith("multipart/related"):
        content = read(request, query)
        return b"" if content is None else content  # of an empty object
    boundary = re.search('boundary="?([^";]+)', kind)[1].encode()
    body = request.rfile.read(int(request.headers["Content-Length"]))
    end = (
        b"\r\n" if body.startswith(b"--%s\r\n" % boundary) else b"\n"
    )  # gcsfs's are the short ones
    _, meta, content, _ = (end + body).split(end + b"--" + boundary)
    (_, meta), (head, content) = (part.split(2 * end, 1) for part in (meta, content))
    found = re.search(rb"(?i)content-type: *([^\r\n]+)", head)
    return {
        "meta": json.loads(meta),
        "content": content,
        "content-type": found[1].decode() if found else "application/octet-stream",
    }


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))
