"""The training loop: schedule, averages, accumulation, divergence, checkpoints, and stopping at every step without losing a bit (G4, G11)."""

from __future__ import annotations

import copy
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from edgekd import registry
from edgekd.config import Config, key_fields
from edgekd.console import Console
from edgekd.context import Context
from edgekd.data.config import AugmentConfig, DataConfig
from edgekd.data.dataset import Dataset, build
from edgekd.errors import Interrupted, TrainingDiverged
from edgekd.models.spec import ModelSpec
from edgekd.stages.quantize_train import seen
from edgekd.tasks.classification import Classification
from edgekd.train import checkpoint
from edgekd.train.config import TrainConfig
from edgekd.train.images import Job, Speed, Teacher
from edgekd.train.loop import Trained, fit
from edgekd.train.optim import Average, learning_rate, make_optimizer
from edgekd.train.pair import teach
from edgekd.train.views import View

SPEC = ModelSpec(arch="tiny", num_classes=10, image_size=8, mean=(0.5,) * 3, std=(0.25,) * 3, timm="none")


class Net(nn.Module):
    """Three stages at 8, 4 and 2 pixels, with batch norm and dropout where asked for."""

    def __init__(self, width: int = 8, *, norm: bool = True, dropout: float = 0.2):
        super().__init__()
        widths = [(3, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 2)]
        self.stages = nn.Sequential(*[self._stage(a, b, stride, norm) for a, b, stride in widths])
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(2 * width, 10)

    @staticmethod
    def _stage(c_in: int, c_out: int, stride: int, norm: bool) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out) if norm else nn.Identity(), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.stages(x).mean((2, 3))))


def net(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def vit(seed: int, width: int) -> nn.Module:
    """Four blocks on 2 x 2 patches."""
    torch.manual_seed(seed)
    return timm.models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=width, depth=4, num_heads=2, num_classes=10, proj_drop_rate=0.2
    )


def pair(name: str | None) -> tuple[nn.Module, nn.Module]:
    """(student, teacher) of families that a method is made for: two CNNs where it takes them."""
    pairs = getattr(registry.load("distill", name), "pairs", {("cnn", "cnn")}) if name else {("cnn", "cnn")}
    teacher, student = min(p for p in pairs if set(p) <= {"cnn", "vit"})
    return (vit(0, 8) if student == "vit" else net()), (vit(7, 12) if teacher == "vit" else net(7, width=6))


class Watch(Console):
    """A quiet console whose progress bar calls `each` after every step."""

    def __init__(self, each: Callable[[int], None]):
        super().__init__(quiet=True)
        self.each = each

    @contextmanager
    def bar(self, name: str, total: float) -> Iterator[Any]:
        yield self

    def update(self, done: float, **_figures: str) -> None:
        self.each(int(done))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("data")
    build(DataConfig(format="digits", image_size=8, max_per_class=4), 0, out)
    return Dataset.open(out)


def settings(**values: Any) -> TrainConfig:
    return TrainConfig(**({"epochs": 3, "batch_size": 16, "lr": 0.01, "log_seconds": 1e-9} | values))  # every step reaches the bar


def make_job(
    dataset: Dataset, work: Path, cfg: TrainConfig, *, model: nn.Module | None = None, distill: str | None = None, **more: Any
) -> Job:
    work.mkdir(parents=True, exist_ok=True)
    job = Job("tiny", model or pair(distill)[0], SPEC, dataset, Classification(), cfg, 0, work, **more)
    if distill is not None:
        imitate(job, registry.load("distill", distill)(registry.load("distill", distill).Config()), pair(distill)[1])
    return job


def imitate(job: Job, distiller: Any, teacher: nn.Module) -> None:
    """A teacher that timm does not know."""
    teacher.eval().requires_grad_(False)
    teach(job, distiller, Teacher(teacher, View(SPEC), Speed()), teacher, SPEC)


def train(job: Job, each: Callable[[int], None] = lambda _: None) -> Trained:
    return fit(job, context(each))


def context(each: Callable[[int], None] = lambda _: None) -> Context:
    return Context(store=None, console=Watch(each))  # type: ignore[arg-type]  # the loop never touches the store


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------------------ schedule
@pytest.mark.parametrize(("epochs", "warmup", "steps"), [(100, 5.0, 400), (10, 1.0, 50), (4, 0.0, 17), (3, 3.0, 40)])
def test_the_rate_warms_up_linearly_and_falls_as_a_cosine(epochs: int, warmup: float, steps: int) -> None:
    cfg = TrainConfig(epochs=epochs, warmup_epochs=warmup, lr=0.3, min_lr=0.02)
    warm = min(warmup / epochs, 0.1) * steps  # at most a tenth of the steps
    up = np.array([0.3 * (s + 1) / (warm + 1) for s in range(math.ceil(warm))])
    down = np.array([0.02 + 0.28 * math.cos(math.pi / 2 * (s - warm) / (steps - warm)) ** 2 for s in range(math.ceil(warm), steps)])
    found = np.array([learning_rate(cfg, s, steps) for s in range(steps)])
    np.testing.assert_allclose(found, np.concatenate([up, down]), rtol=1e-12)
    assert found.max() <= 0.3
    assert found[-1] < 0.02 + 0.28 * (math.pi / 2 / (steps - warm)) ** 2 * 1.01  # one step before the cosine's end, which is min_lr


def test_a_run_uses_the_schedules_rate_at_every_optimizer_step(dataset: Dataset, tmp_path: Path) -> None:
    cfg = settings(optimizer="sgd", epochs=4, warmup_epochs=1, min_lr=1e-4)
    curves = train(make_job(dataset, tmp_path, cfg)).curves
    assert [row["lr"] for row in curves] == [learning_rate(cfg, row["step"] - 1, 8) for row in curves]
    assert [row["step"] for row in curves] == [2, 4, 6, 8]
    assert all(row["loss"] == pytest.approx(sum(row["terms"].values())) for row in curves)


def test_vectors_are_not_decayed_and_matrices_are() -> None:
    model = net()
    before = copy.deepcopy(model)
    optimizer = make_optimizer([model], TrainConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        expected = old * (1 - 0.1 * 0.5) if old.ndim > 1 else old
        assert torch.allclose(new, expected, rtol=1e-6, atol=0), name


# ------------------------------------------------------------------------------------------------------------ averages
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_averaged_weights_follow_a_float64_oracle(decay: float) -> None:
    model, draw = net(), torch.Generator().manual_seed(3)
    average = Average(model, decay)
    oracle = {n: t.double().numpy().copy() for n, t in model.state_dict().items()}
    for step in range(1, 41):
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) if tensor.is_floating_point() else torch.tensor(step))
        average.update(model, step)
        share = max(1 - decay, 9 / (10 + step))  # the ramp: 1 - (1 + step) / (10 + step)
        for name, tensor in model.state_dict().items():
            new = tensor.double().numpy()
            oracle[name] = oracle[name] + share * (new - oracle[name]) if tensor.is_floating_point() else new
    for name, tensor in average.model.state_dict().items():
        # forty fp32 roundings of numbers of size one
        np.testing.assert_allclose(tensor.double().numpy(), oracle[name], rtol=0, atol=40 * 2**-23, err_msg=name)


def test_the_averaged_model_is_what_training_gives(dataset: Dataset, tmp_path: Path) -> None:
    plain = train(make_job(dataset, tmp_path / "plain", settings()))
    averaged = train(make_job(dataset, tmp_path / "averaged", settings(ema=0.9)))
    assert weights(plain.model) != weights(averaged.model)
    assert plain.curves[-1]["loss"] == averaged.curves[-1]["loss"]  # the average looks on and does not steer


# ------------------------------------------------------------------------------------------------------------ accumulation
@pytest.mark.parametrize("more", [{}, {"clip_grad": 0.5}, {"ema": 0.9}, {"warmup_epochs": 2.0}], ids=str)
def test_two_accumulated_batches_equal_one_of_twice_the_size(dataset: Dataset, tmp_path: Path, more: dict[str, Any]) -> None:
    def run(**values: Any) -> dict[str, Tensor]:
        cfg = settings(optimizer="sgd", lr=0.05, epochs=4, **values, **more)
        return train(make_job(dataset, tmp_path / str(values), cfg, model=net(norm=False, dropout=0.0))).model.state_dict()

    halves, whole, start = run(batch_size=10, accumulate=2), run(batch_size=20), net(norm=False, dropout=0.0).state_dict()
    for name, tensor in whole.items():
        assert float((tensor - start[name]).abs().max()) > 1e-4, name
        assert torch.allclose(halves[name], tensor, rtol=0, atol=1e-6), name  # the same fp32 sums in another order


# ------------------------------------------------------------------------------------------------------------ divergence (G11)
class Poisoned:
    """A distiller whose term `name` becomes `value` at `step`."""

    def __init__(self, inner: Any, name: str, value: float, step: int):
        self.inner, self.name, self.value, self.step, self.calls = inner, name, value, step, 0
        self.needs, self.setup, self.config = inner.needs, inner.setup, inner.config

    def terms(self, batch: Any) -> dict[str, Tensor]:
        found, self.calls = self.inner.terms(batch), self.calls + 1
        return {n: t * self.value if n == self.name and self.calls > self.step else t for n, t in found.items()}


def term_names(dataset: Dataset, work: Path, name: str) -> list[str]:
    curves = train(make_job(dataset, work, settings(epochs=1), distill=name)).curves
    return [n for n in curves[0]["terms"] if n != "label"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", registry.names("distill"))
def test_every_term_of_every_distiller_is_checked_and_named(dataset: Dataset, tmp_path: Path, name: str, value: float) -> None:
    terms = term_names(dataset, tmp_path / "clean", name)
    assert terms
    for term in terms:
        student, teacher = pair(name)
        job = make_job(dataset, tmp_path / term, settings(), model=student)
        imitate(job, Poisoned(registry.load("distill", name)(registry.load("distill", name).Config()), term, value, 3), teacher)
        with pytest.raises(TrainingDiverged, match=rf"loss term '{term}' is (nan|inf) at step 3 \(.*last finite value [\d.]+\)") as caught:
            train(job)
        assert (caught.value.exit_code, caught.value.where) == (3, "tiny")
        assert "-o tiny.lr=" in str(caught.value.hint)


def test_a_label_loss_that_is_not_finite_is_named(dataset: Dataset, tmp_path: Path) -> None:
    class Broken(Classification):
        def label_loss(self, outputs: Tensor, target: Tensor, smoothing: float) -> Tensor:
            return super().label_loss(outputs, target, smoothing) - math.inf

    job = make_job(dataset, tmp_path, settings())
    job.task = Broken()
    with pytest.raises(TrainingDiverged, match="loss term 'label' is -inf at step 0"):
        train(job)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_weight_is_found_in_the_next_step(dataset: Dataset, tmp_path: Path, value: float) -> None:
    job = make_job(dataset, tmp_path, settings())

    def poison(step: int) -> None:
        if step == 2:
            with torch.no_grad():
                job.model.head.bias[0] = value  # type: ignore[union-attr]

    with pytest.raises(TrainingDiverged, match=r"loss term 'label' is (nan|inf) at step 2"):
        train(job, poison)


def test_a_bad_activation_is_found_in_its_step(dataset: Dataset, tmp_path: Path) -> None:
    job, calls = make_job(dataset, tmp_path, settings()), []

    def spoil(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        calls.extend([1] * module.training)
        return output * math.nan if len(calls) == 5 else output

    job.model.dropout.register_forward_hook(spoil)  # type: ignore[union-attr]
    with pytest.raises(TrainingDiverged, match="loss term 'label' is nan at step 4"):
        train(job)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("last", [False, True])
def test_a_bad_gradient_is_found_before_it_reaches_a_weight(dataset: Dataset, tmp_path: Path, clip: float, last: bool) -> None:
    """Also in the last step, after which no loss would tell."""
    job, calls = make_job(dataset, tmp_path, settings(clip_grad=clip)), []
    bad = 6 if last else 3

    def spoil(gradient: Tensor) -> Tensor:
        calls.append(1)
        return gradient * math.nan if len(calls) == bad else gradient

    job.model.head.weight.register_hook(spoil)  # type: ignore[union-attr]
    with pytest.raises(TrainingDiverged, match=rf"the gradient of 'head.weight' is not finite at step {bad - 1}"):
        train(job)
    assert all(t.isfinite().all() for t in job.model.state_dict().values())


def test_a_bad_gradient_of_a_projector_is_named_too(dataset: Dataset, tmp_path: Path) -> None:
    job = make_job(dataset, tmp_path, settings(), distill="ofa")
    next(job.projectors.parameters()).register_hook(lambda g: g * math.inf)  # type: ignore[union-attr]
    with pytest.raises(TrainingDiverged, match=r"the gradient of '[\w.]+' is not finite at step 0"):
        train(job)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_what_is_not_finite_at_the_end_is_not_given_out(dataset: Dataset, tmp_path: Path, ema: float) -> None:
    job = make_job(dataset, tmp_path, settings(ema=ema))

    def spoil(step: int) -> None:
        if step == (5 if ema else 6):
            job.model.stages[0][1].running_var.fill_(math.inf)  # type: ignore[index,union-attr]

    with pytest.raises(TrainingDiverged, match=r"'stages.0.1.running_var' is not finite at the end"):
        train(job, spoil)


# ------------------------------------------------------------------------------------------------------------ mixed targets
def test_mixed_targets_are_shares_of_both_labels_and_their_loss_is_the_mix_of_losses() -> None:
    task, first, second = Classification(), torch.tensor([1, 4, 4]), torch.tensor([2, 4, 0])
    share = torch.tensor([0.75, 0.5, 0.0])
    mixed = task.mix(first, second, share, 5)
    assert mixed.tolist() == [[0, 0.75, 0.25, 0, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    oracle = -(share.double() * log_p[range(3), first] + (1 - share.double()) * log_p[range(3), second]).mean()
    assert float(task.label_loss(logits, mixed.double(), 0.0)) == pytest.approx(float(oracle), rel=1e-12)


@pytest.mark.parametrize("policy", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}], ids=str)
def test_the_loop_gives_mixed_targets_of_an_image_and_its_mirror_in_the_batch(dataset: Dataset, tmp_path: Path, policy: Any) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(Classification):
        def mix(self, first: Tensor, second: Tensor, share: Tensor, classes: int) -> Tensor:
            assert torch.equal(second, first.flip(0))
            seen.append((super().mix(first, second, share, classes), share))
            return seen[-1][0]

        def label_loss(self, outputs: Tensor, target: Tensor, smoothing: float) -> Tensor:
            assert target is seen[-1][0]
            return super().label_loss(outputs, target, smoothing)

    job = make_job(dataset, tmp_path, settings(epochs=1, augment=AugmentConfig(**policy)), distill="ofa")  # ofa reads hard labels of it
    job.task = Spy()
    train(job)
    assert len(seen) == 2
    for target, share in seen:
        assert torch.allclose(target.sum(1), torch.ones(16))
        assert bool(((target > 0).sum(1) <= 2).all())
        assert bool(((share >= 0) & (share <= 1)).all())


# ------------------------------------------------------------------------------------------------------------ what is kept
def scripted(values: list[float]) -> Classification:
    class Scripted(Classification):
        def metrics(self, outputs: Any, labels: Any, teacher: Any) -> dict[str, float]:
            return {"top1": values.pop(0)}

    return Scripted()


@pytest.mark.parametrize(("keep", "epoch"), [("best", 2), ("last", 4)])
def test_the_best_weights_on_val_are_kept_where_asked(dataset: Dataset, tmp_path: Path, keep: str, epoch: int) -> None:
    states: dict[int, dict[str, bytes]] = {}
    job = make_job(dataset, tmp_path, settings(epochs=4, keep=keep))
    job.task = scripted([0.8, 0.8, 0.5, 0.3])  # of equals the latest is kept
    trained = train(job, lambda step: states.update({step: weights(job.model)}))
    assert weights(trained.model) == states[2 * epoch]
    assert states[4] != states[8]
    assert [row["val_metric"] for row in trained.curves] == [0.8, 0.8, 0.5, 0.3]
    assert not trained.model.training


@pytest.mark.parametrize(("evaluations", "expected"), [(1, [7]), (2, [4, 7]), (7, [1, 2, 3, 4, 5, 6, 7]), (100, [1, 2, 3, 4, 5, 6, 7])])
def test_val_is_evaluated_evenly_and_always_at_the_end(dataset: Dataset, tmp_path: Path, evaluations: int, expected: list[int]) -> None:
    curves = train(make_job(dataset, tmp_path, settings(epochs=7, batch_size=40, evaluations=evaluations))).curves
    assert [row["epoch"] for row in curves if row["val_metric"] is not None] == expected


def no_key_fields(config: type[Config]) -> set[str]:
    return {n for n, f in config.model_fields.items() if isinstance(f.json_schema_extra, dict) and f.json_schema_extra.get("key") is False}


def test_only_what_cannot_change_the_weights_stays_out_of_the_key() -> None:
    assert no_key_fields(TrainConfig) == {"log_seconds"}
    assert no_key_fields(DataConfig) == {"root", "cache", "workers"}
    assert key_fields(TrainConfig(log_seconds=9)) == key_fields(TrainConfig())
    assert set(key_fields(TrainConfig())) == set(TrainConfig.model_fields) - {"log_seconds"}
    other = {"format": "digits", "image_size": 8, "root": Path("elsewhere"), "cache": "off", "workers": 7}
    assert key_fields(DataConfig(**other)) == key_fields(DataConfig(format="digits", image_size=8))


# ------------------------------------------------------------------------------------------------------------ checkpoints
def state(step: int) -> dict[str, Any]:
    tensors = {"a": torch.full((64,), float(step)), "count": torch.tensor(step)}
    return {"trained": tensors, "step": step, "curves": [{"lr": 0.1, "val_metric": None}], "best": {}}


def step_of(folder: Path) -> int | None:
    found = checkpoint.load(folder)
    if found is None:
        return None
    assert float(found["trained"]["a"].mean()) == found["step"] == int(found["trained"]["count"])
    return int(found["step"])


def damages(raw: bytes) -> Iterator[bytes]:
    draw = random.Random(0)
    yield from (b"", raw[:10], raw[:32], raw[:33], raw[: len(raw) // 2], raw[:-1], raw + b"\0", bytes(len(raw)), raw[32:])
    for _ in range(60):
        at, bit = draw.randrange(len(raw)), 1 << draw.randrange(8)
        yield raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :]


def test_a_damaged_checkpoint_is_never_used_and_the_one_before_it_is(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    newest = tmp_path / "checkpoint"
    raw = newest.read_bytes()
    assert step_of(tmp_path) == 2
    for number, bad in enumerate(damages(raw)):
        newest.write_bytes(bad)
        assert step_of(tmp_path) == 1, number
    newest.unlink()
    assert step_of(tmp_path) == 1


def test_with_both_generations_damaged_training_starts_anew(tmp_path: Path) -> None:
    assert step_of(tmp_path) is None
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    for name in ("checkpoint", "checkpoint.previous"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    assert step_of(tmp_path) is None


def test_a_checkpoint_holds_no_objects_but_tensors_and_values(tmp_path: Path) -> None:
    import hashlib
    import pickle

    body = pickle.dumps(Path("x"))
    (tmp_path / "checkpoint").write_bytes(hashlib.sha256(body).digest() + body)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(tmp_path)


# ------------------------------------------------------------------------------------------------------------ stop and continue (G4)
def stop_after(step: int, code: int = 130) -> Context:
    ctx = context()

    def each(done: int) -> None:
        if done == step:
            ctx.stop.code = code

    ctx.console = Watch(each)
    return ctx


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [(n, "sgd") for n in registry.names("distill")] + [(n, o) for n in ("kd", "ofa", "crd") for o in ("adamw", "dot")],
)
def test_a_run_stopped_at_any_step_ends_in_the_same_bytes(dataset: Dataset, tmp_path: Path, name: str, optimizer: str) -> None:
    """Also between accumulated batches, between epochs and after the last step; with dropout, batch norm, averages, mixing and the best on val."""
    mixing = AugmentConfig(policy="crop_flip", pad=1, mixup=0.5, cutmix=0.5, erase=0.3)
    cfg = settings(optimizer=optimizer, epochs=3, batch_size=13, accumulate=2, ema=0.8, keep="best", clip_grad=1.0, augment=mixing)

    def job(work: str) -> Job:
        return make_job(dataset, tmp_path / work, cfg, distill=name)

    undisturbed = fit(job("whole"), context())
    assert undisturbed.steps == 9
    for step in range(1, undisturbed.steps + 1):
        with pytest.raises(Interrupted):
            fit(job(f"stop{step}"), stop_after(step))
        first: list[int] = []
        again = train(job(f"stop{step}"), first.append)
        assert first[:1] == ([step + 1] if step < undisturbed.steps else [])  # it continued and did not start anew
        assert weights(again.model) == weights(undisturbed.model), step
        assert again.curves == undisturbed.curves


@pytest.mark.parametrize("speed", [Speed(), Speed(autocast=True)], ids=str)
@pytest.mark.parametrize(
    ("name", "options"), [("qat", {"steps": "lsq"}), ("qat", {"steps": "minmax", "weight_bits": 2}), ("qd", {}), ("dq", {})]
)
def test_a_quantized_run_stopped_at_any_step_ends_in_the_same_weights_and_grid(
    dataset: Dataset, tmp_path: Path, name: str, options: dict[str, Any], speed: Speed
) -> None:
    cls = registry.load("quantize", name)
    quantizer = cls(cls.Config(**options))
    cfg = settings(epochs=2, ema=0.5, lr=0.01)

    def job(work: str) -> Job:
        made = make_job(dataset, tmp_path / work, cfg, distill="kd", speed=speed)
        quantizer.attach(made.model, seen(made.spec, dataset, made.task, dataset.split("train")), "u8s8")
        return made

    def baked(done: Trained) -> tuple[dict[str, bytes], dict[str, bytes]]:
        grid = quantizer.bake(done.model)
        assert set(done.model.state_dict()) == set(net().state_dict())
        return weights(done.model), {n: a.tobytes() for n, a in grid.items()}

    undisturbed = train(job("whole"))
    expected = baked(undisturbed)
    for step in (1, undisturbed.steps // 2, undisturbed.steps):
        with pytest.raises(Interrupted):
            fit(job(f"stop{step}"), stop_after(step))
        assert baked(train(job(f"stop{step}"))) == expected, step


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_a_compiled_run_stopped_at_any_step_ends_in_the_same_bytes(dataset: Dataset, tmp_path: Path) -> None:
    cfg, speed = settings(epochs=2, ema=0.5), Speed(compiled=True)

    def job(work: str) -> Job:
        made = make_job(dataset, tmp_path / work, cfg, speed=speed)
        teacher = pair("ofa")[1].eval().requires_grad_(False)
        method = registry.load("distill", "ofa")
        teach(made, method(method.Config()), Teacher(teacher, View(SPEC), speed, batch=cfg.batch_size), teacher, SPEC)
        return made

    undisturbed = train(job("whole"))
    assert not undisturbed.refused
    for step in (1, undisturbed.steps - 1):
        with pytest.raises(Interrupted):
            fit(job(f"stop{step}"), stop_after(step))
        again = train(job(f"stop{step}"))
        assert weights(again.model) == weights(undisturbed.model), step
        assert again.curves == undisturbed.curves


@pytest.mark.parametrize("speed", [Speed(autocast=True), Speed(channels_last=True)], ids=str)
def test_a_run_stopped_at_every_step_in_turn_ends_in_the_same_bytes(dataset: Dataset, tmp_path: Path, speed: Speed) -> None:
    cfg = settings(epochs=2, ema=0.5)

    def job(work: str) -> Job:
        return make_job(dataset, tmp_path / work, cfg, distill="kd", speed=speed)

    undisturbed = fit(job("whole"), context())
    for step in range(1, undisturbed.steps + 1):
        with pytest.raises(Interrupted):
            fit(job("stopped"), stop_after(step))
    assert weights(fit(job("stopped"), context()).model) == weights(undisturbed.model)


def test_a_run_continues_from_the_generation_before_a_torn_checkpoint(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekd.train.loop._CHECKPOINT_SECONDS", -1.0)  # after every step
    monkeypatch.setattr("edgekd.train.loop._CHECKPOINT_SHARE", float("inf"))
    cfg = settings(epochs=2)
    undisturbed = fit(make_job(dataset, tmp_path / "whole", cfg), context())
    with pytest.raises(Interrupted):
        fit(make_job(dataset, tmp_path / "torn", cfg), stop_after(3))
    file = tmp_path / "torn" / "checkpoint"
    file.write_bytes(file.read_bytes()[:-100])
    first: list[int] = []
    again = train(make_job(dataset, tmp_path / "torn", cfg), first.append)
    assert first[0] == 3  # the second step was the last whole one
    assert weights(again.model) == weights(undisturbed.model)


# ------------------------------------------------------------------------------------------------------------ signals
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_with_its_code_and_a_checkpoint(dataset: Dataset, tmp_path: Path, number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    ctx = context(lambda step: os.kill(os.getpid(), number) if step == 3 else None)
    with ctx.stop.installed(), pytest.raises(Interrupted) as caught:
        fit(make_job(dataset, tmp_path, settings()), ctx)
    assert caught.value.exit_code == code
    assert "run the same command again" in str(caught.value.hint)
    assert step_in(tmp_path) == 3
    assert signal.getsignal(number) is before


def step_in(folder: Path) -> int:
    found = checkpoint.load(folder)
    assert found is not None
    return int(found["step"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_of_training_a_signal_stops_at_once(number: signal.Signals, code: int) -> None:
    stop = context().stop
    with stop.installed(), pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == code


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_signal_ends_the_process_without_waiting(number: str, code: int) -> None:
    program = f"""
import os, signal
from edgekd.context import Stop
stop = Stop()
with stop.installed(), stop.deferred():
    os.kill(os.getpid(), signal.{number})
    print("still here", flush=True)
    os.kill(os.getpid(), signal.{number})
    print("not here", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "still here\n")


# ------------------------------------------------------------------------------------------------------------ elsewhere
def test_a_resume_in_another_environment_is_said_and_kept_in_the_result(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        fit(make_job(dataset, tmp_path, settings(epochs=2)), stop_after(2))
    monkeypatch.setattr("edgekd.train.loop._environment", lambda device, _ranks: {"torch": "9.9", "threads": "64"})
    trained = fit(make_job(dataset, tmp_path, settings(epochs=2)), context())
    assert "here 9.9" in trained.elsewhere
    assert fit(make_job(dataset, tmp_path / "fresh", settings(epochs=1)), context()).elsewhere == ""


def test_a_model_whose_backward_adds_up_in_parallel_trains_to_the_same_bytes_each_time(dataset: Dataset, tmp_path: Path) -> None:
    """The table of a relative position bias, indexed as Swin does, large enough for torch to add to it from several threads."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.table, self.weight = net(), nn.Parameter(torch.randn(17, 64)), torch.randn(4096, 64)
            self.register_buffer("index", torch.arange(4096) * 7919 % 17)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) + (self.table[self.index] * self.weight * x.mean()).sin().sum() * 1e-3

    torch.manual_seed(4)
    start = Table()
    found = []
    for number in range(3):
        job = make_job(dataset, tmp_path / str(number), settings(epochs=2), model=copy.deepcopy(start))
        found.append(weights(fit(job, context()).model))
    assert found[0] == found[1] == found[2]
    assert not torch.are_deterministic_algorithms_enabled()  # only while it trains
