"""Figures of students against their teacher, next to a plain computation in double precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig

from edgepack.builders import child
from edgepack.builders.distill import examples
from edgepack.builders.distill import measure as module
from edgepack.builders.distill.examples import Examples
from edgepack.builders.distill.measure import measure
from edgepack.errors import BuildFailed
from edgepack.evaluation import Reading
from edgepack.progress import Silent

pytestmark = pytest.mark.integration

COMMON = 72
SHAPE: Mapping[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "teacher": LlamaConfig(**SHAPE, vocab_size=96, tie_word_embeddings=False),
    "softcap": Gemma2Config(**SHAPE, vocab_size=80, query_pre_attn_scalar=8, final_logit_softcapping=2.0),
    "scaled": GraniteConfig(**SHAPE, vocab_size=COMMON, logits_scaling=3.0, tie_word_embeddings=True),
}


def write(place: Path, name: str) -> Path:
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16)
    model.save_pretrained(place / name)
    return place / name


def drawn(place: Path) -> Examples:
    """Of many lengths, with prompts, and answers at more than one place."""
    random = np.random.default_rng(5)

    def one() -> tuple[Any, Any]:
        size = int(random.integers(3, 60))
        marks = random.random(size) < 0.4
        marks[0], marks[-1] = False, True
        return random.integers(0, COMMON, size), marks

    return examples.write([one() for _ in range(40)], place)


@dataclass(frozen=True)
class Measured:
    known: Examples
    models: Mapping[str, Path]
    readings: tuple[Reading, ...]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    place = tmp_path_factory.mktemp("measure")
    known = drawn(place / "examples")
    models = {name: write(place, name) for name in CONFIGS}
    readings = measure(
        [models["softcap"], models["scaled"]],
        models["teacher"],
        known.folder,
        tokens=300,
        threads=1,
        progress=Silent(),
    )
    return Measured(known=known, models=models, readings=readings)


def plain(model: Path, known: Examples, count: int) -> list[torch.Tensor]:
    """Log probabilities [responses, COMMON] of each example, in 64 bits, one example at a time."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    found = []
    for at in range(count):
        tokens = torch.from_numpy(known[at].tokens.astype(np.int64))
        with torch.inference_mode():
            logits = loaded(tokens[None]).logits[0, :-1, :COMMON]
        found.append(torch.log_softmax(logits[torch.from_numpy(known[at].response[1:].copy())], -1))
    return found


def test_figures_are_those_of_a_plain_computation_in_double_precision(measured: Measured) -> None:
    known, readings = measured.known, measured.readings
    count = int(np.searchsorted(known.rows, 300))
    targets = [torch.from_numpy(e.tokens[e.response].astype(np.int64)) for e in list(known)[:count]]
    theirs = plain(measured.models["teacher"], known, count)

    assert [one.model for one in readings] == ["teacher", "softcap", "scaled"]
    assert readings[0].kl is None and readings[0].same_top is None
    for one in readings:
        ours = plain(measured.models[one.model], known, count)
        nll = [-o.gather(1, t[:, None])[:, 0] for o, t in zip(ours, targets, strict=True)]
        assert one.tokens == int(known.rows[count]) and len(one.by_example) == count
        assert one.by_example == pytest.approx([float(x.sum()) for x in nll], rel=1e-5)
        assert one.nll.value == pytest.approx(float(torch.cat(nll).mean()), rel=1e-5)
        assert one.nll.low < one.nll.value < one.nll.high
        if one.kl is None or one.same_top is None:
            continue
        kl = torch.cat([(t.exp() * (t - o)).sum(1) for t, o in zip(theirs, ours, strict=True)])
        same = torch.cat([t.argmax(1) == o.argmax(1) for t, o in zip(theirs, ours, strict=True)])
        assert one.kl.value == pytest.approx(float(kl.mean()), rel=1e-4)
        assert one.same_top.value == pytest.approx(float(same.double().mean()))
        assert float(kl.mean()) > 0.05


def test_figures_do_not_depend_on_how_much_is_computed_at_once(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH", 70)
    monkeypatch.setattr(module, "_LOGITS", 7 * COMMON)
    monkeypatch.setattr(child, "run", lambda _, words, **__: module._main(str(words[0])))
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path))

    found = module.measure(
        [measured.models["scaled"]], measured.models["teacher"], measured.known.folder,
        tokens=300, threads=1, progress=Silent(),
    )  # fmt: skip

    whole = measured.readings[2]
    assert found[1].by_example == pytest.approx(whole.by_example, rel=1e-5)
    assert found[1].kl is not None and whole.kl is not None
    assert found[1].kl.value == pytest.approx(whole.kl.value, rel=1e-5)
    assert found[1].same_top == whole.same_top


def test_a_model_whose_numbers_are_broken_is_named(measured: Measured, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(measured.models["scaled"], dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")

    with pytest.raises(BuildFailed, match="broken gave logits that are not finite"):
        measure(
            [tmp_path / "broken"], measured.models["teacher"], measured.known.folder,
            tokens=20, threads=1, progress=Silent(),
        )  # fmt: skip
