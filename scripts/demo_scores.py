"""Scores the built-in models on their held-out text: the panel demo_heldout of edgepack/catalog.

python scripts/demo_scores.py                                      # a line for each model in edgepack/models
python scripts/demo_scores.py --damage FOLDER --text heldout.txt   # how accuracy falls with loss in a damaged model

The score is next-token accuracy in percent, in windows of 256 tokens one after the other, over all tokens but each
window's first.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgepack import catalog, heldout

WINDOW = 256
BATCH = 8
NOISE = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Standard deviations added to the matrices, in each one's own: 0.01 to 0.6 nats."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--damage", type=Path, metavar="FOLDER", help="a model to damage step by step")
    parser.add_argument("--text", type=Path, default=heldout.BUILT_IN, help="what it is measured on")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.damage is not None:
        _fall(options.damage, options.text)
        return
    for name, folder in catalog.built_in().items():
        model = loaded(folder)
        loss, accuracy, count = score(model, windows(folder, options.text))
        print(
            f"{name:<16}{model.num_parameters():>12,} parameters  next_token {100 * accuracy:.2f}  "
            f"perplexity {math.exp(loss):.2f}  of {count} tokens"
        )


def windows(folder: Path, text: Path) -> list[torch.Tensor]:
    """The text in the model's tokens, int64 [up to 8, 256] each, the last [1, what is left]."""
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    whole = len(ids) // WINDOW * WINDOW
    rest = [torch.tensor([ids[whole:]])] if len(ids) - whole > 1 else []
    return [*torch.tensor(ids[:whole]).view(-1, WINDOW).split(BATCH), *rest]


def score(model: PreTrainedModel, batches: list[torch.Tensor]) -> tuple[float, float, int]:
    """Mean loss in nats, share of tokens that are the model's first choice, and how many tokens that is of."""
    loss, hits, count = 0.0, 0, 0
    with torch.inference_mode():
        for tokens in batches:
            logits, wanted = model(tokens, use_cache=False).logits[:, :-1].float(), tokens[:, 1:]
            lost = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
            loss += float(lost)
            hits += int((logits.argmax(-1) == wanted).sum())
            count += wanted.numel()
    return loss / count, hits / count, count


def _fall(folder: Path, text: Path) -> None:
    """Accuracy is exp(-k * nats) of the whole model's: prints k of each damage, and by least squares of all."""
    model, batches = loaded(folder), windows(folder, text)
    loss, accuracy, _ = score(model, batches)
    products = squares = 0.0
    for name, damaged in _damaged(model):
        worse, less, _ = score(damaged, batches)
        nats, fall = worse - loss, math.log(accuracy / less)
        products, squares = products + nats * fall, squares + nats * nats
        print(f"{name:<20} {nats:.4f} nats  {100 * less:.2f} of {100 * accuracy:.2f}  k = {fall / nats:.3f}")
    print(f"k = {products / squares:.3f}")


def _damaged(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """Noise on the matrices of the blocks; then without one block in the middle, and without the two there."""
    for share in NOISE:
        noisy = copy.deepcopy(model)
        for name, weights in noisy.named_parameters():
            if weights.dim() == 2 and ".layers." in name:
                weights.data += torch.randn_like(weights) * weights.std() * share
        yield f"noise {share}", noisy
    middle = len(model.model.layers) // 2
    for gone in ((middle,), (middle - 1, middle)):
        shorter = copy.deepcopy(model)
        shorter.model.layers = torch.nn.ModuleList(
            layer for at, layer in enumerate(shorter.model.layers) if at not in gone
        )
        shorter.config.num_hidden_layers = len(shorter.model.layers)
        yield f"without {gone}", shorter


def loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


if __name__ == "__main__":
    main()
