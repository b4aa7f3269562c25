"""The pages' links lead somewhere, their commands are spelled as the command line reads them, their tables are true."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from edgepack import check, pipeline
from edgepack.cli import ANYWHERE, cli
from edgepack.runtimes import llama_cpp
from edgepack.units import show
from tests import pages
from tests.pages import PAGES, ROOT, Command

COMMANDS = [command for page in PAGES for command in pages.commands(page) if command.words[0] == "edgepack"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_anchor_leads_somewhere(page: Path) -> None:
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        to = (page.parent / path).resolve() if path else page

        assert to.exists(), f"{page.name}: {link}"
        assert to.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in pages.anchors(to), f"{page.name}: {link}"


def test_every_page_is_in_the_index() -> None:
    listed = {link.partition("#")[0] for link in pages.links(ROOT / "docs" / "README.md")}

    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= listed


def test_every_command_has_its_row_in_the_readme() -> None:
    rows = re.findall(r"^\| `([a-z]+)` \| ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)

    assert sorted(rows) == sorted(cli.commands)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.text}")
def test_the_command_line_reads_every_command_with_all_its_options(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captured" / "jetson").mkdir(parents=True)
    (tmp_path / "device").mkdir()
    words = [word for word in command.words[1:] if word not in ANYWHERE]
    asked: click.Command = cli
    while isinstance(asked, click.Group):
        assert words[0] in asked.commands, command.text
        asked = asked.commands[words.pop(0)]

    context = asked.make_context(asked.name, words)

    assert context.command is asked


def test_a_check_reports_rows_are_all_explained() -> None:
    source = Path(check.__file__).read_text(encoding="utf-8")
    rows = set(re.findall(r'name="([a-z ,]+)"', source)) | set(
        re.findall(r'(?:_free|_within)\([^"\n]*"([a-z ]+)"', source)
    )
    parts = {"weights", "kv_cache", "recurrent_state", "compute", "output"}
    page = (ROOT / "docs" / "check-report.md").read_text(encoding="utf-8")
    explained = {
        name for cell in re.findall(r"^\| (`.+?) \|", page, re.M) for name in re.findall(r"`([^`]+)`", cell)
    }

    assert {"integrity", "free disk", "decode, context full", "host budget"} <= rows
    assert rows | parts | {name for name, _ in check._POOL.values()} <= explained


def test_the_caches_of_many_users_are_as_the_page_says() -> None:
    page = (ROOT / "docs" / "arithmetic.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `([\w.-]+)` \| (\d+) \| (\d+) \| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", page, re.M
    )

    assert len(rows) == 5
    for name, layers, heads, kv_heads, *caches in rows:
        spec = pipeline.named(name).spec
        assert (spec.layers, spec.heads, spec.kv_heads) == (int(layers), int(heads), int(kv_heads)), name
        assert caches == [
            show(llama_cpp.kv_bytes(
                spec, llama_cpp.cpu_settings(context=1024 * users, slots=users, kv_type=kv_type)
            ))
            for users, kv_type in ((1, "f16"), (64, "f16"), (64, "q8_0"))
        ], name  # fmt: skip


def test_lines_are_compared_in_order_with_what_is_left_out() -> None:
    printed = "wrote  a.tar\nsent 10.1 KiB in 0.5 s\nok\n"

    assert pages.missing(("wrote a.tar", "…", "ok"), printed, figures=True) is None
    assert pages.missing(("…", "sent 9 MiB in 12 s", "ok"), printed, figures=False) is None
    assert pages.missing(("…", "sent 9 MiB in 12 s", "ok"), printed, figures=True) is not None
    assert pages.missing(("ok", "…"), printed, figures=True) == "ok"
    assert pages.missing(("wrote …",), printed, figures=True) == "and after that: sent 10.1 KiB in 0.5 s"
