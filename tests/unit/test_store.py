"""The store's promises, one test each, in one process."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from edgekd.artifact import MANIFEST, Artifact, Kind, digest_of
from edgekd.errors import DataRefused, EdgekdError, LockTimeout, ResourceError, UsageError
from edgekd.safeio.locks import try_lock
from edgekd.store import Store

KEY, OTHER = digest_of("one"), digest_of("two")


def build(folder: Path) -> dict[str, Any]:
    (folder / "model.bin").write_bytes(b"weights" * 100)
    (folder / "sub").mkdir()
    (folder / "sub" / "note.txt").write_text("hello")
    return {"seconds": 1.5, "note": "é"}


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, warnings: list[str]) -> Store:
    return Store(tmp_path / "home", warn=warnings.append)


def entry(store: Store, key: str = KEY) -> Path:
    return store.put(key, Kind.MODEL, build).path


def left_over(store: Store) -> list[str]:
    return [str(p.relative_to(store.root)) for name in ("tmp", "work", "quarantine") for p in (store.root / name).iterdir()]


def test_what_was_put_is_got_and_built_only_once(store: Store) -> None:
    built = store.put(KEY, Kind.MODEL, build, recipe={"bits": 8})
    again = store.put(KEY, Kind.MODEL, lambda _: pytest.fail("built twice"))
    got = store.get(KEY)
    assert not built.cached
    assert again.cached
    assert got == again
    assert (built.digest, built.meta, built.path) == (again.digest, again.meta, again.path)
    assert (again.path / "sub" / "note.txt").read_text() == "hello"
    assert left_over(store) == []


def test_meta_is_the_same_built_and_cached(store: Store) -> None:
    built = store.put(KEY, Kind.MODEL, lambda _: {"shape": (1, 2), "names": {3: "x"}})
    got = store.get(KEY)
    assert got is not None
    assert built.meta == got.meta == {"shape": [1, 2], "names": {"3": "x"}}


def test_digest_covers_files_and_not_meta(store: Store) -> None:
    first = store.put(KEY, Kind.MODEL, lambda d: {"seconds": (d / "a").write_text("x")})
    second = store.put(OTHER, Kind.MODEL, lambda d: {"seconds": (d / "a").write_text("x") + 1})
    assert first.digest == second.digest


def test_unknown_key_is_none_and_a_malformed_one_is_refused(store: Store) -> None:
    assert store.get(KEY) is None
    assert store.peek(KEY) is None
    for bad in ("", "../../etc/passwd", "A" * 64, KEY + "\n", KEY[:-1]):
        with pytest.raises(UsageError, match="not a store key"):
            store.get(bad)


def test_a_build_that_raises_leaves_nothing_and_is_not_remembered(store: Store) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        build(folder)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.put(KEY, Kind.MODEL, fail)
    assert store.get(KEY) is None
    assert left_over(store) == []
    assert not store.put(KEY, Kind.MODEL, build).cached


@pytest.mark.parametrize("what", ["link", MANIFEST])
def test_a_build_that_leaves_what_cannot_be_sealed_is_discarded(store: Store, what: str) -> None:
    def bad(folder: Path) -> dict[str, Any]:
        (folder / "model.bin").write_bytes(b"x")
        (folder / what).symlink_to("/etc/passwd") if what == "link" else (folder / what).write_text("{}")
        return {}

    with pytest.raises(EdgekdError):
        store.put(KEY, Kind.MODEL, bad)
    assert store.get(KEY) is None
    assert left_over(store) == []


def _add(path: Path) -> None:
    (path / "extra").write_text("x")


def _remove(path: Path) -> None:
    (path / "model.bin").unlink()


def _rename(path: Path) -> None:
    (path / "model.bin").rename(path / "model2.bin")


def _link(path: Path) -> None:
    (path / "model.bin").rename(path.parent / "aside")
    (path / "model.bin").symlink_to(path.parent / "aside")


def _grow(path: Path) -> None:
    (path / "model.bin").write_bytes((path / "model.bin").read_bytes() + b"x")


def _empty_manifest(path: Path) -> None:
    (path / MANIFEST).write_text("{}")


def _no_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def _deep_manifest(path: Path) -> None:
    (path / MANIFEST).write_text("[" * 100_000)


def _meta_edited(path: Path) -> None:
    (path / MANIFEST).write_text((path / MANIFEST).read_text().replace("1.5", "2.5"))


DAMAGES = [_add, _remove, _rename, _link, _grow, _empty_manifest, _no_manifest, _deep_manifest, _meta_edited]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__.strip("_"))
def test_damage_is_quarantined_with_one_warning_and_built_again(store: Store, warnings: list[str], damage: Any) -> None:
    damage(entry(store))
    assert store.get(KEY) is None
    assert len(warnings) == 1
    assert KEY[:12] in warnings[0]
    assert len(list((store.root / "quarantine").iterdir())) == 1
    assert not store.put(KEY, Kind.MODEL, build).cached
    assert store.get(KEY) is not None


def test_an_entry_under_another_key_is_damage(store: Store) -> None:
    target = store.root / "v1" / OTHER[:2] / OTHER
    target.parent.mkdir()
    entry(store).rename(target)
    assert store.get(OTHER) is None


def test_every_one_of_200_flipped_bits_is_found(store: Store) -> None:
    draw = random.Random(1)
    for _ in range(200):
        path = draw.choice([p for p in sorted(entry(store).rglob("*")) if p.is_file()])
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        assert store.get(KEY) is None


def test_verify_names_each_damaged_entry_and_leaves_the_sound_ones(store: Store) -> None:
    _grow(entry(store))
    entry(store, OTHER)
    [problem] = store.verify()
    assert KEY in problem
    assert "model.bin" in problem
    assert store.verify() == []
    assert store.get(OTHER) is not None


def test_an_input_that_changes_during_the_build_stops_publishing(store: Store) -> None:
    source = store.put(KEY, Kind.DATA, build)

    def mutate(folder: Path) -> dict[str, Any]:
        _grow(source.path)
        return build(folder)

    with pytest.raises(DataRefused, match="changed while the stage ran"):
        store.put(OTHER, Kind.MODEL, mutate, inputs=[source])
    assert store.get(OTHER) is None


def test_checkpoints_survive_a_failed_build_and_go_on_publish(store: Store) -> None:
    def interrupted(_: Path) -> dict[str, Any]:
        (store.work(KEY) / "checkpoint").write_text("step 7")
        raise KeyboardInterrupt

    def resumed(folder: Path) -> dict[str, Any]:
        assert (store.work(KEY) / "checkpoint").read_text() == "step 7"
        return build(folder)

    with pytest.raises(KeyboardInterrupt):
        store.put(KEY, Kind.MODEL, interrupted)
    store.gc()
    store.put(KEY, Kind.MODEL, resumed)
    assert left_over(store) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EROFS, errno.EIO])
def test_resources_that_run_out_in_a_build_are_exit_6_with_path_and_bytes(store: Store, code: int) -> None:
    def full(folder: Path) -> dict[str, Any]:
        raise OSError(code, os.strerror(code), str(folder / "model.bin"))

    with pytest.raises(ResourceError, match=r"bytes free") as caught:
        store.put(KEY, Kind.MODEL, full)
    assert caught.value.exit_code == 6
    assert "model.bin" in (caught.value.where or "")
    assert left_over(store) == []


def test_a_held_lock_is_announced_and_then_times_out(store: Store, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKD_LOCK_TIMEOUT", "0.3")
    monkeypatch.setattr("edgekd.store._NOTICE_AFTER_S", 0.1)
    lock = try_lock(store.root / "locks" / KEY)
    assert lock is not None
    with lock, pytest.raises(LockTimeout):
        store.put(KEY, Kind.MODEL, build)
    assert len(warnings) == 1
    assert "waiting" in warnings[0]
    assert not store.put(KEY, Kind.MODEL, build).cached


def test_a_lock_timeout_that_is_no_number_is_a_usage_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKD_LOCK_TIMEOUT", "soon")
    with pytest.raises(UsageError, match="seconds"):
        store.put(KEY, Kind.MODEL, build)


def test_peek_reads_no_file_but_the_manifest(store: Store) -> None:
    path = entry(store)
    (path / "model.bin").unlink()
    manifest = store.peek(KEY)
    assert manifest is not None
    assert manifest.kind is Kind.MODEL
    assert set(manifest.files) == {"model.bin", "sub/note.txt"}


def test_entries_tell_size_and_last_use(store: Store) -> None:
    path = entry(store)
    os.utime(path / MANIFEST, (1000, 1000))
    [(manifest, folder, size, used)] = store.entries()
    assert (manifest.key, folder, used) == (KEY, path, 1000)
    assert size == sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    store.get(KEY)
    [(_, _, _, used)] = store.entries()
    assert used > 1000


def aged(store: Store, key: str, days: float) -> Path:
    path = entry(store, key)
    then = path.stat().st_mtime - days * 86_400
    os.utime(path / MANIFEST, (then, then))
    return path


def test_gc_by_age_takes_old_entries_only(tmp_path: Path) -> None:
    aged(Store(tmp_path), KEY, 40)
    aged(Store(tmp_path), OTHER, 3)
    assert Store(tmp_path).gc(older_than_days=30, dry_run=True).kept == 1
    assert Store(tmp_path).peek(KEY) is not None
    report = Store(tmp_path).gc(older_than_days=30)
    assert (report.kept, len(report.removed), report.busy) == (1, 1, False)
    assert report.freed_bytes > 0
    assert Store(tmp_path).get(KEY) is None
    assert Store(tmp_path).get(OTHER) is not None


def test_gc_leaves_every_entry_while_another_store_object_is_in_use(store: Store) -> None:
    aged(store, KEY, 40)
    report = Store(store.root).gc(older_than_days=30)
    assert (report.kept, report.removed, report.busy) == (1, [], True)
    assert store.get(KEY) is not None


def test_gc_by_size_takes_the_least_recently_used_first(tmp_path: Path) -> None:
    keys = [digest_of(n) for n in range(4)]
    for n, key in enumerate(keys):
        aged(Store(tmp_path), key, 10 - n)
    one = next(iter(Store(tmp_path).entries()))[2]
    report = Store(tmp_path).gc(max_bytes=2 * one + 100)
    assert report.kept == 2
    assert [Store(tmp_path).peek(k) is not None for k in keys] == [False, False, True, True]


def test_gc_never_takes_what_this_object_handed_out(store: Store) -> None:
    aged(store, KEY, 40)
    assert store.gc(older_than_days=30).kept == 1


def test_gc_removes_dead_scratch_old_work_published_work_and_quarantine(store: Store) -> None:
    _grow(entry(store))
    store.get(KEY)
    entry(store)
    for name in (f"tmp/{OTHER}.00000000", f"work/{KEY}", f"work/{OTHER}"):
        (store.root / name).mkdir()
        (store.root / name / "f").write_text("x")
    assert len(store.gc(dry_run=True).removed) == 3
    assert len(left_over(store)) == 4
    store.gc()
    assert left_over(store) == [f"work/{OTHER}"]
    store.gc(older_than_days=0)
    assert left_over(store) == []


def test_gc_leaves_the_scratch_and_work_of_a_live_builder(store: Store) -> None:
    def collected_meanwhile(folder: Path) -> dict[str, Any]:
        (store.work(KEY) / "checkpoint").write_text("x")
        assert Store(store.root).gc(older_than_days=0).busy
        assert (store.work(KEY) / "checkpoint").exists()
        return build(folder)

    assert isinstance(store.put(KEY, Kind.MODEL, collected_meanwhile), Artifact)


def test_folders_are_private_and_a_shared_root_is_refused(store: Store, tmp_path: Path) -> None:
    assert {oct(p.stat().st_mode & 0o777) for p in (store.root, *store.root.iterdir()) if p.is_dir()} == {"0o700"}
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ResourceError, match="other users"):
        Store(shared)


def test_a_root_that_is_a_file_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ResourceError, match="is a file"):
            Store(root)


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with pytest.raises(ResourceError, match="locks do not work"):
        Store(tmp_path)


def test_the_default_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "from-env"))
    assert Store().root == tmp_path / "from-env"
    monkeypatch.delenv("EDGEKD_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store().root == tmp_path / ".cache" / "edgekd"
