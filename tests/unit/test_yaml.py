"""The strict YAML reader: what it reads, where it says things are, and every refusal with its place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml as pyyaml

from edgekd.errors import RecipeError
from edgekd.safeio import yaml
from edgekd.safeio.yaml import read, read_file, read_value

SCALARS: list[tuple[str, Any]] = [
    *[("1e-4", 1e-4), ("1e5", 1e5), (".5", 0.5), ("5.", 5.0), ("-2.5E+3", -2500.0), ("+1.5", 1.5)],
    *[("0", 0), ("-7", -7), ("+7", 7), ("9223372036854775807", 2**63 - 1), ("-0", 0)],
    *[("null", None), ("~", None), ("", None), ("true", True), ("false", False)],
    *[("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("True", "True"), ("NULL", "NULL"), ("y", "y")],
    *[("2024-01-01", "2024-01-01"), ("12:30:00", "12:30:00"), ("0x10", "0x10"), ("1_000", "1_000"), ("007", "007"), ("1.2.3", "1.2.3")],
    *[("'1'", "1"), ('"true"', "true"), ("'inf'", "inf"), ("infinite", "infinite"), ("٣", "٣"), ("résumé", "résumé"), ("a:b", "a:b")],
]


@pytest.fixture(params=["CSafeLoader", "SafeLoader"], autouse=True)
def each_loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml, "_LOADER", getattr(pyyaml, request.param))


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_a_scalar_is_read_as_what_it_looks_like(text: str, value: Any) -> None:
    assert read_value(text, "-o x") == value
    assert type(read_value(text, "-o x")) is type(value)
    assert read(f"x: {text}\n", "r.yaml").value == {"x": value}


def test_flow_collections_are_values() -> None:
    assert read_value("[1, [a, 1e-4], {b: null}]", "-o x") == [1, ["a", 1e-4], {"b": None}]
    assert read_value("{p95_ms: 40}", "-o x") == {"p95_ms": 40}


def test_a_recipe_is_plain_data_with_the_place_of_each_key_and_item() -> None:
    text = "version: 1\nstages:\n  - distill:  {method: ofa, epochs: 90}\n  - prune:\n      target: {speedup: 1.7}\n"
    document = read(text, "r.yaml")
    assert document.value == {
        "version": 1,
        "stages": [{"distill": {"method": "ofa", "epochs": 90}}, {"prune": {"target": {"speedup": 1.7}}}],
    }
    assert document.marks == {
        (): "r.yaml:1:1",
        ("version",): "r.yaml:1:1",
        ("stages",): "r.yaml:2:1",
        ("stages", 0): "r.yaml:3:5",
        ("stages", 0, "distill"): "r.yaml:3:5",
        ("stages", 0, "distill", "method"): "r.yaml:3:16",
        ("stages", 0, "distill", "epochs"): "r.yaml:3:29",
        ("stages", 1): "r.yaml:4:5",
        ("stages", 1, "prune"): "r.yaml:4:5",
        ("stages", 1, "prune", "target"): "r.yaml:5:7",
        ("stages", 1, "prune", "target", "speedup"): "r.yaml:5:16",
    }


def test_nothing_is_null_and_has_a_place() -> None:
    for text in ("", "# only a comment\n", "---\n"):
        document = read(text, "r.yaml")
        assert document.value is None
        assert re.fullmatch(r"r\.yaml:\d+:\d+", document.marks[()])


def test_block_text_quotes_bytes_and_a_byte_order_mark_are_read() -> None:
    assert read("a: |\n  one\n  two\n", "r").value == {"a": "one\ntwo\n"}
    assert read('a: "tab\\tend"', "r").value == {"a": "tab\tend"}
    assert read("é: ü".encode(), "r").value == {"é": "ü"}
    assert read("\ufeffa: 1", "r").value == {"a": 1}


REFUSED = [
    ("version: 1\nversion: 2\n", r"r\.yaml:2:1: key 'version' appears twice \(first on line 1\)"),
    ("a: {b: 1, b: 2}", r"r\.yaml:1:11: key 'b' appears twice"),
    ("version: !!python/object/apply:os.system ['true']\n", r"r\.yaml:1:10: tags are not allowed .*os\.system"),
    ("a: !!str 1", r"r\.yaml:1:4: tags are not allowed"),
    ("a: ! 1", r"r\.yaml:1:4: tags are not allowed"),
    ("!!map {a: 1}", r"r\.yaml:1:1: tags are not allowed"),
    ("a: &x 1", r"r\.yaml:1:4: anchors"),
    ("a: *x", r"r\.yaml:1:4: aliases"),
    ("*x : 1", r"r\.yaml:1:1: aliases"),
    ("<<: {a: 1}", r"r\.yaml:1:1: merge keys"),
    ("a: 1\n---\nb: 2", r"r\.yaml:2:1: only one document"),
    ("%YAML 1.1\n---\na: 1", r"r\.yaml:\d:\d: directives"),
    ("%TAG ! tag:evil,2000:\n---\na: 1", r"r\.yaml:\d:\d: directives"),
    ("1: a", r"r\.yaml:1:1: a key must be text, not '1'"),
    ("null: a", r"r\.yaml:1:1: a key must be text"),
    ("? [a, b]\n: 1", r"r\.yaml:1:3: a key must be text, not a collection"),
    ("a: .inf", r"r\.yaml:1:4: \.inf is not a number that can be used"),
    ("a: -.INF", r"r\.yaml:1:4: -\.INF"),
    ("a: nan", r"r\.yaml:1:4: nan"),
    ("a: 1e999", r"r\.yaml:1:4: the number 1e999 is out of range"),
    ("a: 9223372036854775808", r"r\.yaml:1:4: the number 9223372036854775808 is out of range"),
    ("a: " + "9" * 10_000, r"r\.yaml:1:4: the number 9+ is out of range"),
    ("a: \x00", r"r\.yaml:1:4: control character U\+0000"),
    ("a:\n  b: \x1b[31m", r"r\.yaml:2:6: control character U\+001B"),
    ("a: \ud800", r"r\.yaml:1:4: control character U\+D800"),
    ("a: \u202e", r"r\.yaml:1:4: control character U\+202E"),
    ('a: "\\e[31m"', r"r\.yaml:1:4: control character U\+001B"),
    ('"\\0": 1', r"r\.yaml:1:1: control character U\+0000"),
    ("a: [1", r"r\.yaml:\d:\d: not valid YAML"),
    ("a: b: c", r"r\.yaml:1:5: not valid YAML"),
    ("\ta: 1", r"r\.yaml:1:\d: not valid YAML"),
    ('"\\UFFFFFFFF"', r"r\.yaml:1:\d+: not valid YAML"),
    ("[" * 30 + "]" * 30, r"r\.yaml:1:22: nested deeper than 20"),
    ("- a\n" * 20_001, r"r\.yaml:20000:3: more than 20000 values"),
    ("#" * 256_001, r"r\.yaml:1:1: the text is larger than 256000 bytes"),
]


@pytest.mark.parametrize(("text", "match"), REFUSED, ids=lambda x: ascii(x)[:30])
def test_what_is_refused_is_refused_at_its_place(text: str, match: str) -> None:
    with pytest.raises(RecipeError, match=match) as caught:
        read(text, "r.yaml")
    assert caught.value.exit_code == 2


def test_bytes_that_are_not_utf8_are_refused_at_their_place() -> None:
    with pytest.raises(RecipeError, match=r"r\.yaml:2:4: not UTF-8"):
        read(b"a: 1\nb: \xff", "r.yaml")


def test_all_problems_come_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        read("a: 1\na: 2\nb: !x 3\n4: c\nd: .nan\n", "r.yaml")
    assert [p.split(": ")[0] for p in caught.value.problems] == ["r.yaml:2:1", "r.yaml:3:4", "r.yaml:4:1", "r.yaml:5:4"]


@pytest.mark.parametrize("text", ["a: 1", "- a", "? a", "a: {b: 1}"])
def test_a_value_is_no_block_of_yaml(text: str) -> None:
    with pytest.raises(RecipeError, match=r"-o x=.*:1:1: write a list as"):
        read_value(text, "-o x=")


def test_a_file_is_read_and_an_unreadable_one_is_a_recipe_error(tmp_path: Path) -> None:
    good, large = tmp_path / "r.yaml", tmp_path / "large.yaml"
    good.write_text("a: 1")
    large.write_bytes(b"#" * 300_000)
    assert read_file(good).marks["a",] == f"{good}:1:1"
    for path, match in (
        (large, "larger than"),
        (tmp_path / "none.yaml", r"none\.yaml:1:1: cannot read this file: no such file"),
        (tmp_path, "directory"),
    ):
        with pytest.raises(RecipeError, match=match):
            read_file(path)
