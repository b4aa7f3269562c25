"""onnxruntime-genai in edgepack's server: the whole KV cache at once, fp32 on a CPU and fp16 on CUDA, in chunks.

Held against onnxruntime-genai 0.18.0 with onnxruntime 1.32.0 as they ran on a CPU (`python scripts/measure_servers.py`,
and a model of 5.25 M parameters); nothing was run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgepack import layouts, schemes
from edgepack.errors import BadInput
from edgepack.modelspec import ModelSpec
from edgepack.parts import Part, Place, exact, fitted
from edgepack.profile import Arch, Backend, DeviceProfile
from edgepack.runtimes import decoder, served, support
from edgepack.settings import Settings
from edgepack.units import MIB

NAME = "onnx-genai"
VERSION = "0.18.0"
ARTIFACT = "model"
MODULES: tuple[str, ...] = ("onnxruntime_genai", "fastapi", "uvicorn", "jinja2")
FRONT = False
INSTALL = (
    "pip install 'edgepack[serve,onnx]' (on a GPU onnx-gpu), or a Python that has them: EDGEPACK_PYTHON=PATH"
)
READERS: Mapping[str, tuple[str, ...]] = {}
IMAGES: Mapping[str, str] = {
    "cpu": "localhost/edgepack/edgepack-server:onnx-genai-0.18.0",
    "cuda": "localhost/edgepack/edgepack-server:onnx-genai-0.18.0-cuda13",
}
SPEED_FAMILY: support.Family = "torch"
"""Nobody published its speed on these devices: taken for PyTorch's."""
EAGER: tuple[Backend, ...] = ()
COMPILES: tuple[Backend, ...] = ("cuda",)
ONE_BY_ONE = True

SCHEMES: tuple[str, ...] = ("onnx-int8", "onnx-int4", "onnx-int4-rtn")
STEPS_DOWN: tuple[str, ...] = ("onnx-int8", "onnx-int4", "onnx-int4-rtn", "onnx-int4-b128-rtn")

_WHEELS = "onnxruntime-genai-cuda 0.18.0 and onnxruntime-gpu 1.31.1 as on PyPI"
_UNBUILT = ((8, 7), (11, 0))
KERNELS: tuple[support.Kernel, ...] = (
    support.Kernel(
        schemes=("onnx",), backend="cuda", at_least=(7, 5), lacks=_UNBUILT, why=_WHEELS
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


def source(backend: Backend) -> support.Source:
    package = "onnxruntime-genai-cuda" if backend == "cuda" else "onnxruntime-genai"
    return support.Source(
        repository="https://github.com/microsoft/onnxruntime-genai",
        purl=f"pkg:pypi/{package}",
        license="MIT",
        version=VERSION,
    )


def reads(scheme: str) -> bool:
    return support.reads(KERNELS, scheme)


def refusal(scheme: str, machine: support.Machine) -> str | None:
    return support.refusal(NAME, KERNELS, scheme, machine)


def objection(machine: support.Machine) -> str | None:
    return None


def caution(machine: support.Machine) -> str:
    return ""


def missing(machine: support.Machine) -> support.Missing | None:
    if machine.backend != "cuda" or machine.capability not in _UNBUILT:
        return None
    return support.Missing(
        package="onnxruntime-genai-cuda",
        why=f"{_WHEELS} hold no code for compute capability {machine.capability[0]}.{machine.capability[1]}",
        instead="build onnxruntime and onnxruntime-genai on the device (microsoft/onnxruntime-genai#818)",
    )


def kv_types(machine: support.Machine) -> tuple[str, ...]:
    """The cache has the graph's floats: the CPU provider keeps fp32."""
    return ("f32",) if machine.backend == "cpu" else ("f16",)


def lighter_kv(kv_type: str, machine: support.Machine) -> str | None:
    """8-bit caches need a file of scales made by calibration, which nothing here makes."""
    return None


def settings_for(
    profile: DeviceProfile | None, *, context: int, slots: int, kv_type: str, ubatch: int
) -> Settings:
    """A generator of context / slots tokens for each slot; prompts in chunks of ``ubatch``. Raises BadInput."""
    on_cpu = profile is not None and profile.backend == "cpu"
    allowed = ("f32",) if on_cpu else ("f16", "bf16")
    if kv_type.lower() not in allowed:
        raise BadInput(
            f"{NAME} keeps its cache in {' or '.join(allowed)} here, not {kv_type}",
            hint=f"--kv-type {allowed[0]}",
        )
    return served.settings(profile, context=context, slots=slots, kv_type=kv_type, ubatch=ubatch)


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
"""Factors on a chunk's activations, 3 ffn and 4 hidden in the graph's floats. On a CPU the slope of peak memory over
whole prompts of 1000 to 6000 tokens was 1.44 and 1.46 of it for two shapes (0.18.0)."""
ACTIVATIONS_UNSEEN = (1.45, 0.0, 2.5)
"""The same on CUDA, where nothing was measured."""
SUMS = 2
"""Numbers in 32 bits for each block of 32 weights beside the packed ones, on a CPU: its scale, which stays mapped, and
the block's sum (MLAS, QuantBBlkSum). What loading four models of 6 to 113 million weights takes beside them is 10.5 MiB
and this, to 1 MiB."""
ROWS = 8
"""Rows of logits in 32 bits that choosing a token takes: the runtime's, its copies, and those of 64 bits."""
TOKEN = 430
"""Bytes of the tokenizer for each token of the vocabulary: 0.9, 3.5 and 13.2 MiB for 2048, 8192 and 32000."""
PROCESS = (108 * MIB, 85 * MIB, 270 * MIB)
"""Python with FastAPI, Uvicorn and onnxruntime-genai on an AVX-512 machine of AMD: 97 to 111 MiB are left of six peaks
of four models (`python scripts/measure_servers.py`), 106 to 113 of the built-in model's where `edgepack check` ran it,
with a cold and a warm page cache: 46 to 56 MiB of that are pages of libraries. On another x86-64 machine it was 100 to
107, and 114 to 123 where the page cache held the libraries in large folios, of which `check` counts none above the
plan. The upper end is for CUDA's libraries, which were not measured."""
PROCESS_CPU = 120 * MIB


def parts(
    spec: ModelSpec, scheme: str, settings: Settings, *, backend: Backend, arch: Arch, imatrix: bool
) -> tuple[Part, ...]:
    """What the server takes at its largest moment: a chunk of a prompt behind another, beside all caches."""
    half = backend != "cpu"
    place: Place = "device" if half else "host"
    element = 2 if half else 4
    weights = schemes.weights_bytes(spec, scheme, imatrix=imatrix, backend=backend)
    table, _ = schemes.lookup_bytes(spec, scheme, imatrix=imatrix, backend=backend)
    length, tokens = settings.context // settings.slots, served.chunk(settings)
    cache = kv_bytes(spec, max_length=length, batch=settings.slots, element=_KV_BYTES[settings.kv_type])
    widest = 3 * max(spec.ffn, spec.experts_used * spec.expert_ffn) + 4 * spec.hidden
    row = spec.vocab * (2 + 4 if half else 4)
    chunk, choosing = tokens * row, settings.slots * ROWS * spec.vocab * 4
    # Logits of one chunk are there until the next is through; those of the only one when its activations are gone.
    after = 0 if half or length > tokens else chunk
    moment, low, high = (
        max(int(tokens * widest * element * factor) - after, 0)
        for factor in (ACTIVATIONS_UNSEEN if half else ACTIVATIONS)
    )
    shared = schemes.reads_table(spec, scheme)
    mapped = 0 if half or shared else table
    sums = 0 if half else SUMS * 4 * _blocks(spec, scheme, imatrix=imatrix, backend=backend)
    copied = sums + (table if shared and not half else 0)
    process = PROCESS[0] + TOKEN * spec.vocab
    most = (PROCESS[2] if half else PROCESS_CPU) + 2 * TOKEN * spec.vocab
    return (
        exact("weights", weights - mapped, place, "MatMulNBits, packed in place"),
        *(
            (fitted("weights", mapped, (0, mapped), place, "the embedding is mapped: rows looked up are resident"),)
            if mapped
            else ()
        ),
        *(
            (fitted("host_copy", copied, (0, copied), place, "scales and sums of blocks; a shared table packed again"),)
            if copied
            else ()
        ),
        exact("rope_cache", layouts.rope_table_bytes(spec, half=half), place, "cosines and sines of all positions"),
        exact("kv_cache", cache, place, "past and present share a buffer of max_length"),
        fitted("compute", moment, (low, high), place, "activations of one chunk of a prompt, beside logits of another"),
        fitted(
            "output", chunk + choosing, (settings.slots * row, chunk + 2 * choosing), place,
            "logits of every token of a chunk (src/models/logits.cpp), and the rows that a choice takes",
        ),
        fitted("process", process, (PROCESS[1], most), "host", "Python, FastAPI, libraries, tokenizer"),
    )  # fmt: skip


def _blocks(spec: ModelSpec, scheme: str, *, imatrix: bool, backend: Backend) -> int:
    """Blocks of all matrices, each with a scale."""
    kinds = schemes.tensor_types(spec, scheme, imatrix=imatrix, backend=backend)
    return sum(layouts.blocks(kind, t.shape) for kind, t in zip(kinds, spec.tensors, strict=True))


def start_up(
    spec: ModelSpec,
    settings: Settings,
    *,
    backend: Backend,
    needed: int,
    total: int | None,
    version: str = VERSION,
) -> Mapping[str, int | float]:
    """genai_config.json: search.max_length would otherwise be all that the model was trained for."""
    return {"search.max_length": settings.context // settings.slots, "search.batch_size": 1}


def launch(
    settings: Settings,
    *,
    alias: str,
    backend: Backend,
    start_up: Mapping[str, int | float],
    version: str = VERSION,
) -> tuple[str, ...]:
    return served.arguments(NAME, settings, alias=alias, backend=backend)


def environment(settings: Settings, *, backend: Backend, arch: Arch) -> Mapping[str, str]:
    return served.environment(backend, arch)
