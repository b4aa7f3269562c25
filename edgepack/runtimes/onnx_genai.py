"""onnxruntime-genai as a runtime: the whole KV cache at once, fp32 on a CPU and fp16 on CUDA.

Held against onnxruntime-genai 0.18.0 with onnxruntime 1.32.0 as they ran on a CPU (`python
scripts/measure_onnx_genai.py`, and a model of 5.25 M parameters); nothing was run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgepack import layouts, schemes
from edgepack.errors import BadInput
from edgepack.modelspec import ModelSpec
from edgepack.parts import Part, Place, exact, fitted
from edgepack.profile import Arch, Backend, DeviceProfile
from edgepack.runtimes import decoder, support
from edgepack.settings import Settings
from edgepack.units import MIB

NAME = "onnx-genai"
VERSION = "0.18.0"
ARTIFACT = "model"
MODULES: tuple[str, ...] = ("onnxruntime_genai", "fastapi", "uvicorn", "jinja2")
FRONT = False

SCHEMES: tuple[str, ...] = ("onnx-int8", "onnx-int4", "onnx-int4-rtn")
STEPS_DOWN: tuple[str, ...] = ("onnx-int8", "onnx-int4", "onnx-int4-rtn", "onnx-int4-b128-rtn")

_WHEELS = "onnxruntime-genai-cuda 0.18.0 and onnxruntime-gpu 1.31.1 as on PyPI"
KERNELS: tuple[support.Kernel, ...] = (
    support.Kernel(
        schemes=("onnx",), backend="cuda", at_least=(7, 5), lacks=((8, 7), (11, 0)), why=_WHEELS
    ),
    support.Kernel(
        schemes=("onnx-int4", "onnx-int8"), backend="cpu",
        why="builder: INT4 and INT8 for CPU; fp16 on a CPU fails at the second step",
    ),
)  # fmt: skip
"""x86-64 wheels hold sm 75, 80, 86, 89, 90, 120; aarch64 ones 89, 90, 120, 121 and no PTX: no Orin (8.7), no Thor
(11.0). A GPTQ or AWQ checkpoint may be the builder's input, but what runs is then onnx-int4."""

KV_TYPES: tuple[str, ...] = ("f32", "f16", "bf16")
_KV_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


def reads(scheme: str) -> bool:
    return support.reads(KERNELS, scheme)


def refusal(scheme: str, machine: support.Machine) -> str | None:
    return support.refusal(NAME, KERNELS, scheme, machine)


def objection(machine: support.Machine) -> str | None:
    return None


def caution(machine: support.Machine) -> str:
    return ""


def kv_types(machine: support.Machine) -> tuple[str, ...]:
    """The cache has the graph's floats: the CPU provider keeps fp32."""
    return ("f32",) if machine.backend == "cpu" else ("f16",)


def lighter_kv(kv_type: str, machine: support.Machine) -> str | None:
    """8-bit caches need a file of scales made by calibration, which nothing here makes."""
    return None


def settings_for(
    profile: DeviceProfile | None, *, context: int, slots: int, kv_type: str, ubatch: int
) -> Settings:
    """search.max_length = context / slots, batch_size = slots, past_present_share_buffer on. Raises BadInput."""
    if context < 1 or slots < 1:
        raise BadInput(f"context {context} and slots {slots} must both be at least 1")
    on_cpu = profile is not None and profile.backend == "cpu"
    allowed = ("f32",) if on_cpu else ("f16", "bf16")
    if kv_type.lower() not in allowed:
        raise BadInput(
            f"{NAME} keeps its cache in {' or '.join(allowed)} here, not {kv_type}",
            hint=f"--kv-type {allowed[0]}",
        )
    return decoder.whole_prompts(profile, context=context, slots=slots, kv_type=kv_type)


def kv_bytes(spec: ModelSpec, *, max_length: int, batch: int, element: int) -> int:
    """Bytes of the cache: 2 x layers x heads x head size x bytes x max_length x batch, all of it allocated and touched
    when the generator is made, whatever the prompt. A sliding layer too: caches of a window only are switched off
    when the graph is built, since 0.18.0 fails with them (builders/quantizers/onnx_genai.py).

    Raises Unsupported for latent attention and recurrent layers.
    """
    return decoder.cache_bytes(
        spec, tokens=max_length, sequences=batch, element=element, runtime=NAME, windowed=False
    )


ACTIVATIONS = (1.45, 1.0, 1.7)
"""Factors on the prompt's activations, 3 ffn and 4 hidden in the graph's floats. On a CPU the slope of peak memory
over prompts of 1000 to 6000 tokens is 1.44 and 1.46 of it for two shapes (`python scripts/measure_onnx_genai.py`)."""
ACTIVATIONS_UNSEEN = (1.45, 0.0, 2.5)
"""The same on CUDA, where nothing was measured."""
PROCESS = (90 * MIB, 50 * MIB, 250 * MIB)
"""Libraries, tokenizer and what packing the weights for the CPU adds: 59 MiB for 26 MiB of weights, 99 to 108 for 300
to 380 (the same script). A server around it, and CUDA's libraries, were not measured."""


def parts(
    spec: ModelSpec, scheme: str, settings: Settings, *, backend: Backend, arch: Arch, imatrix: bool
) -> tuple[Part, ...]:
    """What a generator takes; a prompt as long as the context is its largest moment."""
    half = backend != "cpu"
    place: Place = "device" if half else "host"
    element = 2 if half else 4
    weights = schemes.weights_bytes(spec, scheme, imatrix=imatrix, backend=backend)
    table, _ = schemes.lookup_bytes(spec, scheme, imatrix=imatrix, backend=backend)
    length = -(-settings.context // settings.slots)
    tokens = length * settings.slots
    cache = kv_bytes(spec, max_length=length, batch=settings.slots, element=_KV_BYTES[settings.kv_type])
    widest = 3 * max(spec.ffn, spec.experts_used * spec.expert_ffn) + 4 * spec.hidden
    moment, low, high = (
        int(tokens * widest * element * factor) for factor in (ACTIVATIONS_UNSEEN if half else ACTIVATIONS)
    )
    row = spec.vocab * (2 + 4 if half else 4)
    shared = schemes.reads_table(spec, scheme)
    mapped = 0 if half or shared else table
    logits = "logits of every token of a prompt as long as the context (src/models/logits.cpp)"
    return (
        exact("weights", weights - mapped, place, "MatMulNBits, packed in place"),
        *(
            (fitted("weights", mapped, (0, mapped), place, "the embedding is mapped: rows looked up are resident"),)
            if mapped
            else ()
        ),
        *(
            (fitted("host_copy", table, (0, table), place, "the shared table, packed again as output head"),)
            if shared and not half
            else ()
        ),
        exact("rope_cache", layouts.rope_table_bytes(spec, half=half), place, "cosines and sines of all positions"),
        exact("kv_cache", cache, place, "past and present share a buffer of max_length"),
        fitted("compute", moment, (low, high), place, "activations of the prompt, not in chunks"),
        fitted("output", tokens * row, (settings.slots * row, tokens * row), place, f"{logits}; not measured on CUDA")
        if half
        else exact("output", tokens * row, place, logits),
        fitted("process", PROCESS[0], PROCESS[1:], "host", "libraries and tokenizer; measured on a CPU"),
    )  # fmt: skip


def start_up(
    spec: ModelSpec, settings: Settings, *, backend: Backend, needed: int, total: int | None
) -> Mapping[str, int | float]:
    """genai_config.json: search.max_length would otherwise be all that the model was trained for."""
    return {"search.max_length": -(-settings.context // settings.slots), "search.batch_size": settings.slots}


def launch(
    settings: Settings, *, alias: str, backend: Backend, start_up: Mapping[str, int | float]
) -> tuple[str, ...]:
    return (
        "--engine",
        "onnx-genai",
        "--alias",
        alias,
        "--ctx-size",
        str(settings.context),
        "--parallel",
        str(settings.slots),
        "--ubatch-size",
        str(min(512, settings.ubatch)),
        "--cache-type-k",
        settings.kv_type,
        "--threads",
        str(settings.threads),
        "--provider",
        "cpu" if backend == "cpu" else "cuda",
    )


def environment(settings: Settings, *, backend: Backend) -> Mapping[str, str]:
    return {}
