"""A bundle is refused after any change of any file, name or link (G24)."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekd.bundle import MANIFEST, verify_files, write_manifest
from edgekd.errors import BundleRefused, FileMissing, InputRefused

MUTATIONS = 200


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("bundle") / "b", random.Random(3)
    (folder / "extra").mkdir(parents=True)
    for name, size in (("model.onnx", 400), ("bundle.json", 120), ("labels.txt", 30), ("extra/notes.md", 64)):
        (folder / name).write_bytes(rng.randbytes(size))
    (folder / "empty.txt").touch()
    write_manifest(folder, {"recipe": "r", "target": "host", "metrics": {"top1": 0.5}})
    return folder


def flip(folder: Path, file: Path, rng: random.Random) -> None:
    raw = bytearray(file.read_bytes()) or bytearray(b"\0")
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)


def truncate(folder: Path, file: Path, rng: random.Random) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: rng.randrange(len(raw))] if raw else b"x")


def add(folder: Path, file: Path, rng: random.Random) -> None:
    (file.parent / f"new{rng.randrange(99)}").write_bytes(rng.randbytes(rng.randrange(4)))


def remove(folder: Path, file: Path, rng: random.Random) -> None:
    file.unlink()


def rename(folder: Path, file: Path, rng: random.Random) -> None:
    file.rename(file.with_name(f"{file.name}{rng.randrange(10)}"))


def swap(folder: Path, file: Path, rng: random.Random) -> None:
    other = rng.choice([f for f in files_of(folder) if f != file])
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)


def link(folder: Path, file: Path, rng: random.Random) -> None:
    """The same bytes through a symlink: they could change after the check."""
    aside = folder.parent / "aside"
    aside.write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(aside)


def link_folder(folder: Path, file: Path, rng: random.Random) -> None:
    aside = folder.parent / "aside-folder"
    (folder / "extra").rename(aside)
    (folder / "extra").symlink_to(aside, target_is_directory=True)


def refusal_of(folder: Path) -> InputRefused | None:
    try:
        verify_files(folder)
    except InputRefused as refusal:
        return refusal
    return None


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


KINDS: tuple[Callable[[Path, Path, random.Random], None], ...] = (flip, flip, flip, truncate, add, remove, rename, swap, link, link_folder)


def test_the_intact_bundle_is_accepted(bundle: Path) -> None:
    assert set(verify_files(bundle)["files"]) == {"model.onnx", "bundle.json", "labels.txt", "extra/notes.md", "empty.txt"}


def test_every_one_of_200_mutations_is_refused(bundle: Path, tmp_path: Path) -> None:
    rng, accepted = random.Random(24), []
    for n in range(MUTATIONS):
        copy = Path(shutil.copytree(bundle, tmp_path / str(n) / "b"))
        file, mutate = rng.choice(files_of(copy)), KINDS[n % len(KINDS)]
        mutate(copy, file, rng)
        expected = FileMissing if not (copy / MANIFEST).is_file() else BundleRefused  # without its manifest a folder is no bundle
        refusal = refusal_of(copy)
        if not isinstance(refusal, expected) or refusal.exit_code != 3 or not refusal.where:
            accepted.append((n, mutate.__name__, file.name, refusal))
    assert not accepted


def test_every_single_bit_of_the_manifest_counts(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    raw = (copy / MANIFEST).read_bytes()
    for position in range(0, len(raw) * 8, 5):
        changed = bytearray(raw)
        changed[position // 8] ^= 1 << position % 8
        (copy / MANIFEST).write_bytes(changed)
        with pytest.raises(BundleRefused):
            verify_files(copy)


@pytest.mark.parametrize("tail", [b" ", b"\n", b"{}"])
def test_bytes_after_the_manifest_are_refused(bundle: Path, tmp_path: Path, tail: bytes) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    with (copy / MANIFEST).open("ab") as f:
        f.write(tail)
    with pytest.raises(BundleRefused, match=r"manifest\.json"):
        verify_files(copy)


def test_a_manifest_that_names_a_file_outside_is_refused_even_with_a_right_digest(bundle: Path, tmp_path: Path) -> None:
    from edgekd.artifact import digest_of
    from edgekd.bundle import manifest_bytes, read_manifest

    copy = Path(shutil.copytree(bundle, tmp_path / "b"))
    body = read_manifest(copy)
    body["files"]["../outside"] = {"size": 0, "sha256": digest_of("")}
    (copy / MANIFEST).write_bytes(manifest_bytes(body))
    with pytest.raises(BundleRefused):
        verify_files(copy)


def test_a_manifest_hashes_only_what_nobody_hashed_before(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.safeio.files import sha256_file

    copy, read = Path(shutil.copytree(bundle, tmp_path / "b")), []
    before = (copy / MANIFEST).read_bytes()
    (copy / MANIFEST).unlink()
    known = {p.name: sha256_file(p) for p in copy.iterdir() if p.is_file()}
    monkeypatch.setattr("edgekd.bundle.sha256_file", lambda path: read.append(path.name) or sha256_file(path))
    write_manifest(copy, {"recipe": "r", "target": "host", "metrics": {"top1": 0.5}}, known)
    assert read == ["notes.md"]
    assert (copy / MANIFEST).read_bytes() == before


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(FileMissing, match="no bundle"):
        verify_files(tmp_path)
