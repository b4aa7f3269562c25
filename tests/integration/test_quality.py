"""Real runtimes: they agree where they must, order where schemes order, and say what is wrong in one message."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepack import bundle, heldout, quality, scoring, serde, toolchain
from edgepack.artifact import Artifact, Checkpoint
from edgepack.builders import child, convert, quantize
from edgepack.catalog import built_in
from edgepack.errors import BadInput, BuildFailed, MissingTool
from edgepack.evaluation import Quality
from edgepack.progress import Silent
from edgepack.scoring import llama_cpp, onnx_genai, reference
from edgepack.units import Bytes
from edgepack.workspace import sha256_file
from tests.documents import obeys
from tests.plans import example_plan

pytestmark = pytest.mark.integration

DEMO = built_in()["demo"]
TOKENS = 4096


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """References of its own; the compiled llama.cpp stays where it is."""
    place = tmp_path_factory.mktemp("cache")
    tools = toolchain.find().root.parent
    (place / "toolchain").symlink_to(tools)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPACK_CACHE", str(place))
        yield place


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The built-in model as GGUF: F32 and F16 as converted, three schemes quantized from F16."""
    place = tmp_path_factory.mktemp("gguf")
    for outtype in ("F32", "F16"):
        convert.convert(DEMO, place / f"{outtype}.gguf", outtype=outtype, progress=Silent())
    for scheme in ("Q8_0", "Q4_K_M", "Q2_K"):
        out = place / f"{scheme}.gguf"
        tools = toolchain.find()
        quantize.quantize(place / "F16.gguf", out, scheme, imatrix=None, toolchain=tools, progress=Silent())
    return place


def measured(artifact: Path, **more: object) -> Quality:
    given = {"against": DEMO, "text": heldout.read(), "tokens": TOKENS, "threads": 1, "progress": Silent()}
    return quality.measure(artifact, **{**given, **more})  # type: ignore[arg-type]  # as measure takes them


def edgepack(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgepack", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


def test_llama_cpp_and_transformers_compute_the_same_distributions(models: Path) -> None:
    text = heldout.read().content
    with scoring.opened(DEMO, threads=1) as torch:
        ids = torch.tokenize(text)
        said = torch.text(ids[:50])
        pieces = heldout.windows(ids, count=8, size=256, bos=torch.facts.bos)
        known = reference.make("transformers", torch, pieces, Silent())
    for name, limit in (("F32", 2e-7), ("F16", 5e-7)):
        with scoring.opened(models / f"{name}.gguf", threads=1) as llama:
            assert llama.tokenize(text) == ids
            assert llama.text(ids[:50]) == said
            found = reference.compare(llama, known, Silent())
        assert found.kl.mean() < limit, name
        assert found.agrees.mean() > 0.998, name
        assert abs((found.nll - known.nll).mean()) < 1e-4, name


def test_rows_of_padding_are_no_difference_on_either_side(tmp_path: Path, models: Path) -> None:
    from safetensors.numpy import load_file, save_file

    more = shutil.copytree(DEMO, tmp_path / "padded")
    config = json.loads((more / "config.json").read_text(encoding="utf-8")) | {"vocab_size": 2176}
    (more / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(more / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.concatenate((table, 1.5 * table[300:428]))  # likely ones
    save_file(tensors, more / "model.safetensors", metadata={"format": "pt"})
    padded = convert.convert(more, tmp_path / "padded.gguf", outtype="F16", progress=Silent())

    for artifact, against in ((padded, models / "F16.gguf"), (models / "F16.gguf", more)):
        found = measured(artifact, against=against, tokens=512, window=64).parent

        assert found is not None
        assert found.kl.value < 5e-7 and found.same_top.value > 0.99
        assert abs(found.log_ratio.value) < 1e-4


def test_schemes_lose_in_the_order_of_their_bits(models: Path) -> None:
    found = {name: measured(models / f"{name}.gguf").parent for name in ("F16", "Q8_0", "Q4_K_M", "Q2_K")}

    kl = [one.kl for one in found.values() if one is not None]
    assert len(kl) == 4
    assert kl[0].value < 1e-7
    assert all(a.high < b.low for a, b in pairwise(kl)), kl
    top = [one.same_top.value for one in found.values() if one is not None]
    assert top == sorted(top, reverse=True)
    loss = [one.log_ratio for one in found.values() if one is not None]
    assert loss[1].low < 0 < loss[1].high, "Q8_0 is not to be told from its parent"
    assert loss[3].low > loss[2].high > loss[2].value > 0


def test_measuring_again_gives_the_same_value_without_the_parent(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measured(models / "Q4_K_M.gguf", seed=1)
    monkeypatch.setattr(reference, "make", lambda *_: pytest.fail("the parent was scored again"))

    other = measured(models / "Q4_K_M.gguf", seed=2)

    assert other.parent is not None
    assert first.parent is not None
    assert replace(other.parent, kl_p99=first.parent.kl_p99) == first.parent
    monkeypatch.setattr(scoring, "opened", lambda *_, **__: pytest.fail("the artifact was loaded again"))
    assert measured(models / "Q4_K_M.gguf", seed=2) == other


def test_the_cache_of_the_plan_is_part_of_what_is_measured(models: Path) -> None:
    plain, rounded = (measured(models / "F16.gguf", kv_type=kind).parent for kind in ("f16", "q8_0"))

    assert plain is not None
    assert rounded is not None
    assert rounded.kl.low > 100 * plain.kl.high


def test_a_prefix_in_the_cache_changes_nothing(models: Path) -> None:
    options = scoring.Options(threads=1, package=str(toolchain.find().package))
    tokens = [int(t) for t in np.random.default_rng(1).integers(1, 2000, 300)]
    other = [*tokens[:200], 7, 8, 9]
    with llama_cpp.Model(models / "F32.gguf", options) as model:
        whole = model.logits(other, 150)
        model.logits(tokens)
        again = model.logits(other, 150)
        longer = model.logits(tokens, 290)

    assert whole.shape == (53, 2048)
    # Batches of other lengths add in another order.
    assert reference.divergence(*reference.encode(whole), again).max() < 1e-6
    assert longer.shape == (10, 2048)


def test_a_window_longer_than_the_model_was_trained_on_is_cut(models: Path) -> None:
    found = measured(models / "F16.gguf", against=None, window=4096)

    assert (found.text.window, found.text.windows) == (512, 8)
    assert found.parent is None


def test_a_graph_of_onnx_computes_the_same_distributions(tmp_path: Path) -> None:
    with scoring.opened(DEMO, threads=1) as torch:
        pieces = heldout.windows(torch.tokenize(heldout.read().content), count=2, size=128, bos=None)
        known = reference.make("two windows", torch, pieces, Silent())
    graph = tmp_path / "graph"
    words = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(DEMO), "-o", str(graph)]
    words += ["-p", "fp32", "-e", "cpu", "-c", str(tmp_path / "cache")]
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})

    with scoring.opened(graph, threads=1) as model:
        found = reference.compare(model, known, Silent())

    assert found.kl.mean() < 2e-8
    assert found.agrees.mean() > 0.998

    class LastOnly(onnx_genai.Model):
        """As a graph is whose head computes the last token only (the builder's prune_lm_head)."""

        def _after(self, generator: Any, tokens: Sequence[int]) -> scoring.Logits:
            return super()._after(generator, tokens)[-1:]

    one_by_one = LastOnly(graph, scoring.Options(threads=1)).logits(pieces[0][:40], 30)
    whole = onnx_genai.Model(graph, scoring.Options(threads=1)).logits(pieces[0][:40], 30)
    assert one_by_one.shape == whole.shape == (10, 2048)
    assert np.abs(one_by_one - whole).max() < 1e-3


def test_another_models_tokens_are_refused(models: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(DEMO, other)
    words = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    words["model"]["merges"] = words["model"]["merges"][:-200]
    (other / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")

    convert.convert(other, tmp_path / "other.gguf", outtype="F16", progress=Silent())

    with pytest.raises(BadInput, match="cut the text into different tokens"):
        measured(tmp_path / "other.gguf")


def test_a_text_that_is_too_short_is_refused(models: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("It was the best of times. " * 40, encoding="utf-8")

    with pytest.raises(BadInput, match=r"windows of 256 tokens are too few for an interval"):
        measured(models / "F16.gguf", text=heldout.read(short))


def test_what_a_runtime_does_not_load_is_told_in_its_words(models: Path, tmp_path: Path) -> None:
    cut, folder = tmp_path / "cut.gguf", tmp_path / "hf"
    cut.write_bytes((models / "Q8_0.gguf").read_bytes()[:200_000])
    folder.mkdir()
    shutil.copy(DEMO / "config.json", folder)

    for artifact, said in ((cut, "does not load cut.gguf"), (folder, "does not load hf")):
        with pytest.raises(BuildFailed, match=said):
            measured(artifact)


def test_a_library_that_is_missing_is_named(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise ImportError('no', name='transformers')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(child, "own_code", lambda: {"PYTHONPATH": os.environ["PYTHONPATH"]})

    with (
        pytest.raises(MissingTool, match="transformers is not installed") as caught,
        scoring.opened(DEMO, threads=1),
    ):
        pytest.fail("it loaded")
    assert caught.value.hint == "pip install 'edgepack[torch]'"


def test_killed_in_the_middle_nothing_half_is_left_and_a_rerun_ends(models: Path, cache: Path) -> None:
    words = [
        "quality",
        models / "Q2_K.gguf",
        "--against",
        DEMO,
        "--tokens",
        8064,
        "--window",
        63,
        "--jobs",
        1,
    ]
    started = subprocess.Popen(
        [sys.executable, "-m", "edgepack", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not list(reference.folder().glob(".*.part*")):
        assert started.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    before = {place.name for place in reference.folder().glob("[!.]*")}
    started.send_signal(signal.SIGKILL)
    started.communicate()
    assert {place.name for place in reference.folder().glob("[!.]*")} == before

    told = json.loads(edgepack(*words, "--json").stdout)

    assert told["text"]["windows"] == 128
    assert list(reference.folder().glob(".*.part*")) == []


def test_a_bundle_is_measured_as_it_is_served(models: Path, tmp_path: Path) -> None:
    plan = example_plan("raspberry-pi-5-8gb")
    plan = replace(plan, settings=replace(plan.settings, kv_type="q8_0"))
    weights = models / "Q4_K_M.gguf"
    artifact = Artifact(
        path=weights, scheme="Q4_K_M", sha256=sha256_file(weights), bytes=Bytes(weights.stat().st_size),
        imatrix_sha256=None, tool="llama.cpp",
    )  # fmt: skip
    checkpoint = Checkpoint(path=DEMO, source="demo", revision="sha256:" + "12" * 32, license="Apache-2.0")
    bundle.write(plan, artifact, tmp_path / "b.tar", checkpoint=checkpoint, selftest={"schema_version": 1})

    with quality.subject(tmp_path / "b.tar", Silent()) as subject:
        found = measured(subject.path, kv_type=subject.kv_type)
        place = subject.path

    assert not place.exists()
    assert found.artifact == artifact.sha256
    assert "KV cache q8_0" in found.runtime
    assert found == measured(weights, kv_type="q8_0")


def test_an_artifact_is_not_measured_on_what_it_was_calibrated_on(models: Path) -> None:
    with pytest.raises(BadInput, match="the text that the artifact was calibrated on"):
        measured(
            models / "Q2_K.gguf", fingerprints=heldout.fingerprints(heldout.read().content[30_000:50_000])
        )


def test_the_command_measures_tasks_and_writes_what_it_prints(models: Path, tmp_path: Path) -> None:
    items, out = tmp_path / "items.jsonl", tmp_path / "quality.json"
    rows = [
        {"question": "He said that he", "choices": [" would come", "zq xw vv"], "answer": 0},
        {
            "question": "She was a woman of",
            "A": "great beauty",
            "B": "qx qx",
            "C": "7%",
            "D": "}{",
            "answer": "A",
        },
        {"prompt": "Once upon a", "answer": "zebra"},
    ]
    items.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    words = ("quality", models / "Q4_K_M.gguf", "--against", "demo", "--tokens", TOKENS, "--jobs", 1)

    told = obeys("quality", edgepack(*words, "--tasks", items, "--json", "-o", out).stdout)

    assert told == json.loads(out.read_text(encoding="utf-8"))
    assert (told["tasks"]["items"], told["tasks"]["right"]) == (3, 2)
    assert (told["tasks"]["lost"], told["tasks"]["gained"]) == (0, 0)
    assert serde.load_json(Quality, out).parent is not None


def test_bad_input_ends_the_command_with_one_message(models: Path, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"question": "q"}\n', encoding="utf-8")

    ended = edgepack("quality", models / "F16.gguf", "--tasks", items, check=False)

    assert ended.returncode == 2
    assert "line 1: has fewer than two choices" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
