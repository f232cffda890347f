"""A teacher in an ONNX file: its own size, its own kind of output and its own order of classes, and what it cannot be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

from edgekd.data.classes import outputs_of
from edgekd.errors import InputRefused, TrainingDiverged
from edgekd.export import adapt
from edgekd.models.spec import ModelSpec
from edgekd.profile.device import load_device
from edgekd.registry import load
from edgekd.stages.read_teacher import kind_of
from edgekd.train.black_box import BlackBox
from edgekd.train.views import View
from tests.support import linear_onnx

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
RNG = np.random.default_rng(0)
IMAGES = torch.from_numpy(RNG.random((5, 3, 12, 12), dtype=np.float32))


def opened(path: Path, name: str = "x", fixed: int | None = None) -> BlackBox:
    session = load("backend", "onnxruntime")().open(path, threads=1, device=load_device("host"))
    return BlackBox(session, {"input": name, "fixed_batch": fixed, "mean": MEAN, "std": STD})


def said(proto: Any, folder: Path, name: str = "x") -> np.ndarray[Any, Any]:
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, folder / "m.onnx")
    found: np.ndarray[Any, Any] = opened(folder / "m.onnx", name)(IMAGES, torch.arange(5), 0).logits.numpy()
    return found


@pytest.mark.parametrize("own", [6, 12, 19])
@pytest.mark.parametrize("opset", [13, 18])
def test_a_teacher_of_another_size_sees_what_a_torch_teacher_of_that_size_would(own: int, opset: int, tmp_path: Path) -> None:
    if own < 12 and opset < 18:
        pytest.skip("antialiasing came with opset 18")
    proto = linear_onnx(tmp_path / "t.onnx", side=own, classes=4, opset=opset)
    weight, bias = (torch.from_numpy(numpy_helper.to_array(t).copy()) for t in proto.graph.initializer)
    view = View(ModelSpec(arch="t", num_classes=4, image_size=own, mean=MEAN, std=STD, timm="none"))
    wanted = F.linear(view(IMAGES).flatten(1), weight, bias)
    if own != 12:
        adapt.take_size(proto, proto.graph.input[0], 12, own)
    found = said(proto, tmp_path, proto.graph.input[0].name)
    assert np.allclose(found, wanted.numpy(), atol=2e-4)


def test_probabilities_become_logits_of_the_same_softmax(tmp_path: Path) -> None:
    plain = said(linear_onnx(tmp_path / "t.onnx", side=12, classes=4), tmp_path)
    proto = linear_onnx(tmp_path / "t.onnx", side=12, classes=4, softmax=True)
    adapt.give_logits(proto)
    found = said(proto, tmp_path)
    assert np.allclose(F.softmax(torch.from_numpy(found), 1), F.softmax(torch.from_numpy(plain), 1), atol=1e-6)
    assert not np.allclose(found, plain, atol=0.1)  # shifted by each image's normaliser, which no softmax sees


def test_a_probability_of_nothing_has_a_finite_logit(tmp_path: Path) -> None:
    proto = linear_onnx(tmp_path / "t.onnx", side=12, classes=4, softmax=True, scale=1e4)
    adapt.give_logits(proto)
    found = said(proto, tmp_path)
    assert found.min() == pytest.approx(np.log(1e-12), rel=1e-5)


def test_outputs_are_picked_in_the_order_of_the_data(tmp_path: Path) -> None:
    plain = said(linear_onnx(tmp_path / "t.onnx", side=12, classes=4), tmp_path)
    proto = linear_onnx(tmp_path / "t.onnx", side=12, classes=4)
    adapt.give_classes(proto, [3, 0])
    assert np.array_equal(said(proto, tmp_path), plain[:, [3, 0]])


def test_a_fixed_batch_is_filled_up_and_cut_again(tmp_path: Path) -> None:
    wanted = said(linear_onnx(tmp_path / "t.onnx", side=12, classes=4), tmp_path)
    linear_onnx(tmp_path / "t.onnx", side=12, classes=4, batch=2)
    found = opened(tmp_path / "t.onnx", fixed=2)(IMAGES, torch.arange(5), 0).logits.numpy()
    assert np.allclose(found, wanted, atol=1e-5)


def test_an_answer_that_is_not_finite_is_named(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 12, 12])
    graph = helper.make_graph(
        [helper.make_node("Log", ["x"], ["l"]), helper.make_node("Flatten", ["l"], ["y"])],
        "g",
        [value],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 432])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "t.onnx")
    images = IMAGES.clone().clamp(min=0.99)
    images[3] = 0.0  # its normalised pixels are negative
    with pytest.raises(TrainingDiverged, match="for image 40 are not finite"):
        opened(tmp_path / "t.onnx")(images, torch.tensor([10, 20, 30, 40, 50]), 0)


# ------------------------------------------------------------------------------------------------------------ kinds and classes
PROBABILITIES = np.array([[0.2, 0.8], [1.0, 0.0]], np.float32)


@pytest.mark.parametrize(
    ("values", "asked", "kind"),
    [
        (PROBABILITIES, "auto", "probabilities"),
        (PROBABILITIES, "logits", "logits"),
        (PROBABILITIES - 0.5, "auto", "logits"),
        (PROBABILITIES * 4, "auto", "logits"),
    ],
)
def test_the_kind_of_outputs_is_what_the_numbers_say(values: Any, asked: str, kind: str) -> None:
    assert kind_of(values, asked, "t.onnx") == kind


def test_numbers_that_are_neither_are_refused() -> None:
    with pytest.raises(InputRefused, match="as if an image could have several classes") as caught:
        kind_of(PROBABILITIES / 2, "auto", "t.onnx")
    assert caught.value.hint == "if they are logits: -o teacher.outputs=logits"
    with pytest.raises(InputRefused, match="negative somewhere, or do not add up to 1"):
        kind_of(PROBABILITIES - 0.5, "probabilities", "t.onnx")


def test_classes_are_found_by_name_in_any_order_and_among_more() -> None:
    assert outputs_of(("cat", "dog"), 2, (), "t") == [0, 1]
    assert outputs_of(("cat", "dog"), 3, ("dog", "emu", "cat"), "t") == [2, 0]


@pytest.mark.parametrize(
    ("outputs", "names", "what", "hint"),
    [
        (3, (), "it has 3 outputs, the data have 2 classes", r"-o 'teacher\.classes=\[cat, dog\]'"),
        (3, ("cat", "dog"), "2 classes are named, and it has 3 outputs", ""),
        (2, ("cat", "cat"), "the class 'cat' is named twice", ""),
        (2, ("cat", "dogs"), "no output for 1 classes of the data, the first 'dog'; did you mean 'dogs'", r"teacher\.classes"),
    ],
)
def test_classes_that_do_not_fit_are_refused_with_the_mapping(outputs: int, names: tuple[str, ...], what: str, hint: str) -> None:
    with pytest.raises(InputRefused, match=what) as caught:
        outputs_of(("cat", "dog"), outputs, names, "t")
    if hint:
        assert re.search(hint, str(caught.value.hint))
