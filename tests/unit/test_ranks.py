"""Two processes that train one model come to the weights of one process (G11), whatever the loss compares, and stop together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from edgekd.console import Console
from edgekd.context import Context
from edgekd.data.config import AugmentConfig, DataConfig
from edgekd.data.dataset import Dataset, build
from edgekd.errors import Interrupted, UsageError
from edgekd.train.config import TrainConfig
from edgekd.train.loop import fit
from edgekd.train.ranks import Ranks
from tests.unit.test_train import context, make_job, net, stop_after

CASES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "labels alone": (None, {}),
    "kd": ("kd", {"ema": 0.5}),
    "compares images (rkd)": ("rkd", {}),
    "compares classes over the batch (dist)": ("dist", {"clip_grad": 0.5}),
    "features and projectors (fitnet)": ("fitnet", {}),
    "keeps a table by image (crd)": ("crd", {}),
    "two momenta (dot)": ("kd", {"optimizer": "dot", "clip_grad": 1.0}),
    "accumulated": ("kd", {"accumulate": 2}),
    "mixed images": (None, {"augment": AugmentConfig(policy="shift", pad=1, mixup=0.5)}),
}


def settings(values: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**({"epochs": 1, "batch_size": 8, "lr": 0.05, "optimizer": "sgd", "log_seconds": 1e-9} | values))


def trained(dataset: Dataset, work: Path, case: str, ranks: Ranks | None) -> dict[str, torch.Tensor]:
    method, values = CASES[case]
    job = make_job(dataset, work / case, settings(values), model=net(dropout=0.0), distill=method)
    ctx = context()
    ctx.ranks = ranks
    return fit(job, ctx).model.state_dict()


def worker(rank: int, folder: Path) -> None:
    """Every case, and a run that is stopped in one process alone and goes on."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    dataset, ranks = Dataset.open(folder / "data"), Ranks(rank, 2)
    found = {case: trained(dataset, folder / "together", case, ranks) for case in CASES}
    ctx = stop_after(2) if rank == 1 else Context(store=None, console=Console(quiet=True))  # type: ignore[arg-type]
    ctx.ranks = ranks
    with pytest.raises(Interrupted):
        fit(make_job(dataset, folder / "stopped", settings({"epochs": 2}), model=net(dropout=0.0)), ctx)
    dist.barrier()
    assert (folder / "stopped" / "checkpoint").is_file()
    ctx = context()
    ctx.ranks = ranks
    found["stopped"] = fit(make_job(dataset, folder / "stopped", settings({"epochs": 2}), model=net(dropout=0.0)), ctx).model.state_dict()
    ctx = context()
    ctx.ranks = ranks
    found["not stopped"] = fit(make_job(dataset, folder / "whole", settings({"epochs": 2}), model=net(dropout=0.0)), ctx).model.state_dict()
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "data").mkdir()
    build(DataConfig(format="digits", image_size=8, max_per_class=4), 0, folder / "data")
    mp.spawn(worker, args=(folder,), nprocs=2)
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_come_to_the_weights_of_one(together: tuple[Path, list[dict[str, Any]]], case: str) -> None:
    folder, found = together
    alone = trained(Dataset.open(folder / "data"), folder / "alone", case, None)
    untrained = net(dropout=0.0).state_dict()
    for name, tensor in alone.items():
        torch.testing.assert_close(found[0][case][name], tensor, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert any(not torch.allclose(alone[n], untrained[n], rtol=1e-2, atol=1e-2) for n in alone), (
        "it has learned, so the comparison says something"
    )


@pytest.mark.parametrize("case", [*CASES, "stopped"])
def test_all_processes_hold_the_same_weights(together: tuple[Path, list[dict[str, Any]]], case: str) -> None:
    first, second = (found[case] for found in together[1])
    assert {n: t.numpy().tobytes() for n, t in first.items()} == {n: t.numpy().tobytes() for n, t in second.items()}


def test_a_stop_in_one_process_stops_all_and_the_run_goes_on_to_the_same_bytes(together: tuple[Path, list[dict[str, Any]]]) -> None:
    found = together[1][0]
    assert {n: t.numpy().tobytes() for n, t in found["stopped"].items()} == {
        n: t.numpy().tobytes() for n, t in found["not stopped"].items()
    }


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    assert Ranks(1, 2).share(8) == slice(4, 8)
    with pytest.raises(UsageError, match="batch of 7 images cannot be divided among 2 processes"):
        Ranks(1, 2).share(7)
