"""A student cut out of its teacher: layers by the loss without them, channels and heads by what passes through them.

Depth first: a handful of ways to leave layers out, each tried on examples, hidden states of the layers before the cut
taken from the teacher's own pass. Then width, in one more pass through the layers that stay (Muralidharan et al.,
Minitron, arXiv 2407.14679). Weights are copied from the teacher's files and are not trained here.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgepack import modelspec, serde, students
from edgepack.builders import child, safetensors
from edgepack.builders.distill.examples import Examples
from edgepack.builders.quantizers import TOKENIZER_FILES
from edgepack.errors import BadInput, BuildFailed, MissingTool, Unsupported
from edgepack.modelspec import ModelSpec
from edgepack.progress import Progress
from edgepack.students import Prune
from edgepack.units import MIB
from edgepack.workspace import require_space, whole_dir

VERSION = 1
"""Raised when the same student is cut otherwise."""
TOKENS = 4096
"""Responses that candidates are compared on."""
PLACES = 12
"""Most places at which neighbors are left out, evenly spread."""
_LARGE = 2_000_000_000
"""Parameters from which on the teacher is computed in bfloat16, 2 bytes each, and not in 32 bits."""

ROUNDS = 4
"""In how many the layers that are least missed go; in each, those that are left are tried without each of them."""

How = Literal["contiguous", "least missed", "block influence", "every k-th"]
"""Neighbors are left out; or, in rounds, those without which the loss is lowest; or those that change their input least
(Men et al., arXiv 2403.03853); or layers at even distances stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    how: How
    layers: tuple[int, ...]
    """Numbers of those that stay."""
    loss: float
    """Nats a response token, untrained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was cut, and what it costs before any training; losses in nats a response token of the same examples."""

    tokens: int
    """Responses that were used."""
    teacher: float
    student: float
    """Of the folder that was written, loaded anew."""
    depth: float | None = None
    """With fewer layers of full width; None where all stay."""
    candidates: tuple[Candidate, ...] = ()
    """The best first."""
    influence: tuple[float, ...] = ()
    """Of each layer of the teacher: 1 - cosine between what enters and leaves it, mean over tokens."""
    alone: tuple[float, ...] = ()
    """Loss without each layer alone."""
    layers: tuple[int, ...]
    """Numbers of the teacher's layers that stay."""
    ffn: tuple[tuple[int, ...], ...] = ()
    """Channels that stay in each of them; empty where all do."""
    heads: tuple[tuple[int, ...], ...] = ()
    """Groups of heads that stay in each of them; empty where all do."""
    hidden: tuple[int, ...] = ()
    seconds: float
    """From the loaded teacher to the written student."""


def prune(
    teacher: Path,
    what: Prune,
    examples: Path,
    out: Path,
    *,
    tokens: int = TOKENS,
    threads: int,
    progress: Progress,
) -> Report:
    """Writes ``out``, whole or not at all: the smaller config.json, weights in the teacher's types, its tokenizer.

    ``examples``: a folder of `Examples`, of which the first are taken until they have ``tokens`` responses. The whole
    teacher is in memory, with 4 bytes a weight (2 from 2 billion on), and one example's states between all layers. The
    same bytes for the same input, number of threads and device. Raises as `students.sizes` does, BadInput for examples
    that are not the teacher's, MissingTool without the extra, NoSpace, BuildFailed with the process's words.
    """
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise MissingTool(
                f"{package} is not installed", hint="pip install 'edgepack[distill]' (torch first: README)"
            )
    spec, config = modelspec.read(teacher), serde.read_object(teacher / "config.json")
    students.sizes(config, what)
    stored = _stored(teacher, spec)
    known = Examples.open(examples)
    count = _count(known, tokens, spec)
    if out.exists():
        raise BadInput(f"{out} is already there", hint="choose another folder for the student")
    out.parent.mkdir(parents=True, exist_ok=True)
    require_space(out.parent, sum(tensor.bytes for tensor in stored.values()) + 16 * MIB)
    with tempfile.TemporaryDirectory(prefix="edgepack-") as place, whole_dir(out) as partial:
        job = _Job(
            teacher=str(teacher.resolve()),
            prune=students.label(what),
            examples=str(examples.resolve()),
            count=count,
            out=str(partial.resolve()),
            report=str(Path(place) / "report.json"),
        )
        words = Path(place) / "job.json"
        words.write_text(serde.to_json(job), encoding="utf-8")
        child.run(
            __name__,
            [words],
            title=f"pruning {spec.name} to {students.label(what)}",
            cwd=Path(place),
            log=out.with_name(f"{out.name}.log"),
            threads=threads,
            progress=progress,
        )
        return serde.load_json(Report, Path(job.report))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    teacher: str
    prune: str
    examples: str
    count: int
    """Examples, from the first on."""
    out: str
    report: str


def _stored(teacher: Path, spec: ModelSpec) -> dict[str, safetensors.Stored]:
    """The tensors that a student is cut from, by name, all of known types and places."""
    found = {}
    for name, tensor in safetensors.checkpoint(teacher).items():
        if name.endswith(".rotary_emb.inv_freq") or (spec.tied and name == "lm_head.weight"):
            continue  # computed anew, and the same as the embeddings
        if tensor.dtype not in safetensors.ITEM_BYTES:
            raise Unsupported(f"{teacher}: tensor {name} is {tensor.dtype}; known are BF16, F16 and F32")
        if not _OUTER.fullmatch(name) and not _LAYER.fullmatch(name):
            raise Unsupported(
                f"{teacher}: the checkpoint holds {name}, which is none of a {spec.architecture}'s"
            )
        found[name] = tensor
    return found


def _count(known: Examples, tokens: int, spec: ModelSpec) -> int:
    """How many examples have that many responses, or all."""
    count = min(len(known), int(np.searchsorted(known.rows, tokens)))
    if tokens < 1 or known.rows[count] < 1:
        raise BadInput(f"{known.folder} has no responses among {tokens} tokens to measure a student by")
    longest = int(np.diff(known.starts[: count + 1]).max())
    if longest > spec.context_train:
        raise BadInput(
            f"{known.folder} has an example of {longest} tokens, and {spec.name} was trained on {spec.context_train}"
        )
    highest = int(known.tokens[: known.starts[count]].max())
    if highest >= spec.vocab:
        raise BadInput(
            f"{known.folder} has the token {highest}, and {spec.name} knows {spec.vocab}",
            hint="prepare the data with the teacher's tokenizer",
        )
    return count


# ── the other process ──

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OUTER = re.compile(r"model\.embed_tokens\.weight|model\.norm\.weight|lm_head\.(?:weight|bias)")

Indices = NDArray[np.int64]
Scores = NDArray[np.float64]
Advance = Callable[[], None]
Sequences = Sequence[tuple[Any, Any]]
"""Token ids [1, n] and positions of responses [m], in tensors."""


def work(words: str) -> None:
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    job = serde.load_json(_Job, Path(words))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher, out = Path(job.teacher), Path(job.out)
    spec, config = modelspec.read(teacher), serde.read_object(teacher / "config.json")
    wanted = students.sizes(config, students.parse(job.prune))
    kind = torch.bfloat16 if spec.parameters >= _LARGE else torch.float32
    sequences = [
        (
            torch.from_numpy(e.tokens.astype(np.int64))[None].to(device),
            torch.from_numpy(np.flatnonzero(e.response)),
        )
        for e in (Examples.open(Path(job.examples))[at] for at in range(job.count))
    ]
    started = time.perf_counter()
    with torch.inference_mode():
        model = _load(teacher, kind, device)
        advance = _steps((ROUNDS + 2) * len(sequences))
        depth = _Depth(model, config, wanted, sequences, advance)
        depth.run()
        if not math.isfinite(depth.teacher):
            raise BadInput(
                f"{teacher} has a loss of {depth.teacher} on these examples", hint="its weights are damaged"
            )
        width = _Width(model, depth.chosen, config, wanted)
        if width.needed:
            width.run(sequences, advance)
        del model
        student = students.shrunk(config, wanted, layers=depth.chosen)
        _write(teacher, out, student, _stored(teacher, spec), width)
        seconds = time.perf_counter() - started
        cut = _load(out, kind, device)
        loss = _total(_loss(cut, *sequence) for sequence in sequences)
    report = Report(
        tokens=sum(len(at) for _, at in sequences),
        teacher=depth.teacher,
        student=loss,
        depth=depth.candidates[0].loss if depth.candidates else None,
        candidates=tuple(depth.candidates),
        influence=depth.influence,
        alone=depth.alone,
        layers=depth.chosen,
        ffn=tuple(tuple(kept.tolist()) for kept in width.ffn),
        heads=tuple(tuple(kept.tolist()) for kept in width.heads),
        hidden=() if width.hidden is None else tuple(width.hidden.tolist()),
        seconds=round(seconds, 3),
    )
    Path(job.report).write_text(serde.to_json(report), encoding="utf-8")


def _steps(total: int) -> Advance:
    """Tells the parent of each example that went through the model, of at most ``total``."""
    done = itertools.count(1)
    return lambda: child.report(next(done), total)


def _load(folder: Path, kind: Any, device: Any) -> Any:
    """The model of a folder. Raises BuildFailed when the folder has other tensors than the model."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=kind,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        attn_implementation="sdpa",
    )
    for which in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[which]:
            raise BuildFailed(
                f"{folder}: transformers finds {which.replace('_', ' ')}: {sorted(told[which])[0]}"
            )
    return model.to(device).eval()


def _loss(model: Any, ids: Any, responses: Any) -> tuple[float, int]:
    """Summed nats of the responses, and how many there are. A model's own code makes masks, scales and caps."""
    import torch

    logits = model(input_ids=ids, logits_to_keep=responses.to(ids.device) - 1, use_cache=False).logits[0]
    wanted = ids[0, responses.to(ids.device)]
    return float(torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")), len(responses)


def _total(losses: Iterable[tuple[float, int]]) -> float:
    pairs = list(losses)
    return sum(nats for nats, _ in pairs) / sum(count for _, count in pairs)


class _Depth:
    """Which layers stay."""

    def __init__(
        self, model: Any, config: Mapping[str, object], wanted: Prune, sequences: Sequences, advance: Advance
    ) -> None:
        self.model, self.config, self.sequences, self.advance = model, config, sequences, advance
        self.body = model.model
        self.layers = list(self.body.layers)
        self.count = int(wanted.layers or len(self.layers))
        self.chosen: tuple[int, ...] = tuple(range(len(self.layers)))
        self.teacher = math.nan
        self.influence: tuple[float, ...] = ()
        self.alone: tuple[float, ...] = ()
        self.candidates: list[Candidate] = []

    def run(self) -> None:
        """Fills the fields; the model is left with the layers that stay."""
        everything, count = self.chosen, self.count
        if count == len(everything):
            self.teacher = self._losses((everything,))[everything]
            self._put(self.layers)
            return
        tried: dict[tuple[int, ...], How] = dict.fromkeys(
            _spread(students.contiguous(self.config, count)), "contiguous"
        )
        single = [at for at in everything if students.in_kind(self.config, _without(everything, at))]
        alone = {_without(everything, at) for at in everything} if len(single) == len(everything) else set()
        losses = self._losses((everything, *sorted({*tried, *alone})))
        self.teacher = losses[everything]
        if alone:
            self.alone = tuple(losses[_without(everything, at)] for at in everything)
            tried.setdefault(self._least_missed(losses), "least missed")
        changing = tuple(_largest(np.array(self.influence), count).tolist())
        if students.in_kind(self.config, changing):
            tried.setdefault(changing, "block influence")
        even = students.every_kth(self.config, count)
        if even is not None:
            tried.setdefault(even, "every k-th")
        losses |= self._losses(sorted(tried.keys() - losses.keys()))
        found = [Candidate(how=how, layers=kept, loss=losses[kept]) for kept, how in tried.items()]
        self.candidates = sorted(found, key=lambda one: (one.loss, one.layers))
        self.chosen = self.candidates[0].layers
        self._put([self.layers[at] for at in self.chosen])

    def _least_missed(self, losses: Mapping[tuple[int, ...], float]) -> tuple[int, ...]:
        """What is left when, round by round, those go without each of which the loss is lowest.

        ``losses``: among others, without each single layer.
        """
        kept = self.chosen
        for at_once in _rounds(len(kept) - self.count):
            if kept != self.chosen:
                losses = self._losses([_without(kept, at) for at in kept])
            missed = sorted((losses[_without(kept, at)], at) for at in kept)
            kept = _without(kept, *(at for _, at in missed[:at_once]))
        return kept

    def _losses(self, choices: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        """Nats a response of each choice of layers; one pass of the whole teacher serves all of them."""
        losses: dict[tuple[int, ...], list[tuple[float, int]]] = {kept: [] for kept in choices}
        cosines = np.zeros(len(self.layers))
        for ids, responses in self.sequences if choices else ():
            states: list[Any] = []
            with self._noting(states):
                self.body(input_ids=ids, use_cache=False)
            cosines += [_cosine(a, b) for a, b in itertools.pairwise(states)]
            for kept in choices:
                losses[kept].append(self._try(kept, states, ids, responses))
            self.advance()
        if not self.influence:
            tokens = sum(ids.shape[1] for ids, _ in self.sequences)
            self.influence = tuple(float(1 - x / tokens) for x in cosines)
        return {kept: _total(pairs) for kept, pairs in losses.items()}

    @contextmanager
    def _noting(self, states: list[Any]) -> Iterator[None]:
        """The teacher whole: what enters each layer, then what leaves the last, goes to ``states``."""
        self._put(self.layers)
        hooks = [
            layer.register_forward_pre_hook(lambda _, given: states.append(given[0])) for layer in self.layers
        ]
        hooks.append(self.layers[-1].register_forward_hook(lambda _, __, out: states.append(_hidden(out))))
        yield
        for hook in hooks:
            hook.remove()

    def _try(
        self, kept: tuple[int, ...], states: Sequence[Any], ids: Any, responses: Any
    ) -> tuple[float, int]:
        """The loss with these layers alone; those that come first in the teacher too are not computed again."""
        same = next((at for at, layer in enumerate(kept) if at != layer), len(kept))
        stand_ins = [_stand_in(self.layers[at], states[same]) for at in range(same)]
        self._put([*stand_ins, *(self.layers[at] for at in kept[same:])])
        return _loss(self.model, ids, responses)

    def _put(self, layers: Sequence[Any]) -> None:
        import torch

        self.body.layers = torch.nn.ModuleList(layers)


def _stand_in(layer: Any, state: Any) -> Any:
    """In place of a layer, of its kind, with an output that is known."""
    import torch

    class Known(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
        attention_type = getattr(layer, "attention_type", None)

        def forward(self, *_: Any, **__: Any) -> Any:
            return state

    return Known()


def _hidden(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def _cosine(a: Any, b: Any) -> float:
    """Summed over tokens."""
    import torch

    return float(torch.nn.functional.cosine_similarity(a[0].float(), b[0].float(), dim=-1).double().sum())


def _rounds(gone: int) -> tuple[int, ...]:
    """How many layers go in each round, the most first."""
    each = (gone // ROUNDS + (at < gone % ROUNDS) for at in range(ROUNDS))
    return tuple(count for count in each if count)


def _without(kept: Sequence[int], *gone: int) -> tuple[int, ...]:
    return tuple(at for at in kept if at not in gone)


def _spread(places: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    at = np.unique(np.linspace(0, len(places) - 1, min(PLACES, len(places))).round().astype(np.int64))
    return tuple(places[i] for i in at)


def _largest(scores: Scores, count: int) -> Indices:
    """Places of the largest, in their order; of equal ones the first."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


class _Width:
    """Which channels and heads stay in the layers that do: those with the most energy in what they put out.

    FFN channels and groups of heads by what they add to the layer's output, the hidden size by the mean magnitude
    behind all norms. An FFN of the built-in model cut to half by this had a held-out perplexity of 54.8, by the
    activation alone 61.3, its first half 85.3 (the teacher 31.4). Gains of norms stay as they are: corrected for the
    changed mean square they gave 32.7, 36.6, 72.5 and 940 at hidden sizes of 240, 224, 192 and 128 of 256, as they are
    32.7, 36.7, 75.6 and 909.
    """

    def __init__(
        self, model: Any, layers: Sequence[int], config: Mapping[str, object], wanted: Prune
    ) -> None:
        self.model, self.numbers, self.wanted = model, tuple(layers), wanted
        self.spec = modelspec.from_config(config, name="the teacher")
        self.needed = any(size is not None for size in (wanted.ffn, wanted.heads, wanted.hidden))
        self.ffn: list[Indices] = []
        self.heads: list[Indices] = []
        self.hidden: Indices | None = None

    def run(self, sequences: Sequences, advance: Advance) -> None:
        """One pass through the model, then the choice."""
        spec, layers = self.spec, list(self.model.model.layers)
        channels = np.zeros((len(layers), spec.ffn))
        groups = np.zeros((len(layers), spec.kv_heads))
        outputs = np.zeros(spec.hidden)

        def of_channels(at: int) -> Any:
            def hook(_: Any, given: Any) -> None:
                channels[at] += _squares(given[0])

            return hook

        def of_groups(at: int) -> Any:
            def hook(module: Any, given: Any) -> None:
                parts, weights = (x.chunk(spec.kv_heads, -1) for x in (given[0], module.weight))
                groups[at] += [float(_squares(x @ w.T).sum()) for x, w in zip(parts, weights, strict=True)]

            return hook

        def of_norm(_: Any, __: Any, out: Any) -> None:
            nonlocal outputs
            outputs += _numbers(out.abs())

        named = [self.model.model.norm]
        named += [
            part for layer in layers for name, part in layer.named_children() if name.endswith("layernorm")
        ]
        hooks = [norm.register_forward_hook(of_norm) for norm in named]
        for at, layer in enumerate(layers):
            hooks.append(layer.mlp.down_proj.register_forward_pre_hook(of_channels(at)))
            hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(of_groups(at)))
        for ids, _ in sequences:
            self.model.model(input_ids=ids, use_cache=False)
            advance()
        for hook in hooks:
            hook.remove()
        # What a channel adds to the layer's output: its energy times its column's.
        channels *= [_squares(layer.mlp.down_proj.weight[None]) for layer in layers]
        wanted = self.wanted
        if wanted.ffn is not None:
            self.ffn = [_largest(scores, int(wanted.ffn)) for scores in channels]
        if wanted.heads is not None:
            self.heads = [_largest(scores, int(wanted.heads)) for scores in groups]
        if wanted.hidden is not None:
            self.hidden = _largest(outputs, int(wanted.hidden))

    def cut(self, name: str, tensor: Any) -> Any:
        """A tensor of the teacher, [rows, columns] or [rows], with what stays of it."""
        import torch

        for axis, kept in enumerate(self._axes(name)[: tensor.dim()]):
            if kept is not None:
                tensor = tensor.index_select(axis, torch.from_numpy(kept))
        return tensor

    def _axes(self, name: str) -> tuple[Indices | None, Indices | None]:
        """What stays along each axis of a tensor; None: all."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return (self.hidden, None) if name == "model.norm.weight" else (None, self.hidden)
        at, part = self.numbers.index(int(match.group(1))), match.group(2).rpartition(".")[0]
        ffn = self.ffn[at] if self.ffn else None
        query, key = self._rows(at)
        spec = self.spec
        axes = {
            "self_attn.q_proj": (query, self.hidden),
            "self_attn.k_proj": (key, self.hidden),
            "self_attn.v_proj": (key, self.hidden),
            "self_attn.qkv_proj": (
                _stacked((query, spec.heads * spec.head_dim), *2 * ((key, spec.kv_heads * spec.head_dim),)),
                self.hidden,
            ),
            "self_attn.o_proj": (self.hidden, query),
            "self_attn.q_norm": (None, None),
            "self_attn.k_norm": (None, None),
            "mlp.gate_proj": (ffn, self.hidden),
            "mlp.up_proj": (ffn, self.hidden),
            "mlp.gate_up_proj": (_stacked(*2 * ((ffn, spec.ffn),)), self.hidden),
            "mlp.down_proj": (self.hidden, ffn),
        }
        if part in axes:
            return axes[part]
        if part.endswith("layernorm"):
            return (self.hidden, None)
        if self.needed:
            raise Unsupported(f"tensor {name}: what is to be cut of it is not known")
        return (None, None)

    def _rows(self, at: int) -> tuple[Indices | None, Indices | None]:
        """Rows of all query heads and of all keys that stay in a layer."""
        if not self.heads:
            return None, None
        dim, per = self.spec.head_dim, self.spec.heads // self.spec.kv_heads
        query, key = (
            (self.heads[at][:, None] * width + np.arange(width)).reshape(-1) for width in (per * dim, dim)
        )
        return query, key


def _stacked(*parts: tuple[Indices | None, int]) -> Indices | None:
    """What stays of matrices that lie one below the other, each with what stays of it and its rows."""
    begins = np.cumsum([0, *(rows for _, rows in parts)])
    kept = [begin + part for begin, (part, _) in zip(begins, parts, strict=False) if part is not None]
    return np.concatenate(kept) if kept else None


def _squares(values: Any) -> Scores:
    """Summed over tokens: [1, n, size] to [size]."""
    return _numbers(values.float().square())


def _numbers(values: Any) -> Scores:
    found: Scores = values.float().sum(dim=(0, 1)).double().cpu().numpy()
    return found


def _write(
    teacher: Path,
    out: Path,
    config: Mapping[str, object],
    stored: Mapping[str, safetensors.Stored],
    width: _Width,
) -> None:
    """The student's folder; tensors are read one at a time, the student is in memory whole."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    places = {layer: place for place, layer in enumerate(width.numbers)}
    tensors = {}
    for name, tensor in stored.items():
        match = _LAYER.fullmatch(name)
        if match is not None and int(match.group(1)) not in places:
            continue
        new = name if match is None else f"model.layers.{places[int(match.group(1))]}.{match.group(2)}"
        with safe_open(tensor.file, framework="pt") as file:
            tensors[new] = width.cut(name, file.get_tensor(name)).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (teacher / name).is_file():
            shutil.copyfile(teacher / name, out / name)
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors' writer leaves its file to its owner alone


if __name__ == "__main__":
    child.main(work, sys.argv[1:])
