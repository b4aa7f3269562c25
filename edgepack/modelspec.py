"""A model as shapes: every tensor, every layer that keeps a KV cache; nothing is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

from edgepack import architectures, ggufheader
from edgepack.architectures import Config as Config
from edgepack.architectures import KvLayers as KvLayers
from edgepack.architectures import Tensor as Tensor
from edgepack.errors import BadInput, NotFound, Unsupported
from edgepack.units import Bytes, pad

_Converted = Literal["llama", "qwen2", "qwen3", "qwen3moe", "gemma3"]

CONVERTED: tuple[str, ...] = get_args(_Converted)
"""Architectures that edgepack converts; the others are planned for, and used from a GGUF that is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A type for every tensor of a model, in its order, chosen for a byte budget."""

    types: tuple[str, ...]
    measured: bool
    """From data; else a plan's guess, which a build replaces."""
    slack: int = 0
    """Bytes of the budget that the guess leaves and a build may yet fill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    name: str
    """What the user called it, or the folder's or catalog's name."""
    architecture: str
    """GGUF architecture, as in general.architecture."""
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    context_train: int
    kv: tuple[KvLayers, ...]
    tensors: tuple[Tensor, ...]
    """Every tensor of the GGUF file, in file order: for a config, the order llama.cpp itself writes in
    (tensors outside the blocks by name, then block by block by name; llama-model-loader.h,
    weight_name_comparer), so that quantizing keeps it."""
    experts: int = 0
    experts_used: int = 0
    expert_ffn: int = 0
    window_period: int = 0
    """With sliding windows: layer il has full attention iff il % window_period == window_period - 1."""
    ignored_window: int | None = None
    """Sliding window of all layers, in tokens, that llama.cpp ignores and the model has elsewhere (Mistral 0.1, Phi-3);
    ``kv`` is without it. None when there is none, or the source is a GGUF."""
    recurrent_bytes: int = 0
    """State per sequence of all recurrent layers."""
    recurrent_layers: int = 0
    draft_layers: int = 0
    """Layers behind the last one that only draft (MTP): in the file, never loaded, without a cache."""
    first_kv_heads: int | None = None
    """KV heads of layer 0 where layers differ (0 for one without attention); llama-quantize asks no other."""
    header_bytes: Bytes | None = None
    """Exact bytes before the tensor data of its GGUF (the same for every scheme, since the converter
    always writes general.file_type and general.quantization_version); None when there is no tokenizer."""
    gguf_types: tuple[str, ...] | None = None
    """Type of each tensor when the source is already a GGUF (its scheme is then fixed); else None."""
    gguf_scheme: str | None = None
    """Name of that GGUF's file type, e.g. Q4_K_M."""
    file_bytes: Bytes | None = None
    """Size of that GGUF on disk."""
    recipe: Recipe | None = None
    """Type of each tensor in a GGUF that fills a byte budget; None until it is decided (allocation.py)."""

    def __hash__(self) -> int:
        """Cheap, since specs are keys of caches and hold hundreds of tensors; equality compares all."""
        return hash((self.name, self.architecture, self.layers, self.hidden, self.vocab, self.header_bytes))

    @property
    def parameters(self) -> int:
        return _parameters(self)

    @property
    def family(self) -> str:
        """The architecture, but mixtral for a llama with experts: that one is planned for and not converted."""
        return "mixtral" if self.architecture == "llama" and self.experts else self.architecture

    def loaded(self, tensor: Tensor) -> bool:
        """Whether llama-server loads the tensor at all: those of layers that only draft it skips."""
        return llama_order(tensor)[0] < self.layers

    def read_share(self, tensor: Tensor) -> float:
        """Part of a matrix that one token reads: of routed experts those that are used, else all of it."""
        return self.experts_used / self.experts if self.experts and "_exps." in tensor.name else 1.0


@lru_cache(maxsize=1024)
def _parameters(spec: ModelSpec) -> int:
    return sum(t.elements for t in spec.tensors)


def from_config(config: Mapping[str, object], *, name: str) -> ModelSpec:
    """The shapes that a Hugging Face ``config.json`` describes, as our converter writes them to GGUF.

    Raises Unsupported naming the model_type or field that is not known, BadInput for a field that is
    missing or not a number.
    """
    model_type = config.get("model_type")
    if model_type in _MULTIMODAL:
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise BadInput(
                f"{name}: model_type {model_type} has no text_config",
                hint="pass the text model's config.json",
            )
        outer = {"tie_word_embeddings": config.get("tie_word_embeddings")}
        config, model_type = {**outer, **text}, _MULTIMODAL[str(model_type)]
    read = _READERS.get(model_type) if isinstance(model_type, str) else None
    if read is None:
        planned = architectures.read(str(model_type), Config(config, name))
        if planned is not None:
            return _with_window(_from_layout(planned, name=name), config)
        known = ", ".join(sorted((*_READERS, *architectures.MODEL_TYPES)))
        missing = architectures.NOT_KNOWN.get(str(model_type))
        raise Unsupported(
            f"{name}: model_type {model_type!r} is not known" + (f": {missing}" if missing else ""),
            hint=f"known model types: {known}; a .gguf of a known architecture also works",
        )
    return _with_window(read(Config(config, name)), config)


_UNSAID_WINDOW: Mapping[str, int] = {"mistral": 4096}
"""Window where the config has no such field (transformers' configuration_mistral.py); a null is none."""


def _with_window(spec: ModelSpec, config: Mapping[str, object]) -> ModelSpec:
    """With the window that all layers have and llama.cpp ignores; kinds of layers are the reader's to tell."""
    if config.get("layer_types") is not None or "use_sliding_window" in config:
        return spec
    window = config.get("sliding_window", _UNSAID_WINDOW.get(str(config.get("model_type"))))
    if not isinstance(window, int) or window <= 0 or any(kind.window for kind in spec.kv):
        return spec
    return replace(spec, ignored_window=window)


def converts(config: Mapping[str, object]) -> bool:
    """Whether edgepack converts checkpoints with this config, by its model_type alone."""
    model_type = config.get("model_type")
    return model_type in _READERS or _MULTIMODAL.get(str(model_type)) in _READERS


def read(path: Path) -> ModelSpec:
    """The shapes of a Hugging Face folder, a bare ``config.json`` or a ``.gguf`` file.

    Reads no weights. Raises NotFound, BadInput for a damaged file, Unsupported for an unknown architecture.
    """
    if not path.exists():
        raise NotFound(f"{path} does not exist", hint="give a model folder, a config.json or a .gguf file")
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            raise BadInput(
                f"{path} has no config.json", hint="give a Hugging Face model folder or a .gguf file"
            )
        return from_config(_json(config), name=path.resolve().name)
    if path.suffix == ".json":
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return from_config(_json(path), name=name)
    return from_gguf(ggufheader.parse(path), name=path.stem)


def from_gguf(header: ggufheader.Header, *, name: str) -> ModelSpec:
    """The shapes that a GGUF header describes. Raises Unsupported for an architecture that is not known."""
    architecture = header.values.get("general.architecture")
    if architecture not in _GGUF_ARCHITECTURES:
        raise Unsupported(
            f"{name}: GGUF architecture {architecture!r} is not known",
            hint=f"known architectures: {', '.join(_GGUF_ARCHITECTURES)}",
        )
    if "split.count" in header.values and header.values["split.count"] not in (0, 1):
        raise Unsupported(
            f"{name}: split GGUF files are not read", hint="merge the parts with llama-gguf-split"
        )
    experts = header.values.get(f"{architecture}.expert_count", 0)
    if architecture in architectures.PLANNED or (architecture == "llama" and experts):
        return _planned_gguf(header, str(architecture), name=name)
    fields = _GgufFields(header, name, str(architecture))
    shapes = {t.name: t.shape for t in header.tensors}
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise BadInput(f"{name}: the GGUF has no token_embd.weight", hint="the file is not a language model")
    layers, hidden = fields.number("block_count"), fields.number("embedding_length")
    heads = fields.number("attention.head_count")
    kv_heads = fields.number("attention.head_count_kv", default=heads)
    if heads < 1 or kv_heads < 1 or layers < 1:
        raise BadInput(f"{name}: the GGUF has {layers} layers, {heads} heads and {kv_heads} KV heads")
    head_dim = fields.number("attention.key_length", default=hidden // heads)
    value_dim = fields.number("attention.value_length", default=hidden // heads)
    window = fields.number("attention.sliding_window", default=0) if architecture == "gemma3" else 0
    pattern = fields.number("attention.sliding_window_pattern", default=_GEMMA3_PERIOD) if window else 0
    return ModelSpec(
        name=name,
        architecture=str(architecture),
        layers=layers,
        hidden=hidden,
        ffn=fields.number("feed_forward_length", default=0),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=embedding[1],
        tied="output.weight" not in shapes,
        context_train=fields.number("context_length"),
        kv=_kv_layers(layers, kv_heads, head_dim, value_dim, window or None, pattern),
        window_period=pattern,
        tensors=tuple(Tensor(name=t.name, shape=t.shape) for t in header.tensors),
        experts=fields.number("expert_count", default=0),
        experts_used=fields.number("expert_used_count", default=0),
        expert_ffn=fields.number("expert_feed_forward_length", default=0),
        header_bytes=Bytes(pad(header.unpadded + _missing_quantize_keys(header), header.alignment)),
        gguf_types=tuple(t.type for t in header.tensors),
        gguf_scheme=_scheme_of(header),
        file_bytes=Bytes(header.file_bytes),
    )


_GGUF_ARCHITECTURES = (*CONVERTED, *architectures.PLANNED)
_MULTIMODAL = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_text",
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl": "qwen3_vl_text",
    "mistral3": "ministral3",
}
"""Configs that hold a vision tower too -> the model_type of their text_config."""

_GEMMA3_PERIOD = 6
"""Layer il of Gemma 3 is global iff il % 6 == 5 (src/models/gemma3.cpp, load_swa_pattern(ml, 6))."""


def _llama(config: Config) -> ModelSpec:
    """Llama 1/2/3 and Mistral (llama.cpp ignores Mistral v0.1's sliding window: src/models/llama.cpp)."""
    attention_bias, mlp_bias = config.flag("attention_bias", False), config.flag("mlp_bias", False)
    shape = _dense(config, "llama", tied=False)
    extra = []
    if config.rope_type() == "llama3":
        extra.append(Tensor(name="rope_freqs.weight", shape=(shape.head_dim // 2,)))
    return _finish(shape, extra, qkv_bias=attention_bias, output_bias=attention_bias, mlp_bias=mlp_bias)


def _qwen2(config: Config) -> ModelSpec:
    shape = _dense(config, "qwen2", tied=False)
    if shape.heads * shape.head_dim != shape.hidden:
        raise Unsupported(
            f"{config.name}: qwen2 with {shape.heads} heads of {shape.head_dim}, hidden_size {shape.hidden}"
        )
    config.rope_type()
    return _finish(shape, [], qkv_bias=True)


def _qwen3(config: Config) -> ModelSpec:
    config.refuse("attention_bias", False)
    config.rope_type()
    return _finish(_dense(config, "qwen3", tied=False, head_dim=128), [], qk_norm=True)


def _qwen3moe(config: Config) -> ModelSpec:
    config.refuse("attention_bias", False)
    config.refuse("mlp_only_layers", [], ())
    config.refuse("decoder_sparse_step", 1)
    config.rope_type()
    shape = _dense(config, "qwen3moe", tied=False, head_dim=128)
    experts = config.values.get("num_experts", config.values.get("num_local_experts"))
    counted = Config({**config.values, "num_experts": experts}, config.name)
    return _finish(
        shape,
        [],
        qk_norm=True,
        experts=counted.number("num_experts"),
        experts_used=counted.number("num_experts_per_tok"),
        expert_ffn=counted.number("moe_intermediate_size"),
    )


def _gemma3(config: Config) -> ModelSpec:
    """Gemma 3 text models; what published configs leave out has Gemma3TextConfig's default (transformers)."""
    config.refuse("attention_bias", False)
    config.refuse("use_bidirectional_attention", False)
    config.rope_type()
    defaults = {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    }
    present = {key: value for key, value in config.values.items() if value is not None}
    filled = Config({**defaults, **present}, config.name)
    shape = _dense(filled, "gemma3", tied=True, head_dim=256)
    kinds = config.values.get("layer_types")
    if isinstance(kinds, list):
        wanted = [
            "full_attention" if il % _GEMMA3_PERIOD == _GEMMA3_PERIOD - 1 else "sliding_attention"
            for il in range(shape.layers)
        ]
        if kinds != wanted:
            raise Unsupported(f"{config.name}: layer_types is not five sliding layers, then one full layer")
    config.refuse("sliding_window_pattern", _GEMMA3_PERIOD)
    window = filled.number("sliding_window")
    return _finish(shape, [], qk_norm=True, sandwich_norms=True, window=window)


_READERS: Mapping[str, Callable[[Config], ModelSpec]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3moe,
    "gemma3_text": _gemma3,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """The numbers all these architectures have in common."""

    name: str
    architecture: _Converted
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    context_train: int


def _dense(config: Config, architecture: _Converted, *, tied: bool, head_dim: int | None = None) -> _Shape:
    heads, hidden = config.number("num_attention_heads"), config.number("hidden_size")
    if config.values.get("head_dim") is None and head_dim is None and hidden % heads != 0:
        raise BadInput(
            f"{config.name}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    shape = _Shape(
        name=config.name,
        architecture=architecture,
        layers=config.number("num_hidden_layers"),
        hidden=hidden,
        ffn=config.number("intermediate_size"),
        heads=heads,
        kv_heads=config.number("num_key_value_heads", default=heads),
        head_dim=config.number("head_dim", default=head_dim or hidden // heads),
        vocab=config.number("vocab_size"),
        tied=config.flag("tie_word_embeddings", tied),
        context_train=config.number("max_position_embeddings", default=2048),
    )
    if shape.layers > 1024:
        raise BadInput(f"{config.name}: {shape.layers} layers is more than any model has")
    if shape.heads % shape.kv_heads != 0:
        raise BadInput(f"{config.name}: {shape.heads} heads is not a multiple of {shape.kv_heads} KV heads")
    return shape


def _finish(
    shape: _Shape,
    extra: list[Tensor],
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    sandwich_norms: bool = False,
    window: int | None = None,
    experts: int = 0,
    experts_used: int = 0,
    expert_ffn: int = 0,
) -> ModelSpec:
    """Lists the tensors (llama.cpp src/models/<architecture>.cpp, load_arch_tensors) and sums up."""
    hidden, ffn, dim = shape.hidden, shape.ffn, shape.head_dim
    query, key = shape.heads * dim, shape.kv_heads * dim
    block: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (hidden, query),
        "attn_k.weight": (hidden, key),
        "attn_v.weight": (hidden, key),
        "attn_output.weight": (query, hidden),
        "ffn_norm.weight": (hidden,),
    }
    if qkv_bias:
        block |= {"attn_q.bias": (query,), "attn_k.bias": (key,), "attn_v.bias": (key,)}
    if output_bias:
        block |= {"attn_output.bias": (hidden,)}
    if qk_norm:
        block |= {"attn_q_norm.weight": (dim,), "attn_k_norm.weight": (dim,)}
    if sandwich_norms:
        block |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
    if experts:
        block |= {
            "ffn_gate_inp.weight": (hidden, experts),
            "ffn_gate_exps.weight": (hidden, expert_ffn, experts),
            "ffn_up_exps.weight": (hidden, expert_ffn, experts),
            "ffn_down_exps.weight": (expert_ffn, hidden, experts),
        }
    else:
        block |= {
            "ffn_gate.weight": (hidden, ffn),
            "ffn_up.weight": (hidden, ffn),
            "ffn_down.weight": (ffn, hidden),
        }
    if mlp_bias:
        block |= {"ffn_gate.bias": (ffn,), "ffn_up.bias": (ffn,), "ffn_down.bias": (hidden,)}
    tensors = [
        Tensor(name="token_embd.weight", shape=(hidden, shape.vocab)),
        Tensor(name="output_norm.weight", shape=(hidden,)),
        *extra,
    ]
    if not shape.tied:
        tensors.append(Tensor(name="output.weight", shape=(hidden, shape.vocab)))
    tensors += [
        Tensor(name=f"blk.{il}.{part}", shape=size)
        for il in range(shape.layers)
        for part, size in block.items()
    ]
    return ModelSpec(
        name=shape.name,
        architecture=shape.architecture,
        layers=shape.layers,
        hidden=hidden,
        ffn=ffn,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=dim,
        vocab=shape.vocab,
        tied=shape.tied,
        context_train=shape.context_train,
        kv=_kv_layers(shape.layers, shape.kv_heads, dim, dim, window, _GEMMA3_PERIOD),
        window_period=_GEMMA3_PERIOD if window else 0,
        tensors=tuple(sorted(tensors, key=llama_order)),
        experts=experts,
        experts_used=experts_used,
        expert_ffn=expert_ffn,
    )


_BLOCK = re.compile(r"blk\.(\d+)\.")


def llama_order(tensor: Tensor) -> tuple[int, str]:
    """Sort key of llama.cpp's own tensor order (src/llama-model-loader.h, weight_name_comparer)."""
    block = _BLOCK.match(tensor.name)
    return (int(block.group(1)) if block else -1, tensor.name)


def _kv_layers(
    layers: int, heads: int, key_dim: int, value_dim: int, window: int | None, period: int
) -> tuple[KvLayers, ...]:
    sliding = sum(1 for il in range(layers) if il % period != period - 1) if window and period else 0
    kinds = (
        KvLayers(count=layers - sliding, heads=heads, key_dim=key_dim, value_dim=value_dim),
        KvLayers(count=sliding, heads=heads, key_dim=key_dim, value_dim=value_dim, window=window),
    )
    return tuple(kind for kind in kinds if kind.count)


def _from_layout(layout: architectures.Layout, *, name: str) -> ModelSpec:
    """A model of an architecture that is planned for only."""
    tensors = tuple(sorted(layout.tensors, key=llama_order))
    return _planned(layout.architecture, layout.keys, tensors, name=name)


def _planned(
    architecture: str, keys: Mapping[str, architectures.Key], tensors: tuple[Tensor, ...], *, name: str
) -> ModelSpec:
    shapes = {t.name: t.shape for t in tensors}
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise BadInput(f"{name}: the GGUF has no token_embd.weight", hint="the file is not a language model")

    def widest(key: str, default: int | None = None) -> int:
        value = keys.get(key, default)
        value = max(value, default=None) if isinstance(value, tuple) else value
        if value is None or value < 0:
            raise Unsupported(f"{name}: GGUF key {architecture}.{key} is {value!r}, not a whole number")
        return value

    heads, hidden = widest("attention.head_count"), widest("embedding_length")
    if heads < 1:
        raise BadInput(f"{name}: the GGUF has {heads} heads")
    caches = architectures.caches(architecture, keys, name=name)
    drafts = architectures.draft_layers(keys, name=name)
    first = keys.get("attention.head_count_kv")
    whole = [kind.heads for kind in caches.kv if kind.window is None] or [kind.heads for kind in caches.kv]
    experts, ffn = widest("expert_count", 0), widest("feed_forward_length", 0)
    return ModelSpec(
        name=name,
        architecture=architecture,
        layers=widest("block_count") - drafts,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=max(whole, default=1),
        head_dim=widest("attention.key_length", hidden // heads),
        vocab=embedding[1],
        tied="output.weight" not in shapes,
        context_train=widest("context_length"),
        kv=caches.kv,
        window_period=caches.period,
        recurrent_bytes=caches.recurrent_bytes,
        recurrent_layers=caches.recurrent_layers,
        draft_layers=drafts,
        first_kv_heads=first[0] if isinstance(first, tuple) and first else None,
        tensors=tensors,
        experts=experts,
        experts_used=widest("expert_used_count", 0),
        expert_ffn=widest("expert_feed_forward_length", ffn if experts else 0),
    )


def _planned_gguf(header: ggufheader.Header, architecture: str, *, name: str) -> ModelSpec:
    keys: dict[str, architectures.Key] = {}
    for full, value in header.values.items():
        prefix, _, key = full.partition(".")
        if prefix != architecture:
            continue
        if isinstance(value, ggufheader.Array) and value.items is not None:
            keys[key] = value.items
        elif isinstance(value, int):
            keys[key] = int(value)
    tensors = tuple(Tensor(name=t.name, shape=t.shape) for t in header.tensors)
    return replace(
        _planned(architecture, keys, tensors, name=name),
        header_bytes=Bytes(pad(header.unpadded + _missing_quantize_keys(header), header.alignment)),
        gguf_types=tuple(t.type for t in header.tensors),
        gguf_scheme=_scheme_of(header),
        file_bytes=Bytes(header.file_bytes),
    )


class _GgufFields:
    """Typed access to one architecture's keys of a GGUF header."""

    def __init__(self, header: ggufheader.Header, name: str, architecture: str) -> None:
        self.header = header
        self.name = name
        self.architecture = architecture

    def number(self, key: str, default: int | None = None) -> int:
        full = f"{self.architecture}.{key}"
        value = self.header.values.get(full, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise Unsupported(f"{self.name}: GGUF key {full} is {value!r}, not one whole number")
        return value


def _scheme_of(header: ggufheader.Header) -> str | None:
    """The file type's name; without the key, what llama.cpp guesses from the most frequent type of the
    matrices (src/llama-model-loader.cpp). None for a file type that is not known."""
    file_type = header.values.get("general.file_type")
    if isinstance(file_type, int):
        return ggufheader.FILE_TYPES.get(file_type)
    matrices = [t.type for t in header.tensors if len(t.shape) > 1]
    if not matrices:
        return None
    common = max(sorted(set(matrices)), key=matrices.count)
    name = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}.get(common, common)
    return name if name in ggufheader.FILE_TYPES.values() else None


def _missing_quantize_keys(header: ggufheader.Header) -> int:
    """Bytes of the two keys llama.cpp's quantizer sets, as far as the file does not have them yet."""
    keys = ("general.quantization_version", "general.file_type")
    return sum(ggufheader.entry_bytes(key, "u32", 0) for key in keys if key not in header.values)


def _json(path: Path) -> Mapping[str, object]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInput(f"{path} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadInput(f"{path} is not a JSON object")
    return data
