"""Students: which of a family a device gets, and what is planned of one that is still to be made."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgepack import (
    catalog,
    choice,
    degradation,
    distillation,
    modelspec,
    pipeline,
    plan,
    profile,
    quantization,
    serde,
    students,
    tables,
)
from edgepack.artifact import Checkpoint
from edgepack.builders import distill
from edgepack.builders.distill import Recipe
from edgepack.catalog import CatalogModel
from edgepack.cli import cli
from edgepack.errors import BadInput, NotFound, Unsupported
from edgepack.plan import Candidate, Plan, Request
from edgepack.profile import DeviceProfile
from edgepack.progress import Silent
from edgepack.students import Prune
from tests.family import family

PROFILES = Path(__file__).parents[1] / "data" / "profiles"
LAPTOP = profile.load("x86-laptop")
NANO = profile.load("jetson-orin")
DEMO = catalog.built_in()["demo"]
FLOOR = 2 * degradation.FLOOR
"""What even an f16 cache leaves open."""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def device(name: str) -> DeviceProfile:
    return profile.load(str(PROFILES / f"{name}.yaml"))


def offered() -> list[Candidate]:
    return pipeline.candidates(None, "demo", extra=family())


def cut(teacher: str, *, extra: tuple[CatalogModel, ...] = ()) -> list[Candidate]:
    """The students that are still to be made."""
    found = pipeline.candidates(None, teacher, extra=extra, distill=True)
    return [candidate for candidate in found if candidate.model.prune is not None]


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


# ── the built-in family ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scheme", ["Q8_0", None])
@pytest.mark.parametrize(
    ("name", "chosen"), [("below-the-teacher", "demo-half"), ("below-the-half", "demo-quarter")]
)
def test_too_little_memory_for_one_model_selects_the_next_smaller(
    name: str, chosen: str, scheme: str | None
) -> None:
    request = Request(profile=device(name), scheme=scheme, slots=16)

    found = pipeline.make_plan(request, offered())

    assert found.model.id == chosen
    larger = {"demo"} if chosen == "demo-half" else {"demo", "demo-half"}
    assert not larger & {r.model for r in found.rejected if r.figures is not None}
    assert larger <= {r.model for r in found.rejected if r.excess}


@pytest.mark.parametrize("scheme", ["Q8_0", None])
@pytest.mark.parametrize(
    ("floor", "chosen"), [(5.0, "demo-half"), (800.0, "demo-half"), (884.0, "demo-quarter")]
)
def test_a_floor_in_speed_selects_the_next_smaller_however_much_memory_there_is(
    floor: float, chosen: str, scheme: str | None
) -> None:
    request = Request(profile=LAPTOP, scheme=scheme, min_decode=floor)

    found = pipeline.make_plan(request, offered())

    assert found.model.id == chosen
    assert found.speed.decode_full_low >= floor
    assert not [r for r in found.rejected if r.excess]
    slower = {800.0: {"demo"}, 884.0: {"demo", "demo-half"}}.get(floor, set())
    assert slower <= {r.model for r in found.rejected if r.slowness}
    assert not slower & {r.model for r in found.rejected if r.figures is not None}


def test_the_family_is_offered_by_its_teachers_name_and_to_nobody_else() -> None:
    assert {c.model.id for c in offered()} == {"demo", "demo-half", "demo-quarter"}
    assert not {c.model.source for c in pipeline.candidates(None, None)} & set(catalog.built_in())


def test_a_score_in_tokens_falls_by_the_law_of_tokens() -> None:
    found = pipeline.make_plan(
        Request(profile=LAPTOP, scheme="Q4_0", kv_type="f16"), [pipeline.named("demo")]
    )

    spec = pipeline.named("demo").spec
    nats = math.log(
        degradation.of_scheme(spec, "Q4_0", imatrix=False, family=None, measure="tokens").perplexity_ratio
    )
    whole = sum(pipeline.named("demo").panels.values())
    assert found.quality.score == pytest.approx(
        whole * math.exp(-degradation.FITTED.per_nat["tokens"] * nats)
    )
    assert found.quality.panel == "demo_heldout"


# ── students that are still to be made ───────────────────────────────────────────────────────────────


def test_distilling_offers_smaller_students_of_sure_shapes_and_never_the_teacher() -> None:
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    teacher = pipeline.named("demo")

    found = cut("demo")

    assert [c.model.prune for c in found] == [students.label(prune) for prune in students.ladder(config)]
    assert len({c.model.id for c in found}) == len(found)
    for candidate in found:
        how = students.parse(str(candidate.model.prune))
        assert candidate.spec == modelspec.from_config(students.shrunk(config, how), name=candidate.model.id)
        assert candidate.model.parameters == candidate.spec.parameters < teacher.spec.parameters
        assert (candidate.model.source, candidate.model.teacher) == ("demo", "demo")
        assert candidate.model.license == teacher.model.license


def test_a_smaller_model_of_the_family_is_a_start_too_and_is_taught_as_well() -> None:
    found = pipeline.candidates(None, "demo", extra=family(), distill=True)

    starts = [c.model for c in found if c.model.prune is None]
    assert [(m.id, m.source) for m in starts] == [
        ("demo-half-taught", "demo-half"),
        ("demo-quarter-taught", "demo-quarter"),
    ]
    assert {m.lesson and m.lesson.teacher for m in starts} == {"demo"}
    assert all(c.model.lesson is not None for c in found)


def test_what_reads_other_tokens_or_is_no_smaller_is_no_start() -> None:
    found = pipeline.candidates(None, "qwen2.5-7b-instruct", distill=True)

    starts = {c.model.source for c in found if c.model.prune is None}
    assert "Qwen/Qwen2.5-0.5B-Instruct" in starts
    assert {name.split("/")[0] for name in starts} == {"Qwen"}
    assert not any("14B" in name or "Qwen3" in name for name in starts)


def test_a_student_has_the_licences_of_all_that_went_into_it() -> None:
    found = {c.model.source: c.model for c in pipeline.candidates(None, "qwen2.5-3b-instruct", distill=True)}

    taught = found["Qwen/Qwen2.5-0.5B-Instruct"]
    assert taught.license == "Apache-2.0 AND Qwen-RESEARCH"
    assert not taught.commercial
    other = pipeline.candidates(None, "qwen2.5-7b-instruct", distill=True)
    start = next(c.model for c in other if c.model.source == "Qwen/Qwen2.5-3B-Instruct")
    assert (start.license, start.commercial) == ("Apache-2.0 AND Qwen-RESEARCH", False)
    assert all(c.model.commercial for c in other if c.model.prune is not None)


def test_a_folder_whose_card_forbids_commerce_is_planned_with_a_warning(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    card = "---\nlicense: other\nlicense_name: apache-2.0-and-qwen-research\n---\n"
    (tmp_path / "README.md").write_text(card, encoding="utf-8")

    found = pipeline.make_plan(Request(profile=LAPTOP), [pipeline.named(str(tmp_path))])

    assert not found.model.commercial
    assert [text for text in found.warnings if "forbids commercial use" in text]


def test_models_that_only_look_alike_are_no_starts(tmp_path: Path) -> None:
    config = (DEMO / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)

    found = pipeline.candidates(None, str(tmp_path), extra=family(), distill=True)

    assert all(c.model.prune is not None for c in found)


def test_a_start_is_ranked_by_the_score_it_has() -> None:
    better = CatalogModel(
        id="taught-well",
        repo="me/taught-well",
        license="Apache-2.0",
        commercial=True,
        config=family()[1].config,
        parameters=family()[1].parameters,
        teacher="demo",
        panels={"demo_heldout": {"next_token": 34.0}},
    )

    found = pipeline.make_plan(
        Request(profile=LAPTOP), pipeline.candidates(None, "demo", extra=(better,), distill=True)
    )

    assert found.model.id == "taught-well-taught"
    assert found.quality.low > 33.0
    assert [text for text in found.warnings if "taught-well-taught is taught by demo" in text]
    assert not [text for text in found.warnings if "scaling law" in text]


def test_a_students_score_is_what_the_scaling_law_leaves_of_the_teachers() -> None:
    student = cut("demo")[0]
    law = students.expected(pipeline.named("demo").spec.parameters, student.spec.parameters)
    whole = sum(pipeline.named("demo").panels.values())
    loss = degradation.of_scheme(student.spec, "Q8_0", imatrix=False, family=None, measure="tokens")

    found = pipeline.make_plan(Request(profile=LAPTOP, scheme="Q8_0", kv_type="f16"), [student])

    def left(nats: float) -> float:
        return math.exp(-degradation.FITTED.per_nat["tokens"] * nats)

    assert law.low < law.nats < law.high
    assert found.quality.score == pytest.approx(whole * left(law.nats) * loss.retention, rel=1e-6)
    assert found.quality.low == pytest.approx(whole * left(law.high) * loss.low, rel=FLOOR)
    assert found.quality.high == pytest.approx(whole * left(law.low) * loss.high, rel=FLOOR)
    assert found.quality.retention == pytest.approx(loss.retention, rel=1e-6)


def test_without_a_score_of_the_teacher_a_student_is_a_share_of_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((DEMO / "config.json").read_bytes())
    student = cut(str(tmp_path))[0]
    law = students.expected(pipeline.named("demo").spec.parameters, student.spec.parameters)

    found = pipeline.make_plan(Request(profile=LAPTOP, scheme="F16", kv_type="f16"), [student])

    assert found.quality.panel == "none"
    assert found.quality.score == pytest.approx(
        100 * math.exp(-degradation.FITTED.per_nat["answers"] * law.nats), rel=FLOOR
    )
    assert " % of its teacher (fitted, by a scaling law: the student is still to be made)" in tables.plan(
        found, None
    )


def test_everything_that_shows_a_plan_says_that_the_student_is_to_be_made_and_its_quality_a_guess() -> None:
    request, models = Request(profile=LAPTOP), cut("demo")
    found = pipeline.make_plan(request, models)

    shown = tables.plan(found, choice.explain(found, request, models))

    assert f"warning: to be made: {found.model.id} is cut out of demo ({found.model.prune})" in shown
    assert f"what a scaling law expects of {found.model.parameters:,} parameters" in shown
    assert f"; to be cut out of demo ({found.model.prune}) and taught" in shown
    assert "by its makers" not in shown
    assert "a guess by size until it is made" in shown


def test_a_teacher_that_runs_there_itself_is_not_passed_over_in_silence() -> None:
    models = pipeline.candidates(None, "qwen2.5-7b-instruct", distill=True)

    roomy = pipeline.make_plan(Request(profile=NANO), models)
    small = pipeline.make_plan(Request(profile=profile.load("raspberry-pi-5-4gb")), models)

    assert [text for text in roomy.warnings if "the teacher itself runs here: qwen2.5-7b-instruct" in text]
    assert not [text for text in small.warnings if "the teacher itself" in text]


def test_a_teacher_of_the_users_own_catalog_is_not_looked_up_again(tmp_path: Path) -> None:
    """It is in no catalog of ours, and no file of it is on this disk."""
    known = catalog.find("qwen2.5-7b-instruct")
    assert known is not None
    own = replace(known, id="my-teacher", repo="acme/my-teacher", revision="1" * 40)
    models = [c for c in pipeline.candidates(None, "my-teacher", extra=(own,), distill=True) if c.model.prune]

    found = pipeline.make_plan(Request(profile=NANO), models)

    assert [text for text in found.warnings if "the teacher itself runs here: my-teacher" in text]


def test_what_is_taught_further_says_that_its_score_is_of_before() -> None:
    models = pipeline.candidates(None, "qwen2.5-7b-instruct", distill=True)

    found = pipeline.make_plan(Request(profile=NANO), models)

    assert found.model.prune is None
    assert [text for text in found.warnings if "has before it is taught" in text]


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        ("demo", "x86-laptop"),
        ("qwen2.5-7b-instruct", "jetson-orin-nano-8gb"),
        ("qwen3-8b", "raspberry-pi-5-4gb"),
    ],
)
def test_for_quality_no_larger_student_in_the_same_scheme_would_have_fitted(teacher: str, name: str) -> None:
    request, models = Request(profile=profile.load(name)), cut(teacher)

    chosen = pipeline.make_plan(request, models)

    alike = [
        o
        for o in plan.survey(request, models)
        if isinstance(o, Plan) and (o.scheme, o.settings.kv_type) == (chosen.scheme, chosen.settings.kv_type)
    ]
    assert chosen.model.parameters == max(o.model.parameters for o in alike)


def test_the_change_of_an_explanation_may_let_a_larger_student_in() -> None:
    request = Request(profile=device("below-the-half"), scheme="Q8_0", slots=16)
    models = cut("demo")
    found = pipeline.make_plan(request, models)

    change = choice.explain(found, request, models).change

    assert found.model.parameters < max(c.model.parameters for c in models)
    assert "would allow demo-layers" in change


def test_a_plan_of_a_student_says_all_a_build_needs_and_survives_json(tmp_path: Path) -> None:
    found = pipeline.make_plan(Request(profile=LAPTOP), cut("demo"))
    file = tmp_path / "x.plan.json"
    file.write_text(serde.to_json(found), encoding="utf-8")

    assert pipeline.read_plan(file) == found
    assert students.parse(str(pipeline.read_plan(file).model.prune)) in students.ladder(
        json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    )


def test_a_plan_file_from_before_there_were_students_to_be_made_is_read(tmp_path: Path) -> None:
    found = pipeline.make_plan(Request(profile=LAPTOP), [pipeline.named("demo")])
    document = json.loads(serde.to_json(found))
    del document["model"]["lesson"]
    (tmp_path / "old.plan.json").write_text(json.dumps(document), encoding="utf-8")

    assert pipeline.read_plan(tmp_path / "old.plan.json") == found


# ── teachers ─────────────────────────────────────────────────────────────────────────────────────────


def test_of_a_teacher_on_the_hub_only_its_config_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache has no weights, and the network is not to be used."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    snapshot = tmp_path / "hub" / "models--acme--Teacher" / "snapshots" / COMMIT
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "tokenizer.json"):
        content = (DEMO / name).read_bytes()
        blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(blob)

    found = pipeline.candidates(None, "acme/Teacher", revision=COMMIT, offline=True, distill=True)

    assert found
    assert {(c.model.source, c.model.revision, c.model.teacher) for c in found} == {
        ("acme/Teacher", COMMIT, "acme/Teacher")
    }
    assert all(c.model.id.startswith("Teacher-layers") for c in found)


def test_a_known_student_of_a_teacher_is_found_with_and_without_the_organization() -> None:
    student = CatalogModel(
        id="s", repo="me/s", license="MIT", commercial=True, config=family()[1].config, teacher="Some-32B"
    )

    for name in ("Some-32B", "some-32b"):
        assert [c.model.id for c in pipeline.candidates(None, name, extra=(student,))] == ["s"]
    assert pipeline.candidates(None, "acme/Some-32B", extra=(student,))[0].model.id == "s"


def test_what_cannot_be_a_teacher_is_refused(tmp_path: Path) -> None:
    packed = tmp_path / "x.gguf"
    packed.write_bytes(b"GGUF")

    with pytest.raises(Unsupported, match="no teacher"):
        pipeline.candidates(None, str(packed), distill=True)
    with pytest.raises(NotFound, match="no model 'nobody'"):
        pipeline.candidates(None, "nobody", distill=True)
    with pytest.raises(NotFound, match="to cut a student out of") as caught:
        pipeline.candidates(None, "Qwen3-32B", distill=True)
    assert "known students: qwen3-0.6b, qwen3-1.7b" in str(caught.value.hint)


@pytest.mark.parametrize(("model", "teacher"), [("demo", None), ("demo", "demo"), (None, None)])
def test_distilling_wants_a_teacher_and_no_model(model: str | None, teacher: str | None) -> None:
    with pytest.raises(BadInput, match="--distill makes a student of a teacher"):
        pipeline.candidates(model, teacher, distill=True)


# ── building one ─────────────────────────────────────────────────────────────────────────────────────


Made = list[tuple[Checkpoint, Checkpoint | Prune, distillation.Options]]


class Asked(Exception):
    """Ends a build where a student would be made."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """What `distillation.make` was asked for; its stand-in makes nothing."""
    asked: Made = []

    def make(
        parent: Checkpoint,
        start: Checkpoint | Prune,
        options: distillation.Options,
        *_: object,
        **more: object,
    ) -> None:
        asked.append((parent, start, options))
        raise Asked(more["name"])

    monkeypatch.setattr(distillation, "make", make)
    return asked


def test_a_build_makes_the_student_that_the_plan_describes(made: Made, tmp_path: Path) -> None:
    words = ("--teacher", "demo", "--distill", "--data", "a.jsonl", "--data", "b.txt", "--steps", 7)

    done = run("build", "--profile", "x86-laptop", *words, "--preset", "article", "--seed", 3, "-o", tmp_path)

    assert isinstance(done.exception, Asked)
    ((parent, start, options),) = made
    planned = pipeline.make_plan(
        Request(profile=LAPTOP), pipeline.candidates(None, "demo", distill=True)
    ).model
    assert parent.source == "demo"
    if planned.prune is None:
        assert isinstance(start, Checkpoint)
        assert start.source == planned.source
    else:
        assert start == students.parse(planned.prune)
    assert options.data == (Path("a.jsonl"), Path("b.txt"))
    assert options.recipe == replace(distill.ARTICLE, steps=7, seed=3)


def test_a_plan_file_of_a_student_needs_no_more_words(made: Made, tmp_path: Path) -> None:
    file = tmp_path / "x.plan.json"
    (tmp_path / "teacher").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "teacher" / name).write_bytes((DEMO / name).read_bytes())
    words = ("--teacher", tmp_path / "teacher", "--distill", "--scheme", "Q8_0")
    planned = run("plan", "--profile", "x86-laptop", *words, "-o", file)
    assert planned.exit_code == 0, planned.stderr
    assert pipeline.read_plan(file).model.lesson is not None

    run("build", "--plan", file, "-o", tmp_path)
    run("build", "--plan", file, "--steps", 5, "-o", tmp_path)

    assert [options.recipe for _, _, options in made] == [Recipe(), Recipe(steps=5)]
    assert made[0][:2] == made[1][:2]


def test_a_plan_of_a_model_that_is_there_makes_no_student(made: Made, tmp_path: Path) -> None:
    found = pipeline.make_plan(Request(profile=LAPTOP), [pipeline.named("smollm3-3b")])

    with pytest.raises(Unsupported):
        pipeline.build(
            found, pipeline.BuildOptions(out=tmp_path, quantization=quantization.Options()), Silent()
        )

    assert made == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--model", "demo", "--data", "a.txt"),
            "--data says how a student is taught, and demo is there already",
        ),
        (("--model", "demo", "--preset", "article"), "--preset says how"),
        (("--model", "demo", "--distill"), "--distill makes a student of a teacher"),
        (("--distill",), "--distill makes a student of a teacher"),
    ],
)
def test_words_about_a_student_that_none_is_made_of_are_refused(words: tuple[str, ...], said: str) -> None:
    refused = run("build", "--profile", "x86-laptop", *words, "--dry-run")

    assert refused.exit_code == 2
    assert said in refused.stderr


def test_a_plan_file_and_another_wish_exclude_each_other(tmp_path: Path) -> None:
    refused = run("build", "--plan", tmp_path / "x.json", "--teacher", "demo", "--distill")

    assert refused.exit_code == 2
    assert "--plan holds the whole plan" in refused.stderr


def test_a_student_once_made_is_a_model_of_its_own() -> None:
    found = pipeline.make_plan(Request(profile=LAPTOP, scheme="Q8_0"), cut("demo"))
    checkpoint = Checkpoint(path=Path("x"), source="students/x", revision="sha256:12", license="unknown")

    built = plan.with_spec(found, cut("demo")[0].spec, pipeline._with_provenance(found.model, checkpoint))

    assert (built.model.source, built.model.revision, built.model.prune) == ("students/x", "sha256:12", None)
    assert (built.model.teacher, built.model.license) == ("demo", "Apache-2.0")
    assert built.name == found.name
    assert not [text for text in built.warnings if text.startswith(plan.TO_BE_MADE)]
    assert [text for text in built.warnings if "a scaling law expects" in text]
