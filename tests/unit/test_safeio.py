"""safeio: files, containment, images, and weights that are sound or honestly refused (hostile pickles: ../attacks/test_checkpoints.py)."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from edgekd.errors import CheckpointRefused, FileMissing, ImageRefused, InputRefused, ResourceError
from edgekd.safeio.checkpoint import convert, fit_state_dict, import_checkpoint, load_weights, read_safetensors
from edgekd.safeio.files import contained, free_bytes, hash_and_sync, resource_errors, sha256_file, write_atomic
from edgekd.safeio.images import decode


# ---------------------------------------------------------------------------------------------------------------- files
def test_an_atomic_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for data in (b"old", b"new"):
        write_atomic(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_atomic_write_keeps_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "run.json"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(ResourceError, match=r"run\.json: no space left on device \(3 bytes needed, \d+ bytes free\)"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_hashes_are_sha256_and_links_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x" * 3_000_000)
    entry = hash_and_sync(path)
    assert entry.size == 3_000_000
    assert entry.sha256 == sha256_file(path) == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        sha256_file(tmp_path / "link")


def test_resource_errors_pass_what_is_not_about_resources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), resource_errors(tmp_path):
        (tmp_path / "none").read_bytes()
    assert free_bytes(tmp_path / "none" / "below") > 0


def test_a_path_below_a_root_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for text in ("a/x", "a/../a/x", "a/./x", "a//x"):
        assert contained(tmp_path / text, [tmp_path / "a"]) == tmp_path / "a" / "x"
    assert contained(tmp_path / "a", [tmp_path / "b", tmp_path / "a"]) == tmp_path / "a"


ESCAPES = [
    "../x",
    "..",
    "a/../../x",
    "/etc/passwd",
    "../root2/x",
    "link/x",
    "link",
    "up",
    "loop",
    "x\x00y",
    "../" + "a/" * 3000,
    "y" * 300 + "/../../../x",
]
ESCAPES += ["./../x", "a/b/../../../x", "//etc/passwd", "/", "../root/../x", "a/link2/x", "../root2"]


@pytest.mark.parametrize("text", ESCAPES, ids=lambda t: ascii(t)[:30])
def test_a_path_that_leaves_its_root_is_refused(tmp_path: Path, text: str) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "root2").mkdir()
    (root / "link").symlink_to(tmp_path / "root2")
    (root / "a" / "link2").symlink_to("../link")
    (root / "up").symlink_to("..")
    (root / "loop").symlink_to("loop")
    with pytest.raises(InputRefused, match="path under") as caught:
        contained(root / text, [root])
    assert caught.value.exit_code == 3


def test_no_root_contains_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputRefused):
        contained(tmp_path, [])


# ------------------------------------------------------------------------------------------------------------ safetensors
WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64), "c": torch.ones(3, dtype=torch.bfloat16)}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) and left[k].dtype == right[k].dtype for k in left)


def test_safetensors_come_back_bit_equal_with_metadata(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "w.safetensors", metadata={"arch": "resnet18"})
    for read in (read_safetensors, load_weights):
        tensors, metadata = read(tmp_path / "w.safetensors")
        assert same(tensors, WEIGHTS)
        assert metadata == {"arch": "resnet18"}


def test_a_safetensors_file_is_known_by_its_content(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "w.bin")
    assert same(load_weights(tmp_path / "w.bin")[0], WEIGHTS)


def packed(header: Any, data: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def tensor(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


UNSOUND = {
    "empty": b"",
    "short": b"\x01",
    "header_beyond_file": packed({}, size=1000),
    "header_of_2_60": packed({}, size=2**60),
    "no_json": packed(b"{nope"),
    "deep_json": packed(b'{"a":' * 50_000),
    "list": packed(b"[]"),
    "no_dict_entry": packed({"w": 3}),
    "no_dtype": packed({"w": {}}),
    "metadata_list": packed({"__metadata__": [1]}),
    "overlap": packed({**tensor(), "v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\x00" * 8),
    "hole": packed(tensor(data_offsets=[8, 16]), b"\x00" * 16),
    "past_the_end": packed(tensor(), b"\x00" * 4),
    "trailing_bytes": packed(tensor(), b"\x00" * 9),
    "shape_lies": packed(tensor(shape=[3]), b"\x00" * 8),
    "shape_overflows": packed(tensor(shape=[2**62, 4]), b"\x00" * 8),
    "negative_shape": packed(tensor(shape=[-2]), b"\x00" * 8),
    "name_twice": packed(
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\x00" * 4
    ),
    "complex": packed(tensor(dtype="C64", shape=[1]), b"\x00" * 8),
    "float8": packed(tensor(dtype="F8_E4M3", shape=[8]), b"\x00" * 8),
    "unknown_dtype": packed(tensor(dtype="F31"), b"\x00" * 8),
    "nan": packed(tensor(), struct.pack("<2f", 1.0, float("nan"))),
    "infinity": packed(tensor(), struct.pack("<2f", float("-inf"), 1.0)),
    "half_nan": packed(tensor(dtype="F16", shape=[4]), b"\xff" * 8),
    "pickle": b"\x80\x02cposix\nsystem\n.",
}


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_safetensors_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(UNSOUND[name])
    with pytest.raises(CheckpointRefused, match=r"w\.safetensors: ") as caught:
        load_weights(path)
    assert caught.value.expected
    assert caught.value.hint


def test_every_truncation_of_a_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(WEIGHTS, path)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointRefused):
            read_safetensors(path)


def test_a_missing_file_and_an_unknown_suffix_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("hello, hello")
    for read in (load_weights, import_checkpoint, read_safetensors):
        with pytest.raises(FileMissing, match=r"none\.pt"):
            read(tmp_path / "none.pt")
        with pytest.raises(FileMissing):
            read(tmp_path)
    with pytest.raises(CheckpointRefused, match=r"w\.txt.*not a checkpoint format"):
        load_weights(tmp_path / "w.txt")


# ------------------------------------------------------------------------------------------------------------ checkpoints
def converted(value: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What the confined process makes of a saved value, without the process."""
    torch.save(value, folder / "in.pt")
    convert(folder / "in.pt", folder)
    return read_safetensors(folder / "weights.safetensors")[0]


@pytest.mark.parametrize("nest", ["state_dict", "model", "model_state_dict", "net", "ema"])
def test_a_state_dict_is_found_in_its_nest_without_prefix(tmp_path: Path, nest: str) -> None:
    prefixed = {f"module.{k}": torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in WEIGHTS.items()}
    assert same(converted({"epoch": 3, nest: prefixed, "optimizer": {"lr": 0.1}, "best": torch.ones(1)}, tmp_path), WEIGHTS)


def test_a_bare_state_dict_is_taken_as_it_is(tmp_path: Path) -> None:
    tied = torch.arange(4.0)
    state = {"model.a": tied, "model.b": tied, "t": torch.ones(2, 3).t(), "module.x": torch.ones(1), "epoch": 3}
    assert same(converted(state, tmp_path), {"model.a": tied, "model.b": tied, "t": torch.ones(3, 2), "module.x": torch.ones(1)})


NOT_WEIGHTS = {
    "list": [torch.ones(1)],
    "tensor": torch.ones(1),
    "nothing": {},
    "numbers": {"epoch": 1},
    "nest_of_numbers": {"state_dict": {"epoch": 1}, "w": torch.ones(1)},
    "number_names": {0: torch.ones(1)},
    "empty_name": {"": torch.ones(1)},
    "sparse": {"w": torch.ones(2, 2).to_sparse()},
    "meta": {"w": torch.ones(2, device="meta")},
}


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_what_is_no_state_dict_of_dense_tensors_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointRefused):
        converted(NOT_WEIGHTS[name], tmp_path)


def test_a_checkpoint_is_imported_from_any_folder_through_the_confined_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "with space and 'quote"
    folder.mkdir()
    (folder / "torch.py").write_text("raise SystemExit('imported from the working folder')")
    torch.save({"state_dict": WEIGHTS}, folder / "w.th")
    monkeypatch.chdir(folder)
    assert same(import_checkpoint(Path("w.th")), WEIGHTS)
    assert sorted(p.name for p in folder.iterdir()) == ["torch.py", "w.th"]


def test_fitting_weights_pass_and_others_are_listed() -> None:
    shapes = {k: v.shape for k, v in WEIGHTS.items()}
    fit_state_dict(WEIGHTS, shapes, "w.pt")
    other = {"a.weight": torch.Size([2, 4]), "b": torch.Size([2]), **{f"n{i}": torch.Size([i]) for i in range(7)}}
    with pytest.raises(CheckpointRefused) as caught:
        fit_state_dict(WEIGHTS, other, "w.pt")
    text = str(caught.value)
    assert text.startswith("w.pt: the weights do not fit: 7 missing: n0 [0], n1 [1], n2 [2], n3 [3], n4 [4] and 2 more; 1 extra: c [3]; ")
    assert "1 of wrong shape: a.weight [2, 3] instead of [2, 4]" in text


# ----------------------------------------------------------------------------------------------------------------- images
def encoded(form: str, size: tuple[int, int] = (24, 16), mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(out, form)
    return out.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP"])
def test_four_formats_decode_to_rgb_from_bytes_and_from_a_file(tmp_path: Path, form: str) -> None:
    (tmp_path / "x").write_bytes(encoded(form))
    for source in (encoded(form), tmp_path / "x"):
        image = decode(source, "x")
        assert (image.mode, image.size) == ("RGB", (24, 16))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert decode(encoded("PNG", mode=mode), "x").mode == "RGB"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_images_are_refused_by_name(form: str) -> None:
    data = encoded(form)
    for cut in [*range(0, len(data) // 2, max(1, len(data) // 60)), len(data) * 3 // 4]:
        with pytest.raises(ImageRefused, match=r"parts/7\.img"):
            decode(data[:cut], "parts/7.img")


@pytest.mark.parametrize("form", ["GIF", "TIFF", "ICO", "PPM"])
def test_other_formats_are_refused(form: str) -> None:
    with pytest.raises(ImageRefused, match="not an image of a known format"):
        decode(encoded(form), "x")


@pytest.mark.parametrize("side", [8_100, 9_500, 60_000])
def test_a_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    bomb = bytearray(encoded("BMP"))
    bomb[18:26] = struct.pack("<ii", side, side)
    with pytest.raises(ImageRefused, match="pixels"):
        decode(bytes(bomb), "x")


def test_sixteen_bit_samples_are_refused_and_not_clipped() -> None:
    out = io.BytesIO()
    Image.new("I;16", (4, 4), 40_000).save(out, "PNG")
    with pytest.raises(ImageRefused, match="wider than 8 bits"):
        decode(out.getvalue(), "x")


def test_a_missing_image_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileMissing, match="a/b"):
        decode(tmp_path / "none", "a/b")
