"""A bundle's signature: Ed25519 over the exact bytes of its manifest, which covers every other file. The keys are the user's own.

`manifest.sig` holds the 64 bytes and nothing else, so that a machine without edgekd can check it too:
`openssl pkeyutl -verify -rawin -pubin -inkey public.pem -in manifest.json -sigfile manifest.sig`, then the files by the manifest.
Source: RFC 8032.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgekd.bundle import SIGNATURE, manifest_bytes, verify_files
from edgekd.errors import BundleRefused, UsageError
from edgekd.safeio.files import fsync_dir, resource_errors, write_synced

_MAKE = "make one: openssl genpkey -algorithm ed25519 -out key.pem"
_TAKE = "its public half: openssl pkey -in key.pem -pubout -out public.pem"


def sign(folder: Path, key: Path, password: Callable[[], str] | None = None) -> Path:
    """Writes manifest.sig into an intact bundle, in place of an older one. `password` is asked for where the key is encrypted.

    Raises UsageError for a key that cannot be used, BundleRefused for a bundle that is not intact.
    """
    private, there = _private(key, password), folder / SIGNATURE
    signature = private.sign(manifest_bytes(verify_files(folder)))
    # Written beside the bundle: what a kill leaves behind must not be a file of the bundle that its manifest does not know.
    with resource_errors(there), tempfile.TemporaryDirectory(dir=folder.resolve().parent) as scratch:
        write_synced(Path(scratch) / SIGNATURE, signature)
        os.replace(Path(scratch) / SIGNATURE, there)
        fsync_dir(folder)
    return there


def check_signature(folder: Path, manifest: Mapping[str, Any], key: Path) -> None:
    """Raises BundleRefused unless this manifest, as `verify_files` gave it, is signed by the key; UsageError for a key that cannot be used."""
    public = _public(key)
    from cryptography.exceptions import InvalidSignature

    if not (folder / SIGNATURE).is_file():
        raise BundleRefused(
            "it is not signed",
            where=str(folder),
            expected=f"{SIGNATURE}, made by the private half of {key}",
            hint="sign it where it was made: edgekd sign BUNDLE --key KEY.pem",
        )
    try:
        public.verify((folder / SIGNATURE).read_bytes(), manifest_bytes(manifest))
    except InvalidSignature:
        raise BundleRefused(
            "its signature is by another key, or its manifest was changed after it was signed",
            where=str(folder),
            expected=f"a signature of manifest.json by the private half of {key}",
            hint="do not deploy it; ask for it again where it was signed",
        ) from None


# ------------------------------------------------------------------------------------------------------------ keys
def _private(path: Path, password: Callable[[], str] | None) -> Any:
    serialization, ed25519 = _library()
    data = _read(path, "--key")
    try:
        key = serialization.load_pem_private_key(data, None)
    except TypeError:  # it is encrypted
        if password is None:
            raise UsageError("the key is encrypted", where=str(path), expected="its password") from None
        key = _decrypted(path, data, password().encode())
    except Exception as error:  # the library raises several unrelated classes
        raise UsageError("this is no private key", where=str(path), expected="an Ed25519 key in PEM", hint=_MAKE) from error
    return _ed25519(key, ed25519.Ed25519PrivateKey, path, _MAKE)


def _decrypted(path: Path, data: bytes, password: bytes) -> Any:
    try:
        return _library()[0].load_pem_private_key(data, password)
    except Exception as error:  # the library raises several unrelated classes
        raise UsageError("the key cannot be decrypted", where=str(path), expected="its password") from error


def _public(path: Path) -> Any:
    serialization, ed25519 = _library()
    data = _read(path, "--signed-by")
    try:
        key = serialization.load_pem_public_key(data)
    except Exception as error:  # the library raises several unrelated classes
        raise UsageError("this is no public key", where=str(path), expected="an Ed25519 key in PEM", hint=_TAKE) from error
    return _ed25519(key, ed25519.Ed25519PublicKey, path, _TAKE)


def _ed25519(key: Any, wanted: type, path: Path, hint: str) -> Any:
    if not isinstance(key, wanted):
        raise UsageError(f"this is another kind of key: {type(key).__name__}", where=str(path), expected="Ed25519", hint=hint)
    return key


def _read(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"the key cannot be read: {error.strerror}", where=f"{option} {path}", expected="a PEM file") from error


def _library() -> tuple[Any, Any]:
    """Reading of keys, and the classes of Ed25519."""
    try:
        from cryptography.hazmat.primitives import serialization  # an extra, and only signatures need it
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UsageError("signatures need the package cryptography", hint="pip install 'edgekd[sign]'") from error
    return serialization, ed25519
