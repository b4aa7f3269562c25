"""What distilling brings: students of one size, taught with equal steps on the same data, over several seeds.

    python benchmarks/distillation.py DIR --data FILE [--teacher demo] [--prune layers=3] [--steps 400] [--seeds 0 1 2]

Ways, each once per seed; all see the same examples in the same order:

    distilled    starts as what is kept of the teacher; its kept logits beside the data
    hard labels  the same start, the data alone
    online       the same start, the teacher's whole vocabulary at every step
    random       starts as random weights of the same shape; taught as distilled

Measured by `quality` on a text that nobody was trained on: perplexity, KL to the teacher, same first choice. Prints a
Markdown table (mean and standard deviation over the seeds) and writes DIR/curves.svg and DIR/rows.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgepack import distillation, heldout, hub, modelcard, quality, serde, students, workspace
from edgepack.artifact import Checkpoint
from edgepack.builders.distill import Objective, Recipe
from edgepack.drawing import Series, curves
from edgepack.progress import Terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    way: str
    seed: int
    perplexity: float
    kl: float
    """Of the teacher to it, nats a token."""
    same_top: float
    recovered: float | None
    seconds: float
    """Wall time of everything, with the teacher's pass where nothing of it was kept yet."""


WAYS: Mapping[str, Callable[[distillation.Options], distillation.Options]] = {
    "distilled": lambda options: options,
    "hard labels": lambda options: replace(
        options, recipe=replace(options.recipe, objective=Objective(alpha=1.0))
    ),
    "online": lambda options: replace(options, online=True),
    "random": lambda options: options,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--prune", type=students.parse, default="layers=3")
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--text", type=Path, help="held-out text; default: the built-in one")
    parser.add_argument("--preset", type=Path, help="a recipe; default: the default one")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    progress = Terminal()
    parent = hub.resolve(given.teacher, progress=progress)
    base = Recipe() if given.preset is None else serde.load_yaml(Recipe, given.preset)
    recipe = replace(
        base, steps=given.steps, batch=given.batch, micro=given.batch, length=given.length, patience=0
    )
    text = heldout.read(given.text)
    rows, drawn = [], []
    for seed in given.seeds:
        options = distillation.Options(
            recipe=replace(recipe, seed=seed), data=tuple(given.data), threads=given.threads
        )
        for way in given.ways:
            start = random(parent, given.prune, given.folder, seed) if way == "random" else given.prune
            began = time.monotonic()
            made = distillation.make(
                parent, start, WAYS[way](options), given.folder / "work", progress, name=f"{way} {seed}"
            )
            seconds = time.monotonic() - began
            row = measured(way, seed, made, parent, text, seconds, given.threads, progress)
            print(json.dumps(asdict(row)), flush=True)
            rows.append(row)
            if seed == given.seeds[0]:
                drawn.append(Series(name=way, points=checks(made.path)))
    title = f"Held-out cross entropy of {students.label(given.prune)} of {given.teacher}"
    (given.folder / "curves.svg").write_text(curves(title, drawn, x="step", y="nats a token"))
    (given.folder / "rows.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(table(rows))


def measured(
    way: str,
    seed: int,
    made: distillation.Student,
    parent: Checkpoint,
    text: heldout.Text,
    seconds: float,
    threads: int,
    progress: Terminal,
) -> Row:
    found = quality.measure(
        made.path, against=parent.path, text=text, tokens=24576, threads=threads, progress=progress
    )
    if found.parent is None:
        raise AssertionError("it was compared with its teacher")
    closed = made.report.held_out[0].recovered
    return Row(
        way=way,
        seed=seed,
        perplexity=found.perplexity.value,
        kl=found.parent.kl.value,
        same_top=found.parent.same_top.value,
        recovered=None if closed is None else closed.value,
        seconds=seconds,
    )


def random(parent: Checkpoint, shape: students.Prune, folder: Path, seed: int) -> Checkpoint:
    """Untrained weights of the pruned shape, as transformers draws them, with the teacher's tokenizer."""
    place = folder / f"random-{students.label(shape)}-{parent.revision[-12:]}-{seed}"
    if not place.is_dir():
        config = students.shrunk(serde.read_object(parent.path / "config.json"), shape)
        torch.manual_seed(seed)
        with workspace.whole_dir(place) as partial:
            (partial / "config.json").write_text(json.dumps(config, indent=2))
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(partial))
            model.half().save_pretrained(partial)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(parent.path / name, partial / name)
    return hub.resolve(str(place), progress=Terminal())


def checks(student: Path) -> tuple[tuple[float, float], ...]:
    """(step, held-out cross entropy) of a student's curve."""
    lines = (student / modelcard.STEPS).read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return tuple(
        (float(entry["step"]), float(entry["held_out"]["ce"])) for entry in entries if "held_out" in entry
    )


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| way | perplexity | KL to the teacher | same first choice | seconds |",
        "|---|---|---|---|---|",
    ]
    for way in dict.fromkeys(row.way for row in rows):
        own = [row for row in rows if row.way == way]
        cells = [
            spread([row.perplexity for row in own], "{:.2f}"),
            spread([row.kl for row in own], "{:.4f}"),
            spread([row.same_top for row in own], "{:.1%}"),
            f"{statistics.fmean(row.seconds for row in own):.0f}",
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], form: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{form.format(statistics.fmean(values))} ± {form.format(deviation)}"


if __name__ == "__main__":
    main()
