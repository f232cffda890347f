"""Planning: the steps of a recipe, their wiring by kind, and keys that change with everything that can change a result and with nothing else."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekd import registry
from edgekd.artifact import Kind, Manifest, digest_of
from edgekd.backends.openvino import OpenVino
from edgekd.config import Config
from edgekd.errors import BackendError, CheckpointRefused, FileMissing
from edgekd.forecast import forecast
from edgekd.plan import Choice, Outlook, Plan, Ref, Step, build_plan, state_of
from edgekd.profile.device import load_device
from edgekd.recipe import load
from edgekd.stages._stage import Settings

REPOSITORY = Path(__file__).parents[2]
HEAD = "version: 1\ndata: {format: digits, image_size: 32}\n"
BARE = HEAD + "model: {arch: resnet10t}\n"
TAUGHT = BARE + "teacher: {arch: resnet18, train: {epochs: 2}}\n"
CHAIN = (
    TAUGHT
    + "stages:\n  - distill: {epochs: 3}\n  - prune: {target: {macs: 0.5}}\n  - train: {name: recover, epochs: 2}\n  - quantize: {}\n"
)
TWICE = CHAIN.replace(
    "  - quantize", "  - prune: {name: again, target: {params: 0.5}}\n  - distill: {name: recover2, epochs: 2}\n  - quantize"
)
RECIPES = {
    "quickstart": "",
    "no stages, no teacher": BARE,
    "trained, no teacher": BARE + "stages: [{train: {epochs: 2}}]\n",
    "pruned at once": BARE + "stages: [{prune: {target: {macs: 0.5}}}, {train: {epochs: 2}}]\n",
    "quantized only": BARE + "stages: [{quantize: {}}]\n",
    "fixed speed": BARE + "stages: [{train: {epochs: 2, autocast: 'off', channels_last: 'off', compile: 'off'}}]\n",
    "teacher with weights": BARE + "teacher: {arch: resnet18, weights: teacher.safetensors}\nstages: [{distill: {epochs: 2}}]\n",
    "ONNX file": HEAD + "model: {onnx: model.onnx}\nstages: [{quantize: {}}]\n",
    "two prunes": TWICE,
    "two targets": CHAIN + "targets: {host: {}, rpi5: {budget: {p95_ms: 40}}}\n",
    "away first": CHAIN + "targets: {rpi5: {}, host: {precision: fp32}}\n",
    "rounded in training": CHAIN.replace("quantize: {}", "quantize: {method: qat}") + "targets: {host: {}, rpi5: {}}\n",
    "baseline": CHAIN + "baselines: [student]\n",
    "assisted": CHAIN + "assistant: resnet14t\n",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("model.onnx", "teacher.safetensors"):
        (tmp_path / name).write_bytes(name.encode())  # planning hashes these files and reads no further
    monkeypatch.setattr(OpenVino, "available", lambda self: "not installed")  # whatever this machine has
    return tmp_path


def planned(recipe: str, *overrides: str, gate: bool = True) -> Plan:
    if text := RECIPES.get(recipe, recipe):
        Path("r.yaml").write_text(text)
    return build_plan(load("r.yaml" if text else "quickstart", overrides), gate=gate)


def names(recipe: str) -> list[str]:
    return [s.name for s in planned(recipe).steps]


def taught(name: str) -> list[str]:
    return [f"{name}.speed", name, f"{name}.export", f"{name}.engine", f"{name}.val"]


def distilled(name: str) -> list[str]:
    """Without augmentation a teacher says the same in every epoch: its answers are kept."""
    return [f"{name}.speed", f"{name}.answers.speed", f"{name}.answers", *taught(name)[1:]]


def reuses(steps: list[str]) -> list[str]:
    """The same where the answers to the same views were kept before."""
    return [s for s in steps if not s.endswith((".answers", ".answers.speed"))]


def cut(name: str) -> list[str]:
    return [f"{name}.widths", name, f"{name}.export", f"{name}.engine", f"{name}.val"]


def rounded(name: str) -> list[str]:
    return [f"{name}.trial", name, f"{name}.engine", f"{name}.val", f"{name}.gate"]


def ended(target: str, *, check: bool = False, teacher: bool = False) -> list[str]:
    first = ["compile", "check"] if check else ["compile"]
    return (
        [f"{target}.{s}" for s in first] + ["teacher.test"] * teacher + [f"{target}.{s}" for s in ("test", "profile", "parity", "bundle")]
    )


def start(*, teacher: str = "") -> list[str]:
    return ["data", "student", *([teacher] if teacher else []), "preflight"]


STUDENT = ["student.export", "student.engine", "student.val"]
TEACHER = [*start(teacher="teacher.init"), *taught("teacher")]
SEGMENT = [*cut("prune"), *taught("recover"), "prune.gate"]


# ------------------------------------------------------------------------------------------------------------ steps
@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("quickstart", [*TEACHER, *taught("distill"), *SEGMENT, *rounded("quantize"), *ended("host", teacher=True)]),
        ("no stages, no teacher", [*start(), *STUDENT, *ended("host")]),
        ("trained, no teacher", [*start(), *taught("train"), *ended("host")]),
        ("pruned at once", [*start(), *STUDENT, *cut("prune"), *taught("train"), "prune.gate", *ended("host")]),
        ("quantized only", [*start(), *STUDENT, *rounded("quantize"), *ended("host")]),
        ("fixed speed", [*start(), *taught("train")[1:], *ended("host")]),
        (
            "teacher with weights",
            [
                *start(teacher="teacher"),
                "teacher.export",
                "teacher.engine",
                "teacher.val",
                *distilled("distill"),
                *ended("host", teacher=True),
            ],
        ),
        ("ONNX file", ["data", "model", "model.engine", "model.val", *rounded("quantize"), *ended("host")]),
        (
            "two prunes",
            [
                *(*TEACHER, *distilled("distill"), *SEGMENT, *cut("again"), *taught("recover2"), "again.gate"),
                *(*rounded("quantize"), *ended("host", teacher=True)),
            ],
        ),
        (
            "two targets",
            [
                *(*TEACHER, *distilled("distill"), *SEGMENT, *rounded("quantize"), *rounded("quantize@rpi5")),
                *(*ended("host", teacher=True), *ended("rpi5", check=True)),
            ],
        ),
        (
            "away first",
            [*TEACHER, *distilled("distill"), *SEGMENT, *rounded("quantize"), *ended("rpi5", check=True, teacher=True), *ended("host")],
        ),
        (
            "rounded in training",
            [
                *(*TEACHER, *distilled("distill"), *SEGMENT, "quantize.train.speed", "quantize.train", "quantize.train.export"),
                *(*rounded("quantize")[1:], *rounded("quantize@rpi5")[1:]),  # one training for all targets
                *(*ended("host", teacher=True), *ended("rpi5", check=True)),
            ],
        ),
        (
            "assisted",
            [
                *(*start(teacher="teacher.init")[:-1], "assistant.init", "preflight", *taught("teacher")),
                *(*distilled("distill"), *reuses(distilled("assistant"))),
                *(*distilled("distill.assisted"), "distill.assistant", *SEGMENT),
                *(*rounded("quantize"), *ended("host", teacher=True)),
            ],
        ),
        (
            "baseline",
            [
                *TEACHER,
                *distilled("distill"),
                *SEGMENT,
                *rounded("quantize"),
                *taught("student alone"),
                "student alone.test",
                *ended("host", teacher=True),
            ],
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_recipe_has_the_steps_that_it_needs_in_order(recipe: str, expected: list[str]) -> None:
    assert names(recipe) == expected


def test_every_recipe_of_this_file_is_expected_somewhere() -> None:
    [mark] = [m for m in test_a_recipe_has_the_steps_that_it_needs_in_order.pytestmark if m.name == "parametrize"]  # type: ignore[attr-defined]
    assert {p[0] for p in mark.args[1]} == set(RECIPES)


def test_a_target_that_is_away_is_judged_here_and_compiled_for_itself() -> None:
    plan = planned("away first")
    assert plan.judge is not None
    assert (plan.judge.name, plan.judge.backend, plan.judge.runs_here) == ("host", "onnxruntime", True)
    assert [t.runs_here for t in plan.targets] == [False, True]
    assert plan.step("rpi5.compile").settings.config.device == "rpi5"  # type: ignore[attr-defined]
    assert plan.step("rpi5.test").inputs["engine"] == "rpi5.check"
    assert plan.step("prune.gate").settings.config.timed is False  # type: ignore[attr-defined]


@pytest.mark.parametrize(("asked", "given"), [(0, 4), (1, 1), (3, 3)])
def test_threads_are_as_asked_for_or_one_a_core_of_the_profile(asked: int, given: int) -> None:
    plan = planned("quantized only", "targets={rpi5: {}}", f"targets.rpi5.threads={asked}")
    configs = {name: plan.step(f"rpi5.{name}").settings.config for name in ("compile", "bundle")}
    assert {name: config.threads for name, config in configs.items()} == {"compile": given, "bundle": given}  # type: ignore[attr-defined]
    here = load_device("host").arch.cores or 1
    assert plan.step("rpi5.check").settings.config.threads == (asked or here)  # type: ignore[attr-defined]  # judged on this machine


def test_a_target_whose_runtime_has_no_int8_is_left_out_of_quantizing_and_that_is_said() -> None:
    plan = planned("quickstart", "targets={host: {}, jetson-orin-nano: {backend: onnxruntime}}")
    assert [s.name for s in plan.steps if s.stage == "quantize"] == ["quantize"]
    assert plan.notes == ["jetson-orin-nano: 'quantize' is left out, its onnxruntime does not compute in int8"]
    places = {p.device: (p.runs, p.leaves_out) for p in plan.step("preflight").settings.config.places}  # type: ignore[attr-defined]
    assert places == {"host": (True, ()), "jetson-orin-nano": (False, ("quantize",))}


def test_preflight_leaves_out_what_a_target_will_not_get() -> None:
    plan = planned("quickstart", "targets={host: {precision: fp32}}")
    assert [p.leaves_out for p in plan.step("preflight").settings.config.places] == [("quantize",)]  # type: ignore[attr-defined]


def test_packed_weights_are_left_out_for_runtimes_that_build_engines() -> None:
    plan = planned("quickstart", "targets={jetson-orin-nano: {backend: tensorrt}}", "quantize.method=weight_only")
    assert not [s.name for s in plan.steps if s.stage == "quantize"]
    assert any("tensorrt does not take packed weights" in note for note in plan.notes)


def test_a_runtime_of_this_machine_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.backends.openvino import OpenVino

    monkeypatch.setattr(OpenVino, "available", lambda self: "openvino is not installed: pip install it")
    with pytest.raises(BackendError, match="not installed"):
        planned("quickstart", "targets={host: {backend: openvino}}")


def test_a_target_without_a_builder_here_never_gets_the_engine_of_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekd.backends.tensorrt import TensorRT

    monkeypatch.setattr(TensorRT, "available", lambda self: None)
    monkeypatch.setattr(TensorRT, "runs_on", lambda self, device: device.id == "nvidia-h200")
    monkeypatch.setattr(TensorRT, "builds_for", lambda self, device: None if device.id == "nvidia-h200" else "not here")
    plan = planned("quickstart", "targets={nvidia-h200: {}, jetson-orin-nano: {}}")
    config = plan.step("jetson-orin-nano.compile").settings.config
    assert (config.device, config.backend) == ("host", "onnxruntime")  # type: ignore[attr-defined]


def test_widths_are_multiples_of_what_the_first_target_prefers_wherever_it_is_judged() -> None:
    def quantum(*overrides: str) -> int:
        step = planned("quickstart", *overrides).step("prune.widths")
        return int(step.settings.facts["judge"]["quantum"])

    assert quantum("targets={rpi5: {precision: fp32}}") == 8
    assert quantum("targets={rpi5: {}}") == 16
    assert quantum("targets={nvidia-h200: {backend: onnxruntime}}") == 8
    assert quantum("targets={nvidia-h200: {}}") == 32


def test_each_target_is_quantized_in_the_flavour_of_its_device() -> None:
    plan = planned("two targets")
    flavours = {n: plan.step(n).settings.facts["flavour"] for n in ("quantize", "quantize@rpi5")}
    assert flavours["quantize@rpi5"] == "s8s8"
    assert flavours["quantize"] == plan.targets[0].device.flavour_for("onnxruntime")


def test_the_baseline_trains_as_long_as_the_first_learning_stage_and_without_a_teacher() -> None:
    step = planned("baseline").step("student alone")
    assert step.stage == "train"
    assert step.settings.config.epochs == 3  # type: ignore[attr-defined]
    assert step.inputs["model"] == "student"
    test = planned("baseline").step("student alone.test")  # compared as what ships is: on test
    assert (test.settings.config.split, test.inputs["engine"]) == ("test", "student alone.engine")  # type: ignore[attr-defined]


def test_a_device_without_a_backend_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.names
    monkeypatch.setattr(registry, "names", lambda kind: () if kind == "backend" else real(kind))
    with pytest.raises(BackendError, match="edgekd has no backend for 'host'"):
        planned("no stages, no teacher")


# ------------------------------------------------------------------------------------------------------------ wiring
def refs(ref: Ref) -> Iterator[str]:
    """Every step that a reference may stand for."""
    if isinstance(ref, str):
        yield ref
    else:
        for option in ref.options.values():
            yield from refs(option)


def decisions(ref: Ref) -> Iterator[str]:
    if isinstance(ref, Choice):
        yield ref.decision
        for option in ref.options.values():
            yield from decisions(option)


def asked(step: Step, name: str) -> Kind:
    takes = registry.load("stage", step.stage).takes
    kind: Kind = takes["*"] if name.startswith("*") else takes[name]
    return kind


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_input_is_of_the_kind_that_its_stage_takes_and_made_before(recipe: str) -> None:
    made: dict[str, Kind] = {}
    plan = planned(recipe)
    for step in plan.steps:
        for name, ref in step.inputs.items():
            assert {made[s] for s in refs(ref)} == {asked(step, name)}, (step.name, name)
            assert {made[d] for d in decisions(ref)} <= {Kind.DECISION}, (step.name, name)
        if step.unless is not None:
            decision, instead = step.unless
            assert made[decision] is Kind.DECISION
            readers = [s for s in plan.steps if any(step.name in {*refs(r), *decisions(r)} for r in s.inputs.values())]
            alone = all(
                r.unless is not None and r.unless[0] == decision for r in readers
            )  # skipped with it, so nobody reads what stands for it
            assert {made[s] for s in refs(instead)} == {step.gives} or alone, step.name
        assert step.name not in made
        made[step.name] = step.gives


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_step_has_all_inputs_that_its_stage_must_have(recipe: str) -> None:
    for step in planned(recipe).steps:
        takes = registry.load("stage", step.stage).takes
        assert {n for n in takes if not n.endswith("?") and n != "*"} <= step.inputs.keys(), step.name
        assert {n for n in step.inputs if not n.startswith("*")} <= takes.keys(), step.name
        assert isinstance(step.settings.config, registry.load("stage", step.stage).Config) or step.stage == "widths"


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_ships_goes_through_every_gate_of_its_target(recipe: str) -> None:
    plan = planned(recipe)
    gates = {target: [d for d in decisions(ref) if d.endswith((".gate", ".assistant"))] for target, ref in plan.shipped.items()}
    for target, found in gates.items():
        expected = {s.gate for s in plan.segments if "@" not in s.gate or s.gate.split("@")[1] == f"{target}.gate"}
        graph_level = {g for g in expected if g == "quantize.gate" and target != plan.targets[0].name}
        assert set(found) == expected - graph_level, target


def test_a_second_segment_starts_from_what_the_first_gate_chose() -> None:
    plan = planned("two prunes")
    chosen = Choice.of_gate("prune.gate", "distill", "recover")
    assert plan.step("again").inputs["model"] == chosen
    assert plan.step("again").unless == ("again.widths", chosen)
    assert plan.step("again.gate").inputs["before"] == Choice.of_gate("prune.gate", "distill.engine", "recover.engine")
    assert plan.step("again.engine").unless == ("again.widths", Choice.of_gate("prune.gate", "distill.engine", "recover.engine"))


def test_the_assisted_student_learns_from_the_assistant_and_its_own_kept_answers() -> None:
    plan = planned("assisted")
    direct, assistant, assisted = (plan.step(n).inputs for n in ("distill", "assistant", "distill.assisted"))
    assert (direct["teacher?"], assistant["teacher?"], assisted["teacher?"]) == ("teacher", "teacher", "assistant")
    assert direct["model"] == assisted["model"] == "student"
    assert direct["answers?"] == assistant["answers?"] == "distill.answers"
    assert assisted["answers?"] == "distill.assisted.answers"
    assert plan.step("distill.assisted.answers").inputs["teacher?"] == "assistant"
    assert plan.step("prune").inputs["model"] == Choice.of_gate("distill.assistant", "distill", "distill.assisted")


def test_the_lessons_of_an_assistant_are_plain_kd_with_the_settings_of_the_stage() -> None:
    text = BARE + "teacher: {arch: vit_tiny_patch16_224, args: {img_size: 32, patch_size: 8}, train: {epochs: 2}}\nassistant: resnet14t\n"
    plan = planned(text + "stages:\n  - distill: {method: ofa, epochs: 3, lr: 1e-4}\n")
    for name in ("assistant", "distill.assisted"):
        step = plan.step(name).settings
        assert (step.method, step.config.epochs, step.config.lr) == ("kd", 3, 1e-4)  # type: ignore[attr-defined]
    assert plan.step("distill").settings.method == "ofa"


# ------------------------------------------------------------------------------------------------------------ races
@pytest.fixture
def two_runtimes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVino, "available", lambda self: None)


def test_every_quantizing_stage_starts_from_the_fp32_graph_and_is_gated_against_what_was_kept() -> None:
    text = (
        BARE + "stages: [{quantize: {search: 6}}, {quantize: {name: packed, method: weight_only}}, {quantize: {name: again, search: 6}}]\n"
    )
    plan = planned(text)
    for name in ("quantize", "quantize.sensitivity", "quantize.mix", "packed", "again", "again.sensitivity", "again.trial"):
        assert plan.step(name).inputs["graph"] == "student.export", name
    kept = Choice.of_gate("quantize.gate", "student.engine", "quantize.engine")
    assert plan.step("packed.gate").inputs["before"] == kept
    assert plan.step("again.gate").inputs["before"] == Choice.of_gate("packed.gate", kept, "packed.engine")
    assert plan.step("host.parity").inputs["fp32"] == "student.export"


def test_a_file_is_read_with_whether_it_will_be_quantized() -> None:
    assert planned("ONNX file").step("model").settings.facts["quantizes"] is True
    assert planned(HEAD + "model: {onnx: model.onnx}\n").step("model").settings.facts["quantizes"] is False


@pytest.mark.usefixtures("two_runtimes")
def test_where_two_runtimes_are_here_all_of_their_graphs_race() -> None:
    plan = planned("ONNX file", "quantize.search=8")
    candidates = plan.races["host"].engines
    assert list(candidates) == [f"{b} {form}" for b in ("onnxruntime", "openvino") for form in ("fp32", "quantize", "quantize, searched")]
    chosen = plan.shipped["host"]
    assert isinstance(chosen, Choice)
    device = plan.targets[0].device
    one = device.flavour_for("onnxruntime") == device.flavour_for("openvino")  # one flavour, one file
    for backend, graph in (("onnxruntime", "quantize"), ("openvino", "quantize" if one else "quantize@openvino")):
        assert chosen.options[f"{backend} quantize"] == graph
        assert plan.step(graph).settings.facts["flavour"] == device.flavour_for(backend)
    assert chosen.options["openvino fp32"] == "model"
    searches = {s.name: s.settings.config.backend for s in plan.steps if s.stage == "mix"}  # type: ignore[attr-defined]
    assert sorted(searches.values()) == ["onnxruntime", "openvino"]
    assert plan.step("host.bundle").inputs["engine"] == Choice("host.race", candidates)
    assert plan.step("host.parity").inputs["fp32"] == "model"
    assert "quantize.gate" not in {s.name for s in plan.steps}


@pytest.mark.usefixtures("two_runtimes")
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("targets.host.precision=fp32", ["onnxruntime fp32", "openvino fp32"]),
        ("targets.host.precision=int8", ["onnxruntime quantize", "openvino quantize"]),
        ("targets.host.backend=openvino", None),
        ("targets.host.backend=onnxruntime", None),
    ],
)
def test_a_target_that_settles_its_runtime_or_precision_races_what_it_left_open(override: str, expected: list[str] | None) -> None:
    plan = planned("quantized only", override)
    assert (list(plan.races["host"].engines) if plan.races else None) == expected


@pytest.mark.usefixtures("two_runtimes")
def test_a_trained_quantizer_races_against_the_graph_that_it_was_not_trained_from() -> None:
    plan = planned("rounded in training")
    before = Choice.of_gate("prune.gate", "distill.export", "recover.export")
    fp32 = plan.step("host.parity").inputs["fp32"]
    assert isinstance(fp32, Choice)
    assert fp32.options["openvino fp32"] == before
    assert fp32.options["openvino quantize"] == "quantize.train.export"
    assert "rpi5" not in plan.races


@pytest.mark.usefixtures("two_runtimes")
@pytest.mark.parametrize("recipe", RECIPES)
def test_races_are_wired_by_kind_too(recipe: str) -> None:
    test_every_input_is_of_the_kind_that_its_stage_takes_and_made_before(recipe)
    test_every_step_has_all_inputs_that_its_stage_must_have(recipe)


# ------------------------------------------------------------------------------------------------------------ keys
def keys(plan: Plan, seed: int | None = None) -> dict[str, str]:
    """Keys as a run finds them whose steps give other bytes for another key, and whose gates keep everything."""
    found: dict[str, str] = {}

    def digest(ref: Ref) -> str:
        return found[ref] if isinstance(ref, str) else digest(ref.options["after"])

    for step in plan.steps:
        found[step.name] = step.key({n: digest(r) for n, r in step.inputs.items()}, plan.loaded.recipe.seed if seed is None else seed)
    return found


def changed(before: Plan, after: Plan) -> set[str]:
    old, new = keys(before), keys(after)
    return {n for n in new if old.get(n) != new[n]}


def test_planning_twice_gives_the_same_keys_and_equal_work_is_one_entry() -> None:
    first = keys(planned("two targets"))
    assert keys(planned("two targets")) == first
    sharing = [{n for n, k in first.items() if k == key} for key in set(first.values())]
    assert sorted(map(sorted, (s for s in sharing if len(s) > 1))) == [
        ["host.compile", "quantize.engine"],
        ["quantize@rpi5.engine", "rpi5.check"],
    ]


def after(plan: Plan, name: str) -> set[str]:
    """The step and everything that depends on it."""
    found = {name}
    for step in plan.steps:
        if any({*refs(r), *decisions(r)} & found for r in step.inputs.values()):
            found.add(step.name)
    return found


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("distill.epochs=4", "distill.speed"),
        ("distill.temperature=2", "distill"),
        ("distill.augment.pad=1", "distill.answers"),
        ("recover.lr=0.1", "recover"),
        ("quantize.samples=9", "quantize.trial"),
        ("data.image_size=40", "data"),
        ("data.split.val=0.2", "data"),
        ("model.args={drop_rate: 0.1}", "student"),
        ("teacher.train.epochs=3", "teacher.speed"),
    ],
)
def test_a_change_reaches_its_step_and_what_depends_on_it(override: str, first: str) -> None:
    """Preflight looks at the settings of every stage; what follows it does not read it."""
    plan = planned("two targets")
    assert changed(plan, planned("two targets", override)) - {"preflight"} - quantized(first) == after(plan, first) - {"preflight"}


def quantized(first: str) -> set[str]:
    """One quantize stage stands for a step a target."""
    return (
        {f"quantize@rpi5{s}" for s in (".trial", "", ".engine", ".val", ".gate")} | set(ended("rpi5", check=True))
        if first == "quantize.trial"
        else set()
    )


def test_more_epochs_of_distillation_leave_all_of_the_teacher_alone() -> None:
    plan = planned("quickstart")
    moved = changed(plan, planned("quickstart", "distill.epochs=2"))
    assert {"distill", "distill.export", "prune", "recover", "host.bundle"} <= moved
    assert not moved & {"data", "student", "preflight", "teacher.test", *(s.name for s in plan.steps if s.name.startswith("teacher"))}


@pytest.mark.parametrize(
    "override",
    [
        "distill.log_seconds=9",
        "recover.log_seconds=9",
        "teacher.train.log_seconds=9",
        "data.workers=7",
        "data.cache=off",
        "data.root=elsewhere",
    ],
)
def test_what_cannot_change_a_result_changes_no_key(override: str) -> None:
    assert changed(planned("two prunes"), planned("two prunes", override)) == set()


def test_weights_that_moved_change_no_key_and_weights_that_changed_do(here: Path) -> None:
    plan = planned("teacher with weights")
    (here / "moved.safetensors").write_bytes((here / "teacher.safetensors").read_bytes())
    assert changed(plan, planned("teacher with weights", "teacher.weights=moved.safetensors")) == set()
    (here / "teacher.safetensors").write_bytes(b"other")
    assert changed(plan, planned("teacher with weights")) == after(plan, "teacher")


def test_an_onnx_file_that_changed_changes_its_key(here: Path) -> None:
    plan = planned("ONNX file")
    (here / "model.onnx").write_bytes(b"other")
    assert changed(plan, planned("ONNX file")) == after(plan, "model")


def test_a_trained_quantizer_compares_with_what_it_trained() -> None:
    plan = planned("rounded in training")
    before = Choice.of_gate("prune.gate", "distill.export", "recover.export")
    for name, target in (("quantize", "host"), ("quantize@rpi5", "rpi5")):
        inputs = plan.step(name).inputs
        assert (inputs["graph"], inputs["grid?"]) == ("quantize.train.export", "quantize.train")
        assert plan.step(f"{target}.parity").inputs["fp32"] == Choice.of_gate(f"{name}.gate", before, "quantize.train.export")
        assert plan.shipped[target] == Choice.of_gate(f"{name}.gate", before, name)
    training = plan.step("quantize.train")
    assert training.inputs["teacher?"] == "teacher"
    assert training.inputs["model"] == Choice.of_gate("prune.gate", "distill", "recover")
    assert plan.step("quantize@rpi5").settings.facts["flavour"] == "s8s8"


def test_a_budget_concerns_gates_only() -> None:
    direct = ingredients_changed(planned("quickstart"), planned("quickstart", "targets.host.budget={p95_ms: 3}"))
    assert direct == {"prune.gate", "quantize.gate"}


def ingredients_changed(before: Plan, after: Plan) -> set[str]:
    """Steps whose own settings differ, whatever their inputs."""
    old, new = ({s.name: s.key({}, 0) for s in plan.steps} for plan in (before, after))
    return {n for n in new if old[n] != new[n]}


def test_another_seed_changes_every_key() -> None:
    plan = planned("quickstart")
    assert keys(plan).keys() == changed(plan, planned("quickstart", "seed=1"))


def test_the_gate_switch_changes_what_decides_and_no_training() -> None:
    moved = ingredients_changed(planned("quickstart"), planned("quickstart", gate=False))
    assert moved == {
        "teacher.val",
        "prune.widths",
        "prune.gate",
        "quantize.gate",
    }  # teacher.val: no gate lets a teacher at chance level pass


def test_a_replayed_decision_has_a_key_of_its_own() -> None:
    step = planned("quickstart").step("prune.gate")
    assert len({step.key({}, 0), step.key({}, 0, {"chosen": "after"}), step.key({}, 0, {"chosen": "before"})}) == 3


def fields(config: type[Config]) -> list[tuple[str, bool]]:
    """(field, is part of keys)."""
    return [
        (n, not (isinstance(f.json_schema_extra, dict) and f.json_schema_extra.get("key") is False)) for n, f in config.model_fields.items()
    ]


ALL_FIELDS = [
    *((s, None, n, keyed) for s in registry.names("stage") for n, keyed in fields(registry.load("stage", s).Config)),
    *(
        (s, m, n, keyed)
        for s in registry.names("stage")
        if (kind := getattr(registry.load("stage", s), "method_kind", None))
        for m in registry.names(kind)
        for n, keyed in fields(registry.load(kind, m).Config)
    ),
]


@pytest.mark.parametrize(("stage", "method", "field", "keyed"), ALL_FIELDS, ids=str)
def test_every_field_of_every_stage_and_method_is_in_its_key_unless_marked(stage: str, method: str | None, field: str, keyed: bool) -> None:
    cls = registry.load("stage", stage)
    own = cls.Config.model_construct()
    other = registry.load(cls.method_kind, method).Config() if method else None

    def key(own: Config, other: Config | None) -> str:
        return Step("x", stage, Settings("x", own, method, other), {}).key({}, 0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the changed value need not be a sensible one
        before = key(own, other)
        target = other or own
        value = ({"ofa": {}},) if method == "combined" and field == "methods" else "another value"  # its key has the code of what it names
        changed = target.model_copy(update={field: value})
        assert ((key(own, changed) if other else key(changed, None)) != before) is keyed


@pytest.mark.parametrize("ingredient", ["store", "stage", "config", "method", "facts", "inputs", "libraries", "seed", "replayed"])
def test_every_ingredient_is_part_of_the_key(ingredient: str) -> None:
    step = planned("quickstart").step("distill")
    found = step.ingredients({"model": "a"}, 0)
    assert digest_of(found) == step.key({"model": "a"}, 0)
    assert digest_of(found | {ingredient: "other"}) != digest_of(found)


@pytest.mark.parametrize(
    ("kind", "name", "steps"),
    [
        ("distill", "ofa", {"distill", "preflight"}),
        ("criterion", "l1", {"prune", "prune.widths", "preflight"}),
        ("quantize", "ptq", {"quantize.trial", "quantize", "preflight"}),
        ("format", "digits", {"data"}),
        ("stage", "export", {"teacher.export", "distill.export", "prune.export", "recover.export"}),
        ("backend", "onnxruntime", {f"{n}.engine" for n in ("teacher", "distill", "prune", "recover", "quantize")} | {"host.compile"}),
        (
            *("task", "classification"),
            {
                "preflight",
                "teacher",
                "distill",
                "recover",
                "prune",
                "prune.widths",
                "prune.gate",
                "quantize.trial",
                "quantize.gate",
                "host.parity",
                "host.bundle",
            }
            | {"teacher.test", "host.test", *(f"{n}.val" for n in ("teacher", "distill", "prune", "recover", "quantize"))},
        ),
    ],
)
def test_changed_code_of_a_method_changes_the_keys_that_depend_on_it(
    kind: str, name: str, steps: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, real = planned("quickstart"), registry.source_of
    old = {s.name: s.key({}, 0) for s in before.steps}
    monkeypatch.setattr(registry, "source_of", lambda k, n: real(k, n) + b"# changed" * ((k, n) == (kind, name)))
    assert {s.name for s in planned("quickstart").steps if s.key({}, 0) != old[s.name]} == steps


def test_changed_code_of_a_users_architecture_changes_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned("quickstart")
    monkeypatch.setattr("edgekd.plan.user_source", lambda arch: "hash" if arch == "resnet10t" else None)
    assert ingredients_changed(plan, planned("quickstart")) == {"student"}


def test_a_library_of_another_version_changes_the_keys_of_the_stages_that_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned("quickstart")
    old = {s.name: s.key({}, 0) for s in plan.steps}
    monkeypatch.setattr("edgekd.plan.library_version", lambda name: "9" if name == "torch" else _version(name))
    moved = {s.name for s in plan.steps if s.key({}, 0) != old[s.name]}
    assert {"student", "distill", "prune", "distill.export"} <= moved
    assert not moved & {"data", "distill.engine", "distill.val", "quantize", "host.profile"}


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


# ------------------------------------------------------------------------------------------------------------ refusals
def test_weights_that_are_not_there_are_said_while_planning(here: Path) -> None:
    (here / "teacher.safetensors").unlink()
    with pytest.raises(FileMissing, match=r"teacher\.safetensors"):
        planned("teacher with weights")


def test_weights_of_another_hash_than_the_recipe_names_are_refused_while_planning() -> None:
    import hashlib

    right = hashlib.sha256(b"teacher.safetensors").hexdigest()
    planned("teacher with weights", f"teacher.sha256='{right}'")
    with pytest.raises(CheckpointRefused, match=f"its SHA-256 is {right}"):
        planned("teacher with weights", f"teacher.sha256='{'0' * 64}'")


# ------------------------------------------------------------------------------------------------------------ states
def test_the_state_of_a_fresh_plan_is_to_run_and_what_follows_a_gate_waits_for_it() -> None:
    states = {o.step.name: o.state for o in state_of(planned("quickstart"), lambda _: None, {}, lambda _: None)}
    assert states["data"] == states["distill"] == states["prune.gate"] == "run"
    assert states["quantize"] == states["host.bundle"] == "depends on gate"


def outlook(*overrides: str, recipe: str = "no stages, no teacher", held: tuple[Manifest, ...] = ()) -> list[Outlook]:
    at = {m.key: m for m in held}
    return list(state_of(planned(recipe, *overrides), at.get, {}, lambda _: None))


def ran(seen: list[Outlook], seconds: float = 3.0) -> list[tuple[Manifest, int]]:
    """What a store would hold had every step of `seen` run."""
    return [
        (Manifest(digest_of(o.ingredients), o.step.gives, {}, {"seconds": seconds}, o.ingredients | {"step": o.step.name}), 1000)
        for o in seen
    ]


def test_a_step_that_never_ran_says_so_and_has_no_estimate() -> None:
    rows = list(forecast(outlook(), []))
    assert {r["why"] for r in rows} == {"has not run yet"}
    assert {(r["seconds"], r["bytes"]) for r in rows} == {(None, None)}


def test_a_step_that_ran_otherwise_says_what_changed_and_what_it_took() -> None:
    before, now = outlook(recipe="trained, no teacher"), outlook("train.epochs=7", "train.lr=0.5", recipe="trained, no teacher")
    told = {o.step.name: row for o, row in zip(now, forecast(now, ran(before)), strict=True)}
    assert told["train"]["why"] == "epochs 2 -> 7, lr 0.001 -> 0.5 and 1 more"
    assert (told["train"]["seconds"], told["train"]["bytes"]) == (3.0, 1000)
    assert told["train.export"]["why"] == "follows train"


def test_of_several_earlier_runs_the_most_similar_is_compared() -> None:
    far = outlook("train.epochs=9", "seed=5", recipe="trained, no teacher")
    near = outlook("train.epochs=8", recipe="trained, no teacher")
    now = outlook(recipe="trained, no teacher")
    told = {o.step.name: row for o, row in zip(now, forecast(now, [*ran(far, 1.0), *ran(near, 2.0)]), strict=True)}
    assert told["train"]["seconds"] == 2.0
    assert told["train"]["why"].startswith("epochs 8 -> 2")


def test_cached_steps_have_nothing_to_tell_and_a_vanished_artifact_is_named() -> None:
    first = outlook()
    held = ran(first[:1])
    cached, gone = outlook(held=tuple(m for m, _ in held)), outlook()
    assert (cached[0].state, next(forecast(cached, held))["why"]) == ("cached", "")
    assert (gone[0].state, next(forecast(gone, held))["why"]) == ("run", "its artifact is gone")


# ------------------------------------------------------------------------------------------------------------ imports
def test_planning_loads_no_heavy_library() -> None:
    program = """
import sys
import edgekd.plan, edgekd.recipe, edgekd.cli, edgekd.api
from edgekd import registry
for kind in registry.FOLDERS:
    for name in registry.names(kind):
        registry.load(kind, name)
plan = edgekd.plan.build_plan(edgekd.recipe.load("quickstart"))
[s.key({}, 0) for s in plan.steps]
heavy = {"torch", "torchvision", "timm", "torch_pruning", "onnx", "onnxruntime", "onnxscript", "sklearn", "scipy", "plotly", "numpy", "PIL", "gensim", "torch_geometric"}
print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=REPOSITORY, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
