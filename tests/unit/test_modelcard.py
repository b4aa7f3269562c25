"""What is told of a student: the report survives JSON, and its card says what was measured and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from edgepack import catalog, hub, modelcard
from edgepack.builders.distill import ARTICLE, Lora, Objective, Recipe
from edgepack.calibration import Source
from edgepack.evaluation import Accuracy, Estimate, Reading
from edgepack.modelcard import Answers, Held, Origin, Report
from edgepack.progress import Silent

LOG = """{"step": 0, "held_out": {"loss": 3.0, "ce": 3.5, "divergence": 0.5}}
{"step": 1, "loss": 3.1, "ce": 3.6, "divergence": 0.6, "rate": 0.001}
{"step": 1, "held_out": {"loss": 2.0, "ce": 2.5, "divergence": 0.25}}
"""


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=value * 0.9, high=value * 1.1)


def reading(model: str, nll: float, kl: float | None) -> Reading:
    top = None if kl is None else estimate(0.5)
    return Reading(
        model=model,
        tokens=1000,
        nll=estimate(nll),
        kl=None if kl is None else estimate(kl),
        same_top=top,
        by_example=(),
    )


HELD = Held(
    name="data",
    teacher=reading("teacher", 1.0, None),
    before=reading("start", 2.0, 1.1),
    after=reading("student", 1.25, 0.3),
    recovered=estimate(0.75),
)
REPORT = Report(
    name="half",
    run="0123456789abcdef",
    parameters=3_475_200,
    license="apache-2.0",
    teacher=Origin(source="acme/big", revision="sha256:12", license="apache-2.0", parameters=6_425_856),
    start=None,
    prune="layers=3",
    layers=(0, 1, 5),
    data=(Source(name="books.jsonl", sha256="ab" * 32, documents=359),),
    replay=(),
    replayed=0.0,
    examples=4456,
    tokens=1_139_584,
    targets=1_134_949,
    recipe=Recipe(),
    precision="bf16",
    k=64,
    bytes_per_token=284.0,
    steps=400,
    best=360,
    stopped_early=False,
    held_out=(HELD,),
    answers=None,
    tools={"torch": "2.13.0", "transformers": "5.17.0"},
    warnings=(),
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    path.write_text(LOG, encoding="utf-8")
    return path


def written(report: Report, log: Path) -> Path:
    folder = log.parent / "student"
    folder.mkdir()
    modelcard.write(report, log, folder)
    return folder


def test_a_report_survives_json(log: Path) -> None:
    assert modelcard.of(written(REPORT, log)) == REPORT


def test_a_folder_without_a_report_has_none(tmp_path: Path) -> None:
    assert modelcard.of(tmp_path) is None


def test_the_card_has_a_front_matter_that_the_hub_reads_and_every_figure(log: Path) -> None:
    folder = written(REPORT, log)
    card = (folder / "README.md").read_text(encoding="utf-8")

    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["license"], front["base_model"]) == ("apache-2.0", ["acme/big"])
    for figure in ("2.72 [2.46, 3.00]", "3.49 [3.08, 3.96]", "0.3000 [0.2700, 0.3300]", "50.0% [45.0%, 55.0%]",
                   "training closed 75% [68%, 82%]", "layers 0, 1, 5", "359 documents", "1,134,949 of them responses",
                   "284 bytes a token", "torch 2.13.0", "those of step 360"):  # fmt: skip
        assert figure in card


def test_a_licence_is_handed_on_to_what_is_built_from_it(log: Path) -> None:
    folder = written(REPORT, log)
    (folder / "config.json").write_text("{}", encoding="utf-8")

    assert hub.resolve(str(folder), progress=Silent()).license == "apache-2.0"


@pytest.mark.parametrize(
    ("license", "name"),
    [("unknown", "unknown"), ("Apache-2.0 AND Qwen-RESEARCH", "apache-2.0-and-qwen-research")],
)
def test_a_licence_that_the_hub_has_no_name_for_is_other_and_is_read_back(
    license: str, name: str, log: Path
) -> None:
    folder = written(replace(REPORT, license=license), log)

    front = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (front["license"], front["license_name"]) == ("other", name)
    assert hub.license_in(folder) == name
    assert catalog.allows_commerce(name) == (license == "unknown")


def test_a_start_that_was_no_worse_than_its_teacher_has_nothing_recovered(log: Path) -> None:
    held = replace(HELD, before=reading("start", 0.9, 0.2), recovered=None)

    card = (written(replace(REPORT, held_out=(held,)), log) / "README.md").read_text(encoding="utf-8")

    assert "The start was better on these data than its teacher, by 0.100 nats a token" in card


def test_a_student_that_is_better_than_its_teacher_has_no_share_of_the_gap(log: Path) -> None:
    held = replace(HELD, after=reading("student", 0.9, 0.3), recovered=estimate(1.1))

    card = (written(replace(REPORT, held_out=(held,)), log) / "README.md").read_text(encoding="utf-8")

    assert "1.000 nats a token off its teacher and is 0.100 better than it now" in card
    assert "training closed" not in card


def test_replay_answers_and_warnings_are_told(log: Path) -> None:
    origin = Origin(source="old-half", revision="sha256:34", license="apache-2.0", parameters=3_475_200)
    asked = Accuracy(
        name="q.jsonl",
        sha256="0" * 64,
        items=40,
        right=30,
        accuracy=estimate(0.75),
        parent=None,
        lost=1,
        gained=2,
    )
    report = replace(
        REPORT,
        start=origin,
        prune=None,
        layers=None,
        replay=REPORT.data,
        replayed=0.25,
        held_out=(HELD, replace(HELD, name="replay")),
        answers=Answers(teacher=estimate(0.8), before=estimate(0.5), after=asked),
        warnings=("3 of 40 conversations were cut",),
        stopped_early=True,
    )

    card = (written(report, log) / "README.md").read_text(encoding="utf-8")

    for words in ("began as old-half (3,475,200 parameters", "What it was made with before:", "25% of the examples",
                  "Right answers to 40 questions", "stopped early", "Warning: 3 of 40"):  # fmt: skip
        assert words in card


def test_how_it_was_taught_is_written_as_a_formula(log: Path) -> None:
    recipe = replace(ARTICLE, objective=replace(ARTICLE.objective, hidden=0.1), lora=Lora(rank=8))

    card = (written(replace(REPORT, recipe=recipe), log) / "README.md").read_text(encoding="utf-8")

    assert (
        "0.7 · cross entropy + 0.3 · 2² · KL(teacher, student) at T = 2 + 0.1 · distance of hidden states"
        in card
    )
    assert "LoRA of rank 8, alpha 128, merged" in card


def test_hard_labels_alone_name_no_teacher(log: Path) -> None:
    report = replace(REPORT, recipe=Recipe(objective=Objective(alpha=1.0)), k=None, bytes_per_token=None)

    card = (written(report, log) / "README.md").read_text(encoding="utf-8")

    assert "| loss | 1 · cross entropy |" in card
    assert "logits a token" not in card


def test_the_drawing_has_the_curves_of_the_log(log: Path) -> None:
    folder = written(REPORT, log)

    svg = ElementTree.parse(folder / modelcard.CURVES).getroot()
    lines = [line.get("points", "").split() for line in svg.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(line) for line in lines] == [1, 2]
    steps = [json.loads(line)["step"] for line in (folder / modelcard.STEPS).read_text().splitlines()]
    assert steps == [0, 1, 1]
