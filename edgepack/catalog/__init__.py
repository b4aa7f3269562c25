"""The models edgepack knows by name: where they are, how they may be used, how good they were measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from edgepack import modelspec, serde
from edgepack.degradation import Measure

MODELS = Path(__file__).parent.parent / "models"
"""Hugging Face folders that the package itself carries, each by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One source's own table of scores; scores compare within a panel and nowhere else."""

    name: str
    source: str
    benchmarks: tuple[str, ...]
    measure: Measure = "answers"
    """How its scores fall with a model's loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogModel:
    id: str
    repo: str
    """Hugging Face repository, or name of a built-in model."""
    revision: str | None = None
    """Pinned commit; None when it is only known once fetched, which the plan warns about."""
    license: str
    """SPDX identifier where there is one, else the Hub's tag."""
    commercial: bool
    """The licence allows commercial use, perhaps on conditions."""
    config: Mapping[str, object] = field(default_factory=dict)
    """Fields of the Hugging Face config.json that decide shapes and positions."""
    parameters: int = 0
    """Weights, tied embeddings counted once."""
    teacher: str | None = None
    """The model it was distilled from, where its makers say so."""
    panels: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Panel -> benchmark -> score in percent."""

    def spec(self) -> modelspec.ModelSpec:
        """Every tensor and KV layer. Raises Unsupported for an architecture that is not known."""
        return modelspec.from_config(self.config, name=self.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    models: tuple[CatalogModel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Panels:
    panels: tuple[Panel, ...]


@cache
def models() -> tuple[CatalogModel, ...]:
    """All models, by family and then by size; of the built-in ones those whose files are here."""
    here = Path(__file__).parent
    families = [path for path in sorted(here.glob("*.yaml")) if path.name != "panels.yaml"]
    listed = tuple(model for path in families for model in serde.load_yaml(_Family, path).models)
    own = built_in()
    return tuple(
        _with_own_config(model, own[model.repo]) if model.repo in own else model
        for model in listed
        if model.repo in own or "/" in model.repo  # a checkout before a model's training lacks its folder
    )


def read(path: Path) -> tuple[CatalogModel, ...]:
    """The models of a user's YAML file of the same form. Raises NotFound, and BadInput with every problem."""
    return serde.load_yaml(_Family, path).models


@cache
def panels() -> Mapping[str, Panel]:
    """All panels by name, best source first."""
    return {p.name: p for p in serde.load_yaml(_Panels, Path(__file__).parent / "panels.yaml").panels}


def allows_commerce(license: str) -> bool:
    """Whether a licence, or each that an expression names, is not known to forbid commercial use.

    By its name: one of the catalog's that do, or one with a word for it (CC-BY-NC-4.0, MNPL-0.1, …-research).
    """
    name = license.lower()
    forbidding = {model.license.lower() for model in models() if not model.commercial}
    return not any(other in name for other in forbidding) and _NOT_FOR_SALE.search(name) is None


_NOT_FOR_SALE = re.compile(r"(?<![a-z])(?:nc|non-?commercial|non-?production|research|mnpl|mrl)(?![a-z])")


def find(name: str, extra: Sequence[CatalogModel] = ()) -> CatalogModel | None:
    """The model with this id or repository, in any case, ``extra`` first; None when there is none."""
    wanted = name.lower()
    return next((m for m in (*extra, *models()) if wanted in (m.id.lower(), m.repo.lower())), None)


def built_in() -> Mapping[str, Path]:
    """Name -> Hugging Face folder of each model that the package itself carries."""
    return {config.parent.name: config.parent for config in sorted(MODELS.glob("*/config.json"))}


def _with_own_config(model: CatalogModel, folder: Path) -> CatalogModel:
    config = serde.read_object(folder / "config.json")
    spec = modelspec.from_config(config, name=model.id)
    return replace(model, config=config, parameters=spec.parameters)
