"""What the plan allows this server, so that one page of metrics shows memory beside its budget."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .metrics import Gauge


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """Bytes by part and place ("device" or "host"), and the budget of each place."""

    parts: Mapping[tuple[str, str], int]
    budget: Mapping[str, int]

    def gauges(self) -> Sequence[Gauge]:
        parts = [({"part": part, "place": place}, count) for (part, place), count in self.parts.items()]
        budget = [({"place": place}, count) for place, count in self.budget.items()]
        return [
            Gauge("edgepack_memory_planned_bytes", "Memory that the plan counts on, by part.", parts),
            Gauge(
                "edgepack_memory_budget_bytes",
                "Memory that the plan may use; of unified memory once.",
                budget,
            ),
        ]


UNPLANNED = Planned(parts={}, budget={})


def read(path: Path) -> Planned:
    """The plan.json of a bundle. Raises OSError, and ValueError where it is not one."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        parts: dict[tuple[str, str], int] = {}
        for part in plan["memory"]["parts"]:
            key = part["name"], part["place"]
            parts[key] = parts.get(key, 0) + int(part["bytes"])
        budget = plan["budget"]
        places = ("host",) if budget["unified"] else ("device", "host")
        return Planned(parts=parts, budget={place: int(budget[place]) for place in places})
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a plan of edgepack: {error!r}") from error
