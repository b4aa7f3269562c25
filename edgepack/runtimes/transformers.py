"""Hugging Face transformers in edgepack's server: a preallocated cache for each slot, prompts in chunks.

What a pass takes was fitted on tables of others, who ran generate() with whole prompts and a cache that grows: that of
Qwen2.5 and transformers 4.46 on an A100, held against Qwen3's on an H20 (`python scripts/measured_memory.py` prints
predicted against measured; `peak_bytes` and `resting_bytes` are for them). Both report the allocator's memory, so the
CUDA context is not in them. The server was measured on a CPU (`python scripts/measure_servers.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from edgepack import schemes
from edgepack.errors import BadInput
from edgepack.layouts import EMBEDDING
from edgepack.modelspec import ModelSpec
from edgepack.parts import Part, Place, exact, fitted
from edgepack.profile import Arch, Backend, DeviceProfile
from edgepack.runtimes import decoder, served, support
from edgepack.settings import Settings
from edgepack.units import MIB

NAME = "transformers"
VERSION = "5.17.0"
ARTIFACT = "model"
MODULES: tuple[str, ...] = ("torch", "transformers", "fastapi", "uvicorn", "jinja2")
FRONT = False
INSTALL = "pip install 'edgepack[serve,torch]', or name a Python that has them: EDGEPACK_PYTHON=PATH"
READERS: Mapping[str, tuple[str, ...]] = {
    "bnb": ("bitsandbytes==0.50.2", "accelerate==1.15.0"),
    "gptq": ("gptqmodel==7.6.0", "optimum==2.3.0", "accelerate==1.15.0"),
    "awq": ("gptqmodel==7.6.0", "optimum==2.3.0", "accelerate==1.15.0"),
    "autoround": ("auto-round==0.15.1", "accelerate==1.15.0"),
}
IMAGES: Mapping[str, str] = {
    "cpu": "localhost/edgepack/edgepack-server:transformers-5.17.0",
    "cuda": "localhost/edgepack/edgepack-server:transformers-5.17.0-cuda13",
    "l4t-r36": "localhost/edgepack/edgepack-server:transformers-5.17.0-r36.4",
    "l4t-r39": "localhost/edgepack/edgepack-server:transformers-5.17.0-cuda13",
}
SPEED_FAMILY: support.Family = "torch"
EAGER: tuple[Backend, ...] = ("cpu", "cuda")
COMPILES: tuple[Backend, ...] = ("cuda",)
ONE_BY_ONE = True

SCHEMES: tuple[str, ...] = ("bf16", "bnb-int8", "bnb-nf4", "gptq-int4-g128", "awq-int4-g128")
STEPS_DOWN: tuple[str, ...] = (
    "bf16",
    "gptq-int8-g128",
    "bnb-int8",
    "bnb-nf4",
    "gptq-int4-g128",
    "awq-int4-g128",
)

_BNB = "the aarch64 wheel of bitsandbytes has no sm_87, bitsandbytes#1930"
KERNELS: tuple[support.Kernel, ...] = (
    support.Kernel(schemes=("bf16",), backend="cpu", why="PyTorch"),
    support.Kernel(schemes=("bf16",), backend="cuda", at_least=(8, 0), why="bf16 from Ampere on"),
    support.Kernel(
        schemes=("gptq",), backend="cpu", why="gptqmodel 7.6.0: 4 bits packed, others slow, all of them ran"
    ),
    support.Kernel(schemes=("awq",), backend="cpu", why="gptqmodel 7.6.0, AWQ_TORCH"),
    support.Kernel(schemes=("autoround",), backend="cpu", why="auto-round 0.16.1, slow"),
    support.Kernel(
        schemes=("gptq", "awq", "autoround"), backend="cuda", at_least=(7, 5), why="AWQ and GPTQ from 7.5 on"
    ),
    support.Kernel(schemes=("bnb",), backend="cpu", why="bitsandbytes 0.50.2 ran on a CPU"),
    support.Kernel(schemes=("bnb",), backend="cuda", at_least=(7, 5), lacks=((8, 7),), why=_BNB),
    support.Kernel(schemes=("fp8",), backend="cuda", at_least=(8, 9), why="FP8 W8A8 needs Ada or later"),
)
"""compressed-tensors loads too, but decompresses to dense weights (llm-compressor 0.14), so it saves no memory and is
left out."""

JETPACK_6 = "https://pypi.jetson-ai-lab.io/jp6/cu126"
"""NVIDIA's index for L4T r36 (NVIDIA/skills, jetson-package). It was away for days (jetson-containers#1244, #1075), so
nothing here installs from it."""

KV_TYPES: tuple[str, ...] = ("bf16", "f16")


def source(backend: Backend) -> support.Source:
    return support.Source(
        repository="https://github.com/huggingface/transformers",
        purl="pkg:pypi/transformers",
        license="Apache-2.0",
        version=VERSION,
    )


def reads(scheme: str) -> bool:
    return support.reads(KERNELS, scheme)


def refusal(scheme: str, machine: support.Machine) -> str | None:
    if schemes.is_gguf(scheme):
        return f"{NAME} unpacks GGUF to full precision: it would save nothing"
    if scheme.startswith("ct-"):
        return f"{NAME} decompresses compressed-tensors to dense weights: it would save nothing"
    return support.refusal(NAME, KERNELS, scheme, machine)


def objection(machine: support.Machine) -> str | None:
    return None


def caution(machine: support.Machine) -> str:
    return ""


def missing(machine: support.Machine) -> support.Missing | None:
    why = support.no_torch(machine)
    if why is None:
        return None
    nvidia = f"take NVIDIA's, for JetPack 6 at {JETPACK_6}" if machine.cuda == (12, 6) else "take NVIDIA's"
    return support.Missing(package="torch", why=why, instead=nvidia)


def kv_types(machine: support.Machine) -> tuple[str, ...]:
    return ("bf16",)


def lighter_kv(kv_type: str, machine: support.Machine) -> str | None:
    return None


def settings_for(
    profile: DeviceProfile | None, *, context: int, slots: int, kv_type: str, ubatch: int
) -> Settings:
    """Prompts in chunks of ``ubatch``, of one slot at a time. Raises BadInput."""
    if kv_type.lower() not in KV_TYPES:
        raise BadInput(
            f"KV type {kv_type!r} is not known to {NAME}", hint=f"known KV types: {', '.join(KV_TYPES)}"
        )
    return served.settings(profile, context=context, slots=slots, kv_type=kv_type, ubatch=ubatch)


def kv_bytes(spec: ModelSpec, tokens: int, *, slots: int = 1) -> int:
    """Bytes of generate()'s cache of ``slots`` sequences of ``tokens`` each; a sliding layer keeps its window.

    Latent attention is cached unfolded here. Raises Unsupported for it and for recurrent layers.
    """
    return decoder.cache_bytes(spec, tokens=tokens, sequences=slots, element=decoder.HALF, runtime=NAME)


ACTIVATION_SPREAD = (0.0, 1.1)
"""Factors on the prompt's activations: the A100 table shows them (0.996 to 1.015 per token of prompt), the H20 table,
which seems to have been read after the run, none at all."""

WORKSPACE = (45 * MIB, 0, 260 * MIB)
"""cuBLAS workspaces, rotary tables and rounding of the allocator: the median of what is left in both tables, 53 and
36 MiB, and the extremes of the A100 table on one card (`python scripts/measured_memory.py`)."""

PROCESS = (415 * MIB, 370 * MIB, 540 * MIB)
"""Python with torch, transformers, FastAPI and Uvicorn on the host: what is left of the peaks of two models on a CPU is
424 and 430 MiB (`python scripts/measure_servers.py`), and 20 less where neither torchao nor peft is installed, which
transformers imports."""
PROCESS_CUDA = (1590 * MIB, 700 * MIB, 2500 * MIB)
"""The same beside a GPU: 1720 and 1450 MiB were left of 1.5B and 0.5B in bf16 on an H200 (torch 2.11 of CUDA 13), 520
of them pages of libraries."""
TOKEN = 680
"""Bytes of the tokenizer for each token of the vocabulary: 20.3 MiB more for 32000 than for 2048."""

_DEQUANTIZES = ("gptq", "autoround")
"""Kernels that unpack a whole matrix beside the packed one (exllama's temp_dq): what GPTQ rows of the A100 table take
more than AWQ rows, but for Qwen2.5-7B in 8 bits; AWQ's kernel does so in tiles."""


def peak_bytes(spec: ModelSpec, scheme: str, *, prompt: int, generated: int, cards: int = 1) -> int:
    """Bytes beside weights and workspace at the largest moment: loading, reading the prompt, or the last token.

    With several ``cards`` each is read at its own peak, so all their activations are counted.
    """
    moment = cards * decoder.activation_bytes(spec, prompt)
    return max(
        loading_bytes(spec, scheme),
        unpacked_bytes(spec, scheme)
        + max(kv_bytes(spec, prompt) + moment, kv_bytes(spec, prompt + generated)),
    ) + head_copy_bytes(spec, scheme)


def resting_bytes(spec: ModelSpec, scheme: str, *, tokens: int) -> int:
    """Bytes beside weights and workspace that stay when a generation is over."""
    return kv_bytes(spec, tokens) + head_copy_bytes(spec, scheme)


def unpacked_bytes(spec: ModelSpec, scheme: str) -> int:
    """Bytes of the one matrix that is unpacked at a time."""
    return decoder.HALF * decoder.largest_matrix(spec) if scheme.startswith(_DEQUANTIZES) else 0


def head_copy_bytes(spec: ModelSpec, scheme: str) -> int:
    """Bytes of a tied embedding that is kept a second time as the output head.

    FP8 checkpoints keep it: in the Qwen3 table 0.6B, 1.7B and 4B take that much more, to a few percent.
    """
    return _embedding_bytes(spec) if scheme == "fp8" and spec.tied else 0


def loading_bytes(spec: ModelSpec, scheme: str) -> int:
    """Bytes of a tied embedding that AWQ's loader copies and lets go: the shortest AWQ rows of the Qwen2.5 table."""
    return _embedding_bytes(spec) if scheme.startswith("awq") and spec.tied else 0


def _embedding_bytes(spec: ModelSpec) -> int:
    return next((decoder.HALF * t.elements for t in spec.tensors if t.name == EMBEDDING), 0)


def parts(
    spec: ModelSpec, scheme: str, settings: Settings, *, backend: Backend, arch: Arch, imatrix: bool
) -> tuple[Part, ...]:
    """What the server takes at its largest moment: a chunk of a prompt, beside all caches."""
    on_cpu = backend == "cpu"
    place: Place = "host" if on_cpu else "device"
    weights = schemes.weights_bytes(spec, scheme, imatrix=imatrix, backend=backend)
    activations = decoder.activation_bytes(spec, served.chunk(settings))
    unpacked, loading = unpacked_bytes(spec, scheme), loading_bytes(spec, scheme)
    low, high = ACTIVATION_SPREAD
    moment = max(activations + unpacked, loading)
    copy = head_copy_bytes(spec, scheme)
    cache = cache_bytes(spec, tokens=settings.context // settings.slots, slots=settings.slots)
    row = settings.slots * spec.vocab * 4
    device = (
        fitted("workspace", WORKSPACE[0], WORKSPACE[1:], place, "cuBLAS, rotary tables, rounding"),
    )  # fmt: skip
    process, least, most = PROCESS if on_cpu else PROCESS_CUDA
    process, most = process + TOKEN * spec.vocab, most + 2 * TOKEN * spec.vocab
    return (
        exact("weights", weights, place, "the checkpoint's tensors"),
        *((exact("host_copy", copy, place, "a tied embedding, again as the output head"),) if copy else ()),
        exact("kv_cache", cache, place, "16 bits, whole for every layer (edgepack/server/engines/preallocated.py)"),
        fitted(
            "compute", moment, (int(activations * low), max(int(activations * high) + unpacked, loading)), place,
            "activations of one chunk of a prompt",
        ),
        exact("output", row, place, "logits of the last token, f32"),
        *(device if place == "device" else ()),
        fitted("process", process, (least, most), "host", "Python, FastAPI, torch, transformers, tokenizer"),
    )  # fmt: skip


def cache_bytes(spec: ModelSpec, *, tokens: int, slots: int) -> int:
    """Bytes of the server's caches: sliding layers have every place too, so that any prefix can be taken up again.

    Latent attention is cached unfolded here. Raises Unsupported for it and for recurrent layers.
    """
    return decoder.cache_bytes(
        spec, tokens=tokens, sequences=slots, element=decoder.HALF, runtime=NAME, windowed=False
    )


def start_up(
    spec: ModelSpec,
    settings: Settings,
    *,
    backend: Backend,
    needed: int,
    total: int | None,
    version: str = VERSION,
) -> Mapping[str, int | float]:
    return {"batch_size": 1, "max_length": settings.context // settings.slots}


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
    return {**served.environment(backend, arch), "HF_HUB_OFFLINE": "1"}
