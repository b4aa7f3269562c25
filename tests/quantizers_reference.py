"""RTN, GPTQ and AWQ written from their papers, and the two packed layouts, to hold the libraries' artifacts against.

GPTQ: Frantar et al., arXiv 2210.17323. AWQ: Lin et al., arXiv 2306.00978. Nothing here is shared with edgepack or with
the libraries but torch and the safetensors files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A matrix of integers: weight = scale x (code - zero), the scale and zero that of the column's group."""

    codes: Tensor
    """int64 [rows, columns], from 0 to 2^bits - 1."""
    scales: Tensor
    """float [rows, groups]."""
    zeros: Tensor
    """int64 [rows, groups]."""
    groups: Tensor
    """int64 [columns]: the group of each (g_idx)."""

    def weight(self) -> Tensor:
        """float32 [rows, columns]."""
        return self.scales.float()[:, self.groups] * (self.codes - self.zeros[:, self.groups])


# -- the algorithms ---------------------------------------------------------------------------------------


def grid(weight: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero [rows, 1] of one group of columns [rows, n]: 0 always has a code.

    Symmetric uses the full range, max|w| = (2^bits - 1) / 2 scales, with the zero in the middle.
    """
    top = 2**bits - 1
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = torch.where(low < 0, -high, low)
    flat = (low == 0) & (high == 0)
    low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)
    scale = (high - low) / top
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale)
    return scale, zero


def rtn(weight: Tensor, bits: int, group: int | None, *, symmetric: bool = True) -> Quantized:
    """Every weight to the nearest code; ``group`` None is the whole row."""
    columns = weight.shape[1]
    size = group or columns
    grids = [grid(weight[:, at : at + size], bits, symmetric=symmetric) for at in range(0, columns, size)]
    scales, zeros = (torch.cat(parts, dim=1) for parts in zip(*grids, strict=True))
    groups = torch.arange(columns) // size
    codes = torch.clamp(torch.round(weight / scales[:, groups]) + zeros[:, groups], 0, 2**bits - 1)
    return Quantized(codes=codes.long(), scales=scales, zeros=zeros.long(), groups=groups)


def hessian(inputs: Tensor) -> Tensor:
    """2/n X'X of a layer's inputs [n, columns]: of its squared error by one row of weights (section 3.1)."""
    return 2 / len(inputs) * inputs.T @ inputs


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group: int | None,
    *,
    symmetric: bool = True,
    order: Tensor | None = None,
    damp: float = 0.05,
    block: int = 128,
) -> Quantized:
    """Column by column, the error of each spread over those that follow (algorithm 1, with lazy batches of ``block``).

    ``order`` is a permutation of the columns, in which they are visited and grouped. A group's grid is made from what
    is known before its block, as in the paper's code.
    """
    columns = weight.shape[1]
    order = torch.arange(columns) if order is None else order
    size, top = group or columns, 2**bits - 1
    w, h = weight[:, order].clone(), hessian[order][:, order].clone()
    h.diagonal().add_(damp * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes, scales, zeros = torch.zeros_like(w), [], []
    for at in range(0, columns, block):
        inside, errors = w[:, at : at + block].clone(), torch.zeros_like(w[:, at : at + block])
        for i in range(inside.shape[1]):
            if (at + i) % size == 0:
                scale, zero = grid(w[:, at + i : at + i + size], bits, symmetric=symmetric)
                scales.append(scale)
                zeros.append(zero)
            code = torch.clamp(torch.round(inside[:, i : i + 1] / scale) + zero, 0, top)
            error = (inside[:, i : i + 1] - scale * (code - zero)) / inverse[at + i, at + i]
            inside[:, i:] -= error * inverse[at + i, at + i : at + inside.shape[1]]
            codes[:, at + i : at + i + 1], errors[:, i : i + 1] = code, error
        w[:, at + block :] -= errors @ inverse[at : at + block, at + block :]
    back = torch.argsort(order)
    return Quantized(
        codes=codes[:, back].long(),
        scales=torch.cat(scales, dim=1),
        zeros=torch.cat(zeros, dim=1).long(),
        groups=(torch.arange(columns) // size)[back],
    )


def act_order(hessian: Tensor) -> Tensor:
    """The columns of the largest inputs first (GPTQ's --act-order, desc_act)."""
    return torch.argsort(hessian.diagonal(), descending=True)


def group_aware_order(hessian: Tensor, group: int) -> Tensor:
    """Act order that keeps the groups whole: their columns sorted, and they by their largest (arXiv 2505.14638)."""
    values, within = hessian.diagonal().view(-1, group).sort(dim=1, descending=True)
    first = torch.argsort(values[:, 0], descending=True, stable=True)
    return (within + torch.arange(len(within))[:, None] * group)[first].flatten()


def awq_scales(
    weights: Iterable[Tensor], inputs: Tensor, bits: int, group: int, *, steps: int = 20
) -> Tensor:
    """What to multiply the columns by, [columns], so that rounding hurts the outputs least (section 3.2).

    s = x^a / w^(1-a), x the mean size of a column's inputs and w that of its weights in their groups; a of 0, 0.05 … is
    tried on the outputs of ``weights``, which have the same inputs [n, columns].
    """
    whole = torch.cat(list(weights))
    x = inputs.abs().mean(0)
    sizes = whole.abs().view(len(whole), -1, group)
    w = (sizes / (sizes.amax(2, keepdim=True) + 1e-6)).view(len(whole), -1).mean(0)
    wanted = inputs @ whole.T
    best, scales = float("inf"), torch.ones_like(x)
    for step in range(steps):
        ratio = step / steps
        tried = (x**ratio / (w ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        tried = tried / (tried.max() * tried.min()).sqrt()
        rounded = rtn(whole * tried, bits, group, symmetric=False).weight() / tried
        loss = (inputs @ rounded.T - wanted).square().mean().item()
        if loss < best:
            best, scales = loss, tried
    return scales


# -- the layouts ------------------------------------------------------------------------------------------


def pack(values: Tensor, bits: int) -> Tensor:
    """Integers [n, m] in words of 32 bits [n x bits / 32, m]: a stream of bits down each column, low bits first."""
    count, width = values.shape
    stream = ((values[:, None, :] >> torch.arange(bits)[None, :, None]) & 1).reshape(
        count * bits // 32, 32, width
    )
    words = (stream << torch.arange(32)[None, :, None]).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of ``pack``, int64."""
    stream = ((words.long()[:, None, :] >> torch.arange(32)[None, :, None]) & 1).reshape(
        -1, bits, words.shape[1]
    )
    return (stream << torch.arange(bits)[None, :, None]).sum(1)


def pack_gptq(matrix: Quantized, bits: int) -> dict[str, Tensor]:
    """GPTQ's first format: columns packed down, rows of zeros across, and every zero stored less one."""
    stored = (matrix.zeros - 1) % 2**bits
    return {
        "qweight": pack(matrix.codes.T.contiguous(), bits),
        "qzeros": pack(stored, bits).T.contiguous(),
        "scales": matrix.scales.T.contiguous().half(),
        "g_idx": matrix.groups.to(torch.int32),
    }


def unpack_gptq(tensors: Mapping[str, Tensor], bits: int) -> Quantized:
    """The inverse of ``pack_gptq``."""
    codes = unpack(tensors["qweight"], bits).T
    zeros = unpack(tensors["qzeros"].T.contiguous(), bits)
    return Quantized(
        codes=codes,
        scales=tensors["scales"].T,
        zeros=(zeros + 1) % 2**bits,
        groups=tensors["g_idx"].long(),
    )


_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""The value that each of a word's eight places holds (AWQ's GEMM layout)."""


def unpack_awq(tensors: Mapping[str, Tensor]) -> Quantized:
    """AWQ's GEMM layout of 4 bits: rows packed across in its own order, zeros as they are."""

    def across(words: Tensor) -> Tensor:
        places = (words.long()[:, :, None] >> (4 * torch.arange(8))) & 15
        values = torch.empty_like(places)
        values[:, :, _AWQ_ORDER] = places
        return values.flatten(1).T

    codes, zeros = across(tensors["qweight"]), across(tensors["qzeros"])
    columns, groups = codes.shape[1], zeros.shape[1]
    return Quantized(
        codes=codes,
        scales=tensors["scales"].T,
        zeros=zeros,
        groups=torch.arange(columns) // (columns // groups),
    )


# -- whole checkpoints ------------------------------------------------------------------------------------


def matrices(folder: Path) -> dict[str, Quantized]:
    """Every quantized matrix of a GPTQ or AWQ checkpoint, by its module's name."""
    config = _quantization(folder)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors(folder).items():
        module, _, part = name.rpartition(".")
        if part in ("qweight", "qzeros", "scales", "g_idx"):
            found.setdefault(module, {})[part] = tensor
    awq = config["quant_method"] == "awq"
    return {m: unpack_awq(t) if awq else unpack_gptq(t, config["bits"]) for m, t in found.items()}


def dequantized(folder: Path) -> dict[str, Tensor]:
    """The checkpoint as plain float32 tensors under their Hugging Face names."""
    whole = {f"{module}.weight": matrix.weight() for module, matrix in matrices(folder).items()}
    packed = {
        f"{module}.{part}" for module in matrices(folder) for part in ("qweight", "qzeros", "scales", "g_idx")
    }
    return whole | {name: t.float() for name, t in tensors(folder).items() if name not in packed}


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _quantization(folder: Path) -> Mapping[str, Any]:
    config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization: Mapping[str, Any] = config["quantization_config"]
    return quantization
