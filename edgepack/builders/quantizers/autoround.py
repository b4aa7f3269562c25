"""AutoRound: rounding learned by gradients, block by block, which keeps more than GPTQ at 2 and 3 bits.

Of the library's layouts this writes AutoGPTQ's: transformers, vLLM and gptqmodel read it without auto-round, which its
own layout needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgepack import layouts
from edgepack.builders.child import report
from edgepack.builders.quantizers import Job, float_type, read_windows
from edgepack.builders.quantizers.gptqmodel import tidy

if TYPE_CHECKING:
    from collections.abc import Iterator

FAMILIES: tuple[layouts.Family, ...] = ("autoround",)
PACKAGES = ("auto-round", "torch", "transformers")
EXTRA = "quant"
ENVIRONMENT: dict[str, str] = {}

ITERATIONS = 200
"""Steps of signed gradient descent for each block (arXiv 2309.05516, section 4)."""
_BATCH = 8


def calibrates(scheme: layouts.Scheme) -> bool:
    return True


def quantize(job: Job) -> None:
    """Writes the checkpoint of ``job.scheme`` into ``job.out``.

    The whole model is in memory in 16 bits, and one block with its activations and gradients in 32.
    """
    import torch
    from auto_round import AutoRound
    from auto_round.compressors import orchestrator
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scheme = layouts.parse(job.scheme)
    windows = read_windows(job)
    torch.manual_seed(job.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, float_type(job.source))
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=dtype)
    orchestrator.tqdm = _Reported
    rounder: Any = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.source),
        bits=scheme.bits,
        group_size=scheme.group or -1,
        sym=True,
        iters=ITERATIONS,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=min(_BATCH, len(windows)),
        dataset=[torch.from_numpy(row).long()[None] for row in windows],
        seed=job.seed,
        device_map=device,
        enable_torch_compile=False,
        enable_deterministic_algorithms=True,
        trust_remote_code=False,
    )
    rounder.quantize_and_save(str(job.out), format="auto_gptq")
    (written,) = job.out.iterdir()  # the library names a folder of its own
    for path in written.iterdir():
        path.rename(job.out / path.name)
    written.rmdir()
    (job.out / "quantization_config.json").rename(job.out / "quantize_config.json")
    tidy(job.out)


class _Reported:
    """The library's bar over the blocks, as lines for the parent."""

    def __init__(self, blocks: range) -> None:
        self._blocks, self._done = blocks, 0

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def update(self, count: int) -> None:
        self._done += count
        report(self._done, len(self._blocks))

    def set_description(self, text: str) -> None:
        return

    def close(self) -> None:
        return
