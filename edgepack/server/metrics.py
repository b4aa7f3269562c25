"""What the server counts, in Prometheus' text form (version 0.0.4).

Written here and not by prometheus_client: three kinds of series are all there is, a device gets one package less,
and no registry is global. Only the event loop's thread counts, so nothing is locked.
https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
WHOLE_REQUEST = (0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper ends of the histograms' buckets, seconds."""

Labels = Mapping[str, str]


class Counter:
    """A sum that only grows, one for each set of label values."""

    def __init__(self, name: str, help_text: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self.help = help_text
        self._labels = tuple(labels)
        self._sums: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, amount: float = 1, **labels: str) -> None:
        key = tuple(labels[name] for name in self._labels)
        self._sums[key] = self._sums.get(key, 0) + amount

    def value(self, **labels: str) -> float:
        return self._sums.get(tuple(labels[name] for name in self._labels), 0)

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.help, "counter")
        for key, total in sorted(self._sums.items()):
            yield _sample(self.name, dict(zip(self._labels, key, strict=True)), total)


class Histogram:
    """How many observations were at most each of some values."""

    def __init__(self, name: str, help_text: str, ends: Sequence[float]) -> None:
        self.name = name
        self.help = help_text
        self._ends = tuple(ends)
        self._counts = [0] * (len(self._ends) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._ends, value)] += 1
        self._sum += value

    @property
    def count(self) -> int:
        return sum(self._counts)

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.help, "histogram")
        total = 0
        for end, count in zip((*map(_number, self._ends), "+Inf"), self._counts, strict=True):
            total += count
            yield _sample(f"{self.name}_bucket", {"le": end}, total)
        yield _sample(f"{self.name}_sum", {}, self._sum)
        yield _sample(f"{self.name}_count", {}, total)


@dataclass(frozen=True, slots=True)
class Gauge:
    """A value read at the moment of asking, by label values."""

    name: str
    help: str
    samples: Sequence[tuple[Labels, float]]

    def lines(self) -> Iterator[str]:
        if self.samples:
            yield from _head(self.name, self.help, "gauge")
        for labels, value in self.samples:
            yield _sample(self.name, labels, value)


Series = Counter | Histogram | Gauge


@dataclass(frozen=True, slots=True)
class Metrics:
    """Everything that is counted while requests come and go."""

    requests: Counter = field(
        default_factory=lambda: Counter(
            "edgepack_requests_total",
            "Requests answered, by route and HTTP status (499: the client went away).",
            ("endpoint", "status"),
        )
    )
    prompt_tokens: Counter = field(
        default_factory=lambda: Counter(
            "edgepack_prompt_tokens_total", "Tokens of prompts whose generation began."
        )
    )
    cached_tokens: Counter = field(
        default_factory=lambda: Counter(
            "edgepack_prompt_tokens_cached_total", "Prompt tokens that a slot still held from before."
        )
    )
    generation_tokens: Counter = field(
        default_factory=lambda: Counter("edgepack_generation_tokens_total", "Tokens generated.")
    )
    refused: Counter = field(
        default_factory=lambda: Counter(
            "edgepack_refused_total", "Requests refused before or while they ran, by reason.", ("reason",)
        )
    )
    aborted: Counter = field(
        default_factory=lambda: Counter(
            "edgepack_aborted_total", "Requests whose client went away before the end, waiting ones too."
        )
    )
    first_token: Histogram = field(
        default_factory=lambda: Histogram(
            "edgepack_time_to_first_token_seconds",
            "From a request's arrival, its body read, to its first token.",
            FIRST_TOKEN,
        )
    )
    between_tokens: Histogram = field(
        default_factory=lambda: Histogram(
            "edgepack_inter_token_latency_seconds",
            "From one token to the next of a request.",
            BETWEEN_TOKENS,
        )
    )
    request: Histogram = field(
        default_factory=lambda: Histogram(
            "edgepack_request_seconds", "Whole requests that generate.", WHOLE_REQUEST
        )
    )

    def text(self, *others: Series) -> str:
        """The page that Prometheus reads."""
        series: list[Series] = [
            self.requests, self.prompt_tokens, self.cached_tokens, self.generation_tokens, self.refused,
            self.aborted, self.first_token, self.between_tokens, self.request, *others,
        ]  # fmt: skip
        return "".join(f"{line}\n" for one in series for line in one.lines())


def process_memory(status: Path = Path("/proc/self/status")) -> Mapping[str, int]:
    """Bytes of this process that are in memory now, and at most so far; empty where there is no /proc."""
    if not status.is_file():
        return {}
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
    return {
        part: int(fields[key].split()[0]) * 1024 for part, key in (("resident", "VmRSS"), ("peak", "VmHWM"))
    }


def _head(name: str, help_text: str, kind: Literal["counter", "gauge", "histogram"]) -> Iterator[str]:
    yield f"# HELP {name} {_escaped(help_text)}"
    yield f"# TYPE {name} {kind}"


def _sample(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(text, quotes=True)}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {_number(value)}" if inside else f"{name} {_number(value)}"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _escaped(text: str, *, quotes: bool = False) -> str:
    out = text.replace("\\", "\\\\").replace("\n", "\\n")
    return out.replace('"', '\\"') if quotes else out
