"""The report and the console summary: true to the run, silent about nothing, deaf to hostile strings."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from edgekd.report import plots, text
from edgekd.report.front import front, knob
from edgekd.report.html import render
from edgekd.report.summary import headline, ratio, stage_rows, summary, target_rows

Run = dict[str, Any]
MISSING = [  # heading, key to remove, what the page then says
    ("Accuracy against latency", "stages teacher targets baselines", "There is no chart"),
    ("Stages", "stages", "holds no stages"),
    ("Targets", "targets", "holds no targets"),
    ("Runtimes and precisions measured", "targets", "No target left its runtime open"),
    ("Training", "curves", "no loss curves"),
    ("Latency distribution", "latency_samples", "no latency samples"),
    ("Confusion on test", "confusion", "no confusion matrix"),
    ("Operators of the shipped engine", "operators", "not profiled by operator"),
    ("Sensitivity of operators", "sensitivity", "No search for the operators"),
    ("Parity", "parity", "no parity table"),
    ("Warnings", "warnings", "Warnings were not recorded"),
    ("Environment", "environment", "environment was not recorded"),
    ("How to reproduce", "command", "command line was not recorded"),
    ("Resolved recipe", "recipe", "resolved recipe was not recorded"),
]


# ------------------------------------------------------------------------------------------------- a realistic run
def latency(p50: float) -> Run:
    return {"p50": p50, "p95": p50 * 1.08, "p99": p50 * 1.21, "ci95": [p50 * 0.991, p50 * 1.012], "n": 400}


def candidate(name: str, ratio: float, p50: float) -> Run:
    measured = {"precision": name.split()[1], "latency_ms": latency(p50), "ratio": ratio, "ci95": [ratio * 0.99, ratio * 1.01]}
    return {
        "name": name,
        "backend": name.split()[0],
        "refused": None,
        "size_bytes": 5_020_000,
        "drop": 0.0011,
        "chosen": False,
        "note": "",
        **measured,
    }


def stage(
    name: str,
    kind: str,
    method: str,
    metric: float | None,
    size: int,
    p50: float | None,
    verdict: str | None = None,
    reason: str | None = None,
) -> Run:
    base = {
        "name": name,
        "kind": kind,
        "method": method,
        "key": "ab" * 32,
        "cached": kind == "train",
        "seconds": 41.7,
        "metric_name": "top1",
    }
    return base | {"metric": metric, "size_bytes": size, "latency_ms": latency(p50) if p50 else None, "verdict": verdict, "reason": reason}


def curve(rng: np.random.Generator, steps: int, terms: tuple[str, ...]) -> list[Run]:
    rows = []
    for i in range(steps):
        parts = {t: 2.1 * 0.97**i / (k + 1) + 0.05 * rng.random() for k, t in enumerate(terms)}
        val = 1 - 0.8 * 0.93**i if i % 10 == 9 else None
        rows.append(
            {"step": i * 8, "epoch": i // 10, "loss": sum(parts.values()), "terms": parts, "lr": 1e-3 * (1 - i / steps), "val_metric": val}
        )
    return rows


def make_run() -> Run:
    rng = np.random.default_rng(7)
    kept = "latency 2.9x lower (interval of the ratio 0.33 to 0.36); judged at the end of the segment, after recover"
    matrix = [[36 if i == j else int(rng.random() < 0.04) for j in range(10)] for i in range(10)]
    target = {
        "backend": "onnxruntime",
        "precision": "int8",
        "model_file": "model.onnx",
        "metric": 0.9889,
        "metric_name": "top1",
        "size_bytes": 1_316_220,
    }
    host = {
        "device": "host",
        "measured": True,
        "latency_ms": latency(0.2713),
        "predicted_ms": None,
        "budget": {"p95_ms": 0.5, "size_mb": 4},
        "candidates": [
            candidate("onnxruntime fp32", 1.0, 0.2843),
            candidate("onnxruntime quantize", 0.9543, 0.2713) | {"chosen": True, "note": "1 nodes stay in higher precision"},
            {"name": "openvino fp32", "backend": "openvino", "refused": "no kernel for [red]Foo[/red]", "chosen": False, "note": ""},
        ],
    }
    rpi5 = {
        "device": "rpi5",
        "measured": False,
        "latency_ms": None,
        "predicted_ms": {"p50": 2.31, "low": 1.2, "high": 4.4, "basis": "roofline of hardware/rpi5.yaml"},
    }
    return {
        "run": "runs/quickstart-1",
        "report": "runs/quickstart-1/report.html",
        "recipe": {
            "name": "quickstart",
            "file": "recipes/quickstart.yaml",
            "resolved": [{"path": "distill.epochs", "value": 30, "source": "-o distill.epochs=30"}],
        },
        "command": ["edgekd", "compress", "recipes/quickstart.yaml", "-o", "data.root=my data"],
        "seconds": 183.2,
        "teacher": {
            "name": "teacher",
            "arch": "vit_tiny_patch16_224",
            "metric": 0.9917,
            "metric_name": "top1",
            "latency_ms": latency(3.962),
            "size_bytes": 22_113_007,
        },
        "stages": [
            stage("teacher", "train", "label", 0.9926, 22_113_007, None),
            stage("distill", "distill", "ofa", 0.9889, 19_700_000, 0.823),
            stage("prune", "prune", "taylor", 0.1222, 5_020_000, 0.284, "kept", kept),
            stage("recover", "distill", "kd", 0.9852, 5_020_000, 0.2843),
            stage(
                "quantize",
                "quantize",
                "ptq",
                0.9852,
                1_316_220,
                0.2713,
                "kept",
                "file 3.8x smaller; latency 1.05x lower; accuracy within the limit",
            ),
            stage(
                "squeeze",
                "quantize",
                "weight_only",
                0.9741,
                1_290_000,
                0.335,
                "rolled back",
                "slower than its parent: 1.23x, casts added around 8 layers",
            ),
        ],
        "baselines": [{"name": "student", "metric": 0.9861, "metric_name": "top1", "size_bytes": 19_700_000, "latency_ms": latency(0.82)}],
        "targets": [
            target | host | {"budget_met": True, "reason": None, "bundle": "runs/quickstart-1/host"},
            target
            | rpi5
            | {
                "budget": {"p95_ms": 40},
                "budget_met": None,
                "reason": "rpi5 cannot be reached from here",
                "bundle": "runs/quickstart-1/rpi5",
            },
        ],
        "accepted": True,
        "accept": {"accuracy_drop_max": 0.03, "drop": 0.0028, "interval": [-0.0083, 0.0139], "reference": "teacher", "reason": None},
        "curves": {
            "teacher": curve(rng, 90, ("cross_entropy",)),
            "distill": curve(rng, 120, ("cross_entropy", "ofa_stage4", "ofa_stage3")),
        },
        "latency_samples": {
            "teacher": [3.9 + rng.exponential(0.125) for _ in range(400)],
            "shipped": [0.265 + rng.exponential(0.008) for _ in range(400)],
        },
        "confusion": {"labels": [str(i) for i in range(10)], "matrix": matrix},
        "operators": [
            {
                "name": f"/layer{i // 4}/conv{i}/Conv_quant",
                "op_type": "QLinearConv",
                "share": 0.2 * 0.8**i,
                "mean_us": 54.1 * 0.8**i,
                "calls": 400,
            }
            for i in range(20)
        ],
        "sensitivity": [
            {
                "search": "quantize@host.onnxruntime.searched",
                "reason": "2 of 3 operators in int8: 0.81x the latency of fp32",
                "candidates": 3,
                "operators": [
                    {"node": "[b]conv[/b]<1>", "ratio": 0.912, "ci95": [0.905, 0.92], "drop": 0.002, "error": 0.013, "quantized": True},
                    {"node": "gemm", "ratio": None, "ci95": None, "drop": None, "error": None, "refused": "no kernel", "quantized": False},
                ],
            }
        ],
        "parity": [
            {
                "rung": "torch -> onnx",
                "max_abs": 3.1e-6,
                "cosine": 0.9999999,
                "agreement": 1.0,
                "metric_delta": 0.0,
                "threshold": {"max_abs": 1e-3},
                "ok": True,
            },
            {
                "rung": "onnx -> int8",
                "max_abs": 0.84,
                "cosine": 0.99871,
                "agreement": 0.9963,
                "metric_delta": -0.0028,
                "threshold": {"agreement": 0.98},
                "ok": True,
            },
        ],
        "warnings": ["rpi5 cannot be reached; its latency is predicted"],
        "environment": {"edgekd": "0.1.0", "python": "3.11.7", "cpu": {"model": "Xeon", "threads": 2}},
        "decisions": "runs/quickstart-1/decisions.json",
    }


@pytest.fixture
def run() -> Run:
    return make_run()


# ------------------------------------------------------------------------------------------------- reading what came out
class Page(HTMLParser):
    """The page as a browser's parser sees it: visible text, tags with attributes, scripts."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "h2":
            self.words.append("##")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style":
            self.words.append(data)

    @property
    def figures(self) -> dict[str, plots.Figure]:
        return dict(json.loads(self.scripts[0]))

    def section(self, title: str) -> str:
        return self.text.split(f"## {title} ", 1)[1].split(" ## ")[0]


def console(run: Run, width: int, **options: Any) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, **options).print(summary(run))
    return out.getvalue()


def hostile(count: int = 200) -> list[str]:
    """Known attacks, then random mixtures of their parts."""
    parts = [
        "<script>alert(1)</script>",
        "</script><script>x()</script>",
        "<img src=x onerror=x()>",
        '" onload="x()',
        "' onclick='x()",
        "<!--",
        "]]>",
        "&lt;b&gt;",
    ]
    parts += [
        "[/red]",
        "[bold]",
        "[link=file:///etc/passwd]open[/link]",
        "[",
        "\\[x]",
        ":boom:",
        "<a href='https://evil.example'>x</a>",
        "javascript:x()",
    ]
    parts += [
        "\x1b[31m",
        "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\",
        "\x9b31m",
        "\x07",
        "\x08\x08",
        "\x00",
        "\r\nfake line",
        "\u202egpj.exe",
        "\u2066x\u2069",
    ]
    parts += [
        "\u200f",
        "\ufeff",
        "\u2028",
        "\ud800",
        "\U000e0041",
        "%{x}",
        "{title}",
        "$\\href{x}{y}$",
        "<br>",
        "a" * 3000,
        "=1+1",
        "العربية",
        "naïve 日本 🙂",
        "",
    ]
    rng = np.random.default_rng(3)
    return parts + ["".join(parts[i] for i in rng.integers(len(parts), size=2 + n % 4)) for n in range(count - len(parts))]


def poisoned(poison: list[str]) -> Run:
    """A run in which every string and every free key is hostile."""
    supply = iter(poison * 50)

    def infect(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            free = key in ("terms", "environment", "curves", "latency_samples", "threshold")
            return {(f"{next(supply)}{k}" if free else k): infect(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [infect(v) for v in value]
        return next(supply) if isinstance(value, str) else value

    return dict(infect(make_run()))


# ------------------------------------------------------------------------------------------------- clean text
@pytest.mark.parametrize("s", hostile(), ids=range(200))
def test_clean_leaves_nothing_that_acts_on_a_terminal_or_cannot_be_written(s: str) -> None:
    out = text.clean(s)
    assert all(c.isprintable() or c in "\u200c\u200d" for c in out)
    out.encode("utf-8")
    assert text.clean(out) == out


def test_clean_keeps_ordinary_text_of_any_script() -> None:
    assert text.clean("naïve 日本 🙂 العربية [x] <y>") == "naïve 日本 🙂 العربية [x] <y>"


def test_clean_shows_a_control_character_as_its_escape_code() -> None:
    assert text.clean("a\x1b[31m\u202eb\nc") == "a\\x1b[31m\\u202eb c"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.08123, "0.0812 ms"), (1.234, "1.23 ms"), (1234.5, "1234 ms"), (None, "-"), (float("nan"), "-"), ("1", "-"), (True, "-")],
)
def test_latency_is_shown_with_three_digits_or_a_dash(value: Any, shown: str) -> None:
    assert text.ms(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(999, "999 bytes"), (343_900, "344 kB"), (1_316_220, "1.32 MB"), (2.5e9, "2.5 GB"), (None, "-")]
)
def test_size_is_shown_in_decimal_units(value: Any, shown: str) -> None:
    assert text.size(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(0.41, "0.41 s"), (41.7, "41.7 s"), (185, "3 min 5 s"), (59.9, "1 min 0 s"), (None, "-")])
def test_durations_are_shown_in_minutes_and_seconds(value: Any, shown: str) -> None:
    assert text.seconds(value) == shown


# ------------------------------------------------------------------------------------------------- page: safe and self-contained
def test_page_of_a_run_full_of_hostile_strings_has_the_tags_of_a_clean_run() -> None:
    allowed = {tag for tag, _ in Page(render(make_run())).tags}
    page = Page(render(poisoned(hostile())))
    assert {tag for tag, _ in page.tags} <= allowed
    assert len(page.scripts) == 3  # data, plotly, ours
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on") or a in ("href", "src")]
    assert all(c.isprintable() or c in "\n\u200c\u200d" for c in "".join(page.words))


@pytest.mark.parametrize("s", hostile(), ids=range(200))
def test_hostile_string_is_shown_as_text_and_never_as_markup(s: str) -> None:
    figure = plots.confusion([s, "other"], [[1, 2], [3, 4]])
    for shown in (figure["layout"]["xaxis"]["ticktext"][0], figure["data"][0]["hovertext"][0][0].removeprefix("true ").split("<br>")[0]):
        assert "<" not in shown
        assert html.unescape(shown) == text.shorten(s, 40)


def test_data_block_cannot_be_closed_from_within() -> None:
    run = make_run()
    run["confusion"]["labels"][0] = "</script><script>x()</script>"
    page = Page(render(run))
    assert "<" not in page.scripts[0]
    assert "&lt;/script&gt;" in page.figures["figure-5"]["layout"]["xaxis"]["ticktext"][0]


def test_page_has_no_external_resource_and_forbids_requests(run: Run) -> None:
    page = Page(render(run))
    assert not [
        attrs for tag, attrs in page.tags if tag in ("link", "iframe", "img", "object", "base") or "src" in attrs or "href" in attrs
    ]
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_no_chart_offers_to_upload_its_data(run: Run) -> None:
    ours = Page(render(run)).scripts[2]
    assert "showSendToCloud: false" in ours
    assert 'plotlyServerURL: ""' in ours
    assert re.findall(r"buttons = \[\[(.*?)\]\]", ours) == ['"toImage", "resetScale2d"']


def test_policy_names_exactly_the_scripts_of_the_page(run: Run) -> None:
    page = Page(render(run))
    policy = next(str(attrs["content"]) for _, attrs in page.tags if attrs.get("http-equiv"))
    hashes = {"sha256-" + base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in page.scripts[1:]}
    assert hashes == set(re.findall(r"'(sha256-[^']+)'", policy))


def test_page_is_the_same_for_the_same_run(run: Run) -> None:
    assert render(run) == render(copy.deepcopy(run))


# ------------------------------------------------------------------------------------------------- page: true to the run
def test_what_a_builder_chose_for_its_layers_is_in_the_table_where_it_is_known(run: Run) -> None:
    assert "<th>calls</th><th>precision</th>" not in render(run)
    run = copy.deepcopy(run)
    run["operators"][0] |= {"precision": "fp32 -> int8", "format": "<b>NC/32HW32"}
    page = render(run)
    assert "<th>calls</th><th>precision</th><th>format</th>" in page
    assert "fp32 -&gt; int8" in page
    assert "&lt;b&gt;NC/32HW32" in page


def test_sections_come_in_the_order_in_which_a_reader_asks(run: Run) -> None:
    titles = re.findall(r"<h2>(.*?)</h2>", render(run))
    assert titles == [title for title, _, _ in MISSING]


@pytest.mark.parametrize(("title", "keys", "says"), MISSING, ids=[m[0] for m in MISSING])
def test_missing_section_is_said_in_one_sentence(run: Run, title: str, keys: str, says: str) -> None:
    assert says not in Page(render(run)).text
    for key in keys.split():
        run.pop(key)
    section = Page(render(run)).section(title)
    assert says in section[: section.index(".") + 1]


def test_what_was_raced_is_a_table_fastest_first_with_what_was_refused(run: Run) -> None:
    for shown in (Page(render(run)).section("Runtimes and precisions measured"), console(run, 200)):
        places = [shown.index(word) for word in ("0.95x", "1.00x", "refused")]
        assert places == sorted(places)
        assert "ships" in shown
        assert "no kernel for [red]Foo[/red]" in shown
        assert "1 nodes stay in higher precision" in shown
        assert "-0.11" in shown


def test_run_of_the_contract_alone_renders() -> None:
    page = Page(render({"run": "r", "report": "r/report.html", "teacher": None, "stages": [], "targets": [], "accepted": False}))
    assert "Nothing was measured; not accepted." in page.text
    assert len([tag for tag, _ in page.tags if tag == "div"]) == 2  # the tiles and the verdict's tile; no empty plot


def test_every_number_of_a_stage_is_on_the_page_as_in_the_run(run: Run) -> None:
    rows = re.findall(r"<tr>(.*?)</tr>", render(run).split("<h2>Stages</h2>")[1].split("</table>")[0])[1:]
    assert len(rows) == len(run["stages"])
    for row, item in zip(rows, run["stages"], strict=True):
        cells = [html.unescape(re.sub("<[^>]+>", "", c)).strip() for c in re.findall(r"<td.*?</td>", row)]
        assert cells[:3] == [item["name"], item["kind"], item["method"]]
        assert float(cells[3].removesuffix(" %")) == pytest.approx(100 * item["metric"], abs=0.005)
        value, unit = cells[4].split()
        assert float(value) * {"MB": 1e6, "kB": 1e3}[unit] == pytest.approx(item["size_bytes"], rel=0.005)
        if item["latency_ms"]:
            shown = [float(v) for v in re.findall(r"[\d.]+", cells[5])]
            assert shown == pytest.approx([item["latency_ms"]["p50"], *item["latency_ms"]["ci95"]], rel=0.005)
        assert item["verdict"] is None or item["verdict"] in cells[6]
        assert cells[7] == (item["reason"] or "-")
        assert cells[9] == ("yes" if item["cached"] else "no")


def test_headline_holds_ratios_drop_interval_and_verdict(run: Run) -> None:
    drop = "drop 0.28 points, 95 % interval [-0.83, 1.39], limit 3.00"
    assert headline(run) == f"quickstart on host: 14.6x faster, 16.8x smaller, top1 99.17 % -> 98.89 % ({drop}); accepted."
    assert headline(run).split(": ", 1)[1] in Page(render(run)).text


def test_headline_says_slower_larger_and_why_it_was_not_accepted(run: Run) -> None:
    run["targets"][0] |= {"latency_ms": latency(8.0), "size_bytes": 44_226_014}
    run |= {"accepted": False, "accept": {"reason": "the drop exceeds the limit."}}
    assert "2.02x slower, 2.00x larger" in headline(run)
    assert headline(run).endswith("; not accepted (the drop exceeds the limit).")


def test_headline_of_an_unmeasured_target_never_shows_a_speed_up(run: Run) -> None:
    run["targets"] = run["targets"][1:]
    assert "latency not measured (predicted 2.31 ms (1.2 to 4.4))" in headline(run)
    assert "faster" not in headline(run)


def test_predicted_latency_is_labelled_hatched_and_kept_out_of_the_chart(run: Run) -> None:
    source = render(run)
    assert re.search(r'class="predicted">predicted 2\.31 ms \(1\.2 to 4\.4\)<', source)
    run["targets"] = run["targets"][1:]
    figure = plots.tradeoff(run)
    assert figure is not None
    assert "shipped" not in [t["name"] for t in figure["data"]]
    assert "shipped (shipped)" in plots.unplaced(run)


def test_unmeasured_target_without_prediction_is_unknown(run: Run) -> None:
    run["targets"][1]["predicted_ms"] = None
    row = target_rows(run)[1]
    assert (row.source, row.latency, row.verdict) == ("not measured", "-", "unknown")


def test_reproduction_quotes_the_command_line(run: Run) -> None:
    assert "edgekd compress recipes/quickstart.yaml -o 'data.root=my data'" in Page(render(run)).section("How to reproduce")


# ------------------------------------------------------------------------------------------------- figures
def figures(run: Run) -> dict[str, plots.Figure]:
    return Page(render(run)).figures


def test_every_figure_is_valid_for_plotly_and_has_its_place_on_the_page(run: Run) -> None:
    import plotly.graph_objects as go

    page = Page(render(run))
    places = {str(attrs["id"]) for tag, attrs in page.tags if tag == "div" and attrs.get("class") == "plot"}
    assert places == set(page.figures)
    assert len(places) == 5  # chart, two trainings, latencies, confusion
    for figure in page.figures.values():
        go.Figure(figure)  # raises on an unknown property or a bad value


def test_chart_has_one_point_for_each_model_at_its_own_figures(run: Run) -> None:
    figure = plots.tradeoff(run)
    assert figure is not None
    points = [p for t in figure["data"] for p in zip(t["hovertext"], t["x"], t["y"], strict=True)]
    drawn = {hover.split("</b>")[0].removeprefix("<b>"): (x, y) for hover, x, y in points}
    wanted = {s["name"]: s for s in run["stages"] if s["latency_ms"]} | {
        "teacher": run["teacher"],
        "student": run["baselines"][0],
        "shipped": run["targets"][0],
    }
    assert set(drawn) == set(wanted)
    for name, item in wanted.items():
        assert drawn[name][0] == item["latency_ms"]["p50"]
        assert drawn[name][1] == item["metric"] or name == "prune"
    assert plots.unplaced(run) == []


def test_point_below_the_axis_states_its_metric(run: Run) -> None:
    figure = plots.tradeoff(run)
    assert figure is not None
    assert "prune (12.22 %, below this axis)" in [a["text"] for a in figure["layout"]["annotations"]]


def test_chart_survives_latencies_and_budgets_that_a_log_axis_cannot_show(run: Run) -> None:
    run["stages"][1]["latency_ms"] = {"p50": 0.0}
    run["targets"][0]["budget"] = {"p95_ms": -1}
    figure = plots.tradeoff(run)
    assert figure is not None
    assert "distill (stage)" in plots.unplaced(run)
    assert not [a for a in figure["layout"]["annotations"] if a["text"].startswith("budget")]


def test_chart_tells_series_apart_without_colour(run: Run) -> None:
    figure = plots.tradeoff(run)
    assert figure is not None
    symbols = [t["marker"]["symbol"][0] for t in figure["data"]]
    assert len(set(symbols)) == len(symbols)


def test_chart_draws_budget_and_accuracy_limit(run: Run) -> None:
    figure = plots.tradeoff(run)
    assert figure is not None
    assert [a["text"] for a in figure["layout"]["annotations"]][-2:] == ["accuracy limit 96.17 %", "budget p95 0.5 ms"]


def test_long_curves_are_thinned_but_keep_validation_and_the_last_step() -> None:
    rows: list[Run] = [{"step": i, "loss": 1.0, "lr": 0.1, "val_metric": 0.5 if i % 997 == 5 else None} for i in range(50_000)]
    figure = plots.curves(rows)
    by_name = {t["name"]: t for t in figure["data"]}
    assert len(by_name["loss"]["x"]) < 2100
    assert by_name["loss"]["x"][-1] == 49_999
    assert by_name["val metric"]["x"] == [i for i in range(50_000) if i % 997 == 5]


def test_values_that_are_not_finite_become_gaps() -> None:
    run = make_run()
    run["curves"]["teacher"][3]["loss"] = float("nan")
    run["curves"]["teacher"][4]["terms"]["cross_entropy"] = float("inf")
    data = figures(run)["figure-2"]["data"]
    assert data[0]["y"][3] is None
    assert data[1]["y"][4] is None


@pytest.mark.parametrize("samples", [[1.0], [2.0] * 50, [0.1 * i for i in range(1, 300)], [1e-9, 1e9]])
def test_histogram_counts_every_sample_once(samples: list[float]) -> None:
    figure = plots.latencies({"shipped": samples})
    assert figure is not None
    assert sum(figure["data"][0]["y"]) == len(samples)


def test_confusion_of_many_classes_is_a_table_of_the_worst(run: Run) -> None:
    n = plots.MAX_CONFUSION_CLASSES + 1
    run["confusion"] = {"labels": [f"class {i}" for i in range(n)], "matrix": [[int(i == j) for j in range(n)] for i in range(n)]}
    run["confusion"]["matrix"][7][9] = 31
    section = Page(render(run)).section("Confusion on test")
    assert "class 7 class 9 31" in section
    assert len(figures(run)) == 4


def test_confusion_whose_rows_do_not_match_its_labels_is_left_out(run: Run) -> None:
    run["confusion"]["matrix"].pop()
    assert "no confusion matrix" in Page(render(run)).text


# ------------------------------------------------------------------------------------------------- console
@pytest.mark.parametrize("width", [80, 60, 120])
def test_summary_fits_the_width_and_keeps_every_verdict(run: Run, width: int) -> None:
    run["stages"][3] |= {"name": "a-rather-long-name-for-a-stage-of-a-recipe", "method": "some_long_method_name"}
    out = console(run, width)
    assert max(map(len, out.splitlines())) <= width
    rows = [line for line in out.splitlines() if " ms " in line]
    assert any("rolled back" in line and "335" in line for line in rows)
    assert sum("kept" in line for line in rows) == 2


def test_summary_wraps_reasons_in_full(run: Run) -> None:
    out = " ".join(console(run, 80).split())
    for item in run["stages"]:
        assert item["reason"] is None or item["reason"] in out
    assert headline(run) in out
    assert "rpi5: rpi5 cannot be reached from here" in out


def test_summary_without_colour_has_no_escape_codes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in console(run, 80, force_terminal=True, color_system="truecolor")
    assert "\x1b" not in console(run, 80, force_terminal=False, no_color=True)


@pytest.mark.parametrize("s", hostile(), ids=range(200))
def test_summary_of_hostile_strings_shows_them_and_does_nothing_else(s: str) -> None:
    run = make_run()
    run["recipe"]["name"] = run["stages"][1]["name"] = run["targets"][0]["device"] = run["warnings"][0] = run["report"] = s
    run["stages"][2] |= {"reason": s, "verdict": s[:10]}
    out = console(run, 80, force_terminal=True, color_system=None)
    assert all(c.isprintable() or c in "\n\u200c\u200d" for c in out)
    assert text.clean(s).replace(" ", "") in re.sub(r"\s", "", out)


def test_summary_of_a_poisoned_run_has_no_links(run: Run) -> None:
    out = console(poisoned(hostile()), 80, force_terminal=True, color_system="truecolor")
    assert "\x1b]" not in out
    assert re.fullmatch(r"(?:\x1b\[[0-9;]*m|[^\x1b\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069])*", out)


def test_stage_rows_show_a_dash_where_the_run_holds_nothing() -> None:
    row = stage_rows({"stages": [{"name": "export"}]})[0]
    assert row == ("export", *"-" * 10)


def test_report_modules_load_neither_torch_nor_plotly_nor_rich() -> None:
    code = "import sys, edgekd.report.html, edgekd.report.summary; print({'torch', 'plotly', 'rich', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


# ------------------------------------------------------------------------------------------------------------ a missed goal
def measured(name: str, kind: str, metric: float, p50: float, mb: float, verdict: str | None = None) -> dict[str, Any]:
    return {"name": name, "kind": kind, "metric": metric, "latency_ms": {"p50": p50}, "size_bytes": int(mb * 1e6), "verdict": verdict}


STAGES = [
    measured("teacher", "train", 0.96, 4.0, 21.0),
    measured("distill", "distill", 0.99, 0.8, 19.0),
    measured("prune", "prune", 0.95, 0.2, 3.0, "kept"),
    measured("recover", "distill", 0.98, 0.2, 3.0),
    measured("quantize", "quantize", 0.97, 0.25, 0.8, "kept"),
]


def missed(budget: dict[str, float], stages: list[dict[str, Any]], *, met: bool | None = True) -> dict[str, Any]:
    last = stages[-1]
    target = {"budget": budget, "latency_ms": last["latency_ms"], "size_bytes": last["size_bytes"], "budget_met": False if budget else None}
    return {"stages": stages, "targets": [target], "accept": {"met": met}}


def test_the_front_holds_what_no_other_stage_beats() -> None:
    assert [r["name"] for r in front(missed({}, STAGES))] == ["distill", "recover", "quantize"]


@pytest.mark.parametrize(
    ("budget", "stages", "met", "words"),
    [
        ({"p50_ms": 0.1}, STAGES, True, r"prune further: -o prune\.target=\{speedup: 11\}"),  # 4x reached, 2.5x missing, a tenth more
        ({"size_mb": 0.4}, STAGES, True, r"prune further: -o prune\.target=\{speedup: 8\.8\}"),
        ({"size_mb": 1.0}, STAGES[:4], True, r"add a stage `- quantize"),
        ({"p50_ms": 0.4}, STAGES[:2], True, r"add a stage `- prune: \{target: \{speedup: 2\.2\}\}`"),
        ({}, STAGES, False, r"prune less: -o prune\.target"),
        ({}, [*STAGES[:2], measured("quantize", "quantize", 0.9, 0.5, 5, "kept")], False, "leave int8 out"),
        ({}, STAGES[:2], False, r"train longer: -o distill\.epochs=N"),
        ({}, STAGES, True, "^$"),
    ],
)
def test_the_knob_is_the_one_of_the_largest_gap(budget: dict[str, float], stages: list[dict[str, Any]], met: bool, words: str) -> None:
    assert re.search(words, knob(missed(budget, stages, met=met)))


def test_each_operator_stands_in_the_report_with_what_it_alone_costs_and_gains() -> None:
    shown = Page(render(make_run())).section("Sensitivity of operators")
    for words in ("quantize@host.onnxruntime.searched: 2 of 3 operators", "0.912x [0.905, 0.920]", "-0.20", "1.30 %", "[b]conv[/b]<1>"):
        assert words in shown


def test_a_chart_of_models_that_are_alike_keeps_its_axis_narrow() -> None:
    run = make_run()
    for item in (run["teacher"], *run["stages"], *run["targets"], *run["baselines"]):
        item["metric"] = 0.66
    run["accept"] = {}
    low, high = plots.tradeoff(run)["layout"]["yaxis"]["range"]  # type: ignore[index]
    assert 0.6 < low < 0.66 < high < 0.72


def test_a_target_without_a_budget_has_met_nothing() -> None:
    run = make_run()
    run["targets"][0]["budget"] = {}
    assert next(row.verdict for row in target_rows(run)) == "no budget"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (14.6, 1, "14.6x faster"),
        (1, 1.2, "1.20x slower"),
        (142.3, 1, "142x faster"),
        (1220, 1, "1220x faster"),
        (1, 1, "1.00x faster"),
        (None, 1, ""),
    ],
)
def test_a_ratio_has_three_figures_and_no_exponent(before: float | None, after: float, words: str) -> None:
    assert ratio(before, after, "faster", "slower") == words
