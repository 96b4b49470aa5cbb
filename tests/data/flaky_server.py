"""A file server over HTTP whose next answers can be spoiled in the ways that real ones fail."""

from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from threading import Event, Thread
from typing import Any


class FlakyServer:
    """Serves a folder. Each request takes the next entry of `script`; when it is empty, files come whole.

    Entries: ("status", code, headers), ("cut", n) closes after n bytes of the body, ("stall", n) sends nothing more
    after them, ("hang",) never answers, ("length", n) announces n bytes more than there are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script: list[tuple[Any, ...]] = []
        self.requests: list[tuple[str, str | None]] = []
        self.authorizations: list[str | None] = []
        self.ranges = True
        self.over = Event()
        # Not HTTPServer, which asks for the host's name first, and that can take seconds.
        self._server = ThreadingTCPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(server: FlakyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            span = self.headers.get("Range")
            server.requests.append((self.path, span))
            server.authorizations.append(self.headers.get("Authorization"))
            kind, *rest = server.script.pop(0) if server.script else ("whole",)
            path = server.folder / self.path.lstrip("/").partition("?")[0]
            if kind == "hang":
                server.over.wait(10)
                return
            if kind == "status" or not path.is_file():
                self.send_response(rest[0] if rest else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = path.read_bytes()
            first, _, last = (span or "bytes=").removeprefix("bytes=").partition("-") if server.ranges else ("", "", "")
            begin, total = int(first or 0), len(data)
            data = data[: int(last) + 1] if last else data
            if begin >= len(data):
                self.send_response(416)
                self.end_headers()
                return
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{total}")
            self.send_header("Content-Length", str(len(data) - begin + (rest[0] if kind == "length" else 0)))
            self.end_headers()
            self.wfile.write(data[begin : begin + rest[0]] if kind in ("cut", "stall") else data[begin:])
            if kind == "stall":
                self.wfile.flush()
                server.over.wait(10)

    return Handler
