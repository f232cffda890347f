"""Every name of TensorRT's API that the code uses exists in the bindings of each supported version. Names only: nothing is built here.

`tensorrt_api.json` was listed from the real bindings by tools/tensorrt_api.py.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_tensorrt import CLASSES_OF_THE_API

PACKAGE = Path(sys.modules["edgekd"].__file__ or "").parent if "edgekd" in sys.modules else Path(__file__).parents[2] / "edgekd"
API: dict[str, dict[str, list[str]]] = json.loads((Path(__file__).parent / "tensorrt_api.json").read_text())
SHARED = ("tensorrt", "_trt_session", "_trt_callbacks", "_timing")
FILES = {f"backends/{name}.py": list(API) for name in SHARED} | {"templates/build.py": list(API), "backends/tensorrt_rtx.py": ["rtx"]}
OBJECTS = {  # names of variables and attributes in the code -> the class that they hold
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
    "first": "ParserError",
    "runtime": "Runtime",
    "inspector": "EngineInspector",
    "cache": "ITimingCache",
    "others": "ITimingCache",
}
OURS = {"engine": {"name", "read_bytes"}, "profile": set(), "parser": set()}  # a path of the same name
ONLY_RTX = {
    ("templates/build.py", "ComputeCapability"),
    ("templates/build.py", "num_compute_capabilities"),
    ("templates/build.py", "set_compute_capability"),
}


def used(file: str) -> Iterator[tuple[str | None, str]]:
    """(class or None for the module, attribute) for each use of the API in a file."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Attribute) or node.attr.startswith("__") or "__name__" in ast.unparse(node):
            continue
        owner = node.value
        name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else None
        if name in ("trt", "_trt"):
            yield None, node.attr
        elif isinstance(owner, ast.Attribute) and isinstance(owner.value, ast.Name) and owner.value.id == "trt":
            yield owner.attr, node.attr
        elif name in OBJECTS and node.attr not in OURS.get(name, set()):
            yield OBJECTS[name], node.attr


@pytest.mark.parametrize(("file", "version"), [(f, v) for f, versions in FILES.items() for v in versions])
def test_every_name_exists(file: str, version: str) -> None:
    api, missing = API[version], []
    for cls, name in sorted(set(used(file)), key=str):
        if version != "rtx" and {(file, name), (file, str(cls))} & ONLY_RTX:
            continue
        names = [*api, "nptype", "__name__", "__version__"] if cls is None else [*api.get(cls, []), "__members__"]
        if name not in names:
            missing.append(f"{cls or 'tensorrt'}.{name}")
    assert missing == []


def test_the_listing_finds_what_is_not_there() -> None:
    """The check can fail: 11 has no precision flags, 10.3 no compute capabilities."""
    eleven = next(v for v in API if v.startswith("11."))
    assert "INT8" not in API[eleven]["BuilderFlag"]
    assert "INT8" in API["10.3.0"]["BuilderFlag"]
    assert "ComputeCapability" not in API["10.3.0"]
    assert {c for c, _ in used("backends/tensorrt.py")} >= {"IBuilderConfig", "OnnxParser", "BuilderFlag"}
    assert set(used("backends/_trt_session.py")) >= {("Runtime", "deserialize_cuda_engine"), ("EngineInspector", "get_engine_information")}
    assert set(used("backends/_timing.py")) >= {("ITimingCache", "combine"), ("IBuilderConfig", "set_timing_cache")}
    assert ("IExecutionContext", "profiler") in set(used("backends/_trt_session.py"))


def test_every_method_that_tensorrt_calls_back_exists() -> None:
    """A callback under a wrong name is never called: each method of a subclass is one of its base, or our own."""
    ours = {"ILogger": {"clear", "said"}, "IProgressMonitor": set(), "IProfiler": set()}
    tree = ast.parse((PACKAGE / "backends/_trt_callbacks.py").read_text(encoding="utf-8"))
    classes = [c for c in ast.walk(tree) if isinstance(c, ast.ClassDef) and c.bases]
    found = {ast.unparse(c.bases[0]).removeprefix("trt."): {m.name for m in c.body if isinstance(m, ast.FunctionDef)} for c in classes}
    assert set(found) == set(ours)
    for base, methods in found.items():
        for version, api in API.items():
            assert methods - {"__init__"} - ours[base] <= set(api[base]), version


@pytest.mark.parametrize("version", API)
def test_the_fake_of_other_tests_has_no_name_that_the_real_api_lacks(version: str) -> None:
    for cls in CLASSES_OF_THE_API:
        assert {n for n in vars(cls) if n[0] != "_"} <= set(API[version][cls.__name__]), cls.__name__
