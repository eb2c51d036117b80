"""A small server on 127.0.0.1 that speaks the chat protocol of OpenAI-compatible servers, well or badly."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def chat(text: str) -> bytes:
    return json.dumps(
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], "usage": {"total": 1.5}}
    ).encode()


@dataclass
class Stub:
    """A running server: what it was asked, and what it answers.

    `reply` gets (request's body, its number) and returns (status, headers, body); a body that is a list is sent piece
    by piece with pauses of `drip_s`.
    """

    reply: Callable[[dict, int], tuple[int, dict, bytes | list[bytes]]]
    url: str = ""
    drip_s: float = 0.05
    asked: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


@contextlib.contextmanager
def serving(reply) -> Iterator[Stub]:
    stub, lock = Stub(reply), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                stub.asked.append(body)
                stub.headers.append(dict(self.headers))
                stub.paths.append(self.path)
                number = len(stub.asked)
            status, headers, data = stub.reply(body, number)
            pieces = data if isinstance(data, list) else [data]
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                for name, value in {"Content-Length": str(sum(map(len, pieces))), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in pieces:
                    self.wfile.write(piece)
                    if len(pieces) > 1:
                        self.wfile.flush()
                        time.sleep(stub.drip_s)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def sensible(body: dict, number: int) -> tuple[int, dict, bytes]:
    """Answer as a good model would that only knows words: the commonest marked one, and texts that hold it."""
    system, user = (message["content"] for message in body["messages"])
    if "LABEL:" in system:
        marked = re.findall(r"<<\s*(.*?)>>", user)
        marked = [part for text in marked for part in text.split()] or ["x"]
        return 200, {}, chat(f"I see.\nLABEL: the word {max(sorted(set(marked)), key=marked.count)}")
    word = user.split("\n")[0].removeprefix("Pattern: the word ")
    texts = re.findall(r"^Text \d+: (.*)$", user, re.MULTILINE)
    return 200, {}, chat(str([int(word in text) for text in texts]))
