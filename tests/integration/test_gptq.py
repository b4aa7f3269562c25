"""GPTQ artifacts: the paper's codes, the predicted bytes, readable by others, and the same when made twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from edgepack import layouts, modelspec, schemes
from edgepack.artifact import Artifact
from edgepack.builders import quantizers, safetensors
from edgepack.builders.quantizers import Job, gptqmodel
from tests import checkpoints
from tests import quantizers_reference as reference
from tests.integration.conftest import build

os.environ.update(gptqmodel.ENVIRONMENT)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_directory")]

ARTICLE = "gptq-int4-g128"
"""The article's parameters: 4 bits, groups of 128, desc_act off."""


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_to_nearest_is_the_librarys(bits: int, symmetric: bool) -> None:
    from gptqmodel.quantization.config import GPTQConfig
    from gptqmodel.quantization.quantizer import Quantizer

    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(bits))
    quantizer = Quantizer(GPTQConfig(bits=bits, sym=symmetric, device="cpu", offload_to_disk=False))
    quantizer.configure(perchannel=True)

    quantizer.find_params(weight, weight=True)

    ours = reference.rtn(weight, bits, None, symmetric=symmetric)
    assert torch.equal(quantizer.scale, ours.scales)
    assert torch.equal(quantizer.zero.long(), ours.zeros)
    assert torch.equal(quantizer.quantize(weight), ours.weight())


@pytest.mark.parametrize("order", ["natural", "act order", "group-aware"])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(2, 32, False), (3, 128, True), (4, 128, True), (8, 64, False)]
)
def test_the_library_rounds_to_the_papers_codes(order: str, bits: int, group: int, symmetric: bool) -> None:
    """All codes are equal where this was written; another processor's sums may tip one in a thousand over."""
    draw = torch.Generator().manual_seed(bits)
    mixed = torch.eye(256) + torch.randn(256, 256, generator=draw) / 48
    weight, inputs = torch.randn(96, 256, generator=draw), torch.randn(1024, 256, generator=draw) @ mixed
    hessian = reference.hessian(inputs)
    visited = {
        "natural": None,
        "act order": reference.act_order(hessian),
        "group-aware": reference.group_aware_order(hessian, group),
    }[order]

    rounded, scales, zeros, groups = _by_the_library(
        weight, inputs, bits=bits, group_size=group, sym=symmetric,
        desc_act=order == "act order", act_group_aware=order == "group-aware",
    )  # fmt: skip

    ours = reference.gptq(weight, hessian, bits, group, symmetric=symmetric, order=visited)
    codes = torch.round(rounded / scales[:, groups] + zeros[:, groups]).long()
    assert torch.allclose(ours.weight(), rounded, atol=1e-5) or (codes == ours.codes).float().mean() > 0.999
    assert torch.allclose(scales[:, groups], ours.scales[:, ours.groups], rtol=1e-3)


def _by_the_library(
    weight: torch.Tensor, inputs: torch.Tensor, **parameters: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounded weights, scales, zeros and each column's group."""
    from gptqmodel.quantization.config import GPTQConfig
    from gptqmodel.quantization.gptq import GPTQ

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    task = GPTQ(layer, GPTQConfig(device="cpu", fallback=None, offload_to_disk=False, **parameters))
    task.fallback, task.expected_nsamples = None, len(inputs)
    task.quantizer.configure(perchannel=True)
    task.add_batch(inputs[None], None, batch_index=0)
    rounded, scales, zeros, groups, *_ = task.quantize()
    return rounded, scales, zeros, groups.long()


@pytest.mark.parametrize(
    ("source", "scheme"),
    [
        ("one layer", "gptq-int2-g128"),
        ("one layer", "gptq-int3-g128-actorder"),
        ("qwen", "gptq-int2-g32-asym"),
        ("qwen", "gptq-int3-g64"),
        ("qwen", "gptq-int4-g128"),
        ("qwen", "gptq-int4-g64-actorder"),
        ("qwen", "gptq-int8-gall"),
        ("qwen", "gptq-int3-gall-asym-actorder"),
        ("qwen", "gptq-int8-g32"),
    ],
)
def test_every_tensor_is_the_predicted_one(
    job: Callable[[str, str], Job], sources: Mapping[str, Path], tmp_path: Path, source: str, scheme: str
) -> None:
    spec = modelspec.read(sources[source])

    gptqmodel.quantize(replace(job(source, scheme), out=tmp_path))

    made = safetensors.checkpoint(tmp_path)
    quantizers.verify(tmp_path, safetensors.checkpoint(sources[source]), spec, scheme)
    assert sum(t.bytes for t in made.values()) == schemes.weights_bytes(spec, scheme, imatrix=False)
    header = (tmp_path / "model.safetensors").stat().st_size - sum(t.bytes for t in made.values())
    assert header <= layouts.container_bytes(spec, scheme)
    assert {t.dtype for t in made.values()} == {"I32", "F16", "BF16" if source == "qwen" else "F16"}


def test_an_artifact_is_a_folder_that_others_know(artifact: Callable[[str, str], Artifact]) -> None:
    made = artifact("two layers", ARTICLE)

    assert sorted(path.name for path in quantizers.files(made.path)) == [
        "config.json", "generation_config.json", "model.safetensors", "quantize_config.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert made.calibration_sha256 == "test"
    assert "gptqmodel 7.6" in made.tool
    assert str(Path.home()) not in (made.path / "config.json").read_text()


@pytest.mark.parametrize("scheme", [ARTICLE, "gptq-int4-g128-asym-actorder"])
def test_transformers_computes_what_our_reference_unpacks(
    artifact: Callable[[str, str], Artifact], sources: Mapping[str, Path], scheme: str
) -> None:
    """In 16 and in 32 bits: logits of ten agree to hundredths, and a wrong code, scale or zero is off by ones."""
    from transformers import AutoModelForCausalLM

    made = artifact("two layers", scheme)
    tokens = checkpoints.heldout(2, 128)

    model = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float16, device_map="cpu").eval()
    with torch.no_grad():
        theirs = model(tokens).logits.float()

    ours = checkpoints.plain_logits(sources["two layers"], reference.dequantized(made.path), tokens)
    assert (theirs - ours).abs().max() < 0.15
    assert checkpoints.divergence(ours, theirs) < 1e-5


def test_gptq_keeps_more_than_rounding(
    artifact: Callable[[str, str], Artifact], sources: Mapping[str, Path]
) -> None:
    source = sources["two layers"]
    tokens = checkpoints.heldout(8, 128)
    whole = {name: tensor.float() for name, tensor in reference.tensors(source).items()}
    rounded = dict(whole)
    for name, tensor in whole.items():
        if name.endswith("_proj.weight"):
            rounded[name] = reference.rtn(tensor, 4, 128).weight()

    gptq = reference.dequantized(artifact("two layers", ARTICLE).path)

    plain, ours, nearest = (checkpoints.plain_logits(source, w, tokens) for w in (whole, gptq, rounded))
    assert checkpoints.divergence(plain, ours) < 0.95 * checkpoints.divergence(plain, nearest)


def test_a_killed_build_leaves_nothing_running_and_goes_on_to_the_same_bytes(
    artifact: Callable[[str, str], Artifact], job: Callable[[str, str], Job], tmp_path: Path
) -> None:
    """Two builds of one job, of which the second is killed after its first layer."""
    given = job("two layers", ARTICLE)
    first = artifact("two layers", ARTICLE)
    words = [sys.executable, "-m", "tests.integration.build_one", quantizers.to_json(given), str(tmp_path)]
    killed = subprocess.Popen(words, cwd=Path(__file__).parents[2])
    while not list(tmp_path.glob(".*.scratch/resume/CURRENT")):
        assert killed.poll() is None, "it ended before a layer was done"
        time.sleep(0.02)
    workers = psutil.Process(killed.pid).children(recursive=True)

    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()

    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert gone
    assert not alive
    assert all(path.name.startswith(".") for path in tmp_path.iterdir()), "half an artifact is visible"
    assert build(given, tmp_path).sha256 == first.sha256
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]
