"""Stratified, stateless splits: which part a sample belongs to depends on the seed and the contents of its class only."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from edgekd.data.config import DataConfig
from edgekd.data.index import PARTS, UNLABELLED, Index, Sample, root_of
from edgekd.errors import DataRefused


def assign(index: Index, cfg: DataConfig, seed: int) -> tuple[Sample, ...]:
    """Samples in the index's order, each in train, val or test. Raises DataRefused where a class is too small to split."""
    own = seed if cfg.split.seed is None else cfg.split.seed
    where = str(root_of(cfg))
    have = {s.split for s in index.samples}
    missing = [part for part in ("test", "val") if part not in have]
    part_of = {s.id: s.split or "train" for s in index.samples}
    for label, pool in sorted(_by_label(s for s in index.samples if part_of[s.id] == "train").items()):
        ranked = _ranked(pool, own, "split")
        for part in missing:
            take = max(1, round(len(pool) * getattr(cfg.split, part)))
            part_of.update((s.id, part) for s in ranked[:take])
            ranked = ranked[take:]
        if not ranked:
            raise _too_small("the folder" if label == UNLABELLED else f"class {index.classes[label]}", len(pool), missing, where)
    samples = tuple(s._replace(split=part_of[s.id]) for s in index.samples)
    check(samples, index.classes, where)
    limits = dict.fromkeys(PARTS, cfg.max_per_class)
    few = [n for n in (cfg.max_per_class, cfg.split.train_per_class) if n is not None]
    seeds = dict.fromkeys(PARTS, own) | {"train": seed}  # with a split of its own, which few are trained on still differs by the run's seed
    return _limited(samples, limits | {"train": min(few)} if few else limits, seeds)


def check(samples: Iterable[Sample], classes: tuple[str, ...], where: str) -> None:
    """Every part has samples and every class can be learned. Raises DataRefused."""
    count = Counter((s.split, s.label) for s in samples)
    for part in PARTS:
        if not any(split == part for split, _ in count):
            raise DataRefused(
                f"the {part} part is empty", where=where, expected="train, val and test samples", hint="add images to that part"
            )
    for label, name in enumerate(classes) if not count["train", UNLABELLED] else ():
        if not count["train", label]:
            raise DataRefused(
                f"class {name} has no training sample", where=where, expected="at least one in train", hint="add images or remove the class"
            )


def shared_contents(samples: Iterable[Sample]) -> int:
    """How many distinct images lie in more than one part, byte for byte: they flatter val and test."""
    parts: defaultdict[str, set[str | None]] = defaultdict(set)
    for s in samples:
        parts[s.sha256].add(s.split)
    return sum(len(p) > 1 for p in parts.values())


def _limited(samples: tuple[Sample, ...], limits: Mapping[str, int | None], seeds: Mapping[str, int]) -> tuple[Sample, ...]:
    """At most so many of each class in each part; None: all."""
    groups: defaultdict[tuple[str, int], list[Sample]] = defaultdict(list)
    for s in samples:
        groups[s.split or "train", s.label].append(s)
    left_out = {
        s.id
        for (part, _), group in groups.items()
        if limits[part] is not None
        for s in _ranked(group, seeds[part], "subset")[limits[part] :]
    }
    return tuple(s for s in samples if s.id not in left_out)


def _ranked(samples: Iterable[Sample], seed: int, purpose: str) -> list[Sample]:
    # By content first: copies of one image come next to each other and nearly always land in one part.
    return sorted(samples, key=lambda s: (hashlib.sha256(f"{seed}/{purpose}/{s.sha256}".encode()).digest(), s.id))


def _by_label(samples: Iterable[Sample]) -> dict[int, list[Sample]]:
    groups: defaultdict[int, list[Sample]] = defaultdict(list)
    for s in samples:
        groups[s.label].append(s)
    return groups


def _too_small(group: str, count: int, missing: list[str], where: str) -> DataRefused:
    what = f"{group} has {count} training sample{'s' * (count != 1)}, too few to split off {' and '.join(missing)}"
    hint = "add images, remove the class, or provide the parts yourself"
    return DataRefused(what, where=where, expected=f"at least {len(missing) + 1} per class", hint=hint)
