"""Architectures that are planned for only, against llama.cpp itself: it loads the shapes, and its caches,
recurrent states and tensor types are ours; compute buffers are equal, or within what the plan says."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgepack import modelspec, schemes
from edgepack.errors import Unsupported
from edgepack.runtimes import llama_cpp
from edgepack.units import MIB
from tests.integration.test_memory_oracle import PRINTED, Oracle, drawn
from tests.shapes import PLANNED, spec, write_gguf

pytestmark = pytest.mark.integration

_SKIPPED = re.compile(r"model has unused tensor (\S+) ")
_STATE = re.compile(r"llama_memory_recurrent: size = +([\d.]+) MiB")


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    with Oracle() as one:
        yield one


@pytest.fixture(scope="module", params=PLANNED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("shape") / "f16.gguf", spec(name), "F16")


def test_a_gguf_says_what_the_config_says(name: str, path: Path) -> None:
    ours = spec(name)

    back = modelspec.read(path)

    assert (back.kv, back.recurrent_bytes) == (ours.kv, ours.recurrent_bytes)
    assert (back.tensors, back.layers, back.heads) == (ours.tensors, ours.layers, ours.heads)


def test_every_scheme_gives_every_quantized_tensor_llama_cpps_type(
    oracle: Oracle, name: str, path: Path
) -> None:
    """What is never quantized keeps the type of the source, which this file does not have as published."""
    model = spec(name)
    for scheme, imatrix in itertools.product(schemes.GGUF, (False, True)):
        theirs = oracle.types(path, scheme, imatrix=imatrix)
        try:
            kinds = schemes.tensor_types(model, scheme, imatrix=imatrix)
        except Unsupported:
            assert theirs is None, scheme
            continue
        if theirs is None:
            assert not imatrix and schemes.requires_imatrix(model, scheme), scheme
            continue
        for tensor, kind in zip(model.tensors, kinds, strict=True):
            if schemes.quantizable(tensor):
                assert kind == theirs[tensor.name], (scheme, imatrix, tensor.name)


def test_caches_states_and_buffers_are_llama_cpps(oracle: Oracle, name: str, path: Path) -> None:
    llama, ours = oracle.llama, spec(name)
    params = llama.llama_model_default_params()
    params.no_alloc, params.load_mode = True, 0
    oracle.said.clear()
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    assert model, "llama.cpp finds a tensor missing, too much or of another shape"
    try:
        skipped = set(_SKIPPED.findall("".join(oracle.said)))
        assert skipped == {tensor.name for tensor in ours.tensors if not ours.loaded(tensor)}
        for wanted in drawn(name):
            theirs = oracle.buffers(model, wanted)
            try:
                cache = llama_cpp.kv_bytes(ours, wanted) / MIB
            except Unsupported:
                assert theirs is None, wanted
                continue
            assert theirs is not None, wanted
            state = sum(float(size) for size in _STATE.findall("".join(oracle.said)))
            assert cache == pytest.approx(theirs[0], rel=0, abs=PRINTED * len(ours.kv)), wanted
            assert llama_cpp.recurrent_bytes(ours, wanted) / MIB == pytest.approx(state, abs=PRINTED), wanted
            assert llama_cpp.output_bytes(ours, wanted.slots) / MIB == pytest.approx(theirs[2], abs=PRINTED)
            expected = llama_cpp.compute(ours, wanted, "cpu").device
            around = llama_cpp.compute_range(ours, wanted, expected)
            if around is None:
                assert expected / MIB == pytest.approx(theirs[1], rel=0, abs=PRINTED), wanted
            else:
                assert around[0] / MIB <= theirs[1] + PRINTED, (wanted, expected / MIB, theirs[1])
                assert theirs[1] - PRINTED <= around[1] / MIB, (wanted, expected / MIB, theirs[1])
    finally:
        llama.llama_model_free(model)
