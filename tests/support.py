"""What several tests share: the command line in this process or in another, short measurements, and tiny data."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgekd.artifact import Artifact
from edgekd.store import Store

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = str(REPOSITORY / "recipes" / "quickstart.yaml")
TINY = (  # seconds instead of minutes: a two-block teacher, one epoch everywhere, few images
    *("-o", "teacher.args.depth=2", "-o", "teacher.args.embed_dim=48", "-o", "teacher.train.epochs=1"),
    *("-o", "distill.epochs=1", "-o", "recover.epochs=1", "-o", "data.max_per_class=20"),
    *("-o", "prune.target={macs: 0.5}"),  # a measured speed-up needs an export per candidate
)


@dataclass(frozen=True)
class Result:
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    def json(self) -> Any:
        return json.loads(self.out)


def run_here(*args: str | Path) -> Result:
    """`edgekd ARGS` in this process: the real entry point, without the seconds that a fresh torch takes."""
    from edgekd import cli

    out, err, old = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["edgekd", *map(str, args)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            cli.main()
        code: Any = 0
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = old
    return Result(int(code or 0), out.getvalue(), err.getvalue())


def run_apart(*args: str | Path, env: dict[str, str] | None = None, cwd: Path = REPOSITORY, options: tuple[str, ...] = ()) -> Result:
    """`python -m edgekd ARGS` in another process."""
    command = [sys.executable, *options, "-m", "edgekd", *map(str, args)]
    p = subprocess.run(command, cwd=cwd, env=environment(**(env or {})), capture_output=True, text=True, timeout=300)
    return Result(p.returncode, p.stdout, p.stderr)


def environment(**extra: str) -> dict[str, str]:
    """This environment, with the checkout importable from any folder."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1", "COLUMNS": "200", **extra}


@contextmanager
def short_measurements() -> Iterator[None]:
    """No test asserts a time, so none is measured for long."""
    from edgekd.stages import _partial, gate, profile, race, widths
    from edgekd.train import tune

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "_BUDGET_SECONDS", 0.2)
        patch.setattr(_partial, "_BUDGET_SECONDS", 0.05)
        patch.setattr(tune, "_BUDGET_SECONDS", 0.3)
        patch.setattr(widths, "_BUDGET_SECONDS", 0.2)
        patch.setattr(race, "_SECONDS_PER_ENGINE", 0.1)
        patch.setattr(profile, "_SECONDS_PER_ENGINE", 0.3)
        yield


@dataclass(frozen=True)
class Finished:
    """The quickstart, run once per session with a tiny teacher and without its gates."""

    home: Path
    folder: Path
    args: tuple[str, ...]
    result: Result
    run: dict[str, Any]
    steps: dict[str, Artifact]  # by name, as this run left them

    @property
    def bundle(self) -> Path:
        return self.folder / "host"


def artifacts(home: Path) -> dict[str, Artifact]:
    """Step name -> its artifact, of a store that one run filled."""
    store = Store(home)
    found = [(str(m.recipe["step"]), store.get(m.key)) for m, *_ in store.entries()]
    return {step: artifact for step, artifact in found if artifact is not None}


def write_images(folder: Path, classes: int = 3, each: int = 12, side: int = 32, suffix: str = ".png", seed: int = 0) -> Path:
    """A folder of images by class: noise around one colour per class, so that a model can learn it in a moment."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    for c in range(classes):
        there = folder / f"class{c}"
        there.mkdir(parents=True)
        for k in range(each):
            base = np.zeros((side, side, 3)) + 60
            base[..., c % 3] += 120
            pixels = np.clip(base + rng.normal(0, 30, base.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(there / f"{k:03d}{suffix}")
    return folder


def write_keys(folder: Path, *, key: Any = None, password: str = "") -> tuple[Path, Path]:
    """A private and a public key in PEM; Ed25519, unless another is given."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, hidden = key or Ed25519PrivateKey.generate(), s.BestAvailableEncryption(password.encode()) if password else s.NoEncryption()
    folder.mkdir()
    (folder / "key.pem").write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, hidden))
    (folder / "public.pem").write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return folder / "key.pem", folder / "public.pem"


def linear_onnx(
    path: Path,
    *,
    side: int,
    classes: int,
    weights: tuple[Any, Any] | None = None,
    softmax: bool = False,
    scale: float = 1.0,
    batch: int | None = None,
    opset: int = 18,
) -> Any:
    """Writes a linear classifier of (batch, 3, side, side) images and returns it; `weights`: (classes, 3 * side * side) and (classes,), or random ones."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weight, bias = weights or (scale * 0.1 * rng.standard_normal((classes, 3 * side * side)), rng.standard_normal(classes))
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("Gemm", ["flat", "w", "b"], ["z"], transB=1)]
    nodes += [helper.make_node("Softmax", ["z"], ["p"])] if softmax else []
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch or "n", 3, side, side])],
        [helper.make_tensor_value_info("p" if softmax else "z", TensorProto.FLOAT, [batch or "n", classes])],
        [numpy_helper.from_array(np.asarray(v, np.float32), n) for v, n in ((weight, "w"), (bias, "b"))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, path)
    return model


def digits_model(side: int = 16) -> tuple[Any, Any]:
    """(weights, biases) of a linear classifier of scikit-learn's digits, (n, 3, side, side) of pixels in [0, 1]: nearest class mean, no training."""
    import numpy as np

    from edgekd.data.config import DataConfig
    from edgekd.data.formats.digits import Digits
    from edgekd.data.preprocess import preprocess

    digits = Digits()
    samples = digits.scan(DataConfig(format="digits", image_size=side)).samples
    pixels = [preprocess(digits.image(digits.read(Path(), s.id), s.id), side, "squash", "bilinear") for s in samples]
    flat = np.stack(pixels).transpose(0, 3, 1, 2).reshape(len(samples), -1) / 255
    labels = np.array([s.label for s in samples])
    means = np.stack([flat[labels == c].mean(0) for c in range(10)])
    return 0.2 * means, -0.1 * (means**2).sum(1)
