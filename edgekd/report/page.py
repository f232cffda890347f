"""The frame of the report: style, the script that draws the figures, and a policy that lets nothing else run or load."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from html import escape
from typing import Any

from edgekd.report.text import clean

_CSS = """
:root {
  color-scheme: light;
  --ink: #1c2430; --soft: #5b6675; --rule: #dbe1e8; --band: #f5f7fa; --paper: #fff;
  --good: #1b7a50; --bad: #b3303f; --so-so: #96600a;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --ink: #e4e9f0; --soft: #9aa6b5; --rule: #333d4a; --band: #1c232c; --paper: #13181f;
    --good: #5cc795; --bad: #f08a95; --so-so: #e3ad52;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1120px; padding: 24px 20px 64px; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
section { overflow-x: auto; }
h1 { margin: 0; font-size: 26px; line-height: 1.25; }
h2 { margin: 40px 0 8px; font-size: 19px; }
h3 { margin: 20px 0 0; font-size: 15px; }
p { margin: 8px 0; max-width: 80ch; }
.note, .missing, small { color: var(--soft); }
.missing { font-style: italic; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; margin: 18px 0; }
.tile { border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 21px; line-height: 1.3; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px 6px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); unicode-bidi: isolate; }
th { color: var(--soft); font-weight: 600; }
td { max-width: 340px; }
td.num { white-space: nowrap; }
td.wide { min-width: 210px; }
.good, .bad, .so-so { font-weight: 600; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.so-so { color: var(--so-so); }
.predicted { font-style: italic; background: repeating-linear-gradient(135deg, transparent 0 6px, var(--rule) 6px 7px); }
pre {
  background: var(--band); border: 1px solid var(--rule); border-radius: 6px; padding: 10px 12px; font-size: 13px; white-space: pre-wrap;
}
summary { cursor: pointer; }
.plot { width: 100%; }
@media screen and (max-width: 720px) {
  body { padding: 16px 12px 48px; }
  thead { position: absolute; left: -9999px; }
  tr { display: block; border: 1px solid var(--rule); border-radius: 8px; padding: 6px 10px; margin: 8px 0; }
  td { max-width: none; display: grid; grid-template-columns: 104px minmax(0, 1fr); gap: 8px; border: 0; padding: 2px 0; }
  td.num { white-space: normal; }
  td::before { content: attr(data-label); color: var(--soft); }
}
@media print {
  body { max-width: none; padding: 0; font-size: 12px; }
  table { font-size: 9px; }
  th, td { padding: 4px 6px 4px 0; }
  td.num { white-space: normal; }
  td.wide { min-width: 120px; }
  section { overflow: visible; }
  tr, .plot, .tiles { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .modebar { display: none; }
}
"""

# Colours follow the page's (dark on screen, light on paper); for print, a page is 680 px wide and a <details> open.
# Danger: plotly.js 4 shows a "Share chart" button that uploads the data unless told not to, hence the closed list of buttons.
_SCRIPT = """
(function () {
  var figures = JSON.parse(document.getElementById("figures").textContent);
  var buttons = [["toImage", "resetScale2d"]];
  var offline = {showSendToCloud: false, plotlyServerURL: "", typesetMath: false, modeBarButtons: buttons};
  var config = Object.assign({responsive: true, displaylogo: false}, offline);
  var dark = matchMedia("screen and (prefers-color-scheme: dark)");
  function themed(figure) {
    var css = getComputedStyle(document.documentElement);
    var ink = css.getPropertyValue("--ink").trim(), rule = css.getPropertyValue("--rule").trim(), none = "rgba(0,0,0,0)";
    var axis = {gridcolor: rule, zerolinecolor: rule, linecolor: rule, automargin: true};
    var font = {color: ink, family: "system-ui, sans-serif", size: 12};
    var base = {font: font, modebar: {bgcolor: none}, paper_bgcolor: none, plot_bgcolor: none, xaxis: axis, yaxis: axis};
    return Object.assign({}, figure.layout, {template: {layout: base}});
  }
  function draw() {
    Object.keys(figures).forEach(function (id) {
      Plotly.react(id, figures[id].data, themed(figures[id]), config);
    });
  }
  function fit(size) {
    Object.keys(figures).forEach(function (id) { Plotly.relayout(id, size); });
  }
  dark.addEventListener("change", draw);
  addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (d) { d.open = true; });
    fit({autosize: false, width: 680});
  });
  addEventListener("afterprint", function () { fit({autosize: true, width: null}); });
  draw();
})();
"""

_SHELL = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
{body}
<noscript><p class="missing">The charts need JavaScript; all tables can be read without it.</p></noscript>
<script type="application/json" id="figures">{figures}</script>
<script>{library}</script>
<script>{script}</script>
</body>
</html>
"""


def page(title: str, body: str, figures: dict[str, Any]) -> str:
    """The whole document: `body` is HTML, already escaped; `figures` maps the id of an empty element in it to a plotly figure."""
    library, script = ("", "")
    if figures:
        from plotly.offline import get_plotlyjs  # 4.8 MB of script that only a page with figures needs

        library, script = get_plotlyjs(), _SCRIPT
    parts = {"title": escape(clean(title)), "css": _CSS, "body": body, "figures": _data(figures), "policy": _policy(library, script)}
    return _SHELL.format(**parts, library=library, script=script)


def _policy(*scripts: str) -> str:
    """No request leaves the page, and no script runs but the two whose hashes are named, whatever a label manages to inject."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def _data(figures: dict[str, Any]) -> str:
    """JSON that cannot end its script element: `<`, `>` and `&` only as escapes, NaN and infinity as null."""
    body = json.dumps(_finite(figures), allow_nan=False, separators=(",", ":"))
    return body.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
