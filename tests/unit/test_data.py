"""Formats, splits, the DATA artifact and its batches, on small generated datasets."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from edgekd import registry
from edgekd.config import key_fields
from edgekd.data import hashes
from edgekd.data.config import DataConfig
from edgekd.data.dataset import Dataset, build
from edgekd.data.index import UNLABELLED, Index, Sample, format_of, judged_by_labels, scan
from edgekd.data.loader import batches, epoch_order
from edgekd.data.preprocess import PREPROCESS, describe, preprocess
from edgekd.data.splits import assign
from edgekd.errors import DataRefused, FileMissing, ImageRefused

SUFFIX_FORMAT = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}


# ------------------------------------------------------------------------------------------------ generated datasets
def write_image(path: Path, seed: int, size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path, SUFFIX_FORMAT[path.suffix])
    return path


def image_tree(root: Path, parts: tuple[str, ...] = ("train", "test"), per_class: int = 12, suffix: str = ".jpg") -> Path:
    for p, part in enumerate(parts):
        for c, name in enumerate(("cat", "dog", "elk")):
            for i in range(per_class):
                write_image(root / part / name / f"{i:03d}{suffix}", seed=10_000 * p + 100 * c + i)
    return root


def manifest_tree(root: Path, *, jsonl: bool = False) -> Path:
    image_tree(root, ("images",))
    rows = [
        {"path": f"images/{c}/{i:03d}.jpg", "label": c, "split": "test" if i > 9 else "train"}
        for c in ("cat", "dog", "elk")
        for i in range(12)
    ]
    if jsonl:
        (root / "manifest.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    else:
        (root / "manifest.csv").write_text("path,label,split\n" + "".join(f"{r['path']},{r['label']},{r['split']}\n" for r in rows))
    return root


def cifar_tree(root: Path, *, classes: int = 10, per_class: int = 4) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    names = ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin") if classes == 10 else ("train.bin", "test.bin")
    for name in names:
        labels = np.tile(np.arange(classes, dtype=np.uint8), per_class)[:, None]
        pixels = draw.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        rows = [labels, pixels] if classes == 10 else [labels // 5, labels, pixels]
        (root / name).write_bytes(np.concatenate(rows, 1).tobytes())
    return root


def config(root: Path | None, format: str = "image_folder", **values: object) -> DataConfig:
    return DataConfig.model_validate({"format": format, "root": root, "image_size": 16, "workers": 2, **values})


def made(cfg: DataConfig, out: Path, seed: int = 0, **kw: object) -> Dataset:
    out.mkdir()
    build(cfg, seed, out, **kw)  # type: ignore[arg-type]
    return Dataset.open(out, cfg.root, workers=cfg.workers)


TREES = {
    "image_folder": image_tree,
    "manifest": manifest_tree,
    "cifar": cifar_tree,
    "digits": lambda root: None,
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path / "tree")


# ------------------------------------------------------------------------------------------------ every format
def test_every_format_in_the_folder_is_tested() -> None:
    assert set(registry.names("format")) == set(TREES)


@pytest.mark.parametrize("name", registry.names("format"))
def test_a_built_dataset_has_disjoint_parts_that_hold_every_sample(name: str, tmp_path: Path) -> None:
    data = made(config(TREES[name](tmp_path / "tree"), name), tmp_path / "out")
    parts = [data.split(p) for p in ("train", "val", "test")]
    assert all(len(p) for p in parts)
    assert sorted(np.concatenate(parts)) == list(range(len(data)))
    assert len(set(data.ids)) == len(data)


@pytest.mark.parametrize("name", registry.names("format"))
def test_every_part_split_off_by_seed_has_every_class(name: str, tmp_path: Path) -> None:
    data = made(config(TREES[name](tmp_path / "tree"), name), tmp_path / "out")
    for part in ("train", "val", "test"):
        assert set(data.labels[data.split(part)]) == set(range(len(data.classes)))


@pytest.mark.parametrize("name", registry.names("format"))
def test_kept_and_decoded_pixels_are_equal(name: str, tmp_path: Path) -> None:
    root = TREES[name](tmp_path / "tree")
    kept = made(config(root, name, cache="on"), tmp_path / "kept")
    decoded = made(config(root, name, cache="off"), tmp_path / "decoded")
    at = np.arange(len(kept))[::-1][:150]
    assert kept.cached
    assert not decoded.cached
    assert np.array_equal(kept.images(at), decoded.images(at))
    assert (tmp_path / "kept/index.json").read_bytes() == (tmp_path / "decoded/index.json").read_bytes()


@pytest.mark.parametrize("name", registry.names("format"))
def test_building_twice_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    root = TREES[name](tmp_path / "tree")
    made(config(root, name, workers=0), tmp_path / "a")
    made(config(root, name, workers=4), tmp_path / "b")
    for file in ("index.json", "images.npy"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name", registry.names("format"))
def test_batches_are_the_same_for_0_1_2_and_4_workers(name: str, tmp_path: Path) -> None:
    cfg = config(TREES[name](tmp_path / "tree"), name, cache="off", max_per_class=8)
    made(cfg, tmp_path / "out")
    seen = set()
    for workers in (0, 1, 2, 4):
        data = Dataset.open(tmp_path / "out", cfg.root, workers=workers)
        h = hashlib.sha256()
        for epoch in (0, 1):
            for positions, images in batches(data, epoch_order(3, epoch, data.split("train")), 7):
                h.update(positions.tobytes() + images.numpy().tobytes())
        seen.add(h.hexdigest())
    assert len(seen) == 1


def test_scanning_imports_neither_torch_nor_numpy_nor_sklearn(tmp_path: Path) -> None:
    roots = {name: str(TREES[name](tmp_path / name) or "") for name in registry.names("format")}
    script = (
        "import sys, json; from edgekd.data.config import DataConfig; from edgekd.data.index import scan\n"
        "for name, root in json.loads(sys.argv[1]).items():\n"
        "    assert scan(DataConfig(format=name, root=root or None, image_size=16)).fingerprint\n"
        "bad = {'torch', 'numpy', 'sklearn', 'PIL'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, json.dumps(roots)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ pixels
@pytest.mark.parametrize("suffix", SUFFIX_FORMAT)
def test_pixels_of_a_file_are_those_of_pillow(suffix: str, tmp_path: Path) -> None:
    root = image_tree(tmp_path / "tree", suffix=suffix)
    data = made(config(root, interpolation="bicubic"), tmp_path / "out")
    at = data.ids.index(f"train/dog/005{suffix}")
    expected = Image.open(root / data.ids[at]).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(data.images(np.array([at]))[0], np.asarray(expected))
    assert data.classes[data.labels[at]] == "dog"


def test_digits_are_those_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    data = made(config(None, "digits", image_size=8), tmp_path / "out")
    x, y = load_digits(return_X_y=True)
    expected = np.round(x.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    assert np.array_equal(data.labels, y)
    assert np.array_equal(data.images(np.arange(len(data))), np.repeat(expected, 3, 3))


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_pixels_and_labels_are_those_of_the_records(classes: int, tmp_path: Path) -> None:
    root = cifar_tree(tmp_path / "tree", classes=classes)
    data = made(config(root, "cifar", image_size=32), tmp_path / "out")
    file = "data_batch_2.bin" if classes == 10 else "train.bin"
    record = np.frombuffer((root / file).read_bytes(), np.uint8).reshape(4 * classes, -1)[17]
    at = data.ids.index(f"{file}/00017")
    assert data.labels[at] == record[-3073]
    assert np.array_equal(data.images(np.array([at]))[0], record[-3072:].reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar_is_found_below_the_root_with_its_class_names(tmp_path: Path) -> None:
    folder = cifar_tree(tmp_path / "cifar-10-batches-bin")
    (folder / "batches.meta.txt").write_text("\n".join(f"name{i}" for i in range(10)) + "\n\n")
    index = scan(config(tmp_path, "cifar"))
    assert index.classes[3] == "name3"
    assert Counter(s.split for s in index.samples) == {"train": 80, "test": 40}


def test_crop_takes_the_centre_square_and_squash_everything() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    image = Image.fromarray(pixels)
    assert (preprocess(image, 10, "crop", "bilinear") == 200).all()
    squashed = preprocess(image, 10, "squash", "bilinear")
    assert squashed[0, 0, 0] == 0
    assert squashed[0, 5, 0] == 200


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for resize in ("crop", "squash"):
        assert np.array_equal(preprocess(Image.fromarray(pixels), 16, resize, "bicubic"), pixels)


def test_the_description_of_preprocessing_is_json_with_the_settings() -> None:
    text = json.loads(json.dumps(describe(96, "crop", "bicubic")))
    assert text == {**PREPROCESS, "image_size": 96, "resize": "crop", "interpolation": "bicubic"}


# ------------------------------------------------------------------------------------------------ config and keys
def test_settings_that_cannot_change_the_result_stay_out_of_keys(tmp_path: Path) -> None:
    a = key_fields(config(tmp_path, cache="on", workers=0))
    assert a == key_fields(config(tmp_path / "moved", cache="off", workers=9))
    assert a != key_fields(config(tmp_path, max_per_class=5))


@pytest.mark.parametrize(
    "bad",
    [
        {"image_size": 7},
        {"split": {"val": 0.5, "test": 0.5}},
        {"mean": (0.5, 0.5, 0.5)},
        {"mean": (0.5,) * 3, "std": (0, 1, 1)},
        {"colour": 1},
    ],
)
def test_a_setting_out_of_bounds_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        config(None, **bad)


# ------------------------------------------------------------------------------------------------ index and fingerprint
def test_the_fingerprint_follows_content_and_not_place(tree: Path, tmp_path: Path) -> None:
    before = scan(config(tree)).fingerprint
    moved = tmp_path / "moved"
    tree.rename(moved)
    assert scan(config(moved)).fingerprint == before


@pytest.mark.parametrize("change", ["add", "remove", "rename", "edit", "relabel", "resplit"])
def test_each_change_of_the_data_changes_the_fingerprint(change: str, tree: Path) -> None:
    before = scan(config(tree)).fingerprint
    victim = tree / "train/cat/000.jpg"
    {
        "add": lambda: write_image(tree / "train/cat/new.jpg", 77),
        "remove": victim.unlink,
        "rename": lambda: victim.rename(victim.with_name("other.jpg")),
        "edit": lambda: victim.write_bytes(victim.read_bytes()[:-1] + b"\0"),
        "relabel": lambda: victim.rename(tree / "train/dog/relabelled.jpg"),
        "resplit": lambda: victim.rename(tree / "test/cat/moved.jpg"),
    }[change]()
    assert scan(config(tree)).fingerprint != before


def test_files_that_are_no_images_are_ignored_and_counted(tree: Path, tmp_path: Path) -> None:
    (tree / "train/cat/notes.txt").write_text("x")
    (tree / "train/dog/nested").mkdir()
    (tree / "train/dog/.hidden.jpg").write_bytes(b"x")
    os.mkfifo(tree / "train/elk/pipe.jpg")
    assert scan(config(tree)).ignored == {".jpg": 2, ".txt": 1, "nested": 1}
    (tmp_path / "out").mkdir()
    assert build(config(tree), 0, tmp_path / "out")["ignored"][".txt"] == 1


def test_a_second_scan_hashes_nothing(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _age(tree)
    cfg, hashed = config(tree), []
    real = hashes._hash
    monkeypatch.setattr(hashes, "_SETTLED_NS", 0)
    monkeypatch.setattr(hashes, "_hash", lambda path: hashed.append(path) or real(path))
    first = scan(cfg, cache_dir=tmp_path / "cache").fingerprint
    assert len(hashed) == 72
    write_image(tree / "train/cat/new.jpg", 1)
    second = scan(cfg, cache_dir=tmp_path / "cache").fingerprint
    assert [p.name for p in hashed[72:]] == ["new.jpg"]
    assert second == scan(cfg).fingerprint != first


def test_an_edit_that_keeps_size_and_mtime_is_seen(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_SETTLED_NS", 0)
    before = scan(config(tree), cache_dir=tmp_path / "cache").fingerprint
    victim = tree / "train/cat/000.jpg"
    stat, data = victim.stat(), bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(data)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert scan(config(tree), cache_dir=tmp_path / "cache").fingerprint != before


def test_a_file_changed_just_now_is_not_trusted_to_the_stat_cache(tree: Path, tmp_path: Path) -> None:
    scan(config(tree), cache_dir=tmp_path / "cache")
    book = next((tmp_path / "cache/hashes").iterdir())
    assert json.loads(book.read_text()) == {}


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"a": 3}', b'{"a": [1, 2, 3]}', b"[" * 100_000, b"\xff\xfe"])
def test_a_damaged_stat_cache_costs_time_only(damage: bytes, tree: Path, tmp_path: Path) -> None:
    before = scan(config(tree), cache_dir=tmp_path / "cache").fingerprint
    next((tmp_path / "cache/hashes").iterdir()).write_bytes(damage)
    assert scan(config(tree), cache_dir=tmp_path / "cache").fingerprint == before


def _age(tree: Path) -> None:
    for path in tree.rglob("*.jpg"):
        os.utime(path, (1e9, 1e9))


# ------------------------------------------------------------------------------------------------ splits
def _index(counts: tuple[int, ...], parts: tuple[str | None, ...] = (None,)) -> Index:
    samples = [
        Sample(f"{part}/{c}/{i}", c, part, 1, hashlib.sha256(f"{part}{c}{i}".encode()).hexdigest())
        for part in parts
        for c, n in enumerate(counts)
        for i in range(n)
    ]
    return Index(tuple(map(str, range(len(counts)))), tuple(samples))


@given(
    counts=st.lists(st.integers(3, 60), min_size=2, max_size=5), seed=st.integers(0, 5), val=st.floats(0.05, 0.5), test=st.floats(0.05, 0.4)
)
@settings(max_examples=40, deadline=None)
def test_a_split_is_stratified_and_takes_the_fractions(counts: list[int], seed: int, val: float, test: float) -> None:
    cfg = config(None, "digits", split={"val": val, "test": test})
    try:
        samples = assign(_index(tuple(counts)), cfg, seed)
    except DataRefused:
        assert min(counts) - max(1, round(min(counts) * val)) - max(1, round(min(counts) * test)) <= 0
        return
    for label, count in enumerate(counts):
        got = Counter(s.split for s in samples if s.label == label)
        assert got["val"] == max(1, round(count * val))
        assert got["test"] == max(1, round(count * test))
        assert got["train"] == count - got["val"] - got["test"]


def test_a_split_depends_on_the_seed_and_not_on_the_order() -> None:
    cfg, index = config(None, "digits"), _index((30, 40))
    part_of = {s.id: s.split for s in assign(index, cfg, 0)}
    turned = Index(index.classes, index.samples[::-1])
    assert part_of == {s.id: s.split for s in assign(turned, cfg, 0)}
    assert part_of != {s.id: s.split for s in assign(index, cfg, 1)}


def test_a_new_class_moves_no_sample_of_the_others() -> None:
    cfg = config(None, "digits")
    small = {s.id: s.split for s in assign(_index((30, 40)), cfg, 0)}
    large = {s.id: s.split for s in assign(_index((30, 40, 20)), cfg, 0)}
    assert small.items() <= large.items()


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "val"), ("train", "val", "test")])
def test_parts_that_exist_are_left_alone(parts: tuple[str, ...]) -> None:
    index = _index((20, 20), parts)
    for before, after in zip(index.samples, assign(index, config(None, "digits"), 0), strict=True):
        assert before.split in (after.split, "train")


def test_a_subset_takes_the_same_few_of_each_class() -> None:
    cfg = config(None, "digits", max_per_class=3)
    samples = assign(_index((30, 40), ("train", "test")), cfg, 0)
    assert samples == assign(_index((30, 40), ("train", "test")), cfg, 0)
    assert set(Counter((s.split, s.label) for s in samples).values()) == {3}


def test_few_labels_leave_val_and_test_whole_and_are_part_of_the_many() -> None:
    index = _index((30, 40))
    whole = {s.id: s.split for s in assign(index, config(None, "digits"), 0)}
    few = {s.id: s.split for s in assign(index, config(None, "digits", split={"train_per_class": 3}), 0)}
    assert Counter(few.values())["train"] == 6
    assert {i: p for i, p in whole.items() if p != "train"} == {i: p for i, p in few.items() if p != "train"}
    assert few.items() <= whole.items()
    both = assign(index, config(None, "digits", max_per_class=2, split={"train_per_class": 3}), 0)
    assert set(Counter((s.split, s.label) for s in both).values()) == {2}


def test_a_split_with_its_own_seed_is_the_same_in_every_training() -> None:
    cfg, index = config(None, "digits", split={"seed": 5}), _index((30, 40))
    assert assign(index, cfg, 0) == assign(index, cfg, 1) == assign(index, config(None, "digits"), 5)
    few = [{s.id: s.split for s in assign(index, config(None, "digits", split={"seed": 5, "train_per_class": 3}), seed)} for seed in (0, 1)]
    assert few[0] != few[1]  # which few are trained on
    assert len({frozenset(i for i, p in part.items() if p != "train") for part in few}) == 1


def test_copies_of_an_image_in_two_parts_are_counted(tree: Path, tmp_path: Path) -> None:
    (tree / "test/cat/copy.jpg").write_bytes((tree / "train/cat/000.jpg").read_bytes())
    (tmp_path / "out").mkdir()
    assert build(config(tree), 0, tmp_path / "out")["shared_images"] == 1


def test_valid_and_validation_are_names_of_val(tmp_path: Path) -> None:
    for name in ("valid", "validation"):
        root = image_tree(tmp_path / name, ("train", name, "test"), per_class=2)
        assert Counter(s.split for s in scan(config(root)).samples) == {"train": 6, "val": 6, "test": 6}


def test_a_flat_folder_is_split_by_seed(tmp_path: Path) -> None:
    root = image_tree(tmp_path / "tree", (".",))
    index = scan(config(root))
    assert index.classes == ("cat", "dog", "elk")
    assert {s.split for s in index.samples} == {None}


# ------------------------------------------------------------------------------------------------ refusals
def _refusal(kind: type[Exception], cfg: DataConfig, tmp_path: Path) -> str:
    out = tmp_path / "refused"
    out.mkdir()
    with pytest.raises(kind) as caught:
        build(cfg, 0, out)
    error = caught.value
    assert type(error) is kind
    assert error.hint  # type: ignore[attr-defined]
    return str(error)


@pytest.mark.parametrize("name", ["image_folder", "manifest", "cifar"])
def test_a_missing_root_says_how_to_give_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileMissing, match="data folder not found") as caught:
        scan(config(tmp_path / "nowhere", name))
    assert caught.value.hint == "give it with -o data.root=DIR"
    with pytest.raises(FileMissing, match="data folder not given"):
        scan(config(None, name))


def test_an_empty_folder_is_refused_as_empty(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    assert "empty" in _refusal(DataRefused, config(tmp_path / "tree"), tmp_path)


def test_a_folder_of_other_files_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "tree/train/cat").mkdir(parents=True)
    (tmp_path / "tree/train/cat/a.tiff").write_bytes(b"x")
    text = _refusal(DataRefused, config(tmp_path / "tree"), tmp_path)
    assert "empty" in text
    assert ".tiff" in text


def test_one_class_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "tree/train/cat/a.jpg", 0)
    assert "one class only: cat" in _refusal(DataRefused, config(tmp_path / "tree"), tmp_path)


def test_a_class_too_small_to_split_is_named(tree: Path, tmp_path: Path) -> None:
    write_image(tree / "train/yak/a.jpg", 0)
    assert "class yak has 1 training sample, too few to split off val" in _refusal(DataRefused, config(tree), tmp_path)


def test_a_label_outside_the_classes_is_named(tree: Path, tmp_path: Path) -> None:
    write_image(tree / "test/yak/a.jpg", 0)
    assert "label yak of test/yak/a.jpg (test)" in _refusal(DataRefused, config(tree), tmp_path)


def test_parts_without_train_are_refused(tmp_path: Path) -> None:
    root = image_tree(tmp_path / "tree", ("val", "test"), per_class=2)
    assert "no train/" in _refusal(DataRefused, config(root), tmp_path)


def test_two_folders_for_val_are_refused(tmp_path: Path) -> None:
    root = image_tree(tmp_path / "tree", ("train", "val", "valid"), per_class=2)
    assert "more than one folder for val" in _refusal(DataRefused, config(root), tmp_path)


def test_a_file_name_that_is_not_utf8_is_refused(tree: Path, tmp_path: Path) -> None:
    (tree / "train/cat/000.jpg").rename(os.fsdecode(os.fsencode(tree) + b"/train/cat/\xff.jpg"))
    assert "not UTF-8" in _refusal(DataRefused, config(tree), tmp_path)


BAD_ROWS = {
    "no label": ("path,label\nimages/cat/000.jpg\n", "manifest.csv:2: a field is missing"),
    "no header": ("images/cat/000.jpg,cat\nimages/dog/000.jpg,dog\n", "manifest.csv:2: a field is missing"),
    "unknown column": ("path,label,spilt\nimages/cat/000.jpg,cat,test\n", "unknown"),
    "unknown split": ("path,label,split\nimages/cat/000.jpg,cat,tset\n", "did you mean 'test'?"),
    "absolute": ("path,label\n/etc/passwd.jpg,cat\n", "not a plain relative path"),
    "parent": ("path,label\n../secret.jpg,cat\n", "not a plain relative path"),
    "parent inside": ("path,label\nimages/../../secret.jpg,cat\n", "not a plain relative path"),
    "backslash": ("path,label\nimages\\cat\\000.jpg,cat\n", "not a plain relative path"),
    "not normal": ("path,label\nimages//cat/000.jpg,cat\n", "not a plain relative path"),
    "no image": ("path,label\nimages/cat/000.txt,cat\n", "not a supported image"),
    "a folder": ("path,label\nimages/folder.jpg,cat\n", "not a file"),
    "link out": ("path,label\nimages/link.jpg,cat\n", "leads outside"),
    "linked folder": ("path,label\nimages/out/secret.jpg,cat\n", "leads outside"),
    "twice": ("path,label\nimages/cat/000.jpg,cat\nimages/cat/000.jpg,dog\nimages/dog/001.jpg,dog\n", "listed twice"),
    "bad quote": ('path,label\n"images/cat/000.jpg"x,cat\n', "not CSV"),
    "empty": ("path,label\n", "empty"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_of_a_manifest_is_refused(case: str, tmp_path: Path) -> None:
    root = manifest_tree(tmp_path / "tree")
    (root / "images/folder.jpg").mkdir()
    write_image(tmp_path / "outside/secret.jpg", 0)
    write_image(tmp_path / "secret.jpg", 0)
    (root / "images/link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "images/out").symlink_to(tmp_path / "outside")
    text, expected = BAD_ROWS[case]
    (root / "manifest.csv").write_text(text)
    assert expected in _refusal(DataRefused, config(root, "manifest"), tmp_path)


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"path": 3, "label": "cat"}', '{"path": "images/cat/000.jpg", "label": true}', '{"path": "images/cat/000.jpg"}',
     '{"path": "images/cat/000.jpg", "label": "cat", "split": ["x"]}', "[" * 100_000, '{"path": "a\\u0000.jpg", "label": "cat"}'],
)  # fmt: skip
def test_a_bad_line_of_a_jsonl_manifest_is_refused_with_its_number(line: str, tmp_path: Path) -> None:
    root = manifest_tree(tmp_path / "tree", jsonl=True)
    good = (root / "manifest.jsonl").read_text().split("\n")[0]
    (root / "manifest.jsonl").write_text(f"{good}\n\n{line}\n")
    assert "manifest.jsonl:3" in _refusal(DataRefused, config(root, "manifest"), tmp_path)


@pytest.mark.parametrize("path", ["images/nowhere.jpg", "images/\\ud800.jpg", "images/" + "x" * 300 + ".jpg"])
def test_an_image_that_a_manifest_lists_and_is_not_there_is_missing(path: str, tmp_path: Path) -> None:
    root = manifest_tree(tmp_path / "tree", jsonl=True)
    (root / "manifest.jsonl").write_text(f'{{"path": "{path}", "label": "cat"}}')
    assert "is not there" in _refusal(FileMissing, config(root, "manifest"), tmp_path)


def test_a_manifest_is_the_root_itself_or_the_only_one_in_it(tmp_path: Path) -> None:
    root = manifest_tree(tmp_path / "tree")
    assert scan(config(root / "manifest.csv", "manifest")).fingerprint == scan(config(root, "manifest")).fingerprint
    (root / "manifest.jsonl").write_text("")
    assert "two manifests" in _refusal(FileMissing, config(root, "manifest"), tmp_path)
    (root / "manifest.jsonl").unlink()
    (root / "manifest.csv").rename(root / "list.csv")
    with pytest.raises(FileMissing, match="no manifest"):
        scan(config(root, "manifest"))


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    a, b = manifest_tree(tmp_path / "a"), manifest_tree(tmp_path / "b", jsonl=True)
    (a / "manifest.csv").write_text("\ufeff" + (a / "manifest.csv").read_text().replace("\n", "\r\n"))
    assert scan(config(a, "manifest")) == scan(config(b, "manifest"))


def test_numbers_as_labels_are_ordered_as_numbers(tmp_path: Path) -> None:
    root = manifest_tree(tmp_path / "tree")
    (root / "manifest.csv").write_text("path,label\n" + "".join(f"images/cat/{i:03d}.jpg,{i}\n" for i in range(12)))
    assert scan(config(root, "manifest")).classes == tuple(map(str, range(12)))


@pytest.mark.parametrize("damage", ["short", "label", "names", "absent"])
def test_a_damaged_cifar_is_refused(damage: str, tmp_path: Path) -> None:
    root = cifar_tree(tmp_path / "tree")
    file = root / "data_batch_1.bin"
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "label":
        file.write_bytes(b"\x0a" + file.read_bytes()[1:])
    elif damage == "names":
        (root / "batches.meta.txt").write_text("only\ntwo\n")
    else:
        for path in root.iterdir():
            path.unlink()
    expected = {"short": "cut short", "label": "has label 10", "names": "names 2 classes", "absent": "no binary CIFAR"}[damage]
    assert expected in _refusal(FileMissing if damage == "absent" else DataRefused, config(root, "cifar"), tmp_path)


def test_a_damaged_digits_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.data.formats import digits

    (tmp_path / "digits.csv.gz").write_bytes(gzip.compress(b"1,2,x\n"))
    monkeypatch.setattr(digits, "_file", lambda: tmp_path / "digits.csv.gz")
    digits._rows.cache_clear()
    with pytest.raises(DataRefused, match="damaged"):
        scan(config(None, "digits"))
    digits._rows.cache_clear()


# ------------------------------------------------------------------------------------------------ bad and changed images (F8, F11, G13)
def test_a_truncated_image_stops_the_build_and_is_named(tree: Path, tmp_path: Path) -> None:
    victim = tree / "train/dog/003.jpg"
    victim.write_bytes(victim.read_bytes()[:-40])
    for cache in ("on", "off"):
        assert str(victim) in _refusal(ImageRefused, config(tree, cache=cache), tmp_path)
        (tmp_path / "refused/images.npy").unlink(missing_ok=True)
        (tmp_path / "refused").rmdir()


@pytest.mark.parametrize("cache", ["on", "off"])
def test_skip_leaves_out_bad_images_and_names_them(cache: str, tree: Path, tmp_path: Path) -> None:
    whole = made(config(tree), tmp_path / "whole")
    (tree / "train/dog/003.jpg").write_bytes(b"no image")
    cfg = config(tree, on_bad_image="skip", max_bad=0.02, cache=cache)
    (tmp_path / "out").mkdir()
    meta = build(cfg, 0, tmp_path / "out")
    data = Dataset.open(tmp_path / "out", tree)
    assert list(meta["skipped"]) == ["train/dog/003.jpg"]
    assert sum(meta["samples"].values()) == len(data) == 71
    assert "train/dog/003.jpg" not in data.ids
    at = [whole.ids.index(i) for i in data.ids]
    assert np.array_equal(data.images(np.arange(71)), whole.images(np.array(at)))


def test_skip_refuses_more_bad_images_than_allowed(tree: Path, tmp_path: Path) -> None:
    for i in range(2):
        (tree / f"train/dog/00{i}.jpg").write_bytes(b"no image")
    text = _refusal(DataRefused, config(tree, on_bad_image="skip", max_bad=0.02), tmp_path)
    assert "2 of 72 images do not decode" in text


@pytest.mark.parametrize("suffix", SUFFIX_FORMAT)
def test_every_flipped_byte_after_indexing_is_found_by_the_index(suffix: str, tmp_path: Path) -> None:
    root = image_tree(tmp_path / "tree", per_class=3, suffix=suffix)
    data = made(config(root, cache="off"), tmp_path / "out")
    victim = root / data.ids[0]
    whole, draw = victim.read_bytes(), np.random.default_rng(0)
    for _ in range(25):
        at = int(draw.integers(len(whole)))
        victim.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << int(draw.integers(8)))]) + whole[at + 1 :])
        with pytest.raises(DataRefused, match="its bytes changed"):
            data.images(np.array([0]))
    victim.write_bytes(whole)
    assert data.images(np.array([0])).shape == (1, 16, 16, 3)


@pytest.mark.parametrize("suffix", SUFFIX_FORMAT)
def test_every_truncation_is_found_by_decoding(suffix: str, tmp_path: Path) -> None:
    whole = write_image(tmp_path / f"a{suffix}", 0).read_bytes()
    form = format_of("image_folder")
    for at in np.linspace(0, len(whole) * 0.9, 25).astype(int):
        with pytest.raises(ImageRefused):
            form.image(whole[:at], "a")


@pytest.mark.parametrize("change", ["edit", "remove"])
def test_a_file_changed_between_index_and_read_is_refused(change: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.data import dataset

    def index_then_change(cfg: DataConfig, **kw: object) -> Index:
        index = scan(cfg)
        victim = tree / "train/dog/003.jpg"
        victim.unlink() if change == "remove" else write_image(victim, 999)
        return index

    monkeypatch.setattr(dataset, "scan", index_then_change)
    for policy in ("fail", "skip"):
        (tmp_path / policy).mkdir()
        assert "003.jpg" in _refusal(DataRefused, config(tree, on_bad_image=policy), tmp_path / policy)
        write_image(tree / "train/dog/003.jpg", 103)


def test_pixels_beyond_the_limit_are_not_kept(tree: Path, tmp_path: Path) -> None:
    size = 72 * 16 * 16 * 3
    assert made(config(tree), tmp_path / "a", limit_bytes=size).cached
    assert not made(config(tree), tmp_path / "b", limit_bytes=size - 1).cached


def test_pixels_that_do_not_fit_the_index_are_refused(tree: Path, tmp_path: Path) -> None:
    made(config(tree), tmp_path / "out")
    np.save(tmp_path / "out/images.npy", np.zeros((3, 16, 16, 3), np.uint8))
    with pytest.raises(DataRefused, match="the pixels are uint8"):
        Dataset.open(tmp_path / "out")


def test_kept_pixels_need_no_source(tree: Path, tmp_path: Path) -> None:
    data = made(config(tree), tmp_path / "out")
    tree.rename(tmp_path / "gone")
    assert Dataset.open(tmp_path / "out").images(data.split("val")).shape[1:] == (16, 16, 3)


# ------------------------------------------------------------------------------------------------ order and batches
def test_an_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch_only() -> None:
    positions = np.arange(0, 500, 3)
    order = epoch_order(1, 0, positions)
    assert sorted(order) == list(positions)
    assert np.array_equal(order, epoch_order(1, 0, positions[::-1]))
    assert len({epoch_order(s, e, positions).tobytes() for s in range(3) for e in range(5)}) == 15


def test_each_sample_is_about_equally_often_in_each_place() -> None:
    places = np.array([np.argsort(epoch_order(0, e, np.arange(10))) for e in range(2000)])
    counts = np.stack([np.bincount(places[:, i], minlength=10) for i in range(10)])
    assert ((counts - 200) ** 2 / 200).sum() < 160  # chi-square, 81 degrees of freedom: 160 has p < 1e-6


@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [32, 32, 8]), (True, [32, 32])])
def test_batches_follow_the_order(cache: str, drop_last: bool, sizes: list[int], tree: Path, tmp_path: Path) -> None:
    data = made(config(tree, cache=cache), tmp_path / "out")
    order = epoch_order(0, 0, np.arange(72))
    got = list(batches(data, order, 32, drop_last=drop_last))
    assert [len(b.positions) for b in got] == sizes
    for positions, images in got:
        assert np.array_equal(images.numpy(), data.images(positions))
    assert np.array_equal(np.concatenate([b.positions for b in got]), order[: sum(sizes)])


def test_a_lone_short_batch_is_not_dropped(tree: Path, tmp_path: Path) -> None:
    data = made(config(tree), tmp_path / "out")
    assert [len(b.positions) for b in batches(data, np.arange(5), 32, drop_last=True)] == [5]


def test_an_error_while_decoding_ahead_reaches_the_consumer_and_early_stop_ends_the_threads(tree: Path, tmp_path: Path) -> None:
    import threading

    data = made(config(tree, cache="off"), tmp_path / "out")
    run = batches(data, np.arange(72), 4)
    next(run)
    run.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]
    (tree / data.ids[40]).unlink()
    with pytest.raises(DataRefused, match="cannot be read"):
        list(batches(data, np.arange(72), 4))


# ------------------------------------------------------------------------------------------------ real data
CIFAR_TAR = Path(__file__).parents[3] / "shared/data/cifar10-jpeg.tar"


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR_TAR.exists(), reason="shared/data/cifar10-jpeg.tar is not beside the checkout")
def test_cifar_jpegs_are_indexed_split_and_decoded(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(CIFAR_TAR) as tar:
        for member in tar:
            name = Path(member.name)
            if member.isfile() and ".." not in name.parts and not name.is_absolute() and int(name.stem) < 40:
                (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "tree" / name).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    data = made(config(tmp_path / "tree", image_size=32), tmp_path / "out")
    assert len(data.classes) == 10
    assert [len(data.split(p)) for p in ("train", "val", "test")] == [340, 60, len(list((tmp_path / "tree/test").rglob("*.jpg")))]
    expected = Image.open(io.BytesIO((tmp_path / "tree" / data.ids[7]).read_bytes()))
    assert np.array_equal(data.images(np.array([7]))[0], np.asarray(expected))


# ------------------------------------------------------------------------------------------------ instead of data
def test_generated_samples_are_a_dataset_of_their_seed_whose_labels_mean_nothing(tmp_path: Path) -> None:
    from edgekd.data.config import SamplesConfig
    from edgekd.data.generated import build as generate

    cfg, found = SamplesConfig(image_size=20, classes=4, count=10), {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        generate(cfg, seed, tmp_path / name)
        found[name] = Dataset.open(tmp_path / name)
    first = found["a"]
    assert (first.labelled, first.classes, first.image_size) == (False, ("0", "1", "2", "3"), 20)
    assert [len(first.split(p)) for p in ("train", "val", "test")] == [0, 10, 0]
    pixels = {name: data.images(data.split("val")) for name, data in found.items()}
    assert len({image.tobytes() for image in pixels["a"]}) == 10
    assert np.array_equal(pixels["a"], pixels["b"])
    assert not np.array_equal(pixels["a"], pixels["c"])
    assert made(config(image_tree(tmp_path / "real")), tmp_path / "out").labelled


# ------------------------------------------------------------------------------------------------ no labels
def unlabelled(root: Path | None, format: str = "image_folder", **values: object) -> DataConfig:
    return config(root, format, **({"labels": "none", "classes": ["cat", "dog", "elk"]} | values))


def test_without_labels_images_are_found_at_any_depth_and_links_are_not_followed(tmp_path: Path) -> None:
    for name in ("a.jpg", "x/b.jpg", "x/y/z/c.jpg", "x/y/z/d.jpg", ".hidden/e.jpg"):
        write_image(tmp_path / "tree" / name, 0)
    (tmp_path / "tree/x/loop").symlink_to(tmp_path / "tree")
    index = scan(unlabelled(tmp_path / "tree"))
    assert [s.id for s in index.samples] == ["a.jpg", "x/b.jpg", "x/y/z/c.jpg", "x/y/z/d.jpg"]
    assert {s.label for s in index.samples} == {UNLABELLED}
    assert index.classes == ("cat", "dog", "elk")
    data = made(unlabelled(tmp_path / "tree"), tmp_path / "out")
    assert (data.labelled, set(data.labels.tolist())) == (False, {0})
    assert all(len(data.split(part)) for part in ("train", "val", "test"))


@pytest.mark.parametrize("format", ["image_folder", "manifest"])
def test_labels_of_val_and_test_stay_where_both_have_them_on_every_image(format: str, tmp_path: Path) -> None:
    root = image_tree(tmp_path / "tree", ("train", "val", "test"))
    rows = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.jpg"))]
    (root / "manifest.csv").write_text("path,label,split\n" + "".join(f"{r},{r.split('/')[1]},{r.split('/')[0]}\n" for r in rows))
    found = scan(unlabelled(root, format))
    given = {s.id: s.label for s in scan(config(root, format)).samples}
    assert judged_by_labels(found)
    assert all(s.label == (UNLABELLED if s.split == "train" else given[s.id]) for s in found.samples)
    turned = scan(unlabelled(root, format, classes=["elk", "cat", "dog"]))
    assert all(s.label == (given[s.id] + 1) % 3 for s in turned.samples if s.split != "train")
    fewer = scan(unlabelled(root, format, classes=["cat", "dog"]))  # of one class nothing is known
    assert not judged_by_labels(fewer)
    assert {s.label for s in fewer.samples} == {UNLABELLED}
    shutil.rmtree(root / "val")
    if format == "image_folder":  # val is split off train then
        assert not judged_by_labels(scan(unlabelled(root)))


def test_a_manifest_without_labels_is_read_where_there_are_none_and_refused_elsewhere(tmp_path: Path) -> None:
    root = manifest_tree(tmp_path / "tree")
    rows = (root / "manifest.csv").read_text().splitlines()[1:]
    (root / "manifest.csv").write_text("path\n" + "".join(f"{row.split(',')[0]}\n" for row in rows))
    assert len(scan(unlabelled(root, "manifest")).samples) == len(rows)
    assert "a field is missing" in _refusal(DataRefused, config(root, "manifest"), tmp_path)


def test_the_number_of_classes_must_be_said_and_two_images_are_too_few(tmp_path: Path) -> None:
    write_image(tmp_path / "tree/a.jpg", 0)
    write_image(tmp_path / "tree/b.jpg", 1)
    assert scan(unlabelled(tmp_path / "tree", classes=12)).classes == tuple(map(str, range(12)))
    with pytest.raises(DataRefused, match="nothing says how many classes there are") as caught:
        scan(unlabelled(tmp_path / "tree", classes=None))
    assert "-o data.classes=N" in str(caught.value.hint)
    assert "too few to split off" in _refusal(DataRefused, unlabelled(tmp_path / "tree"), tmp_path)


@pytest.mark.parametrize(
    "values", [{"max_per_class": 3}, {"split": {"train_per_class": 3}}, {"classes": ["a", "a"]}, {"classes": 1}, {"labels": "given"}]
)
def test_settings_that_do_not_go_with_missing_labels_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        unlabelled(None, **values)
