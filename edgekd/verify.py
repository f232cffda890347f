"""verify: a bundle's bytes against its manifest, then its sample outputs on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgekd.bundle import FACTS, SAMPLES, verify_files
from edgekd.errors import ParityBroken


def verify_bundle(folder: Path) -> dict[str, Any]:
    """What was checked; raises BundleRefused for changed bytes and ParityBroken where this machine's answers differ."""
    manifest = verify_files(folder)
    return {
        "bundle": str(folder),
        "files": len(manifest["files"]),
        "recipe": manifest["recipe"],
        "target": manifest["target"],
        "samples": _check_samples(folder),
    }


def _check_samples(folder: Path) -> str:
    """Runs the sample images; labels must agree and outputs lie within the bundle's tolerance, else by how much they do not."""
    import importlib.util

    if importlib.util.find_spec("onnxruntime") is None:
        return "sample outputs were not checked: onnxruntime is not installed"
    import numpy as np

    from edgekd.data.normalise import normalised

    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    with np.load(folder / SAMPLES) as stored:
        pixels, wanted = stored["pixels"], stored["outputs"]
    found = _run(folder / facts["model_file"], facts, normalised(pixels, facts["preprocess"]))
    alike, gap = float((found.argmax(1) == wanted.argmax(1)).mean()), float(np.abs(found - wanted).max())
    if alike < 1 and gap > facts["tolerance"]:
        raise ParityBroken(
            f"on this machine {1 - alike:.0%} of the samples get another label, outputs differ by up to {gap:.3g}",
            where=str(folder),
            expected=f"at most {facts['tolerance']:g}",
        )
    return f"{len(found)} sample images give the stored labels, outputs within {gap:.2g}"


def _run(file: Path, facts: dict[str, Any], images: Any) -> Any:
    import numpy as np

    from edgekd import registry
    from edgekd.profile.device import load_device

    session = registry.load("backend", "onnxruntime")().open(file, threads=1, device=load_device("host"))
    size = facts["fixed_batch"] or len(images)
    parts = [session.run({facts["input"]: images[i : i + size]})[0] for i in range(0, len(images) - len(images) % size, size)]
    return np.concatenate(parts)
