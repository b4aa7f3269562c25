"""Bundles of the runtimes beside llama.cpp, by hand: a model's folder, server.json and a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgepack import serde
from edgepack.bundle import oci, sign
from edgepack.plan import Plan
from edgepack.workspace import sha256_file


def bundle(
    plan: Plan,
    model: Path,
    out: Path,
    *,
    args: Sequence[str],
    env: Mapping[str, str] | None = None,
    selftest: Mapping[str, object] | None = None,
    app: Path | None = None,
    key: Path | None = None,
) -> Path:
    """Writes the bundle of a model's folder; ``app``: the server's code that it carries, ``key``: who signs it."""
    server = {"schema_version": 1, "runtime": plan.runtime, "args": list(args), "env": dict(env or {})}
    small = [
        oci.text_layer("plan.json", "weight.config", serde.to_json(plan)),
        oci.text_layer("server.json", "weight.config", json.dumps(server)),
        oci.text_layer("selftest.json", "weight.config", json.dumps(selftest or {"probes": []})),
    ]
    if app is not None:
        small += [
            oci.text_layer(
                f"edgepack_server/{path.relative_to(app)}", "code", path.read_text(encoding="utf-8")
            )
            for path in sorted(app.rglob("*.py"))
        ]
    files = sorted(
        (path for path in model.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    folder = [
        oci.Layer(
            filepath=f"model/{path.relative_to(model)}", kind="weight" if path is files[-1] else "weight.config",
            content=path, sha256=sha256_file(path), bytes=path.stat().st_size,
        )
        for path in files
    ]  # fmt: skip
    image = oci.Image(
        name="served", config={}, annotations={"org.opencontainers.image.ref.name": "served"},
        layers=(*small, *folder),
    )  # fmt: skip
    oci.write(out, image, sign=None if key is None else lambda digest: sign.sign(key, digest))
    return out
