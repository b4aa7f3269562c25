"""onnxruntime-genai as an engine: a generator for each slot, made at load with its whole cache and then rewound.

Chunks of a prompt give the same logits as the whole prompt (tests/integration/test_engines.py), and generators of one
model run in several threads at once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .. import template
from . import CannotLoad, Options
from .answering import Loaded, Reader, Slot
from .genai import GenaiError, Generator, Library, Model

NAME = "onnx-genai"

_NO_TOKEN = -1
"""As padding: 0.18 takes the logits of the last token that is no padding, and reads before the buffer when a chunk has
no other; many models pad with the token that ends a sequence (src/models/logits.cpp, Logits::Update)."""

_NO_ARENA = {"enable_cpu_mem_arena": False, "enable_mem_pattern": False}
"""ONNX Runtime's own allocator keeps what a pass needed and grows with each length of a prompt that it meets; without
it a pass takes no longer, and memory at its largest moment is that of the tensors alive (113 M parameters, int8)."""

_KV_BYTES: Mapping[str, Mapping[str, int]] = {"cpu": {"f32": 4}, "cuda": {"f16": 2, "bf16": 2}}


def load(options: Options) -> Loaded:
    """The model of a folder with genai_config.json and its slots. Raises CannotLoad."""
    config = _config(options.model)
    _check(options, config)
    marks = template.read(options.model)
    try:
        library = Library()
    except ImportError as error:
        raise CannotLoad(
            f"onnxruntime-genai cannot be imported: {error}", hint="sh start.sh install"
        ) from error
    session = {"intra_op_num_threads": options.threads, **_NO_ARENA}
    overlay = {"model": {"pad_token_id": _NO_TOKEN, "decoder": {"session_options": session}}}
    vocabulary = int(config["vocab_size"])
    try:
        model = Model(library, options.model, provider=options.provider, overlay=json.dumps(overlay))
        generators = tuple(
            model.generator(max_length=options.context, vocabulary=vocabulary) for _ in range(options.slots)
        )
    except GenaiError as error:
        raise CannotLoad(f"onnxruntime-genai does not load {options.model.name}: {error}") from error
    ends = config["eos_token_id"]
    return Loaded(
        name=NAME,
        version=library.version,
        vocabulary=vocabulary,
        context=options.context,
        slots=options.slots,
        chat_template=marks.source,
        marks=marks,
        words=model,
        parts=_memory(options, config),
        reader=Reader(
            ubatch=options.ubatch,
            ends=frozenset(ends if isinstance(ends, list) else [ends]),
            decode=model.decode,
            reading=threading.Lock(),
            last_alone=options.slots > 1,
        ),
        sequences=tuple(Slot(cache=generator) for generator in generators),
        end=partial(_close, model, generators),
    )


def _close(model: Model, generators: Sequence[Generator]) -> None:
    for generator in generators:
        generator.close()
    model.close()


def _config(folder: Path) -> dict[str, Any]:
    """The "model" part of genai_config.json. Raises CannotLoad."""
    path = folder / "genai_config.json"
    try:
        model: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError) as error:
        raise CannotLoad(
            f"{path} cannot be read: {error}", hint="the folder of an ONNX artifact has it"
        ) from error
    return model


def _check(options: Options, config: Mapping[str, Any]) -> None:
    """Raises CannotLoad for what the graph was not built for."""
    if options.context > config["context_length"]:
        raise CannotLoad(
            f"a slot of {options.context} tokens is more than the model's {config['context_length']} positions",
            hint="a smaller --ctx-size, or more --parallel",
        )
    allowed = _KV_BYTES[options.provider]
    if options.kv_type not in allowed:
        raise CannotLoad(
            f"a graph for {options.provider} keeps its cache in {' or '.join(allowed)}, not {options.kv_type}",
            hint=f"--cache-type-k {next(iter(allowed))}",
        )


def _memory(options: Options, config: Mapping[str, Any]) -> Mapping[str, int]:
    """Bytes of the graph's tensors, which are all in its data file, and of the caches of all slots."""
    decoder = config["decoder"]
    element = _KV_BYTES[options.provider][options.kv_type]
    token = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"] * element
    return {
        "weights": (options.model / f"{decoder['filename']}.data").stat().st_size,
        "kv_cache": token * options.context * options.slots,
    }
