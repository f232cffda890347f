"""What the Python bindings of several TensorRT versions offer: `python tools/tensorrt_api.py VERSION... > tests/contract/tensorrt_api.json`.

The bindings are small wheels; their libraries are not on the package registry, and nothing is built here. Stub libraries that define the C functions
the bindings link to (all returning null) are compiled with gcc, so that the module imports and its classes can be listed. This proves names, never
that an engine builds. TensorRT for RTX needs no stub: it is read from its installed wheels.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

FUNCTIONS = [
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
]
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
CLASSES = [
    "Builder",
    "BuilderFlag",
    "ComputeCapability",
    "DeviceType",
    "EngineInspector",
    "HardwareCompatibilityLevel",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProfiler",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "LayerInformationFormat",
    "Logger",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "ProfilingVerbosity",
    "Runtime",
    "TensorIOMode",
]
LIST = """
import inspect, json, sys
try:
    import tensorrt_rtx_libs  # before its bindings
except ImportError:
    pass
import {module} as trt
json.dump({{n: sorted(a for a in dir(c) if not a.startswith("__")) for n, c in vars(trt).items() if inspect.isclass(c)}}, sys.stdout)
"""


def listed(version: str, folder: Path) -> dict[str, list[str]]:
    """Class -> attributes of `tensorrt-cu12-bindings==VERSION` (cu13 from 11 on)."""
    major = version.partition(".")[0]
    wheel = f"tensorrt-cu{'13' if int(major) >= 11 else '12'}-bindings=={version}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), wheel], check=True)
    module = next(p.name for p in folder.iterdir() if p.name.endswith("_bindings"))
    code = folder / "stub.c"
    code.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in FUNCTIONS))
    for library in LIBRARIES:
        target = folder / module / f"{library}.so.{major}"
        subprocess.run(["gcc", "-shared", "-fPIC", str(code), "-o", str(target), f"-Wl,-soname,{target.name}"], check=True)
    return api(module, {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder / module)})


def api(module: str, env: dict[str, str]) -> dict[str, list[str]]:
    """Class -> attributes of an importable module."""
    done = subprocess.run([sys.executable, "-c", LIST.format(module=module)], env=env, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return {name: attributes for name, attributes in found.items() if name in CLASSES}


def main() -> None:
    found = {}
    for version in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            found[version] = listed(version, Path(folder))
    try:
        found["rtx"] = api("tensorrt_rtx_bindings", {})
    except subprocess.CalledProcessError:
        sys.exit("install the extra first: pip install -e '.[tensorrt-rtx]'")
    print(json.dumps(found, indent=0, sort_keys=True))


if __name__ == "__main__":
    main()
