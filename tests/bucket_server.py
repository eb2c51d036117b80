"""moto's S3 server on loopback, and a proxy of our own before it that injects the faults moto cannot."""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "sesame-open-the-door", "AWS_DEFAULT_REGION": "us-east-1",
}  # fmt: skip
SKEWED = (
    b"<Error><Code>RequestTimeTooSkewed</Code><Message>The difference between the request time and the current time is too"
    b" large.</Message><AWSAccessKeyId>testing</AWSAccessKeyId></Error>"
)
# "500", "503", "429", "403", "skew", "cut", "cut-answer", "no-answer" (but done), "corrupt", "truncate" or "delay"
Fault = str | None


@dataclass
class Proxy:
    """What the proxy has seen, and what it shall do to a request: `fault(method, path, how often this one came before)`."""

    url: str = ""
    target: str = ""
    fault: Callable[[str, str, int], Fault] = lambda method, path, before: None
    seen: list[tuple[str, str, int]] = field(default_factory=list)  # method, path, bytes sent
    dropped: str = ""  # a header that this server does not know
    place: str = field(default_factory=lambda: f"s3://bucket/{secrets.token_hex(4)}")

    def moved(self, method: str, part: str = "") -> int:
        """How many requests there were of a method, with this text in their path."""
        return sum(1 for m, path, _ in self.seen if m == method and part in path)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *args) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        before = sum(1 for m, p, _ in self.proxy.seen if (m, p) == (self.command, path))
        self.proxy.seen.append((self.command, path, len(body)))
        fault = self.proxy.fault(self.command, path, before)
        if fault == "cut":
            self.close_connection = True
            return
        if fault == "delay":
            threading.Event().wait(0.3)
        if fault in ("500", "503", "429", "403", "skew"):
            self._answer(403 if fault == "skew" else int(fault), [], SKEWED if fault == "skew" else b"<Error/>")
            return
        onward = http.client.HTTPConnection(self.proxy.target, timeout=20)
        onward.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() != self.proxy.dropped})
        answer = onward.getresponse()
        data = answer.read()
        if fault == "no-answer":
            self.close_connection = True
            return
        headers = [
            (k, v) for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "content-length", "connection")
        ]
        if self.command == "HEAD":
            headers.append(("Content-Length", answer.headers.get("Content-Length", "0")))
        if fault == "corrupt" and data:
            data = bytes([data[0] ^ 0x10]) + data[1:]
        if fault == "truncate":
            data = data[:-1]
        self._answer(answer.status, headers, data, cut=fault == "cut-answer")
        onward.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815


@contextlib.contextmanager
def proxied(target: str) -> Iterator[Proxy]:
    """Run the proxy before the server at `target` ("127.0.0.1:5000")."""
    proxy = Proxy(target=target)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """Run moto with one empty bucket; yield "127.0.0.1:PORT". Raises: ImportError: moto[server] is not installed."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        connection = http.client.HTTPConnection(host, port)
        connection.request("PUT", f"/{bucket}")
        assert connection.getresponse().status == 200
        yield f"{host}:{port}"
    finally:
        server.stop()


def set_environment(endpoint: str, setenv: Callable[[str, str], None], delenv: Callable[[str], None]) -> None:
    """Set test credentials and this endpoint, and no other AWS_* variable."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        delenv(name)
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
        setenv(name, value)
