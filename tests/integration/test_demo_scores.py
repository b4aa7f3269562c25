"""The scores in the catalog of the built-in models are what they score."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from edgepack import catalog, heldout

pytestmark = pytest.mark.integration

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "demo_scores.py"))


@pytest.mark.parametrize("name", catalog.built_in())
def test_a_built_in_models_score_is_the_share_of_tokens_that_it_guesses(name: str) -> None:
    """Another processor may turn a handful of ties the other way."""
    folder, known = catalog.built_in()[name], catalog.find(name)
    assert known is not None

    _, accuracy, count = SCRIPT["score"](
        SCRIPT["loaded"](folder), SCRIPT["windows"](folder, heldout.BUILT_IN)
    )

    assert count > 26_000
    assert known.panels["demo_heldout"]["next_token"] == pytest.approx(100 * accuracy, abs=0.03)
