"""What is refused before a quantizer starts, and what is not believed after it ended."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgepack import layouts, modelspec, quantization
from edgepack.artifact import Checkpoint
from edgepack.builders import quantizers, safetensors
from edgepack.builders.quantizers import Job
from edgepack.errors import BadInput, BuildFailed, MissingTool, Unsupported
from edgepack.progress import Silent

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import rtn

DEMO = Path(__file__).parents[2] / "edgepack" / "models" / "demo"
SPEC = modelspec.read(DEMO)


def _job(windows: Path | None, scheme: str = "gptq-int4-g128") -> Job:
    return Job(
        source=DEMO, out=Path(), scheme=scheme, windows=windows, backend="cpu", context=512, threads=1, seed=0
    )


def _array(path: Path, values: NDArray[np.generic]) -> Path:
    np.save(path, values)
    return path


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((4, 64), np.int32), "256 tokens of calibration, and demo has matrices of 1024 columns"),
        (np.zeros((0, 64), np.int32), r"shape \(0, 64\)"),
        (np.zeros(4096, np.int32), r"shape \(4096,\)"),
        (np.zeros((8, 256), np.float32), "holds float32"),
        (np.zeros((4, 1024), np.int32), "windows of 1024 tokens, and demo was trained on 512"),
        (np.full((8, 256), 2048, np.int32), "token 2048, and demo knows 2048"),
        (np.full((8, 256), -1, np.int32), "token -1"),
    ],
)
def test_calibration_that_cannot_serve_is_refused(
    tmp_path: Path, values: NDArray[np.generic], words: str
) -> None:
    path = _array(tmp_path / "windows.npy", values)

    with pytest.raises(BadInput, match=words):
        quantizers.check_windows(path, SPEC)


def test_calibration_that_is_no_array_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    pickled = tmp_path / "objects.npy"
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    text = tmp_path / "text.npy"
    text.write_text("not an array")

    for path in (pickled, text, tmp_path / "missing.npy"):
        with pytest.raises(BadInput, match=r"is no \.npy of token ids"):
            quantizers.check_windows(path, SPEC)


def test_a_source_without_safetensors_is_refused_before_any_work(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    shutil.copyfile(DEMO / "config.json", source / "config.json")
    windows = _array(tmp_path / "windows.npy", np.zeros((8, 256), np.int32))
    checkpoint = Checkpoint(path=source, source="model", revision="r", license="unknown")

    with pytest.raises(BadInput, match="safetensors"):
        quantizers.build(
            checkpoint, SPEC, _job(windows), tmp_path / "artifacts", calibration="c", progress=Silent()
        )

    assert not (tmp_path / "artifacts").exists()


def test_no_calibration_is_refused_with_the_option(tmp_path: Path) -> None:
    checkpoint = Checkpoint(path=DEMO, source="demo", revision="r", license="unknown")

    with pytest.raises(BadInput, match="needs calibration data") as caught:
        quantizers.build(checkpoint, SPEC, _job(None), tmp_path, calibration=None, progress=Silent())

    assert "--calibration" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("awq-int3-g128", "awq packs 4 bits, not 3"),
        ("gptq-int5-g128", "gptq packs 2, 3, 4, 8 bits, not 5"),
        ("gptq-int4-g48", "no kernel reads groups of 48"),
        ("awq-int4-g128-asym", "AWQ always is"),
        ("autoround-int2-g128-asym", "makes autoround symmetric"),
        ("awq-int4-g128-actorder", "has no act order"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name(scheme: str, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        layouts.parse(scheme)


def test_asymmetric_gptq_is_stored_in_as_many_bytes_as_symmetric() -> None:
    names = ("gptq-int3-g64", "gptq-int3-g64-asym")

    one, other = (layouts.kinds(SPEC, name, backend="cpu") for name in names)

    assert one == other
    assert [layouts.parse(name).asymmetric for name in names] == [False, True]


def test_a_folder_with_every_predicted_tensor_is_believed(rounded: Path) -> None:
    quantizers.verify(rounded, safetensors.checkpoint(DEMO), SPEC, "gptq-int4-g128")


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("gptq-int4-g64", r"\.qzeros has \d+ bytes of I32; predicted are \d+"),
        ("gptq-int8-g128", r"\.qweight has \d+ bytes of I32; predicted are \d+"),
        ("awq-int4-g128", r"g_idx is in the artifact and in no prediction"),
        ("bf16", r"tensors of \d+ bytes, and \d+ were predicted"),
    ],
)
def test_a_folder_of_another_scheme_is_not_believed(rounded: Path, scheme: str, words: str) -> None:
    with pytest.raises(BuildFailed, match=words):
        quantizers.verify(rounded, safetensors.checkpoint(DEMO), SPEC, scheme)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rtn") / "four"
    rtn.write(DEMO, out, bits=4, group=128, symmetric=True)
    return out


def _distribution(folder: Path, name: str) -> None:
    home = folder / f"{name.replace('-', '_')}-9.0.dist-info"
    home.mkdir()
    (home / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n", encoding="utf-8")


ONNX = quantizers.named("onnx-int4")
GENAI = ("onnx", "onnx_ir", "torch", "transformers")


@pytest.mark.parametrize(
    "there", [("onnxruntime-genai", "onnxruntime"), ("onnxruntime-genai-cuda", "onnxruntime-gpu")]
)
def test_onnx_is_built_with_the_wheels_for_a_cpu_or_those_for_cuda(
    there: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in (*GENAI, *there):
        _distribution(tmp_path, name)

    found = quantizers.installed(ONNX)

    assert found.keys() == {*GENAI, *there}


def test_wheels_that_write_the_same_modules_are_refused_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in (*GENAI, "onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime"):
        _distribution(tmp_path, name)

    with pytest.raises(
        MissingTool, match="onnxruntime-genai and onnxruntime-genai-cuda are both installed"
    ) as refused:
        quantizers.installed(ONNX)

    assert refused.value.hint is not None
    assert refused.value.hint.startswith("pip uninstall onnxruntime-genai onnxruntime-genai-cuda")


def test_without_either_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    with pytest.raises(MissingTool, match="onnxruntime-genai is not installed") as refused:
        quantizers.installed(ONNX)

    assert "edgepack[onnx]" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("package", "card", "runs"),
    [
        ("onnxruntime-genai-cuda", True, True),
        ("onnxruntime-genai-cuda", False, False),
        ("onnxruntime-genai", True, False),
    ],
)
def test_a_graph_for_cuda_is_measured_where_there_are_its_wheels_and_a_card(
    package: str, card: bool, runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(quantization, "CARDS", (tmp_path if card else tmp_path / "none",))
    _distribution(tmp_path, package)

    assert quantization.runs_here("onnx-int4", "cuda") == runs
    assert quantization.runs_here("onnx-int4", "cpu")
    assert quantization.runs_here("gptq-int4-g128", "cuda")
