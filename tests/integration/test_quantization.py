"""`edgepack quantize` and calibrated builds as users run them: measured, recorded, refused when too much is lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from edgepack import record, scoring, serde
from edgepack.catalog import built_in
from edgepack.evaluation import Quality
from tests.documents import obeys
from tests.integration.test_command_line import edgepack, fresh_cache, refused, succeeded

pytestmark = pytest.mark.integration

DEMO = built_in()["demo"]
QUICK = ("--quality-tokens", 2048, "--calibration-tokens", 4096, "--jobs", 1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fresh_cache(tmp_path_factory.mktemp("quantization") / "cache")


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration data that the built-in text holds too, as a user's file."""
    rows = (Path(record.__file__).parent / "calibration" / "builtin.jsonl").read_text().splitlines()[:40]
    path = tmp_path_factory.mktemp("data") / "mine.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_an_artifact_comes_with_what_it_lost_and_what_it_was_calibrated_on(
    cache: Path, mine: Path, tmp_path: Path
) -> None:
    words = (
        "quantize",
        "--model",
        "demo",
        "--scheme",
        "Q3_K_M",
        "--calibration",
        mine,
        *QUICK,
        "-o",
        tmp_path,
    )

    document = obeys("quantize", succeeded(edgepack(*words, "--json", cache=cache)))

    artifact = Path(document["path"])
    obeys("record", record.place(artifact).read_bytes())
    kept = record.of(artifact)
    assert artifact.name == "demo-q3_k_m.gguf" and kept is not None
    assert serde.dump(record.shown(kept)) == document["record"]
    assert kept.calibration is not None and len(kept.calibration.fingerprints) > 100
    assert kept.bytes == artifact.stat().st_size > kept.tensor_bytes == document["predicted_tensor_bytes"]
    assert kept.calibration is not None and [s.name for s in kept.calibration.sources] == ["mine.jsonl"]
    assert kept.quality is not None and kept.quality.parent is not None
    assert 0.005 < kept.quality.parent.kl.value < 0.2

    again = succeeded(edgepack(*words, cache=cache))
    assert "loss" in again and "mine.jsonl" in again
    with artifact.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff" if artifact.read_bytes()[-1] != 0xFF else b"\x00")
    said = refused(edgepack(*words, cache=cache), 2)
    assert "is there already and is not overwritten" in said


def test_what_lies_where_the_user_stands_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A downloaded folder may hold a numpy.py, and `python -m` would import it first."""
    for module in ("numpy", "torch", "tokenizers"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('imported from where the user stands')")
    monkeypatch.chdir(tmp_path)

    with scoring.opened(DEMO, threads=1) as scorer:
        assert scorer.tokenize("Prince Andrew")


def test_an_artifact_that_was_killed_before_its_record_is_taken_up(cache: Path, tmp_path: Path) -> None:
    words = ("quantize", "--model", "demo", "--scheme", "Q8_0", "--quality-tokens", 2048, "-o", tmp_path)
    artifact = Path(json.loads(succeeded(edgepack(*words, "--json", cache=cache)))["path"])
    record.place(artifact).unlink()

    succeeded(edgepack(*words, cache=cache))

    assert record.of(artifact) is not None
    artifact.write_bytes(b"GGUF")
    assert "is not overwritten" in refused(edgepack(*words, cache=cache), 2)


def test_quality_is_not_measured_on_the_calibration_text(cache: Path, mine: Path, tmp_path: Path) -> None:
    text = tmp_path / "same.txt"
    text.write_text("\n\n".join(json.loads(line).get("text", "") for line in mine.read_text().splitlines()))
    words = ("quantize", "--model", "demo", "--scheme", "Q3_K_M", "--calibration", mine, *QUICK)

    said = refused(edgepack(*words, "--quality-text", text, "-o", tmp_path / "out", cache=cache), 2)

    assert "calibrated on" in said
    assert not (tmp_path / "out").exists()


def test_what_loses_too_much_is_refused_and_the_scheme_that_would_do_is_named(
    cache: Path, tmp_path: Path
) -> None:
    limits = ("--max-kl", 0.008, "--quality-tokens", 2048, "--jobs", 1, "-o", tmp_path / "out")
    words = ("quantize", "--model", "demo", *limits, "--scheme")

    said = refused(edgepack(*words, "Q3_K_M", cache=cache), 12)

    assert "KL to the parent" in said and "above the limit of 0.008 nats" in said
    assert not (tmp_path / "out").exists()
    proposed = said.split("take --scheme ")[1].split(",")[0]
    assert proposed in succeeded(edgepack(*words, proposed, cache=cache)), "the proposal keeps the limit"


def test_a_bundle_carries_calibration_and_quality(cache: Path, mine: Path, tmp_path: Path) -> None:
    words = (
        "--profile",
        "jetson-orin",
        "--model",
        "demo",
        "--scheme",
        "Q4_K_M",
        "--calibration",
        mine,
        *QUICK,
    )

    bundle = succeeded(
        edgepack("build", *words, "--max-ppl-loss", "20%", "-o", tmp_path, cache=cache)
    ).strip()

    shown = json.loads(succeeded(edgepack("inspect", bundle, "--json")))
    measured = serde.load(Quality, shown["quality"], source="quality")
    assert measured.parent is not None and measured.parent.kl.low > 0
    folder = tmp_path / "unpacked"
    succeeded(edgepack("unpack", bundle, folder))
    statement = json.loads((folder / "provenance.json").read_text())
    names = {row["name"] for row in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert "calibration" in names


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b"\x00\x01\x02binary", "UTF-8"), (b'{"nothing": "known"}\n', "nothing")],
)
def test_calibration_data_that_cannot_serve_are_refused_before_any_work(
    content: bytes, said: str, cache: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(content)
    words = (
        "quantize",
        "--model",
        "demo",
        "--scheme",
        "gptq-int4-g128",
        "--calibration",
        data,
        "-o",
        tmp_path / "out",
    )

    assert said in refused(edgepack(*words, cache=cache), 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--scheme", "gptq-int5-g128"), 11, "packs 2, 3, 4, 8 bits, not 5"),
        (("--scheme", "awq-int3-g128"), 11, "awq packs 4 bits"),
        (("--scheme", "IQ2_XS"), 11, "needs an importance matrix"),
        (("--scheme", "Q4_K_M", "--preset", "article"), 2, "exclude each other"),
        ((), 2, "a scheme or a preset"),
        (("--scheme", "Q4_K_M", "--max-ppl-loss", "much"), 2, "is no share"),
    ],
)
def test_wrong_words_get_one_message(
    words: tuple[str, ...], code: int, said: str, cache: Path, tmp_path: Path
) -> None:
    assert said in refused(edgepack("quantize", "--model", "demo", *words, "-o", tmp_path, cache=cache), code)


def test_rows_that_groups_do_not_divide_are_refused(cache: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(DEMO, odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"intermediate_size": 1056}))

    said = refused(
        edgepack(
            "quantize", "--model", odd, "--scheme", "gptq-int4-g128", "-o", tmp_path / "out", cache=cache
        ),
        11,
    )

    assert "1056" in said and "g32" in said
