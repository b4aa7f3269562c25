"""A server that speaks to SWUpdate as hawkBit does, with one image for whoever asks, and SWUpdate's client for it.

Protocol: https://eclipse.dev/hawkbit/apis/ddi_api/.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PATIENCE = 120.0


class Server:
    """An image to install, and what the device said became of it."""

    def __init__(self, image: Path, port: int) -> None:
        self.image = image
        self.address = f"http://127.0.0.1:{port}"
        self.closed: list[str] = []
        """success or failure, when the device says that an action is over."""

    def client(
        self, name: str, certificate: Path, hardware: str, place: Path, hook: Path, *more: str,
        until: Callable[[], bool] = lambda: False,
    ) -> str:  # fmt: skip
        """Runs SWUpdate as a device until it has closed its action, or ``until`` says; what it logged."""
        words = f"-t DEFAULT -u {self.address} -i {name} -k TOKEN -p 1 {' '.join(more)}"
        argv: list[str | Path] = [
            "swupdate",
            "-v",
            "-H",
            hardware,
            "-k",
            certificate,
            "-p",
            hook,
            "-u",
            words,
        ]
        log = place / "swupdate.log"
        begun, end = len(self.closed), time.monotonic() + PATIENCE
        over = False
        with log.open("wb") as out:
            while not over:
                with subprocess.Popen(
                    argv, stdout=out, stderr=out, cwd=place, env={**os.environ, "TMPDIR": str(place)}
                ) as process:
                    while process.poll() is None and not over:
                        time.sleep(0.1)
                        over = len(self.closed) > begun or until() or time.monotonic() > end
                    process.terminate()
                # On a busy machine SWUpdate 2022.12 at times dies of SIGPIPE; its own unit starts it again: so do we.
                over |= process.returncode != -signal.SIGPIPE
        said = log.read_text(errors="replace")
        assert len(self.closed) > begun or until(), said[-3000:]
        return said


@contextmanager
def serving(image: Path) -> Iterator[Server]:
    content = image.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path == "/image":
                self.answer(content)
                return
            base = f"{found.address}{self.path}"
            polling: dict[str, object] = {"config": {"polling": {"sleep": "00:00:01"}}}
            if "deploymentBase" in self.path:
                self.answer(json.dumps(_deployment(image.name, content, found.address)).encode())
            else:
                links = {} if found.closed else {"deploymentBase": {"href": f"{base}/deploymentBase/5"}}
                self.answer(json.dumps({**polling, "_links": links}).encode())

        def do_POST(self) -> None:
            said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(b"")
            if said["status"]["execution"] == "closed":
                found.closed.append(said["status"]["result"]["finished"])

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        found = Server(image, http.server_port)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        try:
            yield found
        finally:
            http.shutdown()


def _deployment(name: str, content: bytes, address: str) -> dict[str, object]:
    artifact = {
        "filename": name,
        "hashes": {"sha1": hashlib.sha1(content).hexdigest(), "md5": hashlib.md5(content).hexdigest()},
        "size": len(content),
        "_links": {"download-http": {"href": f"{address}/image"}},
    }
    chunk = {"part": "os", "version": "1", "name": "demo", "artifacts": [artifact]}
    return {"id": "5", "deployment": {"download": "forced", "update": "forced", "chunks": [chunk]}}
