"""What each scheme costs: the type every tensor gets, and the bytes that follow.

The rules for GGUF are those of the pinned llama.cpp (src/llama-quant.cpp: tensor_allows_quantization,
llama_tensor_get_type_impl, tensor_type_fallback); the tests hold them to its own dry run. What is no GGUF is in
layouts.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from edgepack import layouts, serde
from edgepack.errors import Unsupported
from edgepack.ggufheader import ALIGNMENT, BLOCKS
from edgepack.modelspec import ModelSpec, Tensor, llama_order
from edgepack.parts import Provenance as Provenance
from edgepack.profile import Backend
from edgepack.units import Bytes, pad, parse_bytes

_BASE: Mapping[str, str] = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K",
    "Q5_1": "Q5_1",
    "Q5_0": "Q5_0",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q4_1": "Q4_1",
    "Q4_0": "Q4_0",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
    "MXFP4_MOE": "MXFP4",
    "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_S": "Q3_K",
    "IQ3_M": "IQ3_S",
    "IQ3_S": "IQ3_S",
    "IQ3_XS": "IQ3_S",
    "IQ3_XXS": "IQ3_XXS",
    "Q2_K": "Q2_K",
    "Q2_K_S": "Q2_K",
    "IQ2_M": "IQ2_S",
    "IQ2_S": "IQ2_XS",
    "IQ2_XS": "IQ2_XS",
    "IQ2_XXS": "IQ2_XXS",
    "Q2_0": "Q2_0",
    "TQ2_0": "TQ2_0",
    "TQ1_0": "TQ1_0",
    "IQ1_M": "IQ1_M",
    "IQ1_S": "IQ1_S",
    "Q1_0": "Q1_0",
}
"""Scheme to the type most of its tensors get (llama_ftype_get_default_type)."""

GGUF: tuple[str, ...] = tuple(_BASE)
"""Every file type that llama-quantize writes, widest first within a family."""

SAFETENSORS_BF16 = "bf16"
"""The one name that GGUF has too: in lower case the unquantized checkpoint."""

ALIASES: Mapping[str, str] = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""llama-quantize's own aliases."""

_FLOATS = ("F32", "F16", "BF16")
_NEEDY_TYPES = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")
_NEEDS_IMATRIX = (*_NEEDY_TYPES, "IQ3_XS", "IQ2_M", "Q2_K_S")


BUDGET = "gguf-budget"
"""A GGUF whose tensors each get the type that serves a byte budget best (allocation.py): the name alone for what a
plan leaves, ``gguf-budget-3GiB`` for a file of at most that size. What every tensor gets is in the model's recipe."""


def canonical(scheme: str) -> str:
    """The scheme's own name, from any spelling; every name on the command line comes through here.

    GGUF's names are upper-case, as llama-quantize takes them; the others are lower-case (layouts.parse), so BF16 is
    a GGUF and bf16 a checkpoint. A budget is named in bytes. Raises Unsupported for a name that is not known, with the
    nearest one, and for combinations that do not exist.
    """
    name = scheme.upper()
    name = ALIASES.get(name, name)
    if name in _BASE and scheme != SAFETENSORS_BF16:
        return name
    if is_budget(scheme):
        size = budget_of(scheme)
        return BUDGET if size is None else budget_name(size)
    if scheme.lower().partition("-")[0] in layouts.FAMILIES:
        return layouts.parse(scheme).name
    near = serde.did_you_mean(scheme, (*GGUF, BUDGET, *layouts.EXAMPLES))
    raise Unsupported(
        f"scheme {scheme!r} is not known{near}",
        hint=f"known schemes: {', '.join(GGUF)}, {BUDGET}; and {', '.join(layouts.EXAMPLES)}",
    )


def is_gguf(scheme: str) -> bool:
    """Whether the scheme is a GGUF's: a file type of llama-quantize, or a budget."""
    name = canonical(scheme)
    return name in _BASE or is_budget(name)


def file_format(scheme: str) -> Literal["gguf", "onnx", "safetensors"]:
    """What weights in this scheme are stored as, in the words of ModelPack's examples."""
    if is_gguf(scheme):
        return "gguf"
    return "onnx" if scheme.startswith("onnx") else "safetensors"


def is_budget(scheme: str) -> bool:
    """Whether the scheme is a GGUF that fills a byte budget, of whatever size."""
    return scheme[: len(BUDGET)].lower() == BUDGET and scheme[len(BUDGET) : len(BUDGET) + 1] in ("", "-")


def budget_of(scheme: str) -> int | None:
    """Bytes of the file that a budget's name allows; None for all that a plan leaves. Raises BadInput for no size."""
    text = scheme[len(BUDGET) + 1 :]
    return int(parse_bytes(text)) if text else None


def budget_name(size: int) -> str:
    return f"{BUDGET}-{size}"


def needs_imatrix(scheme: str) -> bool:
    """Whether llama-quantize refuses the scheme without an importance matrix, for any usual shape.

    These are the schemes whose own type must have one (llama-quant.cpp, tensor_requires_imatrix).
    """
    return canonical(scheme) in _NEEDS_IMATRIX


def requires_importances(kind: str) -> bool:
    """Whether llama.cpp refuses to store a matrix of a block as this type without an importance matrix."""
    return kind in _NEEDY_TYPES


@lru_cache(maxsize=4096)
def requires_imatrix(spec: ModelSpec, scheme: str) -> bool:
    """Whether llama-quantize refuses this scheme for this very model without an importance matrix."""
    name = canonical(scheme)
    if name not in _BASE:
        return False
    needy = (*_NEEDY_TYPES, "Q2_K") if name == "Q2_K_S" else _NEEDY_TYPES
    if spec.gguf_types is not None and spec.gguf_scheme == name:
        return False
    return any(
        kind in needy and tensor.name not in _EMBEDDING_NAMES
        for kind, tensor, _ in groups(spec, name, imatrix=False)
    )


@lru_cache(maxsize=65536)
def tensor_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of one tensor without padding: rows of whole blocks (ggml-common.h), or as layouts.py has it."""
    if kind not in BLOCKS:
        return layouts.kind_bytes(kind, shape)
    _, weights, size = BLOCKS[kind]
    if shape[0] % weights != 0:
        raise Unsupported(
            f"a row of {shape[0]} weights cannot be stored as {kind}, whose blocks hold {weights}"
        )
    elements = 1
    for n in shape:
        elements *= n
    return elements // weights * size


def tensor_types(spec: ModelSpec, scheme: str, *, imatrix: bool, backend: Backend = "cpu") -> tuple[str, ...]:
    """The type of every tensor of ``spec``, in its order, after quantizing to ``scheme``: ggml's, or layouts.py's.

    A GGUF source keeps its types; one in full precision can be quantized. ``backend`` matters to ONNX only. Raises
    Unsupported for requantizing and for shapes that the quantizer itself refuses.
    """
    name = canonical(scheme)
    if is_budget(name):
        if spec.recipe is None:
            raise Unsupported(
                f"which types {name} gives the tensors of {spec.name} is not decided yet",
                hint="plan it for a device, or give a size",
            )
        return spec.recipe.types
    if name not in _BASE:
        return layouts.kinds(spec, name, backend=backend)
    return _gguf_types(spec, name, imatrix)


@lru_cache(maxsize=4096)
def _gguf_types(spec: ModelSpec, name: str, imatrix: bool) -> tuple[str, ...]:
    if spec.gguf_types is not None:
        if name == spec.gguf_scheme:
            return spec.gguf_types
        if any(kind not in _FLOATS for kind in spec.gguf_types):
            raise Unsupported(
                f"{spec.name} is already quantized ({spec.gguf_scheme or 'unknown scheme'}), not {name}",
                hint="use it as it is, or give the F16 GGUF or the Hugging Face folder",
            )
    state = _State(spec, name, imatrix)
    kinds = [""] * len(spec.tensors)
    for at, tensor, kept in _walk(spec):
        kinds[at] = kept or state.type_of(tensor)
    return tuple(kinds)


@lru_cache(maxsize=256)
def _walk(spec: ModelSpec) -> tuple[tuple[int, Tensor, str], ...]:
    """Tensors in llama.cpp's order: place in the file, tensor, and the type of one that is kept as it is.

    What is never quantized is F32 in a converted file, but for a few matrices (conversion/base.py,
    prepare_tensors).
    """
    order = sorted(range(len(spec.tensors)), key=lambda at: llama_order(spec.tensors[at]))
    sources = spec.gguf_types or tuple(unquantized(t) for t in spec.tensors)
    return tuple((at, spec.tensors[at], "" if quantizable(spec.tensors[at]) else sources[at]) for at in order)


def unquantized(tensor: Tensor) -> str:
    """Type in a converted file of a tensor that llama-quantize leaves alone."""
    half = tensor.name.endswith("weight") and len(tensor.shape) > 1 and any(p in tensor.name for p in _HALF)
    return "F16" if half else "F32"


@lru_cache(maxsize=4096)
def groups(
    spec: ModelSpec, scheme: str, *, imatrix: bool, backend: Backend = "cpu"
) -> tuple[tuple[str, Tensor, int], ...]:
    """Tensors that are alike (shape, role, type), as type, one of them, and how many: for sums over a model."""
    numbers, examples = alike(spec)
    kinds = tensor_types(spec, scheme, imatrix=imatrix, backend=backend)
    return tuple(
        (kind, examples[at], count) for (kind, at), count in Counter(zip(kinds, numbers, strict=True)).items()
    )


@lru_cache(maxsize=256)
def alike(spec: ModelSpec) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """The class of each tensor, and one tensor of each class: same shape and same place within a block."""
    classes: dict[tuple[tuple[int, ...], str], int] = {}
    examples: list[Tensor] = []
    numbers = []
    for tensor in spec.tensors:
        role = tensor.name.split(".", 2)[2] if tensor.name.startswith("blk.") else tensor.name
        number = classes.setdefault((tensor.shape, role), len(classes))
        if number == len(examples):
            examples.append(tensor)
        numbers.append(number)
    return tuple(numbers), tuple(examples)


def weights_bytes(spec: ModelSpec, scheme: str, *, imatrix: bool, backend: Backend = "cpu") -> int:
    """Bytes of all tensors, without padding: what llama.cpp prints as the model size."""
    return _weights_bytes(spec, scheme, imatrix, _graph(scheme, backend))


@lru_cache(maxsize=4096)
def _weights_bytes(spec: ModelSpec, scheme: str, imatrix: bool, backend: Backend) -> int:
    alike = groups(spec, scheme, imatrix=imatrix, backend=backend)
    return sum(tensor_bytes(kind, t.shape) * count for kind, t, count in alike)


@lru_cache(maxsize=4096)
def loaded_bytes(spec: ModelSpec, scheme: str, *, imatrix: bool, backend: Backend = "cpu") -> int:
    """Bytes of the tensors that llama-server loads: all but those of layers that only draft."""
    if not spec.draft_layers:
        return weights_bytes(spec, scheme, imatrix=imatrix, backend=backend)
    return _sum(
        spec, scheme, imatrix=imatrix, backend=backend, share=lambda t: 1.0 if spec.loaded(t) else 0.0
    )


@lru_cache(maxsize=4096)
def active_bytes(spec: ModelSpec, scheme: str, *, imatrix: bool, backend: Backend = "cpu") -> int:
    """Bytes of the weights that one token reads: of the routed experts only those that are used."""
    if not spec.experts:
        return loaded_bytes(spec, scheme, imatrix=imatrix, backend=backend)
    return _sum(
        spec,
        scheme,
        imatrix=imatrix,
        backend=backend,
        share=lambda t: spec.read_share(t) if spec.loaded(t) else 0.0,
    )


def _sum(
    spec: ModelSpec, scheme: str, *, imatrix: bool, backend: Backend, share: Callable[[Tensor], float]
) -> int:
    pairs = zip(spec.tensors, tensor_types(spec, scheme, imatrix=imatrix, backend=backend), strict=True)
    return round(sum(tensor_bytes(kind, t.shape) * share(t) for t, kind in pairs))


def lookup_bytes(spec: ModelSpec, scheme: str, *, imatrix: bool, backend: Backend = "cpu") -> tuple[int, int]:
    """Bytes of the tables that rows are looked up in: the token embedding, and Gemma's embedding per layer."""
    return _lookup_bytes(spec, scheme, imatrix, _graph(scheme, backend))


@lru_cache(maxsize=4096)
def _lookup_bytes(spec: ModelSpec, scheme: str, imatrix: bool, backend: Backend) -> tuple[int, int]:
    kinds = tensor_types(spec, scheme, imatrix=imatrix, backend=backend)
    sizes = dict.fromkeys(("token_embd.weight", "per_layer_token_embd.weight"), 0)
    for tensor, kind in zip(spec.tensors, kinds, strict=True):
        if tensor.name in sizes:
            sizes[tensor.name] = tensor_bytes(kind.partition("+")[0], tensor.shape)
    return sizes["token_embd.weight"], sizes["per_layer_token_embd.weight"]


def reads_table(spec: ModelSpec, scheme: str) -> bool:
    """Whether every token reads the whole embedding: a tied one that is not stored again as the output head."""
    return spec.tied and (is_gguf(scheme) or layouts.shares_table(spec, layouts.parse(scheme)))


def _graph(scheme: str, backend: Backend) -> Backend:
    """The backend as far as it decides sizes: only of ONNX graphs, so that caches are shared by all others."""
    return backend if scheme.startswith("onnx") else "cpu"


def bits_per_weight(spec: ModelSpec, scheme: str, *, imatrix: bool, backend: Backend = "cpu") -> float:
    """Bits of all tensors over the number of their elements, as llama-quantize prints it."""
    return weights_bytes(spec, scheme, imatrix=imatrix, backend=backend) * 8 / spec.parameters


def file_bytes(
    spec: ModelSpec, scheme: str, *, imatrix: bool, backend: Backend = "cpu"
) -> tuple[Bytes, Provenance]:
    """Size of the whole file: of a GGUF header and tensors, each padded to 32 bytes; else of the weights' files.

    Exact when the GGUF's header is known (a GGUF or a folder with its tokenizer), else with an estimated header.
    """
    if not is_gguf(scheme):
        tensors = weights_bytes(spec, scheme, imatrix=imatrix, backend=backend)
        return Bytes(
            tensors + layouts.container_bytes(spec, scheme, half=_graph(scheme, backend) != "cpu")
        ), "fitted"
    return _gguf_bytes(spec, scheme, imatrix)


@lru_cache(maxsize=4096)
def _gguf_bytes(spec: ModelSpec, scheme: str, imatrix: bool) -> tuple[Bytes, Provenance]:
    if spec.file_bytes is not None and canonical(scheme) == spec.gguf_scheme:
        return spec.file_bytes, "exact"
    alike = groups(spec, scheme, imatrix=imatrix)
    data = sum(pad(tensor_bytes(kind, t.shape), ALIGNMENT) * count for kind, t, count in alike)
    decided = spec.recipe is None or spec.recipe.measured or not is_budget(scheme)
    if spec.header_bytes is not None:
        return Bytes(spec.header_bytes + data), "exact" if decided else "fitted"
    return Bytes(header_estimate(spec) + data), "fitted"


_HEADER_PER_TOKEN = {"llama": 61, "qwen2": 39, "qwen3": 39, "qwen3moe": 39, "gemma3": 25}


def header_estimate(spec: ModelSpec) -> int:
    """Header of a GGUF whose tokenizer was not given, from the size of its vocabulary.

    Bytes per token of published files: Llama-3 about 7.8 MB for 128256 tokens, Qwen3 5 957 216 B for
    151936, Gemma 3 6 533 248 B for 262144; plus 64 B per tensor.
    """
    per_token = _HEADER_PER_TOKEN.get(spec.architecture, 40)
    if spec.architecture == "llama" and spec.vocab < 65536:
        per_token = 23  # SentencePiece: a score and a type per token, no merges (Llama 2: 0.7 MB for 32000)
    return pad(per_token * spec.vocab + 64 * len(spec.tensors), ALIGNMENT)


# -- the rules -----------------------------------------------------------------------------------------

_EMBEDDING_NAMES = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")

_KEPT = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "position_embd",
)
"""Names that are never quantized (tensor_allows_quantization), as far as the known architectures go."""

_HALF = ("altup_proj", "altup_unembd_proj", "altup_router.", "laurel_l.", "laurel_r.", "per_layer_model_proj")
"""Of these, the matrices that are stored in 16 bits."""

_CATEGORIES = (
    ("attn_qkv.weight", "qkv"),
    ("attn_kv_b.weight", "kv_b"),
    ("attn_v.weight", "v"),
    ("attn_k.weight", "k"),
    ("attn_q.weight", "q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)
_LIKE_V = ("v", "qkv", "kv_b")
_IQ2_AND_1 = ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ2_S", "IQ2_M", "IQ1_M")

_FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""Type for rows that are not whole blocks of the one wanted (tensor_type_fallback)."""

_BLOCK = re.compile(r"blk\.(\d+)\.")


def quantizable(tensor: Tensor) -> bool:
    """Whether llama-quantize may change this tensor's type at all."""
    return (
        len(_squeezed(tensor.shape)) >= 2
        and tensor.name.endswith("weight")
        and not any(part in tensor.name for part in _KEPT)
    )


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without trailing ones, as ggml_n_dims counts."""
    dims = len(shape)
    while dims > 1 and shape[dims - 1] == 1:
        dims -= 1
    return shape[:dims]


@lru_cache(maxsize=65536)
def _category(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "token_embd"
    for part, category in _CATEGORIES:
        if part in name:
            return category
    return "other"


def _more_bits(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


@dataclass(slots=True)
class _Counters:
    v: int = 0
    down: int = 0
    gate: int = 0
    up: int = 0


class _State:
    """The walk over the tensors in llama.cpp's order, with its counters per class."""

    def __init__(self, spec: ModelSpec, scheme: str, imatrix: bool) -> None:
        self.scheme = scheme
        self.imatrix = imatrix
        self.layers = spec.layers + spec.draft_layers
        kv_heads = spec.kv_heads if spec.first_kv_heads is None else spec.first_kv_heads
        self.gqa = spec.heads // kv_heads if kv_heads else 0
        self.experts = spec.experts
        self.tied = all(t.name != "output.weight" for t in spec.tensors)
        self.of_v = sum(1 for t in spec.tensors if _category(t.name) in _LIKE_V)
        self.is_70b = _is_70b(spec)
        self.at = _Counters()

    def type_of(self, tensor: Tensor) -> str:
        base = _BASE[self.scheme]
        if base in _FLOATS:
            return base
        return self.fallback(self.wanted(tensor, base), tensor)

    def fallback(self, kind: str, tensor: Tensor) -> str:
        columns, weights = tensor.shape[0], BLOCKS[kind][1]
        if columns % weights == 0:
            return kind
        if weights > 32 and kind not in _FALLBACK:
            raise Unsupported(
                f"{tensor.name} has rows of {columns}, and llama.cpp has no fallback for {kind}"
            )
        other = _FALLBACK.get(kind, kind)
        return other if columns % BLOCKS[other][1] == 0 else "F16"

    def wanted(self, tensor: Tensor, base: str) -> str:
        category, scheme = _category(tensor.name), self.scheme
        if category == "output" or (self.tied and category == "token_embd"):
            return self.output(tensor, base)
        if scheme == "MXFP4_MOE":
            return "MXFP4" if len(tensor.shape) > 2 and tensor.shape[2] > 1 else "Q8_0"
        if category == "token_embd":
            return _TOKEN_EMBD.get(scheme, base)
        if scheme in _IQ2_AND_1:
            return self.low_bits(category, base)
        if category in _LIKE_V:
            return self.value(base)
        rule = _RULES.get(category)
        return rule(self, tensor, base) if rule else base

    def output(self, tensor: Tensor, base: str) -> str:
        if self.scheme == "MXFP4_MOE" or tensor.shape[0] % BLOCKS[base][1] != 0:
            return "Q8_0"
        if self.scheme in (*_IQ2_AND_1, "IQ3_XXS"):
            return "Q5_K"
        return base if base == "Q8_0" else "Q6_K"

    def low_bits(self, category: str, base: str) -> str:
        better = "IQ3_S" if self.scheme in ("IQ2_S", "IQ2_M") else "Q2_K"
        if category in _LIKE_V:
            self.at.v += 1
            return "Q4_K" if self.gqa >= 4 or self.experts >= 4 else better
        if category == "k" and self.experts == 8:
            return "Q4_K"
        if category == "ffn_down":
            i, self.at.down = self.at.down, self.at.down + 1
            return better if i < self.layers // 8 else base
        if category == "attn_output":
            if self.experts == 8:
                return "Q5_K"
            return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(
                self.scheme, base
            )
        return base

    def value(self, base: str) -> str:
        i, self.at.v = self.at.v, self.at.v + 1
        kind = self.value_by_scheme(i, base)
        if self.is_70b and kind in ("Q3_K", "Q4_K"):
            kind = "Q5_K"
        return "Q8_0" if self.experts == 8 else kind

    def value_by_scheme(self, i: int, base: str) -> str:
        shared = self.gqa >= 4
        match self.scheme:
            case "Q2_K":
                return "Q4_K" if shared else "Q3_K"
            case "Q2_K_S" | "IQ3_XS" | "IQ3_S" if shared:
                return "Q4_K"
            case "IQ3_XXS":
                return "Q4_K" if shared else "IQ3_XXS" if self.imatrix else "IQ3_S"
            case "IQ3_M":
                return "Q4_K"
            case "Q3_K_M":
                return "Q5_K" if i < 2 else "Q4_K"
            case "Q3_K_L":
                return "Q5_K"
            case "IQ4_NL" | "IQ4_XS" if shared:
                return "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if _more_bits(i, self.of_v):
                return "Q6_K"
            case "Q4_K_S" if i < 4:
                return "Q5_K"
            case _:
                return base

    def layer(self, tensor: Tensor, counter: int) -> int:
        """Number of the layer: with experts it is read from the name, otherwise counted."""
        match = _BLOCK.match(tensor.name)
        if self.experts <= 1:
            return counter
        if match is None:
            raise Unsupported(f"{tensor.name} belongs to no layer, and llama.cpp cannot tell its type")
        return int(match.group(1))

    def key(self, tensor: Tensor, base: str) -> str:
        if self.experts == 8:
            return "Q8_0"
        return self.query(tensor, base)

    def query(self, tensor: Tensor, base: str) -> str:
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(self.scheme, base)

    def down(self, tensor: Tensor, base: str) -> str:
        i, n = self.layer(tensor, self.at.down), self.layers
        self.at.down += 1
        first, more = i < n // 8, _more_bits(i, n)
        match self.scheme:
            case "Q2_K":
                return "Q3_K"
            case "Q2_K_S" if first:
                return "Q4_K"
            case "IQ3_XXS" if not self.imatrix:
                return "Q4_K" if first else "Q3_K"
            case "Q3_K_M":
                return "Q5_K" if i < n // 16 else "Q4_K"
            case "IQ3_M" if first or (self.experts == 8 and more):
                return "Q4_K"
            case "Q3_K_L":
                return "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if more:
                return "Q6_K"
            case "IQ4_NL" | "IQ4_XS" if first and not self.imatrix:
                return "Q5_K"
            case "Q4_K_S" if first:
                return "Q5_K"
            case "Q4_0" if first and self.imatrix:
                return "Q4_1"
            case "Q5_0" if first and self.imatrix:
                return "Q5_1"
            case _:
                return base

    def attention_output(self, tensor: Tensor, base: str) -> str:
        if self.experts == 8:
            return "Q5_K" if self.scheme in _EIGHT_EXPERTS_OUTPUT else base
        bumps = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
        return bumps.get(self.scheme, base)

    def gate(self, tensor: Tensor, base: str) -> str:
        i = self.layer(tensor, self.at.gate)
        self.at.gate += 1
        return self.middle(i, base)

    def up(self, tensor: Tensor, base: str) -> str:
        i = self.layer(tensor, self.at.up)
        self.at.up += 1
        return self.middle(i, base)

    def middle(self, i: int, base: str) -> str:
        inner = self.layers // 8 <= i < 7 * self.layers // 8
        return "IQ3_XXS" if self.scheme == "IQ3_XS" and inner else base


_RULES: Mapping[str, Callable[[_State, Tensor, str], str]] = {
    "k": _State.key,
    "q": _State.query,
    "ffn_down": _State.down,
    "attn_output": _State.attention_output,
    "ffn_gate": _State.gate,
    "ffn_up": _State.up,
}

_TOKEN_EMBD = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"), "Q2_K"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S"),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), "Q4_K"),
}

_EIGHT_EXPERTS_OUTPUT = (
    "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS",
)  # fmt: skip


def _is_70b(spec: ModelSpec) -> bool:
    """LLM_TYPE_70B: 80 layers with shared KV heads (llama), any 80 layers (qwen2); src/models/*.cpp."""
    if spec.layers != 80:
        return False
    if spec.architecture == "llama":
        return spec.experts != 8 and spec.heads != spec.kv_heads
    return spec.architecture == "qwen2"
