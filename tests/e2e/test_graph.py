"""A graph model becomes a plain engine: the chain from the command line, the bundle on its own, and what a recipe of nodes may not say."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd import registry
from edgekd.errors import InputRefused
from tests.graphs import opened, save_npz, save_planetoid, toy_arrays
from tests.support import REPOSITORY, run_here, short_measurements

FEW = ("-o", "teacher.train.epochs=30", "-o", "distill.epochs=30", "-o", "recover.epochs=10")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """`compress graph/quickstart` with few epochs: its JSON and its folder."""
    folder = tmp_path_factory.mktemp("graph")
    with pytest.MonkeyPatch.context() as patch, short_measurements():
        patch.setenv("EDGEKD_HOME", str(folder / "home"))
        result = run_here("compress", "graph/quickstart", *FEW, "--out", folder / "run", "--json")
        assert result.code == 0, result.err
        yield result.json(), folder / "run"


def test_the_quickstart_of_graphs_needs_no_data_and_says_everything_of_the_contract(run: tuple[dict[str, Any], Path]) -> None:
    said, folder = run
    assert said["teacher"]["arch"] == "gcn"
    assert said["teacher"]["metric"] > 0.6
    [target] = said["targets"]
    assert target["metric"] > 0.4
    assert [s["method"] for s in said["stages"][:4]] == ["ffg2m", "l2", "glnn", "ptq"]
    assert {s["metric_name"] for s in said["stages"][:4]} == {"accuracy"}
    assert said["baselines"][0]["metric"] > 0.25
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "graph model, neighbours fetched and propagated" in page
    ways = said["graph"]["served"]["latency_ms"]
    assert set(ways) == {"fetched", "cached", "student"}
    assert said["teacher"]["latency_ms"] == ways["fetched"]
    rows = [g for g in said["graph"]["groups"] if g["by"] == "degree"]
    assert sum(g["nodes"] for g in rows) == 1000
    for name, metric in (("teacher", said["teacher"]["metric"]), ("student", target["metric"]), ("alone", said["baselines"][0]["metric"])):
        assert sum(g[name] * g["nodes"] for g in rows) / 1000 == pytest.approx(metric, abs=1e-5)
    assert all(row["ok"] for row in said["parity"])


def predicted(bundle: Path, *files: Path) -> Any:
    return subprocess.run([sys.executable, "-I", str(bundle / "predict.py"), *map(str, files)], capture_output=True, text=True, cwd=bundle)


def test_the_bundle_answers_rows_from_both_kinds_of_files_alone(run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    bundle = run[1] / "host"
    with np.load(bundle / "samples.npz") as stored:
        rows, wanted = stored["rows"], stored["outputs"].argmax(1)
    np.save(tmp_path / "rows.npy", rows)
    np.savetxt(tmp_path / "rows.csv", rows, delimiter=",", header=",".join(f"f{i}" for i in range(rows.shape[1])), comments="", fmt="%.9g")
    labels = json.loads((bundle / "bundle.json").read_text())["labels"]
    answers = [predicted(bundle, tmp_path / f"rows.{suffix}") for suffix in ("npy", "csv")]
    for answer in answers:
        assert answer.returncode == 0, answer.stderr
        assert [line.split("\t")[1] for line in answer.stdout.splitlines()] == [labels[i] for i in wanted]
    assert run_here("verify", bundle).code == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.zeros((2, 5), np.float32), "its rows have 5 features, the model takes 32"),
        (np.full((2, 32), np.nan, np.float32), "not a finite number"),
        (np.zeros((2, 3, 4), np.float32), "not rows of numbers"),
        (np.array(["a", "b"]), "not rows of numbers"),
        ("1,2\n3\n", "different numbers of fields"),
        ("1,a\n", "could not convert"),
    ],
)
def test_rows_that_do_not_fit_are_refused_in_words(run: tuple[dict[str, Any], Path], content: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / ("rows.csv" if isinstance(content, str) else "rows.npy")
    path.write_text(content) if isinstance(content, str) else np.save(path, content)
    answer = predicted(run[1] / "host", path, tmp_path / "none.npy")
    assert answer.returncode == 1
    assert said in answer.stderr
    assert "none.npy: cannot be used" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_second_run_builds_nothing(run: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKD_HOME", str(run[1].parent / "home"))
    steps = run_here("plan", "graph/quickstart", *FEW, "--json").json()
    assert {s["state"] for s in steps} <= {"cached", "skipped"}


# ------------------------------------------------------------------------------------------------------------ own data and teachers
RECIPE = """
version: 1
task: node_classification
data: {{format: arrays, root: {root}}}
{teacher}
model: {{arch: mlp, args: {{hidden: 16, dropout: 0.1}}}}
stages:
  - distill: {{method: {method}, epochs: 60}}
targets: {{host: {{backend: onnxruntime}}}}
accept: {{accuracy_drop_max: 1}}
"""


def recipe(folder: Path, *, method: str = "glnn", teacher: str = "teacher: {arch: gcn, train: {epochs: 60}}", **changes: Any) -> Path:
    save_npz(folder / "graph.npz", **toy_arrays(), **changes)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(root="graph.npz", teacher=teacher, method=method))
    return path


def predictions(folder: Path, kind: str = "logits", ids: Any = None, values: Any = None) -> Path:
    y = np.arange(60) % 3
    given = 4 * np.eye(3, dtype=np.float32)[y] + np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)
    return save_npz(
        folder / "said.npz", ids=np.arange(60).astype(str) if ids is None else ids, **{kind: given if values is None else values}
    )


def test_a_teacher_may_be_a_file_of_soft_labels(tmp_path: Path, home: Path) -> None:
    predictions(tmp_path)
    with short_measurements():
        path = recipe(tmp_path, method="ffg2m", teacher="teacher: {predictions: said.npz}")
        result = run_here("compress", path, "--out", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert result.json()["teacher"]["arch"] == "said.npz"
    assert result.json()["targets"][0]["metric"] > 0.6


def test_soft_labels_that_miss_nodes_or_say_nothing_are_refused(tmp_path: Path, home: Path) -> None:
    path = recipe(tmp_path, teacher="teacher: {predictions: said.npz}")
    predictions(tmp_path, ids=np.array([f"x{i}" for i in range(60)]))
    result = run_here("compress", path, "--out", tmp_path / "run")
    assert result.code == 3
    assert "misses 60 of 60 nodes" in result.err
    predictions(tmp_path, values=np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32) * 1e-9)
    result = run_here("compress", path, "--out", tmp_path / "run")
    assert result.code == 3
    assert "nearly uniform" in result.err


def test_positions_are_learned_with_and_the_bundle_takes_the_names_of_nodes_or_of_neighbours(tmp_path: Path, home: Path) -> None:
    """A known node by its name, one that nobody knows as if it lay nowhere, rows that end with their position as they are."""
    with short_measurements():
        chosen = ("-o", "data.positions={size: 6, walks: 4, length: 12}", "-o", "distill.batch_size=16")
        result = run_here("compress", recipe(tmp_path, method="nosmog"), *chosen, "--out", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    bundle = tmp_path / "run" / "host"
    with np.load(bundle / "positions.npz") as known, np.load(bundle / "samples.npz") as stored:
        ids, table, rows, wanted = known["ids"].tolist(), known["positions"], stored["rows"], stored["outputs"].argmax(1)
    assert rows.shape[1] == 5 + 6
    names = [ids[int(np.abs(table - row[5:]).sum(1).argmin())] for row in rows]
    np.save(tmp_path / "full.npy", rows)
    np.save(tmp_path / "own.npy", rows[:, :5])
    answer = predicted(bundle, tmp_path / "own.npy")
    assert answer.returncode == 1
    assert "name their nodes, or the neighbours of new ones, in own.npy.near" in answer.stderr
    (tmp_path / "own.npy.near").write_text("\n".join(names))
    labels = json.loads((bundle / "bundle.json").read_text())["labels"]
    for file in ("full.npy", "own.npy"):
        answer = predicted(bundle, tmp_path / file)
        assert answer.returncode == 0, answer.stderr
        assert [line.split("\t")[1] for line in answer.stdout.splitlines()] == [labels[i] for i in wanted]
    (tmp_path / "own.npy.near").write_text("\n".join([f"{ids[0]}\t{ids[1]}", "nobody", *names[2:]]))
    rows[0, 5:], rows[1, 5:] = table[:2].mean(0), 0
    np.save(tmp_path / "full.npy", rows)
    assert predicted(bundle, tmp_path / "own.npy").stdout == predicted(bundle, tmp_path / "full.npy").stdout
    (tmp_path / "own.npy.near").write_text("1\n")
    assert "has 1 lines for 8 rows" in predicted(bundle, tmp_path / "own.npy").stderr
    assert run_here("verify", bundle).code == 0
    assert "6 of them where it lies in the graph" in (bundle / "MODEL_CARD.md").read_text()


def test_a_teacher_with_a_codebook_teaches_its_tokens_and_another_has_none(tmp_path: Path, home: Path) -> None:
    tokenizer = "teacher: {arch: vqgcn, args: {hidden: 16, codes: 12, dropout: 0.1}, train: {epochs: 80}}"
    with short_measurements():
        result = run_here(
            "compress",
            recipe(tmp_path, method="vqgraph", teacher=tokenizer),
            "-o",
            "distill.tokens=0.01",
            "--out",
            tmp_path / "run",
            "--json",
        )
    assert result.code == 0, result.err
    assert result.json()["targets"][0]["metric"] > 0.6
    assert {"label", "kd", "tokens"} == set(result.json()["curves"]["distill"][-1]["terms"])
    result = run_here("check", recipe(tmp_path, method="vqgraph"))
    assert result.code == 2
    assert "vqgraph learns a teacher's tokens, and gcn has none: -o teacher.arch=vqgcn" in result.err


def own_architecture(folder: Path) -> Path:
    """README's graph model, in a file."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = text[text.index("    import numpy as np, torch\n") : text.index("A teacher of which only the outputs are known")]
    path = folder / "mine.py"
    path.write_text(textwrap.dedent(block))
    return path


@pytest.mark.skipif(not (REPOSITORY / "README.md").is_file(), reason="there is no README.md")
def test_a_graph_model_of_the_users_own_teaches_alone_and_in_batches_and_its_code_is_part_of_the_result(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_user", dict(registry._user))  # the other tests of this process know nothing of it
    code, own = own_architecture(tmp_path), "teacher: {arch: spread, args: {hidden: 16}, train: {epochs: 60}}"
    path = recipe(tmp_path, teacher=own)
    with short_measurements():
        result = run_here("compress", path, "--code", code, "--out", tmp_path / "run", "--json")
        assert result.code == 0, result.err
        assert result.json()["teacher"]["metric"] > 0.6
        assert set(result.json()["graph"]["served"]["latency_ms"]) == {"fetched", "student"}
        batches = ("-o", "teacher.train.batch_size=7", "-o", "teacher.train.neighbours=3")
        result = run_here("compress", path, "--code", code, *batches, "--out", tmp_path / "batches", "--json")
        assert result.code == 0, result.err

    def state(step: str) -> str:
        rows = {r["step"]: r["state"] for r in run_here("plan", path, "--code", code, "--json").json()}
        return str(rows[step])

    assert state("teacher") == "cached"
    code.write_text(code.read_text().replace("alpha=0.1", "alpha=0.2"))
    assert state("teacher") != "cached"
    silent = tmp_path / "silent.py"
    silent.write_text(
        code.read_text().replace("    hops = 4", "    steps = 4").replace("self.hops", "4").replace("class Spread", "class Silent")
    )
    result = run_here("compress", path, "--code", silent, *batches, "-o", "teacher.arch=silent", "--out", tmp_path / "none")
    assert result.code == 2
    assert "does not say how many steps away it looks" in result.err


def test_the_inductive_setting_hides_test_nodes_from_teacher_and_student(tmp_path: Path, home: Path) -> None:
    with short_measurements():
        result = run_here("compress", recipe(tmp_path), "-o", "data.setting=inductive", "--out", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert result.json()["teacher"]["metric"] > 0.5


def test_planetoid_files_and_krd_from_the_shipped_recipe(tmp_path: Path, home: Path) -> None:
    save_planetoid(tmp_path / "raw", nodes=60, test=20)
    small = ("teacher.args.hidden=8", "model.args.hidden=8", "teacher.train.epochs=60", "distill.epochs=60", "distill.patience=0")
    changes = [part for s in (*small, "data.name=toy", f"data.root={tmp_path}", "accept.accuracy_drop_max=1") for part in ("-o", s)]
    with short_measurements():
        result = run_here("compress", "graph/cora-krd", *changes, "--out", tmp_path / "run", "--json", "--no-gate")
    assert result.code == 0, result.err
    assert result.json()["teacher"]["arch"] == "gcn"


# ------------------------------------------------------------------------------------------------------------ bad recipes
BAD = {
    "a student that needs neighbours": (["model.arch=gcn"], "it looks at neighbours, which are not there where it is deployed"),
    "an architecture of images": (["model.arch=resnet18"], "unknown architecture of nodes 'resnet18'"),
    "arguments that are not there": (["model.args.depth=3"], "model.args.depth: unknown field"),
    "arguments out of range": (["teacher.args.layers=0"], "teacher.args.layers"),
    "an unknown method": (["distill.method=kd"], "unknown method 'kd'"),
    "several methods": (["distill.method=[glnn, krd]"], "unknown method"),
    "a format of images": (["data.format=digits"], "unknown format 'digits'"),
    "settings of images": (["model.mean=[0, 0, 0]"], "mean is for models of images"),
    "augmentation": (["distill.augment.policy=shift"], "augment: unknown field"),
    "an image size": (["data.image_size=32"], "image_size: unknown field"),
    "a share beyond 1": (["distill.label_weight=1.5"], "label_weight"),
    "what is hidden where nothing is": (["data.hidden=0.5"], "nothing is hidden in the transductive setting"),
    "a teacher that is not trained": (["teacher.train=null"], "the teacher is not trained"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_recipe_of_nodes_is_checked_as_a_whole(name: str, tmp_path: Path, home: Path) -> None:
    changes, said = BAD[name]
    result = run_here("check", recipe(tmp_path), *(part for c in changes for part in ("-o", c)))
    assert result.code == 2, result.text
    assert said in result.err
    assert "Traceback" not in result.err


def test_a_method_that_asks_the_teacher_again_needs_one_that_can_answer(tmp_path: Path, home: Path) -> None:
    predictions(tmp_path)
    result = run_here("check", recipe(tmp_path, method="krd", teacher="teacher: {predictions: said.npz}"))
    assert result.code == 2
    assert "krd asks the teacher for more than its answers" in result.err
    result = run_here("check", recipe(tmp_path, teacher=""))
    assert result.code == 2
    assert "has no teacher" in result.err


def test_a_student_that_gives_every_node_one_answer_is_refused_and_a_teacher_that_does_so_too_is_not_a_reason(tmp_path: Path) -> None:
    import torch

    from edgekd.stages.distill_nodes import assert_not_collapsed

    nodes = opened(tmp_path / "out", format="arrays", root=save_npz(tmp_path / "graph.npz", **toy_arrays()))
    student = torch.nn.Linear(5, 3)
    with torch.no_grad():
        student.bias[1] = 1e6
    varied, alike = np.eye(3, dtype=np.float32)[np.arange(60) % 3], np.eye(3, dtype=np.float32)[np.ones(60, int)]
    with pytest.raises(InputRefused, match="the student gives 100% of val one and the same class, '1': it has collapsed"):
        assert_not_collapsed(student, nodes, varied, "distill")
    assert_not_collapsed(student, nodes, alike, "distill")
    assert_not_collapsed(torch.nn.Linear(5, 3), nodes, varied, "distill")
