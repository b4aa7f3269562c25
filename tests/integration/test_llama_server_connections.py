"""Clients that keep connections open: each holds a thread of llama-server, and /health must find one all the same."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from edgepack import hub, modelspec, toolchain
from edgepack.builders import gguf
from edgepack.progress import Silent
from edgepack.runtimes import llama_cpp
from tests.server_process import Api, free_port

pytestmark = pytest.mark.integration

SETTINGS = llama_cpp.cpu_settings(context=256, threads=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], Api]]:
    """llama-server with a plan's flags and the built-in model."""
    folder = tmp_path_factory.mktemp("llama")
    checkpoint = hub.resolve("demo", revision=None, offline=True, progress=Silent())
    built = gguf.build(
        checkpoint, modelspec.read(checkpoint.path), "Q8_0", folder, imatrix=None, toolchain=toolchain.find(),
        progress=Silent(),
    )  # fmt: skip
    port = free_port()
    flags = llama_cpp.launch(SETTINGS, alias="demo")
    command = [str(toolchain.find_server()), "-m", str(built.path), *flags, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        api = Api(port=port, key=None)
        api.until(lambda: answers(api), 60)
        yield process, api
        process.terminate()


def answers(api: Api) -> bool:
    try:
        return api("GET", "/health").status == 200
    except OSError:
        return False


def test_health_answers_while_as_many_clients_as_are_planned_for_keep_silent_connections(
    server: tuple[subprocess.Popen[bytes], Api],
) -> None:
    """They come at once, for the server sleeps meanwhile: one by one, it would start threads for them."""
    process, api = server

    with ExitStack() as stack:
        process.send_signal(signal.SIGSTOP)
        address = ("127.0.0.1", api.port)
        kept = [stack.enter_context(socket.create_connection(address)) for _ in range(llama_cpp.CLIENTS)]
        process.send_signal(signal.SIGCONT)
        status = api("GET", "/health").status
        still = [one for one in kept if is_open(one)]

    assert status == 200
    assert len(still) == llama_cpp.CLIENTS, "it answered only when it had given up on those before"


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
