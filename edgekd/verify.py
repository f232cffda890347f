"""verify: a bundle's bytes against its manifest, then its sample outputs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekd.bundle import SAMPLES, read_facts, verify_files
from edgekd.errors import ParityBroken


def verify_bundle(folder: Path) -> dict[str, Any]:
    """What was checked; raises BundleRefused for changed bytes and ParityBroken where this machine's answers differ."""
    from edgekd.safeio.onnxfile import check_onnx  # onnx

    manifest = verify_files(folder)
    facts = read_facts(folder, manifest)
    check_onnx(folder / facts["model_file"])
    return {
        "bundle": str(folder),
        "files": len(manifest["files"]),
        "recipe": manifest["recipe"],
        "target": manifest["target"],
        "samples": _check_samples(folder, facts),
    }


def _check_samples(folder: Path, facts: dict[str, Any]) -> str:
    """Runs the sample images; raises ParityBroken where outputs lie beyond the bundle's tolerance, and says how many labels agree."""
    import importlib.util

    if importlib.util.find_spec("onnxruntime") is None:
        return "sample outputs were not checked: onnxruntime is not installed"
    import numpy as np

    from edgekd.data.normalise import normalised

    with np.load(folder / SAMPLES) as stored:
        pixels, wanted = stored["pixels"], stored["outputs"]
    found = _run(folder / facts["model_file"], facts, normalised(pixels, facts["preprocess"]))
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
