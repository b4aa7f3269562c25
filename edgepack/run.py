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

    The bundle's own server runs only when its signature was verified; else ``server`` or the toolchain's.
    Weights are unpacked into the cache, under the manifest's digest, and stay there for the next run. Raises
    Untrusted, MissingTool, NoSpace, and CheckFailed when the server does not start or ends early.
    """
    progress.step(f"verifying {bundle.name}")
    found, signature = bundles.verified(bundle, allowed_signers)
    with bundles.translated(bundle):
        args, environment = agent.server_arguments(agent.read_document(found, "server.json"), None)
        carried = signature["state"] == "verified" and agent.find_file(found, bundles.SERVER) is not None
        own = None if carried else str(server or toolchain.find_server())
        place = cache_root() / "run" / found["manifest_digest"].removeprefix("sha256:")
        place.mkdir(parents=True, exist_ok=True)
        with (place / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits here and then finds the files
            program = own or agent.extract(found, bundles.SERVER, str(place))
            model = agent.extract(found, bundles.WEIGHTS, str(place))
        progress.step("starting llama-server with the bundle's flags")
        body = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": temperature,
            "seed": seed,
            "ignore_eos": ignore_eos,
        }
        with (
            tempfile.TemporaryDirectory(prefix="edgepack-run-") as folder,
            agent.memory_limit(None) as limit,
            agent.running_server(
                program, args, model=model, folder=folder, environment=environment, limit=limit
            ) as running,
        ):
            running.wait_healthy(_START_SECONDS)
            for event in running.stream("/completion", body, "run"):
                yield event.get("content", "")
