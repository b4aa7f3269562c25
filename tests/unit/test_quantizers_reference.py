"""The references themselves: what is packed is unpacked, and each does what its paper promises."""

from __future__ import annotations

import pytest
import torch

from tests import quantizers_reference as reference


def _problem(seed: int, *, outliers: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [64, 256] and correlated inputs [512, 256], some columns 64 times as large."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.eye(256) + torch.randn(256, 256, generator=draw) / 32
    inputs = torch.randn(512, 256, generator=draw) @ mixed
    inputs[:, :outliers] *= 64
    return torch.randn(64, 256, generator=draw) / 16, inputs


def _error(weight: torch.Tensor, rounded: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (rounded - weight).T).square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_packed_is_unpacked(bits: int, symmetric: bool) -> None:
    matrix = reference.rtn(_problem(0)[0], bits, 64, symmetric=symmetric)

    back = reference.unpack_gptq(reference.pack_gptq(matrix, bits), bits)

    assert torch.equal(back.codes, matrix.codes)
    assert torch.equal(back.zeros, matrix.zeros)
    assert torch.equal(back.groups, matrix.groups)
    assert torch.equal(back.scales, matrix.scales.half())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_to_nearest_is_off_by_half_a_step_at_most(bits: int) -> None:
    weight, _ = _problem(1)

    matrix = reference.rtn(weight, bits, 32, symmetric=False)

    assert ((matrix.weight() - weight).abs() <= matrix.scales[:, matrix.groups] * 0.5001).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_hurts_the_outputs_less_than_rounding(bits: int) -> None:
    weight, inputs = _problem(2)
    hessian = reference.hessian(inputs)

    gptq = reference.gptq(weight, hessian, bits, 128)

    nearest = _error(weight, reference.rtn(weight, bits, 128).weight(), inputs)
    assert _error(weight, gptq.weight(), inputs) < 0.95 * nearest


def test_gptq_of_uncorrelated_inputs_is_rounding() -> None:
    weight, _ = _problem(3)

    gptq = reference.gptq(weight, torch.eye(256), 4, 64)

    assert torch.equal(gptq.codes, reference.rtn(weight, 4, 64).codes)


def test_awq_protects_the_columns_of_large_inputs() -> None:
    weight, inputs = _problem(4, outliers=4)
    scales = reference.awq_scales([weight], inputs, 4, 128)

    rounded = reference.rtn(weight * scales, 4, 128, symmetric=False).weight() / scales

    assert scales[:4].min() > scales[4:].max()
    plain = reference.rtn(weight, 4, 128, symmetric=False).weight()
    assert _error(weight, rounded, inputs) < 0.5 * _error(weight, plain, inputs)
