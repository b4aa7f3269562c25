"""Flashing over sshd on loopback: weights against bare scp of the same file, and what an update of the plan moves.

    python benchmarks/flash.py [--megabytes 400] [--rounds 5] [--rate MB/S] [--folder DIR]

A bundle with random weights is sent to an enrolled store, into a new one each round, and the same file by scp, in
turns; the time of a flash is that of its transfer, without the login that both have, and with the device's flushing and
second reading of every byte, which scp has not. `sync` runs between, so that neither writes the other's pages. On
loopback both ends share this machine's cores; --rate holds both to the speed of a line instead. Then the
built-in model is flashed twice, with another context in the second release, and every byte on the wire is counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from edgepack import devices, flash, remote, workspace
from edgepack.bundle import sign
from edgepack.devices import Device, Where
from edgepack.flash import Asked
from edgepack.progress import Silent

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import releases
from tests.sshd import HOST, Line, Sshd, serving

ASKED = Asked(force=True, self_test=False)


def enrolled(sshd: Sshd, signers: Path, root: Path, port: int) -> Device:
    connection = remote.connect(HOST, ssh=sshd.through(port), interactive=False)
    where = Where(root=str(root), mode="none")
    devices.enroll(
        connection, where, signers=signers, server=None, keep=None, replace_signers=False, progress=Silent()
    )
    return devices.find(connection, where)


def transfers(
    sshd: Sshd, port: int, folder: Path, key: Path, signers: Path, options: argparse.Namespace
) -> None:
    """Seconds of both, round by round."""
    weights = os.urandom(options.megabytes * 10**6)
    cargo = flash.load(releases.bundle(folder / "big.tar", key, weights=weights), None)
    plain = folder / "big.weights"
    line = "loopback" if options.rate is None else f"a line of {options.rate:g} MB/s"
    print(f"{options.megabytes} MB of random weights over {line}, {options.rounds} rounds, seconds")
    print(f"{'round':>5} {'flash':>8} {'scp':>8} {'scp, sync':>10} {'ratio':>7} {'to sync':>8}")
    rows = []
    for number in range(options.rounds):
        root, copy = folder / "store", folder / "copy"
        device = enrolled(sshd, signers, root, port)
        os.sync()
        first = number % 2 == 0
        if not first:
            bare, flushed = scp(sshd, port, plain, copy)
        done = flash.flash(cargo, device, ASKED, progress=Silent())
        device.connection.close()
        if first:
            bare, flushed = scp(sshd, port, plain, copy)
        ours = done.seconds_to_send or 0.0
        rows.append((ours, bare, flushed))
        told = f"{number + 1:>5} {ours:>8.2f} {bare:>8.2f} {flushed:>10.2f} {ours / bare:>7.2f} {ours / flushed:>8.2f}"
        print(told, flush=True)
        shutil.rmtree(root)
        copy.unlink()
    ours, bare, flushed = (median(column) for column in zip(*rows, strict=True))
    ratios = median(a / b for a, b, _ in rows), median(a / c for a, _, c in rows)
    print(f"{'mid':>5} {ours:>8.2f} {bare:>8.2f} {flushed:>10.2f} {ratios[0]:>7.2f} {ratios[1]:>8.2f}")


def scp(sshd: Sshd, port: int, source: Path, target: Path) -> tuple[float, float]:
    """Seconds until scp ends, and until what it wrote is on the disk."""
    os.sync()
    before = time.monotonic()
    subprocess.run(["scp", "-q", *sshd.ssh[1:], "-P", str(port), source, f"{HOST}:{target}"], check=True)
    ended = time.monotonic()
    os.sync()
    return ended - before, time.monotonic() - before


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """A flash of a release that differs from the device's in its context alone."""

    before: Path
    bundle: Path
    wire: int
    """Bytes there and back, with the login."""
    seconds: float


def update(sshd: Sshd, folder: Path, key: Path, signers: Path) -> Update:
    """The first release flashed, then the second, and every byte of each on the wire counted."""
    tars = []
    program = [sys.executable, "-m", "edgepack", "-q"]
    with (folder / "here.yaml").open("w", encoding="utf-8") as out:
        subprocess.run([*program, "probe"], stdout=out, check=True)
    for sequence, context in ((1, 512), (2, 384)):
        out_folder = folder / str(context)
        subprocess.run(
            [*program, "build", "--profile", folder / "here.yaml", "--model", "demo", "--with-runtime", "--context",
             str(context), "--key", key, "--release-sequence", str(sequence), "-o", out_folder],
            stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        tars.append(next(out_folder.glob("*.tar")))
    wire, seconds = 0, 0.0
    with Line(sshd.port) as line:
        for tar, asked in zip(tars, (Asked(self_test=False), Asked()), strict=True):
            cargo = flash.load(tar, None)
            device = enrolled(sshd, signers, folder / "updated", line.port)
            device.connection.close()
            line.sent = line.received = 0
            device = devices.find(device.connection, Where(root=device.root))
            began = time.monotonic()
            done = flash.flash(cargo, device, asked, progress=Silent())
            device.connection.close()
            seconds = time.monotonic() - began
            wire = line.sent + line.received
            files = sum(step.bytes for step in done.steps)
            print(
                f"{done.outcome}: {files} bytes of files in {done.sent} sent; wire {line.sent} there, {line.received} "
                f"back; {done.seconds_to_switch} s to switch, {seconds:.1f} s in all",
                flush=True,
            )
    return Update(before=tars[0], bundle=tars[1], wire=wire, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, metavar="MB/S", help="speed of the line between both")
    parser.add_argument(
        "--folder", type=Path, help="where both write (default: the system's temporary folder)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place, serving(Path(place) / "sshd") as sshd:
        folder = Path(place)
        key = folder / "key"
        sign.new_key(key)
        signers = folder / "signers"
        workspace.write_text(signers, sign.allowed_signer(key))
        if options.rate is None:
            transfers(sshd, sshd.port, folder, key, signers, options)
        else:
            with Line(sshd.port, rate=options.rate * 1e6) as line:
                transfers(sshd, line.port, folder, key, signers, options)
        update(sshd, folder, key, signers)


if __name__ == "__main__":
    main()
