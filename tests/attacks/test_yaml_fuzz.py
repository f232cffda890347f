"""20 000 damaged recipes: each is read, or refused as RecipeError with `file:line:col` at the start of every problem (G16)."""

from __future__ import annotations

import random
import re

from edgekd.errors import RecipeError
from edgekd.safeio.yaml import Document, read, read_value

CASES = 20_000
PLACE = re.compile(r"r\.yaml:[1-9]\d*:[1-9]\d*: \S")
RECIPE = """version: 1
extends: ../base/digits.yaml              # one parent
set: {recover.epochs: 8}
data:    {format: image_folder, root: data/parts, image_size: 224, split: {val: 0.1}}
teacher: {arch: vit_small_patch16_224, weights: "teacher.safetensors"}
stages:
  - distill:  {method: ofa, epochs: 90, lr: 1e-4}
  - prune:    {criterion: taylor, target: {speedup: 1.7}}
  - quantize:
      method: 'ptq'
targets:
  rpi5: {backend: onnxruntime, budget: {p95_ms: 40}}
"""
TOKENS = [
    *["{", "}", "[", "]", ",", ":", ": ", "- ", "? ", "\n", "\n  ", "\t", "#", "'", '"', "|", ">", "&a", "*a", "!"],
    *["!!python/name:os.system", "<<: ", "---", "...", "%YAML 9.9\n", "%TAG ! !", "\\x", "\\U0010FFFF", "\x00", "\x1b", "\x85"],
    *["\u2028", "\ud800", "\ufeff", "\U0001f600", "é", "~", "null", "true", ".inf", "1e999", "0x1", "-", "1_0", "9" * 30],
    *["a" * 50, "stages", "distill: ", "=", "@", "`", "\r", "\r\n", "|-\n", ">+9\n", '"\\ud800"', '"\\UFFFFFFFF"'],
    *["? [", "{? ", "- - - "],
]


def damaged(draw: random.Random) -> str | bytes:
    kind = draw.randrange(5)
    if kind == 0:
        return "".join(draw.choices(TOKENS, k=draw.randrange(1, 30)))
    if kind == 1:
        return RECIPE[: draw.randrange(len(RECIPE))] + draw.choice(TOKENS)
    if kind == 2:
        return draw.randbytes(draw.randrange(80))
    data = bytearray(RECIPE.encode())
    if kind == 3:
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data)
    text = RECIPE
    for _ in range(draw.randrange(1, 5)):
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(TOKENS) + text[at + draw.randrange(12) :]
    return text


def problems(text: str | bytes) -> list[str] | None:
    """The problems of a refused text, None for one that is read; anything but RecipeError passes through."""
    try:
        assert isinstance(read(text, "r.yaml"), Document)
        if isinstance(text, str):
            read_value(text, "r.yaml")
    except RecipeError as e:
        return e.problems
    return None


def test_no_damage_gives_anything_but_a_document_or_a_recipe_error_with_places() -> None:
    draw = random.Random(20)
    refused = 0
    for _ in range(CASES):
        text = damaged(draw)
        found = problems(text)
        if found is not None:
            refused += 1
            assert found, text
            assert all(PLACE.match(p) and p.isprintable() for p in found), (text, found)
    assert CASES * 0.5 < refused < CASES, "the damage is too light or too heavy to say anything"
