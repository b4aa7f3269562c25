"""Building a GGUF: sizes are those that were predicted, stages resume, and nothing half-written is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.native import Native

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import random_model

from edgepack import calibration, ggufheader, modelspec, schemes, toolchain
from edgepack.artifact import Artifact, Checkpoint
from edgepack.builders import convert, exact, gguf, imatrix
from edgepack.calibration import Calibration, Sampling, chat
from edgepack.errors import BadInput, BuildFailed, Unsupported
from edgepack.modelspec import ModelSpec
from edgepack.progress import Silent
from edgepack.runtimes import llama_cpp
from edgepack.settings import Settings

pytestmark = pytest.mark.integration

_SHAPES = {
    "multiples of 256": random_model.SHAPES["tiny"],
    "rows of 96 and 160": {
        **random_model.SHAPES["tiny"],
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
}
_SETTINGS = Settings(
    context=1024,
    slots=2,
    kv_type="f16",
    batch=2048,
    ubatch=256,
    flash_attention=True,
    unified_kv=False,
    threads=1,
    gpu_layers=0,
    load_mode="none",
    repack=True,
)
_PROSE = "Well, Prince, so Genoa and Lucca are now just family estates of the Buonapartes. " * 200
_SAMPLING = Sampling(windows=8, length=128)


@pytest.fixture(scope="module", params=sorted(_SHAPES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random"
    random_model.write(_SHAPES[request.param], path, seed=1)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    random_model.write(random_model.SHAPES["tiny"], path, seed=1)
    return path


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert.convert(
        tiny, tmp_path_factory.mktemp("whole") / "tiny.gguf", outtype="F16", progress=Silent()
    )


@pytest.fixture(scope="module")
def matrix(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("imatrix")
    return compute(whole, data(place / "prose.txt", _PROSE), place / "m.gguf")


def data(path: Path, text: str) -> Calibration:
    path.write_text(text, encoding="utf-8")
    return calibration.read((path,), template=None, sampling=_SAMPLING)


def compute(whole: Path, given: Calibration, out: Path) -> Path:
    return imatrix.compute(whole, given, out, toolchain=toolchain.find(), progress=Silent())


def spec_of(path: Path) -> ModelSpec:
    spec = modelspec.read(path)
    return replace(spec, header_bytes=convert.header_size(path)) if path.is_dir() else spec


def build(path: Path, scheme: str, out: Path, *, matrix: Path | Calibration | None = None) -> Artifact:
    checkpoint = Checkpoint(path=path, source=str(path), revision="sha256:test", license="none")
    return gguf.build(
        checkpoint, spec_of(path), scheme, out, imatrix=matrix, toolchain=toolchain.find(), progress=Silent()
    )


_PLAIN = [name for name in schemes.GGUF if not schemes.needs_imatrix(name) and name != "Q1_0"]
"""Q1_0 has blocks of 128 and no fallback: see test_a_scheme_without_a_fallback_is_refused_by_both."""


@pytest.mark.parametrize("scheme", _PLAIN)
def test_a_file_has_the_bytes_that_were_predicted(scheme: str, folder: Path, tmp_path: Path) -> None:
    spec = spec_of(folder)

    made = build(folder, scheme, tmp_path)

    assert (made.bytes, "exact") == schemes.file_bytes(spec, scheme, imatrix=False)
    types = {tensor.name: tensor.type for tensor in ggufheader.parse(made.path).tensors}
    assert tuple(types[t.name] for t in spec.tensors) == schemes.tensor_types(spec, scheme, imatrix=False)
    assert [path.name for path in tmp_path.iterdir()] == [made.path.name]


@pytest.mark.parametrize("scheme", ["IQ2_XXS", "IQ1_S", "IQ3_XXS", "Q2_K_S", "IQ4_XS", "Q4_0", "Q4_K_M"])
def test_so_has_one_with_an_importance_matrix(scheme: str, tiny: Path, matrix: Path, tmp_path: Path) -> None:
    made = build(tiny, scheme, tmp_path, matrix=matrix)

    assert (made.bytes, "exact") == schemes.file_bytes(spec_of(tiny), scheme, imatrix=True)
    assert made.imatrix_sha256 is not None


def test_a_scheme_without_a_fallback_is_refused_by_both(tmp_path: Path) -> None:
    path = tmp_path / "narrow"
    random_model.write(_SHAPES["rows of 96 and 160"], path, seed=1)

    with pytest.raises(Unsupported, match="no fallback for Q1_0"):
        build(path, "Q1_0", tmp_path / "out")
    with pytest.raises(BuildFailed, match="no tensor type fallback"):
        exact.exact(spec_of(path), "Q1_0", _SETTINGS, toolchain=toolchain.find())


@pytest.mark.parametrize("scheme", [name for name in schemes.GGUF if name != "Q1_0"])
@pytest.mark.parametrize("has_matrix", [False, True])
def test_llama_cpp_says_the_same_without_weights(scheme: str, has_matrix: bool, folder: Path) -> None:
    spec = spec_of(folder)

    said = exact.exact(spec, scheme, _SETTINGS, imatrix=has_matrix, toolchain=toolchain.find())

    assert said.tensor_types == schemes.tensor_types(spec, scheme, imatrix=has_matrix)
    assert said.file_bytes == schemes.file_bytes(spec, scheme, imatrix=has_matrix)[0]
    assert abs(said.kv_cache - llama_cpp.kv_bytes(spec, _SETTINGS)) <= exact.PRINTED
    assert abs(said.output - llama_cpp.output_bytes(spec, _SETTINGS.slots)) <= exact.PRINTED


def test_llama_cpp_s_refusal_is_passed_on(tiny: Path) -> None:
    refused = replace(_SETTINGS, kv_type="q8_0", flash_attention=False)

    with pytest.raises(BuildFailed, match="flash_attn"):
        exact.exact(spec_of(tiny), "Q8_0", refused, toolchain=toolchain.find())


def test_the_same_input_gives_the_same_file_under_another_folder(tiny: Path, tmp_path: Path) -> None:
    one, two = build(tiny, "Q4_K_M", tmp_path / "a"), build(tiny, "Q4_K_M", tmp_path / "b")

    assert one.sha256 == two.sha256


def test_a_quantized_file_answers_much_like_the_whole_one(tiny: Path, tmp_path: Path) -> None:
    whole, small = build(tiny, "F16", tmp_path), build(tiny, "Q8_0", tmp_path)
    tokens = list(range(300, 340))

    with Native(whole.path) as a, Native(small.path) as b:
        one, two = a.logits(tokens), b.logits(tokens)

    assert abs(one - two).max() < 0.2 * one.std()


def test_a_gguf_is_used_where_it_lies(tiny: Path, tmp_path: Path) -> None:
    first = build(tiny, "Q4_0", tmp_path / "first")

    again = build(first.path, "as-is", tmp_path / "second")

    assert again.path == first.path
    assert again.scheme == "Q4_0"
    assert not (tmp_path / "second").exists()


def test_a_gguf_in_full_precision_is_quantized_without_converting(tiny: Path, tmp_path: Path) -> None:
    whole = build(tiny, "BF16", tmp_path / "whole")

    made = build(whole.path, "Q8_0", tmp_path / "made")

    assert made.sha256 == build(tiny, "Q8_0", tmp_path / "direct").sha256
    assert whole.path.is_file()


def test_schemes_that_need_a_matrix_are_refused_before_any_work(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="importance matrix"):
        build(tiny, "IQ2_XS", tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_a_matrix_of_another_model_is_refused(matrix: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    random_model.write(_SHAPES["rows of 96 and 160"], other, seed=1)

    with pytest.raises(BadInput, match="columns"):
        build(other, "Q4_K_M", tmp_path / "out", matrix=matrix)


def test_a_text_is_turned_into_a_matrix(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "prose.txt"
    text.write_text(_PROSE, encoding="utf-8")

    made = build(tiny, "IQ2_XS", tmp_path / "out", matrix=text)

    assert (made.bytes, "exact") == schemes.file_bytes(spec_of(tiny), "IQ2_XS", imatrix=True)
    read = calibration.of(tiny, spec_of(tiny), (text,))
    assert (made.calibration_sha256, made.imatrix_sha256) == (read.sha256, None)


def test_the_same_data_give_the_same_matrix_whatever_the_threads_and_the_folder(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = data(tmp_path / "prose.txt", _PROSE)
    (tmp_path / "other").mkdir()

    one = compute(whole, given, tmp_path / "a.gguf")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    two = compute(whole, given, tmp_path / "other" / "b.gguf")

    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "other", "prose.txt"]


def test_two_builds_from_the_same_data_are_the_same_file_and_share_a_matrix(
    tiny: Path, tmp_path: Path
) -> None:
    given = data(tmp_path / "prose.txt", _PROSE)

    one = build(tiny, "Q2_K_S", tmp_path / "a", matrix=given)
    two = build(tiny, "Q2_K_S", tmp_path / "b", matrix=given)
    (matrix,) = (tmp_path / "a").glob("*-imatrix.gguf")
    computed = matrix.stat().st_mtime_ns
    build(tiny, "Q4_K_M", tmp_path / "a", matrix=given)

    assert one.sha256 == two.sha256
    assert one.calibration_sha256 == given.sha256
    assert matrix.stat().st_mtime_ns == computed
    assert len(list((tmp_path / "a").iterdir())) == 3


def test_other_data_or_another_seed_give_another_file(tiny: Path, tmp_path: Path) -> None:
    text = "\n".join(f"{number} bottles of beer on the wall" for number in range(3000))
    first = data(tmp_path / "a.txt", text)
    reseeded = calibration.read((tmp_path / "a.txt",), template=None, sampling=replace(_SAMPLING, seed=1))

    shas = {
        build(tiny, "Q4_K_M", tmp_path / "out", matrix=given).sha256
        for given in (first, reseeded, data(tmp_path / "b.txt", _PROSE), None)
    }

    assert len(shas) == 4


def test_a_backslash_and_a_letter_reach_the_model_as_two_characters(whole: Path, tmp_path: Path) -> None:
    escaped = data(tmp_path / "a.txt", 'print("a\\nb")\n' * 400)
    broken = data(tmp_path / "b.txt", 'print("a\nb")\n' * 400)

    one, other = compute(whole, escaped, tmp_path / "a.gguf"), compute(whole, broken, tmp_path / "b.gguf")

    assert one.read_bytes() != other.read_bytes()


class Told:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.done: list[int] = []

    def step(self, text: str) -> None:
        self.steps.append(text)

    @contextmanager
    def bar(self, text: str, total: int | None, *, rate: bool = False) -> Iterator[Callable[[int], None]]:
        yield self.done.append


def test_every_chunk_is_counted_and_too_few_are_said(whole: Path, tmp_path: Path) -> None:
    text = " ".join(str(number) for number in range(200))
    told = Told()

    imatrix.compute(
        whole, data(tmp_path / "a.txt", text), tmp_path / "m.gguf", toolchain=toolchain.find(), progress=told
    )

    (warning,) = told.steps
    given = int(re.findall(r"\d+", warning)[0])
    assert warning.endswith(f"give {given} tokens, and 1024 were asked for")
    assert sum(told.done) == given / 128 and max(told.done) == 1


def test_markers_in_the_data_are_one_token_each(whole: Path, tmp_path: Path) -> None:
    """360 tokens and a line end each 36 are two chunks; spelled out they would be eight and more."""
    marker = chat.gguf_tokens(whole)["eos_token"]
    told = Told()

    given = data(tmp_path / "a.txt", (marker * 36 + "\n") * 10)
    imatrix.compute(whole, given, tmp_path / "m.gguf", toolchain=toolchain.find(), progress=told)

    assert sum(told.done) == 2


def test_data_of_less_than_two_chunks_are_refused_with_figures(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"are 12 bytes, at most as many tokens; an importance matrix needs 256"
    ):
        compute(whole, data(tmp_path / "a.txt", "Well, Prince"), tmp_path / "m.gguf")

    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


_INTERRUPTED = """
import sys
from pathlib import Path
from edgepack import modelspec, toolchain
from edgepack.artifact import Checkpoint
from edgepack.builders import gguf
from edgepack.progress import Silent
path, out = Path(sys.argv[1]), Path(sys.argv[2])
checkpoint = Checkpoint(path=path, source="x", revision="sha256:test", license="none")
gguf.build(checkpoint, modelspec.read(path), "Q4_K_M", out, toolchain=toolchain.find(), progress=Silent())
"""


def test_ctrl_c_leaves_nothing_half_written_and_a_rerun_resumes(tmp_path: Path) -> None:
    path, out = tmp_path / "larger", tmp_path / "out"
    random_model.write({**random_model.SHAPES["tiny"], "num_hidden_layers": 256}, path, seed=1)
    root = str(Path(__file__).parents[2])
    started = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED, path, out],
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("*-Q4_K_M.gguf.part*")) and not list(out.glob(".*-Q4_K_M.gguf.part*")):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)

    workers = psutil.Process(started.pid).children(recursive=True)

    started.send_signal(signal.SIGINT)
    started.wait(timeout=30)
    _, left_over = psutil.wait_procs(workers, timeout=1)

    assert len(workers) == 1
    assert not [worker for worker in left_over if worker.status() != psutil.STATUS_ZOMBIE]

    left = sorted(file.name.split("-", 1)[1] for file in out.iterdir())
    assert left == ["BF16.gguf"]
    converted = next(out.iterdir()).stat().st_mtime_ns
    assert build(path, "Q4_K_M", out).path.is_file()
    assert converted < time.time_ns()
    assert [file.name.split("-", 1)[1] for file in out.iterdir()] == ["Q4_K_M.gguf"]


_INTERRUPTED_MATRIX = """
import sys
from pathlib import Path
from edgepack import calibration, modelspec, toolchain
from edgepack.artifact import Checkpoint
from edgepack.builders import gguf
from edgepack.calibration import Sampling
from edgepack.progress import Silent
path, text, out = map(Path, sys.argv[1:])
checkpoint = Checkpoint(path=path, source="x", revision="sha256:test", license="none")
data = calibration.read((text,), template=None, sampling=Sampling(windows=24, length=128))
gguf.build(
    checkpoint, modelspec.read(path), "IQ2_XS", out, imatrix=data, toolchain=toolchain.find(), progress=Silent()
)
"""


def test_ctrl_c_while_the_matrix_is_computed_leaves_only_the_converted_model(
    tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = data(tmp_path / "prose.txt", _PROSE * 4)
    started = subprocess.Popen(
        [sys.executable, "-c", _INTERRUPTED_MATRIX, tiny, tmp_path / "prose.txt", out],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(out.glob(".*-imatrix.gguf.part*")):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(started.pid).children(recursive=True)

    started.send_signal(signal.SIGINT)
    started.wait(timeout=30)
    _, left_over = psutil.wait_procs(workers, timeout=5)

    assert [worker.name() for worker in left_over if worker.status() != psutil.STATUS_ZOMBIE] == []
    assert [file.name.split("-", 1)[1] for file in out.iterdir()] == ["BF16.gguf"]
    assert build(tiny, "IQ2_XS", out, matrix=given).path.is_file()
    assert sorted(file.name.split("-", 1)[1] for file in out.iterdir()) == ["IQ2_XS.gguf", "imatrix.gguf"]
