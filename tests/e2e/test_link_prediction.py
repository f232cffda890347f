"""Which nodes are linked: the chain from the command line, the bundle on its own, and what a recipe of links may not say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import run_here, short_measurements

FEW = ("-o", "teacher.train.epochs=60", "-o", "distill.epochs=60", "-o", "recover.epochs=20")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`compress graph/links` with few epochs: its JSON and its folder."""
    folder = tmp_path_factory.mktemp("links")
    with pytest.MonkeyPatch.context() as patch, short_measurements():
        patch.setenv("EDGEKD_HOME", str(folder / "home"))
        result = run_here("compress", "graph/links", *FEW, "--out", folder / "run", "--json")
        assert result.code == 0, result.err
        yield result.json(), folder / "run"


def test_a_graph_model_of_links_becomes_an_engine_of_two_rows(run: tuple[dict[str, Any], Path]) -> None:
    said, folder = run
    [target] = said["targets"]
    assert {s["metric_name"] for s in said["stages"][:4]} == {"auc"}
    assert [s["method"] for s in said["stages"][:4]] == ["llp", "l2", "llp", "ptq"]
    for side in (target, said["teacher"], said["baselines"][0]):
        assert {"auc", "mrr", "hits@10", "hits@20", "hits@50"} <= set(side["metrics"])
        assert side["metric"] == side["metrics"]["auc"] > 0.55
    assert all(row["ok"] for row in said["parity"])
    ways = said["graph"]["served"]["latency_ms"]
    assert set(ways) == {"fetched", "cached", "student"}
    assert said["teacher"]["latency_ms"] == ways["fetched"]
    groups = [g for g in said["graph"]["groups"] if g["by"] == "shared neighbours"]
    assert sum(g["student"] * g["nodes"] for g in groups) / sum(g["nodes"] for g in groups) == pytest.approx(target["metric"], abs=1e-5)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "hits@20" in page
    assert "one random pair, one thread" in page
    assert run_here("verify", folder / "host").code == 0


def predicted(bundle: Path, *files: Path) -> Any:
    return subprocess.run([sys.executable, "-I", str(bundle / "predict.py"), *map(str, files)], capture_output=True, text=True, cwd=bundle)


def test_the_bundle_takes_two_files_of_rows(run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    bundle = run[1] / "host"
    with np.load(bundle / "samples.npz") as stored:
        rows, logits = stored["rows"], stored["outputs"]
    first, second = np.split(rows, 2, axis=1)
    np.save(tmp_path / "first.npy", first)
    np.savetxt(tmp_path / "second.csv", second, delimiter=",", fmt="%.9g")
    answer = predicted(bundle, tmp_path / "first.npy", tmp_path / "second.csv")
    assert answer.returncode == 0, answer.stderr
    lines = [line.split("\t") for line in answer.stdout.splitlines()]
    assert [line[1] for line in lines] == [("no link", "link")[i] for i in logits.argmax(1)]
    want = np.exp(logits[:, 1]) / np.exp(logits).sum(1)
    np.testing.assert_allclose([float(line[2]) for line in lines], want, atol=1e-3)
    np.save(tmp_path / "fewer.npy", second[:-1])
    np.save(tmp_path / "narrow.npy", second[:, :3])
    for name, words in (("fewer", "a pair is a row of each"), ("narrow", "its rows have 3 features"), ("none", "cannot be used")):
        answer = predicted(bundle, tmp_path / "first.npy", tmp_path / f"{name}.npy")
        assert answer.returncode == 1
        assert words in answer.stderr
        assert "Traceback" not in answer.stderr
    assert predicted(bundle, tmp_path / "first.npy").returncode == 1


BAD = {
    "a method for nodes": ("distill.method=glnn", "glnn is not for pairs of nodes: llp"),
    "a student that looks at neighbours": ("model.arch=gcn", "it looks at neighbours"),
    "a file of predictions": ("teacher.predictions=said.npz", "predictions"),
    "a setting of nodes": ("data.setting=inductive", "setting"),
    "no room to train": ("data.split.test=0.9", "take more than 0.9 of the links"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_recipe_of_links_is_checked_as_a_whole(name: str, home: Path) -> None:
    change, said = BAD[name]
    result = run_here("check", "graph/links", "-o", change)
    assert result.code == 2, result.text
    assert said in result.err


def test_llp_is_not_for_nodes(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "recipe.yaml"
    stages = "stages:\n  - distill: {method: llp}\ntargets: {host: {}}\n"
    path.write_text(
        f"version: 1\ntask: node_classification\ndata: {{format: blocks}}\nteacher: {{arch: gcn, train: {{}}}}\nmodel: {{arch: mlp}}\n{stages}"
    )
    result = run_here("check", path)
    assert result.code == 2
    assert "llp is not for nodes" in result.err


def test_the_task_and_its_method_are_listed() -> None:
    listed = json.loads(run_here("methods", "list", "--json").out)
    assert {"llp", "link_prediction"} <= {row["name"] for row in listed}


@pytest.mark.parametrize("name", ["graph/links", "graph/quickstart"])
def test_models_of_graphs_are_not_wired(name: str, home: Path) -> None:
    result = run_here("wire", name)
    assert result.code == 2
    assert "not wired stage by stage" in result.err
