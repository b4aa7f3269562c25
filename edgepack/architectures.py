"""Architectures beyond the converter's own: their tensors from a config, and which layers cache what.

Each is described by the hyperparameters its GGUF carries, and the caches follow from those exactly as llama.cpp
derives them (src/models/<architecture>.cpp, load_arch_hparams; llama-model.cpp, create_memory). So a config.json
and a GGUF file take the same path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgepack.errors import BadInput, Unsupported

Key = int | tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    name: str
    """GGUF name, e.g. blk.0.attn_q.weight."""
    shape: tuple[int, ...]
    """ggml order: ne[0] is the contiguous dimension (columns)."""

    @property
    def elements(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayers:
    """Layers that keep a KV cache of one kind."""

    count: int
    heads: int
    key_dim: int
    value_dim: int
    """0 when the keys hold the values too (MLA)."""
    window: int | None = None
    """Sliding window in tokens; None is full attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caches:
    kv: tuple[KvLayers, ...]
    period: int
    """With windows: distance between layers of full attention, 0 without."""
    recurrent_bytes: int
    """State of all recurrent layers for one sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a config.json describes, in GGUF's terms."""

    architecture: str
    keys: Mapping[str, Key]
    """Hyperparameters without the architecture's prefix; per-layer ones as tuples."""
    tensors: tuple[Tensor, ...]


class Config:
    """Typed access to a config.json: what is missing or of another kind is named."""

    def __init__(self, values: Mapping[str, object], name: str) -> None:
        self.values = values
        self.name = name

    def number(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadInput(f"{self.name}: config field {key} must be a positive whole number, not {value!r}")
        if value > 1 << 40:
            raise BadInput(f"{self.name}: config field {key} is {value}, which no model has")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise BadInput(f"{self.name}: config field {key} must be true or false, not {value!r}")
        return value

    def rope_type(self, *also: str) -> str:
        """Kind of rope scaling: default, linear, yarn, llama3 or one of ``also``; else Unsupported."""
        for key in ("rope_parameters", "rope_scaling"):
            scaling = self.values.get(key)
            if not isinstance(scaling, Mapping):
                continue
            scaling = scaling.get("full_attention", scaling)
            kind = scaling.get("rope_type", scaling.get("type", "default"))
            if kind not in ("default", "linear", "yarn", "llama3", *also):
                raise Unsupported(f"{self.name}: rope_scaling type {kind!r} is not known")
            return str(kind)
        return "default"

    def refuse(self, key: str, *allowed: object) -> None:
        """Unsupported when the field is there with a value that changes the shapes in a way not known."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise Unsupported(f"{self.name}: config field {key} = {value!r} is not supported")

    def kinds(self, layers: int) -> tuple[str, ...] | None:
        """layer_types, when the config has them."""
        found = self.values.get("layer_types")
        if found is None:
            return None
        if not isinstance(found, list | tuple) or len(found) != layers:
            raise BadInput(f"{self.name}: config field layer_types must name each of the {layers} layers")
        return tuple(str(kind) for kind in found)


def read(model_type: str, config: Config) -> Layout | None:
    """The layout of an architecture that is planned for only; None for a model_type not among them.

    Raises BadInput and Unsupported for fields that are missing or change the shapes in a way not known.
    """
    reader = _READERS.get(model_type)
    return None if reader is None else reader(config)


def caches(architecture: str, keys: Mapping[str, Key], *, name: str) -> Caches:
    """KV layers and recurrent state. Raises Unsupported for hyperparameters that llama.cpp would refuse."""
    fields = _Fields(keys, name)
    layers = fields.number("block_count") - fields.number("nextn_predict_layers", 0)
    if layers < 1 or layers > 1024:
        raise BadInput(f"{name}: {layers} layers is not what any model has")
    shared = _shared_layers(architecture, fields)
    recurrent = _recurrent_layers(architecture, fields, layers)
    window, sliding = _sliding_layers(architecture, fields, layers)
    heads = fields.each("attention.head_count", layers)
    kv_heads = fields.each("attention.head_count_kv", layers, heads)
    whole = fields.number("embedding_length") // (heads[0] or 1)
    key_dim = fields.number("attention.key_length", whole)
    value_dim = fields.number("attention.value_length", whole)
    if fields.number("attention.key_length_mla", 0) and fields.number("attention.value_length_mla", 0):
        value_dim = 0  # llama-kv-cache.cpp: with MLA the latent row is key and value
    short_key = fields.number("attention.key_length_swa", key_dim)
    short_value = fields.number("attention.value_length_swa", value_dim)
    counts: dict[tuple[bool, int, int, int], int] = {}
    for il in range(layers - shared):
        if recurrent[il] or not kv_heads[il]:
            continue
        dims = (short_key, short_value) if sliding[il] else (key_dim, value_dim)
        kind = (sliding[il], kv_heads[il], *dims)
        counts[kind] = counts.get(kind, 0) + 1
    full = [il for il in range(layers) if not sliding[il]]
    return Caches(
        kv=tuple(
            KvLayers(count=n, heads=h, key_dim=k, value_dim=v, window=window if short else None)
            for (short, h, k, v), n in sorted(counts.items())
        ),
        period=(full[0] + 1 if full else layers + 1) if window else 0,
        recurrent_bytes=4 * sum(recurrent) * _state(fields) if any(recurrent) else 0,
    )


# -- what llama.cpp makes of the hyperparameters ------------------------------------------------------------

_PERIODS: Mapping[str, tuple[int, int]] = {
    "gemma2": (2, 4096),
    "gemma3n": (5, 0),
    "gemma4": (0, 0),
    "cohere2": (4, 0),
    "olmo2": (4, 0),
    "gpt-oss": (2, 0),
    "llama4": (4, 8192),
}
"""Layer il has full attention iff il % period == period - 1, unless the GGUF lists the layers; and the window
where the GGUF does not say. Llama 4's windows are chunks of 8192; Phi-3's is switched off (phi3.cpp)."""

_DELTA_NET = ("qwen3next", "qwen35", "qwen35moe")

PLANNED: tuple[str, ...] = (
    *_PERIODS, *_DELTA_NET, "lfm2", "phi3", "granite", "smollm3", "minicpm", "deepseek2", "mistral3",
)  # fmt: skip
"""GGUF architectures that are planned for, and not converted."""


class _Fields:
    """Typed access to hyperparameters."""

    def __init__(self, keys: Mapping[str, Key], name: str) -> None:
        self.keys = keys
        self.name = name

    def number(self, key: str, default: int | None = None) -> int:
        value = self.keys.get(key, default)
        if isinstance(value, tuple) and value and len(set(value)) == 1:
            return value[0]
        if not isinstance(value, int) or value < 0:
            raise Unsupported(f"{self.name}: GGUF key {key} is {value!r}, not one whole number")
        return value

    def each(self, key: str, layers: int, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        value = self.keys.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, tuple):
            if len(value) < layers:
                raise BadInput(f"{self.name}: GGUF key {key} has {len(value)} values for {layers} layers")
            return value[:layers]
        return (self.number(key),) * layers


def _shared_layers(architecture: str, fields: _Fields) -> int:
    """Last layers that read an earlier layer's cache."""
    if architecture == "gemma3n":
        return max(0, fields.number("block_count") - 20)  # gemma3n.cpp, n_layer_kv_from_start
    return fields.number("attention.shared_kv_layers", 0) if architecture == "gemma4" else 0


def _sliding_layers(architecture: str, fields: _Fields, layers: int) -> tuple[int, tuple[bool, ...]]:
    period, window = _PERIODS.get(architecture, (0, 0))
    given = fields.number("attention.sliding_window", window)
    if architecture == "llama4":
        given = window if given else 0
    if architecture not in _PERIODS or not given:
        return 0, (False,) * layers
    listed = fields.keys.get("attention.sliding_window_pattern")
    if isinstance(listed, tuple):
        return given, tuple(bool(x) for x in fields.each("attention.sliding_window_pattern", layers))
    if architecture == "gemma4":
        raise Unsupported(f"{fields.name}: the GGUF does not list Gemma 4's sliding layers")
    period = period if listed is None else listed
    return given, tuple(period == 0 or il % period < period - 1 for il in range(layers))


def _recurrent_layers(architecture: str, fields: _Fields, layers: int) -> tuple[bool, ...]:
    if architecture == "lfm2":
        return tuple(n == 0 for n in fields.each("attention.head_count_kv", layers))
    if architecture not in _DELTA_NET:
        return (False,) * layers
    if "attention.recurrent_layers" in fields.keys:
        return tuple(bool(x) for x in fields.each("attention.recurrent_layers", layers))
    interval = fields.number("full_attention_interval", 4) or 4
    return tuple((il + 1) % interval != 0 for il in range(layers))


def _state(fields: _Fields) -> int:
    """Numbers that one recurrent layer keeps for a sequence (llama-hparams.cpp, n_embd_r, n_embd_s)."""
    if "shortconv.l_cache" in fields.keys:
        return fields.number("embedding_length") * (fields.number("shortconv.l_cache") - 1)
    inner, state = fields.number("ssm.inner_size"), fields.number("ssm.state_size")
    convolved = inner + 2 * fields.number("ssm.group_count") * state
    return (fields.number("ssm.conv_kernel") - 1) * convolved + state * inner


# -- from config.json ---------------------------------------------------------------------------------------

_Block = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """The numbers all decoders have."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    dim: int
    vocab: int
    tied: bool
    context: int

    def keys(self, **more: Key) -> dict[str, Key]:
        return {
            "block_count": self.layers,
            "context_length": self.context,
            "embedding_length": self.hidden,
            "feed_forward_length": self.ffn,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.dim,
            "attention.value_length": self.dim,
            "vocab_size": self.vocab,
            **more,
        }

    def attention(self, *, dim: int | None = None) -> _Block:
        dim = dim or self.dim
        return {
            "attn_norm.weight": (self.hidden,),
            "attn_q.weight": (self.hidden, self.heads * dim),
            "attn_k.weight": (self.hidden, self.kv_heads * dim),
            "attn_v.weight": (self.hidden, self.kv_heads * dim),
            "attn_output.weight": (self.heads * dim, self.hidden),
        }

    def qk_norm(self, *, dim: int | None = None) -> _Block:
        return {"attn_q_norm.weight": (dim or self.dim,), "attn_k_norm.weight": (dim or self.dim,)}

    def gated(self, ffn: int | None = None) -> _Block:
        ffn = ffn or self.ffn
        return {
            "ffn_norm.weight": (self.hidden,),
            "ffn_gate.weight": (self.hidden, ffn),
            "ffn_up.weight": (self.hidden, ffn),
            "ffn_down.weight": (ffn, self.hidden),
        }

    def sandwich(self) -> _Block:
        return {"post_attention_norm.weight": (self.hidden,), "post_ffw_norm.weight": (self.hidden,)}

    def layout(
        self,
        architecture: str,
        keys: Mapping[str, Key],
        blocks: Sequence[_Block],
        *,
        norm: str = "output_norm.weight",
        extra: Sequence[Tensor] = (),
    ) -> Layout:
        outer = [
            Tensor(name="token_embd.weight", shape=(self.hidden, self.vocab)),
            Tensor(name=norm, shape=(self.hidden,)),
            *extra,
        ]
        if not self.tied:
            outer.append(Tensor(name="output.weight", shape=(self.hidden, self.vocab)))
        inner = [
            Tensor(name=f"blk.{il}.{part}", shape=shape)
            for il, block in enumerate(blocks)
            for part, shape in block.items()
        ]
        return Layout(architecture=architecture, keys=keys, tensors=(*outer, *inner))


def _sizes(config: Config, *, tied: bool, dim: int | None = None, ffn: int | None = None) -> _Sizes:
    heads, hidden = config.number("num_attention_heads"), config.number("hidden_size")
    if config.values.get("head_dim") is None and dim is None and hidden % heads != 0:
        raise BadInput(
            f"{config.name}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    sizes = _Sizes(
        layers=config.number("num_hidden_layers"),
        hidden=hidden,
        ffn=ffn or config.number("intermediate_size"),
        heads=heads,
        kv_heads=config.number("num_key_value_heads", heads),
        dim=config.number("head_dim", dim or hidden // heads),
        vocab=config.number("vocab_size"),
        tied=config.flag("tie_word_embeddings", tied),
        context=config.number("max_position_embeddings", 2048),
    )
    if sizes.layers > 1024:
        raise BadInput(f"{config.name}: {sizes.layers} layers is more than any model has")
    if sizes.heads % sizes.kv_heads != 0:
        raise BadInput(f"{config.name}: {heads} heads is not a multiple of {sizes.kv_heads} KV heads")
    return sizes


def _plain(config: Config, architecture: str, *, tied: bool) -> Layout:
    """Llama's blocks under another name: SmolLM3, Granite 3/4 dense, MiniCPM, Ministral 3."""
    config.refuse("attention_bias", False)
    config.refuse("mlp_bias", False)
    config.refuse("num_local_experts", 0)
    config.rope_type()
    sizes = _sizes(config, tied=tied)
    return sizes.layout(architecture, sizes.keys(), [{**sizes.attention(), **sizes.gated()}] * sizes.layers)


def _smollm3(config: Config) -> Layout:
    return _plain(config, "smollm3", tied=True)


def _granite(config: Config) -> Layout:
    """Granite 4.0 micro calls itself a hybrid whose layers all have attention (conversion/granite.py)."""
    kinds = config.values.get("layer_types")
    if isinstance(kinds, list) and set(kinds) != {"attention"}:
        raise Unsupported(f"{config.name}: granite with Mamba layers (granitehybrid) is not known")
    config.refuse("shared_intermediate_size", config.values.get("intermediate_size"))
    return _plain(config, "granite", tied=True)


def _minicpm(config: Config) -> Layout:
    config.refuse("num_experts", 0)
    return _plain(config, "minicpm", tied=True)


def _mistral3(config: Config) -> Layout:
    return _plain(config, "mistral3", tied=True)


def _phi3(config: Config) -> Layout:
    """Phi-3.5 and Phi-4-mini: fused projections, rope factors for long contexts (conversion/phi.py)."""
    config.refuse("attention_bias", False)
    sizes = _sizes(config, tied=False)
    kind = config.rope_type("longrope", "su")
    partial = config.values.get("partial_rotary_factor")
    share = float(partial) if isinstance(partial, int | float) else 1.0
    rotated = int(share * sizes.dim)
    extra = [
        Tensor(name=f"rope_factors_{span}.weight", shape=(rotated // 2,))
        for span in ("long", "short")
        if kind in ("longrope", "su")
    ]
    heads = sizes.heads + 2 * sizes.kv_heads
    block = {
        "attn_norm.weight": (sizes.hidden,),
        "attn_qkv.weight": (sizes.hidden, heads * sizes.dim),
        "attn_output.weight": (sizes.heads * sizes.dim, sizes.hidden),
        "ffn_norm.weight": (sizes.hidden,),
        "ffn_up.weight": (sizes.hidden, 2 * sizes.ffn),
        "ffn_down.weight": (sizes.ffn, sizes.hidden),
    }
    keys = {**sizes.keys(), "rope.dimension_count": rotated}
    return sizes.layout("phi3", keys, [block] * sizes.layers, extra=extra)


def _gemma2(config: Config) -> Layout:
    config.refuse("attention_bias", False)
    sizes = _sizes(config, tied=True, dim=256)
    kinds = config.kinds(sizes.layers)
    if kinds and kinds != tuple(
        ("sliding_attention", "full_attention")[il % 2] for il in range(sizes.layers)
    ):
        raise Unsupported(f"{config.name}: layer_types is not one sliding layer, then one full layer")
    keys = {**sizes.keys(), "attention.sliding_window": config.number("sliding_window", 4096)}
    block = {**sizes.attention(), **sizes.gated(), **sizes.sandwich()}
    return sizes.layout("gemma2", keys, [block] * sizes.layers)


def _sliding(kinds: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(int(kind == "sliding_attention") for kind in kinds)


def _per_layer_embeddings(sizes: _Sizes, width: int) -> tuple[list[Tensor], _Block]:
    """Gemma 3n and 4: a second embedding table with a row per layer (the E in E2B)."""
    outer = [
        Tensor(name="per_layer_token_embd.weight", shape=(width * sizes.layers, sizes.vocab)),
        Tensor(name="per_layer_model_proj.weight", shape=(sizes.hidden, width * sizes.layers)),
        Tensor(name="per_layer_proj_norm.weight", shape=(width,)),
    ]
    block: _Block = {
        "inp_gate.weight": (sizes.hidden, width),
        "proj.weight": (width, sizes.hidden),
        "post_norm.weight": (sizes.hidden,),
    }
    return outer, block


def _gemma3n(config: Config) -> Layout:
    """Per-layer embeddings, AltUp and LAuReL; vocab_size is padded to the multimodal one (gemma.py)."""
    config.refuse("altup_num_inputs", 4)
    config.refuse("laurel_rank", 64)
    config.refuse("hidden_size_per_layer_input", 256)
    ffn = config.values.get("intermediate_size")
    if isinstance(ffn, list) and len(set(ffn)) == 1:
        config = Config({**config.values, "intermediate_size": ffn[0]}, config.name)
    sizes = _sizes(config, tied=True, dim=256)
    kinds = config.kinds(sizes.layers) or tuple(
        "full_attention" if il % 5 == 4 else "sliding_attention" for il in range(sizes.layers)
    )
    n, rank, hidden = 4, 64, sizes.hidden
    outer, per_layer = _per_layer_embeddings(sizes, 256)
    outer += [
        Tensor(name="altup_proj.weight", shape=(hidden, hidden, n - 1)),
        Tensor(name="altup_unembd_proj.weight", shape=(hidden, hidden, n - 1)),
    ]
    block = {
        **sizes.attention(), **sizes.qk_norm(), **sizes.gated(), **sizes.sandwich(), **per_layer,
        "altup_correct_coef.weight": (n, n),
        "altup_correct_scale.weight": (hidden,),
        "altup_predict_coef.weight": (n, n * n),
        "altup_router.weight": (hidden, n),
        "altup_router_norm.weight": (hidden,),
        "laurel_l.weight": (hidden, rank),
        "laurel_r.weight": (rank, hidden),
        "laurel_post_norm.weight": (hidden,),
    }  # fmt: skip
    keys = {
        **sizes.keys(),
        "attention.sliding_window": config.number("sliding_window"),
        "attention.sliding_window_pattern": _sliding(kinds),
        "attention.shared_kv_layers": config.number("num_kv_shared_layers"),
        "embedding_length_per_layer_input": 256,
    }
    return sizes.layout("gemma3n", keys, [block] * sizes.layers, extra=outer)


def _gemma4(config: Config) -> Layout:
    """Dense Gemma 4: global layers have longer heads, the last layers share caches (gemma4.cpp)."""
    config.refuse("enable_moe_block", False)
    config.refuse("num_experts", 0)
    config.refuse("attention_k_eq_v", False)
    config.refuse("num_global_key_value_heads")
    sizes = _sizes(config, tied=True, dim=256)
    kinds = config.kinds(sizes.layers)
    if kinds is None:
        raise BadInput(f"{config.name}: config field layer_types is missing")
    shared = config.number("num_kv_shared_layers")
    wide = config.number("global_head_dim")
    width = config.number("hidden_size_per_layer_input")
    outer, per_layer = _per_layer_embeddings(sizes, width)
    outer.append(Tensor(name="rope_freqs.weight", shape=(wide // 2,)))
    own = sizes.layers - shared
    double = config.flag("use_double_wide_mlp", False)
    widths = tuple(sizes.ffn * (2 if double and il >= own else 1) for il in range(sizes.layers))
    blocks = []
    for il, kind in enumerate(kinds):
        dim = sizes.dim if kind == "sliding_attention" else wide
        block = {
            **sizes.attention(dim=dim), **sizes.qk_norm(dim=dim), **sizes.gated(widths[il]),
            **sizes.sandwich(), **per_layer, "layer_output_scale.weight": (1,),
        }  # fmt: skip
        if il >= own:
            for part in ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight"):
                del block[part]
        blocks.append(block)
    keys = {
        **sizes.keys(),
        "feed_forward_length": widths if double else sizes.ffn,
        "attention.key_length": wide,
        "attention.value_length": wide,
        "attention.key_length_swa": sizes.dim,
        "attention.value_length_swa": sizes.dim,
        "attention.sliding_window": config.number("sliding_window"),
        "attention.sliding_window_pattern": _sliding(kinds),
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": width,
        "rope.dimension_count": wide,
        "rope.dimension_count_swa": sizes.dim,
    }
    return sizes.layout("gemma4", keys, blocks, extra=outer)


def _lfm2(config: Config) -> Layout:
    ffn = config.number("block_ff_dim", config.number("intermediate_size", 1))
    if config.flag("block_auto_adjust_ff_dim", False):
        multiple = config.number("block_multiple_of")
        factor = config.values.get("block_ffn_dim_multiplier")
        ffn = int(2 * ffn / 3)
        ffn = int(factor * ffn) if isinstance(factor, int | float) else ffn
        ffn = -(-ffn // multiple) * multiple
    sizes = _sizes(config, tied=True, ffn=ffn)
    kinds = config.kinds(sizes.layers)
    if kinds is None:
        raise BadInput(f"{config.name}: config field layer_types is missing")
    taps, hidden = config.number("conv_L_cache", 3), sizes.hidden
    convolution: _Block = {
        "attn_norm.weight": (hidden,),
        "shortconv.conv.weight": (taps, hidden),
        "shortconv.in_proj.weight": (hidden, 3 * hidden),
        "shortconv.out_proj.weight": (hidden, hidden),
    }
    attention = {**sizes.attention(), **sizes.qk_norm()}
    blocks = [{**(convolution if kind == "conv" else attention), **sizes.gated()} for kind in kinds]
    keys = {
        **sizes.keys(),
        "attention.head_count_kv": tuple(0 if kind == "conv" else sizes.kv_heads for kind in kinds),
        "shortconv.l_cache": taps,
    }
    return sizes.layout("lfm2", keys, blocks, norm="token_embd_norm.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class _DeltaNet:
    """Gated delta net of Qwen3-Next and Qwen3.5."""

    taps: int
    key_heads: int
    value_heads: int
    dim: int

    @property
    def inner(self) -> int:
        return self.value_heads * self.dim

    @property
    def convolved(self) -> int:
        return 2 * self.key_heads * self.dim + self.inner

    def keys(self) -> dict[str, Key]:
        return {
            "ssm.conv_kernel": self.taps,
            "ssm.inner_size": self.inner,
            "ssm.state_size": self.dim,
            "ssm.time_step_rank": self.value_heads,
            "ssm.group_count": self.key_heads,
        }

    def block(self, hidden: int) -> _Block:
        return {
            "attn_norm.weight": (hidden,),
            "attn_qkv.weight": (hidden, self.convolved),
            "attn_gate.weight": (hidden, self.inner),
            "ssm_conv1d.weight": (self.taps, self.convolved),
            "ssm_dt.bias": (self.value_heads,),
            "ssm_a": (self.value_heads,),
            "ssm_norm.weight": (self.dim,),
            "ssm_out.weight": (self.inner, hidden),
        }


def _delta_net(config: Config) -> _DeltaNet:
    dim = config.number("linear_key_head_dim")
    if config.number("linear_value_head_dim") != dim:
        raise Unsupported(f"{config.name}: linear attention with keys and values of different sizes")
    return _DeltaNet(
        taps=config.number("linear_conv_kernel_dim"),
        key_heads=config.number("linear_num_key_heads"),
        value_heads=config.number("linear_num_value_heads"),
        dim=dim,
    )


def _hybrid(config: Config, sizes: _Sizes) -> tuple[int, ...]:
    """1 for layers with linear attention."""
    kinds = config.kinds(sizes.layers)
    interval = config.number("full_attention_interval", 4)
    wanted = tuple(int((il + 1) % interval != 0) for il in range(sizes.layers))
    if kinds and tuple(int(kind == "linear_attention") for kind in kinds) != wanted:
        raise Unsupported(f"{config.name}: layer_types is not three linear layers, then one full layer")
    return wanted


def _gated_attention(sizes: _Sizes) -> _Block:
    """Queries carry an output gate beside them, so twice the width."""
    query = {"attn_q.weight": (sizes.hidden, 2 * sizes.heads * sizes.dim)}
    return {**sizes.attention(), **query, **sizes.qk_norm()}


def _qwen35(config: Config) -> Layout:
    """Text tower of Qwen3.5 without its MTP block, which llama-server loads only to draft (qwen35.cpp)."""
    config.refuse("attention_bias", False)
    sizes, net = _sizes(config, tied=True, dim=256), _delta_net(config)
    post = {"post_attention_norm.weight": (sizes.hidden,)}
    gated = {key: shape for key, shape in sizes.gated().items() if key != "ffn_norm.weight"}
    linear = {
        **net.block(sizes.hidden),
        "ssm_beta.weight": (sizes.hidden, net.value_heads),
        "ssm_alpha.weight": (sizes.hidden, net.value_heads),
    }
    blocks = [
        {**(linear if recurrent else _gated_attention(sizes)), **post, **gated}
        for recurrent in _hybrid(config, sizes)
    ]
    rotated = sizes.dim // 4
    keys = {
        **sizes.keys(), **net.keys(),
        "full_attention_interval": config.number("full_attention_interval", 4),
        "rope.dimension_count": rotated,
        "rope.dimension_sections": (11, 11, 10, 0),
    }  # fmt: skip
    return sizes.layout("qwen35", keys, blocks)


def _qwen3next(config: Config) -> Layout:
    config.refuse("attention_bias", False)
    config.refuse("decoder_sparse_step", 1)
    config.refuse("mlp_only_layers", [], ())
    sizes, net = _sizes(config, tied=False, dim=256), _delta_net(config)
    experts, wide = config.number("num_experts"), config.number("moe_intermediate_size")
    shared, hidden = config.number("shared_expert_intermediate_size"), sizes.hidden
    ffn: _Block = {
        "post_attention_norm.weight": (hidden,),
        "ffn_gate_inp.weight": (hidden, experts),
        "ffn_gate_exps.weight": (hidden, wide, experts),
        "ffn_up_exps.weight": (hidden, wide, experts),
        "ffn_down_exps.weight": (wide, hidden, experts),
        "ffn_gate_inp_shexp.weight": (hidden,),
        "ffn_gate_shexp.weight": (hidden, shared),
        "ffn_up_shexp.weight": (hidden, shared),
        "ffn_down_shexp.weight": (shared, hidden),
    }
    linear = {**net.block(hidden), "ssm_ba.weight": (hidden, 2 * net.value_heads)}
    blocks = [
        {**(linear if recurrent else _gated_attention(sizes)), **ffn} for recurrent in _hybrid(config, sizes)
    ]
    keys = {
        **sizes.keys(), **net.keys(),
        "expert_count": experts,
        "expert_used_count": config.number("num_experts_per_tok"),
        "expert_feed_forward_length": wide,
        "expert_shared_feed_forward_length": shared,
        "full_attention_interval": config.number("full_attention_interval", 4),
        "rope.dimension_count": sizes.dim // 4,
    }  # fmt: skip
    return sizes.layout("qwen3next", keys, blocks)


def _olmo2(config: Config) -> Layout:
    config.refuse("attention_bias", False)
    config.refuse("sliding_window", 0)
    sizes = _sizes(config, tied=False)
    norms = {
        "attn_q_norm.weight": (sizes.heads * sizes.dim,),
        "attn_k_norm.weight": (sizes.kv_heads * sizes.dim,),
    }
    block = {**sizes.attention(), **norms, **sizes.gated(), **sizes.sandwich()}
    del block["attn_norm.weight"], block["ffn_norm.weight"]
    return sizes.layout("olmo2", sizes.keys(), [block] * sizes.layers)


def _cohere2(config: Config) -> Layout:
    config.refuse("attention_bias", False)
    config.refuse("sliding_window_pattern", 4)
    sizes = _sizes(config, tied=True)
    block = {**sizes.attention(), **sizes.gated()}
    del block["ffn_norm.weight"]
    keys = {**sizes.keys(), "attention.sliding_window": config.number("sliding_window", 4096)}
    return sizes.layout("cohere2", keys, [block] * sizes.layers)


def _gpt_oss(config: Config) -> Layout:
    sizes = _sizes(config, tied=False, dim=64)
    experts, hidden, wide = config.number("num_local_experts"), sizes.hidden, sizes.ffn
    block = {
        **sizes.attention(),
        "attn_q.bias": (sizes.heads * sizes.dim,),
        "attn_k.bias": (sizes.kv_heads * sizes.dim,),
        "attn_v.bias": (sizes.kv_heads * sizes.dim,),
        "attn_output.bias": (hidden,),
        "attn_sinks.weight": (sizes.heads,),
        "post_attention_norm.weight": (hidden,),
        "ffn_gate_inp.weight": (hidden, experts),
        "ffn_gate_inp.bias": (experts,),
        "ffn_gate_exps.weight": (hidden, wide, experts),
        "ffn_gate_exps.bias": (wide, experts),
        "ffn_up_exps.weight": (hidden, wide, experts),
        "ffn_up_exps.bias": (wide, experts),
        "ffn_down_exps.weight": (wide, hidden, experts),
        "ffn_down_exps.bias": (hidden, experts),
    }
    keys = {
        **sizes.keys(),
        "rope.dimension_count": sizes.dim,
        "attention.sliding_window": config.number("sliding_window", 128),
        "expert_count": experts,
        "expert_used_count": config.number("num_experts_per_tok"),
        "expert_feed_forward_length": wide,
    }
    return sizes.layout("gpt-oss", keys, [block] * sizes.layers)


_READERS: Mapping[str, Callable[[Config], Layout]] = {
    "cohere2": _cohere2,
    "gemma2": _gemma2,
    "gemma3n_text": _gemma3n,
    "gemma4_text": _gemma4,
    "gpt_oss": _gpt_oss,
    "granite": _granite,
    "granitemoehybrid": _granite,
    "lfm2": _lfm2,
    "minicpm": _minicpm,
    "ministral3": _mistral3,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "qwen3_5_text": _qwen35,
    "qwen3_next": _qwen3next,
    "smollm3": _smollm3,
}

MODEL_TYPES: tuple[str, ...] = tuple(sorted(_READERS))
