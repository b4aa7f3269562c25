"""What the artifact answers to fixed texts, recorded at build so that the check on the device can compare.

Recorded and compared by the same code of the device's agent, through the runtime's server with the plan's flags. The
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
from typing import Literal, TypedDict

from edgepack import bundle, serde, toolchain, workspace
from edgepack.artifact import Artifact
from edgepack.device import agent
from edgepack.errors import BadInput, BuildFailed, MissingTool
from edgepack.heldout import BUILT_IN
from edgepack.plan import Plan
from edgepack.progress import Progress
from edgepack.runtimes import llama_cpp

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
    program: Path | None,
    folder: Path,
    progress: Progress,
    *,
    text: str | None = None,
) -> Mapping[str, object]:
    """selftest.json of an artifact: for fixed texts the most likely next tokens, and one continuation.

    ``program``: llama-server, or the Python that runs the plan's runtime; without one nothing is recorded, and the
    check says so. Kept in ``folder`` for the next build of the same artifact under the same flags. ``text``: what the
    probes are cut from, held-out English by default. Raises BadInput for a text that is too short, and BuildFailed
    when the server does not run the artifact. An artifact for an accelerator that this machine does not have need not
    run here: then nothing is recorded either.
    """
    prompts = probes(heldout() if text is None else text)
    runtime = f"{plan.runtime} {plan.runtime_version}"
    if program is None:
        return _document(runtime, {"probes": [], "decode": None}, f"no {plan.runtime} on the build machine")
    here = recording(plan)
    args, environment = agent.server_arguments(json.loads(bundle.server_document(here)), None)
    inputs = (artifact.sha256, runtime, *args, str(DECODE_TOKENS), *prompts)
    kept = folder / f"{hashlib.sha256(chr(0).join(inputs).encode()).hexdigest()[:16]}-answers.json"
    if not kept.is_file():
        with progress.bar("recording answers", None), tempfile.TemporaryDirectory(prefix="edgepack-") as work:
            try:
                answers = _ask(artifact.path, here, (program, args, environment), Path(work), prompts)
            except BuildFailed as error:
                if here.profile.backend == plan.profile.backend or plan.runtime == llama_cpp.NAME:
                    raise
                return _document(runtime, {"probes": [], "decode": None}, error.message)
        workspace.write_text(kept, json.dumps(answers))
    return _document(runtime, serde.read_object(kept), None)


class ProbeDocument(TypedDict):
    prompt: str
    top: list[tuple[int, float]]
    """The most likely next tokens, id and log-probability."""


class ContinuationDocument(TypedDict):
    prompt: str
    tokens: list[int]
    text: str


class SelftestDocument(TypedDict):
    """selftest.json of a bundle: what the artifact answered on the build machine."""

    schema_version: Literal[1]
    about: str
    runtime: str
    probes: list[ProbeDocument]
    decode: ContinuationDocument | None
    """A greedy continuation; null when nothing was recorded, and ``about`` says why."""


def _document(runtime: str, answers: Mapping[str, object], missing: str | None) -> Mapping[str, object]:
    about = "answers of the artifact on the build machine; log-probabilities in nats, rounded to 0.001"
    return {
        "schema_version": 1,
        "about": about if missing is None else f"not recorded: {missing}",
        "runtime": runtime,
        **answers,
    }


def recording(plan: Plan) -> Plan:
    """The plan as it is run on the build machine: a short context, one slot, no accelerator that is not there.

    None of these changes what is computed, only the order of additions.
    """
    settings = plan.settings
    if plan.runtime == llama_cpp.NAME:
        short = replace(settings, context=CONTEXT, slots=1, gpu_layers=0)
    else:  # these do not run beyond what the model was trained for, which the plan keeps to
        context = min(CONTEXT, settings.context // settings.slots)
        short = replace(
            settings,
            context=context,
            slots=1,
            batch=min(settings.batch, context),
            ubatch=min(settings.ubatch, context),
        )
    settings = replace(short, threads=min(settings.threads, len(os.sched_getaffinity(0))))
    if plan.runtime == llama_cpp.NAME or agent.machine_facts()["gpus"]:
        return replace(plan, settings=settings)
    return replace(plan, settings=settings, profile=replace(plan.profile, accelerator=None))


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
    artifact: Path,
    plan: Plan,
    start: tuple[Path, list[str], dict[str, str]],
    folder: Path,
    prompts: tuple[str, ...],
) -> dict[str, object]:
    program, args, environment = start
    own = plan.runtime == llama_cpp.NAME
    try:
        with (
            agent.memory_limit(None) as limit,
            agent.running_server(
                str(program),
                args,
                model=str(artifact),
                folder=str(folder),
                environment=environment,
                limit=limit,
                runtime=plan.runtime,
                app=None if own else str(toolchain.app_in(folder / "app")),
            ) as running,
        ):
            running.wait_healthy(START_SECONDS)
            return agent.record_quality(running, prompts, prompts[-1], DECODE_TOKENS)
    except agent.MissingProgram as error:
        hint = "edgepack toolchain install" if own else agent.RUNTIMES[plan.runtime].install
        raise MissingTool(str(error), hint=hint) from error
    except agent.Failed as error:
        server = agent.RUNTIMES[plan.runtime].title
        raise BuildFailed(
            f"{server} does not run {artifact.name}: {error.message}",
            hint=f"the artifact was not made for this {plan.runtime}, or this machine has too little memory",
        ) from error
