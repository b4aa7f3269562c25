"""GPTQ and AWQ checkpoints through gptqmodel, layer by layer, on a CPU or a GPU.

AutoGPTQ's and autoawq's formats, which transformers, vLLM and gptqmodel read; both libraries are archived and cannot
quantize here (the one wants CUDA, the other writes broken weights on a CPU).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack import layouts, modelspec
from edgepack.builders import safetensors
from edgepack.builders.child import report
from edgepack.builders.quantizers import Job, float_type, read_windows

if TYPE_CHECKING:
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig

FAMILIES: tuple[layouts.Family, ...] = ("gptq", "awq")
PACKAGES = ("gptqmodel", "optimum", "torch", "transformers")
EXTRA = "quant"
ENVIRONMENT = {
    # On two cores the library's pool has one worker and asks itself for two (7.6.0).
    "GPTQMODEL_CPU_WORKERS": str(max(2, (os.cpu_count() or 1) // 2)),
    "GPTQMODEL_DISABLE_GIL_WARNING": "1",
}

_RESUMABLE = ("llama", "qwen3_moe")
"""model_type of those that the library goes on with where it was killed (looper/gptq_checkpoint.py of 7.6.0)."""


def calibrates(scheme: layouts.Scheme) -> bool:
    return True


def quantize(job: Job) -> None:
    """Writes the checkpoint of ``job.scheme`` into ``job.out``; a job that was killed goes on where the library can.

    The library works layer by layer with what is done on the disk. Yet its peak grew with the model: 0.74 GB, 2.4 bytes
    for each weight of the blocks and 9 for each token and column of calibration, on random models of 2 and 6 layers
    of 1024 columns and 4096 and 16384 tokens (GPTQ, anonymous memory, a CPU). For a 7B and 128 windows of 512 that
    comes to 18 GB, with some 4 GB for the widest matrix's Hessian and its inverse. AWQ's search took 15 CPU-seconds for
    a million weights, which is a day for a 7B without a GPU.
    """
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.looper.checkpoint_store import CheckpointConfig

    scheme = layouts.parse(job.scheme)
    done, resume = Path.cwd() / "layers", Path.cwd() / "resume"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    experts = modelspec.read(job.source).experts > 0
    config = _config(scheme, device, done, experts=experts)
    torch.manual_seed(job.seed)
    model: Any = GPTQModel.load(str(job.source), config, dtype=getattr(torch, float_type(job.source)))
    layers = model.model.config.num_hidden_layers
    model.layer_callback = lambda layer_idx, submodule_finalized: report(layer_idx + 1, layers)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in read_windows(job)]
    backend = BACKEND.AWQ_TORCH if scheme.family == "awq" and device == "cpu" else BACKEND.AUTO
    resumable = model.model.config.model_type in _RESUMABLE
    if not resumable:
        shutil.rmtree(done, ignore_errors=True)
    checkpoint = CheckpointConfig(path=resume) if resumable else None
    model.quantize(rows, batch_size=1, calibration_sort=None, backend=backend, checkpoint=checkpoint)
    model.save(str(job.out))
    for folder in (done, resume):
        shutil.rmtree(folder, ignore_errors=True)
    tidy(job.out)


def _config(scheme: layouts.Scheme, device: str, offloaded: Path, *, experts: bool) -> GPTQConfig | AWQConfig:
    from gptqmodel.quantization.config import AWQConfig, Fallback, GPTQConfig

    common: dict[str, Any] = {
        "bits": scheme.bits,
        "group_size": scheme.group or -1,
        "device": device,
        "offload_to_disk": True,
        "offload_to_disk_path": str(offloaded),
    }
    if scheme.family == "awq":
        return AWQConfig(**common, sym=False)
    return GPTQConfig(
        **common,
        sym=not scheme.asymmetric,
        desc_act=scheme.act_order,
        # The columns ordered inside their groups, which costs a reader nothing (arXiv 2505.14638).
        act_group_aware=scheme.group is not None and not scheme.act_order,
        # To round an expert that calibration hardly reached. Elsewhere the library would answer a matrix that it cannot
        # factor by rounding it and all that follow, and say nothing.
        fallback=Fallback() if experts else None,
    )


_NOT_PORTABLE = ("offload_to_disk", "offload_to_disk_path")
"""Where the library put things while it worked."""
_TIMINGS = "quant_log.csv"


def tidy(folder: Path) -> None:
    """Leaves what readers need, the same bytes for the same job: no timings, no paths of this machine."""
    (folder / _TIMINGS).unlink(missing_ok=True)
    safetensors.rewrite(folder)  # a job that was killed and went on has written the tensors in another order
    for name in ("config.json", "quantize_config.json"):
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        meta = values.get("quantization_config", values).get("meta", {})
        for key in _NOT_PORTABLE:
            meta.pop(key, None)
        (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors' writer leaves some to their owner alone
