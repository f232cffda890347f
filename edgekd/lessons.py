"""What a finished run tells about its pair of models: what preflight knew to go wrong, and a teacher that has little to teach."""

from __future__ import annotations

from edgekd import registry
from edgekd.gate import paired_drop
from edgekd.plan import Plan
from edgekd.run import Done
from edgekd.stages._stage import read_decision
from edgekd.stages.evaluate import LABELS, OUTPUTS


def lessons(plan: Plan, done: Done) -> list[str]:
    """Warnings; those of preflight are repeated, for a run that finds it in the store does not run it again."""
    known = read_decision(done.artifacts["preflight"]).get("warnings", []) if "preflight" in done.artifacts else []
    return [*known, *_outdone(plan, done), *_on_a_graph(done)]


def _on_a_graph(done: Done) -> list[str]:
    """A student that gained nothing from the graph, or that trails its teacher, and what is known of the gain in time, on test."""
    if "test.groups" not in done.artifacts:
        return []
    drops, found = done.artifacts["test.groups"].json("groups.json")["drops"], []
    if "alone" in drops and drops["alone"]["ci95"][1] >= 0:
        found.append(
            f"on test the student is no better than the same model trained alone ({-100 * drops['alone']['drop']:+.2f} points, "
            f"95 % {-100 * drops['alone']['ci95'][1]:+.2f} to {-100 * drops['alone']['ci95'][0]:+.2f}): the graph taught it nothing here"
        )
    if "teacher" in drops and drops["teacher"]["ci95"][0] > 0:
        found.append(
            f"on test the student trails its teacher by {100 * drops['teacher']['drop']:.2f} points "
            f"(95 % {100 * drops['teacher']['ci95'][0]:.2f} to {100 * drops['teacher']['ci95'][1]:.2f}); the report says on which nodes"
        )
    return found


def _outdone(plan: Plan, done: Done) -> list[str]:
    """A student that is certainly better alone than its teacher, image by image on val, where both were measured."""
    import numpy as np

    if "teacher" not in plan.metrics or not plan.baselines:
        return []
    teacher, alone = (done.artifacts[plan.metrics[name]].path for name in ("teacher", plan.baselines[0]))
    task, labels = registry.load("task", plan.loaded.recipe.task)(), np.load(teacher / LABELS)
    before, after = (task.scores(np.load(folder / OUTPUTS), labels).tolist() for folder in (alone, teacher))
    gain, (low, high) = paired_drop(before, after)
    if low <= 0:
        return []
    found = f"{gain * 100:.2f} points better than its teacher (95 % {low * 100:.2f} to {high * 100:.2f})"
    return [f"on val the student trained alone is {found}: there is little to learn from such a teacher"]
