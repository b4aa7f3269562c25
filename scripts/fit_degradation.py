"""Fits degradation.py's constants on published tables, and predicts each table from all the others.

    python scripts/fit_degradation.py          constants, then error and coverage by table
    python scripts/fit_degradation.py --rows   every row, published and predicted

The rows with their sources: tests/truth/quality.jsonl (weights) and cache_quality.jsonl (KV cache). Robust least
squares: perplexities in logarithms of nats, accuracies in their own units beside the benchmark's standard error.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepack import degradation, modelspec, schemes
from edgepack.degradation import Constants, Law
from edgepack.errors import Unsupported
from edgepack.modelspec import ModelSpec

TRUTH = Path(__file__).parents[1] / "tests" / "truth"
Row = Mapping[str, Any]  # one line of a truth file; its values are what the source printed
Vector = npt.NDArray[np.float64]

SHAPES = {
    # model_type, layers, hidden, ffn, heads, KV heads, vocabulary, tied
    "Llama-3-8B": ("llama", 32, 4096, 14336, 32, 8, 128256, False),
    "Llama-3.1-8B": ("llama", 32, 4096, 14336, 32, 8, 128256, False),
    "Llama-3.2-1B": ("llama", 16, 2048, 8192, 32, 8, 128256, True),
    "Llama-3.2-3B": ("llama", 28, 3072, 8192, 24, 8, 128256, True),
    "Llama-2-7B": ("llama", 32, 4096, 11008, 32, 32, 32000, False),
    "Llama-2-13B": ("llama", 40, 5120, 13824, 40, 40, 32000, False),
    "Llama-2-70B": ("llama", 80, 8192, 28672, 64, 8, 32000, False),
    "LLaMA-7B": ("llama", 32, 4096, 11008, 32, 32, 32000, False),
    "LLaMA-13B": ("llama", 40, 5120, 13824, 40, 40, 32000, False),
    "LLaMA-30B": ("llama", 60, 6656, 17920, 52, 52, 32000, False),
    "LLaMA-65B": ("llama", 80, 8192, 22016, 64, 64, 32000, False),
    "Mistral-7B": ("mistral", 32, 4096, 14336, 32, 8, 32000, False),
    "Qwen-1.8B-Chat": ("qwen2", 24, 2048, 5504, 16, 16, 151936, False),
    "Qwen-7B-Chat": ("qwen2", 32, 4096, 11008, 32, 32, 151936, False),
    "Qwen-14B-Chat": ("qwen2", 40, 5120, 13696, 40, 40, 152064, False),
    "Qwen2-0.5B-Instruct": ("qwen2", 24, 896, 4864, 14, 2, 151936, True),
    "Qwen2-1.5B-Instruct": ("qwen2", 28, 1536, 8960, 12, 2, 151936, True),
    "Qwen2-7B-Instruct": ("qwen2", 28, 3584, 18944, 28, 4, 152064, False),
    "Qwen2-72B-Instruct": ("qwen2", 80, 8192, 29568, 64, 8, 152064, False),
    "Qwen2.5-7B-Instruct": ("qwen2", 28, 3584, 18944, 28, 4, 152064, False),
    "Qwen3-8B": ("qwen3", 36, 4096, 12288, 32, 8, 151936, False),
}
FAMILIES = ("Llama-2", "LLaMA", "Mistral", "Qwen", "Qwen2", "Qwen2.5", "Qwen3")
GAINS = (
    ("gptq", 4), ("gptq", 3), ("gptq", 2), ("awq", 4), ("awq", 3), ("autoround", 4), ("autoround", 3), ("autoround", 2),
)  # fmt: skip
"""AWQ at two bits is no better than rounding to nearest in any of its rows, so its factor there is 1."""
SIGMA = 0.35
"""Relative error of the law that a row may have before it counts as far off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    row: Row
    nats: Callable[[Constants, str | None], float]
    """Constants and family -> predicted nats."""
    gain: tuple[str, int] | None = None
    """Method and bits whose factor it takes to predict this row."""
    weight: float = 1.0


def read(name: str) -> list[Row]:
    return [json.loads(line) for line in (TRUTH / name).read_text().splitlines()]


@functools.cache
def spec(model: str) -> ModelSpec:
    kind, layers, hidden, ffn, heads, kv_heads, vocab, tied = SHAPES[model]
    return modelspec.from_config(
        {
            "model_type": kind, "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
            "tie_word_embeddings": tied, "max_position_embeddings": 8192, "head_dim": hidden // heads,
        },
        name=model,
    )  # fmt: skip


_INTEGERS = re.compile(r"(gptq|awq|autoround|rtn)-int([2348])-g(32|64|128|all)(-sym|-asym)?")
_PACKED = re.compile(r"ct-w([48])a(8|16)(?:-g(32|64|128))?")


def published(scheme: str) -> degradation.Format:
    """The format of a published row; more than edgepack offers: rtn, bits that AWQ's layout does not pack.

    GPTQ and AutoRound are symmetric and the others not, unless the name says so. Raises Unsupported for a method of
    which nothing is known here.
    """
    integers, packed = _INTEGERS.fullmatch(scheme), _PACKED.fullmatch(scheme)
    if integers:
        method, bits, group, sign = integers.groups()
        return degradation.Format(
            method=method,  # type: ignore[arg-type]  # the expression lists them
            bits=int(bits),
            group=None if group == "all" else int(group),
            symmetric=sign == "-sym" if sign else method in ("gptq", "autoround"),
        )
    if packed:
        weights, activations, group = packed.groups()
        return degradation.Format(
            method="rtn", bits=int(weights), group=int(group) if group else None, activations=int(activations)
        )
    raise Unsupported(f"what scheme {scheme!r} costs in quality is not known")


def case(row: Row) -> Case | str:
    """How a row is predicted, or why it is not."""
    model = spec(row["model"])
    tensors, parameters, scheme = model.tensors, model.parameters, row["scheme"]
    try:
        if "-" in scheme:
            how = published(scheme)
            stored = degradation.rounding_of(how, tensors)
            key = (how.method, min(how.bits, 4))
            return Case(
                row=row,
                gain=key if key in GAINS else None,
                nats=lambda constants, family: degradation.nats_of(
                    how, stored, parameters=parameters, family=family, constants=constants
                ),
            )
        imatrix = "imatrix" in row
        error = degradation.rounding(tensors, schemes.tensor_types(model, scheme, imatrix=imatrix))
        return Case(
            row=row,
            nats=lambda constants, family: degradation.nats(
                error, constants.weighted if imatrix else constants.plain,
                parameters=parameters, family=family, constants=constants,
            ),
        )  # fmt: skip
    except Unsupported as error_:
        return error_.message


@functools.cache
def cases() -> tuple[Case, ...]:
    """All rows that can be predicted; rows that differ only in their importance matrix weigh together as one."""
    found = [c for c in map(case, read("quality.jsonl")) if isinstance(c, Case)]
    same = [(c.row["table"], c.row["model"], c.row["scheme"], "imatrix" in c.row) for c in found]
    return tuple(replace(c, weight=same.count(key) ** -0.5) for c, key in zip(found, same, strict=True))


def unpredicted() -> list[tuple[Row, str]]:
    """Rows of schemes that are none of ours, each with the reason."""
    return [(row, why) for row in read("quality.jsonl") if isinstance(why := case(row), str)]


def pack(constants: Constants) -> Vector:
    c = constants
    laws = (c.plain, c.weighted, c.integer)
    return np.log([
        *(law.scale for law in laws), *(law.exponent for law in laws), c.values, c.downs, c.size, c.per_row,
        c.per_nat["choice"], c.per_nat["answers"], c.unknown_family, *(c.families[f] for f in FAMILIES),
        *(c.gains[method][bits] for method, bits in GAINS),
    ])  # fmt: skip


def unpack(logs: Vector) -> Constants:
    x = [float(v) for v in np.exp(logs)]
    gains: dict[str, dict[int, float]] = {}
    for (method, bits), value in zip(GAINS, x[13 + len(FAMILIES) :], strict=True):
        gains.setdefault(method, {})[bits] = value
    plain, weighted, integer = (Law(scale=x[i], exponent=x[i + 3]) for i in range(3))
    return Constants(
        plain=plain, weighted=weighted, integer=integer, values=x[6], downs=x[7], size=x[8], per_row=x[9],
        per_nat={"choice": x[10], "answers": x[11]}, unknown_family=x[12],
        families={"Llama-3": 1.0} | dict(zip(FAMILIES, x[13:], strict=False)), gains=gains,
    )  # fmt: skip


START = unpack(np.log([
    6, 6, 6, 1, 1, 1, 2, 2, 0.25, 1.3, 0.5, 1, 0.65, *([0.65] * len(FAMILIES)), *([0.6] * len(GAINS)),
]))  # fmt: skip
WIDTH = np.array(
    [1.5] * 3 + [0.3] * 3 + [1, 1, 0.7, 0.5, 0.7, 0.7, 0.4] + [0.5] * len(FAMILIES) + [0.4] * len(GAINS)
)
"""A weak prior: each constant's logarithm lies about so near its start, a family's so near the families' mean."""


def fitted(found: Sequence[Case], start: Constants = START) -> Constants:
    """The constants with the least robust squares over these rows (Levenberg-Marquardt)."""
    x, damping = pack(start), 1e-2
    now = residuals(found, x)
    for _ in range(60):
        slopes = np.stack(
            [(residuals(found, x + step) - now) / 1e-5 for step in 1e-5 * np.eye(len(x))], axis=1
        )
        normal = slopes.T @ slopes
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -slopes.T @ now)
        then = residuals(found, x + step)
        gain = now @ now - then @ then
        if gain <= 0:
            damping *= 4
            continue
        x, now, damping = x + step, then, damping / 3
        if gain < 1e-6 * (now @ now):
            break
    return unpack(x)


def residuals(found: Sequence[Case], logs: Vector) -> Vector:
    constants = unpack(logs)
    far = np.array([c.weight * distance(c, constants) for c in found])
    size = np.abs(far)
    robust = np.sign(far) * np.where(size < 1.5, size, np.sqrt(np.maximum(3 * size - 2.25, 0)))  # Huber
    centers = pack(START)
    centers[13 : 13 + len(FAMILIES)] = logs[12]
    return np.concatenate([robust, (logs - centers) / WIDTH])


def distance(c: Case, constants: Constants) -> float:
    """How far off the prediction is, in units of what it may be off."""
    lost = max(c.nats(constants, c.row["family"]), 1e-9)
    if c.row["quantity"] == "ppl_ratio":
        published = max(math.log(c.row["value"]), 1e-6)
        return math.log(published / lost) / math.hypot(SIGMA, min(degradation.FLOOR / published, 3.0))
    expected = kept(c, lost, constants)
    return float((c.row["value"] - expected) / math.hypot(noise(c), SIGMA * min(1.0 - expected, 0.3)))


def kept(c: Case, lost: float, constants: Constants) -> float:
    chance = min(c.row["chance"] / c.row["base"], 0.9)
    return degradation.kept(lost, c.row["measure"], chance=chance, constants=constants)


def noise(c: Case) -> float:
    """Standard error of the benchmarks' mean (binomial, from their numbers of questions), relative."""
    return float(c.row["standard_error"] / c.row["base"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    case: Case
    known: bool
    """The fit had rows of this family."""
    published: float
    """Nats, or share of accuracy kept."""
    middle: float
    low: float
    high: float
    noise: float
    """What the published number itself may be off."""

    @property
    def covered(self) -> bool:
        return self.low - self.noise <= self.published <= self.high + self.noise


def predict(c: Case, constants: Constants, *, known: bool) -> Prediction:
    lost = c.nats(constants, c.row["family"] if known else None)
    factor = degradation.SPREAD if known else degradation.SPREAD_UNKNOWN
    if c.row["quantity"] == "ppl_ratio":
        return Prediction(
            case=c, known=known, published=math.log(c.row["value"]), middle=lost, low=lost / factor,
            high=lost * factor, noise=degradation.FLOOR,
        )  # fmt: skip
    return Prediction(
        case=c, known=known, published=c.row["value"], middle=kept(c, lost, constants),
        low=kept(c, lost * factor, constants), high=kept(c, lost / factor, constants), noise=1.645 * noise(c),
    )  # fmt: skip


def left_out(key: str) -> dict[str, list[Prediction]]:
    """Each table (or family) predicted by a fit on all the others.

    A method's factor cannot be told without a row of it: such rows are left to the families' turn.
    """
    found, best = cases(), fitted(cases())
    result = {}
    for name in dict.fromkeys(c.row[key] for c in found):
        rest = [c for c in found if c.row[key] != name]
        constants = fitted(rest, best)
        families, gains = {c.row["family"] for c in rest}, {c.gain for c in rest} | {None}
        result[name] = [
            predict(c, constants, known=c.row["family"] in families)
            for c in found
            if c.row[key] == name and c.gain in gains
        ]
    return result


def coverage(predictions: Sequence[Prediction]) -> float:
    return sum(p.covered for p in predictions) / len(predictions)


def median_factor(predictions: Sequence[Prediction]) -> float:
    """Of perplexities: by which factor the predicted nats are off, either way."""
    logs = [abs(math.log(max(p.published, 1e-6) / p.middle)) for p in predictions if is_perplexity(p)]
    return math.exp(median(logs)) if logs else math.nan


def median_points(predictions: Sequence[Prediction]) -> float:
    """Of accuracies: by how many percent of the score the prediction is off, either way."""
    off = [100 * abs(p.published - p.middle) for p in predictions if not is_perplexity(p)]
    return median(off) if off else math.nan


def is_perplexity(p: Prediction) -> bool:
    return bool(p.case.row["quantity"] == "ppl_ratio")


def cache_cost() -> float:
    """Accuracy or perplexity lost per rounding error of a KV cache, relative: weighted least squares."""
    rows = [row for row in read("cache_quality.jsonl") if "not rounded" not in row.get("note", "")]
    top = bottom = 0.0
    for row in rows:
        error = degradation.cache_error(row["k"], row["v"])
        lost = row["value"] - 1 if row["quantity"] == "ppl_ratio" else 1 - row["value"]
        weight = 1 / (row["standard_error"] ** 2 + (0.4 * 2.7 * error) ** 2)
        top, bottom = top + weight * error * lost, bottom + weight * error**2
    return top / bottom


def main() -> None:
    print(f"constants: {fitted(cases())}\n\ncache cost: {cache_cost():.2f}\n")
    for key in ("table", "family"):
        print(f"leave one {key} out{'':<8} rows  off by (median)   covered  width (median)")
        result = left_out(key)
        for name, found in (*result.items(), ("all", [p for ps in result.values() for p in ps])):
            ppl, acc = [p for p in found if is_perplexity(p)], [p for p in found if not is_perplexity(p)]
            if ppl:
                print(
                    f"{name:<22} {len(ppl):>6}  factor {median_factor(ppl):<9.2f}  {coverage(ppl):>6.0%}"
                    f"  {median(p.high / p.low for p in ppl):.1f}-fold"
                )
            if acc:
                print(
                    f"{name:<22} {len(acc):>6}  {median_points(acc):.1f} % of score   {coverage(acc):>6.0%}"
                    f"  {100 * median(p.high - p.low for p in acc):.1f} % of score"
                )
        print()
    for row, why in unpredicted():
        print(f"not predicted: {row['id']} {row['model']} {row['scheme']}: {why}")
    if "--rows" in sys.argv:
        best = fitted(cases())
        for c in cases():
            p = predict(c, best, known=True)
            where = "" if p.covered else " OUTSIDE"
            interval = f"{p.middle:.5f} [{p.low:.5f}, {p.high:.5f}]{where}"
            print(f"{c.row['id']} {c.row['model']} {c.row['scheme']}: {p.published:.5f}, {interval}")


if __name__ == "__main__":
    main()
