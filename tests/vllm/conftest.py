"""What these tests share: vLLM's own parser, and engines as our flags start them.

They run where vLLM is installed (`make test-vllm`), not with the others: it brings its own torch and transformers.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Sequence

import pytest

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="2",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_DO_NOT_TRACK="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_WORKER_MULTIPROC_METHOD="spawn",
)

Parse = Callable[[Sequence[str]], Namespace]


@pytest.fixture(scope="session")
def parse() -> Parse:
    """The server's command line as vLLM reads it; a wrong one ends with SystemExit."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())

    def read(words: Sequence[str]) -> Namespace:
        parsed: Namespace = parser.parse_args(list(words))
        return parsed

    return read
