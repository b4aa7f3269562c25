"""ssh as a program: one login for all calls, words that arrive as they were, and refusals that say why."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgepack import remote
from edgepack.errors import BadInput, EdgepackError, Offline, Untrusted
from edgepack.remote import Dropped, Local

FAKE = """\
#!/bin/sh
# An ssh that logs its words, and runs the last one here.
echo "$*" >> {log}
for word in "$@"; do last=$word; done
case "$*" in
  *" -G "*) cat {settings} ;;
  *" -f "*)
    test -e {refusal} || exit 0
    cat {refusal} > "$(echo "$*" | sed 's/.* -E \\([^ ]*\\) .*/\\1/')"
    exit 255 ;;
  *" -O "*) ;;
  *) test ! -e {cut} || {{ rm {cut}; exit 255; }}; exec sh -c "$last" ;;
esac
"""


class Fake:
    """A folder with an ssh of its own, what it was asked, and what makes it fail."""

    def __init__(self, folder: Path) -> None:
        self.log, self.settings = folder / "log", folder / "settings"
        self.refusal, self.cut = folder / "refusal", folder / "cut"
        self.program = folder / "ssh"
        self.settings.write_text("connecttimeout none\nserveraliveinterval 0\n", encoding="ascii")
        places = {name: getattr(self, name) for name in ("log", "settings", "refusal", "cut")}
        self.program.write_text(FAKE.format(**places), encoding="ascii")
        self.program.chmod(0o755)

    def connect(self, host: str = "pi@device", *, interactive: bool = False) -> remote.Connection:
        return remote.connect(host, ssh=(str(self.program), "-F", "mine"), interactive=interactive)

    def asked(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_words_arrive_there_as_they_are_here(fake: Fake) -> None:
    words = ["printf", "%s|", "a b", "it's", "$HOME", "*", ""]

    answer = fake.connect().run(words)

    assert answer.stdout == b"a b|it's|$HOME|*||"


def test_one_login_serves_all_calls(fake: Fake) -> None:
    connection = fake.connect()

    statuses = [connection.run(["sh", "-c", f"exit {number}"]).status for number in (0, 3, 4)]
    connection.close()

    assert statuses == [0, 3, 4]
    kinds = [
        "login" if " -f " in line else "out" if " -O exit " in line else "call" for line in fake.asked()[1:]
    ]
    assert kinds == ["login", "call", "call", "call", "out"]


def test_a_cut_line_is_told_and_the_next_call_logs_in_again(fake: Fake) -> None:
    connection = fake.connect()
    fake.cut.touch()

    with pytest.raises(Dropped, match="pi@device was lost"):
        connection.run(["true"])

    assert connection.run(["true"]).status == 0
    assert sum(" -f " in line for line in fake.asked()) == 2


def test_only_who_sits_at_a_terminal_is_asked(fake: Fake) -> None:
    fake.connect(interactive=False).run(["true"])
    fake.connect(interactive=True).run(["true"])

    logins = [line for line in fake.asked() if " -f " in line]
    assert ["BatchMode=yes" in line for line in logins] == [True, False]


def test_what_the_user_set_is_left_alone(fake: Fake) -> None:
    fake.settings.write_text("connecttimeout 7\nserveraliveinterval 0\n", encoding="ascii")

    fake.connect().run(["true"])

    (login,) = (line for line in fake.asked() if " -f " in line)
    assert "connecttimeout" not in login
    assert "serveraliveinterval=15" in login


def test_a_refused_login_leaves_nothing_behind(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "run"
    place.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    fake.refusal.write_text("pi@device: Permission denied (publickey).\n", encoding="ascii")

    with pytest.raises(Offline, match=r"refused the login: pi@device: Permission denied \(publickey\)"):
        fake.connect().run(["true"])

    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("said", "error", "told"),
    [
        ("@ REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", Untrusted, "another"),
        ("No ED25519 host key is known for pi and you have requested strict checking.\nHost key verification failed.",
         Untrusted, "not known here"),
        ("pi@device: Permission denied (publickey,password).", Offline, "publickey,password"),
        ("Received disconnect from 10.0.0.9 port 22:2: Too many authentication failures", Offline, "Too many"),
        ("ssh: Could not resolve hostname pi: Name or service not known", Offline, "there is no host pi"),
        ("/home/me/.ssh/config: line 3: Bad configuration option: frobnicate", BadInput, "frobnicate"),
        ("ssh: connect to host pi port 22: Connection refused", Dropped, "Connection refused"),
        ("ssh: connect to host pi port 22: No route to host", Dropped, "No route"),
        ("", Dropped, "gave no reason"),
    ],
)  # fmt: skip
def test_a_refusal_says_why(said: str, error: type[EdgepackError], told: str) -> None:
    found = remote.refused("pi", said.splitlines())

    assert type(found) is error
    assert told in found.message
    assert found.hint


def test_a_path_with_a_slash_is_a_folder_of_this_machine(tmp_path: Path) -> None:
    connection = remote.connect(f"{tmp_path}/")

    answer = connection.run(
        [sys.executable, "-c", "import sys; print(sys.stdin.read() * 2)"], stdin=(b"ab", b"c")
    )

    assert isinstance(connection, Local)
    assert (answer.status, answer.stdout) == (0, b"abcabc\n")


@pytest.mark.parametrize("host", ["", "-oProxyCommand=evil", "two words", "a\nb"])
def test_what_is_no_host_never_reaches_ssh(host: str) -> None:
    with pytest.raises(BadInput, match="is no host"):
        remote.connect(host)


def test_the_socket_has_a_path_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    monkeypatch.setattr("tempfile.tempdir", str(deep))

    place = remote._socket_folder()
    mode = place.stat().st_mode & 0o777
    place.rmdir()

    assert len(str(place / "s")) <= remote.SOCKET_PATH
    assert mode == 0o700


def test_a_socket_that_its_master_removes_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "log").touch()
    monkeypatch.setattr(Path, "iterdir", lambda self: iter((self / "s", self / "log")))

    remote._clear(place)

    assert not place.exists()
