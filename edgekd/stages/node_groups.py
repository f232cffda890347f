"""node_groups: where on a graph a student loses -> accuracy of teacher, student and student alone by degree and homophily, of links by what nodes share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.artifact import Artifact, Kind
from edgekd.config import Config as Base
from edgekd.registry import register
from edgekd.stages._stage import Settings
from edgekd.stages.evaluate import LABELS, OUTPUTS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.context import Context
    from edgekd.data.links import Links
    from edgekd.data.nodes import Nodes

GROUPS = "groups.json"
_DEGREES = (0, 1, 2, 4, 8, 16, 32)  # where groups begin
_SHARES = (0.0, 0.25, 0.5, 0.75)
_SHARED = (0, 1, 2, 4)
_ALIKE = "no labelled neighbours"


@register("stage")
class NodeGroups:
    class Config(Base):
        """Nothing to set."""

    takes: Mapping[str, Kind] = {"student": Kind.METRICS, "teacher?": Kind.METRICS, "alone?": Kind.METRICS, "data": Kind.DATA}
    gives = Kind.METRICS
    version = 2
    libraries = ("numpy", "scipy")

    def run(self, settings: Settings, inputs: Mapping[str, Artifact], out: Path, ctx: Context) -> dict[str, Any]:
        import numpy as np

        from edgekd.data.links import Links
        from edgekd.gate import paired_drop
        from edgekd.stages._common import open_samples, task_of

        data, task = open_samples(inputs["data"], ctx), task_of(settings)
        test = data.split("test")
        labels = np.load(inputs["student"].path / LABELS)
        scores = {n: task.scores(np.load(inputs[n].path / OUTPUTS), labels) for n in ("teacher", "alone", "student") if n in inputs}
        rows = []
        ways = of_links(data, test[labels == 1]) if isinstance(data, Links) else of_nodes(data, test)  # type: ignore[arg-type]
        for by, groups in ways.items():
            for name, members in groups.items():
                if members.any():
                    rows.append(
                        {"by": by, "group": name, "nodes": int(members.sum())} | {n: float(s[members].mean()) for n, s in scores.items()}
                    )
        drops = {}
        for other in ("teacher", "alone"):
            if other in scores:
                drop, ends = paired_drop(scores[other].tolist(), scores["student"].tolist())
                drops[other] = {"drop": drop, "ci95": list(ends)}
        (out / GROUPS).write_text(json.dumps({"groups": rows, "drops": drops}, sort_keys=True), encoding="utf-8")
        return {"groups": len(rows)}


def of_nodes(nodes: Nodes, test: NDArray[np.int64]) -> dict[str, dict[str, NDArray[np.bool_]]]:
    """Nodes of `test`, in groups."""
    return {"degree": degrees(nodes, test), "homophily": homophily(nodes, test), "test nodes": seen(nodes, test)}


def of_links(links: Links, test: NDArray[np.int64]) -> dict[str, dict[str, NDArray[np.bool_]]]:
    """Links of `test` by how many neighbours their nodes share, and by the fewer that one of them has, as far as training saw."""
    import numpy as np
    from scipy.sparse import csr_matrix

    nodes, (a, b) = links.nodes, links.pairs[test].T
    graph = csr_matrix((np.ones(len(nodes.neighbours)), nodes.neighbours, nodes.indptr), shape=(len(nodes), len(nodes)))
    shared = np.asarray(graph[a].multiply(graph[b]).sum(1)).ravel()
    counts = np.diff(nodes.indptr)
    return {"shared neighbours": _by_count(shared, _SHARED), "degree of the lesser": _by_count(np.minimum(counts[a], counts[b]), _DEGREES)}


def _by_count(found: NDArray[Any], begin: tuple[int, ...]) -> dict[str, NDArray[np.bool_]]:
    ends = [*begin[1:], None]
    return {
        (f"{low}" if high == low + 1 else f"{low} to {high - 1}" if high else f"{low} or more"): (found >= low) & (found < (high or 2**62))
        for low, high in zip(begin, ends, strict=True)
    }


def degrees(nodes: Nodes, test: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """Nodes of `test` by how many neighbours they have."""
    return _by_count((nodes.indptr[1:] - nodes.indptr[:-1])[test], _DEGREES)


def homophily(nodes: Nodes, test: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """Nodes of `test` by the share of their labelled neighbours that have their own label."""
    import numpy as np

    start = np.repeat(np.arange(len(nodes)), np.diff(nodes.indptr))
    known = nodes.labels[nodes.neighbours] >= 0
    same = known & (nodes.labels[nodes.neighbours] == nodes.labels[start])
    count, alike = (np.bincount(start[mask], minlength=len(nodes))[test] for mask in (known, same))
    share = alike / np.maximum(count, 1)
    ends = [*_SHARES[1:], 1.0 + 1e-9]
    found = {
        f"{low:.0%} to {min(high, 1):.0%}": (count > 0) & (share >= low) & (share < high) for low, high in zip(_SHARES, ends, strict=True)
    }
    return found | {_ALIKE: count == 0}


def seen(nodes: Nodes, test: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """Nodes of `test` by whether they were there while training."""
    return {"seen while training": ~nodes.hidden[test], "unseen": nodes.hidden[test]}
