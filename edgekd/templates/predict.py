"""Classifies images with the model of this bundle: python predict.py FOLDER_OR_IMAGE...

Needs Python 3.8 or newer, onnxruntime, numpy and Pillow; nothing of edgekd. Prints a line an image: file name, label, probability.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

HERE = Path(__file__).resolve().parent
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def preprocess(image: Image.Image, settings: dict[str, Any]) -> np.ndarray:
    """The same steps as in training: resize, pixel / 255, minus mean, over std -> (1, 3, h, w) float32."""
    size, (width, height) = settings["image_size"], image.size
    side = min(width, height)
    left, top = ((width - side) / 2, (height - side) / 2) if settings["resize"] == "crop" else (0, 0)
    box = (left, top, left + side, top + side) if settings["resize"] == "crop" else (0, 0, width, height)
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[settings["interpolation"]]
    pixels = np.asarray(image.resize((size, size), method, box=box), dtype=np.uint8)
    mean, std = np.asarray(settings["mean"], np.float32), np.asarray(settings["std"], np.float32)
    x = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None])


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    shares: np.ndarray = e / e.sum()
    return shares


def images_of(arguments: list[str]) -> Iterator[Path]:
    for name in arguments:
        path = Path(name)
        yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    bundle = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
    if bundle["postprocess"]["kind"] != "softmax":
        sys.exit("write this task's own post-processing here: " + json.dumps(bundle["postprocess"], sort_keys=True))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = bundle["threads"]
    session = onnxruntime.InferenceSession(str(HERE / bundle["model_file"]), options, providers=["CPUExecutionProvider"])
    found = 0
    for path in images_of(sys.argv[1:]):
        found += 1
        try:
            image = Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP"))
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"more than 8 bits a channel (mode {image.mode})")
            x = preprocess(image.convert("RGB"), bundle["preprocess"])
        except Exception as error:  # decoders raise many types on damaged files; one of them must not end the folder
            print(f"{path.name}: cannot be read: {error}", file=sys.stderr)
            continue
        x = np.repeat(x, bundle["fixed_batch"] or 1, axis=0)  # a model for a fixed batch gets the image that many times
        probabilities = softmax(session.run(None, {bundle["input"]: x})[0][0].astype(np.float64))
        best = int(probabilities.argmax())
        print(f"{path.name}\t{bundle['labels'][best]}\t{probabilities[best]:.4f}")
    if not found:
        sys.exit("no image found: expected files ending in " + " ".join(sorted(SUFFIXES)))


if __name__ == "__main__":
    main()
