"""Schemes that are no GGUF: their names, and the bytes in which each stores every tensor.

GPTQ, AWQ, AutoRound, compressed-tensors, FP8, bitsandbytes and bf16 checkpoints are safetensors files; ONNX models
are one graph. All but ONNX leave embeddings, the output head and norms in 16 bits. How a matrix is stored is its
*kind*, a short name such as GPTQ4-G128; `kind_bytes` prices it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from edgepack import serde
from edgepack.errors import Unsupported
from edgepack.modelspec import ModelSpec, Tensor
from edgepack.profile import Backend

Family = Literal["gptq", "awq", "autoround", "ct", "fp8", "bnb", "onnx", "bf16"]
FAMILIES: tuple[str, ...] = get_args(Family)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    name: str
    family: Family
    bits: int
    group: int | None = None
    """Weights along a row that share a scale; None: the whole row."""
    activations: int = 16
    """Bits of the activations that the matrices are multiplied with."""
    act_order: bool = False
    asymmetric: bool = False
    """A zero of its own for each group, where the layout's default is the middle of the codes."""
    mixed: bool = False
    """Eight bits for the output head and for queries, keys, values and downs of half of the layers (onnxruntime-genai's
    k_quant_mixed)."""


EXAMPLES: tuple[str, ...] = (
    "gptq-int4-g128", "gptq-int8-g128", "gptq-int4-g128-actorder", "gptq-int3-g128-asym", "awq-int4-g128",
    "autoround-int4-g128", "ct-w4a16-g128", "ct-w8a16", "ct-w8a8", "fp8", "bnb-int8", "bnb-nf4", "onnx-int4",
    "onnx-int8", "onnx-int4-b128", "onnx-int4-rtn", "onnx-fp16", "bf16",
)  # fmt: skip
"""One name of each kind, for hints; the grammar is in `parse`."""

GRID: tuple[str, ...] = (
    *(f"gptq-int{b}-g{g}{o}" for b in (2, 3, 4, 8) for g in (128, 64, 32) for o in ("", "-actorder")),
    *(f"{family}-int4-g{g}" for family in ("awq", "autoround") for g in (128, 64, 32)),
    "ct-w4a16-g128", "ct-w8a16", "bnb-nf4", "bnb-int8", "onnx-int4-rtn", "onnx-int4", "onnx-int8", "fp8",
)  # fmt: skip
"""What is proposed instead of a scheme that loses too much."""

_GROUPED = re.compile(r"(gptq|awq|autoround)-int(\d+)-g(\d+|all)(-asym)?(-actorder)?")
_PACKED = re.compile(r"ct-w([48])a(8|16)(-g128)?")
_ONNX = re.compile(r"onnx-int([48])(?:-b(16|32|64|128|256))?(-rtn|-k-quant-mixed)?")
_PLAIN: dict[str, tuple[Family, int]] = {
    "fp8": ("fp8", 8),
    "bnb-int8": ("bnb", 8),
    "bnb-nf4": ("bnb", 4),
    "onnx-fp16": ("onnx", 16),
    "bf16": ("bf16", 16),
}

BITS = {"gptq": (2, 3, 4, 8), "awq": (4,), "autoround": (2, 3, 4, 8)}
"""Bits that each packs. AWQ's GEMM layout and its kernels hold 4 (gptqmodel's AWQ and vLLM's, both 4 only)."""
GROUPS = (32, 64, 128)

_ONNX_BLOCK = 32
"""block_size of onnxruntime-genai's builder when none is given."""


def parse(name: str) -> Scheme:
    """The scheme behind a name that is no GGUF's.

    ``{gptq|awq|autoround}-int{2,3,4,8}-g{32,64,128,all}[-asym][-actorder]``, ``ct-w{4,8}a16[-g128]``, ``ct-w8a8``,
    ``fp8``, ``bnb-int8``, ``bnb-nf4``, ``onnx-int4[-b{16..256}][-rtn]``, ``onnx-int8[-b{16..256}]``, ``onnx-fp16``,
    ``bf16``. onnx-int4 is what onnxruntime-genai's builder calls k_quant_mixed (that name is taken too), and with -rtn
    plain rounding to nearest. Raises Unsupported for a name that is not known, with the nearest one, and for a
    combination that does not exist, with the reason.
    """
    text = name.lower()
    if text in _PLAIN:
        family, bits = _PLAIN[text]
        return Scheme(name=text, family=family, bits=bits, activations=8 if text == "fp8" else 16)
    for pattern, read in ((_GROUPED, _grouped), (_PACKED, _packed), (_ONNX, _onnx)):
        found = pattern.fullmatch(text)
        if found is not None:
            return read(text, found)
    near = serde.did_you_mean(text, EXAMPLES)
    raise Unsupported(f"scheme {name!r} is not known{near}", hint=f"beside GGUF's: {', '.join(EXAMPLES)}")


def _grouped(text: str, found: re.Match[str]) -> Scheme:
    family, bits, group, asymmetric, order = found.groups()
    offered = BITS[family]
    if int(bits) not in offered:
        only = ", ".join(str(b) for b in offered)
        other = f"gptq-int{bits}-g{group}" if int(bits) in BITS["gptq"] else "gptq-int4-g128"
        raise Unsupported(f"{text}: {family} packs {only} bits, not {bits}", hint=f"take {other}")
    if group != "all" and int(group) not in GROUPS:
        raise Unsupported(f"{text}: no kernel reads groups of {group}", hint="groups are 32, 64, 128 or all")
    if asymmetric and family != "gptq":
        why = "AWQ always is" if family == "awq" else f"edgepack makes {family} symmetric"
        raise Unsupported(f"{text}: {why}, so there is no -asym", hint=text.replace(asymmetric, ""))
    if order and family != "gptq":
        raise Unsupported(
            f"{text}: {family} has no act order; its layout has no g_idx", hint=text.removesuffix("-actorder")
        )
    return Scheme(
        name=text,
        family=family,  # type: ignore[arg-type]  # the expression lists them
        bits=int(bits),
        group=None if group == "all" else int(group),
        act_order=order is not None,
        asymmetric=family == "awq" or asymmetric is not None,
    )


def _packed(text: str, found: re.Match[str]) -> Scheme:
    weights, activations, group = found.groups()
    if weights == "4" and activations == "8":
        raise Unsupported(
            f"{text}: llmcompressor stores these 4 bits in a byte each, as large as W8A8 and as coarse as W4A16",
            hint="take ct-w8a8 or ct-w4a16-g128",
        )
    if group and activations == "8" and weights == "8":
        raise Unsupported(
            f"{text}: W8A8 has one scale per output channel, no groups", hint=text.removesuffix(group)
        )
    return Scheme(
        name=text,
        family="ct",
        bits=int(weights),
        group=128 if group else None,
        activations=int(activations),
    )


def _onnx(text: str, found: re.Match[str]) -> Scheme:
    bits, block, rounding = found.groups()
    if rounding and bits == "8":
        reason = (
            "k_quant_mixed mixes 8 bits into 4"
            if "quant" in rounding
            else "8 bits are always rounded to nearest"
        )
        raise Unsupported(f"{text}: {reason}", hint=f"take {text.removesuffix(rounding)}")
    size = int(block) if block else _ONNX_BLOCK
    mixed = bits == "4" and rounding != "-rtn"
    name = f"onnx-int{bits}{'' if size == _ONNX_BLOCK else f'-b{size}'}{'-rtn' if rounding == '-rtn' else ''}"
    return Scheme(name=name, family="onnx", bits=int(bits), group=size, mixed=mixed)


# -- which tensor is stored as what -----------------------------------------------------------------------

_LINEAR = (
    "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_qkv.weight", "attn_output.weight",
    "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight",
    "ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight",
)  # fmt: skip
"""The matrices of a block that quantizers change: every Linear but the router of a mixture (lm_head is none)."""

PLAIN_DECODERS: tuple[str, ...] = (
    "llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "granite", "smollm3", "minicpm", "mistral3",
    "cohere2", "olmo2",
)  # fmt: skip
"""Architectures whose blocks are made of those matrices and norms only, so that what a quantizer changes is known."""

_NOT_STORED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""GGUF's own; a checkpoint has them in config.json."""

HEAD = "output.weight"
EMBEDDING = "token_embd.weight"


def is_linear(tensor: Tensor) -> bool:
    return tensor.name.startswith("blk.") and tensor.name.partition(".")[2].partition(".")[2] in _LINEAR


@lru_cache(maxsize=1024)
def kinds(spec: ModelSpec, name: str, *, backend: Backend) -> tuple[str, ...]:
    """The kind of every tensor of ``spec``, in its order.

    ``backend`` matters to ONNX, whose graphs are fp32 on a CPU and fp16 on CUDA (builder.py, set_io_dtype). Raises
    Unsupported for a model whose matrices the scheme cannot hold, or of which it is not known which it changes.
    """
    scheme = parse(name)
    if spec.gguf_types is not None:
        raise Unsupported(
            f"{spec.name} is a GGUF file, which {scheme.name} cannot be made from",
            hint="give the Hugging Face folder, or a GGUF scheme",
        )
    if scheme.family != "bf16" and spec.architecture not in PLAIN_DECODERS:
        raise Unsupported(
            f"which matrices of {spec.architecture} {scheme.name} changes is not known", hint="take bf16"
        )
    if scheme.family == "onnx":
        _require_graph(spec, scheme, backend)
        return tuple(_onnx_kinds(spec, scheme, half=backend != "cpu"))
    if scheme.family == "bnb" and spec.experts:
        raise Unsupported(
            f"{scheme.name}: bitsandbytes quantizes Linear layers only, and experts are none in transformers 5",
            hint="take ct-w4a16-g128 or a GGUF scheme",
        )
    kind = matrix_kind(scheme)
    result = []
    for tensor in spec.tensors:
        if tensor.name in _NOT_STORED:
            result.append("NONE")
        elif kind is None or not is_linear(tensor):
            result.append("BF16")
        else:
            _refuse_shape(scheme, tensor)
            result.append(kind)
    return tuple(result)


def matrix_kind(scheme: Scheme) -> str | None:
    """Kind of a quantized matrix; None when nothing is quantized."""
    group = "ROW" if scheme.group is None else f"G{scheme.group}"
    match scheme.family:
        case "bf16":
            return None
        case "fp8":
            return "FP8"
        case "bnb":
            return "NF4" if scheme.bits == 4 else "LLM.INT8"
        case "ct" if scheme.activations == 8:
            return "INT8"
        case _:
            return f"{scheme.family.upper()}{scheme.bits}-{group}"


_AWQ_ROWS = 64
"""Rows whose clipping gptqmodel looks for at a time (7.6.0, AWQProcessor._compute_best_clip)."""


def _refuse_shape(scheme: Scheme, tensor: Tensor) -> None:
    columns, rows = tensor.shape[0], tensor.shape[1]
    if scheme.group is not None and columns % scheme.group:
        fitting = [g for g in GROUPS if columns % g == 0]
        raise Unsupported(
            f"{scheme.name}: {tensor.name} has rows of {columns}, which groups of {scheme.group} do not divide",
            hint=f"take g{fitting[-1]}" if fitting else "take gall, or bnb-int8",
        )
    if scheme.family == "awq" and rows % _AWQ_ROWS:
        raise Unsupported(
            f"{scheme.name}: {tensor.name} has {rows} rows, which AWQ's search does not take by {_AWQ_ROWS}",
            hint=f"take gptq-int4-{'gall' if scheme.group is None else f'g{scheme.group}'}",
        )
    if scheme.family in ("gptq", "autoround", "awq") and (columns % 32 or rows % 32):
        raise Unsupported(
            f"{scheme.name}: {tensor.name} of {columns} x {rows} does not pack into words of 32 bits",
            hint="take bnb-int8 or bf16",
        )


def shares_table(spec: ModelSpec, scheme: Scheme) -> bool:
    """Whether one table serves for look-ups and as output head: tied, and in ONNX only where it has 4 bits, since
    rows of 8-bit blocks cannot be looked up; then the embedding is there in floats too (files of the builder)."""
    return spec.tied and not (scheme.family == "onnx" and scheme.bits == 8)


ONNX_DECODERS: tuple[str, ...] = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "granite")
"""Architectures of which onnxruntime-genai 0.18's builder was seen to write working graphs."""

_NO_GRAPH = {
    "gemma3": "onnxruntime-genai 0.18's builder ends with KeyError 'rope_type' when transformers 5 read its config",
    "smollm3": "onnxruntime-genai 0.18's builder ends with KeyError 'position_ids'",
}
"""Architectures that the builder lists and fails on (tests/integration/test_upstream_bugs.py)."""


def _require_graph(spec: ModelSpec, scheme: Scheme, backend: Backend) -> None:
    """Raises Unsupported for what the builder makes no working graph of on this backend."""
    if spec.family not in ONNX_DECODERS:
        reason = _NO_GRAPH.get(spec.family, "onnxruntime-genai 0.18's builder does not know it")
        raise Unsupported(f"{spec.family} cannot become {scheme.name}: {reason}", hint="take a GGUF scheme")
    if backend not in ("cpu", "cuda"):
        raise Unsupported(
            f"{scheme.name}: graphs are built for cpu and cuda, not for {backend}", hint="take a GGUF scheme"
        )
    if scheme.bits == 16 and backend == "cpu":
        raise Unsupported(
            f"{scheme.name} is for CUDA: on a CPU onnxruntime reads a prompt and fails at the next token",
            hint="take onnx-int8",
        )


def _onnx_kinds(spec: ModelSpec, scheme: Scheme, *, half: bool) -> Iterator[str]:
    """Embedding and norms in the graph's floats, but Gemma's norms in f32; every matrix in blocks, the head too."""
    norms = "F32" if spec.family.startswith("gemma") else "F16" if half else "F32"
    floats = "F16" if half else "F32"
    zeros = "-ZP" if scheme.mixed else ""  # k_quant is asymmetric, the default symmetric

    def matrix(bits: int) -> str:
        return floats if bits == 16 else f"ONNX{bits}-G{scheme.group}-{floats}{zeros}"

    head = matrix(8 if scheme.mixed else scheme.bits)
    for tensor in spec.tensors:
        if tensor.name in _NOT_STORED:
            yield "NONE"
        elif tensor.name == HEAD:
            yield head
        elif tensor.name == EMBEDDING and spec.tied:
            yield head if shares_table(spec, scheme) else f"{floats}+{head}"
        elif is_linear(tensor):
            layer, _, part = tensor.name.removeprefix("blk.").partition(".")
            wide = scheme.mixed and part in _MIXED and mixed_layer(int(layer), spec.layers)
            yield matrix(8 if wide else scheme.bits)
        else:
            yield norms if "norm" in tensor.name else floats


_MIXED = ("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_qkv.weight", "ffn_down.weight")
"""Queries and keys too: the builder packs them with the values into one matrix."""


def mixed_layer(layer: int, layers: int) -> bool:
    """Layers to which k_quant_mixed gives 8 bits, after llama.cpp's mixtures; divisions are not rounded."""
    return layer < layers / 8 or layer >= 7 * layers / 8 or (layer - round(layers / 8)) % 3 == 2


# -- bytes ------------------------------------------------------------------------------------------------

_FLOATS = {"NONE": 0, "F16": 2, "BF16": 2, "F32": 4}
_INTEGERS = re.compile(r"(GPTQ|AWQ|AUTOROUND|CT)(\d)-(ROW|G(\d+))")
_BLOCKS = re.compile(r"ONNX(\d)-G(\d+)-F(16|32)(-ZP)?")
_NF4_BLOCK = 64


@lru_cache(maxsize=65536)
def kind_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of one tensor; ``shape`` in ggml's order (columns, rows, experts), each expert a matrix of its own.

    "F16+ONNX4-G32-F16" is one that is stored twice, as a table and as a matrix.

    GPTQ: qweight, qzeros (stored even when symmetric), fp16 scales, g_idx (GPTQModel, nn_modules/qlinear,
    _register_gptq_buffers), whether symmetric or not; AWQ the same without g_idx (AWQuantLinear); AutoRound as GPTQ,
    whose layout it is written in. Compressed-tensors: 16-bit scales, integers packed into int32 with two int64 for the
    shape, but those of W8A8 and FP8 one to a byte. bitsandbytes: NF4 with an f32 scale per 64 and no second
    quantization (functional.py, quantize_4bit), its 16 values in f32 and a JSON record; int8 with an f32 scale per row
    and a byte that names the format. ONNX: MatMulNBits, scales in the graph's floats.
    """
    if "+" in kind:
        return sum(kind_bytes(one, shape) for one in kind.split("+"))
    elements = 1
    for n in shape:
        elements *= n
    if kind in _FLOATS:
        return elements * _FLOATS[kind]
    columns, rows = shape[0], elements // shape[0]
    matrices = elements // (columns * shape[1])
    if kind in ("FP8", "INT8"):
        return elements + 2 * rows
    if kind == "NF4":
        record = json.dumps(
            {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [shape[1], columns]}
        )
        return -(-elements // 2) + 4 * -(-elements // _NF4_BLOCK) + matrices * (4 * 16 + len(record))
    if kind == "LLM.INT8":
        return elements + 4 * rows + matrices
    blocks = _BLOCKS.fullmatch(kind)
    if blocks:
        bits, block, floats, zeros = int(blocks[1]), int(blocks[2]), int(blocks[3]), blocks[4]
        per_row = -(-columns // block)
        points = -(-per_row * bits // 8) if zeros else 0
        return rows * (per_row * block * bits // 8 + per_row * floats // 8 + points)
    integers = _INTEGERS.fullmatch(kind)
    if integers is None:
        raise Unsupported(f"how {kind} is stored is not known")
    if integers[1] != "CT":
        return matrices * sum(size for _, size in packed(kind, columns, rows // matrices).values())
    bits = int(integers[2])
    groups = columns // int(integers[4]) if integers[4] else 1
    return rows * 4 * -(-columns * bits // 32) + 2 * groups * rows + 16 * matrices


def blocks(kind: str, shape: tuple[int, ...]) -> int:
    """Blocks of an ONNX matrix, each with a scale; 0 for what has none."""
    found = _BLOCKS.fullmatch(kind.rpartition("+")[2])
    if found is None:
        return 0
    return math.prod(shape) // shape[0] * -(-shape[0] // int(found[2]))


def packed(kind: str, columns: int, rows: int) -> Mapping[str, tuple[str, int]]:
    """The tensors that one matrix of GPTQ, AWQ or AutoRound becomes: name -> type (safetensors' word) and bytes.

    "" is the model's own type of 16 bits, which AWQ's scales have.
    """
    integers = _INTEGERS.fullmatch(kind)
    if integers is None or integers[1] == "CT":
        raise Unsupported(f"how {kind} is stored is not known")
    bits = int(integers[2])
    groups = columns // int(integers[4]) if integers[4] else 1
    awq = integers[1] == "AWQ"
    parts = {
        "qweight": ("I32", columns * rows * bits // 8),
        "qzeros": ("I32", groups * rows * bits // 8),
        "scales": ("" if awq else "F16", 2 * groups * rows),
    }
    return parts if awq else {**parts, "g_idx": ("I32", 4 * columns)}


_ENTRIES = {"GPTQ": 4, "AUTOROUND": 4, "AWQ": 3, "CT": 3, "FP8": 2, "INT8": 2, "LLM": 3, "NF4": 4}
"""Tensors that a file holds for each matrix, by the start of its kind."""


@lru_cache(maxsize=1024)
def container_bytes(spec: ModelSpec, name: str, *, half: bool = False) -> int:
    """Bytes of a file that are no tensor of the model: of a checkpoint at most, of an ONNX graph estimated.

    A safetensors header has 100 to 130 bytes for each tensor (its name, type, shape and offsets, which grow with the
    model); an ONNX graph its table of cosines and sines, and its nodes.
    """
    scheme = parse(name)
    if scheme.family == "onnx":
        return rope_table_bytes(spec, half=half) + _node_bytes(spec, scheme, half=half)
    kind = matrix_kind(scheme) or "BF16"
    per_matrix = next((count for start, count in _ENTRIES.items() if kind.startswith(start)), 1)
    entries = sum(
        (t.shape[2] if len(t.shape) > 2 else 1) * (per_matrix if is_linear(t) else 1) for t in spec.tensors
    )
    return 8 + 136 * entries


def rope_table_bytes(spec: ModelSpec, *, half: bool) -> int:
    """Bytes of the cosines and sines in an ONNX graph: 2 x positions trained on x half a head, in its floats."""
    return 2 * spec.context_train * (spec.head_dim // 2) * (2 if half else 4)


def _node_bytes(spec: ModelSpec, scheme: Scheme, *, half: bool) -> int:
    """Bytes of model.onnx itself, fitted: within 2 KB for models of 4 to 8 layers of six architectures.

    Zero points and blocks are named tensors and attributes of each matrix; a bias is a node of its own (those of
    queries, keys and values together), so are norms beyond two a layer, and on a CPU the norms of queries and keys.
    """
    parts = {t.name.split(".", 2)[2] for t in spec.tensors if t.name.startswith("blk.")}
    biases = len({"attn_qkv.bias" if p in _QKV_BIASES else p for p in parts if p.endswith(".bias")})
    norms = len([p for p in parts if p.endswith("_norm.weight") and p not in _HEAD_NORMS]) - 2
    layer = (5_500 if scheme.bits == 16 else 8_600 if scheme.mixed else 7_400) + 425 * biases + 575 * norms
    if "attn_q_norm.weight" in parts:
        layer += 1_100 if half else 3_200
    return 3_400 + layer * spec.layers


_QKV_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
_HEAD_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")
