"""A web server of one test: it serves a folder, can go on in the middle of a file, and can break off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Served:
    """What the server did and shall do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges: list[str] = []  # the Range header of each request, "" where there was none
        self.break_after: int | None = None  # bytes of an answer after which the connection ends
        self.resumes = True  # whether a Range is honoured
        self.url = ""


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """Serve `folder` on this machine for the time of a `with` block."""
    state = Served(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range", "")
            state.ranges.append(wanted)
            path = state.folder / self.path.lstrip("/")
            if not path.is_file():
                return self.send_error(404)
            content, start = path.read_bytes(), 0
            if wanted and state.resumes:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(content):
                    return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:][: state.break_after])
            return None

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
