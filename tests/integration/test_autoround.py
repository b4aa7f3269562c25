"""AutoRound artifacts: GPTQ's layout, the predicted bytes, readable by gptqmodel, and the same when made twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgepack import layouts, modelspec, schemes
from edgepack.builders import quantizers, safetensors
from edgepack.builders.quantizers import Job, autoround, gptqmodel
from tests import checkpoints
from tests import quantizers_reference as reference

os.environ.update(gptqmodel.ENVIRONMENT)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_directory")]


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked here does not depend on how long rounding is learned."""
    monkeypatch.setattr(autoround, "ITERATIONS", 4)


@pytest.mark.parametrize(
    "scheme", ["autoround-int2-g32", "autoround-int3-g128", "autoround-int4-g64", "autoround-int8-gall"]
)
def test_every_tensor_is_the_predicted_one(
    job: Callable[[str, str], Job], sources: Mapping[str, Path], tmp_path: Path, scheme: str
) -> None:
    spec = modelspec.read(sources["qwen"])

    autoround.quantize(replace(job("qwen", scheme), out=tmp_path))

    made = safetensors.checkpoint(tmp_path)
    quantizers.verify(tmp_path, safetensors.checkpoint(sources["qwen"]), spec, scheme)
    assert sum(t.bytes for t in made.values()) == schemes.weights_bytes(spec, scheme, imatrix=False)
    header = (tmp_path / "model.safetensors").stat().st_size - sum(t.bytes for t in made.values())
    assert header <= layouts.container_bytes(spec, scheme)
    for matrix in reference.matrices(tmp_path).values():
        assert (matrix.zeros == 2 ** (layouts.parse(scheme).bits - 1)).all(), (
            "symmetric, in GPTQ's first format"
        )


def test_two_builds_give_the_same_bytes_and_gptqmodel_reads_them(
    job: Callable[[str, str], Job], sources: Mapping[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folders = (tmp_path / "one", tmp_path / "two")
    for folder in folders:
        folder.mkdir()
        autoround.quantize(replace(job("qwen", "autoround-int3-g128"), out=folder))

    assert quantizers.folder_sha256(folders[0]) == quantizers.folder_sha256(folders[1])
    tokens = checkpoints.heldout(2, 128) % 768
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float16, device_map="cpu").eval()
    with torch.no_grad():
        theirs = model(tokens).logits.float()
    ours = checkpoints.plain_logits(sources["qwen"], reference.dequantized(folders[0]), tokens)
    assert (theirs - ours).abs().max() < 0.15
    assert checkpoints.divergence(ours, theirs) < 1e-5
