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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden; then read the diff")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))
