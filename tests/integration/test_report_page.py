"""The report in a real browser: quiet, alone, reachable by keyboard; whole on small, large, dark and printed pages."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgepack import check, serde
from edgepack.cli import cli
from tests.unit.test_check import judged, recorded_plan

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three subjects with long names: a plan with its reasons, another, and a third with its check."""
    folder = tmp_path_factory.mktemp("report")
    for name, words in (("plan", "jetson-orin --explain"), ("other", "x86-laptop --runtime onnx-genai")):
        made = CliRunner().invoke(cli, ["plan", "--model", "demo", "--json", "--profile", *words.split()])
        (folder / f"{name}.json").write_text(made.stdout, encoding="utf-8")
    (folder / "checked.json").write_text(serde.to_json(recorded_plan()), encoding="utf-8")
    (folder / "check.json").write_text(json.dumps(check.to_document(judged({}))), encoding="utf-8")
    given = [folder / f"{name}.json" for name in ("plan", "other", "checked", "check")]
    asked = ["-q", "report", *given, "-o", folder / "report.html"]
    assert CliRunner().invoke(cli, [str(word) for word in asked]).exit_code == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program is not None, "no Chromium: scripts/system_tools.sh installs it"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


class Seen:
    """A page in the browser, and all that it said and asked for."""

    def __init__(self, browser: Any, file: Path, *, width: int, dark: bool = False) -> None:
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def picture(self) -> Any:
        """Height by width by 4 channels, of the first screen."""
        from matplotlib.image import imread

        return imread(io.BytesIO(self.page.screenshot()))


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, False), (1280, True)])
def test_the_page_is_quiet_alone_and_no_wider_than_the_window(
    browser: Any, page_file: Path, width: int, dark: bool
) -> None:
    seen = Seen(browser, page_file, width=width, dark=dark)

    picture = seen.picture()

    assert seen.said == []
    assert seen.asked == [page_file.as_uri()]
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    assert picture.std() > 0.05
    assert (picture[0, 0, :3].mean() < 0.2) == dark
    drawn = seen.page.evaluate(
        "[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect()).map(b => [b.width, b.height])"
    )
    assert len(drawn) >= 3
    assert all(200 < wide <= width and tall > 60 for wide, tall in drawn)
    needed, there = seen.page.evaluate(
        "(e => [e.scrollWidth, e.clientWidth])(document.querySelector('[aria-labelledby=compared] .scroll'))"
    )
    assert needed == there or width < 1280
    seen.context.close()


def test_everything_that_can_be_used_is_reached_by_keyboard(browser: Any, page_file: Path) -> None:
    seen = Seen(browser, page_file, width=1280)
    usable = seen.page.evaluate(
        "[...document.querySelectorAll('a,summary,[tabindex=\"0\"]')].filter(e => e.checkVisibility()).length"
    )

    reached = []
    for _ in range(usable):
        seen.page.keyboard.press("Tab")
        reached.append(
            seen.page.evaluate(
                "(e => (e.dataset.at ||= String(Math.random()), [e.tagName, e.dataset.at, "
                "getComputedStyle(e).outlineStyle]))(document.activeElement)"
            )
        )

    assert reached[0][0] == "A"
    assert seen.page.evaluate("document.querySelector('.skip').getAttribute('href')") == "#main"
    assert len({at for _, at, _ in reached}) == usable
    assert all(outline != "none" for _, _, outline in reached)
    assert {"A", "DIV", "SUMMARY"} <= {tag for tag, _, _ in reached}
    seen.context.close()


def test_what_is_folded_is_printed(browser: Any, page_file: Path) -> None:
    seen = Seen(browser, page_file, width=1280)
    tall = "[...document.querySelectorAll('details table')].map(e => e.checkVisibility({contentVisibilityAuto: true}))"
    assert not any(seen.page.evaluate(tall))

    seen.page.emulate_media(media="print")

    assert seen.page.evaluate(tall)
    assert all(seen.page.evaluate(tall))
    assert seen.page.pdf().startswith(b"%PDF")
    seen.context.close()
