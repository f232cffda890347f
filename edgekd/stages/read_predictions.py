"""read_predictions: a file of a teacher's predictions -> its answers to the training images, and its logits for val and test.

It knows the images as they are, so that every augmented view gets the answer for the image itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.config import no_key
from edgekd.errors import PredictionsRefused
from edgekd.registry import register
from edgekd.stages._stage import Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.context import Context
    from edgekd.stages._common import Samples

_LEAST = 1e-12  # of a probability: its logarithm must be finite
_BATCH = 8192
_SHOWN = 3


@register("stage")
class ReadPredictions:
    class Config(Base):
        # The content's hash is in the key instead, so the file may move without a rebuild.
        predictions: Path = no_key(..., "the file")
        outputs: Literal["auto", "logits", "probabilities"] = Field("auto", description="what its numbers are; auto: as it or they say")
        classes: tuple[str, ...] = Field((), description="names of its columns, in order; none: those in the file, or the data's")

    takes: Mapping[str, Kind] = {"data": Kind.DATA}
    gives = Kind.ANSWERS
    version = 1
    libraries = ("numpy",)

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        import numpy as np

        from edgekd.stages._common import open_dataset, unchanged
        from edgekd.train.answers import About, Writer

        config, dataset = settings.typed(self.Config), open_dataset(inputs["data"], ctx)
        unchanged(config.predictions, settings)
        logits, kind = logits_of_file(config, dataset, "images")
        train = dataset.split("train")
        writer = Writer(ctx.work, About(len(dataset.classes), 1), train, ctx.seed)
        for start in range(writer.done, len(train), _BATCH):
            writer.add(logits[train[start : start + _BATCH]])
        writer.publish(out)
        for part in ("val", "test"):
            np.save(out / f"{part}.npy", logits[dataset.split(part)])
        return {"arch": config.predictions.name, "gives": kind, "images": len(dataset)}


def logits_of_file(config: Any, dataset: Samples, samples: str) -> tuple[NDArray[np.float32], str]:
    """(samples, classes) in the order of the dataset, and what the file's numbers were; raises PredictionsRefused for samples that it misses."""
    import numpy as np

    from edgekd.data.classes import outputs_of
    from edgekd.safeio.predictions import read_predictions
    from edgekd.stages.read_teacher import kind_of

    path, found = config.predictions, read_predictions(config.predictions)
    rows = {sample: row for row, sample in enumerate(found.ids)}
    if missing := [i for i in dataset.ids if i not in rows]:
        parts = {p: sum(dataset.ids[i] not in rows for i in dataset.split(p)) for p in ("train", "val", "test")}
        raise PredictionsRefused(
            f"it misses {len(missing)} of {len(dataset)} {samples} ({', '.join(f'{n} of {p}' for p, n in parts.items() if n)}), "
            f"the first {', '.join(ascii(i) for i in missing[:_SHOWN])}",
            where=str(path),
            expected=f"a prediction for each of the {samples}, by its id; it has {found.ids[0]!a}, for one",
            hint=f"predict the missing {samples} too and add them to the file, or remove them from the data",
        )
    values = found.values[[rows[i] for i in dataset.ids]]
    asked = config.outputs if config.outputs != "auto" else found.kind or "auto"
    kind = kind_of(values, asked, str(path))
    named = config.classes or found.names
    numbered = not config.classes and named == tuple(map(str, range(len(named))))  # columns that have numbers have no names
    places = outputs_of(dataset.classes, values.shape[1], () if numbered else named, str(path))
    if kind == "probabilities":
        values = np.log(values.clip(_LEAST))
    return values[:, places], kind
