"""A bundle for vLLM, planned for this very machine: built and checked by the command line, its pool the plan's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgepack import bundle as bundles
from edgepack import serde
from edgepack.device import agent
from edgepack.errors import CheckFailed
from edgepack.plan import Plan
from tests.plans import broken

POOL = ("KV blocks", "KV pool", "concurrency")
"""Items of the check: each number is the plan's or it is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    plan: Plan
    report: Mapping[str, Any]


def edgepack(*words: str | Path, cache: Path, may_end_with: int = 0) -> str:
    """The command line as its user has it, without what conftest sets for engines in this process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "edgepack", *map(str, words)], capture_output=True, text=True,
        env={**kept, "EDGEPACK_CACHE": str(cache)},
    )  # fmt: skip
    assert done.returncode in (0, may_end_with), done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """Two slots; there is no official wheel for CPUs, so that the plan wants --force."""
    folder, cache = tmp_path_factory.mktemp("bundle"), tmp_path_factory.mktemp("cache")
    edgepack("probe", "-o", folder / "here.yaml", cache=cache)
    edgepack(
        "build", "--profile", folder / "here.yaml", "--model", "demo", "--runtime", "vllm", "--scheme", "bf16",
        "--context", "1024", "--slots", "2", "--force", "--no-quality", "-o", folder, cache=cache,
    )  # fmt: skip
    (made,) = folder.glob("*.tar")
    found, _ = bundles.verified(made, None)
    plan = serde.load(Plan, agent.read_document(found, "plan.json"), source="plan.json")
    # Where others take the cores it may be too slow for its plan, which is no matter of a test (plans.broken).
    report = json.loads(edgepack("check", made, "--json", cache=cache, may_end_with=CheckFailed.exit_code))
    return Checked(plan=plan, report=report)


def test_it_passes_its_check_on_the_machine_that_it_was_planned_for(checked: Checked) -> None:
    rows = {item["name"]: item for item in checked.report["items"]}

    assert not broken(checked.report), rows
    assert checked.report["same_device"] is True
    for name in ("server", "run", "slots", "context filled", "peak memory", "second turn", "quality", *POOL):
        assert rows[name]["status"] == "pass", rows[name]


def test_the_pool_that_vllm_says_is_the_plans_to_the_token(checked: Checked) -> None:
    said, told = checked.report["facts"]["served"], checked.plan.start_up

    assert said["pool_tokens"] == told["kv_cache_tokens"]
    assert said["pool_blocks"] == told["num_blocks"]
    assert said["concurrency"] == told["max_concurrency"]
    assert said["max_model_len"] == told["max_model_len"] == 512
