"""How a student is taught, out of a preset's name or file and what the command line changes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgepack import pipeline, serde
from edgepack.builders import distill
from edgepack.builders.distill import ARTICLE, Lora, Objective, Recipe
from edgepack.errors import BadInput, NotFound

NOTHING: Mapping[str, Any] = {"preset": None, "seed": 0, "data_files": (), "jobs": 1}


def recipe(**options: Any) -> Recipe:
    return pipeline.distillation_options({**NOTHING, **options}).recipe


def test_without_words_it_is_the_default() -> None:
    assert recipe() == Recipe()


def test_the_article_s_preset_is_the_article_s() -> None:
    article = recipe(preset="article")

    assert article.objective == Objective(alpha=0.7, temperature=2.0, divergence="forward")
    assert article.lora == Lora(rank=64, alpha=128, dropout=0.05)
    assert article.lora is not None
    assert len(article.lora.targets) == 7
    assert (article.rate, article.batch, article.micro, article.epochs) == (2e-4, 16, 4, 3.0)
    assert (article.length, article.held_out, article.recompute) == (1024, 0.1, True)


def test_words_change_single_values() -> None:
    changed = recipe(preset="article", alpha=0.0, divergence="js", lora=8, steps=7, rate=1e-4, seed=3)

    assert changed == replace(
        ARTICLE,
        objective=replace(ARTICLE.objective, alpha=0.0, divergence="js"),
        lora=replace(Lora(), rank=8),
        steps=7,
        rate=1e-4,
        seed=3,
    )
    assert recipe(preset="article", full=True).lora is None


def test_a_file_says_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("objective: {alpha: 0.2, divergence: reverse}\nbatch: 64\nmicro: 8\nlora: {rank: 16}\n")

    assert recipe(preset=str(path), length=256) == Recipe(
        objective=Objective(alpha=0.2, divergence="reverse"),
        batch=64,
        micro=8,
        lora=Lora(rank=16),
        length=256,
    )


def test_the_recipe_in_the_documentation_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "distilling.md").read_text(encoding="utf-8")
    path = tmp_path / "documented.yaml"
    path.write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")

    documented = distill.checked(serde.load_yaml(Recipe, path))

    assert replace(documented, lora=None, steps=None) == Recipe()
    assert documented.lora == Lora()


def test_an_unknown_word_in_a_file_is_named_with_its_line_and_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("batch: 8\nlenght: 256\n", encoding="utf-8")

    with pytest.raises(BadInput, match=r"(?s)line 2.*lenght.*length"):
        recipe(preset=str(path))


def test_a_preset_that_is_neither_name_nor_file_is_not_found() -> None:
    with pytest.raises(NotFound, match="no preset 'artikle'; did you mean 'article'") as refused:
        recipe(preset="artikle")

    assert "hard-labels" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("objective: {alpha: 1.5}", "alpha 1.5 is not between 0 and 1"),
        ("objective: {alpha: .nan}", "is not a number"),
        ("objective: {temperature: 0.0}", "temperature 0 is not above 0"),
        ("length: 1", "length 1 leaves nothing"),
        ("held_out: 1.0", "held_out 1 is not between"),
        ("steps: 0", "steps 0 are none"),
        ("rate: -1.0e-3", "rate -0.001 is not above 0"),
        ("lora: {rank: 0}", "lora has no rank"),
        ("checks: 0\npatience: -1", "checks 0 are none; patience -1 is below 0"),
    ],
)
def test_values_out_of_range_are_all_named(wrong: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(wrong, encoding="utf-8")

    with pytest.raises(BadInput) as refused:
        recipe(preset=str(path))

    assert said in refused.value.message


def test_what_excludes_one_another_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("objective: {hidden: 0.1}", encoding="utf-8")

    with pytest.raises(BadInput, match="--full and --lora exclude each other"):
        recipe(full=True, lora=4)
    with pytest.raises(BadInput, match="hidden states") as refused:
        recipe(preset=str(path))
    assert refused.value.hint == "--online"
    assert recipe(preset=str(path), online=True).objective.hidden == 0.1
