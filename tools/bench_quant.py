"""int8 against fp32, batch 1, 1 thread: `python tools/bench_quant.py [MODEL ...] [--search 24] [--seconds 30]`.

For each timm architecture (untrained weights, 224 px: latency only, nothing is said about accuracy) the fp32 file, the file with everything quantized,
and the file with what the search chose are measured interleaved in one run: onnxruntime, and OpenVINO where it is installed. Where NNCF is installed,
its file runs on both as well. Prints speed-ups over fp32 onnxruntime with their 95 % intervals, sizes, and how long making the file took.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODELS = ("resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_100")
SIZE, IMAGES, CLASSES = 224, 160, 4


def photos(folder: Path) -> Path:
    """Smooth seeded noise: what activations see of it is enough for ranges, not for accuracy."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        place = folder / f"class{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        small.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(place / f"{number:04d}.png")
    return folder


def quantized(model: Path, data: Path, work: Path, backend: str, search: int) -> tuple[Path, float]:
    """What `edgekd quantize` ships without a gate, and the seconds it took."""
    out = work / f"{backend}-{search}"
    command = [
        sys.executable,
        "-m",
        "edgekd",
        "quantize",
        str(model),
        "--data",
        str(data),
        "--image-size",
        str(SIZE),
        "--no-gate",
        "--json",
    ]
    command += ["--drop", "1", "--search", str(search), "-o", f"targets.host.backend={backend}", "--out", str(out)]
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "EDGEKD_HOME": str(work / "store")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not (out / "host" / "model.onnx").is_file():
        raise SystemExit(done.stderr)
    return out / "host" / "model.onnx", time.perf_counter() - start


def nncf_file(model: Path, work: Path) -> Path | None:
    """NNCF's post-training quantization of the same file, where NNCF is installed (it is for this benchmark only)."""
    try:
        import nncf
    except ImportError:
        return None
    import numpy as np
    import onnx

    proto = onnx.load(model)
    rng = np.random.default_rng(0)
    samples = [{proto.graph.input[0].name: rng.standard_normal((1, 3, SIZE, SIZE), dtype=np.float32)} for _ in range(64)]
    path = work / "nncf.onnx"
    onnx.save(nncf.quantize(proto, nncf.Dataset(samples), subset_size=len(samples)), path)
    return path


def main() -> None:
    import numpy as np
    import timm
    import torch

    from edgekd import registry
    from edgekd.export.onnx import INPUT, export_onnx
    from edgekd.profile.device import load_device
    from edgekd.profile.measure import measure, ratio

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--search", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=30.0, help="of measuring, per model")
    args = parser.parse_args()
    host = load_device("host")
    backends = [n for n in ("onnxruntime", "openvino") if registry.load("backend", n)().available() is None]
    print("| model | runtime | file | speed-up over fp32 onnxruntime | MB | made in s |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        data = photos(Path(folder) / "photos")
        for name in args.models:
            work = Path(folder) / name
            work.mkdir()
            torch.manual_seed(0)
            fp32 = work / "fp32.onnx"
            export_onnx(timm.create_model(name, num_classes=CLASSES).eval(), SIZE, fp32)
            files: dict[tuple[str, str], tuple[Path, float]] = {}
            rival = nncf_file(fp32, work)
            for backend in backends:
                files[backend, "fp32"] = (fp32, 0.0)
                files[backend, "int8, everything"] = quantized(fp32, data, work, backend, 0)
                files[backend, "int8, searched"] = quantized(fp32, data, work, backend, args.search)
                if rival is not None:
                    files[backend, "int8, NNCF"] = (rival, 0.0)
            opened = {key: registry.load("backend", key[0])().open(file, threads=1, device=host) for key, (file, _) in files.items()}
            sessions = {" / ".join(key): session for key, session in opened.items()}
            feeds: Any = {INPUT: np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE), dtype=np.float32)}
            samples = measure(sessions, dict.fromkeys(sessions, feeds), budget_s=args.seconds)
            base = samples["onnxruntime / fp32"]
            for key, (file, seconds) in files.items():
                found = ratio(base, samples[" / ".join(key)])
                low, high = found["ci95"]
                took = f"{seconds:.0f}" if seconds else "-"
                print(
                    f"| {name} | {key[0]} | {key[1]} | {found['ratio']:.2f}x [{low:.2f}, {high:.2f}] | {file.stat().st_size / 1e6:.2f} | {took} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
