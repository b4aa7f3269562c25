"""Distillation: how a student is trained, as values, and the modules that do each part of it in processes of their own.

`examples` turns a user's data into tokens, `prune` makes a student out of its teacher, `teacher` keeps what the teacher
says of every token, `train` teaches the student, and `measure` says how much of the gap between them was closed.
Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

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
