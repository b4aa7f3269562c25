"""Signatures over a bundle's manifest: ed25519, made and read by `ssh-keygen -Y`, which every SSH target has.

Format: https://github.com/openssh/openssh-portable/blob/master/PROTOCOL.sshsig. Ed25519 signatures contain
no randomness, so that signed bundles are reproducible too; that is why other key types are refused.
"""

from __future__ import annotations

from pathlib import Path

from edgepack import shell
from edgepack.errors import BadInput, BuildFailed, NotFound

NAMESPACE = "edgepack"
SIGNER = "edgepack"
"""Principal in allowed_signers files that `allowed_signer` writes."""
_TIMEOUT = 60.0


def statement(manifest_sha256: str) -> str:
    """The text that is signed: it names its purpose, so that a signature cannot be used for anything else."""
    return f"edgepack-manifest-v1\nsha256:{manifest_sha256}\n"


def sign(key: Path, manifest_sha256: str) -> bytes:
    """The sshsig file over a manifest's digest (hex). Raises what `usable_key` raises."""
    done = shell.run(
        ["ssh-keygen", "-Y", "sign", "-n", NAMESPACE, "-f", usable_key(key)],
        stdin=statement(manifest_sha256),
        check=False,
        timeout=_TIMEOUT,
    )
    if done.returncode != 0 or not done.stdout.startswith("-----BEGIN SSH SIGNATURE-----"):
        raise BuildFailed(f"ssh-keygen could not sign with {key}: {_last_line(done.stderr)}")
    return done.stdout.encode("ascii")


def usable_key(key: Path) -> Path:
    """The file to give to `ssh-keygen -Y sign -f`: the key, or its public half if an SSH agent has it.

    Raises NotFound, or BadInput for keys that are not ed25519, are readable by others, or are locked by a
    passphrase that no agent knows.
    """
    if not key.is_file():
        raise NotFound(f"there is no key at {key}", hint=f"make one: edgepack key new {key}")
    done = shell.run(["ssh-keygen", "-y", "-P", "", "-f", key], check=False, timeout=_TIMEOUT)
    if done.returncode == 0:
        _require_ed25519(key, done.stdout)
        return key
    if "too open" in done.stderr:
        raise BadInput(f"{key} can be read by others, so ssh-keygen refuses it", hint=f"chmod 600 {key}")
    if "incorrect passphrase" in done.stderr:
        return _held_by_agent(key)
    raise BadInput(
        f"{key} is not a private SSH key: {_last_line(done.stderr)}", hint=f"make one: edgepack key new {key}"
    )


def new_key(path: Path) -> str:
    """Makes an ed25519 key (no passphrase, mode 0600, public half beside it); returns the public line.

    Raises BadInput when something is there already: keys are never overwritten.
    """
    public = path.with_name(f"{path.name}.pub")
    for taken in (path, public):
        if taken.exists():
            raise BadInput(f"{taken} is there already and is not overwritten", hint="choose another name")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    shell.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", SIGNER, "-f", path], timeout=_TIMEOUT)
    path.chmod(0o600)
    return public.read_text(encoding="ascii").strip()


def public_key(key: Path) -> str:
    """The public half, "ssh-ed25519 AAAA…", without comment. Raises what `usable_key` raises."""
    usable = usable_key(key)
    if usable != key:
        return " ".join(usable.read_text(encoding="utf-8").split()[:2])
    done = shell.run(["ssh-keygen", "-y", "-P", "", "-f", key], timeout=_TIMEOUT)
    return " ".join(done.stdout.split()[:2])


def allowed_signer(key: Path) -> str:
    """The line of an allowed_signers file that makes devices trust this key, for bundles only."""
    return f'{SIGNER} namespaces="{NAMESPACE}" {public_key(key)}\n'


def _require_ed25519(key: Path, public: str) -> None:
    kind = public.split()[0] if public.strip() else "unknown"
    if kind != "ssh-ed25519":
        raise BadInput(
            f"{key} is a key of type {kind}; bundles are signed with ssh-ed25519 only",
            hint="only ed25519 signatures are reproducible; make such a key: edgepack key new FILE",
        )


def _held_by_agent(key: Path) -> Path:
    public = key.with_name(f"{key.name}.pub")
    if public.is_file():
        line = public.read_text(encoding="utf-8")
        _require_ed25519(key, line)
        held = shell.run(["ssh-add", "-L"], check=False, timeout=_TIMEOUT).stdout
        if line.split()[1] in held.split():
            return public
    raise BadInput(
        f"{key} is locked by a passphrase and no SSH agent holds it",
        hint=f"ssh-add {key} (its public half {public.name} must lie beside it), then try again",
    )


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"
