"""llama.cpp as a runtime: what its KV cache, buffers and process take, and the flags that hold it to that.

Held against the pinned version (src/llama-kv-cache*.cpp, llama-context.cpp, llama-model.cpp, tools/server).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

from edgepack import schemes
from edgepack.errors import BadInput, Unsupported
from edgepack.ggufheader import BLOCKS
from edgepack.modelspec import CONVERTED, KvLayers, ModelSpec, Tensor
from edgepack.parts import Part, Place, exact, fitted
from edgepack.profile import Arch, Backend, DeviceProfile
from edgepack.runtimes import llama_graph, support
from edgepack.runtimes.allocator import huge_pages
from edgepack.settings import Settings
from edgepack.units import MIB, Bytes, pad

NAME = "llama.cpp"
VERSION = "0.5.0-dev (0c1e57098)"
"""Version that `llama-server --version` prints, and its commit: the one in llama-cpp-python 0.3.36."""

ARTIFACT = "model.gguf"
MODULES: tuple[str, ...] = ()
FRONT = True
INSTALL = ""
READERS: Mapping[str, tuple[str, ...]] = {}
IMAGES: Mapping[str, str] = {}
SPEED_FAMILY: support.Family = "llama.cpp"
EAGER: tuple[Backend, ...] = ()
COMPILES: tuple[Backend, ...] = ()
ONE_BY_ONE = False
KERNELS: tuple[support.Kernel, ...] = tuple(
    support.Kernel(schemes=("gguf",), backend=backend, why="ggml has every GGUF type on every backend")
    for backend in ("cpu", "cuda", "vulkan", "metal")
)

SCHEMES: tuple[str, ...] = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "Q2_K")
"""Tried when no scheme is asked for: those that need no importance matrix and are not dominated."""
STEPS_DOWN: tuple[str, ...] = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "Q3_K_M", "Q3_K_S", "Q2_K",
)  # fmt: skip
"""Schemes a hint may propose: none of them needs an importance matrix."""

KV_TYPES: tuple[str, ...] = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""What -ctk and -ctv take; "K/V" names two, as in q8_0/q4_0."""

CELL_PAD = 256
"""Contexts and caches are padded to this many cells (llama-context.cpp, n_ctx; llama-kv-cache-iswa.cpp)."""

_ALIGNMENT: Mapping[Backend, int] = {"cpu": 32, "cuda": 128, "vulkan": 256, "metal": 32}
"""Bytes between tensors of a buffer: TENSOR_ALIGNMENT (ggml-impl.h); get_alignment in ggml-cuda.cu and
ggml-metal.cpp. Vulkan's is the driver's minStorageBufferOffsetAlignment (ggml-vulkan.cpp), at most 256 by the
specification (Vulkan 1.3, table "Required Limits"), so never less is counted than is taken."""

_UNPACKS: tuple[Backend, ...] = ("cuda", "metal")
"""Backends that keep a whole unpacked K and V behind flash attention's result (get_alloc_size in ggml-cuda.cu and
ggml-metal.cpp); Vulkan's shaders read the quantized cache as it is (ggml-vulkan.cpp, fa_kv_ok)."""
_UNPACKS_F16: tuple[Backend, ...] = ("metal",)
"""Those that reserve that room for an F16 cache too (ggml-metal-ops.cpp, flash_attn_ext_extra_kv_f16)."""

_ALL_LAYERS = 99
_BATCH = 2048
"""Logical batch (-b); llama-server's default. Buffers follow -ub."""
CLIENTS = 32
"""Clients with a connection open beside those in slots: as many as edgepack's own server lets wait."""
_FILES = 256
"""Files beside those connections: others' connections, the model, a card's driver."""
_WATCHERS = 4
"""Connections for /health, /metrics and /slots beside them."""


def source(backend: Backend) -> support.Source:
    return support.Source(
        repository="https://github.com/ggml-org/llama.cpp",
        purl="pkg:github/ggml-org/llama.cpp",
        license="MIT",
        version=VERSION,
    )


def reads(scheme: str) -> bool:
    return support.reads(KERNELS, scheme)


def refusal(scheme: str, machine: support.Machine) -> str | None:
    return support.refusal(NAME, KERNELS, scheme, machine)


def objection(machine: support.Machine) -> str | None:
    return None


def missing(machine: support.Machine) -> support.Missing | None:
    return None


def caution(machine: support.Machine) -> str:
    return ""


def kv_types(machine: support.Machine) -> tuple[str, ...]:
    """8-bit KV costs no measurable quality (KL 0.001, llama.cpp PR 7412); 4-bit KV costs 0.5 to 3 points."""
    return ("f16", "q8_0")


def lighter_kv(kv_type: str, machine: support.Machine) -> str | None:
    return "q8_0" if kv_type in ("f32", "f16", "bf16") else None


def start_up(
    spec: ModelSpec,
    settings: Settings,
    *,
    backend: Backend,
    needed: int,
    total: int | None,
    version: str = VERSION,
) -> Mapping[str, int | float]:
    """llama-server's own line: tokens of context a slot has."""
    return {"n_ctx_slot": cells(settings)}


def settings_for(
    profile: DeviceProfile | None, *, context: int, slots: int = 1, kv_type: str = "f16", ubatch: int = 512
) -> Settings:
    """How llama-server is started on this device, or on a CPU when none is named. Raises BadInput for a context or
    slots below 1.

    Weights are read, not mapped (-lm none). On a CPU that avoids a second copy: a mapped file stays
    resident beside its repacked tensors. Measured with a 1.5B Q4_K_M at 4096 tokens, peak RSS over the bare
    process: 1742 MiB mapped and repacked, 1156 MiB read and repacked, 1154 MiB read and not repacked; so
    repacking stays on, for its faster prefill. On a GPU the mapping would only fill the page cache, which
    on a Jetson is the same memory.
    """
    if profile is None:
        return cpu_settings(context=context, slots=slots, kv_type=kv_type, ubatch=ubatch)
    offloaded = profile.accelerator is not None and profile.backend != "cpu"
    base = cpu_settings(
        context=context, slots=slots, kv_type=kv_type, ubatch=ubatch, threads=profile.cpu_cores
    )
    return replace(base, gpu_layers=_ALL_LAYERS, repack=False) if offloaded else base


def cpu_settings(
    *, context: int, slots: int = 1, kv_type: str = "f16", ubatch: int = 512, threads: int = 4
) -> Settings:
    """The same for a CPU whose profile is not known; threads do not change what memory it takes by much."""
    if context < 1 or slots < 1 or ubatch < 1:
        raise BadInput(f"context {context}, slots {slots} and ubatch {ubatch} must all be at least 1")
    split_types(kv_type)
    return Settings(
        context=context,
        slots=slots,
        kv_type=kv_type,
        batch=max(_BATCH, ubatch),
        ubatch=ubatch,
        flash_attention=True,
        unified_kv=False,
        threads=threads,
        gpu_layers=0,
        load_mode="none",
        repack=True,
    )


def launch(
    settings: Settings,
    *,
    alias: str,
    backend: Backend = "cpu",
    start_up: Mapping[str, int | float] = MappingProxyType({}),
    version: str = VERSION,
) -> tuple[str, ...]:
    """llama-server's flags, without model, address and key; everything that bounds memory is explicit.

    The prompt cache (8 GiB by default) and context checkpoints (32 a slot) grow with use, and --fit would
    change what was planned: all three are off.
    """
    key, value = split_types(settings.kv_type)
    offloaded = settings.gpu_layers > 0
    return (
        "--alias", alias,
        "--ctx-size", str(settings.context),
        "--parallel", str(settings.slots),
        "--kv-unified" if settings.unified_kv else "--no-kv-unified",
        "--batch-size", str(settings.batch),
        "--ubatch-size", str(settings.ubatch),
        "--flash-attn", "on" if settings.flash_attention else "off",
        "--cache-type-k", key,
        "--cache-type-v", value,
        "--cache-ram", "0",
        "--no-cache-idle-slots",
        "--ctx-checkpoints", "0",
        "--fit", "off",
        "--load-mode", settings.load_mode,
        "--lazy-mode", "off",
        "--repack" if settings.repack else "--no-repack",
        "--gpu-layers", str(settings.gpu_layers),
        *(("--split-mode", "none", "--main-gpu", "0", "--kv-offload") if offloaded else ("--device", "none")),
        "--threads", str(settings.threads),
        "--threads-batch", str(settings.threads),
        "--threads-http", str(http_threads(settings)),
        "--no-context-shift",
        "--no-mmproj",
        "--metrics",
        "--slots",
    )  # fmt: skip


def http_threads(settings: Settings) -> int:
    """Threads that serve HTTP: each connection holds one while it is open, whether it asks anything or not, and one
    that waits for a thread waits before /health (cpp-httplib; server-http.cpp). Those beyond it starts more for come
    one by one only: it counts threads that have not woken yet as idle, so a burst is served by those that there are.
    """
    return settings.slots + CLIENTS + _WATCHERS


def max_files(settings: Settings) -> int:
    """Open files, which bound connections: with no more threads to be had than those below 1024 llama-server stops to
    accept any for ever, while a connection without a file waits until another closes."""
    return http_threads(settings) + _FILES


def environment(settings: Settings, *, backend: Backend, arch: Arch) -> Mapping[str, str]:
    pages = huge_pages(backend, arch)
    return {**pages, "MALLOC_ARENA_MAX": "1"} if pages else {}


def split_types(kv_type: str) -> tuple[str, str]:
    """K and V types of "q8_0" or "q8_0/q4_0". Raises BadInput for one that -ctk does not take."""
    key, _, value = kv_type.lower().partition("/")
    value = value or key
    for name in (key, value):
        if name not in KV_TYPES:
            raise BadInput(f"KV type {name!r} is not known", hint=f"known KV types: {', '.join(KV_TYPES)}")
    return key, value


# -- KV cache -------------------------------------------------------------------------------------------


def cells(settings: Settings, window: int | None = None) -> int:
    """KV cells per stream (llama-context.cpp, n_ctx_seq; llama-kv-cache-iswa.cpp, size_swa)."""
    whole = pad(settings.context, CELL_PAD)
    per_stream = whole if settings.unified_kv else pad(whole // settings.slots, CELL_PAD)
    if window is None:
        return per_stream
    shared = settings.slots if settings.unified_kv else 1
    return pad(min(per_stream, window * shared + _ubatch(settings)), CELL_PAD)


def streams(settings: Settings) -> int:
    return 1 if settings.unified_kv else settings.slots


def kv_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Bytes of the KV cache of all slots, exact. Raises Unsupported for types the head size forbids."""
    widest = max((kind.heads * kind.value_dim for kind in spec.kv), default=0)
    return sum(layer_kv_bytes(kind, settings, widest_value=widest) for kind in spec.kv)


def layer_kv_bytes(kind: KvLayers, settings: Settings, *, widest_value: int | None = None) -> int:
    """Bytes of the KV cache of the layers of one kind: layers x cells x (K row + V row).

    Without flash attention every V row is as wide as the model's widest (llama-kv-cache.cpp, n_embd_v_gqa_max).
    """
    key, value = split_types(settings.kv_type)
    if _quantized(value) and not settings.flash_attention:
        raise Unsupported(
            f"a {value} V cache needs flash attention", hint="turn flash attention on, or use f16"
        )
    if not kind.value_dim and key != value:
        raise Unsupported(
            f"a cache whose keys are the values too (MLA) cannot be {key} and {value}",
            hint=f"use --kv-type {key}",
        )
    per_head = settings.flash_attention
    rows = _row_bytes(key, kind.heads, kind.key_dim, per_head=per_head)
    if per_head or widest_value is None or not kind.value_dim:
        rows += _row_bytes(value, kind.heads, kind.value_dim, per_head=per_head)
    else:
        rows += _row_bytes(value, 1, widest_value, per_head=False)
    return kind.count * cells(settings, kind.window) * streams(settings) * rows


def recurrent_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Bytes of the state that recurrent layers keep for all slots (src/llama-memory-recurrent.cpp)."""
    return spec.recurrent_bytes * settings.slots


def _row_bytes(kv_type: str, heads: int, dim: int, *, per_head: bool) -> int:
    """ggml_row_size of one token's keys or values in one layer; with flash attention every head must be
    whole blocks (llama-context.cpp, llama_init_from_model), else the row."""
    _, weights, size = BLOCKS[kv_type.upper()]
    if (dim if per_head else heads * dim) % weights != 0:
        raise Unsupported(
            f"a {kv_type} KV cache needs heads of a multiple of {weights}, and these have {dim}",
            hint="use --kv-type f16",
        )
    return heads * dim // weights * size


def _quantized(kv_type: str) -> bool:
    return kv_type not in ("f32", "f16", "bf16")


def _ubatch(settings: Settings) -> int:
    """Tokens of one pass: -ub, never above -b or the context (llama-context.cpp, n_batch, n_ubatch)."""
    return min(settings.ubatch, settings.batch, settings.context)


# -- buffers --------------------------------------------------------------------------------------------


FrontEnd = Literal["server", "library"]


def output_rows(settings: Settings, front_end: FrontEnd) -> int:
    """Rows of logits that llama.cpp reserves: llama-server limits them to one per slot (since PR 23861,
    tools/server/server-context.cpp, server_output_limits); the library's default, which llama-cpp-python takes, is
    one for every token of a batch (llama-context.cpp, n_outputs_max)."""
    return settings.slots if front_end == "server" else settings.batch


def output_bytes(spec: ModelSpec, rows: int) -> int:
    """Bytes of the host buffer of logits, f32 (llama-context.cpp, output_reserve)."""
    return 4 * spec.vocab * rows


def compute(
    spec: ModelSpec, settings: Settings, backend: Backend, *, outputs: int | None = None
) -> llama_graph.Room:
    """Bytes of the compute buffers; ``outputs``: rows of logits, see `output_rows`; one per slot when not given.

    Exact on a CPU; on an accelerator the same walk over the part of the graph that runs there.
    """
    offloaded = backend != "cpu" and settings.gpu_layers > 0
    shape = batch(spec, settings, outputs=outputs)
    where: Backend = backend if offloaded else "cpu"
    if where in _UNPACKS_F16:
        shape = replace(shape, unpack_k=True, unpack_v=True)
    return _room(shape, offloaded, _ALIGNMENT[where], where in _UNPACKS)


EXACT_GRAPHS = (*CONVERTED, "gemma2", "granite", "minicpm", "mistral3", "smollm3")
"""Architectures whose compute buffer llama_graph.py gives to the printed digit."""


def compute_range(spec: ModelSpec, settings: Settings, expected: int) -> tuple[Bytes, Bytes] | None:
    """Lowest and highest bytes of a compute buffer that `compute` puts at ``expected``; None where it is exact.

    For a graph that is not modelled `compute` speaks of a plain decoder of the same sizes. Fitted on contexts
    that llama.cpp reserved for these shapes, and held to others by tests/integration/test_planned_architectures.py.
    """
    if spec.architecture in EXACT_GRAPHS:
        return None
    low, high = OTHER_GRAPHS[spec.architecture]
    return Bytes(int(expected * low)), Bytes(int(expected * high) + moved_bytes(spec, settings))


def moved_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Bytes that no plain decoder moves: one layer's states of all slots, gathered and written back; with MLA
    and without flash attention the latent rows of one layer, transposed (llama-graph.cpp, build_attn_mha)."""
    layers = spec.recurrent_layers
    states = 2 * spec.recurrent_bytes // layers * settings.slots if layers else 0
    latent = max((kind.key_dim for kind in spec.kv if not kind.value_dim), default=0)
    turned = 0 if settings.flash_attention else 4 * latent * cells(settings) * streams(settings)
    return states + turned


OTHER_GRAPHS: Mapping[str, tuple[float, float]] = {
    "cohere2": (0.8, 1.35),
    "deepseek2": (0.75, 1.25),
    "exaone4": (0.8, 1.15),
    "falcon-h1": (0.9, 1.55),
    "gemma": (0.9, 1.1),
    "gemma3n": (0.85, 2.1),
    "gemma4": (0.65, 2.1),
    "gpt-oss": (0.9, 1.45),
    "gpt2": (0.4, 1.25),
    "granitehybrid": (0.9, 1.15),
    "granitemoe": (0.9, 1.1),
    "lfm2": (0.8, 1.15),
    "llama4": (0.85, 1.9),
    "nemotron_h": (0.9, 1.45),
    "nemotron_h_moe": (0.75, 2.65),
    "olmo2": (0.8, 1.2),
    "phi3": (0.75, 1.2),
    "qwen35": (0.75, 1.15),
    "qwen35moe": (0.85, 1.2),
    "qwen3next": (0.85, 1.1),
    "qwen3vl": (0.9, 1.75),
    "smallthinker": (0.7, 1.25),
}
"""Printed by scripts/compute_intervals.py: 80 contexts drawn per shape of tests/shapes.py."""


@lru_cache(maxsize=8192)
def _room(shape: llama_graph.Batch, offloaded: bool, alignment: int, unpack: bool) -> llama_graph.Room:
    return llama_graph.room(shape, offloaded=offloaded, alignment=alignment, unpack=unpack)


def batch(spec: ModelSpec, settings: Settings, *, outputs: int | None = None) -> llama_graph.Batch:
    """The largest batch of ``spec`` under these settings.

    tools/server/server-context.cpp, server_output_limits; llama-context.cpp, sched_reserve.
    """
    key, value = split_types(settings.kv_type)
    window = next((kind.window for kind in spec.kv if kind.window), None)
    tokens = min(cells(settings) * streams(settings), _ubatch(settings))
    names = _first_block(spec)
    dims = spec.head_dim
    return llama_graph.Batch(
        layers=spec.layers,
        hidden=spec.hidden,
        ffn=spec.ffn,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=dims,
        vocab=spec.vocab,
        tokens=pad(tokens, settings.slots),
        outputs=min(tokens, settings.slots if outputs is None else outputs),
        cells=cells(settings),
        streams=streams(settings),
        window_cells=cells(settings, window) if window else 0,
        period=spec.window_period,
        flash_attention=settings.flash_attention,
        rotate_k=_quantized(key) and dims % 64 == 0,
        rotate_v=_quantized(value) and dims % 64 == 0,
        cast_k=key == "f32" and settings.flash_attention,
        cast_v=value == "f32" and settings.flash_attention,
        unpack_k=key not in ("f16", "f32"),
        unpack_v=value not in ("f16", "f32"),
        qkv_bias="attn_q.bias" in names,
        output_bias="attn_output.bias" in names,
        qk_norm="attn_q_norm.weight" in names,
        sandwich_norms="post_ffw_norm.weight" in names,
        mlp_bias="ffn_up.bias" in names,
        experts=spec.experts,
        experts_used=spec.experts_used,
        expert_ffn=spec.expert_ffn,
    )


@lru_cache(maxsize=256)
def _first_block(spec: ModelSpec) -> frozenset[str]:
    """Names of the tensors of one block, without its number."""
    return frozenset(t.name[6:] for t in spec.tensors if t.name.startswith("blk.0."))


# -- weights that lie in memory twice ---------------------------------------------------------------------

_REPACKED: Mapping[Arch, Mapping[str, int]] = {
    "x86_64": {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8, "MXFP4": 8},
    "aarch64": {"Q4_0": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8, "IQ4_NL": 4, "MXFP4": 4, "Q8_0": 4},
}
"""Types that the CPU backend stores in another order, and the rows that must divide their number
(ggml-cpu/repack.cpp, ggml_repack_get_optimal_repack_type, for AVX2 and for Arm with dotprod)."""


def repacked(kind: str, shape: tuple[int, ...], arch: Arch) -> bool:
    """Whether the CPU backend repacks a matrix of this type and shape."""
    rows = _REPACKED[arch].get(kind)
    return rows is not None and len(shape) > 1 and shape[1] % rows == 0


def held(
    spec: ModelSpec, tensor: Tensor, kind: str, settings: Settings, *, backend: Backend, arch: Arch
) -> tuple[int, int]:
    """Bytes that one tensor takes on the accelerator and on the host, copies counted: `parts`' weights, taken apart."""
    if not spec.loaded(tensor):
        return 0, 0
    size = schemes.tensor_bytes(kind, tensor.shape)
    table = tensor.name == "token_embd.weight"
    if backend != "cpu" and settings.gpu_layers > 0:
        if tensor.name == "per_layer_token_embd.weight":
            return 0, size
        return (size if spec.tied else 0, size) if table else (size, 0)
    mapped = settings.load_mode != "none"
    twice = settings.repack and repacked(kind, tensor.shape, arch) and (spec.tied if table else mapped)
    return 0, size * 2 if twice else size


_K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_SHORT_ROWS = ("Q4_0", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0")
_FAST: Mapping[Backend, tuple[tuple[str, ...], ...]] = {
    "cpu": (("IQ4_XS", *_K_QUANTS), _SHORT_ROWS),
    "cuda": (("IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", *_K_QUANTS), _SHORT_ROWS),
    "vulkan": (("IQ4_XS", *_K_QUANTS), _SHORT_ROWS),
    "metal": (("IQ4_XS", *_K_QUANTS), _SHORT_ROWS),
}
"""Types whose kernels keep up with reading them, for rows of whole blocks of 256 and for others.

Two and three bits of IQ look every group of weights up in a table of 256 to 2048 entries, which shared memory does well
(ggml-cuda/vecdotq.cuh) and CPUs do with scalar loads (ggml-cpu/arch/arm/quants.c, vec_dot_iq3_s); IQ4's 16 entries are
one shuffle everywhere. On Vulkan and Metal nobody measured them here, so they are left out."""


def fast_types(backend: Backend) -> tuple[tuple[str, ...], ...]:
    """Types that a tensor chosen by size alone may get on this backend: first those of long blocks."""
    return _FAST[backend]


# -- the process ------------------------------------------------------------------------------------------

PROCESS_BASE = 17 * MIB
"""Code pages, heap and threads of llama-server with a model of a megabyte: 15.2 to 15.8 MiB of the static x86-64 one
that bundles carry; 16.6 to 18.0 were left of the built-in model's peaks, by its requests and by `edgepack check`, where
it is linked with the system's libstdc++, libc and libm, of which 4 MiB are resident."""

HUGE_PAGES = (1 * MIB, 0, 4 * MIB)
"""What memory in huge pages (allocator.py) takes beside that, expected, lowest and highest: a heap ends at a whole one.
17.3 to 19.3 MiB are left of eleven checks of the built-in model with the server that is linked with the system's
libraries, 15.6 to 16.0 with the static one; one malloc arena instead of many gives most of it back."""

PROCESS_PER_TOKEN = {"bpe": 310, "spm": 190}
"""Bytes of tokenizer tables per token, peak RSS of the static x86-64 server minus buffers, base and scratch:
296 to 328 with merges (vocabularies of 49152, 128256 and 151936), 191 without (262144)."""

HTTP_THREAD = (68 << 10, 20 << 10, 128 << 10)
"""Resident bytes of a thread that serves connections: 24 KiB while it has served none, stack and heap after that;
2.5 MiB more for 37 of them than for 6 (static x86-64 server, the check's requests). Pages of 16 KiB take more."""

PROCESS_SPREAD = (0.75, 1.25)
_CHAT_TEMPLATE = 6 * MIB
"""Room for a parsed chat template and open requests; the measured models had none."""


CUDA_PROCESS = (362 * MIB, 100 * MIB, 600 * MIB)
"""What the driver and cuBLAS take of the host beside a card with memory of its own, expected, lowest and highest: 357
and 368 MiB were left of two models' peaks on an H200 (driver 580, CUDA 13), half of it pages of libraries. Where both
share one memory it is in the profile's reserve for the accelerator's context, which was read off the whole system."""


def process_bytes(
    spec: ModelSpec, settings: Settings, *, backend: Backend = "cpu", arch: Arch = "x86_64"
) -> tuple[Bytes, Bytes, Bytes]:
    """Expected, lowest and highest bytes of the server process beside its buffers; fitted."""
    alone = PROCESS_BASE + PROCESS_PER_TOKEN[_tokenizer(spec)] * spec.vocab + work_bytes(spec, settings)
    low, high = PROCESS_SPREAD
    # Cards with memory of their own sit in x86-64 machines; of the Arm ones all that runs CUDA here is a Jetson.
    card = CUDA_PROCESS if backend == "cuda" and arch == "x86_64" else (0, 0, 0)
    pages = HUGE_PAGES if huge_pages(backend, arch) else (0, 0, 0)
    thread, least, most = (http_threads(settings) * one for one in HTTP_THREAD)
    return (
        Bytes(alone + thread + card[0] + pages[0]),
        Bytes(int(alone * low) + least + card[1] + pages[1]),
        Bytes(int(alone * high) + most + _CHAT_TEMPLATE + card[2] + pages[2]),
    )


def _tokenizer(spec: ModelSpec) -> Literal["bpe", "spm"]:
    """SentencePiece for Gemma and for the small vocabularies of Llama 2 and Mistral; else BPE with merges."""
    return "spm" if spec.architecture.startswith("gemma") or spec.vocab < 40000 else "bpe"


def work_bytes(spec: ModelSpec, settings: Settings) -> int:
    """Scratch for quantizing activations before a matrix product: the widest input of a full batch."""
    widest = max(spec.ffn, spec.hidden, spec.heads * spec.head_dim)
    return _ubatch(settings) * widest * 34 // 32 if settings.gpu_layers == 0 else 0


# -- all parts ----------------------------------------------------------------------------------------------

ACCELERATOR_SPREAD = 0.03
"""Compute buffers on an accelerator are computed as exactly as on a CPU, but only three readings of CUDA devices could
be compared: a published log of a Jetson Orin (Qwen3-1.7B), and an H200 with 8192 and 32768 tokens (Qwen2.5-1.5B's
shape; also weights, KV and output). All are equal to the last digit."""


FILLED = 0.995
"""Share of its budget that an artifact of `schemes.BUDGET` takes at least, unless the best types take less."""
WEIGHTS = ("weights", "host_copy")
"""The parts that the types of the tensors decide."""


def parts(
    spec: ModelSpec, scheme: str, settings: Settings, *, backend: Backend, arch: Arch, imatrix: bool
) -> tuple[Part, ...]:
    """What llama-server takes with these weights and settings; ``arch`` decides what a CPU repacks."""
    process, low, high = process_bytes(spec, settings, backend=backend, arch=arch)
    note = "code, tokenizer tables and scratch of llama-server, fitted on measured runs"
    weights = _weights(spec, scheme, settings, backend=backend, imatrix=imatrix, arch=arch)
    if schemes.is_budget(scheme) and spec.recipe is not None and not spec.recipe.measured:
        weights[0] = _provisional(weights[0], spec.recipe.slack)
    return (
        *weights,
        *_context(spec, settings, backend=backend),
        fitted("process", process, (low, high), "host", note),
    )


def _weights(
    spec: ModelSpec, scheme: str, settings: Settings, *, backend: Backend, imatrix: bool, arch: Arch
) -> list[Part]:
    total = schemes.loaded_bytes(spec, scheme, imatrix=imatrix)
    embedding, per_layer = schemes.lookup_bytes(spec, scheme, imatrix=imatrix)
    if backend != "cpu" and settings.gpu_layers > 0:
        lookup = "rows are looked up on the CPU (llama-model.cpp, input layer)"
        if spec.tied:
            reason = f"token_embd again, beside its use as output: {lookup}"
            return [
                exact("weights", total - per_layer, "device", "all tensors"),
                *(
                    [exact("weights", per_layer, "host", f"per_layer_token_embd: {lookup}")]
                    if per_layer
                    else []
                ),
                exact("host_copy", embedding, "host", reason),
            ]
        return [
            exact("weights", total - embedding, "device", "all tensors but token_embd"),
            exact("weights", embedding, "host", f"token_embd: {lookup}"),
        ]
    parts = [exact("weights", total, "host", "all tensors")]
    if settings.repack:
        pairs = zip(spec.tensors, schemes.tensor_types(spec, scheme, imatrix=imatrix), strict=True)
        # A tied embedding whose type is repacked is loaded twice, as it is for look-ups and repacked as the
        # output: 0.5B with a Q4_0 embedding on x86-64 logged 73 + 265 MiB of buffers for 265 MiB of tensors.
        mapped = settings.load_mode != "none"
        again = sum(
            schemes.tensor_bytes(kind, t.shape)
            for t, kind in pairs
            if repacked(kind, t.shape, arch) and (spec.tied if t.name == "token_embd.weight" else mapped)
        )
        if again:
            reason = "repacked beside the mapped file" if mapped else "token_embd repacked as the output"
            parts.append(exact("host_copy", again, "host", f"{reason} (ggml-cpu/repack.cpp)"))
    return parts


def _provisional(weights: Part, slack: int) -> Part:
    """Weights whose types a build decides, within the same budget."""
    note = "types are chosen by measuring, at the build"
    full = weights.bytes + slack
    return fitted(
        "weights", weights.bytes, (min(weights.bytes, round(full * FILLED)), full), weights.place, note
    )


def _context(spec: ModelSpec, settings: Settings, *, backend: Backend) -> list[Part]:
    offloaded = backend != "cpu" and settings.gpu_layers > 0
    device: Place = "device" if offloaded else "host"
    parts = [exact("kv_cache", kv_bytes(spec, settings), device, "src/llama-kv-cache.cpp")]
    state = recurrent_bytes(spec, settings)
    if state:
        parts.append(exact("recurrent_state", state, device, "src/llama-memory-recurrent.cpp"))
    room = compute(spec, settings, backend)
    note = "ggml's own placement, repeated (ggml-alloc.c)"
    if spec.architecture not in EXACT_GRAPHS:
        note = f"a plain decoder of these sizes; the graph of {spec.architecture} is not modelled"
        parts.append(_compute(spec, settings, room.device, device, note))
        if offloaded:
            parts.append(_compute(spec, settings, room.host, "host", note))
    elif offloaded:
        spread = round(room.device * ACCELERATOR_SPREAD)
        around = (Bytes(room.device - spread), Bytes(room.device + spread))
        parts.append(fitted("compute", room.device, around, "device", note))
        parts.append(exact("compute", room.host, "host", "inputs handed to the accelerator"))
    else:
        parts.append(exact("compute", room.device, "host", note))
    logits = output_bytes(spec, output_rows(settings, "server"))
    return [*parts, exact("output", logits, "host", "logits, one row per slot")]


def _compute(spec: ModelSpec, settings: Settings, count: int, place: Place, note: str) -> Part:
    """A compute buffer, exact or as far as the graph is known."""
    around = compute_range(spec, settings, count)
    return (
        exact("compute", count, place, note)
        if around is None
        else fitted("compute", count, around, place, note)
    )
