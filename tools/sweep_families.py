"""Which architectures survive the chain: `python tools/sweep_families.py [ARCH ...] [--out FILE.md]`.

Each family in its smallest form with untrained weights and a widened classifier (so that its answers differ between images): exported, quantized in the
flavour of each runtime, run by onnxruntime and (image by image) OpenVINO with parity against torch, and built by TensorRT for RTX in fp32, fp16 and
int8. A cell is `ok`, or what went wrong: the limits that were missed and where two runtimes part, or the operator and the reason that the runtime gives.
One process a model, so that a crash is one row.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FAMILIES = {  # architecture -> image size
    "resnet10t": 96, "resnet18": 96, "resnext26ts": 128, "seresnet18": 96, "regnety_002": 96, "regnetx_002": 96, "densenet121": 96, "vgg11": 64,
    "mobilenetv2_050": 96, "mobilenetv3_small_050": 96, "mobilenetv4_conv_small": 96, "mobileone_s0": 96, "mnasnet_small": 96, "efficientnet_b0": 96,
    "tf_efficientnetv2_b0": 96, "efficientnet_lite0": 96, "fbnetc_100": 96, "spnasnet_100": 96, "lcnet_050": 96, "tinynet_e": 96, "ghostnet_050": 96,
    "repvgg_a0": 96, "rexnetr_100": 96, "hardcorenas_a": 96, "semnasnet_075": 96, "convnext_atto": 96, "convnextv2_atto": 96, "edgenext_xx_small": 128,
    "mobilevit_xxs": 128, "mobilevitv2_050": 128, "fastvit_t8": 128, "repvit_m0_9": 96, "efficientformer_l1": 224, "efficientvit_b0": 128, "ghostnetv2_100": 96,
    "vit_tiny_patch16_224": 224, "deit_tiny_patch16_224": 224, "swin_tiny_patch4_window7_224": 224, "levit_128s": 224, "pit_ti_224": 224, "cait_xxs24_224": 224,
    "xcit_nano_12_p16_224": 224, "coat_lite_tiny": 224, "crossvit_tiny_240": 240, "mixer_s32_224": 224, "resmlp_12_224": 224, "gmlp_ti16_224": 224,
    "poolformer_s12": 96, "hrnet_w18_small": 96, "dla34": 96, "inception_next_atto": 96, "starnet_s1": 96, "shvit_s1": 96,
}  # fmt: skip
COLUMNS = (
    "onnxruntime fp32",
    "onnxruntime int8",
    "openvino fp32",
    "openvino int8",
    "TensorRT-RTX fp32",
    "TensorRT-RTX fp16",
    "TensorRT-RTX int8",
)
_CLASSES, _IMAGES = 10, 16
_COMPUTE = ("Conv", "MatMul", "Gemm", "Add", "Mul", "Concat", "LayerNormalization", "InstanceNormalization", "Softmax")
_APART = 0.2  # mean difference relative to the mean size: a runtime that rounds at another place stays far below


def examine(arch: str, size: int, answers: Any, arguments: dict[str, Any] | None = None) -> None:
    """Puts (column, words) for each cell as it is known; `arguments` are for the architecture."""
    import numpy as np
    import timm
    import torch

    from edgekd import registry
    from edgekd.export.bisect import compare_tensors, first_break, steepest, tensor_limits
    from edgekd.export.onnx import INPUT, export_onnx
    from edgekd.export.parity import compare
    from edgekd.profile.device import load_device
    from edgekd.quantize.fp16 import FP16
    from edgekd.quantize.ptq import PTQ
    from edgekd.tasks.classification import Classification

    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=_CLASSES, **(arguments or {})).eval()
    with torch.no_grad():
        for layer in [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == _CLASSES]:
            layer.weight.normal_()
    images = np.random.default_rng(0).standard_normal((_IMAGES, 3, size, size), dtype=np.float32)
    host, rtx = load_device("host"), load_device("rtx4090")
    with torch.inference_mode():
        wanted = model(torch.from_numpy(images)).numpy()

    def cell(column: str, work: Callable[[], str]) -> None:
        try:
            answers.put((column, work()))
        except Exception as error:
            answers.put((column, str(error).splitlines()[0][:160].replace("|", "/")))

    def judged(reference: Any, found: Any, limits: str) -> str:
        row = compare("", limits, reference, found, None, Classification())  # untrained: no label is right
        missed = row["failed"]
        return f"parity: {', '.join(f'{n} {row[n]:.3g}' for n in missed)}" if missed else "ok"

    def rounded(backend: str) -> str:
        """The int8 graph of a runtime; where that one gets other outputs from it than onnxruntime, the first operator at which they part."""
        graph = int8(host.flavour_for(backend))
        words = judged(wanted, run(backend, graph), "int8")
        if words == "ok":
            return words
        if backend == "onnxruntime" or judged(wanted, run("onnxruntime", graph), "int8") != "ok":
            return f"{words}; rounding costs most at {costly(graph)}"
        return f"{words}; onnxruntime computes the same file right, they part at {parting(graph, backend)}"

    def costly(graph: Path) -> str:
        """The operator at which the rounded graph turns away most from the fp32 one."""
        import onnx

        few = {INPUT: images[: min(batch, 8)]}
        tensors = compare_tensors(onnx.load(fp32), onnx.load(graph), few, few)
        worst = [first_break(tensors, **tensor_limits("int8")) or next(iter(steepest(tensors, 1)), None)]
        return ", ".join(f"{t.op} ('{t.node}')" for t in worst if t) or "no single operator"

    def parting(graph: Path, backend: str) -> str:
        """The first operator, each time of a graph that ends there: a runtime fuses as in the whole."""
        import onnx
        from onnx.utils import Extractor

        whole = onnx.shape_inference.infer_shapes(onnx.load(graph))
        nodes, cut = [n for n in whole.graph.node if n.op_type in _COMPUTE], folder / "cut.onnx"

        def apart(node: Any) -> bool:
            onnx.save(Extractor(whole).extract_model([INPUT], [node.output[0]]), cut)
            a, b = (run(name, cut, 1).astype(np.float64) for name in ("onnxruntime", backend))
            return float(np.abs(a - b).mean()) > _APART * float(np.abs(a).mean())

        first = next(filter(apart, nodes))
        made = {name: n for n in whole.graph.node for name in n.output}
        before = first.input[0]
        while before in made and made[before].op_type in ("DequantizeLinear", "QuantizeLinear", "Reshape", "Split", "Transpose"):
            before = made[before].input[0]
        behind = f" behind {made[before].op_type}" if before in made else ""
        return f"{first.op_type}{behind} ('{first.name}')"

    def run(backend: str, graph: Path, batch: int = 0) -> Any:
        batch = batch or batches[backend]
        runner, out = registry.load("backend", backend)(), Path(tempfile.mkdtemp(dir=folder))
        session = runner.open(out / runner.convert(graph, host, out, {}, batch=batch)["model_file"], threads=1, device=host)
        return np.concatenate([session.run({INPUT: images[i : i + batch]})[0] for i in range(0, _IMAGES, batch)])

    def build(graph: Path) -> str:
        registry.load("backend", "tensorrt_rtx")().convert(graph, rtx, Path(tempfile.mkdtemp(dir=folder)), {})
        return "ok"

    def int8(flavour: str) -> Path:
        samples = iter([images[i : i + batch] for i in range(0, _IMAGES, batch)])
        PTQ(PTQ.Config()).quantize(fp32, folder / f"{flavour}.onnx", samples, flavour)
        return folder / f"{flavour}.onnx"

    def fp16() -> Path:
        FP16(FP16.Config()).quantize(fp32, folder / "fp16.onnx", iter([]), "s8s8")
        return folder / "fp16.onnx"

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fp32, batch = folder / "fp32.onnx", _IMAGES
        if not export_onnx(model, size, fp32)["dynamic_batch"]:
            batch = 1
        fixed = " (fixed batch)" if batch == 1 else ""
        batches = {"onnxruntime": batch, "openvino": 1}  # OpenVINO's plan for single images, which a target with batch 1 gets
        for backend in ("onnxruntime", "openvino"):
            cell(f"{backend} fp32", lambda: judged(wanted, run(backend, fp32), "fp32") + fixed)  # noqa: B023, called at once
            cell(f"{backend} int8", lambda: rounded(backend))  # noqa: B023
        cell("TensorRT-RTX fp32", lambda: build(fp32))
        cell("TensorRT-RTX fp16", lambda: build(fp16()))
        cell("TensorRT-RTX int8", lambda: build(int8(rtx.flavour_for("tensorrt_rtx"))))


def row(arch: str, size: int) -> dict[str, str]:
    """All cells of one model; a process that dies leaves the rest of its row as `crashed`."""
    answers: Any = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=examine, args=(arch, size, answers))
    process.start()
    found: dict[str, str] = {}
    while process.is_alive() or not answers.empty():
        if not answers.empty():
            column, words = answers.get()
            found[column] = words
        else:
            time.sleep(0.1)
    process.join()
    return {column: found.get(column, f"crashed ({process.exitcode})") for column in COLUMNS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archs", nargs="*", metavar="ARCH")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = [f"| architecture | size | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    print("\n".join(lines), flush=True)
    counts = dict.fromkeys(COLUMNS, 0)
    chosen = {a: FAMILIES.get(a, 224) for a in args.archs} or FAMILIES
    for arch, size in chosen.items():
        cells = row(arch, size)
        for column, words in cells.items():
            counts[column] += words.startswith("ok")
        lines.append(f"| {arch} | {size} | {' | '.join(cells.values())} |")
        print(lines[-1], flush=True)
    lines.append(f"| **{len(chosen)} models** | | {' | '.join(f'**{n} ok**' for n in counts.values())} |")
    print(lines[-1])
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
