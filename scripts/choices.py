"""Prints what the planner chooses for each built-in device: the table in docs/choosing.md.

python scripts/choices.py
"""

from __future__ import annotations

from edgepack import pipeline, profile
from edgepack.plan import Plan, Request
from edgepack.units import show

HEADER = (
    "| device | chosen for quality | takes, of what there is | decodes, context full | chosen for latency | decodes |\n"
    "| --- | --- | --- | --- | --- | --- |\n"
)


def table() -> str:
    """Markdown, one row per profile, by name."""
    models = pipeline.candidates(None, None)
    rows = []
    for name in profile.names():
        device = profile.load(name)
        best = pipeline.make_plan(Request(profile=device), models)
        fast = pipeline.make_plan(Request(profile=device, goal="latency"), models)
        rows.append(
            f"| {name} | {label(best)} | {taken(best)} | {pace(best)} | {label(fast)} | {pace(fast)} |\n"
        )
    return HEADER + "".join(rows)


def label(plan: Plan) -> str:
    return f"{plan.model.id} {plan.scheme}, {plan.settings.kv_type} cache"


def taken(plan: Plan) -> str:
    """Upper end of the need in the pool where the weights lie, of its budget."""
    need = plan.memory.high if plan.budget.unified else plan.memory.at("device")
    return f"{show(need)} of {show(plan.budget.device)}"


def pace(plan: Plan) -> str:
    return f"{plan.speed.decode_full:.1f} tok/s, at least {plan.speed.decode_full_low:.1f}"


if __name__ == "__main__":
    print(table(), end="")
