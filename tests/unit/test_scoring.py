"""Logits to figures: divergence by hand, the rounding of what is kept, and a cache that is whole and bounded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgepack import scoring
from edgepack.errors import BadInput, BuildFailed, NotFound, Unsupported
from edgepack.progress import Silent
from edgepack.scoring import reference
from edgepack.scoring.reference import decode, divergence, encode, likelihood
from tests.scorers import Drawn


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path))
    return tmp_path


def rows(*probabilities: Sequence[float]) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = np.log(np.asarray(probabilities)).astype(np.float32) + np.float32(3)
    return logits


def windows(count: int = 10, size: int = 12) -> list[list[int]]:
    return np.random.default_rng(7).integers(1, 97, (count, size)).tolist()  # type: ignore[no-any-return]


def test_divergence_and_likelihood_as_by_hand() -> None:
    parent, other = rows((0.5, 0.25, 0.25), (0.8, 0.1, 0.1)), rows((0.25, 0.5, 0.25), (0.8, 0.1, 0.1))

    found = divergence(*encode(parent), other)

    assert found == pytest.approx([0.25 * np.log(2), 0.0], abs=1e-6)
    assert likelihood(parent, np.array([1, 0], dtype=np.int32)) == pytest.approx([np.log(4), -np.log(0.8)])


def test_divergence_is_that_from_the_parent_and_not_to_it() -> None:
    peaked, flat = rows((0.98, 0.01, 0.01)), rows((1 / 3, 1 / 3, 1 / 3))

    assert divergence(*encode(peaked), flat)[0] == pytest.approx(
        0.98 * np.log(2.94) + 0.02 * np.log(0.03), 1e-5
    )
    assert divergence(*encode(flat), peaked)[0] == pytest.approx(
        -np.log(3) - np.log(0.98 * 0.01**2) / 3, 1e-5
    )


@given(seed=st.integers(0, 2**32), span=st.floats(0.5, 120), width=st.integers(2, 3000))
@settings(max_examples=40)
def test_what_is_kept_diverges_by_no_more_than_hoeffdings_bound(seed: int, span: float, width: int) -> None:
    random = np.random.default_rng(seed)
    logits = (span * random.random((3, width)) ** random.uniform(0.2, 4) - 20).astype(np.float32)
    reach = (logits.max(axis=1) - logits.min(axis=1)).astype(np.float64)

    codes, lines = encode(logits)

    moved = np.abs(decode(codes, lines) - (logits - logits.max(axis=1, keepdims=True)))
    assert (moved.max(axis=1) <= reach / 65535 / 2 + 1e-5).all()
    # The second term is what sums in float32 are off by.
    assert (divergence(codes, lines, logits) <= (reach / 65535) ** 2 / 8 * 1.05 + 3e-7).all()


def test_the_rounding_of_real_spans_is_below_a_millionth_of_a_nat() -> None:
    logits = (6 * np.random.default_rng(3).standard_normal((8, 50_000))).astype(np.float32)

    assert divergence(*encode(logits), logits).max() < 1e-7


def test_a_row_of_equal_logits_is_kept_too() -> None:
    flat = np.full((1, 5), 2.5, dtype=np.float32)

    assert divergence(*encode(flat), flat)[0] == pytest.approx(0.0, abs=1e-7)


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(BuildFailed, match="not finite"):
        encode(np.array([[0.0, np.nan]], dtype=np.float32))


def test_a_model_does_not_differ_from_itself_and_does_from_another() -> None:
    known = reference.make("a", Drawn(), windows(), Silent())

    same = reference.compare(Drawn(), known, Silent())
    other = reference.compare(Drawn(noise=0.5), known, Silent())

    assert same.kl.max() < 1e-7
    assert same.agrees.all()
    assert (same.nll == known.nll).all()
    assert other.kl.mean() > 0.01
    assert not other.agrees.all()


def test_the_figures_are_those_of_the_whole_distributions() -> None:
    known = reference.make("a", Drawn(), windows(), Silent())
    found = reference.compare(Drawn(noise=0.5), known, Silent())

    def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
        wide = logits.astype(np.float64)
        values: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
        return values

    row = windows()[3]
    p, q = log_softmax(Drawn().logits(row[:-1])), log_softmax(Drawn(noise=0.5).logits(row[:-1]))
    assert found.kl[3] == pytest.approx((np.exp(p) * (p - q)).sum(axis=1), abs=1e-4)
    assert found.nll[3] == pytest.approx(-q[np.arange(11), row[1:]], abs=1e-5)
    assert (found.agrees[3] == (p.argmax(axis=1) == q.argmax(axis=1))).all()


def test_rows_that_only_the_parent_has_are_as_if_they_were_not_there() -> None:
    plain = reference.make("plain", Drawn(), windows(), Silent())
    padded = reference.make("padded", Drawn(vocabulary=120), windows(), Silent())
    assert (padded.nll > plain.nll + 0.01).any() and (padded.top >= 97).any()

    cut = reference.within(padded, 97)
    found = reference.compare(Drawn(), cut, Silent())

    assert cut.nll == pytest.approx(plain.nll, abs=3e-4)  # half a step of logits that span 35
    assert (cut.top == plain.top).all()
    assert found.kl.max() < 1e-7 and found.agrees.all()
    assert reference.within(plain, 97) is plain


def test_rows_that_only_the_artifact_has_are_as_if_they_were_not_there() -> None:
    known = reference.make("a", Drawn(), windows(), Silent())

    found = reference.compare(Drawn(vocabulary=120), known, Silent())

    assert (found.nll == known.nll).all()
    assert found.kl.max() < 1e-7 and found.agrees.all()


def test_a_reference_that_was_stopped_leaves_nothing_and_is_made_again() -> None:
    class Stops(Drawn):
        def logits(self, tokens: Sequence[int], first: int = 0) -> NDArray[np.float32]:
            if self.asked == 5:
                raise KeyboardInterrupt
            return super().logits(tokens, first)

    with pytest.raises(KeyboardInterrupt):
        reference.make("a", Stops(), windows(), Silent())
    assert list(reference.folder().iterdir()) == []
    assert reference.find("a") is None

    made = reference.make("a", Drawn(), windows(), Silent())
    again = reference.find("a")

    assert again is not None
    assert (again.codes == made.codes).all()
    assert (again.windows == np.asarray(windows())).all()


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays() -> None:
    reference.folder().mkdir(parents=True)
    dead, alive = (
        reference.folder() / f".{name}.part{os.uname().nodename}-{number}"
        for name, number in (("x", 999999999), ("y", os.getpid()))
    )
    dead.mkdir()
    alive.mkdir()

    reference.make("a", Drawn(), windows(), Silent())

    assert not dead.exists()
    assert alive.exists()


def test_the_references_longest_unused_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 10 * 11 * 2 * (97 + 12)
    monkeypatch.setattr(reference, "CACHE_LIMIT", 3.5 * size)
    for at, name in enumerate(("a", "b", "c")):
        reference.make(name, Drawn(), windows(), Silent())
        os.utime(reference.folder() / name, (at, at))
    assert reference.find("a") is not None  # used again

    reference.make("d", Drawn(), windows(), Silent())

    assert {place.name for place in reference.folder().iterdir()} == {"a", "c", "d"}


def test_a_reference_above_the_limit_is_refused_with_the_tokens_that_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "LIMIT", 10_000)

    with pytest.raises(BadInput, match=r"120 tokens take 23\.\d KiB, the limit is 9\.\d KiB") as caught:
        reference.make("a", Drawn(), windows(), Silent())

    assert caught.value.hint == "--tokens 45, or fewer"


def test_the_default_fits_the_limit_for_the_largest_vocabulary_in_use() -> None:
    from edgepack.quality import TOKENS, WINDOW

    predicted = TOKENS // WINDOW * (WINDOW - 1)

    assert predicted * 2 * (262_144 + 12) <= reference.LIMIT


def test_the_runtime_is_known_by_the_artifact(tmp_path: Path) -> None:
    gguf, folder, graph = tmp_path / "m.gguf", tmp_path / "hf", tmp_path / "onnx"
    gguf.touch()
    for place, name in ((folder, "config.json"), (graph, "config.json"), (graph, "genai_config.json")):
        place.mkdir(exist_ok=True)
        (place / name).write_text("{}")

    assert [scoring.runtime_of(place) for place in (gguf, folder, graph)] == [
        "llama_cpp", "transformers", "onnx_genai",
    ]  # fmt: skip
    with pytest.raises(NotFound):
        scoring.runtime_of(tmp_path / "none")
    with pytest.raises(Unsupported, match="no artifact that can be measured"):
        scoring.runtime_of(tmp_path)
