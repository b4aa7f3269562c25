"""Options and fixtures that several tests share."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# No timing assertions: a busy machine is not a bug.
settings.register_profile("edgepack", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("edgepack")


# Tests say what a CPU computes, also on a machine with a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


# A shell that starts the tests in the background lets their children ignore Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_settings_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the user's nor those that a library (gptqmodel's tokenicer) sets for whoever comes after its import."""
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden; then read the diff")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))
