"""Runs a bundle for arm64 by emulation: `python tools/arm64.py BUNDLE [IMAGES ...] [--root FOLDER] [--cpu cortex-a76]`.

An aarch64 Python with onnxruntime, numpy and Pillow is unpacked into FOLDER (once; about 300 MB, nothing is installed, root is not needed) and runs
under qemu: predict.py on IMAGES, and the model on the bundle's own sample images with and without onnxruntime's graph optimizations. Prints how far
the outputs lie from this machine's. It shows that the file, its operators and predict.py work there. It says nothing about latency.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

_DEBS = (
    "python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libstdc++6 libgcc-s1 zlib1g libexpat1 libssl3 libbz2-1.0 liblzma5 libffi8 "
    "libncursesw6 libuuid1 libdb5.3 libsqlite3-0"
)
_WHEELS = ("onnxruntime==1.22.1", "numpy", "pillow")  # onnxruntime 1.31.1 crashes at import under qemu 7.2
_TAGS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
_APT = """Dir::State "{0}/state";
Dir::State::status "{0}/status";
Dir::Cache "{0}/cache";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; "arm64"; }};
APT::Sandbox::User "{1}";
"""

_OUTPUTS = """
import json, sys
import numpy as np, onnxruntime
folder, out = sys.argv[1:]
facts = json.load(open(folder + "/bundle.json"))
samples, pre = np.load(folder + "/samples.npz"), facts["preprocess"]
x = ((samples["pixels"].astype(np.float32) / np.float32(255) - np.float32(pre["mean"])) / np.float32(pre["std"])).transpose(0, 3, 1, 2)
size = facts["fixed_batch"] or len(x)
found = {}
for name, level in (("all", onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL), ("none", onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.graph_optimization_level = 1, level
    session = onnxruntime.InferenceSession(folder + "/" + facts["model_file"], options, providers=["CPUExecutionProvider"])
    parts = [session.run(None, {facts["input"]: np.ascontiguousarray(np.resize(x[i : i + size], (size, *x.shape[1:])))})[0] for i in range(0, len(x), size)]
    found[name] = np.concatenate(parts)[: len(x)]
np.savez(out, **found)
"""


def userland(folder: Path) -> None:
    """Unpacks qemu, an aarch64 Python and its wheels into `folder`, once; raises CalledProcessError where a download fails."""
    if (folder / "ready").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("state/lists/partial", "cache/archives/partial", "debs", "root", "host", "wheels", "site"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    user = "root" if os.getuid() == 0 else ""
    (folder / "apt.conf").write_text(_APT.format(folder, user))
    env = {**os.environ, "APT_CONFIG": str(folder / "apt.conf")}  # an own package database: the machine's stays as it is
    _run(["apt-get", "update"], env=env)
    packages = ["qemu-user-static:amd64", *(f"{name}:arm64" for name in _DEBS.split())]
    _run(["apt-get", "download", *packages], env=env, cwd=folder / "debs")
    for deb in sorted((folder / "debs").glob("*.deb")):
        _run(["dpkg-deb", "-x", str(deb), str(folder / ("host" if deb.name.startswith("qemu") else "root"))])
    tags = [word for tag in _TAGS for word in ("--platform", tag)]
    wanted = ["--only-binary=:all:", "--python-version", "3.11", *tags, "--dest", str(folder / "wheels"), *_WHEELS]
    _run([sys.executable, "-m", "pip", "download", "-q", *wanted])
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(folder / "site")
    (folder / "ready").touch()


def emulated(folder: Path, cpu: str, *arguments: str) -> str:
    """What the aarch64 Python prints for these arguments."""
    qemu = folder / "host" / "usr" / "bin" / "qemu-aarch64-static"
    env = {**os.environ, "PYTHONPATH": str(folder / "site"), "PYTHONHOME": str(folder / "root" / "usr"), "OMP_NUM_THREADS": "1"}
    root = folder / "root"
    return _run([str(qemu), "-cpu", cpu, "-L", str(root), str(root / "usr" / "bin" / "python3.11"), *arguments], env=env)


def compared(folder: Path, cpu: str, bundle: Path, images: list[Path]) -> dict[str, Any]:
    """Differences of the bundle's outputs there and here, and of what predict.py prints for `images`."""
    import numpy as np

    with tempfile.TemporaryDirectory() as work:
        script, here, there = Path(work) / "outputs.py", Path(work) / "here.npz", Path(work) / "there.npz"
        script.write_text(_OUTPUTS)
        _run([sys.executable, str(script), str(bundle), str(here)])
        emulated(folder, cpu, str(script), str(bundle), str(there))
        a, b = dict(np.load(here)), dict(np.load(there))
    found: dict[str, Any] = {"cpu": cpu, "samples": len(a["all"]), "scale": float(np.abs(a["none"]).max())}
    for level in ("all", "none"):
        name = "optimized" if level == "all" else "as written"
        found[name] = {
            "largest": float(np.abs(a[level] - b[level]).max()),
            "agreement": float((a[level].argmax(1) == b[level].argmax(1)).mean()),
        }
    found["optimizations alone"] = {side: float(np.abs(v["all"] - v["none"]).max()) for side, v in (("here", a), ("there", b))}
    if images:
        names = [str(path) for path in images]
        lines = [
            _run([sys.executable, str(bundle / "predict.py"), *names]).splitlines(),
            emulated(folder, cpu, str(bundle / "predict.py"), *names).splitlines(),
        ]
        labels = [[line.split("\t")[:2] for line in side] for side in lines]
        found["predict"] = {"images": len(labels[0]), "same_top1": sum(x == y for x, y in zip(*labels, strict=True))}
    return found


def _run(command: list[str], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} ... failed:\n{done.stderr[-2000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, nargs="*", help="files or folders for predict.py")
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "edgekd-arm64", help="where the emulated system is kept")
    parser.add_argument("--cpu", default="cortex-a76", help="core that qemu emulates; cortex-a72 is a Raspberry Pi 4's")
    args = parser.parse_args()
    userland(args.root)
    print(json.dumps(compared(args.root, args.cpu, args.bundle, args.images), indent=1))


if __name__ == "__main__":
    main()
