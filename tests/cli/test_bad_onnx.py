"""A user's own ONNX file that a runtime does not take: exit 3 with its path, the node and a way out that fits the cause, from every command."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.backends.openvino import OpenVino
from edgekd.errors import GraphRefused, OnnxRefused
from edgekd.export.own import own_file
from tests.support import Result, run_here

needs_openvino = pytest.mark.skipif(OpenVino().available() is not None, reason=str(OpenVino().available()))


def net() -> Any:
    """Images of 16 x 16 -> three classes."""
    values = {
        "k": np.ones((4, 3, 3, 3), np.float32),
        "w": np.ones((4, 3), np.float32),
        "shape": np.array([0, -1], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["images", "k"], ["maps"], name="conv"),
        helper.make_node("Relu", ["maps"], ["kept"], name="relu"),
        helper.make_node("GlobalAveragePool", ["kept"], ["pooled"], name="pool"),
        helper.make_node("Reshape", ["pooled", "shape"], ["flat"], name="flatten"),
        helper.make_node("MatMul", ["flat", "w"], ["logits"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def named_twice(proto: Any) -> None:
    proto.graph.node[1].name = "conv"


def computed_twice(proto: Any) -> None:
    proto.graph.node[2].output[0] = "maps"


def foreign_domain(proto: Any) -> None:
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Fancy", "my.ops"
    proto.opset_import.append(helper.make_opsetid("my.ops", 1))


def unknown_operator(proto: Any) -> None:
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Fancy", "com.microsoft"
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def new_opset(proto: Any) -> None:
    proto.opset_import[0].version = 99


def new_ir(proto: Any) -> None:
    proto.ir_version = onnx.IR_VERSION + 1


def fails_when_run(proto: Any) -> None:
    proto.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.array([7, 4], np.int64), "shape"))
    proto.graph.output[0].type.tensor_type.shape.dim[0].Clear()


CASES: dict[str, tuple[Callable[[Any], None], str, str]] = {  # what is done to the file, what must be said, what the hint must hold
    "named twice": (named_twice, "two of its nodes have the name 'conv'", "name its nodes apart: python -c"),
    "computed twice": (computed_twice, "'maps' has been used as output names multiple times", "export it again"),
    "foreign domain": (foreign_domain, r"operator 'Fancy' of domain 'my\.ops' is not known \(node 'relu'\)", "standard operators"),
    "unknown operator": (unknown_operator, r"no operator 'Fancy' of domain 'com\.microsoft' \(node 'relu'\)", "export it again"),
    "new opset": (new_opset, "it uses opset 99, newer than runtimes take", "opset_version=18"),
    "new IR": (new_ir, f"its IR version is {onnx.IR_VERSION + 1}, newer than onnx", "m.ir_version = 8"),
    "fails when run": (fails_when_run, "while running Reshape node. Name:'flatten'", "export it again"),
}


@pytest.fixture(scope="module", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKD_HOME", str(tmp_path_factory.mktemp("bad-onnx-home")))
        yield


def written(proto: Any, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def called(command: str, file: Path, folder: Path, images: Path) -> Result:
    good = written(net(), folder / "good.onnx")
    out = ("--out", folder / "run")
    more: dict[str, tuple[str | Path, ...]] = {
        "export": out,
        "compile": ("--device", "rpi5", *out),
        "quantize": ("--data", images, "--image-size", "16", "--search", "0", *out),
        "profile": ("--seconds", "0.1"),
        "verify": ("--against", good),
    }
    return run_here(command, file, *more[command])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("command", ["compile", "profile", "verify"])
def test_a_file_that_no_runtime_takes_is_3_with_its_path_its_node_and_a_way_out(
    tmp_path: Path, images: Path, command: str, name: str
) -> None:
    change, said, way = CASES[name]
    proto = net()
    change(proto)
    file = written(proto, tmp_path / "mine.onnx")
    result = called(command, file, tmp_path, images)
    assert result.code == 3, result.text
    [error] = [line for line in result.err.splitlines() if line.startswith("error: ")]
    [hint] = [line for line in result.err.splitlines() if line.startswith("hint: ")]
    assert error.startswith(f"error: {file}: ")
    assert re.search(said, error), error
    assert way in hint
    assert "external_data" not in hint
    assert "doctor" not in hint


@pytest.mark.parametrize("command", ["export", "quantize"])
def test_the_other_commands_that_take_a_file_refuse_it_alike(tmp_path: Path, images: Path, command: str) -> None:
    proto = net()
    unknown_operator(proto)
    file = written(proto, tmp_path / "mine.onnx")
    result = called(command, file, tmp_path, images)
    assert result.code == 3, result.text
    assert f"error: {file}: onnxruntime has no operator 'Fancy'" in result.err


@pytest.mark.parametrize("change", [named_twice, new_ir])
def test_the_command_that_the_hint_gives_mends_the_file(
    tmp_path: Path, images: Path, change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = net()
    change(proto)
    monkeypatch.chdir(tmp_path)
    said = called("compile", written(proto, tmp_path / "OLD.onnx"), tmp_path, images).err
    command = shlex.split(said[said.index("python -c") :].splitlines()[0])
    subprocess.run([sys.executable, *command[1:]], check=True, cwd=tmp_path)
    assert called("compile", tmp_path / "NEW.onnx", tmp_path, images).code == 0


@needs_openvino
def test_what_another_runtime_refuses_is_not_the_files_fault_and_the_hint_is_an_option_of_the_command(tmp_path: Path) -> None:
    proto = net()
    unknown_operator(proto)
    file = written(proto, tmp_path / "mine.onnx")
    result = run_here("profile", file, "--backend", "openvino", "--json")
    assert result.code == 5
    error = result.json()["error"]
    assert (error["code"], error["where"], error["hint"]) == ("backend", str(file), "--backend onnxruntime")
    assert "com.microsoft.Fancy" in error["what"]


@pytest.mark.parametrize(
    ("words", "said", "way"),
    [
        (
            "Unsupported model IR version: 14, max supported IR version: 13",
            "its IR version is 14, newer than onnxruntime takes",
            "ir_version",
        ),
        ("Opset 27 is under development and support", "it uses opset 27, newer than runtimes take", "opset_version"),
        ("Fatal error: ai.onnx:Relu(99) is not a registered function/op", "no operator 'Relu' of domain 'ai.onnx' (node 'relu')", "export"),
        ("something else", "onnxruntime cannot open the graph: something else", "export"),
    ],
)
def test_onnxruntimes_words_become_a_refusal_of_the_file(words: str, said: str, way: str, tmp_path: Path) -> None:
    file = written(net(), tmp_path / "mine.onnx")
    with pytest.raises(OnnxRefused) as caught, own_file(file):
        raise GraphRefused(f"onnxruntime cannot open the graph: {words}", where="model.onnx")
    assert said in caught.value.what
    assert (caught.value.where, caught.value.exit_code) == (str(file), 3)
    assert way in str(caught.value.hint)


def test_a_wrong_option_of_a_single_command_speaks_of_no_recipe(tmp_path: Path) -> None:
    file = written(net(), tmp_path / "mine.onnx")
    for more in (("-o", "nothing.at=1"), ("--device", "rpi55")):
        result = run_here("compile", file, *more)
        assert result.code == 2
        assert "recipe" not in result.err
        assert "edgekd compile --help" in result.err


def test_profile_of_another_device_points_at_predict_whatever_is_installed(tmp_path: Path) -> None:
    result = run_here("profile", written(net(), tmp_path / "mine.onnx"), "--device", "jetson-orin-nano")
    assert result.code == 5
    assert "edgekd predict MODEL --device jetson-orin-nano" in result.err


def test_a_bundles_folder_given_as_a_model_names_the_file_to_give(tmp_path: Path) -> None:
    written(net(), tmp_path / "model.onnx")
    result = run_here("compile", tmp_path)
    assert (result.code, str(tmp_path / "model.onnx") in result.err) == (3, True)
