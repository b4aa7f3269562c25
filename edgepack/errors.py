"""Every failure edgepack can name: a message, a hint, and an exit code of its own."""

from __future__ import annotations

from typing import ClassVar


class EdgepackError(Exception):
    """A user's mistake or a device's limit. Anything else that escapes is a bug.

    Messages are lower case and name the thing, the value and the limit; ``hint`` says what to do next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class BadInput(EdgepackError):
    """A file, option or value that cannot be used (2 is also what click uses for bad options)."""

    exit_code = 2


class NotFound(EdgepackError):
    """A named profile, model or file that does not exist."""

    exit_code = 3


class NothingFits(EdgepackError):
    """No candidate satisfies the constraints; the hint names the cheapest change that would."""

    exit_code = 4


class CheckFailed(EdgepackError):
    """The device was measured and does not keep the plan's promises."""

    exit_code = 5


class Untrusted(EdgepackError):
    """A digest, signature or archive member is not what it must be."""

    exit_code = 6


class MissingTool(EdgepackError):
    """A program or library that this step needs is not installed."""

    exit_code = 7


class Offline(EdgepackError):
    """The network, the model hub or a device could not be reached."""

    exit_code = 8


class BuildFailed(EdgepackError):
    """A build step (conversion, quantization, compilation) did not complete."""

    exit_code = 9


class NoSpace(EdgepackError):
    """The disk is too full for what must be written."""

    exit_code = 10


class Unsupported(EdgepackError):
    """An architecture, scheme, runtime or device this version does not know."""

    exit_code = 11


class QualityTooLow(EdgepackError):
    """An artifact was measured, and loses more against its parent than was allowed."""

    exit_code = 12


class Busy(EdgepackError):
    """Another process works on the same device or cache."""

    exit_code = 13


class Interrupted(EdgepackError):
    """Stopped by the user; the same command resumes."""

    exit_code = 130
