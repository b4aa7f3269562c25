"""Bugs of the libraries that edgepack works around: each test fails when its bug is gone, and with it the guard can go.

One section a library. The versions are those that pyproject.toml allows.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from edgepack.builders import safetensors
from edgepack.builders.quantizers import Job, gptqmodel, read_windows
from tests import quantized
from tests import quantizers_reference as reference
from tests.integration.test_awq import awq_processor, best_scale, problem
from tests.quantized import DEMO

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


# -- bitsandbytes 0.50.2 -------------------------------------------------------------------------------------


def test_nf4_weights_saved_after_a_forward_are_broken_where_the_cpu_has_bf16(tmp_path: Path) -> None:
    """builders/quantizers/bitsandbytes.py saves before anything is multiplied; what it made is right everywhere."""
    from bitsandbytes.functional import has_avx512bf16

    ours, later = tmp_path / "ours", tmp_path / "later"
    quantized.quantize_here("bnb-nf4", ours, source=DEMO)
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16, quantization_config=how)
    ids = torch.from_numpy(quantized.heldout()[None, :96].astype(np.int64))
    with torch.inference_mode():
        said = model(ids).logits[0].float().numpy()
    model.save_pretrained(later)

    same = all(torch.equal(one, other) for one, other in zip(tensors(ours), tensors(later), strict=True))

    assert quantized.divergence(quantized.logits(DEMO, 0, 96), said) < 0.03
    assert same == (not has_avx512bf16()), "fixed upstream: the order of saving no longer matters"


def tensors(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return [tensor for _, tensor in sorted(load_file(folder / "model.safetensors").items())]


# -- llmcompressor 0.14.0.1 ----------------------------------------------------------------------------------


def test_calibration_windows_are_shuffled_without_a_seed_unless_told() -> None:
    """builders/quantizers/llmcompressor.py passes shuffle_calibration_samples=False."""
    from datasets import Dataset
    from llmcompressor.args import DatasetArguments
    from llmcompressor.datasets.utils import _make_sampler

    rows = Dataset.from_dict({"input_ids": [[1, 2]] * 64})

    def order(**options: bool) -> list[int]:
        return list(_make_sampler(DatasetArguments(num_calibration_samples=64, **options), rows))

    assert order() != order(), "seeded upstream: shuffle_calibration_samples=False may go"
    assert order(shuffle_calibration_samples=False) == order(shuffle_calibration_samples=False)


def test_four_bits_with_eight_bit_activations_are_stored_a_byte_each(tmp_path: Path) -> None:
    """layouts.py refuses ct-w4a8 for it."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model: Any = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float16)
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="W4A8", ignore=["lm_head"]))
    model.save_pretrained(tmp_path, save_compressed=True)

    stored = safetensors.checkpoint(tmp_path)["model.layers.0.mlp.up_proj.weight"]

    assert (stored.dtype, stored.bytes) == ("I8", 1024 * 256), "packed upstream: offer ct-w4a8-g128"


# -- onnxruntime-genai 0.18.0 --------------------------------------------------------------------------------


def write_graph(source: Path, out: Path, precision: str, *words: str) -> None:
    """onnxruntime-genai's builder, without what edgepack refuses before it."""
    from onnxruntime_genai.models import builder

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        where = (str(source), str(out), precision, "cpu", str(out / "cache"))
        options = builder.parse_extra_options("", *where, list(words))
        builder.create_model("", *where, **options)


@pytest.mark.parametrize(("model_type", "key"), [("gemma3_text", "rope_type"), ("smollm3", "position_ids")])
def test_the_builder_fails_on_architectures_that_it_lists(model_type: str, key: str, tmp_path: Path) -> None:
    """layouts.py refuses them for it (_NO_GRAPH)."""
    source = quantized.random_model(tmp_path / "model", model_type, head_dim=32)

    with pytest.raises(KeyError, match=key):
        write_graph(source, tmp_path / "out", "int8")


def answers(folder: Path, count: int, max_length: int) -> quantized.Floats:
    """Logits of so many tokens of the held-out text, [tokens, vocabulary]."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    options = og.GeneratorParams(model)
    options.set_search_options(max_length=max_length)
    generator = og.Generator(model, options)
    generator.append_tokens(quantized.heldout()[None, :count])
    said: quantized.Floats = generator.get_output("logits")[0]
    return said


@pytest.mark.parametrize(
    ("model_type", "prompt", "max_length", "words"),
    [
        ("gemma2", 20, 63, "capacity .63. must be at least local_window_size .64."),
        ("mistral", 96, 200, "total_sequence_length must equal past_sequence_length"),
    ],
)
def test_caches_of_a_window_only_fail_with_contexts_below_and_prompts_above_it(
    model_type: str, prompt: int, max_length: int, words: str, tmp_path: Path
) -> None:
    """builders/quantizers/onnx_genai.py passes windowed_kv_cache=false, and the planner counts whole caches."""
    source = quantized.random_model(tmp_path / "model", model_type, sliding_window=64)
    write_graph(source, tmp_path / "out", "int8")

    with pytest.raises(RuntimeError, match=words):
        answers(tmp_path / "out", prompt, max_length)


def test_a_window_that_every_layer_has_is_left_out_of_the_graph(tmp_path: Path) -> None:
    """builders/quantizers/onnx_genai.py refuses contexts beyond it."""
    source = quantized.random_model(tmp_path / "model", "mistral", sliding_window=64)
    write_graph(source, tmp_path / "out", "int8", "windowed_kv_cache=false")
    reference = quantized.logits(source, 0, 96)

    said = answers(tmp_path / "out", 96, 200)

    within, beyond = (
        quantized.divergence(reference[part], said[part]) for part in (slice(64), slice(64, None))
    )
    assert beyond > 10 * within, "kept upstream: contexts beyond the window may be offered"


def test_a_graph_in_fp16_on_a_cpu_fails_at_its_second_step(tmp_path: Path) -> None:
    """layouts.py refuses onnx-fp16 on a CPU for it. It reads a prompt, and then not a single token more."""
    import onnxruntime_genai as og

    write_graph(DEMO, tmp_path, "fp16")
    model = og.Model(str(tmp_path))
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens([[1, 2, 3]])
    generator.generate_next_token()

    with pytest.raises(RuntimeError, match="Shape mismatch attempting to re-use buffer"):
        generator.generate_next_token()
