"""Students cut out of their teacher: which smaller configs there are, how each is written, what it may cost.

Depth leaves layers out (Men et al., ShortGPT, arXiv 2403.03853); width makes those that stay narrower (Muralidharan et
al., Minitron, arXiv 2407.14679). Nothing is loaded here; the weights are cut in builders/distill/prune.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from edgepack import modelspec
from edgepack.errors import BadInput, Unsupported
from edgepack.modelspec import Config, ModelSpec

Dimension = Literal["layers", "ffn", "heads", "hidden"]

DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prune:
    """What of each dimension stays: a share in (0, 1] as a float, a count as an int; None keeps all."""

    layers: float | int | None = None
    ffn: float | int | None = None
    """Channels of every FFN."""
    heads: float | int | None = None
    """Key-value groups of every layer; the query heads of a group go with it."""
    hidden: float | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Nats a token that a student loses against its teacher."""

    nats: float
    low: float
    high: float


def parse(text: str) -> Prune:
    """``layers=0.5,ffn=512``: a number with a point is a share, one without it a count.

    Raises BadInput for other keys, a key given twice, and numbers that are neither.
    """
    found: dict[str, float | int] = {}
    for part in text.split(","):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in DIMENSIONS:
            raise BadInput(
                f"--prune: {key or text!r} is not a dimension",
                hint=f"known are {', '.join(DIMENSIONS)}; for example layers=0.5,ffn=512",
            )
        if key in found:
            raise BadInput(f"--prune: {key} is given twice")
        if not _NUMBER.fullmatch(value):
            raise BadInput(f"--prune: {key}={value} is neither a share such as 0.5 nor a count such as 512")
        found[key] = int(value) if value.isdecimal() else float(value)
    prune = Prune(**found)
    _refuse_nonsense(prune)
    return prune


def label(prune: Prune) -> str:
    """What `parse` reads back as the same value, always in one order."""
    return ",".join(f"{key}={value!r}" for key, value in _given(prune).items())


def sizes(config: Mapping[str, object], prune: Prune) -> Prune:
    """The same in counts that runtimes can use, None where all is kept.

    Layers whose kind follows from their number go in whole periods. Rows stay multiples of 256 where they are (K-quants
    have blocks of 256, ggml-common.h), else of the largest power of two in them: hidden size, FFN, and all heads of a
    layer together. A share is rounded to the nearest such size that is smaller than the teacher's.

    Raises BadInput for what is no size, cannot be cut or keeps everything; Unsupported for a model_type, or one of its
    dimensions, that is not cut.
    """
    _refuse_nonsense(prune)
    family, teacher = _family(config), _teacher(config)
    units = {
        "layers": (teacher.layers, family.period),
        "ffn": (teacher.ffn, _multiple(teacher.ffn)),
        "heads": (teacher.kv_heads, _groups_together(teacher)),
        "hidden": (teacher.hidden, _multiple(teacher.hidden)),
    }
    counts: dict[str, int] = {}
    for key, value in _given(prune).items():
        whole, step = units[key]
        if key != "layers" and key not in family.width:
            raise Unsupported(f"{config['model_type']}: {key} is not cut: {_WHY_NOT_WIDE[family.width]}")
        if isinstance(value, int) and value > whole:
            raise BadInput(f"{key}={value} is more than the teacher has: {whole}")
        if value != (1.0 if isinstance(value, float) else whole):
            counts[key] = _nearest(key, value if isinstance(value, int) else value * whole, whole, step)
    if not counts:
        raise BadInput(
            f"{label(prune) or 'nothing'} keeps everything: {teacher.layers} layers, an FFN of {teacher.ffn}, "
            f"{teacher.kv_heads} groups of heads, a hidden size of {teacher.hidden}",
            hint="cut at least one, for example layers=0.5",
        )
    found = Prune(**counts)
    _refuse_unlike(found, teacher, family)
    return found


def shrunk(
    config: Mapping[str, object], prune: Prune, *, layers: Sequence[int] | None = None
) -> dict[str, object]:
    """The config.json of the student. ``layers``: numbers of those that are kept; the last of `contiguous` without.

    What config.json leaves to be computed from a size that changes is written out (head_dim), lists with a value per
    layer are cut to the kept ones; vocabulary and tied embeddings stay. Raises as `sizes` does, and BadInput for layers
    that are not as many, not in order, or of the wrong kind at their new place.
    """
    found, teacher = sizes(config, prune), _teacher(config)
    count = int(found.layers or teacher.layers)
    kept = contiguous(config, count)[-1] if layers is None else tuple(layers)
    _check_layers(kept, count, teacher, _family(config))
    student = {**config, **_cut_per_layer(config, kept, teacher.layers), "num_hidden_layers": count}
    if found.ffn is not None:
        student["intermediate_size"] = found.ffn
    if found.heads is not None:
        student["num_key_value_heads"] = found.heads
        student["num_attention_heads"] = teacher.heads // teacher.kv_heads * int(found.heads)
    if found.hidden is not None:
        student["hidden_size"] = found.hidden
    if found.heads is not None or found.hidden is not None:
        student["head_dim"] = teacher.head_dim
    modelspec.from_config(student, name="the student")
    return student


def contiguous(config: Mapping[str, object], count: int) -> tuple[tuple[int, ...], ...]:
    """Layers that stay when neighbors are left out, for each place where that can begin, the last place last.

    The first and the last layer always stay where two or more do. Raises Unsupported as `sizes` does.
    """
    _family(config)
    total = _teacher(config).layers
    gone = total - count
    if gone == 0:
        return (tuple(range(total)),)
    places = range(1, count) if count > 1 else (0, 1)
    return tuple((*range(at), *range(at + gone, total)) for at in places)


def every_kth(config: Mapping[str, object], count: int) -> tuple[int, ...] | None:
    """``count`` layers at even distances from the first on, the usual choice; None where kinds forbid it."""
    period, total = _family(config).period, _teacher(config).layers
    kept = tuple(at * total // count for at in range(count))
    return kept if _in_kind(kept, period) else None


def in_kind(config: Mapping[str, object], layers: Sequence[int]) -> bool:
    """Whether each of these layers comes to a place where runtimes take it for the kind of layer that it is."""
    return _in_kind(layers, _family(config).period)


def ladder(config: Mapping[str, object]) -> tuple[Prune, ...]:
    """Sizes to choose from, largest first: about 3/4, 1/2, 3/8 and 1/4 of the parameters, as far as they are reached.

    Half of the depth goes first, then half of the FFN, then both once more. Raises Unsupported as `sizes` does.
    """
    _family(config)
    teacher = _teacher(config)
    path = [(prune, _share(config, prune, teacher)) for prune in _path(config, teacher)]
    found: list[Prune] = []
    for target in _RUNGS:
        prune, share = min(path, key=lambda step: abs(math.log(step[1] / target)), default=(None, 0.0))
        if prune is not None and abs(math.log(share / target)) < _OFF and prune not in found:
            found.append(prune)
    return tuple(found)


def expected(teacher: int, student: int) -> Expected:
    """What a student of ``student`` parameters loses against a teacher of ``teacher``, before anything is measured.

    From the scaling law of Kaplan et al. (arXiv 2001.08361, eq. 1.1), L(N) = (8.8e13 / N) ** 0.076 nats a token, here
    with all parameters, times what known pairs lost by it. Raises BadInput for a size below 1 or a larger student.
    """
    if student < 1 or student > teacher:
        raise BadInput(f"a student of {student} parameters for a teacher of {teacher}")
    nats = (_CRITICAL / student) ** _EXPONENT - (_CRITICAL / teacher) ** _EXPONENT
    return Expected(nats=_MEASURED * nats, low=_LOW * nats, high=_HIGH * nats)


_CRITICAL, _EXPONENT = 8.8e13, 0.076
_MEASURED, _LOW, _HIGH = 1.9, 0.7, 5.0
"""Mean and 90 % prediction interval, log-normal, of what pairs of models lost over what the law says: 2.8 the built-in
teacher cut to 3 of its 6 layers (perplexity 12.0 to 19.3, after 0.4 million tokens of distillation), 2.9 DistilGPT2
(WikiText-103, 16.3 to 21.1, its model card), and 1.1, 1.6 and 1.6 LLaMA 13B to 7B, 33B to 13B and 65B to 33B, each
trained from the start (WikiText-2, 5.09 to 5.68, 4.10 to 5.09, 3.53 to 4.10; README of GPTQ-for-LLaMa). Of the law of
Hoffmann et al. (arXiv 2203.15556) as fitted by Besiroglu et al. (2404.10102) they lost 1.0 to 6.5 times as much."""

_NUMBER = re.compile(r"\d+(\.\d+)?(e-\d+)?")
_RUNGS = (3 / 4, 1 / 2, 3 / 8, 1 / 4)
_OFF = math.log(1.25)
"""A rung is left out when no student comes nearer than this factor."""
_BLOCK = 256


# ── what is cut, by architecture ──


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    period: int = 1
    """Layers il and il + period are of one kind, and runtimes know a layer's kind by its number alone."""
    width: tuple[Dimension, ...] = ("ffn", "heads", "hidden")
    square: bool = False
    """llama.cpp or vLLM reads the attention's output projection as hidden × hidden, whatever head_dim says."""
    even: bool = False
    """transformers' config class refuses a hidden size that is no multiple of the number of heads."""
    apart: int = 0
    """A number of layers by which llama.cpp tells one model from its siblings, and scales its queries otherwise."""


_NO_HIDDEN: tuple[Dimension, ...] = ("ffn", "heads")
_FFN_ONLY: tuple[Dimension, ...] = ("ffn",)

_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(even=True),
    "mistral": _Family(),
    "qwen2": _Family(square=True),
    "qwen3": _Family(),
    "qwen3_moe": _Family(width=()),
    "mixtral": _Family(width=()),
    "granite": _Family(),
    "smollm3": _Family(period=4),
    "phi3": _Family(square=True),
    "olmo2": _Family(width=_FFN_ONLY),
    "gemma": _Family(width=_NO_HIDDEN),
    "gemma2": _Family(period=2, width=_NO_HIDDEN, even=True, apart=46),
    "gemma3_text": _Family(period=6, width=_NO_HIDDEN, even=True, apart=62),
}
"""llama.cpp src/models/<architecture>.cpp: smollm3 (n_no_rope_layer_step), gemma2 and gemma3 (load_swa_pattern and
f_attention_scale), qwen2 and phi3 (load_arch_tensors)."""

_WHY_NOT_WIDE: Mapping[tuple[Dimension, ...], str] = {
    (): "only whole layers of a mixture of experts are",
    _FFN_ONLY: "its query and key norms go over all heads at once",
    _NO_HIDDEN: "its embeddings are scaled by the root of the hidden size, and the head is tied to them",
}

_NOT_CUT: Mapping[str, str] = {
    **dict.fromkeys(
        ("gemma3", "gemma3n", "gemma4", "gemma4_unified", "llama4", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "mistral3"),
        "it holds a vision tower; give the text model alone",
    ),
    **dict.fromkeys(("gemma3n_text", "gemma4_text"), "its layers have embeddings of their own and share caches"),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm2", "nemotron_h", "falcon_h1", "granitemoehybrid"),
        "its layers are of several kinds, with and without a recurrent state",
    ),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "kimi_k2"),
        "its first layers are unlike the others, and llama.cpp tells its variants by the number of layers",
    ),
    "exaone4": "llama.cpp tells its variants by the number of layers",
    "llama4_text": "its experts are in every n-th layer",
    "qwen3_vl_text": "image features enter at its first layers",
    "gpt_oss": "its experts are published quantized only",
    "minicpm": "its residuals are scaled by the number of layers",
    "gpt2": "its layers have learned positions and fused projections",
}  # fmt: skip

_PER_LAYER = ("layer_types", "no_rope_layers")
_NOT_PER_LAYER = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "mlp_only_layers")


def _family(config: Mapping[str, object]) -> _Family:
    kind = str(config.get("model_type"))
    family = _FAMILIES.get(kind)
    if family is None:
        raise Unsupported(
            f"model_type {kind} is not cut into students: {_NOT_CUT.get(kind, 'nobody has tried')}",
            hint=f"cut are {', '.join(sorted(_FAMILIES))}; or name a ready student",
        )
    if "quantization_config" in config:
        raise Unsupported(f"the {kind} is already quantized", hint="cut the model that it was made from")
    layers = Config(config, "the teacher").count("num_hidden_layers")
    if layers == family.apart:
        raise Unsupported(
            f"a {kind} of {layers} layers has queries scaled in a way that llama.cpp knows by this very number",
            hint="take its next smaller sibling as the teacher",
        )
    return family


def _teacher(config: Mapping[str, object]) -> ModelSpec:
    return modelspec.from_config(config, name="the teacher")


def _refuse_unlike(found: Prune, teacher: ModelSpec, family: _Family) -> None:
    """Heads and hidden sizes that do not go together in this family."""
    if found.heads is None and found.hidden is None:
        return
    hidden, groups = int(found.hidden or teacher.hidden), int(found.heads or teacher.kv_heads)
    heads = teacher.heads // teacher.kv_heads * groups
    if family.square and heads * teacher.head_dim != hidden:
        raise Unsupported(
            f"{teacher.architecture} with heads of {heads * teacher.head_dim} together and a hidden size of {hidden}: "
            "llama.cpp wants both alike",
            hint=f"cut both: hidden={heads * teacher.head_dim},heads={groups}",
        )
    if family.even and hidden % heads:
        step = math.lcm(_multiple(teacher.hidden), heads)
        raise Unsupported(
            f"{teacher.architecture} with {heads} heads and a hidden size of {hidden}: transformers wants a multiple",
            hint=f"hidden sizes of {step} and its multiples go with {heads} heads",
        )


def _check_layers(kept: Sequence[int], count: int, teacher: ModelSpec, family: _Family) -> None:
    if len(kept) != count or list(kept) != sorted({at for at in kept if 0 <= at < teacher.layers}):
        raise BadInput(f"layers {list(kept)} are not {count} of {teacher.layers} in their order")
    if not _in_kind(kept, family.period):
        raise BadInput(
            f"layers {list(kept)} of a {teacher.architecture} come to places of other kinds: kinds repeat every "
            f"{family.period} layers"
        )


def _in_kind(kept: Sequence[int], period: int) -> bool:
    return all(layer % period == place % period for place, layer in enumerate(kept))


def _cut_per_layer(config: Mapping[str, object], kept: Sequence[int], layers: int) -> dict[str, object]:
    cut: dict[str, object] = {}
    for key, value in config.items():
        if not isinstance(value, list) or key in _NOT_PER_LAYER:
            continue
        if key in _PER_LAYER and len(value) == layers:
            cut[key] = [value[at] for at in kept]
        elif len(value) == layers and len(kept) != layers:
            raise Unsupported(
                f"config field {key} seems to have a value per layer, and what it means is not known"
            )
    below = config.get("max_window_layers")
    if isinstance(below, int):
        cut["max_window_layers"] = sum(1 for at in kept if at < below)
    return cut


# ── sizes ──


def _given(prune: Prune) -> dict[str, float | int]:
    values = {key: getattr(prune, key) for key in DIMENSIONS}
    return {key: value for key, value in values.items() if value is not None}


def _refuse_nonsense(prune: Prune) -> None:
    for key, value in _given(prune).items():
        if isinstance(value, float) and not 0 < value <= 1:
            raise BadInput(f"{key}={value} is no share: more than 0 and at most 1.0")
        if isinstance(value, int) and value < 1:
            raise BadInput(f"{key}={value}: at least 1 must stay")


def _multiple(size: int) -> int:
    return math.gcd(size, _BLOCK)


def _groups_together(teacher: ModelSpec) -> int:
    """Groups that go together, so that the row of all heads stays a multiple."""
    group = teacher.heads // teacher.kv_heads * teacher.head_dim
    multiple = _multiple(group * teacher.kv_heads)
    return multiple // math.gcd(multiple, group)


def _nearest(key: str, wanted: float, whole: int, step: int) -> int:
    smallest = whole - (whole - 1) // step * step
    if smallest == whole:
        raise BadInput(
            f"{key} of {whole} cannot be cut: it goes in steps of {step}",
            hint="cut another dimension" if key != "layers" else None,
        )
    return min(range(smallest, whole, step), key=lambda size: (abs(size - wanted), -size))


def _share(config: Mapping[str, object], prune: Prune, teacher: ModelSpec) -> float:
    return _teacher(shrunk(config, prune)).parameters / teacher.parameters


def _path(config: Mapping[str, object], teacher: ModelSpec) -> list[Prune]:
    """Ever smaller students, one step in one dimension each: depth to a half, FFN to a half, and both again."""
    family = _family(config)
    steps: list[Prune] = []
    at = Prune()
    for part in (2, 4):
        layers = range(int(at.layers or teacher.layers) - family.period, 0, -family.period)
        for count in layers:
            if count < math.ceil(teacher.layers / part):
                break
            at = replace(at, layers=count)
            steps.append(at)
        step = _multiple(teacher.ffn)
        if "ffn" not in family.width:
            continue
        for width in range(int(at.ffn or teacher.ffn) - step, 0, -step):
            if width < teacher.ffn // part:
                break
            at = replace(at, ffn=width)
            steps.append(at)
    return steps
