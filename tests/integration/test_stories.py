"""A model that nobody here trained, converted and served, says what it is known to say."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import stories260k_to_hf

from edgepack import modelspec, toolchain
from edgepack.artifact import Checkpoint
from edgepack.builders import gguf
from edgepack.progress import Silent

pytestmark = pytest.mark.integration

_FILES = Path(__file__).parents[1] / "data" / "stories260K"
PROMPT = "Once upon a time"
_PROMPT_IDS = [1, 403, 407, 261, 378]
CONTINUATION = """\
, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. \
She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play \
with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I"""
"""The 200 most likely tokens, one after the other, as the reference below and the published GGUF give them."""


def greedy_by_hand(count: int) -> list[int]:
    """The model as llama2.c's run.c computes it, in float64: an implementation that shares no code with ours."""
    shape, tensors = stories260k_to_hf.read_checkpoint(_FILES / "stories260K.bin")
    weights = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    dim, group = shape.head_dim, shape.heads // shape.kv_heads
    embedding = weights["model.embed_tokens.weight"]
    keys: list[list[NDArray[np.float64]]] = [[] for _ in range(shape.layers)]
    values: list[list[NDArray[np.float64]]] = [[] for _ in range(shape.layers)]

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        scaled: NDArray[np.float64] = x / np.sqrt((x * x).mean() + 1e-5) * weights[f"model.{name}.weight"]
        return scaled

    def rotate(x: NDArray[np.float64], position: int) -> NDArray[np.float64]:
        pairs = x.reshape(-1, dim // 2, 2)
        angle = position * 10000.0 ** (-np.arange(0, dim, 2) / dim)
        one = pairs[..., 0] * np.cos(angle) - pairs[..., 1] * np.sin(angle)
        two = pairs[..., 0] * np.sin(angle) + pairs[..., 1] * np.cos(angle)
        return np.stack([one, two], axis=-1).reshape(-1, dim)

    def step(token: int, position: int) -> int:
        x = embedding[token]
        for layer in range(shape.layers):
            prefix = f"layers.{layer}"

            def times(name: str, v: NDArray[np.float64], prefix: str = prefix) -> NDArray[np.float64]:
                product: NDArray[np.float64] = weights[f"model.{prefix}.{name}.weight"] @ v
                return product

            h = norm(x, f"{prefix}.input_layernorm")
            query = rotate(times("self_attn.q_proj", h), position)
            keys[layer].append(rotate(times("self_attn.k_proj", h), position))
            values[layer].append(times("self_attn.v_proj", h).reshape(-1, dim))
            past_keys, past_values = np.array(keys[layer]), np.array(values[layer])
            heads = []
            for head in range(shape.heads):
                score = past_keys[:, head // group] @ query[head] / np.sqrt(dim)
                share = np.exp(score - score.max())
                heads.append(share / share.sum() @ past_values[:, head // group])
            x = x + times("self_attn.o_proj", np.concatenate(heads))
            h = norm(x, f"{prefix}.post_attention_layernorm")
            gate = times("mlp.gate_proj", h)
            x = x + times("mlp.down_proj", gate / (1 + np.exp(-gate)) * times("mlp.up_proj", h))
        return int((embedding @ norm(x, "norm")).argmax())

    tokens = list(_PROMPT_IDS)
    following = 0
    for position, token in enumerate(tokens):
        following = step(token, position)
    for _ in range(count):
        tokens.append(following)
        following = step(following, len(tokens) - 1)
    return tokens[len(_PROMPT_IDS) :]


@contextmanager
def served(model: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    words = [
        str(toolchain.find().server),
        "-m",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "-c",
        "512",
    ]
    words += ["-np", "1", "-t", "1", "--fit", "off", "-lm", "none", "--cache-ram", "0"]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None and time.monotonic() < deadline
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=20)


def complete(address: str, prompt: str, count: int) -> Any:
    asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "top_k": 1, "return_tokens": True}
    request = urllib.request.Request(f"{address}/completion", json.dumps(asked).encode())
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stories") / "stories260K"
    stories260k_to_hf.write_folder(_FILES / "stories260K.bin", _FILES / "tok512.bin", path)
    return path


@pytest.mark.parametrize("scheme", ["F16", "F32"])
def test_the_greedy_continuation_is_the_known_one(scheme: str, folder: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(path=folder, source=str(folder), revision="sha256:test", license="MIT")
    spec = modelspec.read(folder)
    made = gguf.build(checkpoint, spec, scheme, tmp_path, toolchain=toolchain.find(), progress=Silent())

    with served(made.path) as address:
        answer = complete(address, PROMPT, 200)

    assert answer["content"] == CONTINUATION
    assert answer["tokens_evaluated"] == len(_PROMPT_IDS)
    assert answer["tokens"] == greedy_by_hand(200)
