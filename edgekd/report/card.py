"""The model card of a bundle, in Markdown: what the model is for, what it takes and gives, how well it does, and what is not known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_PRECISIONS = {
    "fp32": "32-bit floats",
    "fp16": "16-bit floats",
    "int8": "8-bit integers with the scales in the file",
    "int8_weights": "8-bit weights, computed in 32-bit floats",
    "codebook": "weights as indices of a few values, computed in 32-bit floats",
}

_UNLABELLED = """Its images had no labels. `agreement` is the share of images on which it decides as its teacher does, right or wrong: of its accuracy nothing is known."""


def model_card(
    facts: Mapping[str, Any],
    *,
    recipe: str,
    target: str,
    origin: Mapping[str, Any],
    test: Mapping[str, Any] | None,
    parity: Sequence[Mapping[str, Any]],
) -> str:
    """`facts`: bundle.json; `test`: metrics on the test split and their number of samples, None without data; `parity`: rows of the ladder."""
    labels, prepare = facts["labels"], facts["preprocess"]
    shown = ", ".join(labels[:20]) + (f" and {len(labels) - 20} more" if len(labels) > 20 else "")
    batch = "any" if facts["fixed_batch"] is None else facts["fixed_batch"]
    rows = "features" in prepare
    return f"""# Model card

{facts["task"].replace("_", " ").capitalize()} into {len(labels)} classes, made by edgekd (recipe `{recipe}`, target `{target}`). Architecture: {origin.get("student", "unknown")}\
{f", taught by {origin['teacher']}" if "teacher" in origin else ""}. Stored in {_PRECISIONS[facts["precision"]]}.

## Use

{"Rows of features" if rows else "Images"} like those that it was trained on; anything else gets one of the labels as well, often with high
probability. It was not examined for bias between groups of people or places, and the labels of its dataset are taken as they were given.

- input `{facts["input"]}`: batch {batch} x {_row(prepare) if rows else _image(prepare)}
- output `{facts["output"]}`: one logit a class, in the order of `labels.txt`
- labels: {shown}

## Measured

{_tested(test)}
{_compared(parity, "generated" if test is None else "val")}
Latency depends on the device and is not part of this file: `edgekd profile FOLDER` measures it there.
"""


def _image(prepare: Mapping[str, Any]) -> str:
    side, resized = prepare["image_size"], f"resized ({prepare['resize']}, {prepare['interpolation']})"
    return f"3 x {side} x {side}, RGB, {resized}, minus {_numbers(prepare['mean'])}, divided by {_numbers(prepare['std'])}"


def _row(prepare: Mapping[str, Any]) -> str:
    divided = ", divided by their sum" if prepare["divide_by_sum"] else ""
    if size := prepare.get("positions"):
        return f"{prepare['features']} features{divided}, the last {size} of them where it lies in the graph: `predict.py` averages those of the nodes that are named"
    return f"{prepare['features']} features{divided}; its neighbours are not needed"


def _tested(test: Mapping[str, Any] | None) -> str:
    if test is None:
        return "Accuracy was not measured: no data were given. Its labels are the numbers of the outputs.\n"
    metrics = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(test["metrics"].items()))
    unlabelled = f"{_UNLABELLED}\n\n" if test["metric_name"] == "agreement" else ""
    return f"{unlabelled}On {test['samples']} test samples, read once, by this file:\n\n| metric | value |\n|---|---|\n{metrics}\n"


def _compared(parity: Sequence[Mapping[str, Any]], images: str) -> str:
    if not parity:
        return "It came as an ONNX file and was compared with no other form of the model.\n"
    rungs = "\n".join(
        f"| {r['rung']} | {r['max_abs']:.3g} | {r['cosine']:.6f} | {r['agreement']:.2%} | {'yes' if r['ok'] else 'no'} |" for r in parity
    )
    return f"""Each form of the model against the one before it, on {images} images:

| step | largest error | cosine | same decision | inside its limits |
|---|---|---|---|---|
{rungs}
"""


def _numbers(values: Sequence[float]) -> str:
    return "/".join(f"{v:g}" for v in values)
