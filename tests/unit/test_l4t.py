"""Software by L4T: what the tables say, and nothing for a release that they do not."""

from __future__ import annotations

import pytest

from edgepack import l4t


@pytest.mark.parametrize(
    ("text", "version", "name", "cuda", "ubuntu"),
    [
        ("# R36 (release), REVISION: 4.7, GCID: 1", "36.4.7", "L4T r36.4.7 (JetPack 6.2.1)", "12.6", "22.04"),
        ("# R36 (release), REVISION: 5.0, GCID: 1", "36.5.0", "L4T r36.5.0 (JetPack 6.2.2)", "12.6", "22.04"),
        ("# R36 (release), REVISION: 3.0, GCID: 1", "36.3.0", "L4T r36.3.0 (JetPack 6.0)", "12.4", "22.04"),
        ("# R35 (release), REVISION: 4.1, GCID: 1", "35.4.1", "L4T r35.4.1 (JetPack 5.1.2)", "11.4", "20.04"),
        ("# R38 (release), REVISION: 2.0, GCID: 1", "38.2.0", "L4T r38.2.0 (JetPack 7.0)", "13.0", "24.04"),
        ("# R39 (release), REVISION: 2.1, GCID: 1", "39.2.1", "L4T r39.2.1", "13.2", "24.04"),
        ("# R40 (release), REVISION: 0.0, GCID: 1", "40.0.0", "L4T r40.0.0", None, None),
        ("# R32 (release), REVISION: 7.6, GCID: 1", "32.7.6", "L4T r32.7.6 (JetPack 4.6.6)", None, None),
    ],
)
def test_a_release_has_the_software_of_the_tables(
    text: str, version: str, name: str, cuda: str | None, ubuntu: str | None
) -> None:
    found = l4t.release(text)

    assert found == version
    assert (l4t.name(version), l4t.cuda(version), l4t.ubuntu(version)) == (name, cuda, ubuntu)


@pytest.mark.parametrize("text", ["", "# R36 (release)", "REVISION: 4.7", "R36 (release), REVISION: "])
def test_a_text_without_a_release_says_none(text: str) -> None:
    assert l4t.release(text) is None
