"""Starts a bundle on this machine, with the very flags it ships, and lets it answer."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgepack import bundle as bundles
from edgepack import toolchain
from edgepack.device import agent
from edgepack.progress import Progress
from edgepack.runtimes import llama_cpp
from edgepack.workspace import cache_root

_START_SECONDS = 600.0


def speak(
    bundle: Path,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    seed: int,
    ignore_eos: bool,
    allowed_signers: Path | None,
    server: Path | None,
    progress: Progress,
) -> Iterator[str]:
    """Yields the continuation of ``prompt`` piece by piece, as it is decoded.

    The bundle's own llama-server runs only when its signature was verified; else ``server`` or the toolchain's, and for
    a runtime in Python this edgepack's own code. ``server``: llama-server, or a Python that has the runtime.
    Weights are unpacked into the cache, under the manifest's digest, and stay there for the next run. Raises
    Untrusted, MissingTool, NoSpace, and CheckFailed when the server does not start or ends early.
    """
    progress.step(f"verifying {bundle.name}")
    found, signature = bundles.verified(bundle, allowed_signers)
    verified = signature.state == "verified"
    with bundles.translated(bundle):
        document = agent.read_document(found, "server.json")
        args, environment = agent.server_arguments(document, None)
        runtime = agent.runtime_of(document)
    is_program = runtime.name == llama_cpp.NAME
    carried = is_program and verified and agent.find_file(found, bundles.SERVER) is not None
    own = None if carried else str(server or _program(runtime.name))
    place = cache_root() / "run" / found["manifest_digest"].removeprefix("sha256:")
    place.mkdir(parents=True, exist_ok=True)
    with bundles.translated(bundle), (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits here and then finds the files
        program = own or agent.extract(found, bundles.SERVER, str(place))
        model = agent.unpack_weights(found, runtime.name, str(place))
    progress.step(f"starting {runtime.title} with the bundle's flags")
    with (
        tempfile.TemporaryDirectory(prefix="edgepack-run-") as folder,
        bundles.translated(bundle),
        agent.memory_limit(None) as limit,
        agent.running_server(
            program, args, model=model, folder=folder, environment=environment, limit=limit, runtime=runtime.name,
            app=None if is_program else str(toolchain.app_in(Path(folder) / "app")),
        ) as running,
    ):  # fmt: skip
        running.wait_healthy(_START_SECONDS)
        asked = {"prompt": prompt, "temperature": temperature, "seed": seed, "ignore_eos": ignore_eos}
        if is_program:
            for event in running.stream("/completion", asked | {"n_predict": tokens}, "run"):
                yield event.get("content", "")
            return
        name = running.get("/v1/models")["data"][0]["id"]
        for event in running.stream("/v1/completions", asked | {"model": name, "max_tokens": tokens}, "run"):
            yield "".join(choice["text"] for choice in event["choices"])


def _program(runtime: str) -> Path:
    return toolchain.find_server() if runtime == llama_cpp.NAME else toolchain.python_for(runtime)
