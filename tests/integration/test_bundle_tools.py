"""Bundles in other hands: skopeo reads them, ssh-keygen's signature covers them, another surrounding repeats them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgepack import bundle, flash
from edgepack import registry as registries
from edgepack.artifact import Artifact, Checkpoint
from edgepack.bundle import Bundle, oci, sign
from edgepack.cli import cli
from edgepack.errors import Untrusted
from edgepack.units import Bytes
from tests.documents import obeys
from tests.plans import example_plan
from tests.sshd import free_port

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "key"
    sign.new_key(path)
    return path


def write(folder: Path, key: Path | None) -> Bundle:
    weights = folder / "artifact.gguf"
    weights.write_bytes(b"GGUF" + bytes(range(256)) * 64)
    artifact = Artifact(
        path=weights,
        scheme="Q4_K_M",
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        bytes=Bytes(weights.stat().st_size),
        imatrix_sha256=None,
        tool="llama.cpp",
    )
    checkpoint = Checkpoint(
        path=folder, source="Qwen/Qwen2.5-1.5B-Instruct", revision="ab" * 20, license="MIT"
    )
    return bundle.write(
        example_plan("rtx-4060-8gb"),
        artifact,
        folder / "b.tar",
        checkpoint=checkpoint,
        selftest={"schema_version": 1, "probes": []},
        key=key,
    )


def skopeo(*words: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["skopeo", *map(str, words)], capture_output=True, check=False)


def test_skopeo_reads_a_bundle_as_an_oci_archive(tmp_path: Path, key: Path) -> None:
    written = write(tmp_path, key)

    done = skopeo("inspect", "--raw", f"oci-archive:{written.path}")

    assert done.returncode == 0, done.stderr
    assert f"sha256:{hashlib.sha256(done.stdout).hexdigest()}" == written.manifest_digest
    manifest = json.loads(done.stdout)
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert manifest["layers"][-1]["annotations"] == {"org.cncf.model.filepath": "model.gguf"}


def test_a_round_trip_through_skopeo_keeps_manifest_and_blobs(tmp_path: Path, key: Path) -> None:
    written = write(tmp_path, key)

    copied = skopeo("copy", "--insecure-policy", f"oci-archive:{written.path}", f"dir:{tmp_path / 'dir'}")
    back = skopeo("copy", "--insecure-policy", f"dir:{tmp_path / 'dir'}", f"oci-archive:{tmp_path / 'x.tar'}")
    again = skopeo("inspect", "--raw", f"oci-archive:{tmp_path / 'x.tar'}")

    assert (copied.returncode, back.returncode) == (0, 0), copied.stderr + back.stderr
    assert f"sha256:{hashlib.sha256(again.stdout).hexdigest()}" == written.manifest_digest
    weights = (tmp_path / "artifact.gguf").read_bytes()
    assert (tmp_path / "dir" / hashlib.sha256(weights).hexdigest()).read_bytes() == weights


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a container registry on loopback."""
    folder = tmp_path_factory.mktemp("registry")
    address = f"127.0.0.1:{free_port()}"
    settings = folder / "config.yml"
    settings.write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {folder}/data\nhttp:\n  addr: {address}\n"
    )
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(["docker-registry", "serve", settings], stdout=log, stderr=log) as process,
    ):
        try:
            _answers(address, process)
            yield address
        finally:
            process.terminate()


def _answers(address: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 30
    while True:
        assert process.poll() is None, "the registry ended at once"
        with suppress(OSError), urllib.request.urlopen(f"http://{address}/v2/", timeout=5):
            return
        assert time.monotonic() < end, "the registry does not answer"
        time.sleep(0.05)


def test_a_registry_gives_back_the_same_file_with_its_signature(
    tmp_path: Path, key: Path, registry: str
) -> None:
    written = write(tmp_path, key)
    place = f"docker://{registry}/edge/demo"
    emitted = CliRunner().invoke(
        cli, ["emit", "--signature", str(written.path), "-o", str(tmp_path / "signature")]
    )
    there, back = (("--insecure-policy", f"--{way}-tls-verify=false") for way in ("dest", "src"))

    copies = [
        skopeo("copy", *there, f"oci-archive:{written.path}", f"{place}:7"),
        skopeo("copy", *there, f"oci:{tmp_path / 'signature'}", f"{place}:7.sshsig"),
        skopeo("copy", *back, f"{place}:7", f"dir:{tmp_path / 'pulled'}"),
        skopeo("copy", *back, f"{place}:7.sshsig", f"dir:{tmp_path / 'pulled.sshsig'}"),
    ]
    told = skopeo("inspect", "--raw", "--tls-verify=false", f"{place}:7")
    assembled = CliRunner().invoke(
        cli,
        [
            "emit",
            "--tar",
            str(tmp_path / "pulled"),
            str(tmp_path / "pulled.sshsig"),
            "-o",
            str(tmp_path / "again.tar"),
            "--json",
        ],
    )

    assert emitted.exit_code == 0, emitted.output
    assert [done.returncode for done in copies] == [0] * 4, [done.stderr for done in copies]
    assert f"sha256:{hashlib.sha256(told.stdout).hexdigest()}" == written.manifest_digest
    assert assembled.exit_code == 0, assembled.output
    assert obeys("emit-tar", assembled.stdout)["manifest_digest"] == written.manifest_digest
    assert (tmp_path / "again.tar").read_bytes() == written.path.read_bytes()


def test_another_bundles_signature_and_changed_blobs_make_no_bundle(tmp_path: Path, key: Path) -> None:
    written = write(tmp_path, key)
    pulled = skopeo("copy", "--insecure-policy", f"oci-archive:{written.path}", f"dir:{tmp_path / 'pulled'}")
    assert pulled.returncode == 0, pulled.stderr
    registries.signature_layout(flash.load(written.path, None), tmp_path / "signature")
    assert (
        skopeo(
            "copy", "--insecure-policy", f"oci:{tmp_path / 'signature'}", f"dir:{tmp_path / 's'}"
        ).returncode
        == 0
    )
    manifest = json.loads((tmp_path / "pulled" / "manifest.json").read_bytes())
    weights = tmp_path / "pulled" / manifest["layers"][-1]["digest"].removeprefix("sha256:")
    content = weights.read_bytes()

    weights.write_bytes(b"x" + content[1:])
    with pytest.raises(Untrusted):
        registries.assemble(tmp_path / "pulled", tmp_path / "s", tmp_path / "again.tar")
    weights.write_bytes(content)
    (tmp_path / "pulled" / "manifest.json").write_bytes(json.dumps(manifest).encode())
    with pytest.raises(Untrusted, match="did not write"):
        registries.assemble(tmp_path / "pulled", tmp_path / "s", tmp_path / "again.tar")
    manifest["annotations"]["org.edgepack.release-sequence"] = "9"
    text = oci.canonical(manifest)
    (tmp_path / "pulled" / "manifest.json").write_bytes(text)
    with pytest.raises(Untrusted, match="holds the signature of"):
        registries.assemble(tmp_path / "pulled", tmp_path / "s", tmp_path / "again.tar")

    assert not (tmp_path / "again.tar").exists()


def test_a_signed_bundle_is_verified_by_an_enrolled_key_only(tmp_path: Path, key: Path) -> None:
    written = write(tmp_path, key)
    signers = tmp_path / "signers"
    signers.write_text(sign.allowed_signer(key))
    other = tmp_path / "other"
    sign.new_key(other)
    strangers = tmp_path / "strangers"
    strangers.write_text(sign.allowed_signer(other))

    enrolled = bundle.inspect(written.path, allowed_signers=signers).signature
    unenrolled = bundle.inspect(written.path).signature

    assert written.signed
    assert enrolled.state == "verified"
    assert unenrolled.state == "unenrolled"
    with pytest.raises(Untrusted):
        bundle.inspect(written.path, allowed_signers=strangers)


def test_an_unsigned_bundle_is_refused_where_a_signer_is_demanded(tmp_path: Path, key: Path) -> None:
    signers = tmp_path / "signers"
    signers.write_text(sign.allowed_signer(key))
    written = write(tmp_path, None)

    assert not written.signed
    with pytest.raises(Untrusted, match="not signed"):
        bundle.inspect(written.path, allowed_signers=signers)


@pytest.mark.parametrize("enrolled", [False, True])
def test_any_flipped_byte_of_a_signed_bundle_is_refused(tmp_path: Path, key: Path, enrolled: bool) -> None:
    weights = tmp_path / "w"
    weights.write_bytes(b"GGUF" + bytes(60))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    last = oci.Layer(filepath="model.gguf", kind="weight", content=weights, sha256=digest, bytes=64)
    image = oci.Image(
        name="tiny",
        config={},
        annotations={"org.opencontainers.image.ref.name": "tiny"},
        layers=(oci.text_layer("plan.json", "weight.config", "{}\n"), last),
    )
    path = tmp_path / "tiny.tar"
    oci.write(path, image, sign=lambda manifest: sign.sign(key, manifest))
    signers = tmp_path / "signers"
    signers.write_text(sign.allowed_signer(key))
    demanded = signers if enrolled else None
    good = path.read_bytes()
    bundle.inspect(path, allowed_signers=demanded)

    with path.open("r+b", buffering=0) as stream:
        for offset in range(len(good)):
            stream.seek(offset)
            stream.write(bytes([good[offset] ^ 0x01]))
            with pytest.raises(Untrusted):
                bundle.inspect(path, allowed_signers=demanded)
            stream.seek(offset)
            stream.write(good[offset : offset + 1])

    bundle.inspect(path, allowed_signers=demanded)


_BUILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.integration.test_bundle_tools import write
write(Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_a_signed_bundle_is_the_same_file_in_another_environment(tmp_path: Path, key: Path) -> None:
    digests = set()
    surroundings = [
        ("C", 0o022, "0", "UTC"),
        ("de_DE.UTF-8", 0o077, "1", "Asia/Tokyo"),
        ("tr_TR.UTF-8", 0o007, "77", "America/New_York"),
    ]

    for locale, umask, seed, zone in surroundings:
        folder = tmp_path / locale
        folder.mkdir()
        env = {
            "LC_ALL": locale,
            "PYTHONHASHSEED": seed,
            "TZ": zone,
            "TMPDIR": str(folder),
            "HOME": str(folder),
            "PATH": os.environ["PATH"],
        }
        argv = [sys.executable, "-c", _BUILD, str(ROOT), str(folder), str(key)]
        subprocess.run(argv, check=True, env=env, cwd=folder, umask=umask)
        digests.add(hashlib.sha256((folder / "b.tar").read_bytes()).hexdigest())

    assert len(digests) == 1
