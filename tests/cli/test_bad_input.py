"""Bad input through the command line: the documented exit code, and what, where, what was expected and what to do next."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgekd.store import Store
from tests.support import QUICKSTART, Finished, Result, artifacts, environment, run_here, write_images

BASE = Path(QUICKSTART).read_text(encoding="utf-8")


def refused(result: Result, code: int, *words: str) -> None:
    """The exit code, every word (a pattern), a next step, and no traceback."""
    assert result.code == code, result.text
    assert "Traceback" not in result.text
    assert "hint: " in result.err
    assert [w for w in words if not re.search(w, result.err, re.I)] == [], result.err


def compress_folder(folder: Path, *more: str) -> Result:
    overrides = ("data.format=image_folder", f"data.root={folder}", *more)
    return run_here("compress", QUICKSTART, *(x for o in overrides for x in ("-o", o)), "--no-gate")


# ------------------------------------------------------------------------------------------------------------ recipes
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE.replace("distill:", "distil:", 1), (r"bad\.yaml:\d+:\d+", "unknown stage 'distil'", "did you mean 'distill'")),
        (BASE.replace("epochs:", "epohcs:", 1), (r"bad\.yaml:\d+:\d+", "epohcs", "did you mean 'epochs'")),
        (BASE.replace("model:", "modle:", 1), (r"bad\.yaml:\d+:\d+", "did you mean 'model'")),
        ("version: !!python/object/apply:os.system ['true']\n", (r"bad\.yaml:1",)),
        ("version: 1\nversion: 1\n", (r"bad\.yaml:2", "version")),
        ("version: &a 1\nseed: *a\n", (r"bad\.yaml:\d+",)),
        ("version: [1\n", (r"bad\.yaml:\d+",)),
        ("- a list\n", (r"bad\.yaml:1:1", "mapping")),
        ("", (r"bad\.yaml:1:1",)),
        ("\x00\x01", (r"bad\.yaml",)),
        ("version: 2\n", (r"bad\.yaml:1:1", "version: input should be 1, got 2")),
    ],
)
def test_a_bad_recipe_is_2_with_the_place(tmp_path: Path, text: str, words: tuple[str, ...], home: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    result = run_here("check", tmp_path / "bad.yaml")
    refused(result, 2, *words)


def test_all_problems_of_a_recipe_come_at_once(tmp_path: Path) -> None:
    text = BASE.replace("resnet10t", "resnet19").replace("method: ofa", "method: offa").replace("  host:", "  rpi55:")
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    result = run_here("check", tmp_path / "bad.yaml")
    refused(result, 2, "resnet19", "offa", "rpi55")
    assert len([line for line in result.err.splitlines() if line.startswith("error: ")]) == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.arch=resnet19", ("unknown architecture 'resnet19'", "resnet18")),
        ("distill.method=offa", ("unknown method 'offa'", "'ofa'")),
        ("prune.criterion=l3", ("unknown criterion 'l3'", "l1")),
        ("data.format=image_foldr", ("unknown format", "image_folder")),
        ("targets.rpi55={}", ("unknown device 'rpi55'", "rpi5")),
        ("distil.epochs=3", ("no section or stage 'distil'", "distill")),
        ("distill.epohcs=3", ("epohcs", "epochs")),
        ("distill.epochs=0", ("greater than or equal to 1",)),
        ("distill.lr=.nan", ("lr",)),
        ("teacher=null", ("no teacher",)),
        ("targets.host.backend=tensorflow", ("unknown backend", "tensorrt")),
    ],
)
def test_an_unknown_name_or_value_is_2_with_a_suggestion(override: str, words: tuple[str, ...]) -> None:
    result = run_here("check", QUICKSTART, "-o", override)
    refused(result, 2, *map(re.escape, words))


def test_an_unknown_device_on_the_command_line_is_2() -> None:
    refused(run_here("compress", QUICKSTART, "--device", "rpi55"), 2, "rpi55", r"rpi5\b")


def test_user_code_that_is_missing_or_raises_is_2(tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text("1 / 0\n")
    for name, word in (("missing.py", "no file"), ("raises.py", "ZeroDivisionError")):
        result = run_here("check", QUICKSTART, "--code", tmp_path / name)
        assert result.code == 2
        assert word in result.err


# ------------------------------------------------------------------------------------------------------------ data
def test_a_missing_data_folder_is_3(tmp_path: Path, home: Path) -> None:
    refused(compress_folder(tmp_path / "nowhere"), 3, "nowhere", "not found", "data.root")


def test_an_empty_data_folder_is_3(tmp_path: Path, home: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(compress_folder(tmp_path / "empty"), 3, "empty", "expected images")


def test_a_folder_of_other_files_says_what_it_holds(tmp_path: Path, home: Path) -> None:
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "x.tiff").touch()
    refused(compress_folder(tmp_path / "data"), 3, "empty", r"\.tiff")


def test_one_class_only_is_3(tmp_path: Path, home: Path) -> None:
    refused(compress_folder(write_images(tmp_path / "data", classes=1)), 3, "one class only", "class0")


def test_a_corrupt_jpeg_is_3_and_named_with_the_way_to_skip_it(tmp_path: Path, home: Path) -> None:
    data = write_images(tmp_path / "data", suffix=".jpg")
    victim = data / "class1" / "005.jpg"
    victim.write_bytes(victim.read_bytes()[:200])
    refused(compress_folder(data), 3, r"class1/005\.jpg", "on_bad_image=skip")


def test_more_corrupt_images_than_allowed_are_3_even_when_skipping(tmp_path: Path, home: Path) -> None:
    data = write_images(tmp_path / "data", suffix=".jpg")
    for name in ("001.jpg", "002.jpg"):
        (data / "class1" / name).write_bytes(b"\xff\xd8\xff no jpeg")
    refused(compress_folder(data, "data.on_bad_image=skip"), 3, "of 36 images do not decode", r"0\.10%", "max_bad")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (("class0/000.png,a,train", "class1/000.png,b,train", "class2/000.png,c,test"), ("label c", "not among the classes")),
        (("class0/000.png,a", "class0/000.png,a", "class1/000.png,b"), ("listed twice",)),
        (("class0/000.png,", "class1/000.png,b"), (r"manifest\.csv:2", "missing, empty or unknown")),
        (("../outside.png,a", "class1/000.png,b"), (r"manifest\.csv:2", "not a plain relative path")),
        (("class0/999.png,a", "class1/000.png,b"), (r"manifest\.csv:2", "not there")),
    ],
)
def test_a_bad_manifest_row_is_3_with_its_place(tmp_path: Path, home: Path, rows: tuple[str, ...], words: tuple[str, ...]) -> None:
    data = write_images(tmp_path / "data", each=2)
    (data / "manifest.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n")
    refused(run_here("compress", QUICKSTART, "-o", "data.format=manifest", "-o", f"data.root={data}"), 3, *words)


# ------------------------------------------------------------------------------------------------------------ models
@pytest.fixture(scope="module")
def state() -> dict[str, object]:
    import timm

    return dict(timm.create_model("resnet10t", num_classes=10).state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("layer1.0.conv1.weight"), ("missing", r"layer1\.0\.conv1\.weight")),
        (lambda s: s.update(surplus=s["fc.bias"].clone()), ("surplus",)),
        (lambda s: s.update({"fc.weight": s["fc.weight"][:7].clone()}), (r"fc\.weight",)),
    ],
    ids=["missing", "extra", "wrong shape"],
)
def test_a_checkpoint_that_does_not_fit_is_3_and_names_the_key(tmp_path: Path, state: dict[str, object], change, words) -> None:
    import torch

    changed = dict(state)
    change(changed)
    torch.save(changed, tmp_path / "weights.pt")
    result = run_here("import", tmp_path / "weights.pt", "--arch", "resnet10t", "--num-classes", "10", "--out", tmp_path / "o.safetensors")
    refused(result, 3, r"weights\.pt", *words)
    assert not (tmp_path / "o.safetensors").exists()


def test_weights_for_another_number_of_classes_are_3(tmp_path: Path, state: dict[str, object], images: Path, home: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, tmp_path / "ten.safetensors")
    result = run_here("export", tmp_path / "ten.safetensors", "--arch", "resnet10t", "--data", images, "--image-size", "32")
    refused(result, 3, r"ten\.safetensors", r"fc\.", "10", "3")


def test_a_malicious_checkpoint_is_3_and_runs_nothing(tmp_path: Path) -> None:
    import torch

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    refused(run_here("import", tmp_path / "evil.pt", "--arch", "resnet18"), 3, r"evil\.pt")
    assert not (tmp_path / "pwned").exists()


def test_junk_instead_of_onnx_is_3(tmp_path: Path, images: Path, home: Path) -> None:
    (tmp_path / "not.onnx").write_bytes(b"not a model" * 99)
    refused(run_here("profile", tmp_path / "not.onnx"), 3, r"not\.onnx")
    refused(run_here("predict", tmp_path / "not.onnx", "--device", "rpi5"), 3, r"not\.onnx")
    refused(run_here("quantize", tmp_path / "not.onnx", "--data", images, "--image-size", "32"), 3, r"not\.onnx|model")


def test_an_onnx_file_with_external_data_is_3(tmp_path: Path) -> None:
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.zeros((64, 64), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    onnx.save(model, tmp_path / "ext.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    refused(run_here("profile", tmp_path / "ext.onnx"), 3, r"ext\.onnx", "another file", "external_data=False")


def test_weights_without_an_architecture_are_2(tmp_path: Path, images: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"x")
    refused(run_here("export", tmp_path / "w.safetensors", "--data", images), 2, "architecture", "--arch")


# ------------------------------------------------------------------------------------------------------------ resources
def test_a_full_disk_is_6_with_path_and_bytes_and_leaves_the_store_valid(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import edgekd.store

    def full(folder: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "manifest.json"))

    with monkeypatch.context() as patch:
        patch.setattr(edgekd.store, "seal", full)
        result = run_here("compress", QUICKSTART, "--no-gate")
    refused(result, 6, "no space left", re.escape(str(home)), "bytes free", "store gc")
    assert not list((home / "v1").glob("*/*"))
    assert not list((home / "tmp").iterdir())
    assert run_here("store", "verify").code == 0


def test_too_little_space_is_6_before_anything_starts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.safeio import files

    monkeypatch.setattr(files, "free_bytes", lambda _: 10**6)
    refused(run_here("compress", QUICKSTART), 6, "1000000 bytes free", "gc")
    assert not list((home / "v1").glob("*/*"))


def test_memory_that_runs_out_is_6_and_suggests_a_smaller_batch(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import edgekd.data.dataset

    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(edgekd.data.dataset, "build", exhausted)
    refused(run_here("compress", QUICKSTART, "--no-gate"), 6, "9 GiB", "batch_size")


def test_a_store_that_is_a_file_is_6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGEKD_HOME", str(tmp_path / "file"))
    refused(run_here("store", "list"), 6, "EDGEKD_HOME")


# ------------------------------------------------------------------------------------------------------------ signals
def start(args: tuple[str, ...], home: Path) -> subprocess.Popen[str]:
    env = environment(EDGEKD_HOME=str(home), PYTHONUNBUFFERED="1")
    return subprocess.Popen(
        [sys.executable, "-m", "edgekd", "compress", *args], env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def stop_at(p: subprocess.Popen[str], step: str, number: signal.Signals, after_s: float) -> tuple[int, str]:
    """Waits for a step's line (or, for `step: `, its first line of progress), then sends the signal; returns the exit code and all that was said."""
    assert p.stderr is not None
    said = ""
    for line in p.stderr:
        said += line
        if line.rstrip().endswith(f"] {step}") or (step.endswith(": ") and line.strip().startswith(step)):
            break
    time.sleep(after_s)
    p.send_signal(number)
    _, rest = p.communicate(timeout=60)
    return p.returncode, said + rest


def test_ctrl_c_while_training_is_130_and_sigterm_143_and_both_keep_a_checkpoint(quickstart: Finished, tmp_path: Path) -> None:
    home = Path(shutil.copytree(quickstart.home, tmp_path / "home"))
    args = (*quickstart.args, "-o", "teacher.train.epochs=5000", "--out", str(tmp_path / "run"))
    before = {p.name for p in (home / "v1").glob("*/*")}
    sizes = []
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        returned, said = stop_at(start(args, home), "teacher: ", number, 1.0)
        assert returned == code, said
        assert "Traceback" not in said
        assert "continues from the last checkpoint" in said
        checkpoints = [p for p in (home / "work").rglob("*") if p.is_file()]
        assert checkpoints
        sizes.append(max(p.stat().st_mtime_ns for p in checkpoints))
    assert sizes[0] < sizes[1], "the second run went on and checkpointed again"
    published = [str(m.recipe["step"]) for m, path, *_ in Store(home).entries() if path.name not in before]
    assert published == ["teacher.speed"], "how fast a longer training runs is measured again, and nothing else was published"
    assert not list((home / "tmp").iterdir())
    assert not (tmp_path / "run").exists()


def test_ctrl_c_outside_training_is_130_and_leaves_nothing_half_written(home: Path, tmp_path: Path) -> None:
    returned, said = stop_at(start((QUICKSTART, "-o", "data.max_per_class=20"), home), "preflight", signal.SIGINT, 1.0)
    assert returned == 130, said
    assert "Traceback" not in said
    assert not list((home / "tmp").iterdir())
    assert "preflight" not in artifacts(home)  # whoever caught the signal inside, the step was not published


# ------------------------------------------------------------------------------------------------------------ the run folder
def test_a_run_never_replaces_a_folder_that_is_no_bundle(home: Path, tmp_path: Path) -> None:
    kept = tmp_path / "mine" / "host" / "thesis.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("do not delete")
    result = run_here("compress", QUICKSTART, "--out", tmp_path / "mine")
    assert result.code == 2
    assert "'host' is there already, and is no bundle of an earlier run" in result.err
    assert kept.read_text() == "do not delete"


def test_a_run_folder_that_cannot_be_made_is_refused_before_anything_runs(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        result = run_here("compress", QUICKSTART, "--out", place)
        assert result.code == 2, result.text
        assert "the run folder cannot be made" in result.err
    assert not list((home / "v1").glob("*/*"))


def test_two_runs_never_share_a_default_folder(tmp_path: Path) -> None:
    from edgekd.api import _new_folder

    made = [_new_folder(tmp_path / "runs", "quickstart") for _ in range(3)]
    assert [p.name for p in made] == ["quickstart-1", "quickstart-2", "quickstart-3"]
    assert all(p.is_dir() for p in made)


def test_a_run_that_fails_leaves_no_empty_folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_here("compress", QUICKSTART, "-o", "data.max_per_class=20", "-o", "teacher.args={}")
    assert result.code == 3, result.text
    assert "img_size" in result.err  # the ViT wants 224 pixels: said before training, with what to set
    assert not (tmp_path / "runs" / "quickstart-1").exists()
