"""verify: a bundle's bytes against its manifest, then its sample outputs on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgekd.bundle import FACTS, SAMPLES, verify_files
from edgekd.errors import BundleRefused, ParityBroken


def verify_bundle(folder: Path) -> dict[str, Any]:
    """What was checked; raises BundleRefused for changed bytes and ParityBroken where this machine's answers differ."""
    manifest = verify_files(folder)
    model = _model_of(folder, manifest)
    return {
        "bundle": str(folder),
        "files": len(manifest["files"]),
        "recipe": manifest["recipe"],
        "target": manifest["target"],
        "samples": _check_samples(folder, model),
    }


def _model_of(folder: Path, manifest: dict[str, Any]) -> Path:
    """The model, which is one of the bundle's own files and an ONNX file that may be opened: a bundle can come from anyone."""
    from edgekd.safeio.onnxfile import check_onnx

    name = str(json.loads((folder / FACTS).read_text(encoding="utf-8")).get("model_file"))
    if name not in manifest["files"]:
        raise BundleRefused(f"its model file '{name}' is not in the manifest", where=str(folder), expected="a file of the bundle")
    check_onnx(folder / name)
    return folder / name


def _check_samples(folder: Path, model: Path) -> str:
    """Runs the sample images; raises ParityBroken where outputs lie beyond the bundle's tolerance, and says how many labels agree."""
    import importlib.util

    if importlib.util.find_spec("onnxruntime") is None:
        return "sample outputs were not checked: onnxruntime is not installed"
    import numpy as np

    from edgekd.data.normalise import normalised

    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    with np.load(folder / SAMPLES) as stored:
        pixels, wanted = stored["pixels"], stored["outputs"]
    found = _run(model, facts, normalised(pixels, facts["preprocess"]))
    alike, gap = float((found.argmax(1) == wanted.argmax(1)).mean()), float(np.abs(found - wanted).max())
    if gap > facts["tolerance"]:
        raise ParityBroken(
            f"on this machine outputs differ by up to {gap:.3g}, {1 - alike:.0%} of the samples get another label",
            where=str(folder),
            expected=f"at most {facts['tolerance']:.3g}",
        )
    return f"{round(alike * len(found))} of {len(found)} sample images give the stored label, outputs within {gap:.2g}"


def _run(file: Path, facts: dict[str, Any], images: Any) -> Any:
    import numpy as np

    from edgekd import registry
    from edgekd.profile.device import load_device

    session = registry.load("backend", "onnxruntime")().open(file, threads=1, device=load_device("host"))
    size = facts["fixed_batch"] or len(images)
    parts = [images[i : i + size] for i in range(0, len(images), size)]
    # A graph with a fixed batch has its last part filled up by repetition.
    return np.concatenate([session.run({facts["input"]: np.resize(p, (size, *p.shape[1:]))})[0][: len(p)] for p in parts])
