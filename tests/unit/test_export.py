"""Exported and quantized graphs: the same bytes every time, nothing of this machine inside, and the form that each kind of device asks for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from edgekd.errors import BackendError, DataRefused, OnnxRefused, ParityBroken
from edgekd.export.onnx import INPUT, OPSET, OUTPUT, export_onnx
from edgekd.quantize.ptq import PTQ
from edgekd.safeio.onnxfile import check_onnx
from edgekd.stages.export import _assert_no_projector

SIZE = 16
FLAVOURS = ("u8s8", "u8s8_reduced", "x8s8", "s8s8")


class Net(nn.Module):
    """A residual block, depthwise and pointwise convolutions, pooling and a classifier: what runtimes fuse and quantizers meet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        )
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.block(x))
        return self.head(self.dropout(x.mean((2, 3))))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for _ in range(20):  # batch norms with statistics of their own
            model(torch.randn(16, 3, SIZE, SIZE) * 2 + 0.3)
    return model


def samples(count: int = 4, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((8, 3, SIZE, SIZE)) * 2 + 0.3).astype(np.float32) for _ in range(count)]


def run(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {INPUT: images})[0]
    return found


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    export_onnx(net(), SIZE, path)
    return path


# ------------------------------------------------------------------------------------------------------------ export
def test_exporting_twice_gives_equal_bytes(graph: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)  # whatever ran before
    export_onnx(net(), SIZE, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == graph.read_bytes()


def test_a_model_in_training_mode_is_exported_as_it_will_answer(graph: Path) -> None:
    model, images = net().train(), torch.from_numpy(samples(1)[0])
    found = run(graph, images.numpy())
    with torch.no_grad():
        expected = model.eval()(images).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # the same fp32 sums in another order
    assert not {"Dropout", "RandomUniform", "Bernoulli"} & {n.op_type for n in onnx.load(graph).graph.node}


@pytest.mark.parametrize("batch", [1, 2, 3, 17])
def test_the_batch_is_dynamic(graph: Path, batch: int) -> None:
    images = np.concatenate(samples(3))[:batch]
    assert run(graph, images).shape == (batch, 5)
    np.testing.assert_allclose(run(graph, images)[:1], run(graph, images[:1]), rtol=0, atol=1e-5)


def test_inputs_outputs_and_opset_are_named_as_agreed(graph: Path, tmp_path: Path) -> None:
    proto = onnx.load(graph)
    assert [i.name for i in proto.graph.input] == [INPUT]
    assert [o.name for o in proto.graph.output] == [OUTPUT]
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", OPSET)]
    meta = export_onnx(net(), SIZE, tmp_path / "m.onnx")
    assert meta == {"opset": OPSET, "nodes": len(proto.graph.node), "dynamic_batch": True}


def strings(data: bytes) -> Iterator[str]:
    for found in re.findall(rb"[\x20-\x7e]{4,}", data):
        yield found.decode()


def test_nothing_of_this_machine_is_inside(graph: Path) -> None:
    proto, text = onnx.load(graph), "\n".join(strings(graph.read_bytes()))
    here = {str(Path.cwd()), str(Path(torch.__file__).parent), str(Path(__file__).parent), os.path.expanduser("~/"), os.uname().nodename}
    assert not [h for h in here if h in text]
    assert not re.search(r"\.py\b|/site-packages|/home/|/usr/|/tmp/|File \"", text)
    assert (proto.producer_name, proto.producer_version, proto.graph.name) == ("edgekd", "", "model")
    assert not [m for holder in (proto, proto.graph, *proto.graph.node) for m in holder.metadata_props]
    assert not [n.name for n in proto.graph.node if n.doc_string]


def test_the_file_holds_everything_and_is_accepted_from_outside(graph: Path) -> None:
    proto = check_onnx(graph)
    assert {t.data_location for t in proto.graph.initializer} == {TensorProto.DEFAULT}


class Fixed(nn.Module):
    """Reads its batch size as a number, so only one batch size can be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIZE * SIZE, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.reshape(x.shape[0] if x.shape[0] == 1 else 2, -1))


def test_a_model_without_a_dynamic_batch_is_exported_for_one_image_and_says_so(tmp_path: Path) -> None:
    meta = export_onnx(Fixed(), SIZE, tmp_path / "m.onnx")
    assert meta["dynamic_batch"] is False
    assert onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


class Undecided(nn.Module):
    """Branches on the data, which no graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIZE * SIZE, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) if float(x.sum()) > 0 else -self.head(x.flatten(1))


def test_a_model_that_cannot_be_exported_is_a_backend_error_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"the model does not export to ONNX: .{10}") as caught:
        export_onnx(Undecided(), SIZE, tmp_path / "m.onnx")
    assert (caught.value.exit_code, caught.value.where) == (5, "Undecided")
    assert not (tmp_path / "m.onnx").exists()


def test_modules_of_training_in_the_file_are_found(graph: Path) -> None:
    _assert_no_projector(graph, sum(p.numel() for p in net().parameters()), "student")
    proto = onnx.load(graph)
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((400, 300), np.float32), "projector"))
    bad = graph.with_name("bad.onnx")
    bad.write_bytes(proto.SerializeToString())
    with pytest.raises(ParityBroken, match=r"the exported file holds \d+ weights, the model has \d+"):
        _assert_no_projector(bad, 5_000, "student")


def test_a_trained_model_that_still_holds_a_branch_is_refused() -> None:
    from edgekd.models.build import build, make_spec
    from edgekd.models.spec import ModelConfig
    from edgekd.stages.train import _assert_same_tensors

    spec = make_spec(ModelConfig(arch="resnet10t"), num_classes=5, image_size=SIZE)
    model = build(spec)
    _assert_same_tensors(model, spec, "distill")
    model.branch = torch.nn.Linear(2, 2)
    with pytest.raises(ParityBroken, match=r"still holds 'branch\.bias'"):
        _assert_same_tensors(model, spec, "distill")


# ------------------------------------------------------------------------------------------------------------ int8
@pytest.fixture(scope="module")
def int8(graph: Path) -> dict[str, Path]:
    return {flavour: quantized(graph, flavour, graph.with_name(f"{flavour}.onnx")) for flavour in FLAVOURS}


def quantized(graph: Path, flavour: str, out: Path, **settings: Any) -> Path:
    PTQ(PTQ.Config(**settings)).quantize(graph, out, iter(samples()), flavour)
    return out


def tensors(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    constants = {n.output[0]: n.attribute[0].t for n in proto.graph.node if n.op_type == "Constant"}
    return {name: numpy_helper.to_array(t) for name, t in constants.items()} | {
        t.name: numpy_helper.to_array(t) for t in proto.graph.initializer
    }


def zero_points(proto: onnx.ModelProto, op: str) -> list[np.ndarray]:
    held = tensors(proto)
    return [held[n.input[2]] for n in proto.graph.node if n.op_type == op]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_int8_graph_is_accepted_runs_and_decides_nearly_as_the_original(graph: Path, int8: dict[str, Path], flavour: str) -> None:
    check_onnx(int8[flavour])
    images = np.concatenate(samples(4, seed=1))
    a, b = run(graph, images).astype(np.float64), run(int8[flavour], images).astype(np.float64)
    assert a.shape == b.shape
    assert not np.array_equal(a, b)
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    assert cosine.mean() > 0.98  # 8 bits of each activation; a wrong scale or zero point gives far less


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_convolutions_and_the_classifier_are_int8_with_a_weight_scale_for_each_output(int8: dict[str, Path], flavour: str) -> None:
    proto = onnx.load(int8[flavour])
    held, made = tensors(proto), {o: n for n in proto.graph.node for o in n.output}
    heavy = [n for n in proto.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(heavy) == 4
    for node in heavy:
        source, weight = (made[node.input[i]] for i in (0, 1))
        assert (source.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear"), node.name
        assert held[weight.input[1]].size in (5, 8), node.name
        assert held[weight.input[0]].dtype == np.int8


@pytest.mark.parametrize("flavour", ["u8s8", "u8s8_reduced"])
def test_x86_gets_unsigned_activations(int8: dict[str, Path], flavour: str) -> None:
    found = zero_points(onnx.load(int8[flavour]), "QuantizeLinear")
    assert found
    assert {z.dtype for z in found} == {np.dtype(np.uint8)}


def test_without_vnni_weights_have_seven_bits(int8: dict[str, Path]) -> None:
    """Two products of eight bits would overflow the sixteen-bit sums there."""

    def largest(flavour: str) -> int:
        return max(
            int(np.abs(t.astype(np.int32)).max()) for t in tensors(onnx.load(int8[flavour])).values() if t.dtype == np.int8 and t.ndim > 1
        )

    assert largest("u8s8_reduced") <= 64
    assert largest("u8s8") == largest("s8s8") == 127


def test_arm_and_tensorrt_get_signed_activations_around_zero_and_no_int32_biases(int8: dict[str, Path]) -> None:
    proto = onnx.load(int8["s8s8"])
    for op in ("QuantizeLinear", "DequantizeLinear"):
        found = zero_points(proto, op)
        assert found
        assert {z.dtype for z in found} == {np.dtype(np.int8)}
        assert not any(z.any() for z in found)
    held = tensors(proto)
    assert not [
        n.name for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in held and held[n.input[0]].dtype == np.int32
    ]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_int8_graph_names_no_tool_no_path_and_no_opset_that_it_does_not_use(int8: dict[str, Path], flavour: str) -> None:
    proto = onnx.load(int8[flavour])
    used = {n.domain or "" for n in proto.graph.node}
    assert {o.domain.replace("ai.onnx", "", 1) if o.domain == "ai.onnx" else o.domain for o in proto.opset_import} == used
    assert proto.producer_name == "edgekd"
    text = "\n".join(strings(int8[flavour].read_bytes()))
    assert not re.search(r"/tmp|/site-packages|\.py\b", text)


@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
def test_quantizing_twice_gives_equal_bytes(graph: Path, tmp_path: Path, calibration: str) -> None:
    first, second = (quantized(graph, "u8s8", tmp_path / n, calibration=calibration).read_bytes() for n in ("a.onnx", "b.onnx"))
    assert first == second
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]  # nothing else is left behind


def test_a_scale_for_each_tensor_where_asked(graph: Path, tmp_path: Path) -> None:
    proto = onnx.load(quantized(graph, "u8s8", tmp_path / "m.onnx", per_channel=False))
    held = tensors(proto)
    assert {held[n.input[1]].size for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[1] in held} == {1}


def test_a_graph_that_cannot_be_quantized_is_a_backend_error(tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(BackendError, match="the graph cannot be quantized") as caught:
        quantized(tmp_path / "junk.onnx", "u8s8", tmp_path / "m.onnx")
    assert caught.value.where == "junk.onnx"
    assert not (tmp_path / "m.onnx").exists()


def test_calibration_in_which_something_is_not_finite_names_the_tensor_and_its_node(graph: Path, tmp_path: Path) -> None:
    proto = onnx.load(graph)
    weight = next(t for t in proto.graph.initializer if len(t.dims) == 4)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0] = np.inf
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(proto, tmp_path / "infinite.onnx")
    with pytest.raises(OnnxRefused, match=r"is not finite, made by node '.*onv"):
        PTQ(PTQ.Config()).quantize(tmp_path / "infinite.onnx", tmp_path / "m.onnx", samples(), "u8s8")


@pytest.mark.filterwarnings("error::RuntimeWarning")  # what numpy says of it is no news to a user
@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
@pytest.mark.parametrize("made_by", ["Log", "Reciprocal"])  # NaN, infinity
def test_the_node_that_makes_a_value_that_is_not_finite_is_named_and_not_those_that_it_reaches(
    graph: Path, tmp_path: Path, made_by: str, calibration: str
) -> None:
    proto = onnx.load(graph)
    first = next(n for n in proto.graph.node if n.op_type == "Relu")  # zeros, some of which become infinite
    bad = helper.make_node(
        "Sub" if made_by == "Log" else "Identity", [first.output[0], "one"][: 2 if made_by == "Log" else 1], ["low"], "low"
    )
    culprit = helper.make_node(made_by, ["low"], ["culprit.out"], "culprit")
    after = helper.make_node("Neg", ["culprit.out"], ["after.out"], "after")  # of which a range is kept
    for node in proto.graph.node:
        node.input[:] = ["after.out" if name == first.output[0] else name for name in node.input]
    place = list(proto.graph.node).index(first) + 1
    for node in (after, culprit, bad):
        proto.graph.node.insert(place, node)
    proto.graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), "one"))
    onnx.save(proto, tmp_path / "bad.onnx")
    with pytest.raises(OnnxRefused, match=r"tensor 'culprit.out' is not finite, made by node 'culprit'"):
        quantized(tmp_path / "bad.onnx", "u8s8", tmp_path / "m.onnx", calibration=calibration)


def test_a_batch_that_is_not_finite_after_others_that_are_is_found(graph: Path, tmp_path: Path) -> None:
    proto = onnx.load(graph)
    body, [entry] = proto.graph, proto.graph.input
    for node in body.node:
        node.input[:] = ["root" if name == entry.name else name for name in node.input]
    body.node.insert(0, helper.make_node("Sqrt", [entry.name], ["root"], "culprit"))
    onnx.save(proto, tmp_path / "root.onnx")
    good = [np.abs(images) for images in samples()]
    PTQ(PTQ.Config()).quantize(tmp_path / "root.onnx", tmp_path / "m.onnx", iter(good), "u8s8")
    with pytest.raises(OnnxRefused, match="made by node 'culprit'"):
        PTQ(PTQ.Config()).quantize(tmp_path / "root.onnx", tmp_path / "m.onnx", iter([*good, -good[0]]), "u8s8")


def test_ranges_do_not_depend_on_how_images_are_batched(graph: Path, tmp_path: Path) -> None:
    images = np.concatenate(list(samples()))
    for number, batches in enumerate(([images], [images[:5], images[5:]])):
        PTQ(PTQ.Config()).quantize(graph, tmp_path / f"{number}.onnx", iter(batches), "u8s8")
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()


@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
def test_a_short_last_batch_and_talk_of_the_calibrator_are_no_trouble(
    graph: Path, tmp_path: Path, calibration: str, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = [*samples(), next(iter(samples()))[:1]]
    PTQ(PTQ.Config(calibration=calibration)).quantize(graph, tmp_path / "m.onnx", iter(batches), "u8s8")
    assert (tmp_path / "m.onnx").is_file()
    assert capsys.readouterr().out == ""  # stdout is for data


def test_calibration_without_images_is_refused(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(DataRefused, match="no image to calibrate with"):
        PTQ(PTQ.Config()).quantize(graph, tmp_path / "m.onnx", iter([]), "u8s8")
