"""A model is architecture, arguments and weights: built by seed, saved and loaded bit-equal, and filled only from files that fit."""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable
from http.client import IncompleteRead
from pathlib import Path
from typing import IO, Any

import pytest
import timm
import torch
from torch import Tensor, nn

from edgekd.api import run_code
from edgekd.artifact import Artifact, Kind
from edgekd.console import Console
from edgekd.context import Context
from edgekd.errors import CheckpointRefused, FileMissing, InputRefused, UnknownName, UsageError
from edgekd.models import build as models
from edgekd.models.importing import import_weights
from edgekd.models.names import architectures, check_architecture, user_source
from edgekd.models.pretrained import published_weights
from edgekd.models.spec import ModelConfig, ModelSpec
from edgekd.safeio.checkpoint import load_weights, read_safetensors
from edgekd.shipped import shipped_dir
from edgekd.store import Store

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


PUBLISHED = Path(__file__).parents[3] / "shared" / "weights"


def spec_of(arch: str = "vit_tiny_patch16_224", args: dict[str, Any] | None = None, classes: int = 7) -> ModelSpec:
    return models.make_spec(ModelConfig(arch=arch, args=VIT if args is None else args), num_classes=classes, image_size=16)


def weights(model: nn.Module) -> dict[str, bytes]:
    return {n: t.numpy().tobytes() for n, t in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------------------ building
@pytest.mark.parametrize(("arch", "args"), [("vit_tiny_patch16_224", VIT), ("resnet10t", {})])
def test_a_seed_decides_all_weights_and_leaves_the_global_random_state_alone(arch: str, args: dict[str, Any]) -> None:
    spec = spec_of(arch, args)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    first = weights(models.build(spec, seed=3))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(100)
    assert weights(models.build(spec, seed=3)) == first
    assert weights(models.build(spec, seed=4)) != first


def test_arguments_and_classes_reach_the_architecture() -> None:
    model = models.build(spec_of(classes=5))
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
    assert len(model.blocks) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("args", [{"no_such": 1}, {"embed_dim": 25, "num_heads": 2}, {"img_size": "wide"}])
def test_arguments_that_do_not_fit_are_refused_by_name(args: dict[str, Any]) -> None:
    with pytest.raises(InputRefused, match="vit_tiny_patch16_224 cannot be created with") as caught:
        models.build(spec_of(args=VIT | args))
    assert (caught.value.where, caught.value.exit_code) == ("model.args", 3)


def test_an_unknown_architecture_comes_with_the_nearest_name() -> None:
    with pytest.raises(UnknownName, match=r"unknown architecture 'resnet81'; did you mean 'resnet\d+'\?"):
        spec_of("resnet81", {})
    assert check_architecture("resnet18") is None
    assert check_architecture("resnet18.a1_in1k") is None
    assert "did you mean 'mobilenetv3_small_100'?" in str(check_architecture("mobilenet_v3_small_100"))


def test_the_list_of_architectures_is_that_of_the_installed_timm() -> None:
    """Made by tools/update_names.py; `check` and `plan` read it, since importing timm takes seconds."""
    run_code(shipped_dir("recipes") / "cifar10" / "resnet_cifar.py")  # what a user registers is not in the list
    theirs = {n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("timm.")}
    assert architectures() == theirs
    assert check_architecture("resnet20_cifar") is None


ARCHITECTURE = """
from timm.models import register_model
from torch import nn


@register_model
def changing_net(pretrained=False, num_classes=10, **_):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes), nn.ACTIVATION())
"""


def test_a_users_architecture_carries_the_hash_of_its_code(tmp_path: Path) -> None:
    """Equal weights with another activation are another model; without the hash, results of the old code would be found in the store."""
    found = []
    for folder, activation in (("a", "ReLU"), ("b", "GELU")):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "own.py"
        file.write_text(ARCHITECTURE.replace("ACTIVATION", activation))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm tells of the name that is taken over
            run_code(file)
        spec = spec_of("changing_net", {})
        assert spec.code == user_source("changing_net") == hashlib.sha256(file.read_bytes()).hexdigest()
        assert activation in str(models.build(spec))
        found.append(spec)
    assert found[0] != found[1]
    assert spec_of().code is None
    assert user_source("no_such_net") is None


def test_normalisation_is_the_recipes_or_else_the_architectures_own() -> None:
    assert spec_of("vit_tiny_patch16_224").mean == (0.5, 0.5, 0.5)
    assert spec_of("resnet10t", {}).mean == tuple(timm.get_pretrained_cfg("resnet10t").mean) == (0.485, 0.456, 0.406)
    own = ModelConfig(arch="resnet10t", mean=(0.1, 0.2, 0.3))
    spec = models.make_spec(own, num_classes=2, image_size=16)
    assert spec.mean == (0.1, 0.2, 0.3)
    assert spec.std == tuple(timm.get_pretrained_cfg("resnet10t").std)


# ------------------------------------------------------------------------------------------------------------ saving and loading
def artifact_of(folder: Path) -> Artifact:
    return Artifact("0" * 64, Kind.MODEL, folder, "digest")


def test_a_saved_model_comes_back_bit_equal_with_its_spec(tmp_path: Path) -> None:
    spec = spec_of()
    model = models.build(spec, seed=1)
    models.save_model(model, spec, tmp_path)
    loaded, found = models.load_model(artifact_of(tmp_path))
    assert found == spec
    assert weights(loaded) == weights(model)
    assert not loaded.training
    assert json.loads(read_safetensors(tmp_path / models.WEIGHTS)[1]["edgekd.spec"]) == spec.model_dump(mode="json")


def test_saving_twice_gives_the_same_bytes_in_any_memory_layout(tmp_path: Path) -> None:
    spec, files = spec_of("resnet10t", {}), []
    for name, layout in (("a", torch.contiguous_format), ("b", torch.channels_last)):
        (tmp_path / name).mkdir()
        models.save_model(models.build(spec, seed=1).to(memory_format=layout), spec, tmp_path / name)  # type: ignore[call-overload]
        files.append([(tmp_path / name / f).read_bytes() for f in (models.SPEC, models.WEIGHTS)])
    assert files[0] == files[1]


def damaged(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    changed = dict(state)
    if how == "missing":
        del changed["head.bias"]
    elif how == "extra":
        changed["head.scale"] = torch.ones(1)
    else:
        changed["head.bias"] = torch.zeros(8)
    return changed


@pytest.mark.parametrize(
    ("how", "words"), [("missing", ["missing", "head.bias"]), ("extra", ["head.scale"]), ("shape", ["head.bias", "8", "7"])], ids=str
)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(tmp_path: Path, how: str, words: list[str]) -> None:
    from safetensors.torch import save_file

    model, before = models.build(spec_of(), seed=0), weights(models.build(spec_of(), seed=0))
    state = {n: t + 1 for n, t in model.state_dict().items()}
    save_file(damaged(state, how), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointRefused) as caught:
        models.load_state(model, tmp_path / "w.safetensors")
    assert all(word in str(caught.value) for word in words)
    assert str(caught.value.where).endswith("w.safetensors")
    assert weights(model) == before


def test_half_precision_weights_are_loaded_in_the_models_own_precision(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = models.build(spec_of(), seed=0)
    save_file({n: t.half() for n, t in models.build(spec_of(), seed=5).state_dict().items()}, tmp_path / "w.safetensors")
    models.load_state(model, tmp_path / "w.safetensors")
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    assert torch.equal(model.head.bias, models.build(spec_of(), seed=5).head.bias.half().float())  # type: ignore[union-attr]


def test_a_missing_weights_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileMissing, match=r"none\.safetensors"):
        models.load_state(models.build(spec_of()), tmp_path / "none.safetensors")


def test_a_pruned_model_of_another_timm_is_refused() -> None:
    with pytest.raises(CheckpointRefused, match=r"was made with timm 0\.1, this is") as caught:
        models.build(spec_of().model_copy(update={"timm": "0.1", "structure": {"version": 1}}))
    assert caught.value.hint == "pip install timm==0.1"


# ------------------------------------------------------------------------------------------------------------ importing
def imported(path: Path, arch: str = "resnet20_cifar", **options: Any) -> dict[str, Any]:
    run_code(shipped_dir("recipes") / "cifar10" / "resnet_cifar.py")
    settings = {"num_classes": None, "image_size": 32, "mean": None, "std": None, "out": None} | options
    return import_weights(path, arch, {}, **settings)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published weights often come: nested, from DataParallel, with numbers beside them."""
    run_code(shipped_dir("recipes") / "cifar10" / "resnet_cifar.py")
    torch.manual_seed(1)
    state = {f"module.{n}": t for n, t in timm.create_model("resnet20_cifar", num_classes=6).state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "resnet20.th"
    torch.save({"state_dict": state, "epoch": 190, "best_prec1": 92.6}, path)
    return path


def test_a_published_checkpoint_becomes_safetensors_that_fit(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    found = imported(checkpoint, out=out, mean=(0.4, 0.5, 0.6))
    model = models.build(spec_of("resnet20_cifar", {}, classes=6))
    models.load_state(model, out)
    torch.manual_seed(1)
    assert weights(model) == weights(timm.create_model("resnet20_cifar", num_classes=6))
    assert found["num_classes"] == 6  # read from the last layer
    assert found["parameters"] == sum(t.numel() for t in model.state_dict().values())
    spec = ModelSpec.model_validate_json(load_weights(out)[1]["edgekd.spec"])
    assert (spec.arch, spec.num_classes, spec.mean) == ("resnet20_cifar", 6, (0.4, 0.5, 0.6))


def test_a_checkpoint_of_before_batch_norms_counted_fits(checkpoint: Path, tmp_path: Path) -> None:
    old = {n: t for n, t in torch.load(checkpoint)["state_dict"].items() if not n.endswith("num_batches_tracked")}
    torch.save({"state_dict": old}, tmp_path / "old.th")
    imported(tmp_path / "old.th", out=tmp_path / "w.safetensors")
    model = models.build(spec_of("resnet20_cifar", {}, classes=6), seed=9)
    models.load_state(model, tmp_path / "w.safetensors")
    torch.manual_seed(1)
    assert weights(model) == weights(timm.create_model("resnet20_cifar", num_classes=6))


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="../shared is not here")
@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_the_published_cifar_weights_are_imported(tmp_path: Path, name: str) -> None:
    [path] = PUBLISHED.glob(f"{name}-*.th")
    found = imported(path, f"{name}_cifar", out=tmp_path / "w.safetensors")
    assert found["num_classes"] == 10


def test_a_checkpoint_of_another_architecture_is_refused_and_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    with pytest.raises(CheckpointRefused, match="missing"):
        imported(checkpoint, "resnet56_cifar", out=out)
    assert not out.exists()


def test_the_file_that_is_read_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="would overwrite"):
        imported(path)
    assert path.read_bytes() == b"precious"


def test_published_weights_of_other_classes_keep_the_fresh_head(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    published = timm.create_model("resnet10t", num_classes=1000)
    save_file(published.state_dict(), tmp_path / "w.safetensors")
    model = models.build(spec_of("resnet10t", {}, classes=6), seed=3)
    head = {n: t.clone() for n, t in model.state_dict().items() if n.startswith("fc.")}
    with pytest.raises(CheckpointRefused, match=r"fc\.weight"):
        models.load_state(model, tmp_path / "w.safetensors")
    models.load_state(model, tmp_path / "w.safetensors", other_head="fc")
    now, wanted = model.state_dict(), published.state_dict()
    assert all(torch.equal(now[n], head[n] if n in head else wanted[n]) for n in now)


# ------------------------------------------------------------------------------------------------------------ published weights
BODY = b"the bytes of a published file"
HASH = hashlib.sha256(BODY).hexdigest()


def context(root: Path, *, allowed: bool = True) -> Context:
    return Context(Store(root), Console(quiet=True), allow_download=allowed)


def opener(body: bytes = BODY) -> tuple[Callable[[str], IO[bytes]], list[str]]:
    asked: list[str] = []

    def open_(address: str) -> IO[bytes]:
        asked.append(address)
        return io.BytesIO(body)

    return open_, asked


def config(arch: str = "resnet18", sha256: str | None = HASH) -> ModelConfig:
    return ModelConfig(arch=arch, pretrained=True, sha256=sha256)


def test_published_weights_need_the_users_word(tmp_path: Path) -> None:
    open_, asked = opener()
    with pytest.raises(UsageError, match="asks for published weights") as caught:
        published_weights(config(), context(tmp_path, allowed=False), opener=open_)
    assert "--allow-download" in str(caught.value.hint)
    assert asked == []


def test_published_weights_need_a_hash(tmp_path: Path) -> None:
    open_, asked = opener()
    with pytest.raises(UsageError, match="need the hash"):
        published_weights(config(sha256=None), context(tmp_path), opener=open_)
    assert asked == []


def test_published_weights_of_the_right_hash_are_fetched_once_over_https(tmp_path: Path) -> None:
    open_, asked = opener()
    paths = [published_weights(config(), context(tmp_path), opener=open_) for _ in range(2)]
    assert paths[0] == paths[1]
    assert paths[0].read_bytes() == BODY
    assert len(asked) == 1
    assert asked[0].startswith("https://")


def test_a_published_checkpoint_keeps_its_suffix_by_which_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.models.pretrained._address", lambda _: "https://example.org/w.pth")
    assert published_weights(config(), context(tmp_path), opener=opener()[0]).name == f"{HASH}.pth"


@pytest.mark.parametrize("body", [BODY[:-1], BODY + b"!", b""])
def test_published_weights_of_another_hash_are_refused_and_not_kept(tmp_path: Path, body: bytes) -> None:
    with pytest.raises(CheckpointRefused, match=rf"its SHA-256 is {hashlib.sha256(body).hexdigest()}"):
        published_weights(config(), context(tmp_path), opener=opener(body)[0])
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("address", ["http://example.org/w", "ftp://example.org/w", "file:///etc/passwd"])
def test_weights_are_taken_over_https_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr("edgekd.models.pretrained._address", lambda _: address)
    open_, asked = opener()
    with pytest.raises(CheckpointRefused, match="https only"):
        published_weights(config(), context(tmp_path), opener=open_)
    assert asked == []


def test_a_download_that_is_too_large_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.safeio.download._MAX_BYTES", len(BODY) - 1)
    with pytest.raises(CheckpointRefused, match="larger than"):
        published_weights(config(), context(tmp_path), opener=opener()[0])


@pytest.mark.parametrize("error", [OSError("no route"), IncompleteRead(b"half")], ids=repr)
def test_a_network_that_fails_is_a_refusal_with_a_way_out(tmp_path: Path, error: Exception) -> None:
    def broken(_address: str) -> IO[bytes]:
        raise error

    with pytest.raises(CheckpointRefused, match=rf"cannot be downloaded: {re.escape(str(error))}") as caught:
        published_weights(config(), context(tmp_path), opener=broken)
    assert "model.weights" in str(caught.value.hint)


def test_an_architecture_without_published_weights_is_said(tmp_path: Path) -> None:
    run_code(shipped_dir("recipes") / "cifar10" / "resnet_cifar.py")
    with pytest.raises(UsageError, match="publishes no weights for 'resnet20_cifar'"):
        published_weights(config("resnet20_cifar"), context(tmp_path), opener=opener()[0])
