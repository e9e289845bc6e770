"""The report's style sheet: one column of text and figures, light and dark, readable on a phone and on paper."""

from __future__ import annotations

_PALETTE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f7f8fa; --ink: #14181f; --ink-2: #5a6472; --ink-3: #8b94a1; --line: #e3e7ec;
    --line-2: #cfd5dd;
  --accent: #0b7a55; --teacher: #4a5361; --teacher-u: #a3abb7; --sla: #2563c9; --sla-u: #8fb0e6; --rcm: #d9730d;
    --merge: #7c4dbd;
  --turbo: #0b8f62; --critic: #b8336a; --heat: 11, 143, 98; --warn: #b54708;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f1216; --card: #171b21; --ink: #e8ebef; --ink-2: #a4adb9; --ink-3: #77818e; --line: #262c34;
      --line-2: #39414c;
    --accent: #3ecf99; --teacher: #b4bdc9; --teacher-u: #6a7482; --sla: #6ea4ff; --sla-u: #3f5f96; --rcm: #f2a14a;
      --merge: #b393e6;
    --turbo: #3ecf99; --critic: #ee7fae; --heat: 62, 207, 153; --warn: #f0a35e;
  }
}
"""
_TEXT = """* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); font-size: 16px; line-height: 1.6;
  font-family: Inter, -apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-font-smoothing: antialiased;
}
main { max-width: 1080px; margin: 0 auto; padding: 56px 24px 96px; }
header { border-bottom: 1px solid var(--line); padding-bottom: 28px; margin-bottom: 36px; }
.overline { font-size: 13px; font-weight: 600; letter-spacing: .08em; text-transform: uppercase;
  color: var(--accent); margin: 0 0 10px; }
h1 { font-size: clamp(28px, 4.4vw, 42px); line-height: 1.16; letter-spacing: -.022em; font-weight: 680;
  margin: 0 0 16px; max-width: 22em; text-wrap: balance; }
h2 { font-size: 23px; line-height: 1.3; letter-spacing: -.012em; font-weight: 650; margin: 64px 0 6px; }
h3 { font-size: 15px; font-weight: 620; margin: 0 0 8px; }
p { margin: 0 0 14px; max-width: 46em; }
.lead { font-size: 18.5px; line-height: 1.55; color: var(--ink); }
.facts { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 13.5px; color: var(--ink-2); margin: 18px 0 0;
  padding: 0; list-style: none; }
.facts b { font-weight: 560; color: var(--ink); }
.note, figcaption { font-size: 13.5px; line-height: 1.55; color: var(--ink-2); max-width: 54em; }
figcaption b { color: var(--ink); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 1px;
  border: 1px solid var(--line); border-radius: 12px; overflow: hidden; margin: 0 0 12px; }
.tile { padding: 18px 20px 16px; box-shadow: 0 0 0 1px var(--line); }
.tile .value { font-size: 31px; line-height: 1.15; letter-spacing: -.025em; font-weight: 660;
  font-variant-numeric: tabular-nums; }
.tile .value small { font-size: 17px; font-weight: 560; letter-spacing: 0; color: var(--ink-2); }
.tile .name { font-size: 13.5px; font-weight: 560; margin-top: 4px; }
.tile .detail { font-size: 12.5px; margin-top: 2px; color: var(--ink-2); font-variant-numeric: tabular-nums;
  line-height: 1.45; }
figure { margin: 22px 0 30px; } figure.medium { max-width: 660px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 28px 32px; align-items: start; }
.trio { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 20px 28px; }
.pair > *, .trio > * { margin: 0; min-width: 0; }
"""
_FIGURES = """svg { display: block; width: 100%; height: auto; overflow: visible; font-family: inherit; }
svg text { fill: var(--ink-2); font-size: 12px; font-variant-numeric: tabular-nums; }
svg text.axis { fill: var(--ink-3); }
svg text.label { font-size: 12.5px; font-weight: 560; stroke: none; }
svg text.barlabel { fill: var(--ink); font-size: 12.5px; }
svg text.barvalue { fill: var(--ink); font-size: 12.5px; font-weight: 560; }
svg tspan.muted, svg text.muted { fill: var(--ink-3); font-weight: 400; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .reference { stroke: var(--teacher); stroke-width: 1.6; stroke-dasharray: 6 4; }
svg .floor { stroke: var(--ink-3); stroke-width: 1.2; stroke-dasharray: 1.5 4; stroke-linecap: round; }
svg .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
svg .line.dashed { stroke-dasharray: 5 4; stroke-width: 1.8; }
svg .line.raw { stroke-width: 1; opacity: .22; }
svg .whisker { stroke-width: 1.6; opacity: .55; }
svg .dot { stroke: var(--paper); stroke-width: 1.5; }
svg .ghost { fill-opacity: .75; stroke-width: 1; }
svg circle.hollow { fill: none; stroke: var(--c); stroke-width: 1.2; opacity: .6; }
.s-teacher { --c: var(--teacher); } .s-teacher-u { --c: var(--teacher-u); } .s-sla { --c: var(--sla); }
  .s-sla-u { --c: var(--sla-u); }
.s-rcm { --c: var(--rcm); } .s-merge { --c: var(--merge); } .s-turbo { --c: var(--turbo); }
  .s-critic { --c: var(--critic); } .s-front { --c: var(--ink-3); }
svg .line, svg .whisker { stroke: var(--c); } svg .dot, svg .bar { fill: var(--c); }
  svg text[class*="s-"] { fill: var(--c); }
"""
_TABLES = """.scroll { overflow-x: auto; margin: 16px 0 12px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 560; font-size: 12.5px; color: var(--ink-2);
  border-bottom: 1.5px solid var(--ink); padding: 6px 10px; vertical-align: bottom; line-height: 1.3;
    white-space: nowrap; }
td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, .left { text-align: left; }
th:first-child, td:first-child { padding-left: 2px; }
th .centre { display: block; text-align: center; }
tr.group td { border-top: 1.5px solid var(--line-2); }
tr.main td { background: rgba(var(--heat), .075); font-weight: 600; }
td small { color: var(--ink-3); font-weight: 400; font-size: 11.5px; padding-left: 5px; }
td.none { color: var(--ink-3); }
td.heat { text-align: center; font-size: 12.5px; border-bottom: 2px solid var(--paper);
  border-left: 2px solid var(--paper); }
.key { display: inline-block; width: 9px; height: 9px; border-radius: 50%; background: var(--c); margin-right: 8px; }
.mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 12px; }
.films { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 32px 36px;
  margin: 20px 0; }
.film { margin: 0; min-width: 0; }
.film figcaption { color: var(--ink); font-size: 14px; line-height: 1.45; margin-bottom: 10px; min-height: 2.9em; }
.film figcaption span { color: var(--ink-3); }
.film .row { display: grid; grid-template-columns: 112px minmax(0, 1fr) minmax(0, var(--strip)); gap: 6px;
  align-items: center; margin-bottom: 4px; }
.film .row span { font-size: 12.5px; line-height: 1.25; color: var(--ink-2); }
.film .row span b { display: block; font-weight: 580; color: var(--ink); }
.film img { display: block; width: 100%; height: auto; border-radius: 3px; outline: 1px solid var(--line);
  outline-offset: -1px; }
.film img.small { image-rendering: pixelated; }
.flow { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; margin: 16px 0 20px; padding: 0;
  list-style: none; }
.flow li { border: 1px solid var(--line-2); border-radius: 8px; padding: 7px 13px 8px; background: var(--card);
  font-size: 13.5px; font-weight: 580; line-height: 1.35; }
.flow li small { display: block; font-weight: 400; font-size: 12px; color: var(--ink-2);
  font-variant-numeric: tabular-nums; }
.flow li.arrow { border: 0; background: none; padding: 0; color: var(--ink-3); font-weight: 400; }
.status { font-size: 12px; font-weight: 560; color: var(--accent); } .status.open { color: var(--warn); }
details { margin: 12px 0; } summary { cursor: pointer; font-size: 13.5px; color: var(--ink-2); }
footer { margin-top: 72px; padding-top: 20px; border-top: 1px solid var(--line); font-size: 13px;
  color: var(--ink-2); }
dl.terms { display: grid; grid-template-columns: max-content 1fr; gap: 5px 20px; font-size: 13.5px; margin: 12px 0; }
dl.terms dt { font-weight: 580; } dl.terms dd { margin: 0; color: var(--ink-2); max-width: 50em; }
@media (max-width: 760px) {
  main { padding: 32px 16px 64px; } .pair { grid-template-columns: 1fr; } h2 { margin-top: 48px; }
  .film .row { grid-template-columns: 84px minmax(0, 1fr) minmax(0, var(--strip)); gap: 5px; }
  dl.terms { grid-template-columns: 1fr; gap: 0; } dl.terms dd { margin-bottom: 8px; }
}
@media print { main { max-width: none; padding: 0; } h2 { break-after: avoid; }
  figure, .film, tr { break-inside: avoid; } }
"""

CSS = _PALETTE + _TEXT + _FIGURES + _TABLES
# Of a figure that is a file of its own.
FIGURE_CSS = _PALETTE + _FIGURES + 'svg { font-family: Inter, system-ui, "Segoe UI", Roboto, Arial, sans-serif; }'
