"""The built-in family for tests: models not trained yet are stood in for by their shapes and a likely score."""

from __future__ import annotations

import json

from edgepack import catalog, modelspec, students
from edgepack.catalog import CatalogModel

STAND_INS = {"demo-half": ("layers=3", 28.0), "demo-quarter": ("layers=3,ffn=256", 24.0)}


def family() -> tuple[CatalogModel, ...]:
    """The teacher, the half and the quarter, as a user's catalog would name them."""
    teacher = catalog.find("demo")
    assert teacher is not None
    return (teacher, *(catalog.find(name) or _stand_in(name) for name in STAND_INS))


def _stand_in(name: str) -> CatalogModel:
    teacher = catalog.built_in()["demo"]
    how, score = STAND_INS[name]
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    smaller = students.shrunk(config, students.parse(how))
    return CatalogModel(
        id=name,
        repo=name,
        license="Apache-2.0",
        commercial=True,
        config=smaller,
        parameters=modelspec.from_config(smaller, name=name).parameters,
        teacher="demo",
        panels={"demo_heldout": {"next_token": score}},
    )
