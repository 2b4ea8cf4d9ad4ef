"""A real S3 server process on loopback, moto's, and before it a proxy that makes what goes wrong in real ones."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class Proxy(http.server.ThreadingHTTPServer):
    """Hands requests on to the server at `port`; `faults` are used up, one for each request that they are for."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = port
        self.faults: list[tuple[str, str, str]] = []  # (method, part of the path, busy | cut | slow | flipped)
        self.log: list[tuple[str, str]] = []  # (method, path) of every request that was handed on
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault_for(self, method: str, path: str) -> str:
        with self._lock:
            for number, (of_method, part, fault) in enumerate(self.faults):
                if of_method == method and part in path:
                    del self.faults[number]
                    return fault
            self.log.append((method, path))
        return ""

    def seen(self, method: str, part: str) -> int:
        """How many requests were handed on."""
        return sum(each == method and part in path for each, path in self.log)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_any(self) -> None:
        body = self._body()
        fault = self.server.fault_for(self.command, self.path)
        if fault == "busy":
            self._answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
            return
        if fault == "slow":
            time.sleep(3)
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        behind.request(self.command, self.path, body, self._headers())
        answer = behind.getresponse()
        data = answer.read()
        behind.close()
        headers = [
            (k, v) for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection", "date")
        ]
        if fault == "flipped":
            data = data[:-1] + bytes([data[-1] ^ 1])
            headers = [(k, v) for k, v in headers if "checksum" not in k.lower()]
        self._answer(answer.status, headers, data, cut=fault == "cut")

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(pieces)

    def _headers(self) -> dict[str, str]:
        own = ("transfer-encoding", "content-length", "expect")
        return {name: value for name, value in self.headers.items() if name.lower() not in own}

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        with contextlib.suppress(OSError):  # a client that did not wait
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else data[: len(data) // 2] if cut else data)
        self.close_connection = cut

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def log_message(self, *_: object) -> None:
        return


@contextlib.contextmanager
def object_store(bucket: str) -> Iterator[Proxy]:
    """A server with an empty bucket, as long as the block runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _make_bucket(port, bucket, process)
        proxy = Proxy(port)
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            proxy.server_close()
            thread.join()
    finally:
        process.kill()
        process.wait()


def _make_bucket(port: int, bucket: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.time() + 60
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            connection.request("PUT", f"/{bucket}")
            assert connection.getresponse().status == 200
            return
        except OSError:
            if time.time() > deadline or process.poll() is not None:
                raise
            time.sleep(0.1)
        finally:
            connection.close()
