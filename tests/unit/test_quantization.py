"""What is proposed instead of a scheme that loses too much, and what the options exclude."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepack import catalog, hub, layouts, modelspec, quantization, schemes
from edgepack.errors import BadInput
from edgepack.progress import Silent
from edgepack.units import parse_share

DEMO = catalog.built_in()["demo"]
LIMITS = quantization.Limits(max_kl=0.1)
QWEN = next(m for m in catalog.models() if m.id == "qwen2.5-1.5b-instruct").spec()


@pytest.mark.parametrize(("text", "share"), [("2%", 0.02), ("0.5 %", 0.005), ("0.02", 0.02), ("0", 0.0)])
def test_shares_are_read_as_people_write_them(text: str, share: float) -> None:
    assert math.isclose(parse_share(text), share)


@pytest.mark.parametrize("text", ["two", "-1%", "nan", "inf", "%", ""])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is no share"):
        parse_share(text)


def test_the_next_scheme_weighs_more_and_is_expected_to_lose_less() -> None:
    steps = ["Q3_K_M"]
    while (other := quantization.heavier(QWEN, steps[-1], imatrix=False, keep=0.5)) is not None:
        steps.append(other)
        assert len(steps) < 20

    weights = [schemes.weights_bytes(QWEN, name, imatrix=False) for name in steps]
    assert weights == sorted(weights) and len(steps) > 3
    assert steps[-1] in ("F32", "F16", "BF16")


@given(st.floats(0.01, 1), st.floats(0.01, 1))
@settings(max_examples=30)
def test_who_may_lose_less_is_never_proposed_less(one: float, other: float) -> None:
    def weight(keep: float) -> float:
        scheme = quantization.heavier(QWEN, "gptq-int4-g128", imatrix=False, keep=keep)
        return math.inf if scheme is None else schemes.weights_bytes(QWEN, scheme, imatrix=False)

    strict, loose = sorted((one, other))

    assert weight(strict) >= weight(loose)


def test_the_articles_cure_is_heavier_than_its_preset() -> None:
    first, cure = (quantization.PRESETS[name] for name in ("article", "article-better"))

    assert layouts.parse(first) == layouts.Scheme(name=first, family="gptq", bits=4, group=128)
    assert layouts.parse(cure) == layouts.Scheme(name=cure, family="gptq", bits=4, group=64, act_order=True)
    for less, more in pairwise((first, cure)):
        assert schemes.weights_bytes(QWEN, less, imatrix=False) < schemes.weights_bytes(
            QWEN, more, imatrix=False
        )


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("bnb-nf4", {"calibration": (Path("a.txt"),)}, "bnb-nf4 is not calibrated"),
        ("gptq-int4-g128", {"imatrix": Path("m.gguf")}, "takes no importance matrix"),
        ("Q4_K_M", {"imatrix": Path("m.gguf"), "calibration": (Path("a.txt"),)}, "exclude each other"),
        ("Q4_K_M", {"imatrix": DEMO / "heldout.txt"}, "is no importance matrix"),
        ("F16", {"calibration": (Path("a.txt"),)}, "F16 is not calibrated"),
        ("gguf-budget-4MiB", {"imatrix": Path("m.gguf")}, "takes no importance matrix"),
        ("gguf-budget-4MiB", {}, "fills what a plan leaves"),
        ("Q4_K_M", {"measured": False, "limits": LIMITS}, "--no-quality measures nothing"),
    ],
)
def test_options_that_a_scheme_does_not_take_are_refused(
    scheme: str, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    checkpoint = hub.resolve(str(DEMO), revision=None, offline=True, progress=Silent())
    given_ = quantization.Options(**options)  # type: ignore[arg-type]  # as the rows have them

    with pytest.raises(BadInput, match=message):
        quantization.make(checkpoint, modelspec.read(DEMO), scheme, given_, tmp_path, Silent())
    assert not list(tmp_path.iterdir())
