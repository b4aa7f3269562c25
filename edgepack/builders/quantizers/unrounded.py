"""A checkpoint in bfloat16 as transformers writes it: for runtimes that read no GGUF, the model without any loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgepack import layouts
from edgepack.builders.child import report
from edgepack.builders.quantizers import Job, copy_tokenizer

FAMILIES: tuple[layouts.Family, ...] = ("bf16",)
PACKAGES = ("torch", "transformers")
EXTRA = "torch"
ENVIRONMENT: Mapping[str, str] = {"CUDA_VISIBLE_DEVICES": ""}


def calibrates(scheme: layouts.Scheme) -> bool:
    return False


def quantize(job: Job) -> None:
    """Writes every tensor in bfloat16, whatever the source has; the plan counts with two bytes each."""
    import torch
    from transformers import AutoModelForCausalLM

    report(0, 2)
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.source, dtype=torch.bfloat16, local_files_only=True, use_safetensors=True
    )
    report(1, 2)
    model.save_pretrained(job.out)
    copy_tokenizer(job)
    report(2, 2)
