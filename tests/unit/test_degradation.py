"""The loss law holds to the published perplexities it was fitted on, and follows types, not names."""

from __future__ import annotations

import contextlib
import itertools
import math
import runpy
from pathlib import Path

import pytest

from edgepack import degradation, modelspec, schemes
from edgepack.errors import Unsupported
from tests import shapes

FIT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "fit_degradation.py"))
LLAMA_3_8B = modelspec.from_config(FIT["LLAMA_3_8B"], name="Llama-3-8B")


@pytest.mark.parametrize("imatrix", [False, True])
def test_published_losses_lie_inside_the_stated_spread(imatrix: bool) -> None:
    rows: dict[str, float] = FIT["WEIGHTED" if imatrix else "PLAIN"]
    for scheme, ratio in rows.items():
        types = schemes.tensor_types(LLAMA_3_8B, scheme, imatrix=imatrix)

        predicted = degradation.loss(LLAMA_3_8B.tensors, types, parameters=int(8.03e9), imatrix=imatrix)

        nats = math.log(predicted.perplexity_ratio)
        least, most = degradation.SPREAD
        assert nats * least <= math.log(ratio) <= nats * most, scheme


def test_fallbacks_count_by_their_real_types() -> None:
    """Hidden size 896 is no multiple of 256: its Q4_K_M is Q5_0 and Q8_0 and loses less than its name says."""
    config = {**FIT["LLAMA_3_8B"], "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2,
              "intermediate_size": 4864}  # fmt: skip
    small = modelspec.from_config(config, name="small")
    types = schemes.tensor_types(small, "Q4_K_M", imatrix=False)

    error = degradation.rounding_error(small.tensors, types)

    assert error < degradation.ROUNDING_ERROR["Q4_K"]


def test_smaller_models_lose_more() -> None:
    types = schemes.tensor_types(LLAMA_3_8B, "Q4_0", imatrix=False)

    kept = [
        degradation.loss(LLAMA_3_8B.tensors, types, parameters=n, imatrix=False).retention
        for n in (10**8, 10**9, 10**10)
    ]

    assert kept == sorted(kept)


@pytest.mark.parametrize("scheme", schemes.GGUF)
def test_every_type_that_a_scheme_gives_has_a_measured_error(scheme: str) -> None:
    given = set()
    for model, imatrix in itertools.product(map(shapes.spec, shapes.CONFIGS), (False, True)):
        with contextlib.suppress(Unsupported):  # shapes that llama-quantize itself refuses
            given |= set(schemes.tensor_types(model, scheme, imatrix=imatrix))

    assert given
    assert given <= set(degradation.ROUNDING_ERROR)


def test_a_type_of_which_nothing_is_known_is_refused_by_name() -> None:
    types = ["I8"] * len(LLAMA_3_8B.tensors)

    with pytest.raises(Unsupported, match=r"what I8 costs in quality is not known \(output\.weight\)"):
        degradation.rounding_error(LLAMA_3_8B.tensors, types)
