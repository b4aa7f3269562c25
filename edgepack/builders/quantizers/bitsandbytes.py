"""LLM.int8 and NF4 checkpoints as bitsandbytes writes them, for transformers.

Nothing is multiplied before the weights are saved: on CPUs with AVX512-BF16, bitsandbytes 0.50.2 repacks NF4 weights
in place at their first use and does not undo it when saving, so that what is saved afterwards is broken. An artifact is
judged only after a fresh process has loaded it.
"""

from __future__ import annotations

from typing import Any

from edgepack import layouts
from edgepack.builders.child import report
from edgepack.builders.quantizers import Job, copy_tokenizer

FAMILIES: tuple[layouts.Family, ...] = ("bnb",)
PACKAGES = ("bitsandbytes", "torch", "transformers")
EXTRA = "quant"
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": ""}
"""Rounding takes a second or two on a CPU, and a GPU's could differ in the last bit."""

THRESHOLD = 6.0
"""Activations larger than this are multiplied in 16 bits (arXiv 2208.07339, section 3.2)."""


def calibrates(scheme: layouts.Scheme) -> bool:
    return False


def quantize(job: Job) -> None:
    """Writes the checkpoint into ``job.out``: matrices of the blocks quantized, all else in bfloat16.

    bfloat16 whatever the source has: NF4's records name the type, and the planner counts their bytes. At its peak the
    process takes 2.2 times the bytes of the 16-bit checkpoint for NF4 and 1.7 for int8, beside the pages of its file
    (from models of 27 and 123 million parameters): 31 and 24 GiB for 7 billion parameters.
    """
    import torch
    from transformers import AutoModelForCausalLM

    report(0, 2)
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.source,
        dtype=torch.bfloat16,
        quantization_config=_config(layouts.parse(job.scheme)),
        device_map={"": "cpu"},
        local_files_only=True,
    )
    report(1, 2)
    model.save_pretrained(job.out)
    copy_tokenizer(job)
    report(2, 2)


def _config(scheme: layouts.Scheme) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if scheme.bits == 8:
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=THRESHOLD, llm_int8_skip_modules=["lm_head"]
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=False,
        llm_int8_skip_modules=["lm_head"],
    )
