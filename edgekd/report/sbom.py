"""The bill of materials of a bundle in CycloneDX 1.6: its files with their hashes, what it needs to run, and what it was made with.

Written by the standard's own library; without time and with a number derived from the content, so that the same bundle gives the same bytes.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

_RUNS_WITH = ("onnxruntime", "numpy", "Pillow")  # what predict.py imports
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/edgekd/edgekd")


def sbom(name: str, digest: str, files: Mapping[str, str], made_with: Mapping[str, str], data: str) -> str:
    """JSON text. `files`: name -> SHA-256; `made_with`: distribution -> version; `digest`, `data`: of the model and the dataset."""
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentScope, ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    def hashed(value: str) -> list[HashType]:
        return [HashType(alg=HashAlgorithm.SHA_256, content=value)]

    bom = Bom(serial_number=uuid.uuid5(_NAMESPACE, digest))
    bom.metadata.timestamp = None  # type: ignore[assignment]  # left out of the file
    model = Component(type=ComponentType.MACHINE_LEARNING_MODEL, name=name, bom_ref="model", hashes=hashed(digest))
    bom.metadata.component = model
    parts = [Component(type=ComponentType.FILE, name=n, bom_ref=f"file:{n}", hashes=hashed(h)) for n, h in sorted(files.items())]
    parts.append(Component(type=ComponentType.DATA, name="dataset", bom_ref="data", version=data, scope=ComponentScope.EXCLUDED))
    runs = [_library(n, None, required=True) for n in _RUNS_WITH]
    made = [_library(n, v, required=False) for n, v in sorted(made_with.items())]
    for part in (*parts, *runs, *made):
        bom.components.add(part)
    bom.register_dependency(model, runs)
    return str(JsonV1Dot6(bom).output_as_string(indent=1)) + "\n"


def _library(name: str, version: str | None, *, required: bool) -> Component:
    """A Python distribution, with the licence that it declares where it is installed; without a version any recent one does."""
    from cyclonedx.factory.license import LicenseFactory
    from cyclonedx.model.component import Component, ComponentScope, ComponentType
    from packageurl import PackageURL

    licences: list[Any] = []
    try:
        declared = metadata.metadata(name)["License-Expression"]
        licences = [LicenseFactory().make_from_string(declared)] if declared else []
    except metadata.PackageNotFoundError:
        pass
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=version,
        bom_ref=f"{'runs' if required else 'made'}:{name}",
        purl=PackageURL("pypi", None, name.lower(), version),
        licenses=licences,
        scope=ComponentScope.REQUIRED if required else ComponentScope.EXCLUDED,
    )
