"""label: images without labels, and what a teacher says to them -> the same data, labelled with the teacher's decisions.

So every later stage that counts right answers counts agreement with the teacher. Labels that val and test came with are kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.errors import TrainingDiverged
from edgekd.registry import register
from edgekd.stages._stage import Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.context import Context
    from edgekd.data.dataset import Dataset


@register("stage")
class Label:
    class Config(Base):
        """Nothing to set."""

    takes: Mapping[str, Kind] = {"images": Kind.DATA, "engine?": Kind.ENGINE, "answers?": Kind.ANSWERS}
    gives = Kind.DATA
    version = 1
    libraries = ("onnxruntime-gpu", "onnxruntime", "numpy")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        import numpy as np

        from edgekd.data.dataset import IMAGES, INDEX
        from edgekd.data.index import PARTS, UNLABELLED
        from edgekd.stages._common import open_dataset

        images, dataset = inputs["images"], open_dataset(inputs["images"], ctx)
        index = images.json(INDEX)
        labels = np.array(index["labels"])
        for part in PARTS:
            positions = dataset.split(part)
            positions = positions[labels[positions] == UNLABELLED]
            if len(positions):
                labels[positions] = _decided(part, positions, settings, inputs, dataset, ctx)
        index |= {"labels": labels.tolist(), "labelled": True}
        (out / INDEX).write_text(json.dumps(index), encoding="utf-8")
        if (images.path / IMAGES).exists():
            _same_file(images.path / IMAGES, out / IMAGES)
        return dict(images.meta)


def _decided(
    part: str, positions: NDArray[np.int64], settings: Settings, inputs: Mapping[str, Artifact], dataset: Dataset, ctx: Context
) -> NDArray[np.int64]:
    """The teacher's most likely class for each image; raises TrainingDiverged where it says nothing finite."""
    import numpy as np

    from edgekd.stages.compile import open_engine
    from edgekd.stages.evaluate import run_engine
    from edgekd.train.answers import ANSWERS

    if "answers" in inputs:
        folder = inputs["answers"].path
        said = np.load(folder / ANSWERS)[0] if part == "train" else np.load(folder / f"{part}.npy")
        outputs = said[np.searchsorted(dataset.split(part), positions)]
    else:
        session, facts = open_engine(inputs["engine"], threads=ctx.threads)
        outputs = run_engine(session, facts, dataset, positions, ctx, f"{settings.name} {part}")
    if bad := positions[~np.isfinite(outputs).all(1)].tolist():
        raise TrainingDiverged(
            f"the teacher's outputs for {len(bad)} images are not finite, the first {dataset.ids[bad[0]]!a}",
            where="teacher",
            expected="finite outputs",
        )
    found: NDArray[np.int64] = outputs.argmax(1).astype(np.int64)
    return found


def _same_file(source: Path, target: Path) -> None:
    """The pixels once on disk, where the file system allows it: entries of the store are never written again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
