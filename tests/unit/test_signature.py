"""A signed bundle is what the owner of the key signed, to the byte; everything else is refused with its reason."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekd.bundle import MANIFEST, SIGNATURE, manifest_bytes, read_manifest, replace_built, verify_files, write_manifest
from edgekd.errors import BundleRefused, ResourceError, UsageError
from edgekd.signature import check_signature, sign
from tests.support import run_here, write_keys

pytest.importorskip("cryptography", reason="pip install 'edgekd[sign]'")
from cryptography.hazmat.primitives.asymmetric import ec, ed25519


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path / "keys")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name in ("model.onnx", "bundle.json"):
        (folder / name).write_bytes(name.encode() * 20)
    write_manifest(folder, {"recipe": "r", "target": "host"})
    return folder


def checked(folder: Path, public: Path) -> None:
    check_signature(folder, verify_files(folder), public)


# ------------------------------------------------------------------------------------------------------------ what holds
def test_a_signed_bundle_passes_and_is_otherwise_as_it_was(bundle: Path, keys: tuple[Path, Path]) -> None:
    before = {p.name: p.read_bytes() for p in bundle.iterdir()}
    assert sign(bundle, keys[0]) == bundle / SIGNATURE
    checked(bundle, keys[1])
    assert {p.name: p.read_bytes() for p in bundle.iterdir() if p.name != SIGNATURE} == before
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle", "keys"]  # nothing is left beside it


def test_the_signature_is_openssls_own_over_the_bytes_of_the_manifest(bundle: Path, keys: tuple[Path, Path]) -> None:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("there is no openssl")
    sign(bundle, keys[0])
    command = [
        openssl,
        "pkeyutl",
        "-verify",
        "-rawin",
        "-pubin",
        "-inkey",
        keys[1],
        "-in",
        bundle / MANIFEST,
        "-sigfile",
        bundle / SIGNATURE,
    ]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    (bundle / MANIFEST).write_bytes((bundle / MANIFEST).read_bytes() + b" ")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_signing_again_with_another_key_replaces_the_signature(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    others = write_keys(tmp_path / "others")
    sign(bundle, keys[0])
    sign(bundle, others[0])
    checked(bundle, others[1])
    with pytest.raises(BundleRefused, match="by another key"):
        checked(bundle, keys[1])


# ------------------------------------------------------------------------------------------------------------ attacks
def _file(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"another model")


def _file_and_manifest(bundle: Path) -> None:
    """All that a manifest alone would find is repaired."""
    manifest, signature = read_manifest(bundle), (bundle / SIGNATURE).read_bytes()
    _file(bundle)
    (bundle / MANIFEST).unlink()
    write_manifest(bundle, {k: v for k, v in manifest.items() if k not in ("schema", "files")})
    (bundle / SIGNATURE).write_bytes(signature)


def _fact(bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(manifest_bytes(read_manifest(bundle) | {"recipe": "another"}))


def _other_key(bundle: Path) -> None:
    raw = (bundle / MANIFEST).read_bytes()
    (bundle / SIGNATURE).write_bytes(ed25519.Ed25519PrivateKey.generate().sign(raw))


def _flipped(bundle: Path) -> None:
    raw = bytearray((bundle / SIGNATURE).read_bytes())
    raw[40] ^= 1
    (bundle / SIGNATURE).write_bytes(raw)


def _truncated(bundle: Path) -> None:
    (bundle / SIGNATURE).write_bytes((bundle / SIGNATURE).read_bytes()[:63])


def _longer(bundle: Path) -> None:
    (bundle / SIGNATURE).write_bytes((bundle / SIGNATURE).read_bytes() + b"\0")


def _removed(bundle: Path) -> None:
    (bundle / SIGNATURE).unlink()


def _linked(bundle: Path) -> None:
    (bundle / SIGNATURE).rename(bundle.parent / "aside")
    (bundle / SIGNATURE).symlink_to(bundle.parent / "aside")


@pytest.mark.parametrize(
    ("attack", "said", "by_the_manifest"),
    [
        (_file, "'model.onnx' was changed", True),
        (_file_and_manifest, "its manifest was changed after it was signed", False),
        (_fact, "its manifest was changed after it was signed", False),
        (_other_key, "by another key", False),
        (_flipped, "by another key", False),
        (_truncated, "'manifest.sig' is no signature", True),
        (_longer, "'manifest.sig' is no signature", True),
        (_removed, "it is not signed", False),
        (_linked, "'manifest.sig' is a link", True),
    ],
)
def test_every_change_of_a_signed_bundle_is_refused(
    bundle: Path, keys: tuple[Path, Path], attack: Callable[[Path], None], said: str, by_the_manifest: bool
) -> None:
    sign(bundle, keys[0])
    attack(bundle)
    with pytest.raises(BundleRefused, match=said) as refusal:
        checked(bundle, keys[1])
    assert (refusal.value.exit_code, refusal.value.where) == (3, str(bundle))
    if by_the_manifest:
        with pytest.raises(BundleRefused, match=said):
            verify_files(bundle)
    else:
        verify_files(bundle)  # only the signature tells


def test_a_bundle_that_is_not_intact_is_not_signed(bundle: Path, keys: tuple[Path, Path]) -> None:
    _file(bundle)
    with pytest.raises(BundleRefused, match="was changed"):
        sign(bundle, keys[0])
    assert not (bundle / SIGNATURE).exists()


def test_a_full_disk_while_signing_leaves_the_bundle_as_it_was(
    bundle: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    sign(bundle, keys[0])
    before = {p.name: p.read_bytes() for p in bundle.iterdir()}
    for call in ("os.fsync", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(call, full)
            with pytest.raises(ResourceError, match="no space left on device"):
                sign(bundle, keys[0])
        assert {p.name: p.read_bytes() for p in bundle.iterdir()} == before
        assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle", "keys"]


def test_a_build_takes_the_signature_of_the_old_manifest_away(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    new = tmp_path / "new"
    for signed in (True, False):
        sign(bundle, keys[0]) if signed else None
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        (new / "model.engine").write_bytes(b"engine")
        assert replace_built(bundle, new, verify_files(bundle)) is signed
        assert "model.engine" in verify_files(bundle)["files"]
        assert not (bundle / SIGNATURE).exists()


# ------------------------------------------------------------------------------------------------------------ keys
def test_an_encrypted_key_asks_for_its_password(bundle: Path, tmp_path: Path) -> None:
    key, public = write_keys(tmp_path / "hidden", password="s3cret")
    for wrong in ("", "guess"):
        with pytest.raises(UsageError, match="cannot be decrypted"):
            sign(bundle, key, lambda wrong=wrong: wrong)  # type: ignore[misc]
    with pytest.raises(UsageError, match="the key is encrypted"):
        sign(bundle, key)
    refused = run_here("sign", bundle, "--key", key)  # in a test there is no terminal
    assert (refused.code, "no terminal to ask for its password" in refused.err) == (2, True)
    assert not (bundle / SIGNATURE).exists()
    sign(bundle, key, lambda: "s3cret")
    checked(bundle, public)


@pytest.mark.parametrize("option", ["--key", "--signed-by"])
@pytest.mark.parametrize("kind", ["missing", "no key", "the other half", "elliptic curve", "a folder"])
def test_a_key_that_cannot_be_used_is_2_and_says_how_to_get_one(
    bundle: Path, keys: tuple[Path, Path], tmp_path: Path, option: str, kind: str
) -> None:
    sign(bundle, keys[0])
    other = write_keys(tmp_path / "ec", key=ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "text.pem").write_text("hello")
    secret = option == "--key"
    key = {
        "missing": tmp_path / "nothing.pem",
        "no key": tmp_path / "text.pem",
        "the other half": keys[1] if secret else keys[0],
        "elliptic curve": other[0] if secret else other[1],
        "a folder": tmp_path,
    }[kind]
    result = run_here(*(("sign", bundle) if secret else ("verify", bundle)), option, key, "--json")
    assert result.code == 2, result.text
    error = result.json()["error"]
    assert str(key) in error["where"]
    assert kind in ("missing", "a folder") or "openssl" in error["hint"]


def test_without_the_library_the_error_says_how_to_install_it(
    bundle: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)  # as if it were not there
    for command in (("sign", bundle, "--key", keys[0]), ("verify", bundle, "--signed-by", keys[1])):
        result = run_here(*command, "--json")
        assert (result.code, json.loads(result.out)["error"]["hint"]) == (2, "pip install 'edgekd[sign]'")
    verify_files(bundle)  # needs none
