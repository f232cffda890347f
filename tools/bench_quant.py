"""int8 against fp32 and rivals, batch 1, 1 thread: `python tools/bench_quant.py [MODEL ...] [--search 24] [--seconds 40]`.

For each timm architecture (untrained weights, 224 px: latency only, nothing is said about accuracy) what `edgekd quantize` ships when it may choose
runtime and precision is measured, interleaved in one run, beside fp32 onnxruntime and what others make of the same model: onnxruntime's own quantizer,
NNCF on onnxruntime, NNCF on OpenVINO (NNCF is for this benchmark only: pip install nncf). OpenVINO gets NNCF's model twice: as it comes, compiled with
one call, and opened as edgekd opens its own, which adds edgekd's plan for single images to the rival's file. `resnet56_cifar` takes real weights: --weights FOLDER with
resnet56-*.th, --data FOLDER with train/<class>/*.jpg and test/<class>/*.jpg, --lossless FILE.npz; its accuracy is compared image by image.
Prints speed-ups over fp32 onnxruntime with 95 % intervals, sizes, seconds, and ours against the best rival.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_low_bits import MEAN, STD, imported, load

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODELS = ("resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_100")
REAL = "resnet56_cifar"
IMAGES, CLASSES, CALIBRATION = 160, 4, 64


@dataclass
class Entry:
    """A file and the runtime that it is measured on."""

    backend: str
    name: str
    file: Path
    seconds: float = 0.0
    plain: bool = False  # opened with OpenVINO's own call instead of edgekd's session


class PlainOpenVino:
    """A model as OpenVINO's own API compiles it for one thread in fp32."""

    def __init__(self, file: Path):
        import openvino

        settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        model = openvino.Core().compile_model(str(file), "CPU", settings)
        self.request = model.create_infer_request()
        self.input_names = [i.any_name for i in model.inputs]

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        return list(self.request.infer(feeds, share_inputs=True).values())


def photos(folder: Path, size: int) -> Path:
    """Smooth seeded noise: what activations see of it is enough for ranges, not for accuracy."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        place = folder / f"class{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(place / f"{number:04d}.png")
    return folder


def calibration(data: Path, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> list[Any]:
    """The same training images for every rival, normalised (1, 3, h, w)."""
    import numpy as np
    from PIL import Image

    root = data / "train" if (data / "train").is_dir() else data
    files = sorted(p for p in root.rglob("*") if p.suffix in (".png", ".jpg"))
    chosen = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:CALIBRATION]]
    pixels = [np.asarray(Image.open(f).convert("RGB").resize((size, size)), np.float32) / 255 for f in chosen]
    return [np.ascontiguousarray(((p - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)[None]) for p in pixels]


def ours(model: Path, data: Path, size: int, work: Path, search: int, more: list[str]) -> tuple[Entry, dict[str, Any]]:
    """What `edgekd quantize` ships, and its run.json."""
    out = work / "ours"
    command = [sys.executable, "-m", "edgekd", "quantize", str(model), "--data", str(data), "--image-size", str(size), "--json"]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--search", str(search), "--out", str(out), *more],
        cwd=ROOT,
        env={**os.environ, "EDGEKD_HOME": str(work / "store")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not (out / "host" / "model.onnx").is_file():
        raise SystemExit(done.stderr)
    run = json.loads((out / "run.json").read_text())
    [target] = run["targets"]
    shipped = next((c["name"] for c in target.get("candidates", []) if c["chosen"]), f"{target['backend']} {target['precision']}")
    return Entry(target["backend"], f"edgekd: {shipped}", out / "host" / "model.onnx", time.perf_counter() - start), run


def rivals(model: Path, work: Path, samples: list[Any]) -> Iterator[Entry]:
    """onnxruntime's quantizer with its defaults, and NNCF's where it is installed."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnx.load(model).graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> dict[str, Any] | None:
            found = next(self.left, None)
            return None if found is None else {name: found}

    start = time.perf_counter()
    quant_pre_process(str(model), str(work / "prepared.onnx"), skip_symbolic_shape=True)
    quantize_static(str(work / "prepared.onnx"), str(work / "plain.onnx"), Reader())
    yield Entry("onnxruntime", "onnxruntime's quantizer", work / "plain.onnx", time.perf_counter() - start)
    try:
        import nncf
    except ImportError:
        return
    start = time.perf_counter()
    transformer = {"model_type": nncf.ModelType.TRANSFORMER} if "vit" in model.parent.name else {}
    quantized = nncf.quantize(onnx.load(model), nncf.Dataset([{name: s} for s in samples]), subset_size=len(samples), **transformer)
    onnx.save(quantized, work / "nncf.onnx")
    yield Entry("onnxruntime", "NNCF", work / "nncf.onnx", time.perf_counter() - start)
    try:
        import openvino
    except ImportError:
        return
    start = time.perf_counter()
    native = nncf.quantize(openvino.convert_model(str(model)), nncf.Dataset(samples), subset_size=len(samples), **transformer)
    openvino.save_model(native, work / "nncf.xml", compress_to_fp16=False)
    took = time.perf_counter() - start
    yield Entry("openvino", "NNCF, as it comes", work / "nncf.xml", took, plain=True)
    yield Entry("openvino", "NNCF, in edgekd's session", work / "nncf.xml", took)


def measured(entries: list[Entry], size: int, seconds: float) -> dict[str, Any]:
    """Speed-up over the first entry with its interval, by entry number; for a file that its runtime refuses, the reason."""
    import numpy as np

    from edgekd import registry
    from edgekd.errors import BackendError
    from edgekd.profile.device import load_device
    from edgekd.profile.measure import measure, ratio

    host = load_device("host")
    image = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
    sessions, refused = {}, {}
    for number, entry in enumerate(entries):
        try:
            opened = registry.load("backend", entry.backend)().open
            session = PlainOpenVino(entry.file) if entry.plain else opened(entry.file, threads=1, device=host)
            session.run({session.input_names[0]: image})
            sessions[str(number)] = session
        except BackendError as problem:
            refused[str(number)] = {"ratio": 0.0, "refused": problem.what}
    samples = measure(sessions, {n: {s.input_names[0]: image} for n, s in sessions.items()}, budget_s=seconds)
    return {n: ratio(samples["0"], found) for n, found in samples.items()} | refused


def accuracy(name: str, shipped: Entry, fp32: Entry, images: Any, labels: Any) -> None:
    """Prints the paired loss of top-1, image by image, each file on its own runtime."""
    import numpy as np

    from edgekd import registry
    from edgekd.gate import paired_drop
    from edgekd.profile.device import load_device

    scores = []
    for entry in (fp32, shipped):
        session = registry.load("backend", entry.backend)().open(entry.file, threads=1, device=load_device("host"))
        parts = [session.run({session.input_names[0]: images[i : i + 250]})[0].argmax(1) for i in range(0, len(images), 250)]
        scores.append((np.concatenate(parts) == labels).astype(float).tolist())
    drop, (low, high) = paired_drop(*scores)
    top1 = [100 * sum(s) / len(s) for s in scores]
    print(
        f"\n{name}, {len(labels)} images: {top1[0]:.2f} -> {top1[1]:.2f} %, {100 * drop:+.2f} points lost [{100 * low:+.2f}, {100 * high:+.2f}]"
    )


def tests(lossless: Path, data: Path) -> Iterator[tuple[str, Any, Any]]:
    """(what, normalised images, labels): the lossless subset and the JPEG test folder."""
    import numpy as np
    from PIL import Image

    def normal(pixels: Any) -> Any:
        return np.ascontiguousarray(((pixels.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)).transpose(0, 3, 1, 2))

    with np.load(lossless) as file:
        yield "lossless", normal(file["x_test"]), file["y_test"]
    classes = sorted(p.name for p in (data / "test").iterdir())
    files = [(f, i) for i, name in enumerate(classes) for f in sorted((data / "test" / name).iterdir())]
    yield "JPEG", normal(np.stack([np.asarray(Image.open(f).convert("RGB")) for f, _ in files])), np.array([i for _, i in files])


def main() -> None:
    import timm
    import torch

    from edgekd.export.onnx import export_onnx

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--search", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=40.0, help="of measuring, per model")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--lossless", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            work = Path(folder) / name
            work.mkdir()
            torch.manual_seed(0)
            real, fp32 = name == REAL, work / "fp32.onnx"
            if real:
                model, size, data = load(name, imported(args.weights, name, work)), 32, args.data.resolve()
                more = ["--mean", ",".join(map(str, MEAN)), "--std", ",".join(map(str, STD))]
            else:
                model, size = timm.create_model(name, num_classes=CLASSES), 224
                data = photos(work / "photos", size)
                more = ["--drop", "1"]  # labels of untrained weights mean nothing
            export_onnx(model.eval(), size, fp32)
            samples = calibration(data, size, *((MEAN, STD) if real else ((0.5,) * 3, (0.5,) * 3)))
            entries = [Entry("onnxruntime", "fp32", fp32), *rivals(fp32, work, samples)]
            shipped, run = ours(fp32, data, size, work, args.search, more)
            entries.append(shipped)
            found = measured(entries, size, args.seconds)
            print(f"\n| {name} on | file | speed-up over fp32 onnxruntime | MB | made in s |\n|---|---|---|---|---|")
            for number, entry in enumerate(entries):
                row = found[str(number)]
                weight = sum(f.stat().st_size for f in (entry.file, entry.file.with_suffix(".bin")) if f.is_file())
                took = f"{entry.seconds:.0f}" if entry.seconds else "-"
                gain = row.get("refused") or f"{row['ratio']:.2f}x [{row['ci95'][0]:.2f}, {row['ci95'][1]:.2f}]"
                print(f"| {entry.backend} | {entry.name} | {gain} | {weight / 1e6:.2f} | {took} |")
            mine, others = found[str(len(entries) - 1)]["ratio"], range(1, len(entries) - 1)
            helped = [i for i in others if entries[i].backend == "openvino" and not entries[i].plain]
            for what, rows in (("best rival", [i for i in others if i not in helped]), ("rival in edgekd's session", helped)):
                if rows:
                    best = max(rows, key=lambda i: found[str(i)]["ratio"])
                    rival = f"{entries[best].name} on {entries[best].backend}"
                    print(f"\nedgekd / {what} ({rival}): {mine / found[str(best)]['ratio']:.2f}; over fp32: {mine:.2f}x")
            for row in run["targets"][0].get("candidates", []):
                said = f"{1 / row['ratio']:.2f}x" if row.get("ratio") else row.get("refused")
                print(f"  candidate {row['name']}: {said}{', ships' if row['chosen'] else ''}")
            if real:
                for what, images, labels in tests(args.lossless, data):
                    accuracy(what, shipped, entries[0], images, labels)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
