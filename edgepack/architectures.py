"""Architectures beyond the converter's own: their tensors from a config, and which layers cache what.

Each is described by the hyperparameters its GGUF carries, and the caches follow from those exactly as llama.cpp
derives them (src/models/<architecture>.cpp, load_arch_hparams; llama-model.cpp, create_memory). So a config.json
and a GGUF file take the same path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
    recurrent_layers: int


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

    def count(self, key: str) -> int:
        """A number that may be 0, and is where the field is not there."""
        value = self.values.get(key)
        return 0 if value is None or value == 0 else self.number(key)

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
        if (recurrent[il] and architecture not in _ATTENTION_BESIDE_STATE) or not kv_heads[il]:
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
        period=_period(full, layers) if window else 0,
        recurrent_bytes=4 * sum(recurrent) * _state(fields) if any(recurrent) else 0,
        recurrent_layers=sum(recurrent),
    )


def draft_layers(keys: Mapping[str, Key], *, name: str) -> int:
    """Layers behind the last one that only draft (MTP, "nextn"): they lie in the file and have no cache.

    llama-server loads them only to draft with them (common.cpp, load_mtp), which edgepack never asks for; without
    it their tensors are skipped (TENSOR_SKIP in src/models/{deepseek2,nemotron-h,qwen3next,qwen35}.cpp).
    """
    return _Fields(keys, name).number("nextn_predict_layers", 0)


# -- what llama.cpp makes of the hyperparameters ------------------------------------------------------------

_PERIODS: Mapping[str, tuple[int, int]] = {
    "gemma2": (2, 4096),
    "gemma3n": (5, 0),
    "gemma4": (0, 0),
    "cohere2": (4, 0),
    "olmo2": (4, 0),
    "gpt-oss": (2, 0),
    "llama4": (4, 8192),
    "exaone4": (4, 4096),
    "smallthinker": (4, 0),
}
"""Layer il has full attention iff il % period == period - 1, unless the GGUF lists the layers; and the window
where the GGUF does not say. Llama 4's windows are chunks of 8192; Phi-3's is switched off (phi3.cpp)."""

_FULL_FIRST = ("smallthinker",)
"""Full attention iff il % period == 0 (set_swa_pattern, dense_first)."""
_FIXED_WINDOW: Mapping[str, int] = {"llama4": 8192, "smallthinker": 4096}
"""Windows that llama.cpp does not take from the file."""
_EXAONE4_WITH_WINDOWS = 64
"""Layers of the one Exaone 4 whose windows llama.cpp knows (exaone4.cpp); the 1.2B has none."""

_DELTA_NET = ("qwen3next", "qwen35", "qwen35moe")
_MAMBA2 = ("granitehybrid", "nemotron_h", "nemotron_h_moe", "falcon-h1")
_ATTENTION_BESIDE_STATE = ("falcon-h1",)
"""Every layer has attention and a recurrent state (llama-model.cpp, create_memory)."""

PLANNED: tuple[str, ...] = (
    *_PERIODS, *_DELTA_NET, *_MAMBA2, "lfm2", "phi3", "gemma", "granite", "granitemoe", "smollm3", "minicpm",
    "deepseek2", "mistral3", "qwen3vl", "gpt2",
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
    if given:
        given = _FIXED_WINDOW.get(architecture, given)
    without = architecture == "exaone4" and layers != _EXAONE4_WITH_WINDOWS
    if architecture not in _PERIODS or not given or without:
        return 0, (False,) * layers
    listed = fields.keys.get("attention.sliding_window_pattern")
    if isinstance(listed, tuple):
        return given, tuple(bool(x) for x in fields.each("attention.sliding_window_pattern", layers))
    if architecture == "gemma4":
        raise Unsupported(f"{fields.name}: the GGUF does not list Gemma 4's sliding layers")
    period = period if listed is None else listed
    full = 0 if architecture in _FULL_FIRST else period - 1
    return given, tuple(period == 0 or il % period != full for il in range(layers))


def _period(full: Sequence[int], layers: int) -> int:
    """Distance between the layers of full attention; more than all layers when there is none."""
    if not full:
        return layers + 1
    return full[1] - full[0] if full[0] == 0 and len(full) > 1 else full[0] + 1


def _recurrent_layers(architecture: str, fields: _Fields, layers: int) -> tuple[bool, ...]:
    if architecture == "lfm2":
        return tuple(n == 0 for n in fields.each("attention.head_count_kv", layers))
    if architecture in _ATTENTION_BESIDE_STATE:
        return (True,) * layers
    if architecture in _MAMBA2:
        kv_heads = fields.each("attention.head_count_kv", layers)
        widths = fields.each("feed_forward_length", layers)
        alone = architecture.startswith("nemotron")  # a layer is a mixer or an MLP, never both
        return tuple(n == 0 and not (alone and ff) for n, ff in zip(kv_heads, widths, strict=True))
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

    def attention(self) -> _Block:
        return {
            "attn_norm.weight": (self.hidden,),
            "attn_q.weight": (self.hidden, self.heads * self.dim),
            "attn_k.weight": (self.hidden, self.kv_heads * self.dim),
            "attn_v.weight": (self.hidden, self.kv_heads * self.dim),
            "attn_output.weight": (self.heads * self.dim, self.hidden),
        }

    def qk_norm(self) -> _Block:
        return {"attn_q_norm.weight": (self.dim,), "attn_k_norm.weight": (self.dim,)}

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
    """Granite 3 and 4: dense or with experts, all attention or mostly Mamba-2 (conversion/granite.py)."""
    kinds = config.values.get("layer_types")
    hybrid = isinstance(kinds, list | tuple) and set(kinds) != {"attention"}
    experts = config.count("num_local_experts")
    if not hybrid and not experts:
        config.refuse("shared_intermediate_size", config.values.get("intermediate_size"))
        return _plain(config, "granite", tied=True)
    config.refuse("attention_bias", False)
    config.refuse("mlp_bias", False)
    config.rope_type()
    sizes = _sizes(config, tied=True)
    shared = config.count("shared_intermediate_size")
    if experts:
        wide: _Block = {
            "ffn_norm.weight": (sizes.hidden,),
            **_experts(sizes.hidden, sizes.ffn, experts),
            **_shared_expert(sizes.hidden, shared),
        }
    elif shared != sizes.ffn:
        raise Unsupported(
            f"{config.name}: shared_intermediate_size {shared} is not intermediate_size {sizes.ffn}, and llama.cpp "
            "has one width for both"
        )
    else:
        wide = sizes.gated()
    keys: dict[str, Key] = {
        **sizes.keys(),
        "expert_count": experts,
        "expert_used_count": config.count("num_experts_per_tok") if experts else 0,
        "expert_shared_feed_forward_length": shared if experts else 0,
    }
    if not hybrid:
        return sizes.layout("granitemoe", keys, [{**sizes.attention(), **wide}] * sizes.layers)
    net = _mamba2(
        config, heads="mamba_n_heads", dim="mamba_d_head", state="mamba_d_state", groups="mamba_n_groups",
        taps="mamba_d_conv", bias="mamba_conv_bias",
    )  # fmt: skip
    if net.inner != 2 * sizes.hidden:
        raise Unsupported(
            f"{config.name}: Mamba layers {net.inner} wide are not twice hidden_size {sizes.hidden}, which is all "
            "that llama.cpp loads (granite-hybrid.cpp)"
        )
    config.refuse("mamba_proj_bias", False)
    named = config.kinds(sizes.layers) or ()
    _known_kinds(config, named, "mamba", "attention")
    mixers = {"mamba": net.block(sizes.hidden), "attention": sizes.attention()}
    keys |= {
        **net.keys(),
        "attention.head_count_kv": tuple(sizes.kv_heads if kind == "attention" else 0 for kind in named),
    }
    return sizes.layout("granitehybrid", keys, [{**mixers[kind], **wide} for kind in named])


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
    """Gemma 4: global layers have longer heads, the last layers share caches, and the 26B has experts beside
    its MLP, their gates and up projections in one tensor (gemma4.cpp)."""
    config.refuse("attention_bias", False)
    sizes = _sizes(config, tied=True, dim=256)
    kinds = config.kinds(sizes.layers)
    if kinds is None:
        raise BadInput(f"{config.name}: config field layer_types is missing")
    shared = config.count("num_kv_shared_layers")
    wide = config.number("global_head_dim")
    width = config.count("hidden_size_per_layer_input")
    outer, per_layer = _per_layer_embeddings(sizes, width) if width else ([], {})
    one = config.flag("attention_k_eq_v", False)  # of a full layer the keys are the values too: no attn_v
    few = config.number("num_global_key_value_heads", sizes.kv_heads) if one else sizes.kv_heads
    outer.append(Tensor(name="rope_freqs.weight", shape=(wide // 2,)))
    own = sizes.layers - shared
    double = config.flag("use_double_wide_mlp", False)
    widths = tuple(sizes.ffn * (2 if double and il >= own else 1) for il in range(sizes.layers))
    blocks = []
    full = replace(sizes, dim=wide, kv_heads=few)
    moe, more = _gemma4_experts(config, sizes) if config.flag("enable_moe_block", False) else ({}, {})
    for il, kind in enumerate(kinds):
        mixer = sizes if kind == "sliding_attention" else full
        block = {
            **mixer.attention(), **mixer.qk_norm(), **sizes.gated(widths[il]), **moe,
            **sizes.sandwich(), **per_layer, "layer_output_scale.weight": (1,),
        }  # fmt: skip
        if one and kind != "sliding_attention":
            del block["attn_v.weight"]
        if il >= own:
            for part in ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight"):
                block.pop(part, None)
        blocks.append(block)
    keys = {
        **sizes.keys(),
        "feed_forward_length": widths if double else sizes.ffn,
        "attention.head_count_kv": tuple(sizes.kv_heads if k == "sliding_attention" else few for k in kinds)
        if one
        else sizes.kv_heads,
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
        **more,
    }
    return sizes.layout("gemma4", keys, blocks, extra=outer)


def _gemma4_experts(config: Config, sizes: _Sizes) -> tuple[_Block, dict[str, Key]]:
    experts, wide = config.number("num_experts"), config.number("moe_intermediate_size")
    hidden = sizes.hidden
    block: _Block = {
        "ffn_gate_inp.weight": (hidden, experts),
        "ffn_gate_inp.scale": (hidden,),
        "ffn_gate_up_exps.weight": (hidden, 2 * wide, experts),
        "ffn_down_exps.weight": (wide, hidden, experts),
        "ffn_down_exps.scale": (experts,),
        "pre_ffw_norm_2.weight": (hidden,),
        "post_ffw_norm_1.weight": (hidden,),
        "post_ffw_norm_2.weight": (hidden,),
    }
    keys: dict[str, Key] = {
        "expert_count": experts,
        "expert_used_count": config.number("top_k_experts"),
        "expert_feed_forward_length": wide,
    }
    return block, keys


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


def _drafts(config: Config, sizes: _Sizes, layer: _Block) -> list[_Block]:
    """The MTP blocks that conversion/qwen.py appends where the config names them: a layer and its way in."""
    count = config.count("mtp_num_hidden_layers")
    config.refuse("mtp_use_dedicated_embeddings", False)
    return [{**layer, **_nextn(sizes.hidden)}] * count


def _nextn(hidden: int) -> _Block:
    return {
        "nextn.eh_proj.weight": (2 * hidden, hidden),
        "nextn.enorm.weight": (hidden,),
        "nextn.hnorm.weight": (hidden,),
        "nextn.shared_head_norm.weight": (hidden,),
    }


def _experts(hidden: int, wide: int, count: int) -> _Block:
    return {
        "ffn_gate_inp.weight": (hidden, count),
        "ffn_gate_exps.weight": (hidden, wide, count),
        "ffn_up_exps.weight": (hidden, wide, count),
        "ffn_down_exps.weight": (wide, hidden, count),
    }


def _shared_expert(hidden: int, wide: int) -> _Block:
    """The expert that every token passes; nothing when there is none."""
    return (
        {
            "ffn_gate_shexp.weight": (hidden, wide),
            "ffn_up_shexp.weight": (hidden, wide),
            "ffn_down_shexp.weight": (wide, hidden),
        }
        if wide
        else {}
    )


def _qwen_experts(config: Config, sizes: _Sizes) -> tuple[_Block, dict[str, Key]]:
    """Experts of Qwen3-Next and Qwen3.5: a gate decides how much of the shared one is added."""
    experts, wide = config.number("num_experts"), config.number("moe_intermediate_size")
    shared = config.number("shared_expert_intermediate_size")
    block = {
        **_experts(sizes.hidden, wide, experts),
        **_shared_expert(sizes.hidden, shared),
        "ffn_gate_inp_shexp.weight": (sizes.hidden,),
    }
    keys: dict[str, Key] = {
        "expert_count": experts,
        "expert_used_count": config.number("num_experts_per_tok"),
        "expert_feed_forward_length": wide,
        "expert_shared_feed_forward_length": shared,
    }
    return block, keys


def _qwen35(config: Config) -> Layout:
    """Text tower of Qwen3.5, dense; its MTP block is in the file where the config has mtp_num_hidden_layers."""
    return _qwen35_of(config, "qwen35", _sizes(config, tied=True, dim=256), {}, {})


def _qwen35moe(config: Config) -> Layout:
    values = {"intermediate_size": config.values.get("moe_intermediate_size"), **config.values}
    sizes = _sizes(Config(values, config.name), tied=False, dim=256)
    return _qwen35_of(config, "qwen35moe", sizes, *_qwen_experts(config, sizes))


def _qwen35_of(
    config: Config, architecture: str, sizes: _Sizes, experts: _Block, more: Mapping[str, Key]
) -> Layout:
    config.refuse("attention_bias", False)
    net = _delta_net(config)
    gated = {key: shape for key, shape in sizes.gated().items() if key != "ffn_norm.weight"}
    after = {"post_attention_norm.weight": (sizes.hidden,), **(experts or gated)}
    linear = {
        **net.block(sizes.hidden),
        "ssm_beta.weight": (sizes.hidden, net.value_heads),
        "ssm_alpha.weight": (sizes.hidden, net.value_heads),
    }
    attention = {**_gated_attention(sizes), **after}
    recurrent = _hybrid(config, sizes)
    drafts = _drafts(config, sizes, attention)
    blocks = [{**linear, **after} if linear_layer else attention for linear_layer in recurrent]
    keys: dict[str, Key] = {
        **sizes.keys(), **net.keys(), **more,
        "block_count": sizes.layers + len(drafts),
        "nextn_predict_layers": len(drafts),
        "attention.recurrent_layers": (*recurrent, *(0 for _ in drafts)),
        "full_attention_interval": config.number("full_attention_interval", 4),
        "rope.dimension_count": sizes.dim // 4,
        "rope.dimension_sections": (11, 11, 10, 0),
    }  # fmt: skip
    return sizes.layout(architecture, keys, [*blocks, *drafts])


def _qwen3next(config: Config) -> Layout:
    """Its config names no MTP block, so that one is not counted; it would be in the file and not in memory."""
    config.refuse("attention_bias", False)
    config.refuse("decoder_sparse_step", 1)
    config.refuse("mlp_only_layers", [], ())
    sizes, net = _sizes(config, tied=False, dim=256), _delta_net(config)
    experts, more = _qwen_experts(config, sizes)
    after = {"post_attention_norm.weight": (sizes.hidden,), **experts}
    linear = {**net.block(sizes.hidden), "ssm_ba.weight": (sizes.hidden, 2 * net.value_heads)}
    attention = {**_gated_attention(sizes), **after}
    drafts = _drafts(config, sizes, attention)
    blocks = [{**linear, **after} if recurrent else attention for recurrent in _hybrid(config, sizes)]
    keys: dict[str, Key] = {
        **sizes.keys(), **net.keys(), **more,
        "block_count": sizes.layers + len(drafts),
        "nextn_predict_layers": len(drafts),
        "full_attention_interval": config.number("full_attention_interval", 4),
        "rope.dimension_count": sizes.dim // 4,
    }  # fmt: skip
    return sizes.layout("qwen3next", keys, [*blocks, *drafts])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mamba2:
    """Mamba-2 mixer of Granite 4, Nemotron-H and Falcon-H1."""

    taps: int
    heads: int
    inner: int
    state: int
    groups: int
    bias: bool
    norm: bool = True

    def keys(self) -> dict[str, Key]:
        return {
            "ssm.conv_kernel": self.taps,
            "ssm.inner_size": self.inner,
            "ssm.state_size": self.state,
            "ssm.time_step_rank": self.heads,
            "ssm.group_count": self.groups,
        }

    def block(self, hidden: int) -> _Block:
        convolved = self.inner + 2 * self.groups * self.state
        block: _Block = {
            "attn_norm.weight": (hidden,),
            "ssm_in.weight": (hidden, self.inner + convolved + self.heads),
            "ssm_conv1d.weight": (self.taps, convolved),
            "ssm_dt.bias": (self.heads,),
            "ssm_a": (1, self.heads),
            "ssm_d": (1, self.heads),
            "ssm_out.weight": (self.inner, hidden),
        }
        if self.bias:
            block["ssm_conv1d.bias"] = (convolved,)
        if self.norm:
            block["ssm_norm.weight"] = (self.inner // self.groups, self.groups)
        return block


def _mamba2(
    config: Config, *, heads: str, dim: str, state: str, groups: str, taps: str, bias: str, norm: bool = True
) -> _Mamba2:
    """The mixer, from the config's own names of its fields."""
    count, group_count = config.number(heads), config.number(groups, 1)
    inner = count * config.number(dim)
    if inner % group_count:
        raise BadInput(f"{config.name}: {inner} Mamba channels are not a multiple of {group_count} groups")
    return _Mamba2(
        taps=config.number(taps, 4),
        heads=count,
        inner=inner,
        state=config.number(state),
        groups=group_count,
        bias=config.flag(bias, True),
        norm=norm,
    )


def _known_kinds(config: Config, kinds: Sequence[str], *known: str) -> None:
    for kind in sorted(set(kinds) - set(known)):
        raise Unsupported(f"{config.name}: a layer of kind {kind!r} is not known")


_NEMOTRON_KINDS = {
    **dict.fromkeys(("M", "mamba", "linear_attention"), "mamba"),
    **dict.fromkeys(("*", "attention", "full_attention"), "attention"),
    **dict.fromkeys(("-", "mlp"), "mlp"),
    **dict.fromkeys(("E", "moe"), "moe"),
}


def _nemotron_h(config: Config) -> Layout:
    """Nemotron-H and Nemotron 3: a layer is a Mamba-2 mixer, attention without rope, an MLP or experts.

    Its GGUF says 2^20 tokens of context (conversion/granite.py); the config's own number is what counts here.
    """
    config.refuse("attention_bias", False)
    config.refuse("mamba_proj_bias", False)
    config.refuse("use_bias", False)
    config.refuse("block_configs")
    pattern = config.values.get("hybrid_override_pattern") or config.values.get("layers_block_type")
    if not isinstance(pattern, str | list | tuple) or not pattern:
        raise BadInput(
            f"{config.name}: neither hybrid_override_pattern nor layers_block_type lists the layers"
        )
    _known_kinds(config, [str(kind) for kind in pattern], *_NEMOTRON_KINDS)
    kinds = [_NEMOTRON_KINDS[str(kind)] for kind in pattern]
    if len(kinds) != config.number("num_hidden_layers", len(kinds)):
        raise BadInput(f"{config.name}: {len(kinds)} kinds of layers for num_hidden_layers other than that")
    dim = config.number("head_dim", config.count("attention_head_dim") or None)
    experts = config.count("num_experts_per_tok")
    ffn = config.number("moe_intermediate_size" if experts else "intermediate_size")
    values = {**config.values, "num_hidden_layers": len(kinds), "head_dim": dim, "intermediate_size": ffn}
    sizes = _sizes(Config(values, config.name), tied=False)
    net = _mamba2(
        config, heads="mamba_num_heads", dim="mamba_head_dim", state="ssm_state_size", groups="n_groups",
        taps="conv_kernel", bias="use_conv_bias",
    )  # fmt: skip
    norm = {"attn_norm.weight": (sizes.hidden,)}
    mlp: _Block = {"ffn_up.weight": (sizes.hidden, ffn), "ffn_down.weight": (ffn, sizes.hidden)}
    if config.flag("mlp_bias", False):
        mlp |= {"ffn_up.bias": (ffn,), "ffn_down.bias": (sizes.hidden,)}
    more: dict[str, Key] = {}
    drafts = 0
    moe: _Block = {}
    if experts:
        moe, more = _nemotron_experts(config, sizes)
        drafts = config.count("num_nextn_predict_layers")
        if drafts > 1:
            raise Unsupported(f"{config.name}: {drafts} MTP layers, and llama.cpp's converter knows one")
    blocks = {
        "mamba": net.block(sizes.hidden),
        "attention": sizes.attention(),
        "mlp": {**norm, **mlp},
        "moe": {**norm, **moe},
    }
    if ("moe" in kinds) != bool(experts) or (experts and "mlp" in kinds):
        raise Unsupported(
            f"{config.name}: llama.cpp has MLPs or experts in all layers, and this config has both"
        )
    draft = {
        **sizes.attention(), **moe, **_nextn(sizes.hidden), "post_attention_norm.weight": (sizes.hidden,)
    }  # fmt: skip
    keys: dict[str, Key] = {
        **sizes.keys(), **net.keys(), **more,
        "block_count": len(kinds) + drafts,
        "nextn_predict_layers": drafts,
        "attention.head_count_kv": tuple(
            sizes.kv_heads if kind == "attention" else 0 for kind in (*kinds, *["attention"] * drafts)
        ),
        "feed_forward_length": tuple(
            ffn if kind in ("mlp", "moe") else 0 for kind in (*kinds, *["moe"] * drafts)
        ),
    }  # fmt: skip
    return sizes.layout(
        "nemotron_h_moe" if experts else "nemotron_h",
        keys,
        [blocks[kind] for kind in kinds] + [draft] * drafts,
    )


def _nemotron_experts(config: Config, sizes: _Sizes) -> tuple[_Block, dict[str, Key]]:
    """Experts without gates; with moe_latent_size they work in a narrower space."""
    count, wide = config.number("n_routed_experts"), sizes.ffn
    shared = config.number("moe_shared_expert_intermediate_size")
    latent = config.count("moe_latent_size")
    inside = latent or sizes.hidden
    block: _Block = {
        "ffn_gate_inp.weight": (sizes.hidden, count),
        "exp_probs_b.bias": (count,),
        "ffn_up_exps.weight": (inside, wide, count),
        "ffn_down_exps.weight": (wide, inside, count),
        "ffn_up_shexp.weight": (sizes.hidden, shared),
        "ffn_down_shexp.weight": (shared, sizes.hidden),
    }
    if latent:
        block |= {
            "ffn_latent_down.weight": (sizes.hidden, latent),
            "ffn_latent_up.weight": (latent, sizes.hidden),
        }
    keys: dict[str, Key] = {
        "expert_count": count,
        "expert_used_count": config.number("num_experts_per_tok"),
        "expert_feed_forward_length": wide,
        "expert_shared_feed_forward_length": shared,
        "expert_shared_count": config.number("n_shared_experts", 1),
        "moe_latent_size": latent,
    }
    return block, keys


def _falcon_h1(config: Config) -> Layout:
    """Attention and a Mamba-2 mixer side by side in every layer; llama.cpp names ffn_norm without "weight"."""
    for key in ("attention_bias", "mlp_bias", "projectors_bias", "mamba_proj_bias"):
        config.refuse(key, False)
    config.rope_type()
    sizes = _sizes(config, tied=False)
    net = _mamba2(
        config, heads="mamba_n_heads", dim="mamba_d_head", state="mamba_d_state", groups="mamba_n_groups",
        taps="mamba_d_conv", bias="mamba_conv_bias", norm=config.flag("mamba_rms_norm", False),
    )  # fmt: skip
    if config.number("mamba_d_ssm", net.inner) != net.inner:
        raise BadInput(f"{config.name}: mamba_d_ssm is not mamba_n_heads times mamba_d_head ({net.inner})")
    block = {**sizes.attention(), **net.block(sizes.hidden), **sizes.gated()}
    block["ffn_norm"] = block.pop("ffn_norm.weight")
    return sizes.layout("falcon-h1", {**sizes.keys(), **net.keys()}, [block] * sizes.layers)


_LITE = (26, 27)
"""Layers of the DeepSeek-V2 models whose queries llama.cpp reads without a low rank (deepseek2.cpp, is_lite)."""


def _deepseek(config: Config) -> Layout:
    """DeepSeek-V2, V3 and R1, Kimi K2: latent attention, so that keys and values are one row per token.

    The MTP layer of a checkpoint is not converted (conversion/deepseek.py, skip_mtp), so it is not counted.
    """
    config.refuse("attention_bias", False)
    config.refuse("moe_layer_freq", 1)
    config.rope_type()
    sizes = _sizes(config, tied=False)
    latent, rotated = config.number("kv_lora_rank", 512), config.number("qk_rope_head_dim")
    plain, value = config.number("qk_nope_head_dim"), config.number("v_head_dim")
    low = config.count("q_lora_rank")
    lite = sizes.layers in _LITE or (sizes.layers == 48 and sizes.vocab == 128256)
    if lite == bool(low):
        which = "no q_lora_rank" if not low else f"q_lora_rank {low}"
        raise Unsupported(
            f"{config.name}: {which} with {sizes.layers} layers, which llama.cpp reads otherwise (deepseek2.cpp)"
        )
    hidden, heads = sizes.hidden, sizes.heads
    attention: _Block = {
        "attn_norm.weight": (hidden,),
        "attn_kv_a_mqa.weight": (hidden, latent + rotated),
        "attn_kv_a_norm.weight": (latent,),
        "attn_k_b.weight": (plain, latent, heads),
        "attn_v_b.weight": (latent, value, heads),
        "attn_output.weight": (heads * value, hidden),
    }
    wide_query = heads * (plain + rotated)
    if low:
        attention |= {
            "attn_q_a.weight": (hidden, low),
            "attn_q_a_norm.weight": (low,),
            "attn_q_b.weight": (low, wide_query),
        }
    else:
        attention["attn_q.weight"] = (hidden, wide_query)
    experts, wide = config.number("n_routed_experts"), config.number("moe_intermediate_size")
    shared, first = config.count("n_shared_experts"), config.count("first_k_dense_replace")
    moe = {
        "ffn_norm.weight": (hidden,),
        **_experts(hidden, wide, experts),
        **_shared_expert(hidden, wide * shared),
    }
    if config.values.get("topk_method") == "noaux_tc" or config.values.get("scoring_func") == "sigmoid":
        moe["exp_probs_b.bias"] = (experts,)
    blocks = [
        {**attention, **(sizes.gated() if il < first else moe)} for il in range(sizes.layers)
    ]  # fmt: skip
    keys: dict[str, Key] = {
        **sizes.keys(),
        "attention.head_count_kv": 1,
        "attention.key_length": latent + rotated,
        "attention.value_length": latent,
        "attention.key_length_mla": plain + rotated,
        "attention.value_length_mla": value,
        "attention.kv_lora_rank": latent,
        "attention.q_lora_rank": low,
        "leading_dense_block_count": first,
        "rope.dimension_count": rotated,
        "expert_count": experts,
        "expert_used_count": config.number("num_experts_per_tok"),
        "expert_feed_forward_length": wide,
        "expert_shared_count": shared,
    }
    return sizes.layout("deepseek2", keys, blocks)


def _llama4(config: Config) -> Layout:
    """Text tower of Llama 4: three layers of chunked attention, then a full one; experts in every step-th layer."""
    config.refuse("attention_bias", False)
    config.refuse("attention_chunk_size", _FIXED_WINDOW["llama4"])
    sizes = _sizes(config, tied=False, ffn=config.number("intermediate_size_mlp"))
    kinds = config.kinds(sizes.layers)
    wanted = tuple(
        "full_attention" if il % 4 == 3 else "chunked_attention" for il in range(sizes.layers)
    )  # fmt: skip
    if kinds and kinds != wanted:
        raise Unsupported(f"{config.name}: layer_types is not three chunked layers, then one full layer")
    config.refuse("no_rope_layers", [], [int(il % 4 != 3) for il in range(sizes.layers)])
    experts, wide = config.number("num_local_experts"), config.number("intermediate_size")
    step = config.number("interleave_moe_layer_step", 1)
    rope = config.rope_type()
    moe = {
        "ffn_norm.weight": (sizes.hidden,),
        **_experts(sizes.hidden, wide, experts),
        **_shared_expert(sizes.hidden, wide),
    }
    blocks = [
        {**sizes.attention(), **(sizes.gated() if (il + 1) % step else moe)} for il in range(sizes.layers)
    ]
    keys: dict[str, Key] = {
        **sizes.keys(),
        "rope.dimension_count": sizes.dim,
        "interleave_moe_layer_step": step,
        "expert_count": experts,
        "expert_used_count": config.number("num_experts_per_tok", 1),
        "expert_feed_forward_length": wide,
    }
    extra = [Tensor(name="rope_freqs.weight", shape=(sizes.dim // 2,))] if rope == "llama3" else []
    return sizes.layout("llama4", keys, blocks, extra=extra)


def _mixtral(config: Config) -> Layout:
    """Mixtral is a llama with experts in its GGUF."""
    sizes = _sizes(config, tied=False)
    config.rope_type()
    experts = config.number("num_local_experts")
    block = {
        **sizes.attention(),
        "ffn_norm.weight": (sizes.hidden,),
        **_experts(sizes.hidden, sizes.ffn, experts),
    }
    keys: dict[str, Key] = {
        **sizes.keys(),
        "rope.dimension_count": sizes.dim,
        "expert_count": experts,
        "expert_used_count": config.number("num_experts_per_tok"),
    }
    return sizes.layout("llama", keys, [block] * sizes.layers)


def _exaone4(config: Config) -> Layout:
    """Norms after attention and FFN only; the 32B has three sliding layers, then a full one."""
    config.refuse("attention_bias", False)
    sizes = _sizes(config, tied=False)
    if sizes.heads * sizes.dim != sizes.hidden:
        raise Unsupported(
            f"{config.name}: exaone4 with {sizes.heads} heads of {sizes.dim} for {sizes.hidden}"
        )
    window = config.count("sliding_window")
    kinds = config.kinds(sizes.layers) or _exaone_pattern(config, sizes.layers)
    sliding = tuple(int(kind == "sliding_attention") for kind in kinds)
    wanted = tuple(int(il % 4 != 3) for il in range(sizes.layers))
    if window and any(sliding) and (sizes.layers != _EXAONE4_WITH_WINDOWS or sliding != wanted):
        raise Unsupported(f"{config.name}: llama.cpp knows the windows of the Exaone 4 with 64 layers only")
    block = {**sizes.attention(), **sizes.qk_norm(), **sizes.gated(), **sizes.sandwich()}
    del block["attn_norm.weight"], block["ffn_norm.weight"]
    extra = (
        [Tensor(name="rope_freqs.weight", shape=(sizes.dim // 2,))] if config.rope_type() == "llama3" else []
    )
    keys: dict[str, Key] = {**sizes.keys(), "rope.dimension_count": sizes.dim}
    if window and any(sliding):
        keys |= {"attention.sliding_window": window, "attention.sliding_window_pattern": sliding}
    return sizes.layout("exaone4", keys, [block] * sizes.layers, extra=extra)


def _exaone_pattern(config: Config, layers: int) -> tuple[str, ...]:
    """layer_types from a pattern such as LLLG, or its period."""
    pattern = config.values.get("sliding_window_pattern")
    letters = pattern if isinstance(pattern, str) and pattern else "G"
    if isinstance(pattern, int) and pattern > 0:
        letters = "L" * (pattern - 1) + "G"
    short = ("full_attention", "sliding_attention")
    return tuple(short[letters[il % len(letters)] == "L"] for il in range(layers))


def _olmo3(config: Config) -> Layout:
    """Olmo 2's blocks with three sliding layers, then a full one (conversion/olmo.py)."""
    sizes = _sizes(config, tied=False)
    kinds = config.kinds(sizes.layers) or tuple(
        "full_attention" if il % 4 == 3 else "sliding_attention" for il in range(sizes.layers)
    )
    plain = _olmo2(Config({**config.values, "sliding_window": None}, config.name))
    more: dict[str, Key] = {
        "attention.sliding_window": config.number("sliding_window"),
        "attention.sliding_window_pattern": _sliding(kinds),
    }
    return replace(plain, keys={**plain.keys, **more})


def _smallthinker(config: Config) -> Layout:
    """Experts in every layer; a full layer, then three sliding ones (smallthinker.cpp, dense_first)."""
    config.refuse("attention_bias", False)
    experts, wide = config.number("moe_num_primary_experts"), config.number("moe_ffn_hidden_size")
    config.refuse("moe_enable_secondary_experts", False)
    sizes = _sizes(config, tied=False, ffn=wide)
    listed = config.values.get("sliding_window_layout")
    sliding = isinstance(listed, list) and any(listed)
    if sliding and listed != [int(il % 4 != 0) for il in range(sizes.layers)]:
        raise Unsupported(
            f"{config.name}: sliding_window_layout is not one full layer, then three sliding ones"
        )
    if sliding:
        config.refuse("sliding_window_size", _FIXED_WINDOW["smallthinker"])
    block = {**sizes.attention(), "ffn_norm.weight": (sizes.hidden,), **_experts(sizes.hidden, wide, experts)}
    keys: dict[str, Key] = {
        **sizes.keys(),
        "rope.dimension_count": sizes.dim,
        "expert_count": experts,
        "expert_used_count": config.number("moe_num_active_primary_experts"),
        "expert_feed_forward_length": wide,
        "attention.sliding_window": _FIXED_WINDOW["smallthinker"] if sliding else 0,
    }
    return sizes.layout("smallthinker", keys, [block] * sizes.layers)


def _qwen3vl(config: Config) -> Layout:
    """Text tower of Qwen3-VL: Qwen3's blocks; image features enter at its first layers."""
    config.refuse("attention_bias", False)
    sizes = _sizes(config, tied=True, dim=128)
    block = {**sizes.attention(), **sizes.qk_norm(), **sizes.gated()}
    keys: dict[str, Key] = {
        **sizes.keys(),
        "rope.dimension_count": sizes.dim,
        "rope.dimension_sections": (24, 20, 20, 0),
        "n_deepstack_layers": 3,
    }
    return sizes.layout("qwen3vl", keys, [block] * sizes.layers)


def _gemma(config: Config) -> Layout:
    config.refuse("attention_bias", False)
    sizes = replace(_sizes(config, tied=True, dim=256), tied=True)
    keys: dict[str, Key] = {**sizes.keys(), "rope.dimension_count": sizes.dim}
    return sizes.layout("gemma", keys, [{**sizes.attention(), **sizes.gated()}] * sizes.layers)


def _gpt2(config: Config) -> Layout:
    """Learned positions, fused projections and biases everywhere; its GGUF has no head of its own."""
    hidden, heads = config.number("n_embd"), config.number("n_head")
    ffn = config.number("n_inner", 4 * hidden)
    sizes = _Sizes(
        layers=config.number("n_layer"), hidden=hidden, ffn=ffn, heads=heads, kv_heads=heads,
        dim=hidden // heads, vocab=config.number("vocab_size"), tied=True,
        context=config.number("n_positions", config.number("n_ctx", 1024)),
    )  # fmt: skip
    if hidden % heads or ffn != 4 * hidden:
        raise Unsupported(f"{config.name}: gpt2 with {heads} heads for {hidden} and an MLP of {ffn}")
    matrices: dict[str, tuple[int, int]] = {
        "attn_qkv": (hidden, 3 * hidden),
        "attn_output": (hidden, hidden),
        "ffn_up": (hidden, ffn),
        "ffn_down": (ffn, hidden),
    }
    block: _Block = {}
    for part, shape in matrices.items():
        block |= {f"{part}.weight": shape, f"{part}.bias": shape[1:]}
    for part in ("attn_norm", "ffn_norm"):
        block |= {f"{part}.weight": (hidden,), f"{part}.bias": (hidden,)}
    extra = [
        Tensor(name="position_embd.weight", shape=(hidden, sizes.context)),
        Tensor(name="output_norm.bias", shape=(hidden,)),
    ]
    return sizes.layout("gpt2", sizes.keys(), [block] * sizes.layers, extra=extra)


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
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "exaone4": _exaone4,
    "falcon_h1": _falcon_h1,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3n_text": _gemma3n,
    "gemma4_text": _gemma4,
    "gpt2": _gpt2,
    "gpt_oss": _gpt_oss,
    "granite": _granite,
    "granitemoe": _granite,
    "granitemoehybrid": _granite,
    "granitemoeshared": _granite,
    "kimi_k2": _deepseek,
    "lfm2": _lfm2,
    "llama4_text": _llama4,
    "minicpm": _minicpm,
    "ministral3": _mistral3,
    "mixtral": _mixtral,
    "nemotron_h": _nemotron_h,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "phi3": _phi3,
    "qwen3_5_moe_text": _qwen35moe,
    "qwen3_5_text": _qwen35,
    "qwen3_next": _qwen3next,
    "qwen3_vl_text": _qwen3vl,
    "smallthinker": _smallthinker,
    "smollm3": _smollm3,
}

MODEL_TYPES: tuple[str, ...] = tuple(sorted(_READERS))

NOT_KNOWN: Mapping[str, str] = {
    "bert": "an encoder keeps no cache and generates no text",
    "deepseek_v32": "the cache of its sparse attention's indexer beside the latent one",
    "glm_moe_dsa": "the cache of its sparse attention's indexer beside the latent one",
    "kimi_linear": "the states of its delta attention",
    "mllama": "the cross-attention layers that keep image features",
    "nemotron_nas": "the layers whose attention or MLP was searched away",
}
"""What is missing to plan for a model_type that one may well ask for."""
