"""The arithmetic against llama.cpp itself: its quantizer's dry run and contexts made without allocation."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgepack import schemes, toolchain
from edgepack.errors import Unsupported
from edgepack.ggufheader import BLOCKS, FILE_TYPES
from edgepack.runtimes import llama_cpp
from edgepack.settings import Settings
from edgepack.units import MIB
from tests.shapes import CONFIGS, settings, spec, write_gguf

pytestmark = pytest.mark.integration

CONTEXTS_PER_SHAPE = 40
PRINTED = 0.0051
"""llama.cpp prints hundredths of a MiB."""

_TENSOR = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[[^]]*\], type = +(\w+), size = [^\n]*?(?:\((\w+)\))?\n")


class Oracle:
    """llama.cpp in this process, asked through its log."""

    def __init__(self) -> None:
        self.llama: Any = toolchain.find().bindings()
        self.said: list[str] = []
        self.listener = self.llama.llama_log_callback(lambda _, text, __: self.said.append(text.decode()))
        self.llama.llama_backend_init()

    def __enter__(self) -> Oracle:
        self.llama.llama_log_set(self.listener, None)
        return self

    def __exit__(self, *_: object) -> None:
        self.llama.llama_log_set(ctypes.cast(0, type(self.listener)), None)

    def types(self, path: Path, scheme: str, *, imatrix: bool) -> dict[str, str] | None:
        """Type of each tensor after quantizing; None when llama.cpp refuses."""
        params = self.llama.llama_model_quantize_default_params()
        params.ftype = next(number for number, name in FILE_TYPES.items() if name == scheme)
        params.dry_run, params.nthread = True, 1
        if imatrix:
            given = (self.llama.llama_model_imatrix_data * 2)()
            given[0].name, given[0].size = b"present", 0
            params.imatrix = given
        self.said.clear()
        if self.llama.llama_model_quantize(os.fsencode(path), b"", ctypes.byref(params)) != 0:
            return None
        return {
            name: (after or before).upper() for name, before, after in _TENSOR.findall("".join(self.said))
        }

    def buffers(self, model: Any, wanted: Settings) -> tuple[float, float, float] | None:
        """KV, compute and output in MiB as logged; None when llama.cpp refuses."""
        params = self.llama.llama_context_default_params()
        key, value = llama_cpp.split_types(wanted.kv_type)
        params.n_ctx, params.n_seq_max = wanted.context, wanted.slots
        params.n_batch, params.n_ubatch = wanted.batch, wanted.ubatch
        params.n_outputs_max = wanted.slots
        params.type_k, params.type_v = BLOCKS[key.upper()][0], BLOCKS[value.upper()][0]
        params.flash_attn_type = int(wanted.flash_attention)
        params.kv_unified, params.swa_full = wanted.unified_kv, False
        self.said.clear()
        context = self.llama.llama_init_from_model(model, params)
        if not context:
            return None
        self.llama.llama_free(context)
        log = "".join(self.said)

        def total(pattern: str) -> float:
            return sum(float(size) for size in re.findall(rf"{pattern} = +([\d.]+) MiB", log))

        return total("llama_kv_cache: size"), total("compute buffer size"), total("output buffer size")


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    with Oracle() as one:
        yield one


@pytest.fixture(scope="module", params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("shape") / "f16.gguf", spec(name), "F16")


def test_every_scheme_gives_every_tensor_llama_cpps_type(oracle: Oracle, name: str, path: Path) -> None:
    model = spec(name)
    for scheme, imatrix in itertools.product(schemes.GGUF, (False, True)):
        theirs = oracle.types(path, scheme, imatrix=imatrix)
        try:
            kinds = schemes.tensor_types(model, scheme, imatrix=imatrix)
        except Unsupported:
            assert theirs is None, (scheme, imatrix)
            continue

        ours = {t.name: kind for t, kind in zip(model.tensors, kinds, strict=True)}
        assert ours == theirs, (scheme, imatrix)
        wants = "will require an imatrix" in "".join(oracle.said)
        assert imatrix or wants == schemes.requires_imatrix(model, scheme), scheme


def test_buffers_are_llama_cpps_to_the_printed_digit(oracle: Oracle, name: str, path: Path) -> None:
    """Contexts, slots, KV types, batch sizes, flash attention and unified caches drawn at random."""
    llama = oracle.llama
    params = llama.llama_model_default_params()
    params.no_alloc, params.load_mode = True, 0
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    assert model
    try:
        for wanted in drawn(name):
            theirs = oracle.buffers(model, wanted)
            try:
                ours = (
                    llama_cpp.kv_bytes(spec(name), wanted) / MIB,
                    llama_cpp.compute(spec(name), wanted, "cpu").device / MIB,
                    llama_cpp.output_bytes(spec(name), wanted.slots) / MIB,
                )
            except Unsupported:
                assert theirs is None, wanted
                continue
            assert theirs is not None, wanted
            caches = len(spec(name).kv)
            assert ours[0] == pytest.approx(theirs[0], rel=0, abs=PRINTED * caches), wanted
            assert ours[1:] == pytest.approx(theirs[1:], rel=0, abs=PRINTED), wanted
    finally:
        llama.llama_model_free(model)


CHOICES = tuple(
    itertools.product(
        (256, 300, 512, 1000, 4096, 5000, 16384, 32768),
        (1, 2, 3, 4, 7),
        (*llama_cpp.KV_TYPES, "q8_0/q4_0", "f16/q8_0", "q4_0/f16", "f32/f16"),
        (1, 16, 100, 128, 512, 2048),
        (True, True, False),
        (True, False),
    )
)


def drawn(name: str) -> list[Settings]:
    return drawn_from(CHOICES, random.Random(name), CONTEXTS_PER_SHAPE)


def drawn_from(
    choices: Sequence[tuple[int, int, str, int, bool, bool]], dice: random.Random, count: int
) -> list[Settings]:
    return [
        settings(
            context, slots=slots, kv_type=kv_type, ubatch=ubatch, flash_attention=flash, unified_kv=unified
        )
        for context, slots, kv_type, ubatch, flash, unified in dice.sample(choices, count)
    ]
