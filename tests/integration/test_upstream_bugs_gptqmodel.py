"""Bugs of the libraries that edgepack works around: each test fails when its bug is gone, and with it the guard can go.

One section a library. The versions are those that pyproject.toml allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from edgepack.builders.quantizers import Job, gptqmodel, read_windows
from tests import quantizers_reference as reference
from tests.integration.test_awq import awq_processor, best_scale, problem

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("own_directory")]

# -- gptqmodel --------------------------------------------------------------------------------------------


def test_gptqmodel_asks_its_one_worker_for_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard: gptqmodel.ENVIRONMENT; on two cores the library's own choice is one worker."""
    import gptqmodel as library

    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "1")

    with pytest.raises(ValueError, match="requests 2 workers"):
        library._build_device_thread_pool()


def test_gptqmodel_does_not_choose_the_back_end_of_awq_that_runs_here(
    sources: Mapping[str, Path], job: Callable[[str, str], Job]
) -> None:
    """Guard: BACKEND.AWQ_TORCH where there is no CUDA."""
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import AWQConfig

    assert not torch.cuda.is_available(), "this test is about machines without a GPU"
    model = GPTQModel.load(
        str(sources["qwen"]), AWQConfig(bits=4, group_size=64, device="cpu"), dtype=torch.bfloat16
    )
    rows = [{"input_ids": row.tolist()} for row in read_windows(job("qwen", "awq-int4-g64"))[:2]]

    with pytest.raises(Exception, match="CUDA is not available"):
        model.quantize(rows)


def test_gptqmodel_spoils_float32_weights_while_it_looks_for_awq_scales() -> None:
    """What it takes for a copy is the weight itself where nothing is converted (autoawq's bug, too), so that every
    ratio is tried on what the last one left. Guard: models are loaded in 16 bits (float_type)."""
    weight, inputs = problem()

    in_32, in_64 = (
        best_scale(awq_processor(group_size=64), weight.to(dtype), inputs.to(dtype)).float()
        for dtype in (torch.float32, torch.float64)
    )

    assert torch.allclose(in_64, reference.awq_scales([weight], inputs, 4, 64), rtol=1e-4)
    assert not torch.allclose(in_32, in_64, rtol=0.1)


def test_gptqmodel_clips_awq_by_64_rows() -> None:
    """Guard: layouts refuses other shapes before any work."""
    weight, inputs = problem()

    with pytest.raises(AssertionError):
        awq_processor(group_size=64)._compute_best_clip(weight, inputs)


def test_gptqmodel_orders_columns_inside_groups_only_where_there_are_groups() -> None:
    """Guard: act_group_aware is off for whole rows."""
    from gptqmodel.quantization.config import GPTQConfig
    from gptqmodel.quantization.gptq import GPTQ

    config = GPTQConfig(bits=4, group_size=-1, act_group_aware=True, device="cpu", offload_to_disk=False)

    with pytest.raises(ValueError, match="requires `group_size > 0`"):
        GPTQ(torch.nn.Linear(64, 64), config).quantize()


def test_gptqmodel_goes_on_with_two_architectures_only() -> None:
    """Guard: gptqmodel._RESUMABLE; the others start again."""
    from gptqmodel.looper.gptq_checkpoint import validate_checkpoint_support
    from gptqmodel.quantization.config import GPTQConfig

    def resumes(model_type: str) -> bool:
        config = SimpleNamespace(model_type=model_type)
        model = SimpleNamespace(
            quantize_config=GPTQConfig(device="cpu", offload_to_disk=True),
            model=SimpleNamespace(config=config),
        )
        try:
            validate_checkpoint_support(model)
        except NotImplementedError:
            return False
        return True

    every = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "phi3", "granite", "olmo2")
    assert tuple(name for name in every if resumes(name)) == gptqmodel._RESUMABLE
