"""A proxy before the emulator of a store, which makes it fail as a plan says, and counts.

    python tests/store_proxy.py TARGET [PORT]

Prints its port. `PUT /_plan` with JSON, a list of faults, replaces the plan; each is used `times`
(for ever without) for requests whose "METHOD path?query" has `match`, a regular expression, once in
`every` of those that match:

    {"match": "PUT .*metrics", "fault": "status", "status": 503, "times": 3}
    {"fault": "slow", "seconds": 2}     the answer comes late
    {"fault": "cut"}                    half of the answer comes, or of an upload is read
    {"fault": "lost"}                   the store does what is asked, the answer is lost
    {"fault": "refuse"}                 the connection is closed at once

`GET /_log` has every request so far as "METHOD path?query -> status", and what went wrong, a line
each.
"""

import http.client
import json
import re
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOP = ("transfer-encoding", "connection", "keep-alive", "content-length", "date", "server")


class Proxy(ThreadingHTTPServer):
    """Forwards to `target`, HOST:PORT."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: str, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.target, self.plan, self.log = target, [], []
        self.lock = threading.Lock()  # of the plan and the log

    def handle_error(self, *_: object) -> None:
        """A client that has gone."""

    def fault(self, line: str) -> dict | None:
        """What is to go wrong with a request."""
        with self.lock:
            for fault in self.plan:
                if fault.get("times", 1) > 0 and re.search(fault.get("match", ""), line):
                    fault["seen"] = fault.get("seen", 0) + 1
                    if fault["seen"] % fault.get("every", 1) == 0:
                        if "times" in fault:
                            fault["times"] -= 1
                        return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do(self) -> None:
        line = f"{self.command} {self.path}"
        body = self._body()
        if self.path == "/_plan":
            with self.server.lock:
                self.server.plan = json.loads(body)
            return self._send(200, [], b"")
        if self.path == "/_log":
            return self._send(200, [], "\n".join(self.server.log).encode())
        fault = self.server.fault(line) or {"fault": None}
        kind = fault["fault"]
        if kind == "refuse":
            return self._cut(line, "refused")
        if kind == "status":
            self._note(line, fault["status"])
            return self._send(
                fault["status"], [("Retry-After", "0")], fault.get("body", "").encode()
            )
        if kind == "cut" and len(body) > 1000:
            return self._cut(line, "cut")
        if kind == "slow":
            threading.Event().wait(fault["seconds"])
        status, headers, answer = self._ask(body)
        if kind == "lost":
            return self._cut(line, f"{status} lost")
        self._note(line, f"{status} {kind}" if kind else status)
        self._send(status, headers, answer, half=kind == "cut")
        return None

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = do

    def log_message(self, *_: object) -> None:
        pass

    def _note(self, line: str, status: object) -> None:
        with self.server.lock:
            self.server.log.append(f"{line} -> {status}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP}
        headers["Content-Length"] = str(len(body))
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in HOP]
            if self.command == "HEAD":
                kept.append(("Content-Length", answer.getheader("Content-Length") or "0"))
            return answer.status, kept, content
        finally:
            connection.close()

    def _send(
        self, status: int, headers: list[tuple[str, str]], content: bytes, half: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self._close()

    def _cut(self, line: str, what: str) -> None:
        self._note(line, what)
        self._close()

    def _close(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    server = Proxy(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(server.server_address[1], flush=True)
    server.serve_forever()
