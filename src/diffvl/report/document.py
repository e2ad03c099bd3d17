"""What all pages have in common: one file each, with its styles inside; no script runs and nothing is fetched."""

from collections.abc import Sequence

from diffvl.report.chart import escape

STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f6f7f9; --ink: #1c2128; --dim: #5c6570; --edge: #d8dce2;
  --right: #15803d; --wrong: #b42318; --hue0: #2563eb; --hue1: #c2570c; --hue2: #0f766e; --hue3: #7c3aed;
  --hue4: #be185d; --hue5: #4d7c0f; --hue6: #0369a1; --hue7: #374151 }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1d2127; --ink: #e6e9ed; --dim: #9aa4af; --edge: #363c45;
  --right: #5bd08a; --wrong: #ff8f85; --hue0: #7aa7ff; --hue1: #ffa25f; --hue2: #4fd1b8; --hue3: #c4a5ff;
  --hue4: #ff8ac0; --hue5: #a3d65c; --hue6: #67c1f5; --hue7: #cbd5e1 } }
body { margin: auto; max-width: 1180px; padding: 24px; background: var(--back); color: var(--ink); font: 15px/1.5 sans-serif }
h1 { font-size: 1.5em; margin: 0 } h2 { font-size: 1.15em; margin: 2em 0 .6em } h3 { font-size: 1em; margin: 0 }
p, dl, dd, ul, figure { margin: 0; padding: 0 } p, dt, figcaption { color: var(--dim); font-size: .87em } p { margin-bottom: 8px }
.tiles, .curves, .samples { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)) }
.tiles { margin-top: 18px; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)) }
.curves { grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)) }
.tile, article, figure, pre { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 12px 14px }
.tile b { font-size: 1.25em } svg { display: block; width: 100%; height: auto } text { fill: var(--dim); font-size: 12px }
.h0 { --hue: var(--hue0) } .h1 { --hue: var(--hue1) } .h2 { --hue: var(--hue2) } .h3 { --hue: var(--hue3) }
.h4 { --hue: var(--hue4) } .h5 { --hue: var(--hue5) } .h6 { --hue: var(--hue6) } .h7 { --hue: var(--hue7) }
polyline { fill: none; stroke: var(--hue); stroke-width: 2.4; stroke-linejoin: round } .raw { stroke-width: 1; opacity: .45 }
.dots { stroke-width: 1.5; stroke-dasharray: 4 4 } .points { stroke: none }
circle { fill: var(--hue); stroke: var(--card) } .grid { stroke: var(--edge) }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none }
.legend svg { display: inline; width: 28px; margin-right: 6px }
img { display: block; max-width: 100%; height: auto; margin: 0 auto 10px; border-radius: 4px } dt { margin-top: .4em }
dd, h3, pre { white-space: pre-wrap; overflow-wrap: anywhere } .right { color: var(--right) } .wrong { color: var(--wrong) }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 4px 20px 4px 0; border-bottom: 1px solid var(--edge); vertical-align: top }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """Makes a whole page of its parts, which are HTML."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Makes a table of texts; nothing without rows. The first cell of a row names it."""
    if not rows:
        return ""
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    lines = [f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>" for row in rows]
    return f"<table>{top}{''.join(lines)}</table>"
