"""AWQ artifacts: the paper's scales, the predicted bytes, readable by others, and of use where channels stand out."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepack import layouts, modelspec, schemes
from edgepack.builders import quantizers, safetensors
from edgepack.builders.quantizers import Job, gptqmodel
from tests import checkpoints
from tests import quantizers_reference as reference
from tests.integration.conftest import build

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import plant_outliers

os.environ.update(gptqmodel.ENVIRONMENT)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_directory")]


def awq_processor(**parameters: object) -> Any:
    """The library's AWQ without a model around it."""
    from gptqmodel.looper.awq_processor import AWQProcessor
    from gptqmodel.quantization.config import AWQConfig

    processor = AWQProcessor.__new__(AWQProcessor)
    processor.qcfg = AWQConfig(
        bits=4,
        sym=False,
        scale_search_chunked_activations=False,
        device="cpu",
        offload_to_disk=False,
        **parameters,
    )
    processor.duo_scaling, processor.max_chunk_memory = True, 1 << 30
    processor._scale_context = threading.local()
    processor._module_forward = lambda inputs, module, _: module(inputs)
    return processor


def best_scale(processor: Any, weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """What the library multiplies the columns of one layer by; in the type of its arguments."""
    from gptqmodel.looper.awq_processor import _compute_awq_weight_mean

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    sizes = _compute_awq_weight_mean([layer], processor.qcfg.group_size)
    with torch.inference_mode():
        scale, _ = processor._compute_best_scale(
            inputs, sizes, inputs.abs().mean(0), layer, [layer], layer(inputs), {}
        )
    result: torch.Tensor = scale
    return result


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [96, 128] and inputs [256, 128] of which four columns are 64 times as large."""
    draw = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(256, 128, generator=draw), torch.randn(96, 128, generator=draw) / 16
    inputs[:, :4] *= 64
    return weight, inputs


@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_library_finds_the_papers_scales_and_codes(group: int) -> None:
    """In float64, in which the library does not spoil the weights that it tries scales on (test_upstream_bugs.py)."""
    weight, inputs = problem()
    processor = awq_processor(group_size=group)

    theirs = best_scale(processor, weight.double(), inputs.double())

    ours = reference.awq_scales([weight], inputs, 4, group)
    assert torch.allclose(theirs.float(), ours, rtol=1e-4)
    rounded, scales, zeros = processor.pseudo_quantize_tensor(weight * ours)
    nearest = reference.rtn(weight * ours, 4, group, symmetric=False)
    assert torch.equal(scales, nearest.scales)
    assert torch.equal(zeros.long(), nearest.zeros)
    assert torch.equal(rounded, nearest.weight())


@pytest.mark.parametrize("scheme", ["awq-int4-g32", "awq-int4-g64", "awq-int4-g128", "awq-int4-gall"])
def test_every_tensor_is_the_predicted_one(
    job: Callable[[str, str], Job], sources: Mapping[str, Path], tmp_path: Path, scheme: str
) -> None:
    spec = modelspec.read(sources["qwen"])

    gptqmodel.quantize(replace(job("qwen", scheme), out=tmp_path))

    made = safetensors.checkpoint(tmp_path)
    quantizers.verify(tmp_path, safetensors.checkpoint(sources["qwen"]), spec, scheme)
    assert sum(t.bytes for t in made.values()) == schemes.weights_bytes(spec, scheme, imatrix=False)
    header = (tmp_path / "model.safetensors").stat().st_size - sum(t.bytes for t in made.values())
    assert header <= layouts.container_bytes(spec, scheme)


def test_two_builds_give_the_same_bytes(job: Callable[[str, str], Job], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        gptqmodel.quantize(replace(job("qwen", "awq-int4-g64"), out=tmp_path / name))

    assert quantizers.folder_sha256(tmp_path / "one") == quantizers.folder_sha256(tmp_path / "two")


def test_an_artifact_computes_what_our_reference_unpacks_and_more_of_it_than_rounding_kept(
    job: Callable[[str, str], Job], sources: Mapping[str, Path], tmp_path: Path
) -> None:
    """The same function with four channels of every norm 64 times as large (scripts/plant_outliers.py).

    Ours is computed in float32, transformers' in the artifact's float16.
    """
    from transformers import AutoModelForCausalLM

    source = sources["one layer"]
    plant_outliers.plant(source, tmp_path / "planted")
    tokens = checkpoints.heldout(4, 128)
    whole = {name: tensor.float() for name, tensor in reference.tensors(source).items()}
    planted = {name: tensor.float() for name, tensor in reference.tensors(tmp_path / "planted").items()}
    rounded = {
        name: reference.rtn(t, 4, 128, symmetric=False).weight() if name.endswith("_proj.weight") else t
        for name, t in planted.items()
    }

    made = build(
        replace(job("one layer", "awq-int4-g128"), source=tmp_path / "planted"), tmp_path / "artifacts"
    )

    plain, unchanged, nearest, awq = (
        checkpoints.plain_logits(source, weights, tokens)
        for weights in (whole, planted, rounded, reference.dequantized(made.path))
    )
    model = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float16, device_map="cpu").eval()
    with torch.no_grad():
        theirs = model(tokens).logits.float()
    assert checkpoints.divergence(plain, unchanged) < 1e-6
    assert checkpoints.divergence(plain, awq) < 0.7 * checkpoints.divergence(plain, nearest)
    assert (theirs - awq).abs().max() < 0.15
    assert checkpoints.divergence(awq, theirs) < 2e-5
