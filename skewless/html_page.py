"""What the reports in HTML share: one file with its styles inside, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# Name: (in light, in dark). Figures are drawn in the light colours, which the SVG then turns into CSS variables.
PALETTE = {
    "ink": ("#1c2127", "#e7eaee"),
    "muted": ("#56606b", "#a3adb8"),
    "grid": ("#d5dae0", "#3b444e"),
    "reference": ("#0a62ad", "#62b2ff"),
    "candidate": ("#bf4a04", "#ff9e5e"),
    "flip": ("#b3261f", "#ff7d74"),
}


def document(title: str, sections: Sequence[str], css: str = "") -> str:
    """The whole page. title: plain text; sections: ready HTML; css: styles besides those that all reports share."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>{_css()}{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _css() -> str:
    light, dark = (";".join(f"--{name}:{pair[k]}" for name, pair in PALETTE.items()) for k in (0, 1))
    return f":root{{{light};{_GROUND_LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{dark};{_GROUND_DARK}}}}}{_CSS}"


_GROUND_LIGHT = "--ground:#f4f6f8;--panel:#fff;--good:#14713a;--tint:#fff6ec"
_GROUND_DARK = "--ground:#14181d;--panel:#1d232a;--good:#67cf8f;--tint:#33291d"
_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.9rem;line-height:1.2;margin:.2em 0}
h2{font-size:1.3rem;margin:0 0 .3em}
h3{font-size:1.1rem;margin:0;overflow-wrap:anywhere}
h4{font-size:.95rem;margin:1.2em 0 .2em}
p{margin:.4em 0;max-width:75ch}
section,article{background:var(--panel);border:1px solid var(--grid);border-radius:10px;padding:20px;margin:18px 0}
section section,section article{border-width:1px 0 0;border-radius:0;padding:20px 0 0;margin:24px 0 0}
.eyebrow,.note,figcaption{color:var(--muted);font-size:.9rem}
.headline{border-left:6px solid var(--muted);padding-left:14px}
.headline.good{border-color:var(--good)}.headline.warn{border-color:var(--candidate)}.headline.bad{border-color:var(--flip)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:12px;margin:18px 0 0;padding:0}
.tiles div{border:1px solid var(--grid);border-radius:8px;padding:12px 14px}
.tiles dt{color:var(--muted);font-size:.85rem}
.tiles dd{margin:0;font-size:1.35rem;font-weight:650;line-height:1.3;overflow-wrap:anywhere}
.tiles dd small{display:block;font-size:.85rem;font-weight:400;color:var(--muted)}
.note{font-weight:400}.unit{white-space:nowrap}.shape{white-space:nowrap;font-size:.8rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums;margin:.6em 0}
th,td{padding:6px 10px 6px 0;border-bottom:1px solid var(--grid);text-align:left;vertical-align:top}
thead th{color:var(--muted);font-weight:600;white-space:nowrap;border-bottom-width:2px}
tbody th{font-weight:600}
.n{text-align:right;white-space:nowrap}
th[colspan]{text-align:center;border-left:4px solid var(--panel);border-bottom-width:1px}
tr.first{background:var(--tint)}
tfoot td,tfoot th{border-bottom:0;border-top:2px solid var(--grid)}
.badge{display:inline-block;border:1.5px solid currentColor;border-radius:99px;padding:0 8px;font-size:.8rem;
font-weight:600;white-space:nowrap}
.same{color:var(--good)}.differs{color:var(--candidate)}.flip{color:var(--flip)}
.reference{color:var(--reference)}.candidate{color:var(--candidate)}
figure{margin:0}
figure img{display:block;max-width:100%;height:auto}
.wide{overflow-x:auto}.wide img{min-width:640px}
.trio{display:grid;grid-template-columns:repeat(auto-fit,minmax(270px,1fr));gap:14px}
.trio figcaption{color:var(--ink);font-weight:600}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:22px;align-items:start}
details summary{cursor:pointer;font-weight:600}
code{font-size:.88em;overflow-wrap:anywhere}
dl.metadata{display:grid;grid-template-columns:minmax(110px,max-content) 1fr;gap:4px 16px;font-size:.92rem}
dl.metadata dt{color:var(--muted);grid-column:1}dl.metadata dd{margin:0;grid-column:2;overflow-wrap:anywhere}
"""


def table(
    head: Sequence[str], rows: Iterable[str], *, numeric: int, caption: str, foot: str = "", groups: str = ""
) -> str:
    """A table whose columns from `numeric` on hold numbers; `rows` are made by `row`, `groups` is a row of headers."""
    cells = "".join(
        f'<th scope="col"{" class=n" if k >= numeric else ""}>{escape(name)}</th>' for k, name in enumerate(head)
    )
    return (
        f'<figure>{f"<figcaption>{caption}</figcaption>" if caption else ""}<div class="scroll" tabindex="0"><table><thead>{groups}<tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody>{f'<tfoot>{foot}</tfoot>' if foot else ''}</table></div></figure>"
    )


def row(head: str, cells: Sequence[str], *, numeric: int, kind: str = "") -> str:
    """A row of ready HTML: the row header, then cells, of which those from column `numeric` on are numbers."""
    inner = "".join(f"<td{' class=n' if k >= numeric else ''}>{cell}</td>" for k, cell in enumerate(cells, start=1))
    return f'<tr{f" class={kind}" if kind else ""}><th scope="row">{head}</th>{inner}</tr>'


def badge(text: str, kind: str) -> str:
    return f'<span class="badge {kind}">{escape(text)}</span>'
