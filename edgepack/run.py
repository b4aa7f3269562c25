"""Starts a bundle on this machine, with the very flags it ships, and lets it answer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgepack import bundle as bundles
from edgepack import toolchain
from edgepack.device import agent
from edgepack.errors import CheckFailed, MissingTool
from edgepack.progress import Progress


def speak(
    bundle: Path,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    seed: int,
    allowed_signers: Path | None,
    server: Path | None,
    progress: Progress,
) -> Iterator[str]:
    """Yields the continuation of ``prompt`` piece by piece, as it is decoded.

    The bundle's own server runs only when its signature was verified; else ``server`` or the toolchain's.
    Raises Untrusted, MissingTool, and CheckFailed when the server does not start or ends early.
    """
    bundles.inspect(bundle, allowed_signers=allowed_signers)
    found = agent.read_bundle(str(bundle))
    args, environment = agent.server_arguments(agent.read_document(found, "server.json"), None)
    carried = allowed_signers is not None and agent.find_file(found, bundles.SERVER) is not None
    with tempfile.TemporaryDirectory(prefix="edgepack-run-") as folder:
        if carried:
            program = agent.extract(found, bundles.SERVER, folder)
        else:
            program = str(server or toolchain.find_server())
        model = agent.extract(found, bundles.WEIGHTS, folder)
        progress.step("starting llama-server with the bundle's flags")
        body = {"prompt": prompt, "n_predict": tokens, "temperature": temperature, "seed": seed}
        try:
            with (
                agent.memory_limit(None) as limit,
                agent.running_server(
                    program, args, model=model, folder=folder, environment=environment, limit=limit
                ) as running,
            ):
                running.wait_healthy(600)
                for event in running.stream("/completion", body, "run"):
                    yield event.get("content", "")
        except agent.MissingProgram as error:
            raise MissingTool(str(error)) from error
        except agent.Failed as error:
            raise CheckFailed(error.message, hint="edgepack check says which part is too large") from error
