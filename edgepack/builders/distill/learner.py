"""The model that a training step calls: a student that returns the sums of its losses over the tokens of responses.

Everything from token ids to losses is one forward pass of one module, so that whatever splits or copies modules over
processes (FSDP, DDP) does with it as with any model; logits are made of response positions only, some at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgepack.builders.distill import Lora, Objective
from edgepack.builders.distill.loss import Online, Soft, chunk, chunked, combined, head, select, verify_head
from edgepack.errors import BadInput, Unsupported

IGNORED = -100
"""The label of a token that is no target, as in transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What the kept rows of a teacher were made with; equal for all parts."""

    temperature: float
    vocabulary: int


class Learner(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """A student and, to match hidden states, the projection of its own into the teacher's."""

    accepts_loss_kwargs = True
    """For the Trainer: the loss is a sum that is divided by the number of targets in the whole batch."""

    def __init__(
        self,
        student: Any,
        objective: Objective,
        *,
        source: Source | None = None,
        teacher: Any = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.source = source
        self.chunk = chunk(vocabulary(student))
        self._no_split_modules = student._no_split_modules
        self._teacher = (teacher,)  # in a tuple: neither trained, nor saved, nor split
        self.projection = None
        self.layers: tuple[int, ...] = ()
        if teacher is not None and objective.hidden:
            self.layers = matched(student, teacher, layers)
            self.projection = projection(width(student), width(teacher))

    @property
    def teacher(self) -> Any:
        return self._teacher[0]

    def place(self, device: torch.device) -> None:
        """Moves the teacher to where the student computes."""
        if self.teacher is not None:
            self.teacher.to(device)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        ids: Tensor | None = None,
        logits: Tensor | None = None,
        lse: Tensor | None = None,
        lse_t: Tensor | None = None,
    ) -> Tensor:
        """Sums [3] over the targets of a batch: cross entropy, divergence, and distance of hidden states.

        ``input_ids`` and ``labels`` [batch, length]: a label is the token itself where it is a target, else IGNORED.
        Padding is on the right, where no token attends to it, so there is no mask. ``ids``, ``logits`` [n, k], ``lse``
        and ``lse_t`` [n]: the teacher's kept rows of all n targets, in their order.
        """
        targets = labels != IGNORED
        matching = self.projection is not None
        output = body(self.student)(input_ids=input_ids, use_cache=False, output_hidden_states=matching)
        states, tokens = select(output.last_hidden_state, input_ids, targets)
        soft: Soft | Online | None = None
        distance = states[:0].float().sum()
        if ids is not None and logits is not None and lse is not None and lse_t is not None:
            soft = self._kept(ids, logits, lse, lse_t)
        elif self.teacher is not None:
            with torch.no_grad():
                told = body(self.teacher)(input_ids=input_ids, use_cache=False, output_hidden_states=matching)
            if self.objective.alpha < 1 or not self.training:
                soft = Online(
                    hidden=select(told.last_hidden_state, input_ids, targets)[0],
                    head=head(self.teacher),
                    vocabulary=min(vocabulary(self.teacher), vocabulary(self.student)),
                )
            if self.projection is not None:
                pairs = zip(output.hidden_states[1:], self.layers, strict=True)
                for mine, layer in pairs:
                    own = select(mine, input_ids, targets)[0]
                    theirs = select(told.hidden_states[layer + 1], input_ids, targets)[0]
                    distance = distance + relative_distance(self.projection(own), theirs)
                distance = distance / len(self.layers)
        entropy, divergence = chunked(
            states, head(self.student), tokens, soft, self.objective, chunk=self.chunk
        )
        return torch.stack([entropy, divergence, distance])

    def loss(self, sums: Tensor) -> Tensor:
        """The objective of sums [3] or means [3]."""
        loss = combined(sums[0], sums[1], self.objective)
        return loss + self.objective.hidden * sums[2] if self.layers else loss

    def _kept(self, ids: Tensor, logits: Tensor, lse: Tensor, lse_t: Tensor) -> Soft:
        if self.source is None:
            raise BadInput("there are rows of a teacher and nothing says what they were made with")
        return Soft(
            ids=ids.long(),
            logits=logits,
            lse=lse,
            lse_t=lse_t,
            temperature=self.source.temperature,
            vocabulary=self.source.vocabulary,
        )


def load(folder: Path, dtype: torch.dtype, *, attention: str) -> Any:
    """A causal language model of a Hugging Face folder.

    Raises BadInput where weights are missing, Unsupported where transformers does not know it, or `loss.head` its head.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise Unsupported(f"transformers does not load {folder.name}: {error}") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise BadInput(f"{folder} has no weights for {missing[0]} and {len(missing) - 1} more")
    verify_head(model, folder.name)
    return model


def adapt(student: Any, lora: Lora) -> Any:
    """A peft model around ``student`` with low-rank updates of the modules named ``lora.targets``; the rest is frozen.

    Raises BadInput where none is called so.
    """
    from peft import LoraConfig, get_peft_model

    linear = {
        name.rpartition(".")[2]
        for name, module in student.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    unknown = sorted(set(lora.targets) - linear)
    if unknown:
        raise BadInput(
            f"{type(student).__name__} has no matrix called {unknown[0]}",
            hint=f"it has {', '.join(sorted(linear))}",
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(student, config)


def body(model: Any) -> Any:
    """The model without its head; what it returns has ``last_hidden_state``."""
    return model.base_model


def vocabulary(model: Any) -> int:
    """Ids that the model has logits for."""
    return int(model.get_output_embeddings().weight.shape[0])


def width(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def depth(model: Any) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def matched(student: Any, teacher: Any, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The teacher's layer, from 0, of each of the student's. Raises BadInput for a map that does not fit."""
    own, theirs = depth(student), depth(teacher)
    if layers is None:
        return tuple(round(i * (theirs - 1) / (own - 1)) if own > 1 else theirs - 1 for i in range(own))
    if len(layers) != own or not all(0 <= layer < theirs for layer in layers):
        raise BadInput(
            f"a map of {len(layers)} layers to {max(layers, default=0) + 1} does not go with a student of {own} and a "
            f"teacher of {theirs}"
        )
    return tuple(layers)


def projection(own: int, theirs: int) -> torch.nn.Linear:
    """One for all layers, as all add to one residual stream: the identity where sizes are equal, else orthogonal."""
    found = torch.nn.Linear(own, theirs, bias=False)
    if own == theirs:
        torch.nn.init.eye_(found.weight)
    else:
        torch.nn.init.orthogonal_(found.weight)
    return found


def relative_distance(own: Tensor, theirs: Tensor) -> Tensor:
    """Sum over n of |own - theirs|² / |theirs|², of [n, H]: tokens with large states do not outweigh all others."""
    theirs = theirs.float()
    squared = (own.float() - theirs).square().sum(-1)
    return (squared / theirs.square().sum(-1).clamp(min=1e-6)).sum()


def trainable(model: torch.nn.Module) -> Iterable[tuple[str, Tensor]]:
    """What is learned, each once: a matrix that two names share comes under the first."""
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
