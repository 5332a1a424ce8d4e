"""The style sheet of report.html: light and dark, phone to desktop, and print."""

STYLE = """
:root { color-scheme: light dark;
  --ground: #f5f6f8; --card: #ffffff; --text: #1d2430; --muted: #5d6878; --line: #e4e7ec;
  --accent: #2f6fd6; --warm: #c2410c; --soft: #eef3fc; }
@media screen and (prefers-color-scheme: dark) { :root {
  --ground: #0e1219; --card: #161b24; --text: #e6eaf1; --muted: #98a2b3; --line: #2b3341;
  --accent: #6ea1ff; --warm: #ff8a5c; --soft: #1b2536; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 44px 0 12px; }
h3 { font-size: 1rem; margin: 0 0 10px; }
p { margin: 0 0 12px; max-width: 75ch; }
.over { color: var(--muted); font-size: 0.85rem; margin: 0 0 4px; }
.muted, .note, figcaption { color: var(--muted); }
.note, figcaption { font-size: 0.9rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px;
  margin: 24px 0 0; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 1.7rem; line-height: 1.2; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.tile .name { font-size: 0.9rem; }
.tile .more { font-size: 0.82rem; color: var(--muted); }
.tile.main b { color: var(--warm); }
.scroll { overflow-x: auto; margin: 0 0 12px; }
table { border-collapse: collapse; width: 100%; font-size: 0.93rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { font-weight: 600; color: var(--muted); font-size: 0.84rem; vertical-align: bottom;
  white-space: normal; }
th:first-child, td:first-child { text-align: left; }
tbody th, td { vertical-align: top; }
tbody th { font-weight: inherit; color: inherit; font-size: inherit; white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
caption { text-align: left; padding: 10px 12px 2px; color: var(--muted); font-size: 0.84rem; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
td .more, th .more { display: block; color: var(--muted); font-size: 0.8rem; }
td b { font-weight: 650; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr));
  gap: 16px; align-items: start; }
figure { margin: 0; padding: 16px 18px; break-inside: avoid; }
figure img { display: block; width: 100%; max-width: 520px; height: auto; margin: 0 auto 8px; }
.sample { padding: 16px 18px; margin: 0 0 14px; break-inside: avoid; }
.prompt { font-weight: 600; margin: 0 0 10px; overflow-wrap: anywhere; white-space: pre-wrap; }
.cards { margin: 12px 0 0; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr));
  gap: 12px; }
.answer { border-left: 3px solid var(--line); padding: 0 0 0 12px; min-width: 0; }
.answer p { margin: 2px 0 6px; overflow-wrap: anywhere; white-space: pre-wrap; }
.answer .who { font-size: 0.8rem; font-weight: 650; color: var(--muted); }
.answer .scores { font-size: 0.8rem; color: var(--muted); font-variant-numeric: tabular-nums; }
.answer.trained { border-left-color: var(--warm); }
.answer.trained .who { color: var(--warm); }
.road { display: flex; flex-wrap: wrap; gap: 8px; margin: 0 0 16px; padding: 0; list-style: none; }
.road li { padding: 8px 14px; font-size: 0.9rem; }
.road span { display: block; color: var(--muted); font-size: 0.82rem; }
dl { display: grid; grid-template-columns: minmax(90px, max-content) 1fr; gap: 6px 18px; margin: 0;
  font-size: 0.93rem; }
dt { font-weight: 600; } dd { margin: 0; color: var(--muted); overflow-wrap: anywhere; }
details { padding: 12px 18px; margin: 0 0 12px; }
summary { cursor: pointer; font-weight: 600; }
pre { margin: 12px 0 0; overflow-x: auto; font: 0.82rem/1.5 ui-monospace, "SF Mono", Menlo,
  Consolas, monospace; }
@media (max-width: 560px) { main { padding: 20px 14px 48px; } h1 { font-size: 1.5rem; }
  th, td { padding: 7px 9px; } .tiles { grid-template-columns: 1fr 1fr; }
  .tile { padding: 12px; } .tile b { font-size: 1.35rem; }
  figure, .sample { padding: 12px; } dl { grid-template-columns: 1fr; } dd { margin: 0 0 6px; } }
@media print { :root { --ground: #ffffff; --card: #ffffff; --text: #000000; --muted: #444444;
  --line: #cccccc; --accent: #000000; --warm: #9a3412; }
  body { font-size: 11px; } main { max-width: none; padding: 0; }
  .tiles { grid-template-columns: repeat(4, 1fr); } .figures { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; } pre { white-space: pre-wrap; } th, td { white-space: normal; }
  h2, h3, .note:has(+ .card) { break-after: avoid; } .card, tr { break-inside: avoid; }
  /* What one would click open is on paper, too. */
  details::details-content { content-visibility: visible; block-size: auto; } }
"""
