"""Hugging Face transformers as an engine: one thread for all passes, a preallocated cache for each slot.

Checkpoints are safetensors of the folder; no code that comes with a model is run.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import template
from . import CannotLoad, Options
from .answering import Loaded, Reader, Slot

if TYPE_CHECKING:
    from .preallocated import Preallocated

NAME = "transformers"

_LENGTHS = 8
"""Different lengths of a pass, beside one token."""
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A loaded model and the one thread that it runs in: OpenMP keeps a team of threads for each thread that calls it,
    and the first come are the first served."""

    network: Any
    device: str
    thread: ThreadPoolExecutor
    step: int
    """What lengths of a pass are rounded up to."""

    def logits(self, tokens: Sequence[int], cache: Preallocated) -> NDArray[np.float32]:
        """After the last of ``tokens``, which are appended to the cache: [vocabulary]."""
        return self.thread.submit(self._pass, tokens, cache).result()

    def _pass(self, tokens: Sequence[int], cache: Any) -> NDArray[np.float32]:
        """oneDNN compiles a kernel for each length of a pass that it meets and keeps it, 1.5 MiB each for the built-in
        model, so passes have few lengths: what is appended to fill one up is cut off again, and no token sees what
        comes after it. A slot too full for that reads token by token."""
        import torch

        held, count = cache.get_seq_length(), len(tokens)
        length = 1 if count == 1 else -(-count // self.step) * self.step
        if held + length > cache.get_max_length():
            return [self._pass((token,), cache) for token in tokens][-1]
        with torch.inference_mode():
            ids = torch.tensor([[*tokens, *(tokens[-1],) * (length - count)]], device=self.device)
            last = torch.tensor([count - 1], device=self.device)
            said = self.network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last)
            cache.cut(held + count)
            row: NDArray[np.float32] = said.logits[0, -1].float().cpu().numpy()
            return row


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One slot's cache (answering.Cache)."""

    model: Model
    cache: Preallocated

    def rewind(self, length: int) -> None:
        self.cache.cut(length)

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return self.model.logits(tokens, self.cache)


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """A tokenizer, for one thread at a time: others may find it borrowed."""

    tokenizer: Any
    lock: threading.Lock

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text. Raises ValueError for one that is no UTF-8."""
        text.encode()
        with self.lock:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special, verbose=False)
            return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Their text, without special tokens."""
        with self.lock:
            text: str = self.tokenizer.decode(
                list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            return text


def load(options: Options) -> Loaded:
    """The checkpoint of a folder and its slots. Raises CannotLoad."""
    if not any(options.model.glob("*.safetensors")):
        raise CannotLoad(f"{options.model.name} has no safetensors", hint="other formats are not read here")
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
    try:
        return thread.submit(_load, options, thread).result()
    except BaseException:
        thread.shutdown()
        raise


def _load(options: Options, thread: ThreadPoolExecutor) -> Loaded:
    """In the thread of the model, whose number of threads is its own."""
    try:
        import torch
        import transformers

        from .preallocated import Preallocated, plain
    except ImportError as error:
        raise CannotLoad(f"transformers cannot be imported: {error}", hint="sh start.sh install") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    # cuDNN's attention plans anew for each length of the context, which is every token: 87 ms each at 4096, and 19 with
    # lengths that it had met (1.5B in bf16 on an H200).
    torch.backends.cuda.enable_cudnn_sdp(False)
    network, tokenizer = _read(options)
    weights = _bytes(network)  # as they were loaded: bitsandbytes repacks NF4 for the CPU at the first pass
    marks = template.read(options.model)
    cache = transformers.DynamicCache(config=network.config)
    if not plain(cache):
        raise CannotLoad(
            f"{network.config.model_type} keeps more than keys and values, which cannot be cut here"
        )
    device = options.provider
    network(
        input_ids=torch.tensor([[0]], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    like = [(layer.keys, layer.values) for layer in cache.layers]
    caches = [Preallocated(like, options.context) for _ in range(options.slots)]
    step = max(options.ubatch // _LENGTHS, 1)
    model = Model(network=network, device=device, thread=thread, step=step)
    words = Words(tokenizer=tokenizer, lock=threading.Lock())
    return Loaded(
        name=NAME,
        version=transformers.__version__,
        vocabulary=int(network.config.get_text_config().vocab_size),
        context=options.context,
        slots=options.slots,
        chat_template=marks.source,
        marks=marks,
        words=words,
        parts={"weights": weights, "kv_cache": sum(cache.nbytes for cache in caches)},
        reader=Reader(ubatch=options.ubatch, ends=_ends(network), decode=words.decode, reading=None),
        sequences=tuple(Slot(cache=Kept(model=model, cache=cache)) for cache in caches),
        end=thread.shutdown,
    )


def _read(options: Options) -> tuple[Any, Any]:
    """Network and tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder: Path = options.model
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # What places weights elsewhere than on the CPU is accelerate, which comes with the quantized formats.
        plain = options.provider == "cpu" and getattr(config, "quantization_config", None) is None
        placed = {} if plain else {"device_map": {"": options.provider}}
        network = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, _DTYPES[options.kv_type]),
            **placed,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise CannotLoad(f"transformers does not load {folder.name}: {first}") from error
    positions = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and options.context > positions:
        raise CannotLoad(
            f"a slot of {options.context} tokens is more than the model's {positions} positions",
            hint="a smaller --ctx-size, or more --parallel",
        )
    return network.eval(), tokenizer


def _bytes(network: Any) -> int:
    """Bytes of the tensors that a checkpoint has, shared ones once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in network.state_dict().values()}.values())


def _ends(network: Any) -> frozenset[int]:
    """Tokens that end a sequence."""
    for config in (network.generation_config, network.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()
