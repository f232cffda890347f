"""onnxruntime: the engine is the ONNX file itself, so that what was judged here is what a device with onnxruntime gets.

Sessions use `threads` intra-op threads, one inter-op thread and sequential execution; spinning is left at onnxruntime's default (on), but for a teacher.
With `format: ort` the engine is an ORT-format file instead, for builds of onnxruntime that have no ONNX parser, no optimizers and few operators.
Source: onnxruntime's documentation, "ORT model format", and its tool convert_onnx_models_to_ort.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from edgekd.backends import Layer, asked, version_of
from edgekd.config import Config
from edgekd.errors import BackendError, GraphRefused
from edgekd.profile.device import same_machine
from edgekd.registry import register

if TYPE_CHECKING:
    from edgekd.backends import Array, Feeds
    from edgekd.profile.schema import DeviceProfile

_WHEELS = ("onnxruntime", "onnxruntime-gpu")
_CPU = "CPUExecutionProvider"
_OPERATORS = "required_operators.config"
_MINIMAL = """\
`model.ort` is `model.onnx` as onnxruntime {version} optimized it, for builds of that version without an ONNX parser. One with no other operators:

    ./build.sh --config MinSizeRel --minimal_build --include_ops_by_config {operators} --skip_tests
"""
_PROFILE_WARMUP, _PROFILE_RUNS = 3, 20
_KERNEL = "Non-zero status code returned while running"  # a node failed; else the inputs are not those of the graph
_FATAL_ONLY = 4  # log severity
_NOISE = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from \S+ failed:\s*|\S+\.(?:h|cc):\d+ [^()]*\([^()]*\) ")


class OrtSession:
    """A session of onnxruntime."""

    def __init__(self, session: Any, where: str):
        self._session, self._where = session, where
        self.input_names = [i.name for i in session.get_inputs()]
        self.output_names = [o.name for o in session.get_outputs()]

    def run(self, feeds: Feeds) -> list[Array]:
        if self._session is None:
            raise BackendError("the session is closed", where=self._where)
        try:
            return list(self._session.run(None, feeds))
        except Exception as err:  # onnxruntime has no common base class for its errors
            kind = GraphRefused if _KERNEL in str(err) else BackendError
            raise kind(f"onnxruntime cannot run this input: {_first_line(err)}", where=self._where) from err

    def close(self) -> None:
        self._session = None


@register("backend")
class OnnxRuntime:
    """Runs ONNX files as they are, on the CPU or, where the device's profile asks for it, on CUDA."""

    name = "onnxruntime"
    suffix = ".ort"
    builds = False

    class Options(Config):
        format: Literal["onnx", "ort"] = Field(
            "onnx", description="ort: model.ort and the list of its operators, for minimal builds of onnxruntime; on x86 slower in fp32"
        )

    def available(self) -> str | None:
        if importlib.util.find_spec("onnxruntime") is None:
            return "onnxruntime is not installed: pip install onnxruntime (onnxruntime-gpu on Linux x86-64)"
        return None

    def builds_for(self, device: DeviceProfile) -> str | None:
        return self.available()

    def runs_on(self, device: DeviceProfile) -> bool:
        return self.available() is None and same_machine(device)

    def version(self) -> str:
        return version_of(*_WHEELS)

    def prepare(self) -> None:
        _runtime()

    def convert(self, graph: Path, device: DeviceProfile, out: Path, options: Mapping[str, Any], *, batch: int = 1) -> dict[str, Any]:
        """Opens the graph once on this machine's CPU, whatever the device, and copies it; an ORT-format file lies beside that copy."""
        chosen, provider = asked(self, options, graph), _provider(device)
        meta: dict[str, Any] = {"model_file": "model.onnx", "runtime": self.name, "version": self.version(), "provider": provider}
        if chosen.format == "ort":
            if provider != _CPU:
                raise BackendError(
                    f"ORT-format files are for CPUs, {device.id} runs {provider}",
                    where=graph.name,
                    hint=f"-o targets.{device.id}.options.format=onnx",
                )
            _save_ort(graph, out / "model.ort", device)
            _save_operators(out / "model.ort", out / _OPERATORS)
            meta |= {"model_file": "model.ort", "beside": [_OPERATORS], "options": chosen.model_dump()}
            meta["usage"] = _MINIMAL.format(version=self.version(), operators=_OPERATORS)
        else:
            _open(graph, threads=1, provider=_CPU).close()
        shutil.copyfile(graph, out / "model.onnx")
        return meta

    def open(self, engine: Path, *, threads: int, device: DeviceProfile, options: Mapping[str, Any] | None = None) -> OrtSession:
        return _open(engine, threads=threads, provider=_provider(device))

    def open_beside(self, engine: Path, *, threads: int, device: DeviceProfile) -> OrtSession:
        """As `open`, beside other work on the same cores: threads that spin between two runs would make that several times slower."""
        return _open(engine, threads=threads, provider=_provider(device), spinning=False)

    def layers(
        self, engine: Path, feeds: Feeds, threads: int, device: DeviceProfile, options: Mapping[str, Any] | None = None
    ) -> list[Layer]:
        """Time per operator on the device's provider as onnxruntime's own profiler sees it (fused nodes, slowest first)."""
        with tempfile.TemporaryDirectory() as folder:  # the profiler can only write to a file
            settings = _settings(threads)
            settings.enable_profiling, settings.profile_file_prefix = True, str(Path(folder) / "trace")
            session = _session(engine, settings, _provider(device))
            for _ in range(_PROFILE_WARMUP + _PROFILE_RUNS):
                session.run(None, feeds)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return _aggregate(events)


def _open(engine: Path, *, threads: int, provider: str, spinning: bool = True) -> OrtSession:
    settings = _settings(threads)
    if not spinning:
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = _session(engine, settings, provider)
    got = session.get_providers()
    if not got or got[0] != provider:  # onnxruntime only warns when it falls back to another provider
        raise BackendError(f"onnxruntime fell back to {', '.join(got)}", where=engine.name, expected=provider, hint="edgekd doctor")
    return OrtSession(session, engine.name)


def _save_ort(graph: Path, out: Path, device: DeviceProfile) -> None:
    """The graph as onnxruntime optimizes it for the device's kind of CPU, in ORT format."""
    settings = _settings(threads=1)
    settings.optimized_model_filepath = str(out)
    settings.add_session_config_entry("session.save_model_format", "ORT")
    # x86 has fast kernels for unsigned activations only, everything else for signed ones; the default is what *this* machine has
    settings.add_session_config_entry("session.qdqisint8allowed", "0" if "x86-64" in device.arch.isa else "1")
    # Every optimization but NCHWc, which orders weights in blocks of this machine's vectors: the file would not run on ARM, and on an x86 CPU
    # with shorter vectors it would give wrong outputs without an error.
    _session(graph, settings, _CPU, disabled_optimizers=["NchwcTransformer"])


def _save_operators(model: Path, out: Path) -> None:
    """What a minimal build must have to run the file, listed by onnxruntime's own tool."""
    from onnxruntime.tools.ort_format_model import create_config_from_models  # 0.1 s

    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)  # it tells of every file
    create_config_from_models([model], out, False)
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(line for line in lines if not line.startswith("#")), encoding="utf-8")  # comments hold the path of the model


def _settings(threads: int) -> Any:
    ort = _runtime()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.log_severity_level = _FATAL_ONLY  # errors are raised, and said by us
    return settings


def _session(engine: Path, settings: Any, provider: str, **more: Any) -> Any:
    ort = _runtime()
    if provider not in ort.get_available_providers():
        have = ", ".join(ort.get_available_providers())
        raise BackendError(f"this onnxruntime has no {provider}, only {have}", where=engine.name, expected=provider, hint="edgekd doctor")
    try:
        return ort.InferenceSession(str(engine), settings, providers=[provider], **more)
    except Exception as err:  # onnxruntime has no common base class for its errors
        if provider != _CPU:  # its libraries may be missing or too old
            raise BackendError(f"onnxruntime cannot open the graph: {_first_line(err)}", where=engine.name, hint="edgekd doctor") from err
        raise GraphRefused(f"onnxruntime cannot open the graph: {_first_line(err)}", where=engine.name) from err


def _runtime() -> Any:
    try:
        ort = importlib.import_module("onnxruntime")  # 0.3 s: only when something runs
    except ImportError as err:
        raise BackendError(f"onnxruntime cannot be imported: {_first_line(err)}", hint="edgekd doctor") from err
    ort.set_default_logger_severity(_FATAL_ONLY)  # a missing CUDA library is our BackendError, not coloured lines on stderr
    return ort


def _provider(device: DeviceProfile) -> str:
    """The first execution provider of the device's profile."""
    runtime = device.runtime("onnxruntime")
    if runtime is None:
        raise BackendError(f"device '{device.id}' has no onnxruntime", expected=f"one of {', '.join(r.name for r in device.runtimes)}")
    return runtime.ep[0] if runtime.ep else _CPU


def _aggregate(events: list[dict[str, Any]]) -> list[Layer]:
    """Kernel times by node, without those of the warm-up runs."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]].append(float(event["dur"]))
    mean = {key: (sum(us[-_kept(us) :]) / _PROFILE_RUNS, _kept(us) // _PROFILE_RUNS) for key, us in times.items()}
    whole = sum(us for us, _ in mean.values()) or 1.0
    rows = [Layer(name, op, us, us / whole, calls) for (name, op), (us, calls) in mean.items()]
    return sorted(rows, key=lambda layer: -layer.total_us)


def _kept(us: list[float]) -> int:
    return len(us) * _PROFILE_RUNS // (_PROFILE_WARMUP + _PROFILE_RUNS)


def _first_line(err: BaseException) -> str:
    """What a person can act on: without the code, the file's path and the place in onnxruntime's own sources."""
    line = (str(err).strip() or type(err).__name__).splitlines()[0]
    return _NOISE.sub("", line).strip()[:300]
