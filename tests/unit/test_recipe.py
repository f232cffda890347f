"""Recipes: precedence, sources, all problems at once with their places, and paths that stay where they may."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgekd.errors import RecipeError
from edgekd.recipe import find, load, resolved, shipped

BASE = """version: 1
seed: 3
data: {format: digits, image_size: 32}
teacher:
  arch: resnet18
  train: {epochs: 2}
model: {arch: resnet10t}
stages:
  - distill: {method: kd, epochs: 4, temperature: 2}
  - prune: {target: {speedup: 1.5}}
  - distill: {name: recover, epochs: 3}
  - quantize: {}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def problems(text: str, here: Path, *overrides: str) -> str:
    (here / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load("r.yaml", overrides)
    return "\n".join(caught.value.problems)


def test_stage_fields_and_method_fields_are_told_apart(here: Path) -> None:
    loaded = load("base.yaml")
    distill = dict(loaded.stages[0][1].config.model_dump())
    assert distill["epochs"] == 4
    assert loaded.stages[0][1].method_config.model_dump()["temperature"] == 2  # type: ignore[union-attr]
    assert [s.name for _, s in loaded.stages] == ["distill", "prune", "recover", "quantize"]


def test_an_override_beats_set_which_beats_the_file_which_beats_its_parent(here: Path) -> None:
    (here / "child.yaml").write_text("version: 1\nextends: base.yaml\nseed: 4\nset: {distill.epochs: 7, recover.lr: 1e-4}\n")
    loaded = load("child.yaml", ["distill.epochs=9"])
    rows = {r["path"]: (r["value"], r["source"]) for r in resolved(loaded)}
    assert rows["seed"] == (4, "child.yaml:3:1")
    assert rows["distill.epochs"] == (9, "-o distill.epochs=9")
    assert rows["recover.lr"][0] == 1e-4
    assert rows["recover.lr"][1].startswith("child.yaml:4:")
    assert rows["distill.temperature"] == (2, "base.yaml:9:38")
    assert rows["distill.batch_size"] == (64, "default")


def test_every_problem_is_reported_at_once_with_its_place_and_a_near_name(here: Path) -> None:
    text = BASE.replace("epochs: 4", "epohcs: 4").replace("arch: resnet10t", "arch: resnet19").replace("- quantize", "- quantise")
    said = problems(text, here)
    assert re.search(r"r\.yaml:9:27: distill\.epohcs: unknown field; did you mean 'epochs'\?", said)
    assert re.search(r"r\.yaml:7:9: model\.arch: unknown architecture 'resnet19'; did you mean 'resnet18'\?", said)
    assert re.search(r"r\.yaml:12:5: unknown stage 'quantise'; did you mean 'quantize'\?", said)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("epochs: 4", "epochs: 0"), r"9:27: distill\.epochs: .*greater than or equal to 1, got 0"),
        (("method: kd", "method: kdd"), r"9:15: distill\.method|unknown method 'kdd'; did you mean 'kd'"),
        (("speedup: 1.5", "speedup: 1.5, macs: 0.5"), r"exactly one of"),
        (("name: recover", "name: distill"), r"two things are named 'distill'"),
        (("format: digits", "format: digit"), r"unknown format 'digit'; did you mean 'digits'"),
        (("stages:", "targets: {rpi55: {}}\nstages:"), r"unknown device 'rpi55'; did you mean 'rpi5'"),
        (("teacher:\n  arch: resnet18\n  train: {epochs: 2}\n", ""), r"distils, and the recipe has no teacher"),
        (("  train: {epochs: 2}\n", ""), r"the teacher is not trained"),
        (("model: {arch: resnet10t}", "model: {}"), r"model: expected either arch or onnx"),
        (("version: 1", "version: 2"), r"1:1: version"),
        (("data: {format: digits, image_size: 32}\n", ""), r"r\.yaml:1:1: data: missing; it has no default"),
        (("data: {format: digits, image_size: 32}", "data: null"), r"data: expected a dataset, got nothing"),
        (("data: {format: digits,", "samples: {classes: 10,"), r"samples: 'distill' needs data, and generated samples have no labels"),
        (("stages:", "samples: {classes: 10, image_size: 32}\nstages:"), r"samples: there are data, so nothing is generated"),
    ],
)
def test_a_wrong_value_is_refused_where_it_stands(here: Path, change: tuple[str, str], words: str) -> None:
    assert re.search(words, problems(BASE.replace(*change), here))


def test_an_override_of_something_unknown_names_the_nearest(here: Path) -> None:
    assert "there is no section or stage 'distll'; did you mean 'distill'?" in problems(BASE, here, "distll.epochs=1")
    assert "expected NAME.FIELD=VALUE" in problems(BASE, here, "distill.epochs")


def test_a_list_of_methods_is_one_method_of_several_with_their_settings(here: Path) -> None:
    recipe = BASE.replace("method: kd, epochs: 4, temperature: 2", "method: METHODS")
    (here / "r.yaml").write_text(recipe.replace("METHODS", "[kd, {ofa: {gamma: 1.2}}]"))
    settings = load("r.yaml").stages[0][1]
    assert settings.method == "combined"
    assert settings.method_config.names == ["kd", "ofa"]  # type: ignore[union-attr]
    for methods, words in (
        ("[kd, kd]", "'kd' cannot be there twice"),
        ("[kdd]", "unknown distill 'kdd'; did you mean 'kd'"),
        ("[{kd: {temprature: 2}}]", "kd.temprature"),
        ("[{kd: {}, ofa: {}}]", "expected one method with its settings"),
        ("[]", "methods"),
    ):
        assert words in problems(recipe.replace("METHODS", methods), here)


def test_a_model_stage_cannot_follow_a_graph_stage(here: Path) -> None:
    text = BASE.replace("  - quantize: {}\n", "").replace("  - prune", "  - quantize: {}\n  - prune")
    assert "cannot follow a quantize stage" in problems(text, here)


@pytest.mark.parametrize("path", ["../outside.yaml", "/etc/passwd", "https://example.org/r.yaml", "a/../../b.yaml", "base.yaml\\0"])
def test_extends_stays_inside_the_recipe_root(here: Path, path: str) -> None:
    assert "extends" in problems(f"version: 1\nextends: '{path}'\n", here)


def test_a_path_in_a_recipe_stays_inside_and_one_on_the_command_line_is_free(here: Path) -> None:
    text = BASE.replace("{format: digits, image_size: 32}", "{format: image_folder, root: /usr/share, image_size: 32}")
    assert "data.root" in problems(text, here)
    loaded = load("base.yaml", ["data.format=image_folder", "data.root=/usr/share"])
    assert loaded.recipe.data.root == Path("/usr/share")


def test_a_symlink_out_of_the_root_is_refused(here: Path) -> None:
    (here / "link").symlink_to("/usr/share")
    text = BASE.replace("{format: digits, image_size: 32}", "{format: image_folder, root: link, image_size: 32}")
    assert "data.root" in problems(text, here)


def test_a_cycle_of_extends_ends(here: Path) -> None:
    (here / "a.yaml").write_text("version: 1\nextends: b.yaml\n")
    (here / "b.yaml").write_text("version: 1\nextends: a.yaml\n")
    with pytest.raises(RecipeError, match="is there a cycle"):
        load("a.yaml")


def test_every_shipped_recipe_is_found_by_name_and_by_its_documented_path(here: Path) -> None:
    assert "quickstart" in shipped()
    for name in shipped():
        assert find(name) == find(f"recipes/{name}.yaml")


def test_a_recipe_can_name_no_code(here: Path) -> None:
    for field in ("code", "import", "script", "hook", "_component_", "env"):
        assert "unknown field" in problems(BASE + f"{field}: os.system\n", here)


@pytest.mark.parametrize("change", ["{data.root: /etc}", "{data: {format: image_folder, root: /etc}}", "{teacher.weights: ../../x.pt}"])
def test_set_of_a_recipe_leads_no_path_out_either(here: Path, change: str) -> None:
    found = problems(f"extends: base.yaml\nset: {change}\n", here)
    assert "leaves the folders it may use" in found


def test_a_whole_section_of_the_command_line_is_resolved_and_known_by_its_leaves(here: Path) -> None:
    (here / "r.yaml").write_text("extends: base.yaml\n")
    loaded = load("r.yaml", ["data={format: image_folder, root: photos, image_size: 32, split: {val: 0.2}}"])
    assert loaded.recipe.data.root == here / "photos"
    rows = {row["path"]: row for row in resolved(loaded)}
    assert rows["data.split.val"]["source"].startswith("-o data=")


@pytest.mark.parametrize("override", ["stages.prune.criterion=l2", "stages.0.distill.epochs=1", "teacher.mean.0=0.5"])
def test_an_item_of_a_list_cannot_be_named(here: Path, override: str) -> None:
    found = problems("extends: base.yaml\nset: {teacher.mean: [0.5, 0.5, 0.5]}\n", here, override)
    assert re.search(r"-o \S+: '(stages|mean)' is a list", found)


@pytest.mark.parametrize("name", ["student", "preflight", "shipped", "teacher", "data"])
def test_a_stage_cannot_take_the_name_of_a_step_that_every_plan_has(here: Path, name: str) -> None:
    assert f"two things are named '{name}'" in problems(BASE.replace("name: recover", f"name: {name}"), here)


def test_a_target_that_asks_for_int8_needs_a_stage_that_quantizes(here: Path) -> None:
    text = BASE.replace("  - quantize: {}\n", "") + "targets: {host: {precision: int8}}\n"
    assert "targets.host.precision: int8 is asked for, and no stage quantizes" in problems(text, here)


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg", "num_classes"])
def test_arguments_of_an_architecture_cannot_load_files(here: Path, name: str) -> None:
    assert f"'{name}' is not an argument of an architecture" in problems(
        BASE.replace("arch: resnet10t", f"arch: resnet10t, args: {{{name}: x}}"), here
    )


def test_internal_steps_are_no_stages_of_a_recipe(here: Path) -> None:
    assert "unknown stage 'widths'" in problems(BASE.replace("quantize: {}", "widths: {}"), here)
