"""A report as one HTML page that needs nothing else, as Markdown, as JSON, or as one SVG; the same bytes each time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from edgepack import serde
from edgepack.bundle.render import templates
from edgepack.errors import BadInput
from edgepack.report import Report, pages, plots
from edgepack.report.colors import variables
from edgepack.report.pages import Section, Table
from edgepack.report.plots import Drawing
from edgepack.screen import plain

Format = Literal["html", "md", "json", "svg"]
FORMATS: tuple[Format, ...] = ("html", "md", "json", "svg")


def render(report: Report, form: Format) -> str:
    """The report in this form. HTML and SVG raise MissingTool without Matplotlib."""
    match form:
        case "html":
            return html(report)
        case "md":
            return markdown(report)
        case "json":
            # ASCII, so that a file name that is no text can be written too.
            return json.dumps(serde.dump(report), indent=2, sort_keys=True, allow_nan=False) + "\n"
        case "svg":
            return svg(report)


def html(report: Report) -> str:
    """One page: no script, nothing fetched, light and dark, to be printed; strangers' text is text in it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(templates() / "report", encoding="utf-8"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    drawn = {
        name: Markup(one.svg) for name, one in _drawn(report).items()
    }  # ours: plots.py escapes what is in it
    return environment.get_template("report.html.j2").render(
        report=report,
        compared=pages.comparison(report),
        subjects=[(one, list(pages.sections(one))) for one in report.subjects],
        drawn=drawn,
        variables=Markup(variables()),
        units=pages.UNITS,
    )


def markdown(report: Report) -> str:
    """The words and tables, for a wiki, an issue or a terminal."""
    lines = [f"# {_words(report.title)}", ""]
    compared = pages.comparison(report)
    if compared is not None:
        lines += _section(compared, "##")
    for subject in report.subjects:
        if compared is not None:
            lines += [f"## {subject.letter}: {_words(subject.name)}", ""]
        for section in pages.sections(subject):
            lines += _section(section, "##" if compared is None else "###")
    lines += [f"{_words(report.tool)}. {pages.UNITS}"]
    return "\n".join(lines) + "\n"


def svg(report: Report) -> str:
    """All drawings, one below the other. Raises BadInput when the inputs give none."""
    drawn = list(_drawn(report).values())
    if not drawn:
        raise BadInput("there is nothing to draw in this report", hint="name a plan or a bundle")
    return plots.standalone(drawn)


def _drawn(report: Report) -> Mapping[str, Drawing]:
    compared = plots.compared(report.subjects)
    found = [] if compared is None else [compared]
    found += [drawing for subject in report.subjects for drawing in plots.drawings(subject)]
    return {drawing.name: drawing for drawing in found}


def _section(section: Section, level: str) -> Sequence[str]:
    lines = [f"{level} {section.title}", ""]
    if section.badge is not None:
        lines += [f"**{_words(section.badge.words)}**", ""]
    for words in section.words:
        lines += [_words(words), ""]
    for table in section.tables:
        lines += [f"*{_words(table.caption)}*", "", *_table(table), ""]
    return lines


def _table(table: Table) -> Sequence[str]:
    edges = ["---:" if at in table.numeric else "---" for at in range(len(table.head))]
    return [
        _row(table.head),
        _row(edges, escaped=False),
        *(_row([entry.words for entry in row]) for row in table.rows),
    ]


def _row(cells: Sequence[str], *, escaped: bool = True) -> str:
    return f"| {' | '.join(_words(cell) if escaped else cell for cell in cells)} |"


_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$&])")


def _words(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(plain(text).split()))
