"""A report as one HTML page: no script, nothing from the network, light and dark.

The page forbids itself to load anything (Content-Security-Policy), so that even a name that
got through unescaped could do nothing. All text passes through `drawing.escape`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qchain.forensics.drawing import chain_picture, escape, human, ownership_map
from qchain.forensics.look import Look
from qchain.forensics.report import LayerReport, Report, date_text

__all__ = ["page"]

_MOST_ROWS = 1000
_MOST_KINDS = 6

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2228; --faint: #5d6772;
  --line: #d6dbe0; --box: #f4f6f8; --mark: #1f6fa8; --shade: #9db4c6;
  --alarm: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181c; --ink: #e3e8ec; --faint: #9aa6b1; --line: #343c44;
    --box: #1d2329; --mark: #5cb3ec; --shade: #46647c;
    --alarm: #ff8a80; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 64rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; break-after: avoid; }
p, dd { overflow-wrap: anywhere; }
.lead, .key { color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: nowrap; }
td.w, th.w { min-width: 9rem; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
code, .digest { font: .8125rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
.picture { width: 100%; min-width: 42rem; height: auto; display: block; }
.picture text { fill: var(--ink); font: 14px system-ui, sans-serif; }
.picture .small { fill: var(--faint); font-size: 12px; }
.picture .end { text-anchor: end; }
.picture .number { fill: var(--mark); font-weight: 600; }
.box { fill: var(--box); stroke: var(--line); }
.box.active { stroke: var(--mark); stroke-width: 2; }
.arrow { stroke: var(--faint); stroke-width: 1.5; fill: none; }
.head { fill: var(--faint); }
.owned { fill: var(--mark); }
.shadowed { fill: var(--shade); }
.track { fill: var(--box); }
.missing { fill: none; stroke: var(--alarm); stroke-dasharray: 6 4; }
.tick { stroke: var(--line); }
.alarm { color: var(--alarm); font-weight: 600; }
.l1 { opacity: .3; } .l2 { opacity: .5; } .l3 { opacity: .75; } .l4 { opacity: 1; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; margin: 1rem 0; }
dt { color: var(--faint); } dd { margin: 0; }
@media print { body { margin: 0; max-width: none; } .picture { min-width: 0; } }
"""


def page(report: Report) -> str:
    """The whole page; ASCII only, so that no encoding can be guessed wrong."""
    name = report.layers[0].name
    body = [
        f"<h1>{escape(name)}</h1>",
        (
            f'<p class="lead">A chain of {len(report.layers)} '
            f"{'image' if len(report.layers) == 1 else 'images'}, a disk of "
            f"{human(report.virtual_size)} ({report.virtual_size} bytes)</p>"
        ),
        _verdict(report),
        _summary(report),
        "<h2>The chain</h2>",
        (
            '<p class="key">Each image backs on the one below. Bars: bytes that the guest sees '
            "from this image, then (lighter) bytes that an image above hides.</p>"
        ),
        _scrolled(chain_picture(report.layers, report.missing)),
        "<h2>Who owns which part of the disk</h2>",
        (
            f'<p class="key">Each column is {human(report.virtual_size / report.shares.shape[1])}; '
            "the stronger the colour, the more of it comes from this layer.</p>"
        ),
        _scrolled(ownership_map(report)),
        "<h2>Problems, warnings, notes</h2>",
        _problems(report),
        "<h2>Layers</h2>",
        _layers(report.layers),
        "<h2>Files</h2>",
        _files(report.layers),
        "<h2>Internal snapshots</h2>",
        _snapshots(report.layers),
        "<h2>Bitmaps</h2>",
        _bitmaps(report.layers),
        "<h2>What nothing refers to</h2>",
        (
            '<p class="key">Clusters that are counted as used though nothing refers to them '
            "(leaked), that are free, and the rest of the file (slack): old data stays there, and "
            "data can be hidden there. 'qchain leaks' extracts them.</p>"
        ),
        _unused(report.layers),
        "<h2>Digests (SHA-256)</h2>",
        (
            '<p class="key">Of a file, as sha256sum gives it; of what the guest sees, as sha256sum '
            "of what 'qemu-img convert -O raw' makes of the image.</p>"
        ),
        _digests(report),
    ]
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)} - qchain report</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    return text.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _scrolled(html: str) -> str:
    """What may be wider than a small screen."""
    return f'<div class="scroll">{html}</div>'


def _verdict(report: Report) -> str:
    """One sentence on top, so that nobody has to find the table of problems."""
    problems = sum(len(layer.problems) for layer in report.layers)
    warnings = len(report.warnings)
    if not problems and not warnings:
        return ""
    parts = [
        f"{count} {word if count == 1 else word + 's'}"
        for count, word in ((problems, "problem"), (warnings, "warning"))
        if count
    ]
    return f'<p class="alarm">{" and ".join(parts)}, see below.</p>'


def _summary(report: Report) -> str:
    rows = [
        ("Image", f"<code>{escape(report.image)}</code>"),
        ("Made", escape(report.made)),
        ("Tool", escape(report.tool)),
        ("Command", f"<code>{escape(report.command)}</code>"),
    ]
    return f"<dl>{''.join(f'<dt>{key}</dt><dd>{value}</dd>' for key, value in rows)}</dl>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> str:
    """A table; a heading that ends in '>' is for numbers, in '!' for what needs room.

    Cells are escaped here.
    """
    found = list(rows)
    if not found:
        return f"<p>{empty}</p>"
    kinds = {">": ' class="n"', "!": ' class="w"'}
    classes = [kinds.get(head[-1], "") for head in heads]
    top = "".join(
        f"<th{kind}>{escape(head.rstrip('>!'))}</th>"
        for head, kind in zip(heads, classes, strict=True)
    )
    lines = [
        "<tr>"
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, classes, strict=True))
        + "</tr>"
        for row in found[:_MOST_ROWS]
    ]
    more = len(found) - _MOST_ROWS
    rest = f"<p>{more} more are not shown.</p>" if more > 0 else ""
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>'
        f"{''.join(lines)}</tbody></table></div>{rest}"
    )


def _problems(report: Report) -> str:
    rows = [("chain", "warning", text) for text in report.warnings]
    rows += [("chain", "note", text) for text in report.notes]
    for layer in report.layers:
        rows += [(layer.name, "problem", text) for text in layer.problems]
        rows += [(layer.name, "note", text) for text in layer.warnings]
    return _table(("where!", "kind", "what!"), rows, "None was found.")


def _layers(layers: Sequence[LayerReport]) -> str:
    heads = ["#>", "image!", "virtual>", "file>", "on disk>", "allocated>", "owned>"]
    heads += ["shadowed>", "last change!"]
    rows = (
        (
            index,
            layer.name,
            human(layer.virtual_size),
            human(layer.file_size),
            human(layer.disk_size),
            human(layer.allocated),
            human(layer.owned),
            human(layer.shadowed),
            layer.changed,
        )
        for index, layer in enumerate(layers)
    )
    return _table(heads, rows, "None.")


def _files(layers: Sequence[LayerReport]) -> str:
    rows = (
        (
            index,
            layer.path if layer.data_path is None else f"{layer.path}, data in {layer.data_path}",
            f"{layer.format}: {layer.details}" if layer.details else layer.format,
            "-" if layer.cluster_size is None else human(layer.cluster_size),
            layer.backing or "-",
        )
        for index, layer in enumerate(layers)
    )
    heads = ("#>", "file!", "format!", "cluster>", "backing file, as recorded!")
    return _table(heads, rows, "None.")


def _unused(layers: Sequence[LayerReport]) -> str:
    rows = (
        (
            layer.name,
            each.kind,
            each.start,
            human(each.length),
            *(("not looked at", "-", "-") if look is None else _seen(look)),
        )
        for layer in layers
        for each, look in layer.unused
    )
    heads = ("image!", "kind", "at>", "length>", "content", "entropy>", "files that begin, words!")
    return _table(heads, rows, "None.")


def _seen(look: Look) -> tuple[str, str, str]:
    kinds = list(dict.fromkeys(name for _, name in look.magic))
    if len(kinds) > _MOST_KINDS:
        kinds[_MOST_KINDS:] = [f"{len(kinds) - _MOST_KINDS} more kinds"]
    words = [f"\u201c{look.sample[:60]}\u201d"] if look.sample else []
    return look.summary, f"{look.entropy:.2f}", "; ".join([*kinds, *words]) or "-"


def _snapshots(layers: Sequence[LayerReport]) -> str:
    rows = (
        (
            layer.name,
            entry.id,
            entry.name,
            date_text(entry.date_sec),
            human(entry.disk_size),
            human(entry.vm_state_size) if entry.vm_state_size else "-",
        )
        for layer in layers
        for entry in layer.snapshots
    )
    return _table(("image!", "id!", "name!", "taken", "disk>", "VM state>"), rows, "None.")


def _bitmaps(layers: Sequence[LayerReport]) -> str:
    rows = (
        (layer.name, entry.name, human(entry.granularity), ", ".join(entry.flags) or "-")
        for layer in layers
        for entry in layer.bitmaps
    )
    return _table(("image!", "name!", "granularity>", "flags"), rows, "None.")


def _digests(report: Report) -> str:
    rows = [
        (path, digest)
        for layer in report.layers
        for path, digest in ((layer.path, layer.digest), (layer.data_path, layer.data_digest))
        if path is not None and digest is not None
    ]
    if report.digest is not None:
        rows.insert(0, ("what the guest sees", report.digest))
    return _table(("of!", "SHA-256"), rows, "Not made.")
