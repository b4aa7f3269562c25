"""Intervals that cover what they claim, limits that refuse, text that is held out, and items that are read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgepack import heldout, quality, scoring, serde, tables
from edgepack.errors import BadInput, NotFound, QualityTooLow
from edgepack.evaluation import Estimate, Quality
from edgepack.progress import Silent
from edgepack.scoring import intervals, tasks
from edgepack.scoring.reference import Scores
from tests.scorers import Drawn, Scripted, measured

# ── intervals ──


def test_figures_of_three_windows_by_hand() -> None:
    nll = np.array([[1.0, 3.0], [2.0, 4.0], [3.0, 5.0]])
    scores = Scores(
        nll=nll + np.array([[0.1], [0.2], [0.3]]),
        kl=nll / 10,
        agrees=np.array([[1, 1], [1, 0], [1, 1]], bool),
    )

    found = quality.distance_of(scores, nll, revision="r", runtime="x", seed=0)

    assert found.perplexity.value == pytest.approx(math.exp(3))
    assert found.log_ratio.value == pytest.approx(0.2)
    # The windows' differences are 0.1, 0.2 and 0.3: t(2) * 0.1 / sqrt(3), where t(2) is 4.303 in tables.
    assert found.log_ratio.high - 0.2 == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=0.05)
    assert found.kl.value == pytest.approx(0.3)
    assert found.kl.low == pytest.approx(0.3 - 4.303 * 0.1 / math.sqrt(3), rel=0.2)
    assert found.kl_p99.value == pytest.approx(0.5)
    assert found.same_top.value == pytest.approx(5 / 6)
    assert found.ppl_loss.value == pytest.approx(math.exp(0.2) - 1)


@pytest.mark.parametrize(
    ("freedom", "table"),
    [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (5, 2.571),
        (7, 2.365),
        (15, 2.131),
        (31, 2.040),
        (127, 1.979),
    ],
)
def test_students_t_is_that_of_the_tables(freedom: int, table: float) -> None:
    assert intervals.student_t(freedom) == pytest.approx(table, rel=0.002)


def test_wilsons_interval_is_that_of_the_literature() -> None:
    # 81 of 263: Newcombe 1998, table I, method 3.
    found = intervals.wilson(81 / 263, 263)

    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


def test_agreement_everywhere_is_no_certainty() -> None:
    found = intervals.share(np.ones((32, 255), dtype=bool))

    assert found.value == 1.0
    assert found.low == pytest.approx(1 - 3.84 / (32 * 255), abs=1e-4)


def windows_that_differ(random: np.random.Generator, windows: int) -> NDArray[np.float64]:
    """Skewed tokens, and windows that have something in common: a mean of exp(0.5) * exp(0.045)."""
    common = np.exp(0.3 * random.standard_normal((windows, 1)))
    values: NDArray[np.float64] = common * np.exp(random.standard_normal((windows, 60)))
    return values


def coverage(estimate: Callable[[NDArray[np.float64]], Estimate], truth: float, *, times: int) -> float:
    random = np.random.default_rng(20)
    found = [estimate(windows_that_differ(random, 32)) for _ in range(times)]
    return sum(one.low <= truth <= one.high for one in found) / times


def test_the_interval_of_a_mean_covers_it() -> None:
    truth = math.exp(0.5) * math.exp(0.045)

    assert 0.91 <= coverage(intervals.mean, truth, times=400) <= 0.98


def test_an_interval_over_tokens_as_if_they_were_independent_would_not() -> None:
    truth = math.exp(0.5) * math.exp(0.045)

    assert coverage(lambda values: intervals.mean(values.reshape(-1, 1)), truth, times=400) < 0.85


def test_the_interval_of_a_share_covers_it_where_windows_differ() -> None:
    random = np.random.default_rng(20)
    truth = float((windows_that_differ(random, 40_000) < 6).mean())

    assert 0.91 <= coverage(lambda values: intervals.share(values < 6), truth, times=400) <= 0.99


def documents(random: np.random.Generator, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sums over documents of 1 to 200 tokens, and their tokens; the mean of a token is 2."""
    sizes = random.integers(1, 201, count)
    return sizes * (2 + 0.5 * random.standard_normal(count)), sizes


def test_the_interval_of_a_ratio_covers_it_where_units_differ_in_size() -> None:
    random = np.random.default_rng(6)
    found = [intervals.ratio(*documents(random, 24)) for _ in range(400)]

    assert 0.91 <= np.mean([one.low <= 2 <= one.high for one in found]) <= 0.98


def test_units_of_one_size_are_a_plain_mean_and_a_plain_share() -> None:
    values = windows_that_differ(np.random.default_rng(4), 16)
    means, shares = values.mean(axis=1), (values < 1).mean(axis=1)

    mean, share = intervals.mean(values), intervals.share(values < 1)

    half = intervals.student_t(15) * means.std(ddof=1) / 4
    assert (mean.value, mean.high) == pytest.approx((means.mean(), means.mean() + half))
    effect = shares.var(ddof=1) * 60 / (shares.mean() * (1 - shares.mean()))
    wilson = intervals.wilson(shares.mean(), values.size / max(1, effect))
    assert (share.value, share.low, share.high) == pytest.approx((wilson.value, wilson.low, wilson.high))
    assert effect > 1


def test_the_interval_of_a_quantile_covers_it() -> None:
    truth = float(np.quantile(windows_that_differ(np.random.default_rng(20), 40_000), 0.99))

    assert 0.88 <= coverage(lambda values: intervals.quantile(values, 0.99, seed=1), truth, times=100) <= 0.99


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Drawn, Drawn], Quality]:
    """Measures one drawn model against another, as if they were GGUFs."""
    monkeypatch.setenv("EDGEPACK_CACHE", str(tmp_path / "cache"))
    files = {name: tmp_path / f"{name}.gguf" for name in ("artifact", "parent")}
    for name, file in files.items():
        file.write_text(name, encoding="utf-8")
    text = heldout.Text(name="t", sha256="0" * 64, content=passage(3, 400))

    def measured(artifact: Drawn, parent: Drawn) -> Quality:
        models = {files["artifact"]: artifact, files["parent"]: parent}
        monkeypatch.setattr(scoring, "opened", lambda path, **_: nullcontext(models[path]))
        return quality.measure(
            files["artifact"], against=files["parent"], text=text, tokens=800, window=64, progress=Silent()
        )

    return measured


@pytest.mark.parametrize(("artifact", "parent"), [(97, 120), (120, 97), (110, 120)])
def test_padding_is_left_out_whoever_has_it(
    pair: Callable[[Drawn, Drawn], Quality], artifact: int, parent: int
) -> None:
    found = pair(Drawn(vocabulary=artifact), Drawn(vocabulary=parent)).parent

    assert found is not None
    assert found.kl.value < 1e-7 and found.same_top.value == 1
    assert found.log_ratio.value == pytest.approx(0, abs=1e-4)


def test_tokens_that_only_one_has_are_no_padding(pair: Callable[[Drawn, Drawn], Quality]) -> None:
    with pytest.raises(BadInput, match=r"vocabularies of 97 and 120, and .* there are tokens up to 109"):
        pair(Drawn(), Drawn(vocabulary=120, tokens=110))


def test_pairing_makes_the_difference_far_tighter_than_either() -> None:
    random = np.random.default_rng(1)
    nll = windows_that_differ(random, 32)
    scores = Scores(nll=nll + 0.01 * random.standard_normal(nll.shape), kl=nll, agrees=nll > 0)

    found = quality.distance_of(scores, nll, revision="r", runtime="x", seed=0)

    alone = math.log(found.perplexity.high / found.perplexity.low)
    assert found.log_ratio.high - found.log_ratio.low < alone / 50


def test_the_same_scores_give_the_same_figures() -> None:
    kl = windows_that_differ(np.random.default_rng(1), 32)

    assert intervals.quantile(kl, 0.99, seed=4) == intervals.quantile(kl, 0.99, seed=4)


# ── the value and the limits ──


def test_a_quality_survives_json() -> None:
    before = replace(measured(kl=(0.02, 0.018, 0.022)), tasks=tasks.accuracy(
        tasks.Tasks(name="t", sha256="d", items=()), (True, False), (True, True)
    ))  # fmt: skip

    after = serde.load(Quality, json.loads(serde.to_json(before)), source="quality.json")

    assert after == before
    assert json.loads(serde.to_json(before))["schema_version"] == 1


def test_a_value_above_its_limit_is_refused_with_the_next_scheme() -> None:
    with pytest.raises(QualityTooLow) as caught:
        quality.refuse(measured(kl=(0.06, 0.058, 0.064)), max_kl=0.05, heavier="Q5_K_M")

    assert (
        caught.value.message
        == "KL to the parent 0.06 nats [0.058 nats, 0.064 nats] is above the limit of 0.05 nats"
    )
    assert "--scheme Q5_K_M" in (caught.value.hint or "")
    assert caught.value.exit_code == 12


def test_one_whose_interval_alone_reaches_beyond_is_let_pass_with_a_warning() -> None:
    (warning,) = quality.refuse(measured(kl=(0.049, 0.047, 0.051)), max_kl=0.05, heavier=None)

    assert "but not surely" in warning
    assert quality.refuse(measured(kl=(0.04, 0.039, 0.041)), max_kl=0.05, heavier=None) == ()


def test_a_loss_of_perplexity_is_the_ratio_less_one() -> None:
    lost = measured(kl=(0.0, 0.0, 0.0), ratio=(math.log(1.03), math.log(1.02), math.log(1.04)))

    with pytest.raises(
        QualityTooLow, match=r"loss of perplexity 3\.00% \[2\.00%, 4\.00%\] is above the limit of 2\.5"
    ):
        quality.refuse(lost, max_ppl_loss=0.025, heavier=None)
    assert quality.refuse(lost, max_ppl_loss=0.05, heavier=None) == ()


def test_a_limit_without_a_parent_is_refused() -> None:
    with pytest.raises(BadInput, match="needs a parent"):
        quality.refuse(replace(measured(kl=(0, 0, 0)), parent=None), max_kl=0.1, heavier=None)


def test_the_table_says_every_figure() -> None:
    document = json.loads(serde.to_json(measured(kl=(0.02, 0.018, 0.022))))

    said = tables.quality("m.gguf", document)

    for piece in ("m.gguf on llama.cpp", "12.000 [11.000, 13.000]", "0.02 [0.018, 0.022]", "95.0% [94.0%, 96.0%]",
                  "+1.01% [+0.50%, +1.51%]", "8192 tokens of built-in in 32 windows of 256"):  # fmt: skip
        assert piece in said


# ── the text ──


def passage(seed: int, words: int) -> str:
    random = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return " ".join("".join(random.choice(letters, 6)) for _ in range(words))


def test_windows_are_disjoint_and_spread_over_the_whole_text() -> None:
    found = heldout.windows(range(100), count=4, size=10, bos=None)

    assert [piece[0] for piece in found] == [0, 25, 50, 75]
    assert {len(piece) for piece in found} == {10}
    assert len(heldout.windows(range(35), count=100, size=10, bos=None)) == 3


def test_a_model_that_wants_a_first_token_gets_it_in_every_window() -> None:
    found = heldout.windows(range(100), count=3, size=10, bos=999)

    assert all(piece[0] == 999 and len(piece) == 10 for piece in found)


def test_a_text_shares_nothing_with_another() -> None:
    assert heldout.shared(passage(1, 2000), heldout.fingerprints(passage(2, 20_000))) == 0


@pytest.mark.parametrize("words", [300, 40_000])
def test_a_paragraph_in_common_is_found_however_it_is_broken_into_lines(words: int) -> None:
    common = passage(3, 300)
    calibration = f"{passage(4, words)}\n<|user|>{common.upper()}"
    evaluation = f"{passage(5, 2000)}\n\n" + common.replace(" ", "\n")

    found = heldout.shared(evaluation, heldout.fingerprints(calibration))

    assert found == pytest.approx(1800, rel=0.02 if words == 300 else 0.6)
    text = heldout.Text(name="mine.txt", sha256="", content=evaluation)
    with pytest.raises(BadInput, match=r"mine.txt shares about \d+ characters"):
        heldout.require_held_out(text, heldout.fingerprints(calibration))


def test_a_quotation_in_common_is_no_reason_to_refuse() -> None:
    quotation = passage(6, 30)
    text = heldout.Text(name="t", sha256="", content=passage(7, 500) + quotation)

    heldout.require_held_out(text, heldout.fingerprints(passage(8, 500) + quotation))


def test_fingerprints_are_bounded_and_the_same_every_time() -> None:
    long = passage(9, 5000)

    assert heldout.fingerprints(long) == heldout.fingerprints(long)
    assert len(heldout.fingerprints(long)) == heldout.FINGERPRINTS


def test_texts_are_read_from_jsonl_and_every_bad_line_is_named(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n', encoding="utf-8")
    bad.write_text('{"text": "one"}\n{"txt": 1}\nnot json\n["text"]\n', encoding="utf-8")

    assert heldout.read(good).content == "one\n\ntwo"
    with pytest.raises(BadInput, match=r'no JSON with a field "text" in 3 lines: 2, 3, 4'):
        heldout.read(bad)


@pytest.mark.parametrize(
    ("raw", "said"), [(b"", "is empty"), (b" \n", "is empty"), (b"abc\xff\xfe", "byte 3")]
)
def test_what_is_no_text_is_refused(raw: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(raw)

    with pytest.raises(BadInput, match=said):
        heldout.read(path)
    with pytest.raises(NotFound):
        heldout.read(tmp_path / "none.txt")


def test_the_built_in_text_gives_the_windows_that_are_measured_by_default() -> None:
    assert len(heldout.read().content) > 3 * quality.TOKENS


# ── items ──


def items(path: Path, *rows: object) -> Path:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8"
    )
    return path


def test_items_of_each_shape_are_read(tmp_path: Path) -> None:
    path = items(
        tmp_path / "t.jsonl",
        {"question": "q1", "subject": "s", "choices": ["x", "y"], "answer": 1},
        {"id": 0, "question": "q2", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "C", "explanation": ""},
        {"question": "q3", "choices": ["x", "y"], "answer": "b"},
        "",
        {"prompt": "2 + 2 =", "answer": "4"},
    )

    found = tasks.read(path).items

    assert [item.line for item in found] == [1, 2, 3, 5]
    assert [item.answer for item in found] == [1, 2, 1, "4"]
    assert isinstance(found[1], tasks.Choice)
    assert found[1].choices == ("1", "2", "3", "4")


def test_every_item_that_cannot_be_used_is_named_with_its_reason(tmp_path: Path) -> None:
    path = items(
        tmp_path / "t.jsonl",
        {"question": "q", "choices": ["x", "y"], "answer": 0},
        "{",
        [],
        {"answer": 1},
        {"question": "q", "choices": ["x"], "answer": 0},
        {"question": "q", "choices": ["x", ""], "answer": 0},
        {"question": "q", "choices": ["x", "y"], "answer": "C"},
        {"question": "q", "choices": ["x", "y"], "answer": True},
        {"question": " ", "choices": ["x", "y"], "answer": 0},
        {"prompt": "p"},
        {"prompt": "p", "answer": "a\nb"},
    )

    with pytest.raises(BadInput) as caught:
        tasks.read(path)

    said = caught.value.message
    assert "10 items cannot be used" in said
    for line, reason in (
        (2, "no JSON"), (3, "is no object"), (4, "neither a question nor a prompt"), (5, "fewer than two choices"),
        (6, "choices is no list of texts"), (7, "none of the 2 choices"), (8, "none of the 2 choices"),
        (9, "question is no text"), (10, "answer is no text"), (11, "more than one line"),
    ):  # fmt: skip
        assert f"line {line}: " in said
        assert reason in said.split(f"line {line}: ")[1].splitlines()[0]


def test_what_a_model_knows_is_answered_right(tmp_path: Path) -> None:
    model = Scripted(
        "The sky is\nAnswer: blue", "Rome is in\nAnswer: Italy", "2+2=4\n5+5=10\n", "Say yes: no."
    )
    path = items(
        tmp_path / "t.jsonl",
        {"question": "The sky is", "choices": ["green as grass", "blue"], "answer": 1},
        {"question": "Rome is in", "A": "Italy", "B": "France", "answer": "B"},
        {"prompt": "2+2=", "answer": "4"},
        {"prompt": "Say yes:", "answer": "yes"},
        {"prompt": "Say yes:", "answer": "no"},
    )

    assert tasks.answer(tasks.read(path), model, Silent(), title="it") == (True, False, True, False, True)


def test_a_long_choice_is_no_handicap() -> None:
    # Every letter of the long one costs 1.2 nats, and the z alone 5.2.
    model = Scripted("Which\nAnswer: a fairly long and certain answer", margin=4.0)
    item = tasks.Choice(line=1, question="Which", choices=("z", "a fairly long and certain answer"), answer=1)

    right = tasks.answer(tasks.Tasks(name="t", sha256="", items=(item,)), model, Silent(), title="it")

    assert right == (True,)


def test_items_longer_than_the_context_are_named() -> None:
    long = tasks.Exact(line=4, prompt="x" * 60, answer="y")

    with pytest.raises(BadInput, match=r"line 4: takes 69 tokens, the model's context has 64"):
        tasks.answer(tasks.Tasks(name="t", sha256="", items=(long,)), Drawn(), Silent(), title="it")


def test_accuracy_counts_what_was_lost_and_gained() -> None:
    all_of_it = tasks.Tasks(name="t", sha256="s", items=())

    found = tasks.accuracy(all_of_it, (True, False, False, True), (True, True, True, False))

    assert (found.right, found.lost, found.gained) == (2, 2, 1)
    assert found.accuracy == intervals.wilson(0.5, 4)
    assert found.parent == intervals.wilson(0.75, 4)
    assert tasks.accuracy(all_of_it, (True,), None).lost is None
