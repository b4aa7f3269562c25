"""The report: what belongs together, numbers that are the inputs' own, strangers' text as text, same bytes twice."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from edgepack import bundle, catalog, check, choice, pipeline, profile, serde
from edgepack.cli import cli
from edgepack.errors import BadInput, MissingTool, NotFound, Untrusted
from edgepack.evaluation import Quality
from edgepack.modelspec import ModelSpec
from edgepack.plan import Plan, Rejection, Request
from edgepack.report import Number, Report, Subject, documents, interval, pages, plots, report_of, shown
from edgepack.report.colors import COLORS
from edgepack.report.render import FORMATS, Format, html, markdown, render, svg
from edgepack.report.sweep import sweep
from edgepack.units import GIB, MIB, Bytes
from tests.plans import example_plan
from tests.scorers import measured
from tests.unit.test_bundle import write
from tests.unit.test_check import EMULATED, judged, recorded_plan

HOSTILE = "<script>alert(1)</script>\"'&$x_1$|`*\N{RIGHT-TO-LEFT OVERRIDE}\x1b[31m\n# x"
VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})


def shapes(plan: Plan) -> ModelSpec | None:
    entry = catalog.find(plan.model.id)
    return None if entry is None else entry.spec()


@cache
def chosen(device: str = "jetson-orin") -> tuple[Plan, choice.Explanation]:
    """What the planner chooses of the built-in model, with its reasons."""
    request = Request(profile=profile.load(device))
    models = pipeline.candidates("demo", None)
    plan = pipeline.make_plan(request, models)
    return plan, choice.explain(plan, request, models)


def planned(path: str = "plan.json", device: str = "jetson-orin") -> documents.Planned:
    plan, why = chosen(device)
    return documents.Planned(path=path, plan=plan, explanation=why)


def reported(*given: documents.Document) -> Report:
    return report_of(given, shapes=shapes, tool="edgepack test")


@cache
def everything() -> Report:
    """A plan with reasons, a check of it, and a quality."""
    plan = recorded_plan()
    passed = judged({})
    return reported(
        documents.Checked(path="check.json", report=passed),
        documents.Planned(path="plan.json", plan=plan, explanation=None),
        documents.Measured(path="quality.json", quality=measured(kl=(0.02, 0.018, 0.022))),
        planned(),
    )


@cache
def the_page() -> str:
    return html(everything())


def only(report: Report) -> Subject:
    (subject,) = report.subjects
    return subject


def saved(folder: Path, name: str, document: object) -> Path:
    path = folder / name
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_plan_comes_back_as_it_was_printed(tmp_path: Path) -> None:
    plan, why = chosen()
    document = dict(json.loads(serde.to_json(plan)))
    path = saved(tmp_path, "plan.json", {**document, "explanation": serde.dump(why)})

    found = documents.read(path)

    assert found == documents.Planned(path=str(path), plan=plan, explanation=why)


def test_a_check_comes_back_as_it_was_printed(tmp_path: Path) -> None:
    report = judged({})
    path = saved(tmp_path, "check.json", check.to_document(report))

    assert documents.read(path) == documents.Checked(path=str(path), report=report)


def test_a_bundle_is_verified_and_gives_its_plan(tmp_path: Path) -> None:
    written = write(tmp_path, tmp_path / "out.tar")

    found = documents.read(written.path)

    assert isinstance(found, documents.Bundled)
    assert found.inspected.manifest_digest == written.manifest_digest
    assert found.plan.scheme == "Q4_K_M"


def test_what_inspect_prints_is_read(tmp_path: Path) -> None:
    written = write(tmp_path, tmp_path / "out.tar")
    path = saved(tmp_path, "inspect.json", serde.dump(bundle.inspect(written.path)))

    found = documents.read(path)

    assert isinstance(found, documents.Described)
    assert found.inspected.manifest_digest == written.manifest_digest


def test_a_damaged_bundle_is_refused_as_inspect_refuses_it(tmp_path: Path) -> None:
    written = write(tmp_path, tmp_path / "out.tar")
    content = bytearray(written.path.read_bytes())
    content[len(content) // 2] ^= 1
    written.path.write_bytes(bytes(content))

    with pytest.raises(Untrusted, match=r"out\.tar is refused"):
        documents.read(written.path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "neither a bundle nor a JSON document"),
        ("hello", "neither a bundle nor a JSON document"),
        ("[1, 2]", "neither a bundle nor a JSON document"),
        ("{", "is not JSON"),
        ('{"answer": 42}', "no document of edgepack's that a report shows (it has answer)"),
        ("{}", "it has no fields"),
        ('{"answer": 1e999}', "beyond ±2^63"),
        ('{"answer": ' + "[" * 900 + "]" * 900 + "}", "nested deeper than 64 levels"),
        ('{"answer": "\\ud800"}', "half a character"),
        ('{"\\ud800": 1}', "half a character"),
        ('{"profile": 1, "budget": 2, "memory": 3, "settings": 4}', "profile"),
        ('{"items": [], "residuals": 1, "facts": {}}', "residuals"),
    ],
)
def test_other_documents_are_refused_by_name(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(content, encoding="utf-8")

    with pytest.raises(BadInput) as refused:
        documents.read(path)

    assert str(path) in refused.value.message
    assert told in refused.value.message


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"slots": 0}},
        {"settings": {"context": 0}},
        {"power_mode": "no such mode"},
        {"speed": {"decode_full": 0.0}},
        {"speed": {"decode": 1e300}},
    ],
)
def test_a_plan_that_cannot_be_reckoned_with_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    document = json.loads(serde.to_json(chosen()[0]))
    for name, value in change.items():
        document[name] = {**document[name], **value} if isinstance(value, dict) else value
    path = saved(tmp_path, "plan.json", document)

    with pytest.raises(BadInput, match=re.escape(str(path))):
        documents.read(path)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        documents.read(tmp_path / "none.json")
    with pytest.raises(BadInput, match="is not a file"):
        documents.read(tmp_path)


# ── what belongs together ────────────────────────────────────────────────────────────────────────────


def test_a_check_joins_the_plan_that_it_judges_in_any_order() -> None:
    plan = documents.Planned(path="plan.json", plan=recorded_plan(), explanation=None)
    checked = documents.Checked(path="check.json", report=judged({}))

    assert only(reported(plan, checked)) == only(reported(checked, plan))
    assert only(reported(plan, checked)).inputs == ("plan.json", "check.json")


def test_a_check_of_another_plan_stands_alone_and_says_so() -> None:
    report = reported(planned(), documents.Checked(path="check.json", report=judged({})))

    assert [one.check is None for one in report.subjects] == [True, False]
    assert any("plan that this check judges" in note for note in report.subjects[1].notes)


def test_a_bundle_takes_the_reasons_of_its_plan(tmp_path: Path) -> None:
    written = write(tmp_path, tmp_path / "out.tar")
    bundled = documents.read(written.path)
    assert isinstance(bundled, documents.Bundled)
    why = chosen()[1]

    subject = only(reported(documents.Planned(path="plan.json", plan=bundled.plan, explanation=why), bundled))

    assert subject.explanation == why
    assert subject.release is not None
    assert subject.release.manifest_digest == written.manifest_digest


def bundled(folder: Path) -> documents.Bundled:
    found = documents.read(write(folder, folder / "out.tar").path)
    assert isinstance(found, documents.Bundled)
    return found


def test_a_bundle_keeps_its_own_figures_beside_the_plan_that_it_became(tmp_path: Path) -> None:
    own = bundled(tmp_path)
    model = replace(own.plan.model, revision="")
    other = replace(own.plan, model=model, speed=replace(own.plan.speed, decode=99.0))

    subject = only(reported(own, documents.Planned(path="plan.json", plan=other, explanation=None)))

    assert subject.plan == replace(own.plan, rejected=())
    assert {one.name: one.value for one in subject.numbers}["decode"] == own.plan.speed.decode


@pytest.mark.parametrize("change", [{"imatrix": True}, {"warnings": ("of a later version",)}])
def test_two_plans_to_be_compared_stay_two(tmp_path: Path, change: dict[str, Any]) -> None:
    plan = chosen()[0]
    one = documents.Planned(path="one.json", plan=plan, explanation=None)
    other = documents.Planned(path="other.json", plan=replace(plan, **change), explanation=None)
    own = bundled(tmp_path)
    plans = [
        documents.Planned(path=f"{warned}.json", plan=replace(own.plan, warnings=(warned,)), explanation=None)
        for warned in ("first", "second")
    ]

    assert [s.inputs for s in reported(one, other).subjects] == [("one.json",), ("other.json",)]
    assert only(reported(one, one)).inputs == ("one.json",)
    assert [s.inputs[-1] for s in reported(own, *plans).subjects] == ["first.json", "second.json"]


def test_two_checks_of_one_plan_are_two_subjects_with_that_plan() -> None:
    plan = documents.Planned(path="plan.json", plan=recorded_plan(), explanation=None)
    checks = [
        documents.Checked(path="pi.json", report=judged({})),
        documents.Checked(path="jetson.json", report=judged({"failure": FAILURE})),
    ]

    report = reported(*checks, plan)

    assert [one.inputs for one in report.subjects] == [("plan.json", "pi.json"), ("plan.json", "jetson.json")]
    assert [one.check and one.check.verdict for one in report.subjects] == ["passed", "failed"]
    assert report.subjects[0].plan == report.subjects[1].plan
    assert not any("not among the inputs" in note for one in report.subjects for note in one.notes)


FAILURE = {"kind": "oom-killed", "stage": "load", "message": "killed"}


def test_a_strangers_quality_is_not_the_bundles(tmp_path: Path) -> None:
    own = bundled(tmp_path)
    gguf = next(file for file in own.inspected.files if file.path.endswith(".gguf"))
    stranger = measured(kl=(0.5, 0.4, 0.6))
    measured_here = replace(stranger, artifact=gguf.digest.removeprefix("sha256:"))
    folder = replace(own, inspected=replace(own.inspected, files=()))
    with_own = replace(folder, inspected=replace(folder.inspected, quality=measured(kl=(0.02, 0.01, 0.03))))

    def asked(document: documents.Bundled, quality: Quality) -> list[tuple[bool, bool]]:
        report = reported(document, documents.Measured(path="quality.json", quality=quality))
        return [(one.quality is quality, one.quality_own) for one in report.subjects]

    assert asked(own, measured_here) == [(True, True)]
    assert asked(own, stranger) == [(False, False), (True, False)]
    assert asked(with_own, replace(stranger, artifact="c" * 64)) == [(False, True), (True, False)]
    assert asked(folder, stranger) == [(True, False)]


@pytest.mark.parametrize(
    ("own", "told"),
    [(True, "The very weights of this artifact"), (False, "which nothing here ties to this one")],
)
def test_only_a_quality_of_the_very_weights_says_so(own: bool, told: str) -> None:
    quality = documents.Measured(path="quality.json", quality=measured(kl=(0.5, 0.4, 0.6)))
    subject = replace(only(reported(planned(), quality)), quality_own=own)

    section = next(one for one in pages.sections(subject) if one.title.startswith("Quality"))

    assert told in section.words[0]
    assert "of the built-in text in" in section.words[0]
    assert ("very weights" in section.words[0]) == own


def test_a_bundle_that_inspect_tells_of_is_not_called_verified(tmp_path: Path) -> None:
    own = bundled(tmp_path)
    told = documents.Described(path="inspect.json", inspected=own.inspected)

    described, verified = markdown(reported(told)), markdown(reported(own, told))

    assert "every byte verified" not in described
    assert "files, as inspect.json says" in described
    assert "every byte verified" in verified
    assert "says" not in verified


def test_two_devices_are_two_subjects_side_by_side() -> None:
    report = reported(planned(), planned("other.json", "x86-laptop"))

    found = pages.comparison(report)

    assert [one.letter for one in report.subjects] == ["A", "B"]
    assert found is not None
    rows = {row[0].words: [entry.words for entry in row[1:]] for row in found.tables[0].rows}
    assert found.tables[0].head == ("", "A", "B")
    assert rows["name"] == [one.name for one in report.subjects]
    assert report.title == "2 plans side by side"
    assert rows["device"] == [one.device for one in report.subjects]
    assert rows["check"] == ["not checked", "not checked"]
    assert pages.comparison(reported(planned())) is None


def test_the_sentence_says_what_each_user_has_and_how_fast_it_is_then() -> None:
    plan = chosen()[0]
    pace = replace(
        plan.speed, decode=40.0, decode_full=7.5, decode_full_low=5.3, decode_all=9.0, decode_all_low=6.0
    )
    alone = replace(plan, speed=pace)
    four = replace(alone, settings=replace(plan.settings, slots=4, context=4 * plan.settings.context))

    one = only(reported(documents.Planned(path="p", plan=alone, explanation=None))).sentence
    each = only(reported(documents.Planned(path="p", plan=four, explanation=None))).sentence

    assert f"to serve one user with {plan.settings.context:,} tokens of context, to take at most" in one
    assert one.endswith("to write 7.5 tokens a second with a full context, at least 5.3.")
    assert f"to serve 4 users at once, {plan.settings.context:,} tokens of context each, to take" in each
    assert each.endswith("to write 9.0 tokens a second together with full contexts, at least 6.0.")


def test_what_the_planned_users_get_together_stands_side_by_side() -> None:
    found = pages.comparison(reported(planned(), planned("other.json", "x86-laptop")))

    assert found is not None
    rows = {row[0].words: row[1].words for row in found.tables[0].rows}
    assert rows["decode, all slots together"].startswith(
        f"{chosen()[0].speed.decode_all:,.1f} tok/s, at least"
    )


def forced(warning: str, budget: int) -> documents.Planned:
    """A plan of a device with so many bytes to give, kept by force; with reasons, as ``plan --explain`` has them."""
    plan, why = chosen()
    return documents.Planned(
        path="forced.json",
        plan=replace(
            plan,
            budget=replace(plan.budget, device=Bytes(budget)),
            warnings=(f"forced: {warning}",),
            rejected=tuple(replace(one, figures=None) for one in plan.rejected),
        ),
        explanation=why,
    )


def test_a_forced_plan_that_does_not_fit_is_not_told_as_the_best_that_fits() -> None:
    subject = only(reported(forced("needs 99 GiB more than there is", MIB)))

    summary = next(pages.sections(subject))
    candidates = next(one for one in pages.sections(subject) if one.title == "Candidates")

    assert "does NOT fit" in subject.sentence
    assert "there are" not in subject.sentence
    assert summary.badge == pages.Entry("does NOT fit", "bad")
    assert not any(words.startswith("Why this one") for words in summary.words)
    assert candidates.words == (f"{len(subject.options)} were weighed, 0 fit.",)
    assert [table.caption for table in candidates.tables] == [
        f"{len(subject.options)} that were refused, and why"
    ]
    assert "forced: needs 99 GiB more than there is" in markdown(
        reported(forced("needs 99 GiB more than there is", MIB))
    )
    assert "Pareto" not in html(reported(forced("too slow", MIB)))


def test_a_plan_forced_for_another_reason_than_memory_is_not_said_not_to_fit() -> None:
    subject = only(reported(forced("decodes 2.0 tok/s", 8 * GIB)))

    badge = next(pages.sections(subject)).badge

    assert badge == pages.Entry("would be refused without --force", "bad")
    assert "would be refused without --force" in subject.sentence
    assert "NOT fit" not in subject.sentence


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_numbers_are_the_plans_own() -> None:
    plan, _ = chosen()

    numbers = {one.name: one for one in only(reported(planned())).numbers}

    total = numbers["memory in all"]
    assert (total.value, total.low, total.high) == (plan.memory.total, plan.memory.low, plan.memory.high)
    assert numbers["weights (device)"].how == "exact"
    assert numbers["decode"].how == "fitted"
    assert numbers["budget"].value == sum(value for _, value in plan.budget.arithmetic)
    assert all(one.source for one in numbers.values())


def test_no_number_is_surer_than_what_it_comes_from() -> None:
    plan = example_plan("rtx-4060-8gb")
    plan = replace(plan, memory=replace(plan.memory, file_provenance="fitted"))

    numbers = only(reported(documents.Planned(path="p", plan=plan, explanation=None))).numbers

    how = {one.name: one.how for one in numbers}
    assert (how["budget"], how["budget of the host"]) == ("given", "given")
    assert (how["artifact file"], how["bits per weight"]) == ("estimated", "estimated")
    assert all(one.low is not None or one.high is not None for one in numbers if one.how == "fitted")
    assert {one.how for one in numbers} <= set(re.findall(r"(\w+): ", pages.HOW))


def test_the_page_has_no_markup_of_another_kind() -> None:
    assert "`" not in html(reported(planned()))


def test_the_numbers_of_a_check_are_measured_and_say_on_what() -> None:
    report = judged({})

    numbers = {one.name: one for one in only(everything_checked()).numbers}

    for one in report.residuals:
        found = numbers[f"{one.part}, as the server reports it"]
        assert (found.value, found.how) == (one.measured, "measured")
    assert numbers["peak memory"].how == "measured"


def everything_checked(**changes: object) -> Report:
    return reported(
        documents.Planned(path="plan.json", plan=recorded_plan(), explanation=None),
        documents.Checked(path="check.json", report=judged(changes)),
    )


def test_the_peak_of_another_machine_is_called_so() -> None:
    report = everything_checked(match=ELSEWHERE)

    subject = only(report)
    table = pages.comparison(replace(report, subjects=(subject, replace(subject, letter="B"))))

    assert subject.check is not None
    assert not subject.check.same_device
    (peak,) = (one for one in subject.numbers if one.name == "peak memory")
    assert peak.source.endswith(", on another machine")
    memory = next(one for one in pages.sections(subject) if one.title == "Memory map")
    assert any(words.startswith("Measured on another machine: ") for words in memory.words)
    assert "measured peak on another machine" in svg(report)
    assert table is not None
    (row,) = (row for row in table.tables[0].rows if row[0].words == "peak memory")
    assert row[1].words.endswith("(on another machine)")
    assert "another machine" not in svg(everything_checked())


ELSEWHERE = [{"fact": "cpu", "status": "fail", "expected": "Cortex-A76", "measured": "another"}]


def test_an_emulators_peak_and_speed_are_left_out() -> None:
    subject = only(everything_checked(**EMULATED))

    assert subject.check is not None
    assert subject.check.emulated is not None
    assert subject.peak is None
    assert subject.pace_measured == ()
    told = {one.name: one.source for one in subject.numbers}
    assert not {"peak memory", "decode, measured", "prompt reading, measured"} & told.keys()
    assert told["weights, as the server reports it"] == f"check, under {subject.check.emulated}"


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (None, None, ""),
        (2.0 * GIB, 2.0 * GIB, ""),
        (1.0 * GIB, 3.0 * GIB, "[1.00, 3.00 GiB]"),
        (512.0 * MIB, 3.0 * GIB, "[512.0 MiB, 3.00 GiB]"),
        (1.0 * GIB, None, "at least 1.00 GiB"),
        (None, 3.0 * GIB, "up to 3.00 GiB"),
    ],
)
def test_intervals_are_told_with_their_unit(low: float | None, high: float | None, told: str) -> None:
    number = Number(name="x", value=2.0 * GIB, unit="bytes", low=low, high=high, how="fitted", source="here")

    assert interval(number) == told


def test_gib_and_gb_stay_apart() -> None:
    assert shown(GIB, "bytes") == "1.00 GiB"
    assert shown(102.4, "GB/s") == "102.4 GB/s"


def test_the_sweep_has_the_plans_own_point_and_what_does_not_fit() -> None:
    plan, _ = chosen()
    spec = shapes(plan)
    assert spec is not None

    found = sweep(plan, spec)

    assert found is not None
    own = next(one for one in found.cells if (one.users, one.context) == (1, plan.settings.context))
    assert (own.kv_cache, own.total, own.fits) == (plan.memory.part("kv_cache"), plan.memory.high, True)
    full = next(one for one in found.pace if one.tokens == plan.settings.context)
    assert full.decode == plan.speed.decode_full
    assert [one.decode for one in found.pace] == sorted((one.decode for one in found.pace), reverse=True)


def test_too_many_users_do_not_fit() -> None:
    entry = catalog.find("qwen3-4b")
    assert entry is not None
    models = pipeline.candidates("qwen3-4b", None)
    plan = pipeline.make_plan(Request(profile=profile.load("jetson-orin"), scheme="Q4_K_M"), models)

    found = sweep(plan, entry.spec())

    assert found is not None
    by_place = {(one.users, one.context): one.fits for one in found.cells}
    assert by_place[1, 4096]
    assert not by_place[64, 4096]


def test_shapes_that_do_not_give_the_plans_figures_are_not_used() -> None:
    entry = catalog.find("qwen3-4b")
    assert entry is not None

    assert sweep(chosen()[0], entry.spec()) is None
    subject = only(report_of([planned()], shapes=lambda _: entry.spec(), tool="x"))
    assert subject.cells == ()
    assert not subject.pace_exact
    assert any("other contexts" in note for note in subject.notes)


def test_every_candidate_is_told_with_its_reason() -> None:
    plan, _ = chosen()

    subject = only(reported(planned()))
    section = next(one for one in pages.sections(subject) if one.title == "Candidates")

    assert len(subject.options) == 1 + len(plan.rejected)
    assert sum(len(table.rows) for table in section.tables) == len(subject.options)
    assert all(one.reason for one in subject.options if one.verdict != "chosen")


def weighed(fronts: Sequence[bool], panel: str = "qwen3_card") -> documents.Planned:
    """A choice, and as many others that fit, some of them on the front, all scored in one panel."""
    plan = replace(
        example_plan("jetson-orin-nano-8gb"), quality=replace(chosen()[0].quality, panel=panel, low=69.78)
    )
    other = choice.figures(replace(plan, quality=replace(plan.quality, low=69.77)), on_front=False)
    others = tuple(
        Rejection(
            model=f"model-{at}", scheme="Q4_K_M", kv_type="f16", context=4096, reason="slower",
            figures=replace(other, memory_high=other.memory_high - at * MIB, on_front=on_front),
        )
        for at, on_front in enumerate(fronts)
    )  # fmt: skip
    return documents.Planned(path="p", plan=replace(plan, rejected=others), explanation=None)


@pytest.mark.parametrize(("on_front", "beaten"), [(3, 9), (25, 0)])
def test_the_table_of_those_that_none_beats_has_them_all_and_no_other(on_front: int, beaten: int) -> None:
    subject = only(reported(weighed([True] * on_front + [False] * beaten)))

    section = next(one for one in pages.sections(subject) if one.title == "Candidates")

    best, *rest = section.tables
    assert best.caption == "The choice, and the candidates that none beats in quality, speed and memory"
    assert len(best.rows) == 1 + on_front
    assert [len(table.rows) for table in rest] == ([beaten] if beaten else [])
    assert f"of which {on_front} beside the choice are on the Pareto front" in section.words[0]


def test_models_without_a_published_score_are_said_to_keep_most_and_the_marks_are_explained() -> None:
    report = reported(weighed([True, False], panel="none"))

    (words,) = next(one for one in pages.sections(only(report)) if one.title == "Candidates").words

    assert "3 were weighed, 3 fit; 3 have no published score" in words
    assert (
        "Diamond: the choice; filled: on the front; hollow: beaten. The line is what keeps most for sure"
        in words
    )
    assert not re.search(r"in none\b", html(report))


def test_scores_within_the_noise_are_not_drawn_apart() -> None:
    drawing = next(
        one for one in plots.drawings(only(reported(weighed([True] * 3)))) if "candidates" in one.name
    )

    labels = [float(found) for found in re.findall(r">(69\.\d+|70\.\d+)</text>", drawing.svg)]

    assert max(labels) - min(labels) > choice.NOISE * 69 / 2


def test_each_item_of_a_check_is_a_row_with_its_verdict() -> None:
    report = judged({"failure": {"kind": "oom-killed", "stage": "load", "message": HOSTILE}})

    subject = only(reported(documents.Checked(path="check.json", report=report)))
    section = next(one for one in pages.sections(subject) if one.title == "Check")

    assert [row[0].words for row in section.tables[0].rows] == [item.name for item in report.items]
    assert subject.check is not None
    assert subject.check.verdict == "failed"
    assert f"failed: run ({HOSTILE}" in subject.check.sentence


# ── pages ────────────────────────────────────────────────────────────────────────────────────────────


class Page(HTMLParser):
    """Elements in their order, each closed where it must be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_is_well_formed_with_landmarks_headings_and_titled_drawings() -> None:
    page = Page(the_page())

    assert page.named("html")[0]["lang"] == "en"
    assert [len(page.named(tag)) for tag in ("main", "header", "nav", "footer", "h1")] == [1, 1, 1, 1, 1]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    ids = [str(attributes["id"]) for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    drawings = page.named("svg")
    assert len(drawings) >= 4
    assert all(set(str(one["aria-labelledby"]).split()) <= set(ids) for one in drawings)
    assert all("scope" in one for one in page.named("th"))
    regions = [one for one in page.named("div") if one.get("role") == "region"]
    assert regions
    assert all(one["tabindex"] == "0" and one["aria-labelledby"] in ids for one in regions)
    assert {str(one["href"]).removeprefix("#") for one in page.named("a")} <= set(ids)


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    text = the_page()

    page = Page(text)

    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {
        tag for tag, _ in page.elements
    }
    assert "default-src 'none'" in text
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "src", "action", "xlink:href"):
            assert str(attributes.get(name) or "#").startswith("#")
    assert not re.search(r"@import|url\((?!#)", text)


@cache
def hostile() -> Report:
    """Strangers' text in every place that a plan, a check and a bundle have for it."""
    plan, why = chosen()
    plan = replace(
        plan,
        model=replace(plan.model, id=HOSTILE, license=HOSTILE, revision=HOSTILE),
        profile=replace(plan.profile, title=HOSTILE, name=HOSTILE),
        memory=replace(
            plan.memory, parts=tuple(replace(p, name=HOSTILE, note=HOSTILE) for p in plan.memory.parts)
        ),
        rejected=tuple(replace(r, model=HOSTILE, reason=HOSTILE, hint=HOSTILE) for r in plan.rejected),
        warnings=(HOSTILE,),
    )
    checked = judged({"failure": {"kind": "crashed", "stage": HOSTILE, "message": HOSTILE}})
    return reported(
        documents.Planned(path=HOSTILE, plan=plan, explanation=replace(why, why=HOSTILE, against=(HOSTILE,))),
        documents.Checked(path=HOSTILE, report=checked),
    )


def test_strangers_text_stays_text_on_the_page() -> None:
    text = html(hostile())

    assert Page(text).named("script") == []
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in text
    assert "\x1b" not in text


def test_strangers_text_stays_text_in_a_drawing() -> None:
    root = ElementTree.fromstring(svg(hostile()))

    assert not [one for one in root.iter() if one.tag.endswith("script")]
    assert any("<script>" in (one.text or "") for one in root.iter(f"{{{plots.SVG}}}title"))


def test_strangers_text_stays_in_its_cell_in_markdown() -> None:
    lines = markdown(hostile()).splitlines()

    assert not any(line.startswith("# x") for line in lines)
    assert not any(re.search(r"(?<!\\)<script", line) for line in lines)
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")]
    edges = [at for at, line in enumerate(lines) if re.fullmatch(r"[|: -]+", line) and "---" in line]
    assert widths
    for at in edges:
        own = len(re.findall(r"(?<!\\)\|", lines[at]))
        following = at + 1
        while following < len(lines) and lines[following].startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", lines[following])) == own
            following += 1


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_inputs_give_the_same_bytes(form: Format) -> None:
    report = everything_checked()

    assert render(report, form) == render(report, form)


def test_the_json_has_the_numbers_and_no_more_than_json_can_say() -> None:
    document = json.loads(render(everything(), "json"))

    assert (document["kind"], document["schema_version"]) == ("report", 1)
    assert {"letter", "sentence", "pools", "options", "pace", "cells", "check", "numbers"} <= document[
        "subjects"
    ][0].keys()


def test_colors_are_the_pages_and_stand_out_from_it() -> None:
    text = the_page()

    assert not re.search(r"#0000[0-9a-f]{2}\b", text)
    for name, (light, dark) in COLORS.items():
        if name in ("paper", "line"):
            continue
        least = 3.0 if name == "p6" else 4.5  # p6 is a patch of a drawing, never text
        assert contrast(light, COLORS["paper"][0]) >= least, name
        assert contrast(dark, COLORS["paper"][1]) >= least, name


def contrast(one: str, other: str) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color: str) -> float:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_without_matplotlib_the_words_are_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)

    assert markdown(everything()).startswith("# ")
    with pytest.raises(MissingTool, match="Matplotlib"):
        html(everything())


# ── the command ──────────────────────────────────────────────────────────────────────────────────────


def test_the_command_takes_its_form_from_the_name_of_the_output(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(serde.to_json(chosen()[0]), encoding="utf-8")

    for form, start in (("html", "<!doctype html>"), ("md", "# demo "), ("json", "{"), ("svg", "<svg ")):
        done = run("-q", "report", path, "-o", tmp_path / f"report.{form}")
        assert done.exit_code == 0, done.output
        assert (tmp_path / f"report.{form}").read_text(encoding="utf-8").lstrip().startswith(start)


def test_the_page_on_standard_output_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(serde.to_json(chosen()[0]), encoding="utf-8")

    done = CliRunner(charset="latin-1").invoke(cli, ["-q", "report", str(path)])

    assert done.exit_code == 0
    assert "users × context" in done.stdout_bytes.decode("utf-8")


def test_a_path_that_is_no_text_is_written_as_json(tmp_path: Path) -> None:
    report = reported(planned("plan-\udcff.json"))

    written = render(report, "json")

    assert json.loads(written.encode("utf-8"))["subjects"][0]["inputs"] == ["plan-\udcff.json"]


def test_the_command_refuses_what_is_no_document_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"answer": 42}', encoding="utf-8")

    done = run("report", path)

    assert done.exit_code == BadInput.exit_code
    assert "no document of edgepack's" in done.output
    assert "Traceback" not in done.output


def test_parts_are_named_for_people_and_told_apart() -> None:
    subject = only(reported(planned("p", "consumer-8gb")))
    memory = next(one for one in pages.sections(subject) if one.title == "Memory map")

    names = [row[0].words for row in memory.tables[0].rows]

    assert "KV cache" in names
    assert not any("_" in name.partition("(")[0] for name in names)
    assert sum(name.startswith("compute buffers (") for name in names) == 2
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("change", "label"), [("", "largest part"), ("--desktop", "what binds")])
def test_only_what_keeps_another_out_is_said_to_bind(change: str, label: str) -> None:
    subject = only(reported(planned()))
    assert subject.explanation is not None
    subject = replace(subject, explanation=replace(subject.explanation, change=change))

    rows = {row[0].words: row[1].words for row in next(pages.sections(subject)).tables[0].rows}

    assert rows[label] == chosen()[1].binding
    assert ("what binds" in rows) == (label == "what binds")


def test_the_users_table_says_how_its_runtime_rounds() -> None:
    subject = only(reported(planned()))
    assert subject.plan is not None
    other = replace(subject, plan=replace(subject.plan, runtime="vllm"))

    told = [
        next(one for one in pages.sections(s) if one.id.startswith("users-")).words[0]
        for s in (subject, other)
    ]

    assert ["blocks of 256 tokens" in words for words in told] == [True, False]


@pytest.mark.parametrize(
    ("device", "told", "untold"),
    [
        ("jetson-orin", "memory", "card and host"),
        ("consumer-8gb", "card and host", "memory"),
    ],
)
def test_the_sum_of_two_memories_is_not_called_one(device: str, told: str, untold: str) -> None:
    report = reported(planned("p", device))
    subject = only(report)

    candidates = next(one for one in pages.sections(subject) if one.title == "Candidates")

    assert all(
        f"{told}, at most" in table.head for table in candidates.tables if "score, at least" in table.head
    )
    assert f"{told}, at most" in svg(report)
    assert f"{untold}, at most" not in html(report)
    assert f"{told} in all" in {one.name for one in subject.numbers}
    assert f"{untold} in all" not in html(report)


def test_units_are_explained_once() -> None:
    text = html(reported(planned(), planned("other.json", "x86-laptop")))

    assert text.count("1024³ bytes") == 1


def test_a_plan_of_a_device_with_a_card_has_two_memories() -> None:
    subject = only(reported(documents.Planned(path="p", plan=example_plan("rtx-4060-8gb"), explanation=None)))

    assert [pool.name for pool in subject.pools] == ["card", "host"]
    assert sum(pool.high for pool in subject.pools) == example_plan("rtx-4060-8gb").memory.high
    assert "memory-A" in html(reported(planned("p", "consumer-8gb")))
