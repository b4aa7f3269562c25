"""Trains the demo model: a small Llama whose text reads like the books that it was trained on.

    python scripts/train_demo.py train --prose war-and-peace.txt --verse shakespeare.txt \
        --work run --out edgepack/models/demo
    python scripts/train_demo.py compare --prose war-and-peace.txt --verse shakespeare.txt \
        --model edgepack/models/demo
    python scripts/train_demo.py contexts --model edgepack/models/demo
    python scripts/train_demo.py sample --model edgepack/models/demo --prompt "Prince Andrew"

It needs torch, numpy, safetensors, tokenizers and transformers. `train` goes on from the last checkpoint
in the work folder, if there is one.
"""

# mypy: allow-subclassing-any
# (torch has no types where it is not installed)

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from demo_corpus import END, VOCABULARY, Corpus, corpus, stream, trained_tokenizer
from kneser_ney import kneser_ney
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

Tokens = NDArray[np.int64]
Optimizers = tuple[torch.optim.Optimizer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the model. K-quants need rows of whole 256-blocks, so each row length is a multiple of it."""

    vocabulary: int = VOCABULARY
    hidden: int = 256
    ffn: int = 1024
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head: int = 64
    rope_base: float = 10_000.0
    epsilon: float = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A run of steps with windows of one length; it goes on from the best weights of the one before."""

    steps: int
    length: int
    peak: float
    """Highest learning rate, after a linear warmup of `warmup` steps."""
    warmup: int
    fall: int
    """Steps after which the cosine would reach nothing; the stage may end before."""

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup) / (self.fall - self.warmup)
        return self.peak * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    stages: tuple[Stage, ...] = (
        Stage(steps=1800, length=256, peak=3e-3, warmup=100, fall=2100),
        Stage(steps=120, length=1024, peak=1.5e-3, warmup=10, fall=120),
    )
    """Short windows first, because they cost least; then long ones teach the far positions.

    With a low rate they do not: 300 long steps that only went on with the first cosine left the perplexity
    of the validation text with 1024 tokens of context at 38.6, against 30.1 with 256.
    """
    context: int = 512
    """The longest context that the model promises: `contexts` shows no gain from a longer one."""
    batch: int = 4096
    """Tokens per step."""
    decay: float = 0.2
    """Weight decay, twice the usual one, because the text is read six times."""
    dropout: float = 0.15
    """Of the embedding and of what each attention and each FFN adds."""
    clip: float = 1.0
    seed: int = 1869
    check_every: int = 40
    """Steps between two looks at the validation text, each of which is also a checkpoint."""


class Norm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden))
        self.epsilon = shape.epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, as in `LlamaForCausalLM`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head, shape.hidden, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, causal: Tensor) -> Tensor:
        batch, length, _ = x.shape
        group = self.shape.heads // self.shape.kv_heads
        q, k, v = (
            projection(x).view(batch, length, -1, self.shape.head).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotated(q, rotary), rotated(k, rotary).repeat_interleave(group, 1)
        # written out, because the CPU's fused attention is slower than this at these lengths
        scores = (q @ k.transpose(-1, -2)) * self.shape.head**-0.5 + causal
        mixed = scores.softmax(-1).to(q.dtype) @ v.repeat_interleave(group, 1)
        return cast(Tensor, self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1)))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, rotary: Tensor, causal: Tensor, keep: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, causal) * keep[0]
        return cast(Tensor, x + self.mlp(self.post_attention_layernorm(x)) * keep[1])


class Llama(nn.Module):
    """Parameters carry the names of `LlamaForCausalLM`, less the leading `model.`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.layers if into_residual else 1))

    def forward(self, tokens: Tensor, rotary: Tensor, causal: Tensor, keep: Tensor) -> Tensor:
        """Mean cross entropy in nats of all tokens but the first of each row: tokens [rows, length + 1]."""
        x = self.embed_tokens(tokens[:, :-1]) * keep[-1]
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary, causal, keep[2 * index : 2 * index + 2])
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def rotated(x: Tensor, rotary: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * rotary[0] + torch.cat((-right, left), -1) * rotary[1]


def rotary(shape: Shape, length: int) -> Tensor:
    """Cosines and sines of all positions: [2, length, head]."""
    speeds = shape.rope_base ** (-torch.arange(0, shape.head, 2) / shape.head)
    angles = torch.outer(torch.arange(length), speeds).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin())).bfloat16()


def causal(length: int) -> Tensor:
    return torch.full((length, length), -math.inf).triu(1).bfloat16()


class Dropout:
    """Masks cut at random places from a large random strip, which is drawn anew now and then.

    Drawing one bit per activation takes as long on a CPU as the matrix products do.
    """

    def __init__(self, shape: Shape, recipe: Recipe) -> None:
        self.places, self.hidden = 2 * shape.layers + 1, shape.hidden
        self.size = self.places * recipe.batch * self.hidden
        self.rate = recipe.dropout
        self.seed = recipe.seed
        self.strip = torch.empty(0)

    def masks(self, step: int, rows: int) -> Tensor:
        """What each activation of this step is multiplied by: [places, rows, length, hidden]."""
        if step % 25 == 0 or not self.strip.numel():
            drawn = torch.Generator().manual_seed(self.seed + step - step % 25)
            self.strip = torch.empty(self.size * 3 // 2, dtype=torch.bfloat16)
            self.strip.bernoulli_(1 - self.rate, generator=drawn).div_(1 - self.rate)
        start = int(np.random.default_rng([self.seed, step]).integers(self.size // 128)) * 64
        return self.strip[start : start + self.size].view(self.places, rows, -1, self.hidden)


def windows(tokens: Tokens, length: int, rows: int, seed: int) -> Iterator[Tensor]:
    """Batches [rows, length + 1] without end; each epoch reads all windows of a new grid in a new order."""
    random = np.random.default_rng([seed, length])
    while True:
        starts = np.arange(random.integers(length), len(tokens) - length, length)
        random.shuffle(starts)
        for chosen in starts[: len(starts) // rows * rows].reshape(-1, rows):
            yield torch.from_numpy(np.stack([tokens[start : start + length + 1] for start in chosen]))


def train(text: Corpus, work: Path, out: Path, shape: Shape, recipe: Recipe) -> None:
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    tokenizer = trained_tokenizer(text.training)
    tokens, validation = stream(tokenizer, text.training), stream(tokenizer, [text.validation])[:-1]
    print(f"{len(tokens)} training tokens, {len(validation)} validation tokens", flush=True)
    model = Llama(shape)
    print(f"{sum(parameter.numel() for parameter in model.parameters())} parameters", flush=True)
    for number, stage in enumerate(recipe.stages):
        run = Run(model=model, recipe=recipe, stage=stage, shape=shape, work=work / f"stage-{number}")
        run_stage(run, tokens, validation)
    export(model, tokenizer, text.heldout, out, shape, recipe)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One stage of the training of one model, with its checkpoints in `work`."""

    model: Llama
    shape: Shape
    recipe: Recipe
    stage: Stage
    work: Path


def run_stage(run: Run, tokens: Tokens, validation: Tokens) -> None:
    """Trains the model in place; it ends with the weights that read the validation text best."""
    run.work.mkdir(parents=True, exist_ok=True)
    model, recipe, stage = run.model, run.recipe, run.stage
    optimizers = optimizers_of(model, recipe)
    first, best = restored(run.work / "last.pt", model, optimizers)
    rows, dropout = recipe.batch // stage.length, Dropout(run.shape, recipe)
    turn, mask = rotary(run.shape, stage.length), causal(stage.length)
    compiled = torch.compile(model, dynamic=False)
    batches = windows(tokens, stage.length, rows, recipe.seed)
    began, losses = time.monotonic(), []
    for step, batch in enumerate(islice(batches, first, stage.steps), first):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = stage.rate(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(batch, turn, mask, dropout.masks(step, rows))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
        if (step + 1) % recipe.check_every:
            continue
        measured = validation_perplexity(model, validation, run.shape, stage.length)
        best = kept(run, optimizers, step + 1, measured, best)
        speed = len(losses) * recipe.batch / (time.monotonic() - began)
        print(
            f"length {stage.length} step {step + 1} train {math.exp(np.mean(losses)):.2f} "
            f"validation {measured:.2f} best {best:.2f} tokens/s {speed:.0f}",
            flush=True,
        )
        began, losses = time.monotonic(), []
    model.load_state_dict(torch.load(run.work / "best.pt", weights_only=True))


def optimizers_of(model: Llama, recipe: Recipe) -> Optimizers:
    """Muon for the matrices, which needs fewer steps than AdamW, and AdamW for the rest.

    Jordan et al.: https://kellerjordan.github.io/posts/muon/; the rate is scaled to suit AdamW's, as in
    Liu et al., https://arxiv.org/abs/2502.16982.
    """
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    return (
        torch.optim.Muon(matrices, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [model.embed_tokens.weight], "weight_decay": recipe.decay},
                {"params": norms, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            fused=True,
        ),
    )


def restored(path: Path, model: Llama, optimizers: Optimizers) -> tuple[int, float]:
    """The step to go on from and the best validation perplexity so far."""
    if not path.exists():
        return 0, math.inf
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, its in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(its)
    return int(state["step"]), float(state["best"])


def kept(run: Run, optimizers: Optimizers, step: int, measured: float, best: float) -> float:
    """The best perplexity so far, after the checkpoint of this step and the best weights are on disk."""
    weights = run.model.state_dict()
    if measured < best:
        saved(weights, run.work / "best.pt")
    best = min(best, measured)
    states = [optimizer.state_dict() for optimizer in optimizers]
    saved({"model": weights, "optimizers": states, "step": step, "best": best}, run.work / "last.pt")
    return best


def saved(state: object, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def validation_perplexity(model: Llama, tokens: Tokens, shape: Shape, length: int) -> float:
    """Perplexity per token in windows that do not overlap: quick, and a little too high."""
    rows = torch.from_numpy(
        np.stack([tokens[at : at + length + 1] for at in range(0, len(tokens) - length, length)])
    )
    turn, mask, keep = rotary(shape, length), causal(length), torch.ones(2 * shape.layers + 1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [float(model(part, turn, mask, keep)) * len(part) for part in rows.split(4096 // length)]
    return math.exp(sum(losses) / len(rows))


def export(model: Llama, tokenizer: Tokenizer, heldout: str, out: Path, shape: Shape, recipe: Recipe) -> None:
    """Writes the folder that `transformers` reads."""
    out.mkdir(parents=True, exist_ok=True)
    end = tokenizer.token_to_id(END)
    weights = {f"model.{name}": value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "heldout.txt").write_text(heldout, encoding="utf-8", newline="\n")
    write_json(
        out / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": end,
            "eos_token_id": end,
            "head_dim": shape.head,
            "hidden_act": "silu",
            "hidden_size": shape.hidden,
            "initializer_range": 0.02,
            "intermediate_size": shape.ffn,
            "max_position_embeddings": recipe.context,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.layers,
            "num_key_value_heads": shape.kv_heads,
            "rms_norm_eps": shape.epsilon,
            "rope_scaling": None,
            "rope_theta": shape.rope_base,
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
            "use_cache": True,
            "vocab_size": shape.vocabulary,
        },
    )
    write_json(
        out / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": END,
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "model_max_length": recipe.context,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write_json(
        out / "generation_config.json",
        {"bos_token_id": end, "do_sample": True, "eos_token_id": end, "temperature": 0.8, "top_k": 40},
    )


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


def compare(text: Corpus, folder: Path) -> None:
    """Prints the perplexity of the held-out text under the model and under Kneser-Ney 5-grams."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    heldout = stream(tokenizer, [text.heldout])[:-1]
    ngrams = kneser_ney(stream(tokenizer, text.training).tolist(), length=5, vocabulary=VOCABULARY)
    baseline = ngrams.perplexity(heldout.tolist())
    ours = sliding_perplexity(model, heldout, model.config.max_position_embeddings)
    print(f"held-out tokens       {len(heldout) - 1}")
    print(f"Kneser-Ney 5-gram     {baseline:.2f} per token")
    print(f"model                 {ours:.2f} per token")
    print(f"model / Kneser-Ney    {ours / baseline:.3f}")


def contexts(folder: Path) -> None:
    """Prints the held-out perplexity for windows of several lengths, on the same predicted tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    heldout = stream(tokenizer, [(folder / "heldout.txt").read_text(encoding="utf-8")])[:-1]
    for length in (128, 256, 512, 768, 1024, 1536, 2048):
        print(f"context {length:5} perplexity {sliding_perplexity(model, heldout, length):.3f}", flush=True)


def sliding_perplexity(model: PreTrainedModel, tokens: Tokens, length: int) -> float:
    """Perplexity per token of all `tokens` but the first, in windows that overlap by half."""
    nats, predicted, half = 0.0, 1, length // 2
    for start in range(0, len(tokens) - 1, half):
        window = torch.from_numpy(tokens[start : start + length])[None]
        fresh = start + window.shape[1] - predicted
        with torch.no_grad():
            logits = model(window).logits[0, -fresh - 1 : -1].float()
        nats += float(F.cross_entropy(logits, window[0, -fresh:], reduction="sum"))
        predicted += fresh
        if predicted == len(tokens):
            break
    return math.exp(nats / (len(tokens) - 1))


def sample(folder: Path, prompt: str, seed: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed)
    given = tokenizer(prompt, return_tensors="pt")
    print(tokenizer.decode(model.generate(**given, max_new_tokens=250)[0]))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("train", "compare", "contexts", "sample"))
    parser.add_argument("--prose", type=Path, action="append", default=[], help="a book of paragraphs")
    parser.add_argument("--verse", type=Path, action="append", default=[], help="a book of lines")
    parser.add_argument("--work", type=Path, default=Path("run"), help="where checkpoints go")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where the trained model goes")
    parser.add_argument("--model", type=Path, default=Path("demo"), help="a trained model")
    parser.add_argument("--prompt", default="CHAPTER I\n\n")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    match given.what:
        case "train":
            train(corpus(given.prose, given.verse), given.work, given.out, Shape(), Recipe())
        case "compare":
            compare(corpus(given.prose, given.verse), given.model)
        case "contexts":
            contexts(given.model)
        case _:
            sample(given.model, given.prompt, given.seed)


if __name__ == "__main__":
    main(sys.argv[1:])
