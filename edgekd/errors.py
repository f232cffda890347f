"""Every refusal edgekd can make: one class per refusal, one exit code per family (design section 6).

An error says what happened, where, what was expected and the next command to run. The CLI renders it; nothing else prints it.
"""

from __future__ import annotations

OK, USAGE, REFUSED, MISSED, DEVICE, RESOURCE, INTERNAL = 0, 2, 3, 4, 5, 6, 7
INTERRUPTED, TERMINATED = 130, 143


class Refusal(BaseException):
    """What the CLI renders: what happened, one sentence; where: file, stage or `file:line:col`; expected: what would have been accepted;
    hint: the next command."""

    exit_code = INTERNAL
    code = "internal"

    def __init__(self, what: str, *, where: str | None = None, expected: str | None = None, hint: str | None = None):
        self.what, self.where, self.expected, self.hint = what, where, expected, hint
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} (expected {self.expected})" if self.expected else text

    def as_dict(self) -> dict[str, str | None]:
        """The object printed as `{"error": ...}` with --json."""
        what = f"{self.what} (expected {self.expected})" if self.expected else self.what
        return {"code": self.code, "what": what, "where": self.where, "hint": self.hint}


class EdgekdError(Refusal, Exception):
    """Base of all errors that edgekd raises on purpose."""


# ---------------------------------------------------------------------------------------------------- 2: recipe or usage
class UsageError(EdgekdError):
    """A command line that cannot be carried out."""

    exit_code, code = USAGE, "usage"


class UnknownName(UsageError):
    """A name outside a closed set: device, method, architecture, recipe."""

    code = "unknown_name"


class RecipeError(UsageError):
    """All problems of one recipe at once, each `file:line:col: sentence`."""

    code = "recipe"

    def __init__(self, problems: list[str], *, hint: str | None = None):
        self.problems = problems
        super().__init__("\n".join(problems), hint=hint or "compare with one that works: edgekd recipes show quickstart")


# ---------------------------------------------------------------------------------------------------- 3: refused input
class InputRefused(EdgekdError):
    """A file from outside that is not what it should be."""

    exit_code, code = REFUSED, "refused"


class FileMissing(InputRefused):
    """A file or folder that the recipe or command line names is not there."""

    code = "file_missing"


class CheckpointRefused(InputRefused):
    """A checkpoint that holds more than tensors, is damaged, or does not fit the architecture."""

    code = "checkpoint"


class OnnxRefused(InputRefused):
    """An ONNX file that is damaged, too large, or refers to anything outside itself."""

    code = "onnx"


class PredictionsRefused(InputRefused):
    """A file of predictions that is damaged, holds objects, or does not answer for the data."""

    code = "predictions"


class ImageRefused(InputRefused):
    """An image that cannot be decoded within the limits."""

    code = "image"


class DataRefused(InputRefused):
    """A dataset that cannot be used: empty, one class, labels out of range, changed while in use."""

    code = "data"


class BundleRefused(InputRefused):
    """A bundle whose files differ from its manifest."""

    code = "bundle"


class StructureRefused(InputRefused):
    """A structural diff that does not fit the architecture it is applied to."""

    code = "structure"


class TrainingDiverged(InputRefused):
    """A loss term or gradient that is not finite: names the term, the step, the rate and the last finite value."""

    code = "not_finite"


# ---------------------------------------------------------------------------------------------------- 4: a goal missed
class GoalMissed(EdgekdError):
    """Budget, acceptance or parity missed; what was built so far is kept."""

    exit_code, code = MISSED, "goal_missed"


class ParityBroken(GoalMissed):
    """Two forms of one model disagree beyond their threshold."""

    code = "parity"


# ---------------------------------------------------------------------------------------------------- 5: device or backend
class DeviceError(EdgekdError):
    """A device that cannot be reached, or a profile that cannot be used."""

    exit_code, code = DEVICE, "device"


class BackendError(DeviceError):
    """A runtime that is missing, or that cannot convert or run a graph."""

    code = "backend"


class GraphRefused(BackendError):
    """A graph that a runtime does not take; where it is a user's own file, that file is refused."""

    code = "graph"


# ---------------------------------------------------------------------------------------------------- 6: resources
class ResourceError(EdgekdError):
    """Disk, memory or file handles ran out; the store stays valid."""

    exit_code, code = RESOURCE, "resource"


class LockTimeout(ResourceError):
    """Another process holds the lock of the same artifact for too long."""

    code = "lock_timeout"


# ---------------------------------------------------------------------------------------------------- signals
class Interrupted(Refusal):
    """SIGINT or SIGTERM; work done so far is checkpointed.

    No `Exception`: a signal may arrive inside any stage or library, whose handlers must not take it for a failure of their own.
    """

    code = "interrupted"

    def __init__(self, what: str, *, exit_code: int = INTERRUPTED):
        super().__init__(what, hint="run the same command again: it continues from the last checkpoint")
        self.exit_code = exit_code


def suggest(word: object, options: object) -> str:
    """`; did you mean 'x'?` for a near name, else the (first twelve) allowed names."""
    import difflib  # only needed once something is wrong

    names = sorted(map(str, options))  # type: ignore[call-overload]
    near = difflib.get_close_matches(str(word), names, 1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"; allowed: {shown}" if names else ""
