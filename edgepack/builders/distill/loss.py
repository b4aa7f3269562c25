"""The loss of distillation, in nats a token: cross entropy with the data, and divergence from what the teacher says.

alpha · CE + (1 - alpha) · T² · D, where D compares both sides' distributions at temperature T (Hinton, Vinyals and
Dean, arXiv 1503.02531, section 2: gradients of D scale with 1/T², hence the factor). Everything here is a value of one
token; who calls it adds over tokens and divides by their number, never by that of examples, positions or ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from edgepack.builders.distill import Divergence, Objective
from edgepack.errors import BadInput, Unsupported

if TYPE_CHECKING:
    from edgepack.builders.distill.teacher import Rows

Head = Callable[[Tensor], Tensor]
"""[n, hidden] of a model's last hidden states -> [n, vocabulary] of its logits."""

CHUNK_VALUES = 1 << 24
"""Logits that are held at once, 64 MiB in 32 bits; a few copies of them are alive in the backward pass."""
_PROBE = 8
"""Tokens on which a model's own logits are compared with `head`'s."""
_APART, _APART_IN_16_BITS = 1e-3, 0.02
"""What the two may be apart, of the largest logit; a forgotten scale or cap is orders off."""
SMALLEST_TAIL = 2.0**-24
"""Mass of a teacher's tail below which it counts as this: what is kept in 32 bits could not tell it from none, of which
a student that has some would be infinitely far by the reverse divergence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Soft:
    """What a teacher says of n tokens: its k most likely outcomes, and all others together as one, the tail."""

    ids: Tensor
    """int64 [n, k], below ``vocabulary``."""
    logits: Tensor
    """[n, k], as they are before the temperature."""
    lse: Tensor
    """[n]: log-sum-exp of the logits of the whole vocabulary."""
    lse_t: Tensor
    """[n]: of the logits divided by ``temperature``."""
    temperature: float
    vocabulary: int
    """The ids from 0 that the distributions are over; a student's logits beyond are padding."""

    @classmethod
    def of(cls, rows: Rows, device: torch.device | str = "cpu") -> Soft:
        return cls(
            ids=torch.from_numpy(rows.ids).to(device).long(),
            logits=torch.from_numpy(rows.logits).to(device),
            lse=torch.from_numpy(rows.lse).to(device),
            lse_t=torch.from_numpy(rows.lse_t).to(device),
            temperature=rows.temperature,
            vocabulary=rows.vocabulary,
        )

    def __getitem__(self, part: slice) -> Soft:
        return replace(
            self, ids=self.ids[part], logits=self.logits[part], lse=self.lse[part], lse_t=self.lse_t[part]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Online:
    """A teacher beside the student: its logits are made a chunk at a time, and never kept."""

    hidden: Tensor
    """[n, the teacher's hidden size]."""
    head: Head
    vocabulary: int
    """The ids from 0 that count, as in Soft."""

    def __getitem__(self, part: slice) -> Online:
        return replace(self, hidden=self.hidden[part])

    def logits(self) -> Tensor:
        """[n, vocabulary]"""
        with torch.no_grad():
            return self.head(self.hidden)[:, : self.vocabulary]


def select(states: Tensor, tokens: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
    """The states that predict a token of a response, and that token: [n, …] of [batch, length, …], and int64 [n].

    ``tokens`` and ``response`` (True: a target) are [batch, length]. The state at a position predicts the next token:
    this is the one place where the two are shifted against each other. Padding is no response.
    """
    wanted = response[:, 1:].bool()
    return states[:, :-1][wanted], tokens[:, 1:][wanted].long()


def head(model: Any) -> Head:
    """What makes logits of a transformers model's last hidden states, with what its config scales and caps them by.

    Raises Unsupported for a model without an output matrix.
    """
    output = model.get_output_embeddings()
    config = model.config.get_text_config()
    if output is None:
        raise Unsupported(f"{type(model).__name__} has no output matrix that makes logits")
    # Cohere multiplies, Granite divides, Gemma caps (transformers: modeling_cohere, modeling_granite, modeling_gemma2).
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        found = output(hidden)
        if scale != 1.0:
            found = found * scale
        return torch.tanh(found / cap) * cap if cap else found

    return logits


def verify_head(model: Any, name: str) -> None:
    """Raises Unsupported where a model makes its logits in a way that `head` does not know."""
    training = model.training
    model.eval()
    with torch.no_grad():
        ids = torch.arange(_PROBE, device=model.device)[None] % model.config.get_text_config().vocab_size
        own = model(input_ids=ids, use_cache=False).logits.float()
        made = head(model)(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    model.train(training)
    if bool((own.isnan() & made.isnan()).all()):
        return  # weights that are no numbers: whoever reads the data says at which token
    apart = float((own - made).abs().max() / own.abs().max().clamp(min=1e-6))
    if apart < (_APART if model.dtype is torch.float32 else _APART_IN_16_BITS):
        return
    raise Unsupported(
        f"{name} ({type(model).__name__}) makes its logits in a way that is not known here: they are {apart:.2g} off",
        hint="known are logits that are a matrix times the last hidden states, scaled or capped",
    )


def token_losses(
    logits: Tensor, targets: Tensor, soft: Soft | Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """(cross entropy [n], divergence from the teacher [n]) of a student's ``logits`` [n, V], before alpha and T².

    ``targets``: int64 [n], the data's tokens. ``soft``: what was kept of a teacher, or all its logits [n, V'], of which
    the ids that both have are compared: the others are cut before any softmax. None: the divergence is 0. Raises
    BadInput where what was kept is of another temperature or of more ids than the student has.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    entropy = functional.cross_entropy(logits, targets, reduction="none")
    if soft is None:
        return entropy, torch.zeros_like(entropy)
    if isinstance(soft, Soft):
        teacher, student = _buckets(logits, soft, objective.temperature)
    else:
        common = min(logits.shape[1], soft.shape[1])
        teacher = (soft[:, :common].to(logits.dtype) / objective.temperature).log_softmax(1)
        student = (logits[:, :common] / objective.temperature).log_softmax(1)
    return entropy, _divergence(teacher.detach(), student, objective.divergence)


def combined(entropy: Tensor, divergence: Tensor, objective: Objective) -> Tensor:
    """alpha · CE + (1 - alpha) · T² · divergence, of tokens or of their sums."""
    soft = (1 - objective.alpha) * objective.temperature**2
    return objective.alpha * entropy + soft * divergence


def chunked(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    soft: Soft | Online | Tensor | None,
    objective: Objective,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Sums over n of both `token_losses`, of hidden states [n, H]; ``chunk`` rows of logits are held at once.

    The backward pass makes each chunk's logits again instead of keeping them, unless all are of one chunk. Sums of no
    rows are zeros that can be differentiated.
    """
    if 0 < len(hidden) <= chunk:
        return _sums(hidden, head, targets, soft, objective)
    entropy = divergence = hidden[:0].float().sum()
    for first in range(0, len(hidden), chunk):
        part = slice(first, first + chunk)
        more, apart = checkpoint(
            _sums, hidden[part], head, targets[part], None if soft is None else soft[part], objective,
            use_reentrant=False,
        )  # fmt: skip
        entropy, divergence = entropy + more, divergence + apart
    return entropy, divergence


def chunk(vocabulary: int) -> int:
    """Rows of logits over ``vocabulary`` that fit in CHUNK_VALUES."""
    return max(1, CHUNK_VALUES // vocabulary)


def _sums(
    hidden: Tensor, head: Head, targets: Tensor, soft: Soft | Online | Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    teacher = soft.logits() if isinstance(soft, Online) else soft
    entropy, divergence = token_losses(head(hidden), targets, teacher, objective)
    return entropy.sum(), divergence.sum()


def _buckets(logits: Tensor, soft: Soft, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n, k + 1] of teacher and student: k outcomes and the tail; [n, k] where these are all ids.

    The student's tail is the log-sum-exp of its other logits: exact however small it is, and so is its gradient.
    """
    if temperature not in (1.0, soft.temperature):
        raise BadInput(
            f"the teacher was kept for the temperatures 1 and {soft.temperature:g}, not for {temperature:g}",
            hint="keep it again at this temperature",
        )
    if soft.vocabulary > logits.shape[1]:
        raise BadInput(
            f"the teacher was kept over {soft.vocabulary} ids and the student has {logits.shape[1]}",
            hint="keep it again over the ids that both have",
        )
    scaled = logits[:, : soft.vocabulary] / temperature
    inside = scaled.gather(1, soft.ids)
    lse = soft.lse if temperature == 1.0 else soft.lse_t
    # In doubles: a small tail is the difference of two numbers that are nearly equal.
    teacher = soft.logits.double() / temperature - lse.double()[:, None]
    if soft.ids.shape[1] == soft.vocabulary:
        return teacher.log_softmax(1).to(logits.dtype), inside.log_softmax(1)
    tail = (-torch.expm1(teacher.logsumexp(1, keepdim=True))).clamp(min=SMALLEST_TAIL).log()
    outside = scaled.scatter(1, soft.ids, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([teacher, tail], 1).to(logits.dtype), torch.cat([inside, outside], 1).log_softmax(1)


def _divergence(teacher: Tensor, student: Tensor, kind: Divergence) -> Tensor:
    """[n] nats between log-probabilities [n, outcomes]."""
    if kind == "forward":
        return _kl(teacher, student)
    if kind == "reverse":
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher, student) - math.log(2)
    return (_kl(teacher, mixture) + _kl(student, mixture)) / 2


def _kl(of: Tensor, against: Tensor) -> Tensor:
    return (of.exp() * (of - against)).sum(1)
