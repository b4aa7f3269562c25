"""Devices beside a service manager of ours (tests/services.py), and the agent with a change in it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from edgepack.device import installer
from tests import services
from tests.releases import Device

PATIENCE = "EDGEPACK_TEST_PATIENCE"
"""The variable with the seconds that an agent beside a service manager of ours waits for it."""
PLACED = (
    ("timeout=3600,\n", f'timeout=float(os.environ.get("{PATIENCE}", "3600")),\n'),
    *(
        (f'    {name}: str = "{path}"\n', f'    {name}: str = os.environ["{services.PLACE}"] + "/units"\n')
        for name, path in (("system_units", "/etc/systemd/system"), ("user_units", "~/.config/systemd/user"))
    ),
)
"""What is other in an agent beside a service manager of ours: where the units are, and how long it waits."""


def changed(*changes: tuple[str, str]) -> Callable[[bytes], bytes]:
    """The agent with an installer in which each text, which is there once, is another."""

    def of(zipapp: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(zipapp)) as before, zipfile.ZipFile(out, "w") as after:
            for name in before.namelist():
                text = before.read(name).decode("utf-8")
                if name.endswith("/installer.py"):
                    for old, new in changes:
                        assert text.count(old) == 1, old
                        text = text.replace(old, new)
                after.writestr(name, text)
        return out.getvalue()

    return of


class Served(Device):
    """A store beside a service manager of ours, which lets it boot."""

    def __init__(self, place: Path, *, state: Path | None = None) -> None:
        """``state``: where the service manager's lies, if not in the place."""
        self.manager = services.Manager(place, lambda: self.run("boot"), folder=state)
        super().__init__(place / "store", status=self.manager.call)


@contextmanager
def anywhere() -> Iterator[None]:
    """Mode system is enrolled though the units of a bundle name the machine's own store, which is no test's."""
    with mock.patch.object(installer, "_may_enroll", lambda *_: None):
        yield
