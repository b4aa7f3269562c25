"""Hugging Face safetensors to an F16, BF16 or F32 GGUF, tensor by tensor; no torch, never the whole model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

from edgepack import modelspec, schemes
from edgepack.builders import ggufwriter, safetensors, tokenizer
from edgepack.builders.safetensors import Stored
from edgepack.errors import BadInput, Unsupported
from edgepack.ggufheader import ALIGNMENT, FILE_TYPES, Entry, TensorInfo, header_bytes
from edgepack.modelspec import ModelSpec
from edgepack.progress import Progress
from edgepack.units import MIB, Bytes, pad
from edgepack.workspace import require_space, whole_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OutType = Literal["F16", "BF16", "F32"]

_SLAB = 16 * MIB
"""Bytes of one tensor's rows that are converted at a time."""

_QUANTIZATION_VERSION = 2
"""GGML_QNT_VERSION (ggml/include/ggml.h)."""

_BLOCK_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_NAMES: Mapping[str, str] = {
    **_BLOCK_NAMES,
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
"""Where checkpoints keep the text model; Gemma 3's multimodal ones have it below language_model."""
_NOT_TEXT = re.compile(r"(vision_tower|multi_modal_projector)\.|\.rotary_emb\.inv_freq$")


def convert(folder: Path, out: Path, *, outtype: OutType, progress: Progress) -> Path:
    """Writes ``out``, whole or not at all: matrices in ``outtype``, vectors in F32.

    Raises BadInput for a checkpoint that is damaged or does not match its config, Unsupported for what has
    no equal in llama.cpp, NoSpace before the disk is full.
    """
    config = _text_config(_config(folder))
    spec = modelspec.read(folder)
    _refuse(spec, config)
    sources = _sources(folder, spec, config)
    infos = ggufwriter.layout([(t.name, _type(t.shape, outtype), t.shape) for t in spec.tensors])
    head = ggufwriter.header(metadata(folder, outtype=outtype), infos)
    require_space(out.parent, len(head) + _end(infos))
    with (
        whole_file(out) as temporary,
        temporary.open("wb") as stream,
        progress.bar(f"converting {spec.name} to {outtype}", _end(infos)) as advance,
    ):
        stream.write(head)
        for info in infos:
            size = schemes.tensor_bytes(info.type, info.shape)
            written = _write(stream, sources[info.name], info)
            if written != size:
                raise BadInput(f"{folder}: tensor {info.name} gave {written} bytes instead of {size}")
            stream.write(bytes(pad(size, ALIGNMENT) - size))
            advance(pad(size, ALIGNMENT))
    return out


def metadata(folder: Path, *, outtype: OutType = "F16") -> tuple[Entry, ...]:
    """Every key of the GGUF header for a Hugging Face folder; all types of output give as many bytes.

    Reads config.json and the tokenizer's files, no weights. Raises as `convert` does.
    """
    config = _text_config(_config(folder))
    spec = modelspec.read(folder)
    _refuse(spec, config)
    return (*architecture(spec, config, outtype=outtype), *tokenizer.entries(folder, config, spec.vocab))


def header_size(folder: Path) -> Bytes:
    """Exact bytes before the tensor data of the GGUF of a Hugging Face folder, whatever its scheme."""
    small = [f for f in folder.iterdir() if f.suffix in (".json", ".model", ".jinja")]
    return _header_size(
        folder, tuple(sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in small))
    )


@lru_cache(maxsize=4)
def _header_size(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> Bytes:
    """Once per state of the files: tokenizers of 150,000 tokens take a third of a second to read."""
    spec = modelspec.read(folder)
    return Bytes(header_bytes(metadata(folder), ((t.name, len(t.shape)) for t in spec.tensors)))


def planning_only(name: str, architecture: str) -> Unsupported:
    """What a build of an architecture that is only planned for ends with."""
    return Unsupported(
        f"{name} is a {architecture}, which edgepack plans for and does not convert",
        hint="give a GGUF of it, which is used as it is; converted are " + ", ".join(modelspec.CONVERTED),
    )


def stored_type(folder: Path) -> OutType:
    """The type to quantize from: BF16 keeps a BF16 checkpoint as it is; F16 for all others."""
    kinds = {t.dtype for t in safetensors.checkpoint(folder).values() if len(t.shape) > 1}
    return "BF16" if kinds == {"BF16"} else "F16"


def architecture(spec: ModelSpec, config: Mapping[str, object], *, outtype: OutType) -> tuple[Entry, ...]:
    """The general.* keys and those of the architecture (names: gguf-py/gguf/constants.py, Keys)."""
    numbers = _Numbers(config, spec.name)
    arch = spec.architecture
    file_type = next(number for number, name in FILE_TYPES.items() if name == outtype)
    rope = _rope(config)
    theta = numbers.real("rope_theta", 1e6 if arch == "gemma3" else 10000.0, rope)
    entries = [
        Entry(key="general.architecture", kind="str", value=arch),
        Entry(key="general.type", kind="str", value="model"),
        Entry(key="general.file_type", kind="u32", value=file_type),
        Entry(key="general.quantization_version", kind="u32", value=_QUANTIZATION_VERSION),
        Entry(key=f"{arch}.block_count", kind="u32", value=spec.layers),
        Entry(key=f"{arch}.context_length", kind="u32", value=spec.context_train),
        Entry(key=f"{arch}.embedding_length", kind="u32", value=spec.hidden),
        Entry(key=f"{arch}.feed_forward_length", kind="u32", value=spec.ffn),
        Entry(key=f"{arch}.attention.head_count", kind="u32", value=spec.heads),
        Entry(key=f"{arch}.attention.head_count_kv", kind="u32", value=spec.kv_heads),
        Entry(key=f"{arch}.attention.key_length", kind="u32", value=spec.head_dim),
        Entry(key=f"{arch}.attention.value_length", kind="u32", value=spec.head_dim),
        Entry(
            key=f"{arch}.attention.layer_norm_rms_epsilon",
            kind="f32",
            value=numbers.real("rms_norm_eps", 1e-6),
        ),
        Entry(key=f"{arch}.rope.dimension_count", kind="u32", value=spec.head_dim),
        Entry(key=f"{arch}.rope.freq_base", kind="f32", value=theta),
        Entry(key=f"{arch}.vocab_size", kind="u32", value=spec.vocab),
    ]
    windows = [layers.window for layers in spec.kv if layers.window is not None]
    if windows:
        entries.append(Entry(key=f"{arch}.attention.sliding_window", kind="u32", value=windows[0]))
        local = _Numbers(_rope(config, "sliding_attention"), spec.name)
        base = local.real("rope_theta", numbers.real("rope_local_base_freq", 10000.0))
        entries.append(Entry(key=f"{arch}.rope.freq_base_swa", kind="f32", value=base))
    softcap = config.get("final_logit_softcapping")
    if softcap:
        value = numbers.real("final_logit_softcapping", 0.0)
        entries.append(Entry(key=f"{arch}.final_logit_softcapping", kind="f32", value=value))
    if spec.experts:
        entries += [
            Entry(key=f"{arch}.expert_count", kind="u32", value=spec.experts),
            Entry(key=f"{arch}.expert_used_count", kind="u32", value=spec.experts_used),
            Entry(key=f"{arch}.expert_feed_forward_length", kind="u32", value=spec.expert_ffn),
        ]
    entries.extend(_rope_scaling(spec, _Numbers(rope, spec.name)))
    return tuple(entries)


# ── config ──


class _Numbers:
    """Real numbers of a config.json, named when they are something else."""

    def __init__(self, values: Mapping[str, object], name: str) -> None:
        self.values = values
        self.name = name

    def real(self, key: str, default: float | None, also: Mapping[str, object] | None = None) -> float:
        """``also`` is looked at first: newer configs keep rope_theta inside rope_parameters."""
        value = (also or {}).get(key)
        if value is None:
            value = self.values.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadInput(f"{self.name}: config field {key} must be a number, not {value!r}")
        return float(value)


def _refuse(spec: ModelSpec, config: Mapping[str, object]) -> None:
    """Unsupported for settings that llama.cpp's graph of this architecture does not compute."""
    if spec.family not in modelspec.CONVERTED:
        raise planning_only(spec.name, spec.family)
    activations = {"gemma3": ("gelu_pytorch_tanh",)}.get(spec.architecture, ("silu", "swish"))
    activation = config.get("hidden_activation") or config.get("hidden_act") or activations[0]
    problems = {
        f"hidden_act {activation!r} (known: {activations[0]})": activation not in activations,
        "use_sliding_window": config.get("use_sliding_window") is True,
        "partial_rotary_factor": config.get("partial_rotary_factor") not in (None, 1, 1.0),
        "attn_logit_softcapping": bool(config.get("attn_logit_softcapping")),
        "quantization_config (the weights are already quantized)": "quantization_config" in config,
        "mixture of experts": spec.experts > 0,
    }
    if spec.architecture == "gemma3":
        # src/models/gemma3.cpp: scaled by the head size, at 62 layers (27B) by hidden / heads.
        scalar = config.get("query_pre_attn_scalar", 256)
        used = spec.hidden // spec.heads if spec.layers == 62 else spec.head_dim
        problems[f"query_pre_attn_scalar {scalar} (llama.cpp uses {used})"] = scalar != used
    found = [text for text, there in problems.items() if there]
    if found:
        raise Unsupported(f"{spec.name}: {'; '.join(found)}")


def _rope(config: Mapping[str, object], layers: str = "full_attention") -> Mapping[str, object]:
    """Rope settings of one kind of layer: rope_parameters of newer configs, rope_scaling of older ones."""
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if isinstance(value, dict):
            if "full_attention" in value or "sliding_attention" in value:
                inner = value.get(layers)
                return inner if isinstance(inner, dict) else {}
            return value if layers == "full_attention" else {}
    return {}


def _rope_kind(rope: Mapping[str, object]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _rope_scaling(spec: ModelSpec, rope: _Numbers) -> Iterator[Entry]:
    kind = _rope_kind(rope.values)
    if kind not in ("linear", "yarn"):
        return
    prefix = f"{spec.architecture}.rope.scaling"
    yield Entry(key=f"{prefix}.type", kind="str", value=kind)
    yield Entry(key=f"{prefix}.factor", kind="f32", value=rope.real("factor", None))
    if kind == "yarn":
        length = int(rope.real("original_max_position_embeddings", spec.context_train))
        yield Entry(key=f"{prefix}.original_context_length", kind="u32", value=length)
        names = {"extrapolation_factor": "yarn_ext_factor", "attention_factor": "yarn_attn_factor"}
        for key, name in (names | {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}).items():
            if rope.values.get(key) is not None:
                yield Entry(key=f"{prefix}.{name}", kind="f32", value=rope.real(key, None))


def _config(folder: Path) -> Mapping[str, object]:
    path = folder / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} is not a JSON object")
    return value


def _text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    """The language model's part of a multimodal config; ids of special tokens stay visible."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


# ── tensors ──


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """How one GGUF tensor is made."""

    stored: Stored | None
    values: tuple[float, ...] = ()
    """A tensor that no checkpoint holds (rope_freqs)."""
    heads: int = 0
    """Rows are reordered within this many heads, from half-split to neighbouring rotary pairs; 0: not."""
    shift: float = 0.0
    """Added to every element."""


def _sources(folder: Path, spec: ModelSpec, config: Mapping[str, object]) -> Mapping[str, _Source]:
    """Where every tensor of ``spec`` comes from; every tensor of the checkpoint must be used or known."""
    stored = safetensors.checkpoint(folder)
    prefix = next((p for p in _PREFIXES if f"{p}embed_tokens.weight" in stored), None)
    if prefix is None:
        raise BadInput(f"{folder}: no tensor of the checkpoint is called model.embed_tokens.weight")
    head = next(
        (n for n in ("lm_head.weight", "language_model.lm_head.weight") if n in stored), "lm_head.weight"
    )
    names = hf_names(spec, prefix=prefix, head=head)
    sources: dict[str, _Source] = {}
    used = {head} if spec.tied else set()
    for tensor in spec.tensors:
        if tensor.name not in names:
            sources[tensor.name] = _Source(stored=None, values=_rope_freqs(spec, config))
            continue
        name = names[tensor.name]
        if name not in stored:
            raise BadInput(
                f"{folder}: tensor {name} is not in the checkpoint",
                hint="the config describes another model, or files are missing",
            )
        found = stored[name]
        if found.dtype not in safetensors.ITEM_BYTES:
            raise Unsupported(f"{folder}: tensor {name} is {found.dtype}; known are BF16, F16 and F32")
        if found.shape != tensor.shape[::-1]:
            raise BadInput(
                f"{folder}: tensor {name} has the shape {found.shape}, the config says {tensor.shape[::-1]}"
            )
        used.add(name)
        sources[tensor.name] = _Source(
            stored=found, heads=_permuted_heads(spec, tensor.name), shift=_norm_shift(spec, tensor.name)
        )
    unknown = sorted(name for name in stored.keys() - used if not _NOT_TEXT.search(name))
    if unknown:
        raise Unsupported(
            f"{folder}: the checkpoint holds {unknown[0]}, which a {spec.architecture} of this config has not"
            + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
        )
    return sources


def hf_names(spec: ModelSpec, *, prefix: str = "model.", head: str = "lm_head.weight") -> Mapping[str, str]:
    """Name in a Hugging Face checkpoint of each GGUF tensor that is stored there (rope_freqs is not)."""
    inside = _GEMMA_NAMES if spec.architecture == "gemma3" else _BLOCK_NAMES
    outside = {
        "token_embd.weight": f"{prefix}embed_tokens.weight",
        "output_norm.weight": f"{prefix}norm.weight",
        "output.weight": head,
    }
    found: dict[str, str] = {}
    for tensor in spec.tensors:
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", tensor.name)
        if block is not None:
            layer, part, kind = block.groups()
            found[tensor.name] = f"{prefix}layers.{layer}.{inside[part]}.{kind}"
        elif tensor.name != "rope_freqs.weight":
            found[tensor.name] = outside[tensor.name]
    return found


def stored(folder: Path, spec: ModelSpec) -> Mapping[str, Stored]:
    """Where the checkpoint keeps each GGUF tensor of ``spec`` that is stored there. Raises as `convert` does."""
    sources = _sources(folder, spec, _text_config(_config(folder)))
    return {name: source.stored for name, source in sources.items() if source.stored is not None}


def _permuted_heads(spec: ModelSpec, name: str) -> int:
    """llama.cpp rotates neighbouring rows for the llama architecture, transformers halves of a head."""
    if spec.architecture != "llama":
        return 0
    if ".attn_q." in name:
        return spec.heads
    return spec.kv_heads if ".attn_k." in name else 0


def _norm_shift(spec: ModelSpec, name: str) -> float:
    """Gemma's norms multiply by 1 + w (transformers, Gemma3RMSNorm); llama.cpp multiplies by w."""
    return 1.0 if spec.architecture == "gemma3" and name.endswith("norm.weight") else 0.0


def _rope_freqs(spec: ModelSpec, config: Mapping[str, object]) -> tuple[float, ...]:
    """Divisors of the rotary frequencies, head_dim / 2 of them (transformers, _compute_llama3_parameters)."""
    rope = _Numbers(_rope(config), spec.name)
    theta = rope.real("rope_theta", _Numbers(config, spec.name).real("rope_theta", 10000.0))
    factor, length = rope.real("factor", 8.0), rope.real("original_max_position_embeddings", 8192)
    low, high = rope.real("low_freq_factor", 1.0), rope.real("high_freq_factor", 4.0)
    if low >= high or factor <= 0 or length <= 0:
        raise BadInput(
            f"{spec.name}: rope scaling of type llama3 with factors {low} and {high}, {factor} and {length}"
        )
    divisors: list[float] = []
    for pair in range(spec.head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / spec.head_dim)
        if wavelength < length / high:
            divisors.append(1.0)
        elif wavelength > length / low:
            divisors.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(divisors)


def _type(shape: tuple[int, ...], outtype: OutType) -> str:
    return outtype if len(shape) > 1 else "F32"


def _end(infos: tuple[TensorInfo, ...]) -> int:
    last = infos[-1]
    return last.offset + pad(schemes.tensor_bytes(last.type, last.shape), ALIGNMENT)


def _write(stream: BinaryIO, source: _Source, info: TensorInfo) -> int:
    """Writes one tensor's data in slabs of rows and returns the bytes written."""
    import numpy as np

    if source.stored is None:
        return stream.write(np.asarray(source.values, dtype="<f4").tobytes())
    stored = source.stored
    item = safetensors.ITEM_BYTES[stored.dtype]
    rows = stored.shape[0] if stored.shape else 1
    columns = math.prod(stored.shape[1:])
    bits = np.memmap(stored.file, dtype=f"<u{item}", mode="r", offset=stored.offset, shape=(rows, columns))
    order = _rotary_order(rows, source.heads) if source.heads else None
    written = 0
    step = max(1, _SLAB // (columns * item))
    for begin in range(0, rows, step):
        slab = bits[begin : begin + step] if order is None else bits[order[begin : begin + step]]
        written += stream.write(_cast(slab, stored, info, source.shift))
    return written


def _rotary_order(rows: int, heads: int) -> NDArray[np.intp]:
    """Row of the checkpoint for each row of the GGUF: (half, pair) of a head becomes (pair, half)."""
    import numpy as np

    order: NDArray[np.intp] = (
        np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)
    )
    return order


def _cast(bits: NDArray[np.unsignedinteger], stored: Stored, info: TensorInfo, shift: float) -> memoryview:
    """The slab's elements in the GGUF type. Raises BadInput when a value does not fit into F16."""
    import numpy as np

    if stored.dtype == info.type and not shift:
        return np.ascontiguousarray(bits).data.cast("B")
    if stored.dtype == "BF16":
        values = (bits.astype("<u4") << 16).view("<f4")
    else:
        values = np.ascontiguousarray(bits).view(f"<f{bits.dtype.itemsize}").astype("<f4", copy=False)
    if shift:
        values = values + np.float32(shift)
    if info.type == "F32":
        return values.data.cast("B")
    if info.type == "BF16":
        return round_to_bf16(values).data.cast("B")
    with np.errstate(over="raise"):
        try:
            return values.astype("<f2").data.cast("B")
        except FloatingPointError as error:
            raise BadInput(
                f"{stored.file}: tensor {stored.name} has values beyond the range of F16",
                hint="build with --scheme BF16 or a quantized scheme",
            ) from error


def round_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To nearest, ties to even; NaN stays a quiet NaN (ggml-impl.h, ggml_compute_fp32_to_bf16)."""
    import numpy as np

    bits = values.view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 64
    return cast("NDArray[np.uint16]", np.where(np.isnan(values), quiet, rounded).astype("<u2"))
