"""Speed constants of one device from its own runs: readings out of files, two constants, and a profile that has them.

Two models of different size suffice: the small one shows what a layer costs, the large one what the memory gives.
Readings that this device cannot have made, or that contradict the others, are refused with the reason.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypedDict

from edgepack import catalog, ggufheader, modelspec, schemes, serde, speed
from edgepack.check import too_busy as too_busy
from edgepack.errors import BadInput, EdgepackError
from edgepack.modelspec import ModelSpec
from edgepack.profile import DeviceProfile, PowerMode, SpeedConstants
from edgepack.progress import Progress
from edgepack.screen import PLAIN, Screen
from edgepack.shell import TimedOut, run
from edgepack.speed import Terms, Work
from edgepack.toolchain import Toolchain

SPREAD_TWO = 0.153
"""Logarithmic half width around two or more readings: holds 90 % of the models in published sets of one host, each
predicted from two others, where experts and recurrent layers count as speed.UNLIKE (scripts/fit_speed.py)."""
SPREAD_ONE = 0.23
"""The same from one reading and the class's overhead."""
AGREE = 0.30
"""Share by which a reading may differ from the law through all of them; beyond, it measured something else."""
REPEAT = 1.25
"""Times as fast as a repeat of the same model and scheme, above which both contradict each other."""
STALLED = 0.05
"""Share of the peak bandwidth below which a large model was not decoded from this device's memory."""
LARGE = 10**9
"""Bytes a token above which that holds; small models are slow for other reasons."""
FLOOR = 0.01
"""Share of the peak bandwidth below which no model was decoded here, however small: the least published of a
device with a profile is 5 %, SmolLM-135M on a Jetson Orin Nano (tests/truth/speed*.jsonl)."""
SLOWEST, FASTEST = 1e-6, 1e9
"""Tokens per second beyond which a figure is no speed."""
LONGEST = 10**9
"""Tokens beyond which a figure counts none."""
NOISE = 0.03
"""Relative error of one reading: published repeats of one shape on one host differ by 2 to 5 %."""
UNSURE = 0.5
"""Logarithmic error of a class's overhead a layer (scripts/fit_speed.py)."""
STEPS = 600
"""Overheads tried to either side of the class's, up to twenty times as much or as little."""
APART = 1.5
"""Times as many bytes a layer as another reading, which two must have to tell bandwidth from overhead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One model's speed on the device, and where it was read."""

    where: str
    """File and place in it."""
    model: str
    scheme: str
    work: Work
    decode: float
    """Tokens per second."""
    prefill: float | None
    kv_bytes: int
    """KV cache read for one token, averaged over the run."""
    served: bool = False
    """Through a server, whose own share is in the figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A reading that was not used, and why."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    where: str
    model: str
    scheme: str
    decode: float
    predicted: float
    """By the constants fitted on all of them, this one included."""

    @property
    def relative(self) -> float:
        return self.predicted / self.decode - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    profile: DeviceProfile
    power_mode: str
    constants: SpeedConstants
    residuals: tuple[Residual, ...]
    refused: tuple[Refused, ...]
    warnings: tuple[str, ...]


def calibrate(
    profile: DeviceProfile,
    mode: PowerMode,
    readings: Sequence[Reading],
    refused: Sequence[Refused] = (),
    *,
    warnings: Sequence[str] = (),
) -> Calibration:
    """The device's constants in this power mode. Raises BadInput with every reason when no reading is left.

    ``warnings``: what the caller knows of the readings, to be shown and written with the rest.
    """
    kept, more = _plausible(mode, readings)
    out = [*refused, *more]
    while True:
        if not kept:
            raise BadInput(
                "\n  ".join(
                    [
                        f"no reading can be used for {profile.name} in {mode.name}",
                        *(f"{r.where}: {r.reason}" for r in out),
                    ]
                ),
                hint="give llama-bench's JSON of two models that fit this device, one small and one large",
            )
        constants = _solve(profile, mode, kept)
        residuals = tuple(_residual(mode, constants, reading) for reading in kept)
        worst = max(residuals, key=lambda r: abs(math.log(r.predicted / r.decode)))
        if abs(worst.relative) <= AGREE:
            break
        if len(kept) < 3:
            names = " and ".join(f"{r.where} ({r.model} {r.scheme}, {r.decode:g} tok/s)" for r in kept)
            raise BadInput(
                f"the readings contradict each other: {names}; no bandwidth and no overhead per layer give both within "
                f"{AGREE:.0%}",
                hint="measure again on an idle device in one power mode, or give a third model",
            )
        out.append(
            Refused(
                where=worst.where,
                reason=f"{worst.model} {worst.scheme}: {worst.decode:g} tok/s, where all readings together say "
                f"{worst.predicted:.1f}",
            )
        )
        kept = [reading for reading in kept if reading.where != worst.where]
    return Calibration(
        profile=profile,
        power_mode=mode.name,
        constants=constants,
        residuals=residuals,
        refused=tuple(out),
        warnings=(*warnings, *_warnings(kept)),
    )


def to_yaml(found: Calibration, *, base: str) -> str:
    """A profile file that extends ``base`` and has the constants in the power mode they were measured in."""
    profile, constants = found.profile, found.constants
    modes = tuple(
        replace(mode, speed=constants) if mode.name == found.power_mode else mode
        for mode in profile.power_modes
    )
    uncertain = tuple(name for name in profile.uncertain if name != "speed")
    document = {
        "extends": base,
        "name": profile.name if profile.name.endswith("-calibrated") else f"{profile.name}-calibrated",
        "power_modes": serde.dump(modes),
        "default_mode": found.power_mode,
        "uncertain": list(uncertain),
    }
    lines = [
        "# Written by edgepack calibrate. What is not here is as in the profile that this one extends.",
        f"# {constants.runtime} in {found.power_mode}, {constants.readings} reading(s): tok/s, and by the constants",
        *(
            f"#   {r.model} {r.scheme}: {r.decode:.2f}, {r.predicted:.2f} ({r.relative:+.1%})"
            for r in found.residuals
        ),
        *(f"# not used: {r.where}: {r.reason}" for r in found.refused),
        *(f"# {warning}" for warning in found.warnings),
    ]
    return "\n".join(line.replace("\n", " ") for line in lines) + "\n" + serde.to_yaml(document)


class ResidualDocument(TypedDict):
    """A reading, and what the constants make of it, in tokens per second."""

    where: str
    model: str
    scheme: str
    decode: float
    predicted: float
    relative: float


class CalibrationDocument(TypedDict):
    """The constants that were fitted on a device's own runs."""

    schema_version: Literal[1]
    profile: str
    power_mode: str
    constants: SpeedConstants
    residuals: list[ResidualDocument]
    refused: tuple[Refused, ...]
    warnings: list[str]


def to_document(found: Calibration) -> dict[str, object]:
    """The result as JSON, a CalibrationDocument."""
    residuals: list[ResidualDocument] = [
        {
            "where": r.where, "model": r.model, "scheme": r.scheme, "decode": r.decode,
            "predicted": round(r.predicted, 3), "relative": round(r.relative, 5),
        }
        for r in found.residuals
    ]  # fmt: skip
    return {
        "schema_version": 1,
        "profile": found.profile.name,
        "power_mode": found.power_mode,
        "constants": serde.dump(found.constants),
        "residuals": residuals,
        "refused": serde.dump(found.refused),
        "warnings": list(found.warnings),
    }


def table(found: Calibration, screen: Screen = PLAIN) -> str:
    """The result for people."""
    own = found.constants
    rate = f", prompt {own.prefill_tflops:.3g} TFLOPS" if own.prefill_tflops is not None else ""
    title = (
        f"{found.profile.title}, {found.power_mode}: {own.decode_efficiency:.1%} of the bandwidth, "
        f"{own.layer_overhead_us:.1f} us a layer{rate}, interval {own.relative_interval:.0%}"
    )
    lines = [
        *screen.line(title, "title"),
        "",
        *_rows(found.residuals, screen),
        *screen.lines(f"not used: {r.where}: {r.reason}" for r in found.refused),
        *screen.lines((f"warning: {warning}" for warning in found.warnings), "warning"),
    ]
    return "\n".join(lines) + "\n"


def _rows(residuals: Sequence[Residual], screen: Screen) -> list[str]:
    if screen.width is None:
        return [
            f"{r.model + ' ' + r.scheme:<44}{r.decode:>9.2f} tok/s{r.predicted:>10.2f} predicted ({r.relative:+.1%})"
            for r in residuals
        ]
    cells = [
        (f"{r.model} {r.scheme}", f"{r.decode:>7.2f}", f"{r.predicted:>9.2f}", f"{r.relative:>+6.1%}")
        for r in residuals
    ]
    return screen.columns([("model", "  tok/s", "predicted", "   off"), *cells])


# ── from readings to constants ───────────────────────────────────────────────────────────────────────


def _seconds(mode: PowerMode, reading: Reading) -> float:
    """Of one token, without its context and without the server."""
    whole = 1.0 / reading.decode
    cache = reading.kv_bytes / (speed.LAW.kv["llama.cpp"] * mode.bandwidth_gbs * 1e9)
    server = speed.SERVER.middle if reading.served else 0.0
    return max(whole - cache - server, whole / 2)


def _plausible(mode: PowerMode, readings: Sequence[Reading]) -> tuple[list[Reading], list[Refused]]:
    kept: list[Reading] = []
    refused: list[Refused] = []
    for reading in readings:
        share = reading.work.read * reading.decode / (mode.bandwidth_gbs * 1e9)
        name = f"{reading.model} {reading.scheme} at {reading.decode:g} tok/s"
        if share > 1.0:
            gbs = reading.work.read * reading.decode / 1e9
            reason = f"{name} reads {gbs:.1f} GB/s, more than the {mode.bandwidth_gbs:g} GB/s there are in {mode.name}"
            refused.append(Refused(where=reading.where, reason=reason))
        elif share < STALLED and reading.work.read > LARGE:
            reason = f"{name} reads {share:.1%} of the bandwidth: it ran elsewhere, or did not fit"
            refused.append(Refused(where=reading.where, reason=reason))
        elif share < FLOOR:
            reason = f"{name} reads {100 * share:.2g}% of the bandwidth: not even a small model is so slow"
            refused.append(Refused(where=reading.where, reason=reason))
        else:
            kept.append(reading)
    same: dict[tuple[str, str, Work], list[Reading]] = {}
    for reading in kept:
        same.setdefault((reading.model, reading.scheme, reading.work), []).append(reading)
    for (model, scheme, _), group in same.items():
        slow, fast = min(r.decode for r in group), max(r.decode for r in group)
        if fast > REPEAT * slow:
            reason = f"{model} {scheme} was read from {slow:g} to {fast:g} tok/s: the repeats contradict each other"
            refused += [Refused(where=reading.where, reason=reason) for reading in group]
            kept = [reading for reading in kept if reading not in group]
    return kept, refused


def _solve(profile: DeviceProfile, mode: PowerMode, readings: Sequence[Reading]) -> SpeedConstants:
    seconds = [_seconds(mode, reading) for reading in readings]
    rates = [2 * r.work.weights * r.prefill for r in readings if r.prefill is not None]
    works = [reading.work for reading in readings]
    peak = mode.bandwidth_gbs * 1e9
    on = speed.machine(profile, mode)
    terms = [speed.terms(on, work) for work in works]
    if apart(works):
        per_byte, per_layer = two_constants(works, seconds, terms)
        spread = SPREAD_TWO
    else:
        per_byte, per_layer = one_constant(works, seconds, terms, peak)
        spread = SPREAD_ONE
    efficiency = min(1.0, 1.0 / (per_byte * peak))
    constants = SpeedConstants(
        decode_efficiency=_digits(efficiency),
        layer_overhead_us=_digits(per_layer * 1e6),
        prefill_tflops=_digits(median(rates) / 1e12) if rates else None,
        relative_interval=0.0,
        runtime="llama.cpp",
        readings=len(readings),
    )
    off = max(
        abs(math.log(r.predicted / r.decode)) for r in (_residual(mode, constants, x) for x in readings)
    )
    least, seen = _digits(math.expm1(spread)), math.ceil(math.expm1(off) * 1e4) / 1e4
    return replace(constants, relative_interval=min(0.99, max(least, seen)))


def apart(works: Sequence[Work]) -> bool:
    """Whether they differ enough in bytes a layer to tell the two constants apart."""
    ratios = [work.read / speed.weighted_layers(work) for work in works]
    return max(ratios) > APART * min(ratios)


def two_constants(
    works: Sequence[Work], seconds: Sequence[float], terms: Sequence[Terms]
) -> tuple[float, float]:
    """Seconds a byte and a layer that fit best, the class's overhead counting as a reading of its own.

    Least squares of the relative errors over `NOISE`, and of the overhead's logarithm over `UNSURE`: two readings
    determine both constants, and a single odd one does not throw the overhead far off.
    """
    known = [p.overhead / speed.weighted_layers(w) for w, p in zip(works, terms, strict=True)]
    usual = math.exp(sum(map(math.log, known)) / len(known))
    best = (math.inf, 0.0, 0.0)
    for step in range(-STEPS, STEPS + 1):
        shift = 3.0 * step / STEPS
        per_layer = usual * math.exp(shift)
        rows = [
            (work.read / whole, 1.0 - per_layer * speed.weighted_layers(work) / whole)
            for work, whole in zip(works, seconds, strict=True)
        ]
        per_byte = sum(b * rest for b, rest in rows) / sum(b * b for b, _ in rows)
        misfit = sum((b * per_byte - rest) ** 2 for b, rest in rows) / NOISE**2 + (shift / UNSURE) ** 2
        if per_byte > 0:
            best = min(best, (misfit, per_byte, per_layer))
    return best[1], best[2]


def one_constant(
    works: Sequence[Work], seconds: Sequence[float], terms: Sequence[Terms], bandwidth: float
) -> tuple[float, float]:
    """Seconds a byte, with the class's overhead a layer; where that leaves too little time, all of it scaled."""
    per_byte, per_layer = [], []
    for work, whole, parts in zip(works, seconds, terms, strict=True):
        overhead = parts.overhead
        if whole - overhead < max(whole / 4, work.read / bandwidth):
            overhead *= whole / parts.total
        per_byte.append((whole - overhead) / work.read)
        per_layer.append(overhead / speed.weighted_layers(work))
    return median(per_byte), median(per_layer)


def _residual(mode: PowerMode, constants: SpeedConstants, reading: Reading) -> Residual:
    more = 1.0 / reading.decode - _seconds(mode, reading)
    predicted = 1.0 / (speed.own_terms(mode, reading.work, constants).total + more)
    return Residual(
        where=reading.where,
        model=reading.model,
        scheme=reading.scheme,
        decode=reading.decode,
        predicted=predicted,
    )


def _warnings(kept: Sequence[Reading]) -> Iterator[str]:
    if not apart([reading.work for reading in kept]):
        yield (
            "one size of model only: the overhead per layer is the class's, and the interval is wider; "
            "a second model of another size would settle it"
        )
    if all(reading.prefill is None for reading in kept):
        yield "no reading of a prompt: its speed stays the class's"
    mixed = {reading.scheme for reading in kept}
    if len(mixed) > 1:
        yield f"schemes are mixed ({', '.join(sorted(mixed))}): what unpacking each costs is averaged"


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


# ── readings made here ───────────────────────────────────────────────────────────────────────────────

SHAPES: Mapping[str, Mapping[str, int]] = {
    "random-0.25b": {
        "num_hidden_layers": 16,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
    },
    "random-1.1b": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
    },
}
"""Two Llamas without meaning, 0.15 and 0.65 GB in Q4_K_M: the larger fills no cache, the smaller shows the overhead."""
_SCHEME = "Q4_K_M"
_SECONDS = 600.0


def measure(
    profile: DeviceProfile,
    toolchain: Toolchain,
    folder: Path,
    progress: Progress,
    *,
    shapes: Mapping[str, Mapping[str, int]] = SHAPES,
) -> tuple[list[Reading], list[Refused]]:
    """llama-bench of two models on this machine, about a minute; the files are made in ``folder``.

    Raises NoSpace, BuildFailed when llama-bench fails, EdgepackError when it takes longer than ten minutes.
    """
    from edgepack.builders import synthetic

    records: list[tuple[str, Mapping[str, Any]]] = []
    for name, shape in shapes.items():
        spec = modelspec.from_config(
            {
                **shape,
                "model_type": "llama",
                "num_key_value_heads": 8,
                "vocab_size": 32000,
                "tie_word_embeddings": False,
            },
            name=name,
        )
        progress.step(f"measuring {name} {_SCHEME}")
        file = synthetic.write(folder / f"{name}.gguf", spec, _SCHEME)
        words: list[str | Path] = [
            toolchain.bench,
            "-m",
            file,
            "-p",
            "128",
            "-n",
            "24",
            "-r",
            "2",
            "-o",
            "jsonl",
        ]
        try:
            done = run(words, timeout=_SECONDS)
        except TimedOut as error:
            raise EdgepackError(
                f"llama-bench of {name} took longer than {_SECONDS:.0f} s",
                hint="run it by hand on an idle machine, and give its JSON with --from",
            ) from error
        said = [line for line in done.stdout.splitlines() if line.startswith("{")]
        records += [(f"llama-bench of {name}", json.loads(line)) for line in said]
    found = list(_bench_readings(records, profile, ()))
    return [r for r in found if isinstance(r, Reading)], [r for r in found if isinstance(r, Refused)]


# ── from files to readings ───────────────────────────────────────────────────────────────────────────


def read(
    path: Path, profile: DeviceProfile, mode: PowerMode, *, extra: Sequence[catalog.CatalogModel] = ()
) -> tuple[list[Reading], list[Refused]]:
    """The readings in llama-bench's JSON or JSON lines, a report of `edgepack check`, or rows like the truth file's.

    Each that cannot be used is refused with its reason. Raises NotFound, and BadInput for a file that is none of these.
    """
    readings: list[Reading] = []
    refused: list[Refused] = []
    records = _records(path)
    bench = [(where, record) for where, record in records if "avg_ts" in record]
    found = list(_bench_readings(bench, profile, extra))
    found += [
        _check_reading(where, record, profile, extra)
        if "facts" in record
        else _row_reading(where, record, profile, mode, extra)
        for where, record in records
        if "avg_ts" not in record
    ]
    for item in found:
        if isinstance(item, Reading):
            readings.append(item)
        else:
            refused.append(item)
    return readings, refused


def _records(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The objects of a JSON document, a JSON array, or JSON lines, each with its place."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        whole: object = json.loads(text)
    except (ValueError, RecursionError):
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        records = [(f"{path}:{number}", _line(path, number, line)) for number, line in lines]
    else:
        items = whole if isinstance(whole, list) else [whole]
        one = len(items) == 1
        records = [(str(path) if one else f"{path}[{at}]", item) for at, item in enumerate(items)]
    problems = [
        where for where, record in records if not isinstance(record, dict) or not _KINDS & set(record)
    ]
    if problems or not records:
        places = ", ".join(problems) or str(path)
        raise BadInput(
            f"not a reading of speed: {places}",
            hint="llama-bench -o json or jsonl, edgepack check --json, or rows of device, model, quant, decode_tps",
        )
    return records


_KINDS = {"avg_ts", "facts", "decode_tps"}


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise BadInput(f"{path} is neither JSON nor JSON lines: line {number}: {reason}") from error


def _rate(record: Mapping[str, Any], key: str) -> float | None:
    """Tokens per second; None for what is no speed."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not SLOWEST <= value <= FASTEST:
        return None
    return float(value)


def _count(record: Mapping[str, Any], key: str) -> int | None:
    """A number of tokens, 0 where the record has none; None for what is no count."""
    value = record.get(key)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LONGEST:
        return None
    return value


def _bench_readings(
    records: Sequence[tuple[str, Mapping[str, Any]]],
    profile: DeviceProfile,
    extra: Sequence[catalog.CatalogModel],
) -> Iterator[Reading | Refused]:
    """llama-bench has a record for the prompt and one for the answer; those of one model belong together."""
    groups: dict[tuple[object, ...], list[tuple[str, Mapping[str, Any]]]] = {}
    for where, record in records:
        key = tuple(
            str(record.get(name)) for name in ("model_filename", "model_size", "model_type", "n_depth")
        )
        groups.setdefault(key, []).append((where, record))
    for group in groups.values():
        answers = [
            (where, record) for where, record in group if record.get("n_gen") and not record.get("n_prompt")
        ]
        prompts = [record for _, record in group if _count(record, "n_prompt") and not record.get("n_gen")]
        if not answers:
            yield Refused(where=group[0][0], reason="no run that decodes (llama-bench -n)")
        for where, record in answers:
            yield _bench_reading(where, record, prompts, profile, extra)


def _bench_reading(
    where: str,
    record: Mapping[str, Any],
    prompts: Sequence[Mapping[str, Any]],
    profile: DeviceProfile,
    extra: Sequence[catalog.CatalogModel],
) -> Reading | Refused:
    rate = _rate(record, "avg_ts")
    if rate is None:
        return Refused(where=where, reason=f"avg_ts is {record.get('avg_ts')!r}, not a speed")
    foreign = _foreign_bench(record, profile)
    if foreign is not None:
        return Refused(where=where, reason=foreign)
    file = str(record.get("model_filename", ""))
    depth, answer = _count(record, "n_depth"), _count(record, "n_gen")
    if depth is None or answer is None:
        key = "n_depth" if depth is None else "n_gen"
        return Refused(where=where, reason=f"{key} is {record[key]!r}, not a number of tokens")
    found = _bench_model(record, file, extra)
    if isinstance(found, str):
        return Refused(where=where, reason=found)
    return _reading(
        where,
        found,
        rate,
        prefill=max((r for r in (_rate(p, "avg_ts") for p in prompts) if r is not None), default=None),
        tokens=depth + answer // 2,
    )


def _reading(
    where: str,
    found: tuple[ModelSpec, str],
    decode: float,
    *,
    prefill: float | None,
    tokens: int,
    served: bool = False,
) -> Reading:
    """``tokens``: of context that a token of the answer had behind it, on average."""
    spec, scheme = found
    return Reading(
        where=where,
        model=spec.name,
        scheme=scheme,
        work=speed.work(spec, scheme, imatrix=False),
        decode=decode,
        prefill=prefill,
        kv_bytes=_kv(spec, tokens),
        served=served,
    )


def _foreign_bench(record: Mapping[str, Any], profile: DeviceProfile) -> str | None:
    card, gpu = profile.accelerator, str(record.get("gpu_info") or "")
    layers = record.get("n_gpu_layers")
    if card is None:
        return f"it ran on {gpu}, and {profile.name} has no accelerator" if gpu and layers != 0 else None
    if layers == 0 or (not gpu and profile.backend != "metal"):
        return f"it ran on the CPU, and {profile.name} decodes on {card.name}"
    if gpu and not _same_device(gpu, (card.name, profile.match.gpu_name or card.name)):
        return f"it ran on {gpu}, not on {card.name}"
    return None


_TYPE = re.compile(r"(?:^| )([A-Z]+\d\w*(?: - (?:Small|Medium|Large))?|BF16|F16|F32|all F32)(?: |$)")
_SUFFIX = {" - Small": "_S", " - Medium": "_M", " - Large": "_L"}


def _bench_model(
    record: Mapping[str, Any], file: str, extra: Sequence[catalog.CatalogModel]
) -> tuple[ModelSpec, str] | str:
    """Shapes and scheme: of the file where it is still there, else of the catalog's model with as many weights."""
    if file and Path(file).is_file():
        try:
            spec = modelspec.from_gguf(ggufheader.parse(Path(file)), name=Path(file).stem)
        except EdgepackError as error:
            return f"{file}: {error.message}"
        return (spec, spec.gguf_scheme) if spec.gguf_scheme else f"{file} does not say its scheme"
    kind = str(record.get("model_type", ""))
    match = _TYPE.search(kind)
    if match is None:
        return f"model_type {kind!r} names no scheme, and {file or 'the file'} is not here"
    scheme = match.group(1).removeprefix("all ")
    for words, suffix in _SUFFIX.items():
        scheme = scheme.replace(words, suffix)
    count, size = record.get("model_n_params"), record.get("model_size")
    try:
        scheme = schemes.canonical(scheme)
        for entry in (*extra, *catalog.models()):
            spec = entry.spec()
            extra_weights = sum(t.elements for t in spec.tensors if t.name == "rope_freqs.weight")
            if count not in (spec.parameters, spec.parameters - extra_weights):
                continue
            sizes = [schemes.weights_bytes(spec, scheme, imatrix=imatrix) for imatrix in (False, True)]
            if isinstance(size, int) and any(abs(one - size) <= 0.01 * size for one in sizes):
                return spec, scheme
    except EdgepackError as error:
        return error.message
    return f"{kind} with {count} weights in {size} bytes is not in the catalog, and {file or 'its file'} is not here"


def _check_reading(
    where: str, record: Mapping[str, Any], profile: DeviceProfile, extra: Sequence[catalog.CatalogModel]
) -> Reading | Refused:
    facts = record["facts"] if isinstance(record["facts"], dict) else {}
    name = str(_part(facts, "bundle").get("name", ""))
    measured, machine = _part(facts, "speed"), _part(facts, "machine")
    rate = _rate(measured, "decode_per_second")
    if rate is None:
        return Refused(
            where=where, reason=f"the check of {name or 'the bundle'} did not get to measuring its speed"
        )
    served = facts.get("served")
    if served is not None:
        return Refused(
            where=where, reason=f"{name} runs on {_part(facts, 'served').get('runtime')}, not on llama.cpp"
        )
    if record.get("same_device") is not True:
        return Refused(
            where=where, reason=f"{name} was checked on a device that its profile does not describe"
        )
    load, cores, others = machine.get("load"), machine.get("cores"), measured.get("others_cores")
    if isinstance(load, int | float) and isinstance(cores, int):
        busy = too_busy(cores, load, others if isinstance(others, int | float) else None)
        if busy:
            return Refused(where=where, reason=f"{name} was checked on a busy device: {busy}")
    found = _bundle_model(name, profile, extra)
    if isinstance(found, str):
        return Refused(where=where, reason=found)
    prompt, predicted = _count(measured, "prompt_tokens"), _count(measured, "predicted_tokens")
    if prompt is None or predicted is None:
        key = "prompt_tokens" if prompt is None else "predicted_tokens"
        return Refused(where=where, reason=f"{key} is {measured[key]!r}, not a number of tokens")
    prefill = _rate(measured, "prefill_per_second")
    return _reading(where, found, rate, prefill=prefill, tokens=prompt + predicted // 2, served=True)


def _part(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = facts.get(name)
    return part if isinstance(part, dict) else {}


def _bundle_model(
    name: str, profile: DeviceProfile, extra: Sequence[catalog.CatalogModel]
) -> tuple[ModelSpec, str] | str:
    """Of a bundle's name: model, scheme, profile."""
    for scheme in sorted(schemes.GGUF, key=len, reverse=True):
        model, dash, planned = name.partition(f"-{scheme.lower()}-")
        if not dash:
            continue
        if planned not in (profile.name, profile.name.removesuffix("-calibrated"), *profile.aliases):
            return f"{name} was planned for {planned}, not for {profile.name}"
        return _named(model, scheme, extra)
    return f"the bundle's name {name!r} does not say its scheme"


def _row_reading(
    where: str,
    record: Mapping[str, Any],
    profile: DeviceProfile,
    mode: PowerMode,
    extra: Sequence[catalog.CatalogModel],
) -> Reading | Refused:
    rate = _rate(record, "decode_tps")
    device, model, quant = (str(record.get(key) or "") for key in ("device", "model", "quant"))
    if rate is None:
        return Refused(where=where, reason=f"decode_tps is {record.get('decode_tps')!r}, not a speed")
    missing = [key for key in ("device", "model", "quant") if not record.get(key)]
    if missing:
        return Refused(where=where, reason=f"{', '.join(missing)} missing")
    names = [profile.name, profile.name.removesuffix("-calibrated"), profile.title]
    if profile.accelerator is not None and profile.device_class != "jetson":
        names.append(profile.accelerator.name)
    if (profile.accelerator is not None and _on_cpu(device)) or not _same_device(
        device, names, profile.aliases
    ):
        return Refused(where=where, reason=f"it was read on {device}, not on {profile.title}")
    if record.get("power_mode") and str(record["power_mode"]) != mode.name:
        return Refused(where=where, reason=f"it was read in {record['power_mode']}, not in {mode.name}")
    runtime = str(record.get("runtime") or "llama.cpp")
    if not runtime.lower().startswith(("llama", "ollama")):
        return Refused(where=where, reason=f"it was read with {runtime}, not with llama.cpp")
    for key, value in (("context", _count(record, "context")), ("prefill_tps", _rate(record, "prefill_tps"))):
        if value is None and record.get(key) is not None:
            kind = "a number of tokens" if key == "context" else "a speed"
            return Refused(where=where, reason=f"{key} is {record[key]!r}, not {kind}")
    if record.get("runtime") and quant.lower() == "bf16":
        quant = "BF16"  # llama.cpp's; by itself the lower-case name is a checkpoint's
    found = _named(model, quant, extra)
    if isinstance(found, str):
        return Refused(where=where, reason=found)
    return _reading(
        where, found, rate, prefill=_rate(record, "prefill_tps"), tokens=(_count(record, "context") or 0) // 2
    )


def _named(model: str, quant: str, extra: Sequence[catalog.CatalogModel]) -> tuple[ModelSpec, str] | str:
    """The catalog's model of that name, or one of the same shape, and the scheme's own name."""
    entry = catalog.find(model, extra)
    if entry is None:
        every = (*extra, *catalog.models())
        keys = {key: e for e in reversed(every) if (key := _key(e.id))}
        entry = keys.get(_key(model)) or keys.get(_sibling(_key(model)))
        if entry is None:
            near = serde.did_you_mean(model, (e.id for e in every))
            return f"the catalog has no model {model!r}{near}"
    ending = _ENDING.search(model)
    if quant in _UNSAID and ending is None:
        return f"{quant!r} does not say the scheme"
    try:
        scheme = schemes.canonical(
            ending.group(1).upper() if ending is not None and quant in _UNSAID else quant
        )
        if not schemes.is_gguf(scheme):
            return f"{quant} is no scheme of GGUF files, so llama.cpp did not run it"
        spec = entry.spec()
        schemes.tensor_types(spec, scheme, imatrix=False)
    except EdgepackError as error:
        return error.message
    return spec, scheme


_ENDING = re.compile(r"[.-]((?:i?q\d|bf|f)\w*)$", re.IGNORECASE)
"""A scheme at the end of a model's name, as files have it."""
_UNSAID = ("as published", "unknown", "")
_NO_SHAPE = {
    "instruct", "it", "chat", "base", "thinking", "reasoning", "tool", "hf", "gguf", "qat", "sft", "meta",
    "2410", "2507", "2512", "v0.1", "v0.2", "v0.3", "v1.0",
}  # fmt: skip
"""Words of a name that say how a model was trained or packed, not what shape it has."""


def _key(name: str) -> tuple[str, ...]:
    """The words of a model's name that its shape depends on: google_gemma-3-1b-it.Q4_K_M gives gemma, 3, 1b."""
    plain = _ENDING.sub("", name.lower()).removesuffix(".i1")
    maker, _, rest = re.sub("/", "_", plain).partition("_")
    if rest and not re.search(r"\d", maker):
        plain = rest
    return tuple(word for word in re.split(r"[-_:/ ]+", plain) if word and word not in _NO_SHAPE)


def _sibling(key: tuple[str, ...]) -> tuple[str, ...]:
    """The key of the model that this one was trained from, shapes and all; its own where none is known."""
    match key:
        case ("deepseek", "r1", "distill", "qwen", size):
            return ("qwen2.5", size)
        case ("deepseek", "r1", "distill", "llama", size):
            return ("llama", "3.1", size)
        case ("qwen2.5", "coder", size):
            return ("qwen2.5", size)
        case (("llama" | "meta"), "3", "8b") | ("llama3" | "llama3.1", "8b"):
            return ("llama", "3.1", "8b")
        case ("llama3.2", size):
            return ("llama", "3.2", size)
        case ("smollm", size):
            return ("smollm2", size)
        case ("lfm2.5", size, *_):
            return ("lfm2", size)
    return key


def _kv(spec: ModelSpec, tokens: int) -> int:
    """Bytes of a 16-bit KV cache that hold this many tokens, all read for the next one."""
    return sum(
        kind.count * kind.heads * (kind.key_dim + kind.value_dim) * 2 * min(tokens, kind.window or tokens)
        for kind in spec.kv
    )


_VARIANTS = {
    "laptop", "ti", "super", "max", "q", "pro", "ultra", "d", "wsl",
    "agx", "nx", "nano", "xavier", "thor", "tx2", "gen", "elite",
}  # fmt: skip
"""Words that make another device of a name."""
_NOISE = {"nvidia", "geforce", "gpu", "apple", "amd", "intel", "valve", "the", "cpu"}
"""Words that say nothing about which device it is."""
_FAMILY = {"jetson", "raspberry", "rtx", "android"}
"""Words that a short name leaves out: Orin Nano, Pi 5."""
_SAME_WORD = {"mobile": "laptop", "notebook": "laptop", "wsl2": "wsl"}


def _same_device(said: str, ours: Sequence[str], aliases: Iterable[str] = ()) -> bool:
    """Whether a device as people write it is one of these names, or to the letter one of the aliases.

    All words of a name must be there, except what stands in parentheses and, in a short name, the family's. More may be
    said, but no word that makes another device; nor may it have another memory than one of ``ours`` says.
    An alias may be a class ("laptop-gpu"), so it is never a part of something longer.
    """
    tokens, words, sizes = _tokens(said), _words(said), _sizes(said)
    if tokens and any(tokens == _tokens(name) for name in (*ours, *aliases)):
        return True
    known_sizes = set[str]().union(*map(_sizes, ours))
    if not words or (sizes and known_sizes and not sizes & known_sizes):
        return False
    for name in ours:
        known, needed = _words(name), _words(re.sub(r"\(.*?\)", " ", name))
        missing = needed - words
        short = missing <= _FAMILY and words <= known
        if needed and (not missing or short) and words & _VARIANTS == known & _VARIANTS:
            return True
    return False


def _on_cpu(said: str) -> bool:
    return "cpu" in _tokens(said)


_BANDWIDTH = re.compile(r"\d+(?:\.\d+)?\s*gi?b(?:/s|ps)")
_SIZE = re.compile(r"(?<![\d.])(\d+)\s*g(?:i?b)?\b")


def _tokens(name: str) -> tuple[str, ...]:
    """A name's words in lower case, a memory as one of them and bandwidths left out."""
    plain = _SIZE.sub(r"\1gb", _BANDWIDTH.sub(" ", name.lower()))
    return tuple(_SAME_WORD.get(word, word) for word in re.split(r"[^a-z0-9]+", plain) if word)


def _sizes(name: str) -> set[str]:
    return {word for word in _tokens(name) if re.fullmatch(r"\d+gb", word)}


def _words(name: str) -> set[str]:
    """The words that tell devices apart, without the memory."""
    words = set(_tokens(name)) - _NOISE - _sizes(name)
    # An Orin is called super in its fastest mode, with the same chip.
    return words - {"super"} if "orin" in words else words
