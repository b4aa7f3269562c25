"""Our converter against transformers: the same logits, the same tokens, for every architecture."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.native import Native

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from random_model import write_tokenizer

from edgepack import modelspec
from edgepack.builders import convert, safetensors
from edgepack.builders.convert import OutType
from edgepack.progress import Silent

pytestmark = pytest.mark.integration

VOCAB = 512
_TEXT = (
    "Well, Prince, so Genoa and Lucca are now just family estates of the Buonapartes. But I warn you, 1805!"
)

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": VOCAB - 3,
    "eos_token_id": VOCAB - 3,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_GEMMA = {
    **_COMMON,
    "num_hidden_layers": 7,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 16,
    "hidden_activation": "gelu_pytorch_tanh",
}
CONFIGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", {**_COMMON, "tie_word_embeddings": False}),
    "llama, tied, biases": (
        "LlamaConfig",
        {**_COMMON, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama 3 rope": ("LlamaConfig", {**_COMMON, "rope_parameters": _LLAMA3}),
    "llama, wide heads": ("LlamaConfig", {**_COMMON, "head_dim": 128}),
    "llama, linear rope": (
        "LlamaConfig",
        {**_COMMON, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral": ("MistralConfig", {**_COMMON, "sliding_window": None}),
    "qwen2, tied": ("Qwen2Config", {**_COMMON, "tie_word_embeddings": True}),
    "qwen2, untied, yarn": (
        "Qwen2Config",
        {**_COMMON, "tie_word_embeddings": False, "rope_parameters": _YARN},
    ),
    "qwen3": ("Qwen3Config", {**_COMMON, "head_dim": 128, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "gemma3, scaled rope": (
        "Gemma3TextConfig",
        {
            **_GEMMA,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
}

_GELU_TABLE = 5e-3
"""ggml looks GELU up in a table of F16 values (ggml-cpu/vec.h), transformers computes it."""


def bound(case: str, outtype: OutType) -> float:
    """Largest |dlogit| allowed, where the logits' standard deviation is 1.3.

    With F16 weights ggml rounds the activations to F16 as well; with F32 only the order of sums differs.
    """
    if outtype == "F16":
        return 2e-2
    return _GELU_TABLE if case.startswith("gemma3") else 2e-4


@pytest.fixture
def reference(tmp_path: Path) -> Callable[[str], tuple[Path, Any]]:
    """Writes a random model of a real architecture with transformers and returns (folder, model)."""

    def make(case: str, **save: Any) -> tuple[Path, Any]:
        import torch
        import transformers

        kind, values = CONFIGS[case]
        config = getattr(transformers, kind)(**values)
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                spread = 0.1 if name.endswith(("norm.weight", "bias")) else 0.08
                parameter.add_(torch.randn_like(parameter) * spread)
        folder = tmp_path / "model"
        model.save_pretrained(folder, **save)
        write_tokenizer(folder, VOCAB)
        return folder, model.eval()

    return make


@pytest.mark.parametrize("outtype", ["F32", "F16"])
@pytest.mark.parametrize("case", CONFIGS)
def test_logits_are_those_of_transformers(
    case: str,
    outtype: OutType,
    reference: Callable[[str], tuple[Path, Any]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    import torch

    folder, model = reference(case)
    if outtype == "F16":
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(parameter.half().float())
    generator = np.random.default_rng(3)
    tokens = [int(token) for token in generator.integers(0, VOCAB - 3, 96)]
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()

    gguf = convert.convert(folder, tmp_path / "model.gguf", outtype=outtype, progress=Silent())
    with Native(gguf) as llama:
        got = llama.logits(tokens)

    difference = float(np.abs(got - expected).max())
    record_property("max_dlogit", difference)
    print(f"{case} {outtype}: max |dlogit| {difference:.2e}, logit std {expected.std():.2f}")
    assert expected.std() > 1.0
    assert (got.argmax(axis=1) == expected.argmax(axis=1)).all()
    assert difference < bound(case, outtype)


def test_a_sharded_checkpoint_gives_the_same_file(
    reference: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, model = reference("llama")
    single = convert.convert(folder, tmp_path / "single.gguf", outtype="F16", progress=Silent())
    sharded_folder = tmp_path / "sharded"
    model.save_pretrained(sharded_folder, max_shard_size="1MB")
    write_tokenizer(sharded_folder, VOCAB)
    assert len(list(sharded_folder.glob("*.safetensors"))) > 2

    sharded = convert.convert(sharded_folder, tmp_path / "sharded.gguf", outtype="F16", progress=Silent())

    assert sharded.read_bytes() == single.read_bytes()


def test_bf16_is_copied_bit_by_bit(reference: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    from gguf import GGUFReader

    folder, model = reference("qwen2, tied")
    model.bfloat16().save_pretrained(folder)

    gguf = convert.convert(folder, tmp_path / "bf16.gguf", outtype="BF16", progress=Silent())

    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    stored = safetensors.checkpoint(folder)
    names = convert.hf_names(modelspec.read(folder))
    assert tensors.keys() == names.keys()
    for name, tensor in tensors.items():
        source = stored[names[name]]
        bits = np.fromfile(source.file, dtype="<u2", count=source.bytes // 2, offset=source.offset)
        if len(source.shape) == 1:
            assert (tensor.data.view("<u4") == bits.astype("<u4") << 16).all(), name
        else:
            assert (tensor.data.view("<u2").reshape(-1) == bits).all(), name
    assert convert.stored_type(folder) == "BF16"


TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    _TEXT,
    "  two spaces\n\nand  lines\t\ttabs 12345 3.14",
    "I'll say: it's 'RE, we've  done — café, naïve, 北京, русский, 🙂!",
    "<|im_start|>user\nhello<|im_end|>\n",
    " leading space",
    "",
)


def _train(kind: str, folder: Path) -> Any:
    """A byte-level BPE tokenizer of 600 tokens with the pre-tokenizer of a known family, saved to ``folder``."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from edgepack.builders.tokenizer import PRE_BY_REGEX

    ignore_merges = kind in ("llama-bpe", "tekken")
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
    regex = next((regex for (regex, _), name in PRE_BY_REGEX.items() if name == kind), None)
    before: list[Any] = [pre_tokenizers.Split(Regex(regex), "isolated")] if regex is not None else []
    if kind == "smollm":
        before = [pre_tokenizers.Digits(individual_digits=True)]
    # Trained with words of any length and number, so that only the splitter under test keeps merges apart.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 3, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "1234 567 89 0", "the cat isn't here, they're there"] * 4, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
    missing = VOCAB - 3 - tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"<extra {i}>", normalized=False) for i in range(missing)])
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe", "tekken", "gpt-4o"])
def test_byte_level_tokens_are_those_of_transformers(
    kind: str, reference: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = reference("qwen2, tied")
    fast = _train(kind, folder)

    gguf = convert.convert(folder, tmp_path / "model.gguf", outtype="F16", progress=Silent())

    with Native(gguf) as llama:
        for text in TEXTS:
            assert llama.tokens(text) == fast(text)["input_ids"], text


@pytest.mark.parametrize("source", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_are_those_of_transformers(
    source: str, prefix: bool, reference: Callable[..., tuple[Path, Any]], tmp_path: Path
) -> None:
    import sentencepiece

    folder, _ = reference("llama")
    (folder / "tokenizer.json").unlink()
    text = tmp_path / "text.txt"
    text.write_text("\n".join((*TEXTS, "the cat isn't here", "they are there and here again") * 30))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_prefix_space": prefix}))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    expected = {line: [processor.bos_id(), *processor.encode(line)] for line in TEXTS if "<|" not in line}
    if source == "tokenizer.json":
        _fast_form(folder, processor, prefix)

    gguf = convert.convert(folder, tmp_path / "model.gguf", outtype="F16", progress=Silent())

    with Native(gguf) as llama:
        for line, ids in expected.items():
            assert llama.tokens(line) == ids, line


def _fast_form(folder: Path, processor: Any, prefix: bool) -> None:
    """tokenizer.json of a SentencePiece BPE model, as transformers converts it, in place of tokenizer.model."""
    from transformers.convert_slow_tokenizer import generate_merges

    vocab = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in range(processor.get_piece_size())}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace] if prefix else [replace]
    special = [
        {"id": i, "content": text, "special": True, "normalized": False, "single_word": False, "lstrip": False,
         "rstrip": False} for i, text in enumerate(("<unk>", "<s>", "</s>"))
    ]  # fmt: skip
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    whole = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": "<unk>",
            "vocab": vocab,
            "merges": [list(pair) for pair in generate_merges(vocab, scores)],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    (folder / "tokenizer.model").unlink()
