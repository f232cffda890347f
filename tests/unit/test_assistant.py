"""`assistant: auto`: what it stands for, and what a recipe may say of an assistant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from edgekd import registry
from edgekd.assistant import SMALLEST_GAP
from edgekd.errors import RecipeError, UsageError
from edgekd.models.build import build, make_spec
from edgekd.recipe import Loaded, load, resolved
from edgekd.train.distiller import Batch, Outputs
from edgekd.wiring import chosen
from tests.support import run_here

WIDE = "{arch: resnet10t, args: {channels: [48, 96, 128, 192]}"
NARROW = "{arch: resnet10t, args: {channels: [8, 8, 16, 24], stem_width: 8}}"
VIT = "{arch: vit_tiny_patch16_224, args: {img_size: 32, patch_size: 8, embed_dim: 96, num_heads: 3, depth: 4}"
RECIPE = """version: 1
data: {format: digits, image_size: 32}
teacher: TEACHER, train: {epochs: 1}}
assistant: ASSISTANT
model: STUDENT
stages: [{distill: {epochs: 2}}]
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def recipe(teacher: str, student: str, assistant: str = "auto", *overrides: str) -> Loaded:
    text = RECIPE.replace("TEACHER", teacher).replace("STUDENT", student).replace("ASSISTANT", assistant)
    Path("r.yaml").write_text(text)
    return load("r.yaml", overrides)


def parameters(config: Any) -> int:
    return sum(p.numel() for p in build(make_spec(config, num_classes=10, image_size=32)).parameters())


@pytest.mark.parametrize(
    ("teacher", "student", "arch"),
    [
        (WIDE, NARROW, "resnet10t"),  # the student, wider
        ("{arch: resnet50", "{arch: mobilenetv3_small_050}", "mobilenetv3"),  # its siblings
        (VIT, NARROW, "resnet10t"),
        (VIT.replace("96", "192"), "{arch: vit_tiny_patch16_224, args: {img_size: 32, patch_size: 8, embed_dim: 24, num_heads: 3}}", "vit"),
    ],
    ids=["wider", "siblings", "of the student's kind", "transformers"],
)
def test_auto_is_a_model_of_the_student_s_kind_near_the_middle_of_both_sizes(teacher: str, student: str, arch: str) -> None:
    before = recipe(teacher, student)
    loaded, [said] = chosen(before)
    found = loaded.recipe.assistant
    assert found is not None
    assert str(found.arch).startswith(arch)
    small, middle, large = (parameters(m) for m in (loaded.recipe.model, found, loaded.recipe.teacher))
    assert small * 1.25 <= middle <= large / 1.25
    assert 0.5 < middle / (small * large) ** 0.5 < 2
    assert str(middle) in said
    rows = {r["path"]: r for r in resolved(loaded)}
    assert (rows["assistant.arch"]["value"], rows["assistant.arch"]["source"]) == (found.arch, "assistant: auto")


def test_models_of_nearly_one_size_need_none_between() -> None:
    loaded, [said] = chosen(recipe("{arch: resnet14t", "{arch: resnet10t}"))
    assert loaded.recipe.assistant is None
    assert f"{SMALLEST_GAP:g} times" in said


def test_where_nothing_lies_between_a_name_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekd.assistant._siblings", lambda arch: [])
    with pytest.raises(UsageError, match="no architecture was found") as caught:
        chosen(recipe("{arch: resnet50", "{arch: mobilenetv3_small_050}"))
    assert "assistant={arch: NAME}" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("assistant", "overrides", "words"),
    [
        ("resnet18", ["stages=[{train: {epochs: 1}}, {distill: {epochs: 1}}]"], "it serves the first stage"),
        ("resnet18", ["teacher=null", "stages=[{train: {epochs: 1}}]"], "the recipe lacks one of them"),
        ("resnet1", [], "unknown architecture 'resnet1'"),
        ("{arch: resnet1}", [], "assistant.arch: unknown architecture 'resnet1'"),
        ("{args: {depth: 2}}", [], "expected auto, the name of an architecture"),
        ("{arch: resnet18, image_size: 64}", [], "assistant.image_size: an assistant is trained here"),
        ("{arch: auto, args: {depth: 2}}", [], "auto finds the architecture"),
        ("auto", ["teacher={onnx: t.onnx, mean: [0, 0, 0], std: [1, 1, 1]}"], "only the teacher's outputs are known"),
    ],
)
def test_what_cannot_be_an_assistant_is_said_with_its_place(assistant: str, overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(WIDE, NARROW, assistant, *overrides)
    assert words in str(caught.value)


def test_kd_with_the_papers_weights_has_their_loss() -> None:
    """methods/vision2.md section 16: (1 - l) CE + l T^2 KL as a mean over the batch, l 0.5, T 5."""
    student, teacher = (torch.sin(torch.arange(12.0).double() * k).reshape(3, 4) for k in (1.0, 0.7))
    target = torch.tensor([0, 1, 2])
    kd = registry.load("distill", "kd")
    distiller = kd(kd.Config(weight=0.5, temperature=5, label_weight=0.5))
    [term] = distiller.terms(Batch(Outputs(student), Outputs(teacher), target, target, 0.0)).values()
    p, q = (F.softmax(z / 5, dim=1) for z in (teacher, student))
    expected = 0.5 * 25 * (p * (p / q).log()).sum(1).mean() + 0.5 * F.cross_entropy(student, target)
    assert float(term + distiller.config.label_weight * F.cross_entropy(student, target)) == pytest.approx(float(expected), rel=1e-9)


def test_an_assistant_that_does_not_fit_the_images_fails_before_any_training(home: Path) -> None:
    recipe(WIDE, NARROW, "{arch: vit_tiny_patch16_224, args: {img_size: 64, depth: 1}}")
    result = run_here("compress", "r.yaml")
    assert result.code == 3, result.err
    assert "preflight of stage 'assistant'" in result.err
    assert "] teacher\n" not in result.err


def test_a_name_alone_has_its_place_as_source() -> None:
    rows = {r["path"]: r for r in resolved(recipe(WIDE, NARROW, "resnet14t"))}
    assert (rows["assistant.arch"]["value"], rows["assistant.arch"]["source"]) == ("resnet14t", "r.yaml:4:1")


def test_plan_shows_the_steps_of_an_assistant(home: Path) -> None:
    recipe(WIDE, NARROW)
    result = run_here("plan", "r.yaml", "--json")
    assert result.code == 0, result.err
    assert {"assistant", "distill", "distill.assisted", "distill.assistant"} <= {r["step"] for r in result.json()}
