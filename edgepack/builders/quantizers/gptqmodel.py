"""GPTQ and AWQ checkpoints through gptqmodel, layer by layer, on a CPU or a GPU.

AutoGPTQ's and autoawq's formats, which transformers, vLLM and gptqmodel read; both libraries are archived and cannot
quantize here (the one wants CUDA, the other writes broken weights on a CPU).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepack import layouts
from edgepack.builders.quantizers import Job, float_type, read_windows, report

if TYPE_CHECKING:
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig

FAMILIES: tuple[layouts.Family, ...] = ("gptq", "awq")
PACKAGES = ("gptqmodel", "optimum", "torch", "transformers")
EXTRA = "quant"
ENVIRONMENT = {
    # On two cores the library's pool has one worker and asks itself for two (7.6.0).
    "GPTQMODEL_CPU_WORKERS": "2",
    "GPTQMODEL_DISABLE_GIL_WARNING": "1",
}


def calibrates(scheme: layouts.Scheme) -> bool:
    return True


def quantize(job: Job) -> None:
    """Writes the checkpoint of ``job.scheme`` into ``job.out``.

    The library reads one layer at a time from the source and puts what is done on the disk, so that memory holds one
    layer, its Hessians, the calibration's activations and the embeddings.
    """
    import torch
    from gptqmodel import BACKEND, GPTQModel

    scheme = layouts.parse(job.scheme)
    offloaded = job.out / ".offloaded"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = _config(scheme, device, offloaded)
    torch.manual_seed(job.seed)
    model: Any = GPTQModel.load(str(job.source), config, dtype=getattr(torch, float_type(job.source)))
    layers = model.model.config.num_hidden_layers
    model.layer_callback = lambda layer_idx, submodule_finalized: report(layer_idx + 1, layers)
    windows = read_windows(job)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    backend = BACKEND.AWQ_TORCH if scheme.family == "awq" and device == "cpu" else BACKEND.AUTO
    model.quantize(rows, batch_size=1, calibration_sort=None, backend=backend)
    model.save(str(job.out))
    _tidy(job.out)


def _config(scheme: layouts.Scheme, device: str, offloaded: Path) -> GPTQConfig | AWQConfig:
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig

    common: dict[str, Any] = {
        "bits": scheme.bits,
        "group_size": scheme.group or -1,
        "device": device,
        "offload_to_disk": True,
        "offload_to_disk_path": str(offloaded),
    }
    if scheme.family == "awq":
        return AWQConfig(**common, sym=False)
    return GPTQConfig(**common, sym=True, desc_act=scheme.act_order, act_group_aware=not scheme.act_order)


_NOT_PORTABLE = ("offload_to_disk", "offload_to_disk_path")
"""Where the library put things while it worked."""


def _tidy(folder: Path) -> None:
    """Leaves what readers need, the same bytes for the same job: no timings, no paths of this machine."""
    import shutil

    shutil.rmtree(folder / ".offloaded", ignore_errors=True)
    (folder / "quant_log.csv").unlink()
    for name in ("config.json", "quantize_config.json"):
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        meta = values.get("quantization_config", values)["meta"]
        for key in _NOT_PORTABLE:
            meta.pop(key, None)
        (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
