"""Distillation: how a student is trained, as values, and the modules that do each part of it in processes of their own.

`examples` turns a user's data into tokens, `prune` makes a student out of its teacher, `teacher` keeps what the teacher
says of every token, `train` teaches the student, and `measure` says how much of the gap between them was closed.
Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from edgepack.errors import BadInput

Divergence = Literal["forward", "reverse", "js"]
"""KL(teacher || student), KL(student || teacher), or the mean of both against their mixture (Jensen-Shannon)."""

Precision = Literal["auto", "bf16", "fp32"]
"""What matrices are multiplied in; weights and their updates stay in 32 bits. auto: bf16 where the machine has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """alpha · CE + (1 - alpha) · temperature² · divergence, the mean over the tokens of responses."""

    alpha: float = 0.5
    """Weight of the cross entropy with the data's own tokens; 1 trains on hard labels alone."""
    temperature: float = 1.0
    """Both sides' logits are divided by it before the divergence is taken."""
    divergence: Divergence = "forward"
    hidden: float = 0.0
    """Weight of the mean squared distance between hidden states, the student's through a learned projection; needs the
    teacher beside the student."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Low-rank updates of frozen matrices (Hu et al., arXiv 2106.09685), merged at the end."""

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.05
    targets: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a student is trained: everything that its weights depend on beside data, teacher and start."""

    objective: Objective = field(default_factory=Objective)
    lora: Lora | None = None
    """None trains all weights."""
    length: int = 1024
    """Tokens of the longest example; never more than either model's context."""
    held_out: float = 0.1
    """Share of the documents that is never trained on."""
    steps: int | None = None
    """Updates of the weights; None: as many as ``epochs`` take."""
    epochs: float = 3.0
    batch: int = 16
    """Examples of one step, of all processes together."""
    micro: int = 4
    """Examples that one process holds at once."""
    rate: float = 1e-3
    """Highest learning rate (AdamW), after ``warmup``; it falls as a cosine to nothing."""
    warmup: float = 0.05
    """Share of the steps."""
    decay: float = 0.01
    """Weight decay of the matrices."""
    clip: float = 1.0
    """Norm that gradients are cut to."""
    precision: Precision = "auto"
    recompute: bool = False
    """Gradient checkpointing: less memory for a third more work."""
    checks: int = 10
    """How often the held-out loss is taken, evenly spread; each is also a place to go on from."""
    patience: int = 3
    """Checks without a better held-out loss after which training ends; 0: never. The best weights are kept."""
    seed: int = 0


ARTICLE = Recipe(
    objective=Objective(alpha=0.7, temperature=2.0),
    lora=Lora(),
    rate=2e-4,
    recompute=True,
)
"""The article's: T = 2, 0.7 CE + 0.3 KL, LoRA 64/128, 4 × 4 examples of 1024 tokens, three epochs, a tenth held out."""

PRESETS: Mapping[str, Recipe] = {
    "default": Recipe(),
    "article": ARTICLE,
    "hard-labels": replace(Recipe(), objective=Objective(alpha=1.0)),
}


def checked(recipe: Recipe) -> Recipe:
    """The recipe itself. Raises BadInput with all that is out of range, as a file may have it."""
    goal = recipe.objective
    rules = (
        (0 <= goal.alpha <= 1, f"alpha {goal.alpha:g} is not between 0 and 1"),
        (goal.temperature > 0, f"temperature {goal.temperature:g} is not above 0"),
        (goal.hidden >= 0, f"hidden {goal.hidden:g} is below 0"),
        (recipe.length >= 2, f"length {recipe.length} leaves nothing to predict"),
        (0 < recipe.held_out < 1, f"held_out {recipe.held_out:g} is not between 0 and 1"),
        (recipe.steps is None or recipe.steps >= 1, f"steps {recipe.steps} are none"),
        (recipe.epochs > 0, f"epochs {recipe.epochs:g} are none"),
        (recipe.micro >= 1, f"micro {recipe.micro} holds no example"),
        (recipe.batch >= 1, f"batch {recipe.batch} has no example"),
        (recipe.rate > 0, f"rate {recipe.rate:g} is not above 0"),
        (0 <= recipe.warmup <= 1, f"warmup {recipe.warmup:g} is not between 0 and 1"),
        (recipe.decay >= 0, f"decay {recipe.decay:g} is below 0"),
        (recipe.clip > 0, f"clip {recipe.clip:g} is not above 0"),
        (recipe.checks >= 1, f"checks {recipe.checks} are none"),
        (recipe.patience >= 0, f"patience {recipe.patience} is below 0"),
        (recipe.lora is None or recipe.lora.rank >= 1, "lora has no rank"),
        (recipe.lora is None or bool(recipe.lora.targets), "lora has no targets"),
    )
    wrong = [text for holds, text in rules if not holds]
    if wrong:
        raise BadInput("; ".join(wrong), hint="docs/distilling.md lists what a recipe may hold")
    return recipe
