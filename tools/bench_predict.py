"""Measured against predicted latency of ten timm models on this machine (batch 1, random weights), or the efficiencies that it rests on.

python tools/bench_predict.py [--threads 1] [--budget 60] [--work FOLDER] [--models NAME ...] [--efficiency]
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from edgekd.backends.onnxruntime import OnnxRuntime
from edgekd.profile.device import DeviceProfile, host_profile
from edgekd.profile.measure import measure
from edgekd.profile.predict import predict
from edgekd.profile.workload import works
from edgekd.safeio.onnxfile import check_onnx

if TYPE_CHECKING:
    from edgekd.backends import Feeds, Session

MODELS = (
    "resnet18", "resnet50", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0", "convnext_atto", "vit_tiny_patch16_224",
    "deit_tiny_patch16_224", "mixer_s32_224", "regnety_002",
)  # fmt: skip
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {  # as the models above have them
    "gemm": ((197, 192, 768), (197, 768, 192), (512, 512, 512)),
    "conv3x3": ((64, 64, 56, 3, 1), (128, 128, 28, 3, 1), (256, 256, 14, 3, 1), (512, 512, 7, 3, 1)),
    "conv1x1": ((96, 384, 14, 1, 1), (192, 48, 28, 1, 1), (64, 256, 56, 1, 1), (1024, 256, 14, 1, 1)),
    "depthwise": ((96, 96, 56, 3, 96), (384, 384, 14, 3, 384), (240, 240, 14, 5, 240)),
    "attention": ((3, 197, 64, 197), (3, 197, 197, 64)),
}
INPUT = (1, 3, 224, 224)


def export(name: str, folder: Path) -> Path:
    """The ONNX file of a model, made unless it is there."""
    path = folder / f"{name}.onnx"
    if not path.is_file():
        import timm
        import torch

        torch.set_num_threads(1)
        model = timm.create_model(name, pretrained=False).eval()
        torch.onnx.export(model, (torch.randn(INPUT),), path, dynamo=True, external_data=False, verbose=False)
    return path


def measured_ms(paths: dict[str, Path], threads: int, budget_s: float) -> dict[str, float]:
    """Tenth percentile of the milliseconds of each model, interleaved: a quiet machine is what is predicted, and this one may be shared."""
    backend, host = OnnxRuntime(), host_profile()
    sessions = {name: backend.open(path, threads=threads, device=host) for name, path in paths.items()}
    image = np.random.default_rng(0).standard_normal(INPUT, dtype=np.float32)
    feeds = {name: {session.input_names[0]: image} for name, session in sessions.items()}
    samples = measure(sessions, feeds, budget_s=budget_s)
    return {name: float(np.percentile(s.ms, 10)) for name, s in samples.items()}


def errors(device: DeviceProfile, models: dict[str, onnx.ModelProto], measured: dict[str, float], threads: int) -> list[float]:
    """log(predicted / measured) of each model."""
    return [math.log(predict(models[name], device, threads=threads).p50_ms / measured[name]) for name in measured]


def efficiencies(device: DeviceProfile, budget_s: float) -> dict[str, float]:
    """Fraction of one core's peak that each class of operator reaches here, geometric mean over its shapes.

    From the tenth percentile of the times: other processes can only add to them.
    """
    backend, peak = OnnxRuntime(), (device.compute.fp32_tflops or math.nan) * 1e12 / (device.arch.cores or 1)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sessions: dict[str, Session] = {}
        feeds: dict[str, Feeds] = {}
        flops: dict[str, float] = {}
        for op_class, shapes in SHAPES.items():
            for shape in shapes:
                name = f"{op_class} {shape}"
                model, inputs = single(op_class, shape)
                path = Path(scratch) / f"{len(sessions)}.onnx"
                path.write_bytes(model.SerializeToString())
                sessions[name], feeds[name] = backend.open(path, threads=1, device=device), inputs
                flops[name] = works(model)[0].flops
        for name, samples in measure(sessions, feeds, budget_s=budget_s).items():
            found.setdefault(name.split()[0], []).append(flops[name] / (float(np.percentile(samples.ms, 10)) / 1e3) / peak)
    return {op_class: round(math.exp(float(np.mean(np.log(values)))), 2) for op_class, values in found.items()}


def single(op_class: str, shape: tuple[int, ...]) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A graph of one operator, and its inputs.

    Shapes: gemm (rows, inner, columns), attention (heads, rows, inner, columns), convolutions (in, out, size, kernel, groups).
    """
    rng = np.random.default_rng(0)
    inputs: dict[str, tuple[int, ...]]
    weights: dict[str, tuple[int, ...]]
    out: tuple[int, ...]
    if op_class == "attention":
        heads, rows, inner, columns = shape
        inputs, weights = {"a": (1, heads, rows, inner), "b": (1, heads, inner, columns)}, {}
        node, out = helper.make_node("MatMul", ["a", "b"], ["y"]), (1, heads, rows, columns)
    elif op_class == "gemm":
        rows, inner, columns = shape
        inputs, weights = {"a": (rows, inner)}, {"w": (inner, columns)}
        node, out = helper.make_node("MatMul", ["a", "w"], ["y"]), (rows, columns)
    else:
        wide, out_wide, size, kernel, groups = shape
        inputs, weights = {"a": (1, wide, size, size)}, {"w": (out_wide, wide // groups, kernel, kernel)}
        node = helper.make_node("Conv", ["a", "w"], ["y"], kernel_shape=[kernel] * 2, pads=[kernel // 2] * 4, group=groups)
        out = (1, out_wide, size, size)
    values = {name: rng.standard_normal(dims, dtype=np.float32) for name, dims in inputs.items()}
    graph = helper.make_graph(
        [node], "single", [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, d) for n, d in inputs.items()],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, out)],
        [onnx.numpy_helper.from_array(rng.standard_normal(d, dtype=np.float32), n) for n, d in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), values


def geometric(logs: list[float]) -> float:
    """Geometric mean factor by which predictions miss."""
    return math.exp(float(np.mean(np.abs(logs))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of measuring")
    parser.add_argument("--work", type=Path, help="folder that keeps the exported files")
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm names")
    parser.add_argument("--efficiency", action="store_true", help="print the efficiencies of single operators instead")
    args = parser.parse_args()
    if args.efficiency:
        print(efficiencies(host_profile(), args.budget))
        return
    with tempfile.TemporaryDirectory() as scratch:
        paths = {name: export(name, args.work or Path(scratch)) for name in args.models}
        measured = measured_ms(paths, args.threads, args.budget)
        models = {name: check_onnx(path, trusted=True) for name, path in paths.items()}
    host = host_profile()
    logs = errors(host, models, measured, args.threads)
    for (name, ms), log in zip(measured.items(), logs, strict=True):
        print(f"{name:24} measured {ms:8.2f} ms   predicted {ms * math.exp(log):8.2f} ms   ratio {math.exp(log):.2f}")
    print(f"geometric mean error: a factor of {geometric(logs):.3f}")


if __name__ == "__main__":
    main()
