"""`edgekd wire`: what is traced is what trains, what is proposed can be pasted, and each warning has its cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgekd
from edgekd import registry
from edgekd.api import wire
from edgekd.distill._advice import Facts, advise, cautions
from edgekd.distill._pairs import stage_pairs
from edgekd.errors import UsageError
from edgekd.models.spec import ModelSpec
from edgekd.models.taps import Tap
from edgekd.recipe import load
from edgekd.train.distiller import Batch, DistillConfig, Side
from edgekd.train.links import links
from edgekd.wiring import chosen
from tests.support import QUICKSTART, run_here, write_images

SMALL_VIT = "{arch: vit_tiny_patch16_224, args: {img_size: 32, patch_size: 8, embed_dim: 48, num_heads: 3, depth: 4}"
CNN = "{arch: resnet10t, args: {channels: [16, 16, 32, 32]}"
RECIPE = """version: 1
data: {format: digits, image_size: 32}
teacher: TEACHER, train: {epochs: 1, label_smoothing: SMOOTHING}}
model: STUDENT}
stages:
  - distill: METHOD
  - prune: {criterion: l1, target: {macs: 0.5}}
  - distill: {name: recover, method: kd, epochs: 2, temperature: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a recipe and returns its path."""
    monkeypatch.chdir(tmp_path)

    def write(method: str, *, teacher: str = SMALL_VIT, student: str = CNN, smoothing: float = 0.0) -> str:
        changes = {"TEACHER": teacher, "STUDENT": student, "METHOD": method, "SMOOTHING": str(smoothing)}
        text = RECIPE
        for word, value in changes.items():
            text = text.replace(word, value)
        Path("r.yaml").write_text(text)
        return "r.yaml"

    return write


# ------------------------------------------------------------------------------------------------------------ what is traced
@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("kd", [("kd", "logits", "logits")]),
        ("ofa", [("logits", "logits", "logits"), *((f"ofa{n}", f"stage {n}", "logits") for n in (1, 2, 3, 4))]),
        ("rsd", [("rsd", "embedding", "embedding")]),
        ("cakd", [("attention", "stage 2", "its layers"), ("tokens", "stage 2", "stage 4")]),
        ("nd", [("nd", "embedding", "embedding")]),
        ("[dkd, crd]", [("dkd.target", "logits", "logits"), ("dkd.rest", "logits", "logits"), ("crd", "embedding", "embedding")]),
    ],
)
def test_each_term_is_shown_with_what_it_compares(recipe: Any, method: str, expected: list[tuple[str, str, str]]) -> None:
    found = wire(recipe(f"{{method: {method}}}"), step="distill")
    assert [(r["term"], r["student"], r["teacher"]) for r in found["terms"]] == expected


def test_a_projector_is_counted_as_what_is_trained(recipe: Any) -> None:
    [row] = wire(recipe("{method: rsd, expansion: 3}"), step="distill")["terms"]
    width, its = 32, 48
    assert row["projector"] == f"2 Linear, 1 BatchNorm1d: {width * 3 * width + 2 * 3 * width + 3 * width * its} parameters"


def test_stages_stand_beside_each_other_by_resolution_and_the_deeper_of_two_equals() -> None:
    def side(*grids: int) -> Side:
        return Side(nn.Identity(), tuple(Tap(f"s{i}", "NCHW", 8, (g, g)) for i, g in enumerate(grids)), 8, 10)

    assert stage_pairs(side(8, 4, 2, 1), side(8, 4, 2, 1)) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert stage_pairs(side(32, 16, 8), side(32, 16, 8, 4)) == [(0, 0), (1, 1), (2, 2)]  # by resolution
    assert stage_pairs(side(8, 4, 2), side(32, 16, 8, 4)) == [(0, 1), (1, 2), (2, 3)]
    assert stage_pairs(side(4, 4, 4, 4), side(4, 4)) == [(1, 0), (3, 1)]  # by depth
    assert stage_pairs(side(4, 2), side(8, 4, 2, 1), asked=[(4, 4), (3, 1)]) == [(1, 3), (0, 0)]
    with pytest.raises(UsageError, match="the student has no stage 2") as caught:
        stage_pairs(side(4, 2), side(8, 4, 2, 1), asked=[(2, 1)])
    assert caught.value.expected == "3 to 4"


def test_a_users_own_distiller_is_traced_without_describing_itself(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_user", {})

    @edgekd.register("distill", "sums")
    class Sums:
        """The student's second stage and embedding against the teacher's logits and third stage; one more term that teaches nothing."""

        Config = DistillConfig
        needs = frozenset({"logits", "taps", "teacher_taps", "embedding"})
        co_trains = False

        def __init__(self, config: DistillConfig):
            self.config = config

        def setup(self, student: Side, teacher: Side) -> nn.Module:
            self.layer = nn.Linear(student.embedding, 2, bias=False)
            return self.layer

        def terms(self, batch: Batch) -> dict[str, Tensor]:
            own = batch.student.embedding
            assert own is not None
            its = batch.teacher.logits.argmax(1).float().mean() + batch.teacher.taps[2].mean().detach()
            return {"mixed": (self.layer(own).mean() + batch.student.taps[1].mean() - its) ** 2, "own": batch.student.logits.mean()}

    found = wire(recipe("{method: sums}"), step="distill")
    assert [(r["term"], r["student"], r["teacher"]) for r in found["terms"]] == [
        ("mixed", "stage 2, embedding", "logits, stage 3"),
        ("own", "logits", ""),
    ]
    assert found["terms"][0]["projector"] == "1 Linear: 64 parameters"
    assert found["warnings"] == ["distill: nothing of the teacher changes 'own': it teaches nothing"]


def test_tracing_leaves_models_and_random_state_as_they_were() -> None:
    import timm

    models = [timm.create_model("resnet10t", num_classes=5, channels=(8, 8, 16, 16)).eval() for _ in range(2)]
    spec = ModelSpec(arch="resnet10t", num_classes=5, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, timm="none")
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in models]
    cls, state = registry.load("distill", "at"), torch.get_rng_state()
    links(cls(cls.Config()), (models[0], spec), (models[1], spec), images=20)
    assert torch.equal(torch.get_rng_state(), state)
    for model, was in zip(models, before, strict=True):
        assert all(torch.equal(t, was[n]) for n, t in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------ what is proposed
@pytest.mark.parametrize(
    ("teacher", "student", "classes", "method"),
    [
        ("cnn", "cnn", 10, "dkd"),
        ("cnn", "cnn", 2, "kd"),
        ("vit", "cnn", 10, "ofa"),
        ("cnn", "vit", 10, "ofa"),
        ("swin", "mlp", 10, "ofa"),
        ("swin", "vit", 10, "kd"),
        ("mlp", "mlp", 10, "kd"),
    ],
)
def test_the_proposed_method_depends_on_the_families_and_has_a_source(teacher: str, student: str, classes: int, method: str) -> None:
    found = advise(teacher, student, classes)
    assert found.method == method
    assert "arXiv" in found.why or classes == 2


def test_dkd_on_many_classes_has_its_imagenet_settings() -> None:
    assert advise("cnn", "cnn", 1000).settings == {"beta": 0.5, "temperature": 1.0}


@pytest.mark.parametrize("method", ["{method: auto, epochs: 3, label_weight: 2}", "{epochs: 3, label_weight: 2}"])
def test_a_method_left_open_is_proposed_and_keeps_what_was_written(recipe: Any, method: str) -> None:
    [note, _] = wire(recipe(method))["methods"]
    assert note["method"] == "ofa"
    assert "different families" in note["why"]
    assert "label_weight: 2" in wire(recipe(method))["yaml"]


@pytest.mark.parametrize(("teacher", "method"), [(CNN, "kd"), (SMALL_VIT, "ofa")])
def test_without_labels_the_proposal_needs_none(recipe: Any, tmp_path: Path, teacher: str, method: str) -> None:
    path = Path(recipe("{method: auto}", teacher=teacher))
    text = path.read_text().replace("train: {epochs: 1, label_smoothing: 0.0}", "weights: teacher.safetensors")
    (tmp_path / "teacher.safetensors").touch()
    write_images(tmp_path / "photos")
    path.write_text(text.replace("{format: digits,", "{format: image_folder, root: photos, labels: none, classes: 3,"))
    found = wire(str(path))
    assert found["methods"][0]["method"] == method
    assert "label_weight: 0.0" in found["yaml"]
    Path("pasted.yaml").write_text(path.read_text().partition("stages:")[0] + found["yaml"])
    assert load("pasted.yaml").stages[0][1].method == method


def test_settings_of_the_default_method_are_not_given_to_another(recipe: Any) -> None:
    [note, _] = wire(recipe("{temperature: 2}"))["methods"]
    assert note["method"] == "kd"


@pytest.mark.parametrize(
    ("method", "teacher", "student"),
    [
        ("{method: auto, epochs: 3}", SMALL_VIT, CNN),
        ("{method: auto, epochs: 3, augment: {policy: shift, pad: 2}, lr: 1e-5}", CNN, CNN),
        ("{}", CNN, SMALL_VIT),
        ("{method: ofa, stages: [3, 4]}", SMALL_VIT, CNN),
        ("{method: at}", CNN, CNN),
        ("{method: fitnet, weight: 50}", CNN, CNN),
        ("{method: [dkd, {at: {power: 1}}, {nd: {weight: 0.5}}]}", CNN, CNN),
    ],
)
def test_what_is_printed_can_be_pasted_and_is_what_was_proposed(recipe: Any, method: str, teacher: str, student: str) -> None:
    path = recipe(method, teacher=teacher, student=student)
    proposed = wire(path)
    text = Path(path).read_text().partition("stages:")[0] + proposed["yaml"] + "\n"
    Path("pasted.yaml").write_text(text)
    checked = run_here("check", "pasted.yaml")
    assert checked.code == 0, checked.text
    pasted = wire("pasted.yaml")
    assert [r | {"method": None} for r in pasted["terms"]] == [r | {"method": None} for r in proposed["terms"]]
    assert pasted["yaml"].partition("stages:")[2] == proposed["yaml"].partition("stages:")[2]
    before, after = chosen(load(path))[0].stages, load("pasted.yaml").stages
    assert [(k, s.name, s.method, s.config) for k, s in after if s.name != "distill"] == [
        (k, s.name, s.method, s.config) for k, s in before if s.name != "distill"
    ]
    assert after[0][1].config == before[0][1].config


def test_what_an_assistant_stands_for_is_shown_and_can_be_pasted(recipe: Any) -> None:
    found = run_here("wire", "distill/assistant", "--json").json()
    sizes = {m["model"]: m["parameters"] for m in found["models"]}
    assert sizes["student"] < sizes["assistant"] < sizes["teacher"]
    assert found["warnings"] == [], "the gap is what the assistant is there for"
    path = Path(recipe("{method: kd}"))
    path.write_text(path.read_text().partition("stages:")[0] + found["yaml"] + "\n")
    assert run_here("check", str(path)).code == 0
    assert load(str(path)).recipe.assistant == chosen(load("distill/assistant"))[0].recipe.assistant


def test_a_pasted_pair_of_stages_may_be_edited(recipe: Any) -> None:
    found = wire(recipe("{method: at, stages: [[3, 2], [2, 2]]}", teacher=CNN, student=CNN), step="distill")
    assert [(r["student"], r["teacher"]) for r in found["terms"]] == [("stage 3", "stage 2"), ("stage 2", "stage 2")]
    [row] = wire(recipe("{method: fitnet, stages: [1, 3]}", teacher=CNN, student=CNN), step="distill")["terms"]
    assert (row["student"], row["teacher"]) == ("stage 1", "stage 3")


def test_compress_and_plan_choose_the_method_that_wire_proposes(recipe: Any) -> None:
    loaded, told = chosen(load(recipe("{method: auto, label_weight: 3}")))
    settings = loaded.stages[0][1]
    assert settings.method == "ofa"
    assert settings.method_config.label_weight == 3  # type: ignore[union-attr]
    assert told[0].startswith("distill: method ofa. ")
    rows = run_here("plan", "r.yaml", "--json").json()
    assert [r["method"] for r in rows if r["step"] == "distill"] == ["ofa"]


def test_auto_takes_no_settings_of_one_method_and_no_sampled_answers(recipe: Any) -> None:
    for settings, words in (
        ("temperature: 2", "temperature: unknown field"),
        ("views: 2, sampled_classes: 4", "a sample of them is enough for kd"),
    ):
        result = run_here("check", recipe(f"{{method: auto, {settings}}}"))
        assert result.code == 2
        assert words in result.err


# ------------------------------------------------------------------------------------------------------------ warnings
SAME = Facts("cnn", "cnn", 10**6, 10**6)


def said(method: str, facts: Facts, **settings: Any) -> list[str]:
    cls = registry.load("distill", method)
    return cautions(method, cls(cls.Config(**settings)), facts)


def test_an_even_pair_has_no_warning() -> None:
    for method in registry.names("distill"):
        assert said(method, SAME) == []


def test_a_smoothed_teacher_and_a_high_temperature_are_named() -> None:
    smoothed = SAME._replace(teacher_smoothing=0.1)
    [text] = said("kd", smoothed)
    assert "temperature 4" in text
    assert "label_smoothing 0.1" in text
    assert said("kd", smoothed, temperature=1) == []
    assert said("crd", smoothed) == []  # its temperature is of scores, and low
    [text] = said("combined", smoothed, methods=[{"crd": {}}, {"dkd": {}}])
    assert text.startswith("dkd has")


def test_a_teacher_far_above_its_student_is_named() -> None:
    [text] = said("kd", SAME._replace(teacher_parameters=30 * 10**6))
    assert text.startswith("the teacher has 30 times the student's parameters")
    assert said("kd", SAME._replace(teacher_parameters=15 * 10**6)) == []


@pytest.mark.parametrize("method", ["rkd", "crd"])
def test_relations_across_families_are_named(method: str) -> None:
    [text] = said(method, SAME._replace(teacher="vit"))
    assert text.startswith(f"{method} compares images with each other")
    assert said(method, SAME._replace(teacher="swin", student="vit")) == []
    assert said("ofa", SAME._replace(teacher="vit")) == []


def test_the_recipe_s_own_smoothing_and_families_reach_the_warnings(recipe: Any) -> None:
    found = wire(recipe("{method: [kd, rkd]}", smoothing=0.2), step="distill")
    assert [text.split(" ")[1] for text in found["warnings"]] == ["kd", "rkd"]


# ------------------------------------------------------------------------------------------------------------ the command
def test_wire_prints_tables_and_yaml_and_says_warnings_apart() -> None:
    result = run_here("wire", QUICKSTART)
    assert result.code == 0, result.text
    assert "vit_tiny_patch16_224" in result.out
    assert "stages:\n- distill:\n" in result.out
    assert "warning" not in result.out


def test_wire_as_json_is_one_object_with_each_model_s_own_preprocessing() -> None:
    found = run_here("wire", QUICKSTART, "--json").json()
    assert set(found) == {"recipe", "models", "stages", "terms", "methods", "warnings", "yaml"}
    teacher, student = found["models"]
    assert (teacher["family"], student["family"]) == ("vit", "cnn")
    assert teacher["mean"] != student["mean"]


def test_no_data_are_needed_where_the_number_of_classes_is_given(recipe: Any) -> None:
    path = recipe("{method: ofa}")
    Path(path).write_text(Path(path).read_text().replace("{format: digits,", "{format: image_folder, root: nowhere,"))
    assert run_here("wire", path).code == 3
    result = run_here("wire", path, "--classes", "7", "--json")
    assert [m["classes"] for m in result.json()["models"]] == [7, 7]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("-o", "distill.method=at"), "method 'at' is not made for the pair ViT teacher, CNN student"),
        (("-o", "distill.method=[kd, at]"), "method 'at' is not made for the pair ViT teacher, CNN student"),
        (("--step", "recovr"), "there is no distill stage 'recovr'; did you mean 'recover'"),
        (("-o", "stages=[]"), "no stage of the recipe distils"),
        (
            ("-o", "teacher={onnx: t.onnx, mean: [0, 0, 0], std: [1, 1, 1]}", "-o", "distill.method=kd"),
            "only the outputs of the teacher are known",
        ),
        (("-o", "teacher={onnx: t.onnx, mean: [0, 0, 0], std: [1, 1, 1]}", "-o", "distill.method=auto"), "name one, such as kd"),
    ],
)
def test_what_cannot_be_wired_is_2_and_says_why(change: tuple[str, ...], words: str) -> None:
    result = run_here("wire", QUICKSTART, *change)
    assert result.code == 2
    assert words in result.err
