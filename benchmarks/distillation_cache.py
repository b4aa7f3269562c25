"""What it costs to keep a teacher, and what is lost of it: against its bare forward pass, and against all its logits.

    python benchmarks/distillation_cache.py speed TEACHER... [--shape NAME...] [--tokens N] [--pairs N] [--threads N]
    python benchmarks/distillation_cache.py outcomes TEACHER [--layers 0,1,5] [--tokens N]

``speed``: the same batches go through the teacher with and without keeping, in turns, in one process; both make the
logits of all responses. ``--shape``: also a random teacher of that shape (scripts/random_model.py). ``outcomes``: the
divergence of a pruned student and its gradient, by k kept outcomes and a tail against all logits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import random_model

from edgepack.builders.distill import Objective, examples, loss
from edgepack.builders.distill.examples import Examples
from edgepack.builders.distill.loss import Soft
from edgepack.builders.distill.teacher import (
    BATCH_TOKENS,
    DEFAULT_K,
    SHARD_ROWS,
    Identity,
    Outcomes,
    Teacher,
    batches,
    computed,
    known_ids,
    ranges,
    read,
    row_type,
    write,
)
from edgepack.calibration import encoder

TEMPERATURE = 2.0
LENGTH = 256
"""Tokens of an example."""


def speed(path: Path, tokens: int, pairs: int, threads: int, work: Path) -> None:
    """Prints tokens a second with and without keeping, and their ratio: the median of pairs, and the middle half."""
    ids = known_ids(path)
    data = _random_examples(ids, tokens, work / "examples")
    identity = Identity(
        teacher="", tokenizer="", examples=data.digest, k=DEFAULT_K, temperature=TEMPERATURE, vocabulary=ids,
        precision=computed("auto"), batch_tokens=BATCH_TOKENS, shard_rows=SHARD_ROWS,
    )  # fmt: skip
    teacher = Teacher(path, path.name, identity.precision, threads)
    outcomes = Outcomes(identity, threads)
    todo = list(batches(data, 0, len(data), identity.batch_tokens))

    def bare() -> None:
        with torch.inference_mode():
            for batch in todo:
                for _ in teacher.logits(data, batch):
                    pass

    def keeping() -> None:
        for number, (first, last) in enumerate(ranges(data, identity.shard_rows)):
            shard = np.empty(int(data.rows[last] - data.rows[first]), outcomes.row)
            for batch in batches(data, first, last, identity.batch_tokens):
                where = [np.arange(data.rows[at], data.rows[at + 1]) for at in batch.examples]
                shard[np.concatenate(where) - data.rows[first]] = read(teacher, outcomes, data, batch)
            write(shard, number, work)

    bare()
    keeping()
    walls, cpus, rates = [], [], []
    for pair in range(pairs):
        spent = {}
        for one in (bare, keeping) if pair % 2 else (keeping, bare):
            began, used = time.perf_counter(), time.process_time()
            one()
            spent[one] = (time.perf_counter() - began, time.process_time() - used)
        walls.append(spent[bare][0] / spent[keeping][0])
        cpus.append(spent[bare][1] / spent[keeping][1])
        rates.append((data.response_tokens / spent[bare][0], data.response_tokens / spent[keeping][0]))
    low, middle, high = statistics.quantiles(walls, n=4)
    without, with_it = (statistics.median(rate[at] for rate in rates) for at in (0, 1))
    print(
        f"{path.name}: {ids} ids, {identity.precision}, {threads} thread(s), "
        f"{pairs} pairs of {data.response_tokens} tokens: "
        f"bare {without:.0f} tok/s, keeping {with_it:.0f}, ratio {middle:.3f} [{low:.3f}, {high:.3f}], "
        f"of CPU time {statistics.median(cpus):.3f}; {outcomes.row.itemsize} B a token of {2 * ids} in 16 bits",
        flush=True,
    )


def by_outcomes(path: Path, layers: Sequence[int], tokens: int) -> None:
    """Prints, for k and T, tail mass, and how the buckets' divergence and gradient stand to those of all logits."""
    from transformers import AutoModelForCausalLM

    ids = encoder.encoder(path).encode((path / "heldout.txt").read_text(encoding="utf-8"))[
        : tokens // LENGTH * LENGTH
    ]
    windows = torch.tensor(ids).view(-1, LENGTH)
    teacher = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    student.model.layers = torch.nn.ModuleList(student.model.layers[at] for at in layers)
    with torch.no_grad():
        full = teacher(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
        hidden = student.model(windows, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    hidden = hidden.clone().requires_grad_()
    targets = windows[:, 1:].flatten()
    for temperature in (1.0, 2.0):
        objective = Objective(alpha=0.0, temperature=temperature)
        whole, slope = _divergence(hidden, student.lm_head, targets, full, objective)
        halves = [_divergence(hidden[part], student.lm_head, targets[part], full[part], objective)[1]
                  for part in (slice(0, None, 2), slice(1, None, 2))]  # fmt: skip
        noise = 1 - float(torch.cosine_similarity(halves[0], halves[1], dim=0))
        print(
            f"T={temperature:g}: all logits {whole:.4f} nats; halves of the data differ in direction by {noise:.2e}"
        )
        for k in (16, 32, 64, 88, 128, 256):
            soft = _soft(full, k, temperature)
            kl, gradient = _divergence(hidden, student.lm_head, targets, soft, objective)
            lse = soft.lse if temperature == 1 else soft.lse_t
            tail = float(1 - (soft.logits / temperature - lse[:, None]).exp().sum(1).mean())
            apart = 1 - float(torch.cosine_similarity(gradient, slope, dim=0))
            size = row_type(k, 151_936).itemsize
            print(
                f"  k={k:<4} {size} B at 151,936 ids  tail {tail:.3f}  KL {kl:.4f} ({kl / whole:.1%})  "
                f"gradient of the head: direction off by {apart:.2e}, length {gradient.norm() / slope.norm():.1%}",
                flush=True,
            )


def _divergence(
    hidden: torch.Tensor,
    head: torch.nn.Module,
    targets: torch.Tensor,
    soft: Soft | torch.Tensor,
    objective: Objective,
) -> tuple[float, torch.Tensor]:
    """(mean divergence, gradient of it by the head's weights as a vector)."""
    _, apart = loss.chunked(hidden, head, targets, soft, objective, chunk=4096)
    mean = apart / len(targets)
    (gradient,) = torch.autograd.grad(mean, (head.weight,))
    return float(mean), gradient.flatten()


def _soft(full: torch.Tensor, k: int, temperature: float) -> Soft:
    shifted = full - full.amax(1, keepdim=True)
    logits, ids = shifted.topk(k, 1)
    return Soft(
        ids=ids, logits=logits, lse=shifted.logsumexp(1), lse_t=(shifted / temperature).logsumexp(1),
        temperature=temperature, vocabulary=full.shape[1],
    )  # fmt: skip


def _random_examples(vocabulary: int, tokens: int, folder: Path) -> Examples:
    """Random tokens, all of them responses: the most that there can be to keep."""
    random = np.random.default_rng(0)
    marks = [False] + [True] * (LENGTH - 1)
    return examples.write(
        ((random.integers(0, vocabulary, LENGTH), marks) for _ in range(max(1, tokens // LENGTH))), folder
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "outcomes"])
    parser.add_argument("teachers", type=Path, nargs="*")
    parser.add_argument("--shape", action="append", default=[], choices=sorted(random_model.SHAPES))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--layers", default="0,1,5")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        for path in options.teachers:
            if options.what == "outcomes":
                by_outcomes(path, [int(at) for at in options.layers.split(",")], options.tokens)
            else:
                speed(path, options.tokens, options.pairs, options.threads, Path(place))
        for name in options.shape:
            path = Path(place) / name
            random_model.write(random_model.SHAPES[name], path, seed=0, dtype="bf16")
            speed(path, options.tokens, options.pairs, options.threads, Path(place))


if __name__ == "__main__":
    main()
