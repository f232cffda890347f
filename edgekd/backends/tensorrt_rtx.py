"""TensorRT for RTX: engines for GeForce and RTX cards from Turing on, built on any x86 machine, with or without a GPU.

The same code as tensorrt.py, but the target is a compute capability that is named, not the GPU at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgekd.backends.tensorrt import TensorRT
from edgekd.errors import BackendError
from edgekd.registry import register

if TYPE_CHECKING:
    from edgekd.profile.schema import DeviceProfile


@register("backend")
class TensorRTForRTX(TensorRT):
    """Builds ahead of time for a compute capability; the device compiles its kernels when it first loads the engine."""

    name = "tensorrt_rtx"
    libraries: ClassVar[tuple[str, ...]] = ("tensorrt_rtx_libs", "tensorrt_rtx_bindings")
    wheels: ClassVar[tuple[str, ...]] = ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings")
    install: ClassVar[str] = "pip install 'edgekd[tensorrt-rtx]'"
    # Its kernels are chosen where the engine first loads: "timing cache operations are no-ops" from 1.2 on; here it was the same 172 bytes after each build.
    times_kernels: ClassVar[bool] = False

    def builds_for(self, device: DeviceProfile) -> str | None:
        if (missing := self.available()) is not None:
            return missing
        return None if device.arch.sm else f"the profile of {device.id} names no compute capability (arch.sm)"

    def _asked(self, options: Mapping[str, Any], graph: Path) -> Any:
        asked = super()._asked(options, graph)
        if asked.version_compatible:
            raise BackendError(
                "TensorRT for RTX has no version-compatible engines",
                where=graph.name,
                hint="leave version_compatible out: it is for tensorrt",
            )
        return asked

    def _target(self, trt: Any, config: Any, device: DeviceProfile) -> None:
        wanted, known = f"SM{(device.arch.sm or '').replace('.', '')}", trt.ComputeCapability.__members__
        if wanted not in known:
            offered = ", ".join(n for n in known if n.startswith("SM"))
            raise BackendError(
                f"TensorRT for RTX does not build for compute capability {device.arch.sm}",
                where=device.id,
                expected=f"one of {offered}",
                hint=f"another runtime: -o targets.{device.id}.backend=onnxruntime, or tensorrt",
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(known[wanted], 0)
