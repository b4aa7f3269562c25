"""What the artifact answers to fixed texts, recorded at build so that the check on the device can compare.

Recorded and compared by the same code of the device's agent, through llama-server with the plan's flags. The
device computes with other instructions (AVX2, NEON, CUDA) and so in another order: log-probabilities move a
little, a wrong or damaged artifact moves them a lot. `check.DRIFT` says where the line is.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from edgepack import serde, workspace
from edgepack.artifact import Artifact
from edgepack.device import agent
from edgepack.errors import BadInput, BuildFailed, MissingTool
from edgepack.heldout import BUILT_IN
from edgepack.plan import Plan
from edgepack.progress import Progress
from edgepack.runtimes import llama_cpp
from edgepack.settings import Settings
from edgepack.toolchain import Toolchain

PASSAGES = 4
STEPS = 6
STEP_CHARACTERS = 12
PROBES = PASSAGES * STEPS
"""Each passage is asked about STEPS times, longer each time: the server keeps what it has read (cache_prompt), so
that 24 answers cost the reading of four short passages."""
PROBE_CHARACTERS = STEPS * STEP_CHARACTERS
DECODE_TOKENS = 16
CONTEXT = 512
"""Tokens of context while recording: the longest probe, in single bytes, and the continuation fit in it."""
START_SECONDS = 1800.0


def record(
    artifact: Artifact,
    plan: Plan,
    toolchain: Toolchain,
    folder: Path,
    progress: Progress,
    *,
    text: str | None = None,
) -> Mapping[str, object]:
    """selftest.json of an artifact: for fixed texts the most likely next tokens, and one continuation.

    Kept in ``folder`` for the next build of the same artifact under the same flags. ``text``: what the probes are
    cut from, held-out English by default. Raises BadInput for a text that is too short, and BuildFailed when the
    server does not run the artifact.
    """
    prompts = probes(heldout() if text is None else text)
    args = llama_cpp.launch(recording(plan.settings))
    runtime = f"{plan.runtime} {plan.runtime_version}"
    inputs = (artifact.sha256, runtime, *args, str(DECODE_TOKENS), *prompts)
    kept = folder / f"{hashlib.sha256(chr(0).join(inputs).encode()).hexdigest()[:16]}-answers.json"
    if not kept.is_file():
        with progress.bar("recording answers", None), tempfile.TemporaryDirectory(prefix="edgepack-") as work:
            answers = _ask(artifact.path, args, toolchain.server, Path(work), prompts)
        workspace.write_text(kept, json.dumps(answers))
    answers = serde.read_object(kept)
    return {
        "schema_version": 1,
        "about": "answers of the artifact on the build machine; log-probabilities in nats, rounded to 0.001",
        "runtime": runtime,
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
    return BUILT_IN.read_text(encoding="utf-8")


def probes(text: str) -> tuple[str, ...]:
    """PASSAGES pieces of a text, evenly spread, each in STEPS growing prefixes: from the start of a word to, where
    the language has them, the end of one.

    Raises BadInput when the text is too short to give that many different ones.
    """
    flat = " ".join(text.split())
    apart = len(flat) // PASSAGES
    if apart < 2 * PROBE_CHARACTERS:
        need = 2 * PASSAGES * PROBE_CHARACTERS
        raise BadInput(f"the text for the quality probe has {len(flat)} characters, {need} are needed")
    found = []
    for number in range(PASSAGES):
        at = number * apart
        first = 0 if number == 0 else flat.find(" ", at, at + PROBE_CHARACTERS) + 1 or at
        passage = flat[first : first + PROBE_CHARACTERS + 1]
        found += [_prefix(passage, step * STEP_CHARACTERS) for step in range(1, STEPS + 1)]
    return tuple(found)


def _prefix(passage: str, length: int) -> str:
    """So many characters of a passage, or up to STEP_CHARACTERS - 1 less where a word ends there."""
    end = passage.rfind(" ", length - STEP_CHARACTERS + 1, length + 1)
    return passage[: end if end > 0 else length]


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
            return agent.record_quality(running, prompts, prompts[-1], DECODE_TOKENS)
    except agent.MissingProgram as error:
        raise MissingTool(str(error), hint="edgepack toolchain install") from error
    except agent.Failed as error:
        raise BuildFailed(
            f"llama-server does not run {artifact.name}: {error.message}",
            hint="the artifact was not made for this llama.cpp, or this machine has too little memory",
        ) from error
