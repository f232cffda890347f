"""Hostile ONNX files: data outside the file in every form and place (G25), resource bombs, unknown code. None is accepted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.errors import FileMissing, OnnxRefused
from edgekd.safeio import onnxfile
from edgekd.safeio.onnxfile import check_onnx

SECRET = b"\x00" * 64
X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])
IDENTITY = helper.make_node("Identity", ["x"], ["y"])


def model(
    nodes: list[onnx.NodeProto], *tensors: onnx.TensorProto, functions: tuple[onnx.FunctionProto, ...] = (), domain: str = ""
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", [X], [Y], initializer=list(tensors))
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=9)


def ints(name: str, *values: int, scalar: bool = False) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values[0] if scalar else values, dtype=np.int64), name)


def saved(m: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "victim.onnx"
    path.write_bytes(m.SerializeToString())
    return path


# ---------------------------------------------------------------------------------------------- 12 locations x 4 places
def _link(folder: Path) -> str:
    (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
    return "link.bin"


def _hardlink(folder: Path) -> str:
    os.link(folder.parent / "secret.bin", folder / "hard.bin")
    return "hard.bin"


def _plain(folder: Path) -> str:
    (folder / "data.bin").write_bytes(SECRET)
    return "data.bin"


LOCATIONS: dict[str, Callable[[Path], str | None]] = {
    "beside": _plain,
    "missing": lambda _: "missing.bin",
    "parent": lambda _: "../secret.bin",
    "absolute": lambda d: str(d.parent / "secret.bin"),
    "passwd": lambda _: "/etc/passwd",
    "symlink": _link,
    "hardlink": _hardlink,
    "device": lambda _: "/dev/zero",
    "url": lambda _: "file:///etc/passwd",
    "empty": lambda _: "",
    "nul": lambda _: "data\x00.bin",
    "no_location": lambda _: None,
}


def external(location: str | None) -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1, 4], data_location=TensorProto.EXTERNAL)
    if location is not None:
        tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value=str(2**50))
    return tensor


def in_initializer(tensor: onnx.TensorProto) -> onnx.ModelProto:
    return model([helper.make_node("Add", ["x", "w"], ["y"])], tensor)


def in_attribute(tensor: onnx.TensorProto) -> onnx.ModelProto:
    return model([helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["x", "w"], ["y"])])


def in_subgraph(tensor: onnx.TensorProto) -> onnx.ModelProto:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["b"])], "branch", [], [helper.make_value_info("b", Y.type)], initializer=[tensor]
    )
    condition = numpy_helper.from_array(np.array(True), "c")
    return model([helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], condition)


def in_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    body = [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["a", "w"], ["b"])]
    function = helper.make_function("local", "f", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    return model([helper.make_node("f", ["x"], ["y"], domain="local")], functions=(function,), domain="local")


PLACES = [in_initializer, in_attribute, in_subgraph, in_function]


@pytest.mark.parametrize("trusted", [True, False], ids=["structure_alone", "in_child"])
@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__)
def test_no_external_data_is_accepted_from_any_location(tmp_path: Path, place: Callable[..., onnx.ModelProto], trusted: bool) -> None:
    (tmp_path / "secret.bin").write_bytes(SECRET)
    assert len(LOCATIONS) == 12
    for name, locate in LOCATIONS.items() if trusted else [("hardlink", _hardlink)]:  # a child costs half a second
        folder = tmp_path / name
        folder.mkdir()
        path = saved(place(external(locate(folder))), folder)
        with pytest.raises(OnnxRefused, match=r"victim\.onnx.*keeps its data in another file") as caught:
            check_onnx(path, trusted=trusted)
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("form", ["location_without_flag", "sparse_initializer", "sparse_attribute", "training", "function_default"])
def test_external_data_is_seen_in_the_forgotten_fields(tmp_path: Path, form: str) -> None:
    tensor = external("data.bin")
    m = model([IDENTITY])
    if form == "location_without_flag":
        tensor.data_location = TensorProto.DEFAULT
        m.graph.initializer.append(tensor)
    elif form == "sparse_initializer":
        m.graph.sparse_initializer.add(values=tensor, indices=ints("i", 0), dims=[4])
    elif form == "sparse_attribute":
        m.graph.node[0].attribute.add(name="a").sparse_tensor.indices.CopyFrom(tensor)
    elif form == "training":
        m.training_info.add().algorithm.initializer.append(tensor)
    else:
        m.functions.add(name="f", domain="").attribute_proto.add(name="a").t.CopyFrom(tensor)
    with pytest.raises(OnnxRefused, match="another file"):
        check_onnx(saved(m, tmp_path), trusted=True)


# -------------------------------------------------------------------------------------------------------- resource bombs
def loop(count: onnx.TensorProto | None) -> onnx.ModelProto:
    names = [("i", TensorProto.INT64, []), ("c", TensorProto.BOOL, []), ("v", TensorProto.FLOAT, [1, 4])]
    infos = [helper.make_tensor_value_info(*n) for n in names]
    outs = [helper.make_tensor_value_info("c2", TensorProto.BOOL, []), helper.make_tensor_value_info("v2", TensorProto.FLOAT, [1, 4])]
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["v"], ["v2"])], "body", infos, outs
    )
    node = helper.make_node("Loop", ["n" if count else "", "", "x"], ["y"], body=body)
    return model([node], *([count] if count else []))


def deep() -> onnx.ModelProto:
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "b", [], [Y])
    for _ in range(12):
        branch = helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], "b", [], [Y])
    return model(list(branch.node), numpy_helper.from_array(np.array(True), "c"))


def laughs(levels: int = 40, *, closed: bool = False) -> onnx.ModelProto:
    """Functions that call the next one twice: 2^40 nodes when written out; or a ring of calls."""
    functions = []
    for n in range(levels):
        last = n == levels - 1
        callee = ("f0", "local") if closed else ("Identity", "")
        name, domain = callee if last else (f"f{n + 1}", "local")
        body = [helper.make_node(name, ["a"], ["m"], domain=domain), helper.make_node(name, ["m"], ["b"], domain=domain)]
        functions.append(
            helper.make_function("local", f"f{n}", ["a"], ["b"], body, [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)])
        )
    return model([helper.make_node("f0", ["x"], ["y"], domain="local")], functions=tuple(functions), domain="local")


def crowd() -> onnx.ModelProto:
    m = model([IDENTITY])
    for _ in range(17):
        m.graph.node.extend(list(m.graph.node))
    return m


def concat_chain() -> onnx.ModelProto:
    nodes = [helper.make_node("Concat", [f"a{n}" if n else "x"] * 50, [f"a{n + 1}"], axis=0) for n in range(7)]
    return model([*nodes, helper.make_node("Identity", ["a7"], ["y"])])


def declared(dims: list[int]) -> onnx.ModelProto:
    m = model([IDENTITY])
    m.graph.value_info.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, dims))
    return m


def engine() -> onnx.ModelProto:
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="../e.engine")
    return model([node], domain="com.microsoft")


STATIC_BOMBS: dict[str, Callable[[], onnx.ModelProto]] = {
    "initializer_dims": lambda: model([IDENTITY], TensorProto(name="w", data_type=1, dims=[2**40])),
    "initializer_dims_product": lambda: model([IDENTITY], TensorProto(name="w", data_type=1, dims=[2**20, 2**20])),
    "initializer_zero_hides_product": lambda: model([IDENTITY], TensorProto(name="w", data_type=1, dims=[0, 2**40])),
    "initializer_negative_dim": lambda: model([IDENTITY], TensorProto(name="w", data_type=1, dims=[-1, 4])),
    "declared_shape": lambda: declared([2**40]),
    "loop_2_62": lambda: loop(ints("n", 2**62, scalar=True)),
    "loop_without_limit": lambda: loop(None),
    "deep_subgraphs": deep,
    "function_laughs": laughs,
    "function_ring": lambda: laughs(3, closed=True),
    "many_functions": lambda: laughs(501),
    "131072_nodes": crowd,
    "unknown_domain": lambda: model([helper.make_node("Evil", ["x"], ["y"], domain="evil")], domain="evil"),
    "unknown_domain_import": lambda: model([IDENTITY], domain="evil"),
    "function_name_of_another_domain": lambda: model([helper.make_node("f", ["x"], ["y"], domain="evil")]),
    "compiled_engine": engine,
}  # fmt: skip
INFERRED_BOMBS: dict[str, Callable[[], onnx.ModelProto]] = {
    "constant_of_shape": lambda: model([helper.make_node("ConstantOfShape", ["s"], ["y"])], ints("s", 2**20, 2**20)),
    "expand": lambda: model([helper.make_node("Expand", ["x", "s"], ["y"])], ints("s", 2**40, 4)),
    "tile": lambda: model([helper.make_node("Tile", ["x", "s"], ["y"])], ints("s", 2**40, 1)),
    "pad": lambda: model([helper.make_node("Pad", ["x", "s"], ["y"])], ints("s", 0, 0, 2**40, 0)),
    "computed_shape": lambda: model(
        [helper.make_node("Mul", ["s", "s"], ["t"]), helper.make_node("ConstantOfShape", ["t"], ["y"])], ints("s", 2**15, 2**15)
    ),
    "random": lambda: model([helper.make_node("RandomNormal", [], ["y"], shape=[2**20, 2**20])]),
    "concat_chain": concat_chain,
}


@pytest.mark.parametrize("name", STATIC_BOMBS)
def test_a_bomb_visible_in_the_structure_is_refused_without_running_onnx(tmp_path: Path, name: str) -> None:
    with pytest.raises(OnnxRefused, match=r"victim\.onnx"):
        check_onnx(saved(STATIC_BOMBS[name](), tmp_path), trusted=True)


@pytest.mark.parametrize("name", INFERRED_BOMBS)
def test_a_bomb_that_appears_in_inferred_shapes_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OnnxRefused, match="too large"):
        onnxfile.examine(saved(INFERRED_BOMBS[name](), tmp_path), tmp_path)


# ------------------------------------------------------------------------------------------------ damage, and sound files
@pytest.mark.parametrize(
    "data", [b"not a model" * 99, b"\x00" * 50, b"\xff" * 50, b"PK\x03\x04", b"\x08"], ids=["junk", "zeros", "ones", "zip", "cut"]
)
def test_bytes_that_are_no_model_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "not.onnx"
    path.write_bytes(data)
    with pytest.raises(OnnxRefused, match=r"not\.onnx"):
        check_onnx(path, trusted=True)


def test_junk_empty_oversized_and_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "not.onnx"
    with pytest.raises(FileMissing, match=r"not\.onnx"):
        check_onnx(path)
    path.write_bytes(b"")
    with pytest.raises(OnnxRefused, match=r"not\.onnx: it has 0 bytes"):
        check_onnx(path)
    path.write_bytes(b"not a model" * 99)
    with pytest.raises(OnnxRefused, match=r"not\.onnx: it is not an ONNX file"):
        check_onnx(path)
    with pytest.raises(OnnxRefused, match=r"at most|1 to 10 bytes"):
        check_onnx(path, max_bytes=10)


def test_a_model_that_fails_the_full_check_is_refused_from_outside(tmp_path: Path) -> None:
    path = saved(model([helper.make_node("NoSuchOperator", ["x"], ["y"])]), tmp_path)
    with pytest.raises(OnnxRefused, match="not valid ONNX"):
        check_onnx(path)


SOUND: dict[str, Callable[[], onnx.ModelProto]] = {
    "plain": lambda: model([helper.make_node("Add", ["x", "w"], ["y"])], numpy_helper.from_array(np.ones((1, 4), np.float32), "w")),
    "contrib_operator": lambda: model([helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")], domain="com.microsoft"),
    "local_function": lambda: laughs(3),
    "short_loop": lambda: loop(ints("n", 10, scalar=True)),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_model_passes_from_outside_and_from_the_store(tmp_path: Path, name: str) -> None:
    m = SOUND[name]()
    path = saved(m, tmp_path)
    assert check_onnx(path) == check_onnx(path, trusted=True) == m
