"""What the artifact answers to fixed texts, recorded at build so that the check on the device can compare.

Recorded and compared by the same code of the device's agent, through llama-server with the plan's flags. The
device computes with other instructions (AVX2, NEON, CUDA) and so in another order: log-probabilities move a
little, a wrong or damaged artifact moves them a lot. `check.DRIFT` says where the line is.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgepack.device import agent
from edgepack.errors import BadInput, BuildFailed, MissingTool
from edgepack.plan import Plan
from edgepack.progress import Progress
from edgepack.runtimes import llama_cpp
from edgepack.settings import Settings
from edgepack.toolchain import Toolchain

PROBES = 24
PROBE_CHARACTERS = 160
DECODE_TOKENS = 64
CONTEXT = 512
"""Tokens of context while recording: the longest probe, in single bytes, and the continuation fit in it."""
START_SECONDS = 1800.0

HELDOUT = Path(__file__).parent / "models" / "demo" / "heldout.txt"
"""Public-domain text that the built-in model was not trained on."""


def record(
    artifact: Path,
    plan: Plan,
    toolchain: Toolchain,
    progress: Progress,
    *,
    text: str | None = None,
) -> Mapping[str, object]:
    """selftest.json of an artifact: for fixed texts the most likely next tokens, and one continuation.

    ``text``: what the probes are cut from, held-out English by default. Raises BadInput for a text that is
    too short, and BuildFailed when the server does not run the artifact.
    """
    prompts = probes(heldout() if text is None else text)
    args = llama_cpp.launch(recording(plan.settings))
    with progress.bar("recording answers", None), tempfile.TemporaryDirectory(prefix="edgepack-") as folder:
        answers = _ask(artifact, args, toolchain.server, Path(folder), prompts)
    return {
        "schema_version": 1,
        "about": "answers of the artifact on the build machine; log-probabilities in nats, rounded to 0.001",
        "runtime": f"{plan.runtime} {plan.runtime_version}",
        **answers,
    }


def recording(settings: Settings) -> Settings:
    """The plan's settings on the build machine: a short context, one slot, no accelerator.

    None of these changes what is computed, only the order of additions.
    """
    return replace(
        settings,
        context=CONTEXT,
        slots=1,
        gpu_layers=0,
        threads=min(settings.threads, len(os.sched_getaffinity(0))),
    )


def heldout() -> str:
    """The built-in text for probes."""
    return HELDOUT.read_text(encoding="utf-8")


def probes(text: str) -> tuple[str, ...]:
    """PROBES pieces of a text, evenly spread, each from the start of a word to the end of one.

    Raises BadInput when the text is too short to give that many different ones.
    """
    flat = " ".join(text.split())
    step = len(flat) // PROBES
    if step < PROBE_CHARACTERS:
        raise BadInput(
            f"the text for the quality probe has {len(flat)} characters, {PROBES * PROBE_CHARACTERS} are needed"
        )
    pieces = []
    for number in range(PROBES):
        piece = flat[number * step : number * step + PROBE_CHARACTERS]
        first = 0 if number == 0 else piece.find(" ") + 1
        pieces.append(piece[first : piece.rfind(" ")])
    return tuple(pieces)


def _ask(
    artifact: Path, args: tuple[str, ...], server: Path, folder: Path, prompts: tuple[str, ...]
) -> dict[str, object]:
    try:
        with (
            agent.memory_limit(None) as limit,
            agent.running_server(
                str(server), args, model=str(artifact), folder=str(folder), environment={}, limit=limit
            ) as running,
        ):
            running.wait_healthy(START_SECONDS)
            return agent.record_quality(running, prompts, prompts[0], DECODE_TOKENS)
    except agent.MissingProgram as error:
        raise MissingTool(str(error), hint="edgepack toolchain install") from error
    except agent.Failed as error:
        raise BuildFailed(
            f"llama-server does not run {artifact.name}: {error.message}",
            hint="the artifact was not made for this llama.cpp, or this machine has too little memory",
        ) from error
