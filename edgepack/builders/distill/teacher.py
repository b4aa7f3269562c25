"""What a teacher says of every token of a response, kept on disk by one pass over the data and read by any students."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgepack import serde
from edgepack.artifact import Checkpoint
from edgepack.builders import child, safetensors
from edgepack.builders.distill import Precision
from edgepack.builders.distill.examples import Examples
from edgepack.calibration import encoder
from edgepack.errors import BadInput, BuildFailed, MissingTool, NoSpace, NotFound
from edgepack.progress import Progress
from edgepack.units import MIB
from edgepack.workspace import fsync_dir, require_space, sha256_file, whole_file, write_text

if TYPE_CHECKING:
    import torch

DEFAULT_K = 88
"""Outcomes that are kept of each token: as many as 400 bytes hold of 151,936 ids.

On the built-in teacher's held-out text, for a student of its layers 0, 1 and 5, the gradient of the divergence by the
head's weights lies off (1 - cosine) that of all logits by 0.0017 at T = 1 and 0.030 at T = 2; that of a step's 16,384
tokens lies off by 0.04 itself, as its halves say. With k = 16, 64 and 256 it is 0.016, 0.0030 and 0.0001 at T = 1, and
0.075, 0.038 and 0.010 at T = 2, where half of this small model's mass is in the tail; large models are surer. The
divergence itself is smaller by what the tail hides: 0.927 of 0.995 nats at T = 1, 0.227 of 0.328 at T = 2.
(benchmarks/distillation_cache.py outcomes edgepack/models/demo)
"""
BATCH_TOKENS = 4096
"""Tokens that go through the teacher at once."""
SHARD_ROWS = 32768
"""About 9 MB, and what a killed process does again at most; in one, examples of like length share a batch."""
ABOUT = "about.json"
"""Written last: where it is, all shards are."""

_VERSION = 1
"""Raised when the same inputs give other bytes."""
_HEAD_VALUES = 1 << 26
"""Logits that are made at once at most, 128 MiB in 16 bits: a large matrix is read less often for many rows."""
_HEAD_ROWS = 512
"""Tokens of which logits are made at once, for each thread: those of a small vocabulary stay in a core's cache."""
_CACHED_VALUES = 1 << 18
"""Logits that are looked at in one go: 1 MiB in 32 bits stays in a core's cache."""
_CACHED_ROWS = 4
"""Fewer at a time, and calls cost more than the cache saves."""
_LEAST = -87.0
"""Logarithm of the smallest odds in 32 bits; below, an outcome counts as this likely, which is never."""
_SMALLEST = float(np.finfo(np.float16).min)
_AGAIN = "run the same command again: what is whole is kept, the rest is made again"
_SHARD = re.compile(r"(\d{6})-([0-9a-f]{16})\.npy\Z")
"""Its number, and the start of its own sha256."""

_SIGN = 1 << 15
Computed = Literal["bf16", "fp32"]
Shard = NDArray[np.void]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """n tokens of responses, each as the teacher predicted it from those before it."""

    ids: NDArray[np.int32]
    """[n, k]: the most likely outcomes, most likely first."""
    logits: NDArray[np.float32]
    """[n, k]: theirs, less the largest of the row, to 16 bits."""
    lse: NDArray[np.float32]
    """[n]: log-sum-exp of such logits over the whole vocabulary, by which the tail has its mass exactly."""
    lse_t: NDArray[np.float32]
    """[n]: of the logits divided by ``temperature``."""
    target: NDArray[np.float32]
    """[n]: log-probability of the token that the data has, at temperature 1, in nats."""
    temperature: float
    vocabulary: int
    """The ids from 0 that the log-sum-exps are over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """All that the bytes depend on, beside the machine's own rounding."""

    version: int = _VERSION
    teacher: str
    """Revision of its checkpoint."""
    tokenizer: str
    """sha256 of tokenizer.json."""
    examples: str
    """Their digest."""
    k: int
    temperature: float
    vocabulary: int
    precision: Computed
    """What the teacher's matrices are multiplied in."""
    batch_tokens: int
    shard_rows: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(serde.to_json(self).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What is in a folder."""

    identity: Identity
    rows: int
    bytes_per_token: int
    shards: tuple[str, ...]
    """File names, in the order of their rows."""


class Kept:
    """A teacher's rows, memory-mapped; row r is of the r-th token of a response in the examples' order."""

    def __init__(self, folder: Path, about: About) -> None:
        self.folder = folder
        self.about = about
        self.k = about.identity.k
        self.vocabulary = about.identity.vocabulary
        self.temperature = about.identity.temperature
        self._row = row_type(self.k, self.vocabulary)
        self._shards = [_open(folder / name, self._row) for name in about.shards]
        self._starts = np.cumsum([0, *map(len, self._shards)])
        if len(self) != about.rows:
            raise BadInput(f"{folder} has {len(self)} rows and not {about.rows}", hint=_AGAIN)

    @classmethod
    def open(cls, folder: Path) -> Kept:
        """Raises BadInput for a folder that is not whole."""
        try:
            about = serde.load_json(About, folder / ABOUT)
        except NotFound as error:
            raise BadInput(f"{folder} holds no kept teacher: {error}", hint=_AGAIN) from error
        return cls(folder, about)

    @property
    def bytes_per_token(self) -> float:
        return float(self._row.itemsize)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, first: int, last: int) -> Rows:
        """Those from ``first`` up to and without ``last``."""
        if not 0 <= first <= last <= len(self):
            raise IndexError(f"rows {first} to {last} of {len(self)}")
        parts = [
            shard[max(0, first - start) : last - start]
            for shard, start in zip(self._shards, self._starts.tolist(), strict=False)
            if start < last and first < start + len(shard)
        ]
        found = np.concatenate(parts) if parts else np.empty(0, self._row)
        return Rows(
            ids=unpack(found["ids"], self.k, id_bits(self.vocabulary)),
            logits=found["logits"].astype(np.float32),
            lse=found["lse"].copy(),
            lse_t=found["lse_t"].copy(),
            target=found["target"].copy(),
            temperature=self.temperature,
            vocabulary=self.vocabulary,
        )


def keep(
    teacher: Checkpoint,
    examples: Path,
    folder: Path,
    *,
    k: int = DEFAULT_K,
    temperature: float,
    vocabulary: int | None = None,
    precision: Precision = "auto",
    threads: int,
    progress: Progress,
    batch_tokens: int = BATCH_TOKENS,
    shard_rows: int = SHARD_ROWS,
) -> Path:
    """Where, below ``folder``, it is kept what the teacher says of the examples; made now unless it is there.

    ``vocabulary``: the ids from 0 that its distributions are over, by default those that its tokenizer knows: a model's
    rows beyond are padding, and another student may have more or fewer of them. Killed and run again, it keeps the
    shards that are whole, makes the others and those that are damaged, and ends with the same bytes.

    Raises MissingTool, BadInput for examples that are not in the teacher's tokens and for logits that are no numbers,
    Unsupported for a model that is not in safetensors or makes its logits in an unknown way, NoSpace, BuildFailed.
    """
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise MissingTool(f"{package} is not installed", hint="pip install 'edgepack[distill]'")
    if k < 1 or not temperature > 0:
        raise BadInput(f"{k} outcomes at temperature {temperature:g} are nothing to learn from")
    safetensors.checkpoint(teacher.path)
    data = Examples.open(examples)
    known = known_ids(teacher.path)
    vocabulary = known if vocabulary is None else min(known, vocabulary)
    _require_examples(data, vocabulary, teacher)
    identity = Identity(
        teacher=teacher.revision,
        tokenizer=sha256_file(teacher.path / "tokenizer.json"),
        examples=data.digest,
        k=min(k, vocabulary),
        temperature=float(temperature),
        vocabulary=vocabulary,
        precision=computed(precision),
        batch_tokens=batch_tokens,
        shard_rows=shard_rows,
    )
    place = folder / identity.digest
    if _whole(place):
        return place
    place.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_size for path in _shards(place).values())
    row = row_type(identity.k, vocabulary)
    require_space(place, max(0, data.response_tokens * row.itemsize - there) + MIB)
    job = Job(
        teacher=str(teacher.path.resolve()), name=teacher.source, examples=str(examples.resolve()),
        folder=str(place.resolve()), identity=identity, threads=threads,
    )  # fmt: skip
    write_text(place / "job.json", serde.to_json(job))
    child.run(
        "edgepack.builders.distill.teacher",
        [place.resolve() / "job.json"],
        title=f"{teacher.source} reads {data.response_tokens} tokens of responses",
        cwd=place,
        log=folder / f"{identity.digest}.log",
        threads=threads,
        progress=progress,
    )
    (place / "job.json").unlink()
    Kept.open(place)
    return place


def known_ids(model: Path) -> int:
    """The ids from 0 that a model's tokenizer may give, and the model has rows for."""
    words = encoder.load(model).get_vocab(with_added_tokens=True)
    config = serde.read_object(model / "config.json")
    text = config.get("text_config", config)
    rows = text.get("vocab_size") if isinstance(text, Mapping) else None
    if not isinstance(rows, int):
        raise BadInput(f"{model / 'config.json'} has no vocab_size")
    return min(rows, 1 + max(int(at) for at in words.values()))


def computed(precision: Precision) -> Computed:
    """What "auto" is on this machine: bf16 where a GPU or a CPU multiplies it (AVX512-BF16, AMX, ARM's BF16)."""
    if precision != "auto":
        return precision
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def row_type(k: int, vocabulary: int) -> np.dtype[np.void]:
    """One token on disk: 386 bytes for k = 88 of 151,936 ids."""
    packed = -(-k * id_bits(vocabulary) // 8)
    return np.dtype(
        [
            ("ids", "u1", (packed,)),
            ("logits", "<f2", (k,)),
            ("lse", "<f4"),
            ("lse_t", "<f4"),
            ("target", "<f4"),
        ]
    )


def id_bits(vocabulary: int) -> int:
    """Bits that the largest id needs."""
    return max(1, (vocabulary - 1).bit_length())


def pack(ids: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """[n, ceil(k · bits / 8)] bytes of ids [n, k], each ``bits`` (at most 25) wide, lowest bit first."""
    n, k = ids.shape
    groups = -(-k // 8)
    whole = np.zeros((n, 8 * groups), np.uint32)
    whole[:, :k] = ids
    packed = np.zeros((n, groups, bits), np.uint8)
    for lane, byte, shift, count in _lanes(bits):
        value = whole[:, lane::8] << np.uint32(shift)
        for more in range(count):
            packed[:, :, byte + more] |= (value >> np.uint32(8 * more)).astype(np.uint8)
    return packed.reshape(n, groups * bits)[:, : -(-k * bits // 8)]


def unpack(packed: NDArray[np.uint8], k: int, bits: int) -> NDArray[np.int32]:
    """The ids [n, k] that `pack` took."""
    n = len(packed)
    groups = -(-k // 8)
    whole = np.zeros((n, groups * bits), np.uint8)
    whole[:, : packed.shape[1]] = packed
    by_group = whole.reshape(n, groups, bits)
    ids = np.empty((n, groups, 8), np.int32)
    for lane, byte, shift, count in _lanes(bits):
        value = np.zeros((n, groups), np.uint32)
        for more in range(count):
            value |= by_group[:, :, byte + more].astype(np.uint32) << np.uint32(8 * more)
        ids[:, :, lane] = (value >> np.uint32(shift)) & np.uint32((1 << bits) - 1)
    return ids.reshape(n, 8 * groups)[:, :k]


def _lanes(bits: int) -> list[tuple[int, int, int, int]]:
    """Eight ids take ``bits`` bytes: (which, its first byte, its first bit there, bytes that it touches) of each."""
    return [(i, i * bits // 8, i * bits % 8, -(-(i * bits % 8 + bits) // 8)) for i in range(8)]


def _require_examples(data: Examples, vocabulary: int, teacher: Checkpoint) -> None:
    if not data.response_tokens:
        raise BadInput(f"{data.folder} has no token of a response", hint="nothing could be learned from it")
    largest = int(data.tokens.max())
    if largest >= vocabulary or data.tokens.min() < 0:
        raise BadInput(
            f"{data.folder} has the token {largest}, and {teacher.source} knows {vocabulary}",
            hint="examples must be in the teacher's own tokens",
        )


def _whole(place: Path) -> bool:
    """Whether all is there, to the last bit; what is damaged is removed, so that it is made again."""
    if not (place / ABOUT).is_file():
        return False
    about = serde.load_json(About, place / ABOUT)
    there = {path.name for path in _shards(place).values()}
    if set(about.shards) <= there:
        return True
    (place / ABOUT).unlink()
    fsync_dir(place)
    return False


def _shards(place: Path) -> Mapping[int, Path]:
    """The shards that are what their names say, by number; others are removed."""
    found = {}
    for path in sorted(place.glob("*.npy")):
        name = _SHARD.match(path.name)
        if name is not None and sha256_file(path).startswith(name[2]):
            found[int(name[1])] = path
        else:
            path.unlink()
    return found


def _open(path: Path, row: np.dtype[np.void]) -> Shard:
    """A shard, memory-mapped."""
    try:
        shard: Shard = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path} is no whole shard: {error}", hint=_AGAIN) from error
    if shard.dtype != row or shard.ndim != 1:
        raise BadInput(f"{path} has rows of {shard.dtype}, not of {row}", hint=_AGAIN)
    return shard


# ── the other process ──


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    teacher: str
    name: str
    examples: str
    folder: str
    identity: Identity
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Examples that go through the teacher together."""

    examples: tuple[int, ...]
    length: int
    """Tokens of the longest, up to its last response."""


def batches(data: Examples, first: int, last: int, tokens: int) -> Iterator[Batch]:
    """The examples from ``first`` to ``last`` that have responses, those of like length together, longest first."""
    lengths = {
        at: int(np.flatnonzero(data[at].response)[-1]) + 1
        for at in range(first, last)
        if data.rows[at + 1] > data.rows[at]
    }
    order = sorted(lengths, key=lambda at: (-lengths[at], at))
    while order:
        longest = lengths[order[0]]
        count = max(1, tokens // longest)
        yield Batch(examples=tuple(order[:count]), length=longest)
        order = order[count:]


def ranges(data: Examples, rows: int) -> list[tuple[int, int]]:
    """The examples of each shard, (first, last): as many as have ``rows`` rows together, and at least one."""
    found, first = [], 0
    while first < len(data) and data.rows[first] < data.rows[-1]:
        last = int(np.searchsorted(data.rows, data.rows[first] + rows, side="right")) - 1
        last = min(max(last, first + 1), len(data))
        found.append((first, last))
        first = last
    return found


class Teacher:
    """A transformers model that says what follows each token of a response."""

    def __init__(self, path: Path, name: str, precision: Computed, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from edgepack.builders.distill import loss

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.name = name
        self.threads = threads
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[precision], local_files_only=True,
                use_safetensors=True, trust_remote_code=False,
            )  # fmt: skip
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            raise BuildFailed(f"transformers does not load {name}: {error}") from error
        self.model.eval().to(self.device)
        self.head = loss.head(self.model)
        loss.verify_head(self.model, name)

    def logits(self, data: Examples, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pieces of (logits [n, V], the data's tokens [n]) of a batch's responses, example by example."""
        import torch

        from edgepack.builders.distill import loss

        shape = (len(batch.examples), batch.length)
        tokens, response = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        for row, at in enumerate(batch.examples):
            example = data[at]
            n = min(batch.length, len(example.tokens))
            tokens[row, :n], response[row, :n] = example.tokens[:n], example.response[:n]
        ids, wanted = (torch.from_numpy(values).to(self.device) for values in (tokens, response))
        # Padding is on the right, where causal attention never looks: without a mask, kernels are faster.
        states = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        states, targets = loss.select(states, ids, wanted)
        most = max(1, _HEAD_VALUES // self.model.get_output_embeddings().weight.shape[0])
        rows = min(most, _HEAD_ROWS * self.threads)
        for first in range(0, len(states), rows):
            yield self.head(states[first : first + rows]), targets[first : first + rows]


class _Odds(NamedTuple):
    """Of n tokens: odds are powers of e of logits less the largest."""

    ids: torch.Tensor
    """int64 [n, k]: the likeliest, in any order."""
    largest: torch.Tensor
    """[n, 1]: the largest logit."""
    inside: torch.Tensor
    """[n, k]: the odds of ``ids`` at the training temperature."""
    outside: torch.Tensor
    """[n, 1]: the sum of all others' odds at temperature 1."""
    outside_t: torch.Tensor
    """[n, 1]: at the training temperature."""


class Outcomes:
    """Takes of logits what is kept of them, in as many threads as there are."""

    def __init__(self, identity: Identity, threads: int) -> None:
        import torch

        self.k, self.vocabulary, self.temperature = identity.k, identity.vocabulary, identity.temperature
        self.row = row_type(self.k, self.vocabulary)
        self.threads = threads
        # k of v / b maxima of blocks, then k of k · b members: b = sqrt(v / k) takes least. Few ids gain nothing by it.
        few = self.vocabulary <= 64 * self.k
        self.blocks = 1 if few else 1 << round(np.log2(self.vocabulary / self.k) / 2)
        self.apart = -(-self.vocabulary // self.blocks)
        self.pool = ThreadPoolExecutor(threads, initializer=_alone)
        for _ in self.pool.map(lambda _: None, range(threads)):
            pass
        # The number is a thread's own for OpenMP and everyone's for MKL.
        torch.set_num_threads(threads)

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> Shard:
        """Rows [n] of logits [n, at least the vocabulary] and the data's tokens [n].

        A row with a logit that is NaN or +inf has a NaN as its ``lse``.
        """
        import torch

        n = len(logits)
        rows = np.empty(n, self.row)
        logits = logits[:, : self.vocabulary]
        # A GPU takes all at once, a core what its cache holds.
        cpu = logits.device.type == "cpu"
        together = max(_CACHED_ROWS, _CACHED_VALUES // self.vocabulary) if cpu else n

        def take(first: int, last: int) -> None:
            space = torch.empty((min(together, n), self.blocks * self.apart), device=logits.device)
            share = slice(first, last)
            with torch.inference_mode():
                parts = [slice(at, min(at + together, last)) for at in range(first, last, together)]
                found = [self._odds(logits[part], space) for part in parts]
                odds = _Odds(*(torch.cat(each) for each in zip(*found, strict=True)))
                rows[share] = self._rows(logits[share], targets[share], odds)

        shares = (
            np.linspace(0, n, self.threads + 1).astype(int).tolist() if cpu and n >= self.threads else [0, n]
        )
        list(self.pool.map(take, shares[:-1], shares[1:]))
        return rows

    def _odds(self, logits: torch.Tensor, space: torch.Tensor) -> _Odds:
        """``space``: [at least n, at least the vocabulary], written over."""
        import torch

        powers = space[: len(logits)]
        powers[:, : self.vocabulary] = logits
        powers[:, self.vocabulary :] = -torch.inf
        largest = powers.amax(1, keepdim=True)
        powers.sub_(largest)  # first: the largest is 0 then, without rounding
        if self.temperature != 1:
            powers.mul_(1 / self.temperature)
        powers.exp_()
        ids = self._likeliest(powers)
        inside = powers.gather(1, ids)
        # The others by themselves: what is left of 1 would be nothing where they are few.
        powers.scatter_(1, ids, 0.0)
        outside_t = powers.sum(1, keepdim=True)
        outside = outside_t if self.temperature == 1 else powers.pow_(self.temperature).sum(1, keepdim=True)
        return _Odds(ids, largest, inside, outside, outside_t)

    def _rows(self, logits: torch.Tensor, targets: torch.Tensor, odds: _Odds) -> Shard:
        import torch

        # Not the logits again, which have left the cache. Odds of 0 are of an outcome that will not be.
        shifted = odds.inside.log().clamp_(min=_LEAST).mul_(self.temperature).clamp_(min=_SMALLEST)
        rounded = shifted.half()
        moved = rounded.float() - shifted
        found = np.empty(len(logits), self.row)
        own = logits.gather(1, targets[:, None]).float() - odds.largest
        for name, t, outside in (("lse_t", self.temperature, odds.outside_t), ("lse", 1.0, odds.outside)):
            powers = odds.inside if name == "lse_t" else odds.inside**self.temperature
            inside = powers.sum(1, keepdim=True)
            lse = (inside + outside).log()
            if name == "lse":
                found["target"] = (own - lse)[:, 0].cpu().numpy()
            # exp(x) - 1 to the second order: a logit is moved by 2^-12 of itself, one that matters by less than 0.01.
            step = moved / t
            lse += ((powers * (step + step * step / 2)).sum(1, keepdim=True) / inside).log1p()
            found[name] = lse[:, 0].cpu().numpy()
        # Bits of floats that are not negative are in the order of the floats; 16 bits more say which of the row it is.
        places = torch.arange(self.k, dtype=torch.int32, device=logits.device)
        order = (rounded.abs().view(torch.int16).int() << 16 | places).cpu().numpy()
        order.sort(1)
        ids = odds.ids.cpu().gather(1, torch.from_numpy(order & 0xFFFF).long())
        found["ids"] = pack(ids.int().numpy(), id_bits(self.vocabulary))
        found["logits"] = (order >> 16 | _SIGN).astype(np.uint16).view(np.float16)
        return found

    def _likeliest(self, powers: torch.Tensor) -> torch.Tensor:
        """Where in [n, at least the vocabulary] the k largest of each row are, int64 [n, k] in any order.

        On a CPU, of outcomes whose odds are within a thousandth of the k-th's any may be among them; the sums over the
        others are exact whichever they are. There torch.topk costs as much as a small teacher itself.
        """
        import torch

        if powers.device.type != "cpu":
            return powers.topk(self.k, dim=1).indices
        if self.blocks == 1:
            return _largest(powers, self.k)
        # The k largest are in the k blocks with the largest maxima. A block's members lie a row of blocks apart.
        chosen = _largest(powers.view(-1, self.blocks, self.apart).amax(1), self.k)
        members = (chosen[:, :, None] + torch.arange(0, powers.shape[1], self.apart)).flatten(1)
        return members.gather(1, _largest(powers.gather(1, members), self.k))


def _alone() -> None:
    """A thread that computes by itself; odds too small for a float are 0, not denormal and slow."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """int64 [n, k]: where the k largest of each row of values that are not negative are, in any order.

    A value's lowest bits make room for where it is, so that one partition of whole numbers finds both.
    """
    import torch

    width = values.shape[1]
    bits = max(1, (width - 1).bit_length())
    places = torch.arange(width, dtype=torch.int32)
    keys: NDArray[np.int32] = (values.view(torch.int32) & (-1 << bits)).bitwise_or_(places).numpy()
    keys.partition(width - k, axis=1)
    return torch.from_numpy(keys[:, width - k :] & ((1 << bits) - 1)).long()


def work(place: str) -> None:
    """Makes the shards that a job (its file) still lacks, then says that all are there."""
    job = serde.load_json(Job, Path(place))
    identity, folder = job.identity, Path(job.folder)
    data = Examples.open(Path(job.examples))
    parts = ranges(data, identity.shard_rows)
    there = _shards(folder)
    done = sum(int(data.rows[parts[number][1]] - data.rows[parts[number][0]]) for number in there)
    teacher = Teacher(Path(job.teacher), job.name, identity.precision, job.threads)
    outcomes = Outcomes(identity, job.threads)
    writing: list[Future[None]] = []
    try:
        with ThreadPoolExecutor(1) as writer:
            for number, (first, last) in enumerate(parts):
                if number in there:
                    continue
                shard = np.empty(int(data.rows[last] - data.rows[first]), outcomes.row)
                for batch in batches(data, first, last, identity.batch_tokens):
                    rows = read(teacher, outcomes, data, batch)
                    where = [np.arange(data.rows[at], data.rows[at + 1]) for at in batch.examples]
                    shard[np.concatenate(where) - data.rows[first]] = rows
                    done += len(rows)
                    child.report(done, data.response_tokens)
                for earlier in writing:
                    earlier.result()
                writing = [writer.submit(write, shard, number, folder)]
        for last_one in writing:
            last_one.result()
    except NoSpace as error:
        raise NoSpace(
            f"the disk is full while keeping what {job.name} says: {len(_shards(folder))} of {len(parts)} shards "
            f"are whole in {folder}",
            hint="free some space; the same command goes on from there",
        ) from error
    about = About(
        identity=identity,
        rows=data.response_tokens,
        bytes_per_token=outcomes.row.itemsize,
        shards=tuple(path.name for _, path in sorted(_shards(folder).items())),
    )
    write_text(folder / ABOUT, serde.to_json(about))


def read(teacher: Teacher, outcomes: Outcomes, data: Examples, batch: Batch) -> Shard:
    """What is kept of a batch, example by example. Raises BadInput for logits that are no numbers, with the token."""
    import torch

    with torch.inference_mode():
        rows = np.concatenate([outcomes(*piece) for piece in teacher.logits(data, batch)])
    bad = np.flatnonzero(~np.isfinite(rows["lse"]))
    if bad.size:
        ends = np.cumsum([data.rows[at + 1] - data.rows[at] for at in batch.examples])
        at = batch.examples[int(np.searchsorted(ends, bad[0], side="right"))]
        before = sum(int(data.rows[n + 1] - data.rows[n]) for n in batch.examples[: batch.examples.index(at)])
        token = np.flatnonzero(data[at].response)[bad[0] - before]
        raise BadInput(
            f"{teacher.name} gives logits that are no numbers for token {token} of example {at} in {data.folder}",
            hint="its weights are damaged, or it overflows in 16 bits: try fp32",
        )
    return rows


def write(shard: Shard, number: int, folder: Path) -> None:
    """Puts a shard under a name with its own digest, whole."""
    file = io.BytesIO()
    np.save(file, shard, allow_pickle=False)
    digest = hashlib.sha256(file.getbuffer()).hexdigest()
    with whole_file(folder / f"{number:06d}-{digest[:16]}.npy") as temporary:
        temporary.write_bytes(file.getbuffer())


if __name__ == "__main__":
    child.main(work, sys.argv[1:])
