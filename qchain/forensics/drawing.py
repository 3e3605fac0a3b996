"""The pictures of a report, as inline SVG: the chain, and who owns which part of the disk.

Colours come from the page's style, so that one picture serves light and dark. Every text
passes through `escape`: a file name is data from outside.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from qchain.errors import printable
from qchain.forensics.report import LayerReport, Report

__all__ = ["chain_picture", "escape", "human", "ownership_map"]

_WIDTH = 960
_BOX = 46
_STEP = 66
_SHOWN = 12
_ROWS = 40
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def escape(text: object) -> str:
    """Any text as harmless HTML: control and direction characters are shown as escapes."""
    return html.escape(printable(text), quote=True)


def human(size: float) -> str:
    """Bytes for a person: 1536 is '1.5 KiB'."""
    value = float(size)
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def _short(name: str, limit: int) -> str:
    name = printable(name)
    half = (limit - 1) // 2
    return name if len(name) <= limit else f"{name[:half]}…{name[-half:]}"


def chain_picture(layers: Sequence[LayerReport], missing: str | None = None) -> str:
    """Boxes from the active layer down to the base; the bar shows owned and shadowed bytes.

    Args:
        missing: a base that is missing gets an empty box.
    """
    shown: list[int | None] = list(range(len(layers)))
    if len(layers) > _SHOWN:
        shown = [*range(_SHOWN - 2), None, len(layers) - 1]
    most = max((layer.allocated for layer in layers), default=0) or 1
    height = (len(shown) + (missing is not None)) * _STEP
    out = [
        (
            f'<svg class="picture" viewBox="0 0 {_WIDTH} {height}" role="img" '
            f'aria-label="The chain, active image first">'
        )
    ]
    for row, index in enumerate(shown):
        top = row * _STEP + 4
        if row:
            out.append(_arrow(top))
        if index is None:
            text = f"{len(layers) - len(shown) + 1} more images"
            out.append(f'<text class="small" x="60" y="{top + 28}">{text}</text>')
            continue
        last = index == len(layers) - 1 and missing is None
        out.append(_box(layers[index], index, top, most, last))
    if missing is not None:
        top = len(shown) * _STEP + 4
        name = escape(_short(missing.rpartition("/")[2], 48))
        out.append(
            f"{_arrow(top)}<g><title>{escape(missing)}</title>"
            f'<rect class="missing" x="4" y="{top}" width="{_WIDTH - 8}" height="{_BOX}" rx="6"/>'
            f'<text class="name" x="60" y="{top + 20}">{name}</text>'
            f'<text class="small" x="60" y="{top + 37}">missing, taken for zeroes</text></g>'
        )
    return "".join([*out, "</svg>"])


def _arrow(top: int) -> str:
    """Down to a box that begins at `top`."""
    return (
        f'<path class="arrow" d="M 40 {top - 16} V {top - 3}"/>'
        f'<path class="head" d="M 35 {top - 9} L 40 {top - 2} L 45 {top - 9} Z"/>'
    )


def _box(layer: LayerReport, index: int, top: int, most: int, last: bool) -> str:
    role = "active" if index == 0 else "base" if last else ""
    owned, shadowed = (400 * part / most for part in (layer.owned, layer.shadowed))
    title = f"{layer.path}: {layer.owned} bytes owned, {layer.shadowed} shadowed"
    note = f"{layer.format}, {human(layer.virtual_size)}, {human(layer.disk_size)} on disk"
    return (
        f"<g><title>{escape(title)}</title>"
        f'<rect class="box {role}" x="4" y="{top}" width="{_WIDTH - 8}" height="{_BOX}" rx="6"/>'
        f'<text class="number" x="20" y="{top + 29}">{index}</text>'
        f'<text class="name" x="60" y="{top + 20}">{escape(_short(layer.name, 48))}</text>'
        f'<text class="small" x="60" y="{top + 37}">{escape(note)}'
        f"{f', {role}' if role else ''}</text>"
        f'<rect class="owned" x="510" y="{top + 10}" width="{owned:.1f}" height="12"/>'
        f'<rect class="shadowed" x="{510 + owned:.1f}" y="{top + 10}" width="{shadowed:.1f}" '
        f'height="12"/>'
        f'<text class="small" x="510" y="{top + 37}">{human(layer.owned)} owned, '
        f"{human(layer.shadowed)} shadowed</text></g>"
    )


def ownership_map(report: Report) -> str:
    """One row per layer, the disk from left to right; the darker, the more of it is owned."""
    regions = report.shares.shape[1]
    rows = [index for index, owned in enumerate(report.shares) if index == 0 or owned.any()]
    left = 190.0
    cell = (_WIDTH - 8 - left) / regions
    dropped = len(rows) - _ROWS
    rows = rows[:_ROWS]
    height = 28 + 22 * len(rows) + 4
    per_region = max(report.virtual_size / regions, 1.0)
    out = [
        (
            f'<svg class="picture" viewBox="0 0 {_WIDTH} {height}" role="img" '
            f'aria-label="Which layer owns which part of the disk">'
        )
    ]
    for quarter in range(5):
        place = left + quarter * cell * regions / 4
        end = " end" if quarter == 4 else ""
        size = human(report.virtual_size * quarter / 4) if quarter else "0"
        out.append(f'<path class="tick" d="M {place:.1f} 18 V {height}"/>')
        out.append(f'<text class="small{end}" x="{place:.1f}" y="13">{size}</text>')
    for row, index in enumerate(rows):
        top = 24 + 22 * row
        name = report.layers[index].name
        out.append(
            f'<text class="small" x="4" y="{top + 14}"><tspan class="number">{index}</tspan> '
            f"{escape(_short(name, 24))}</text>"
        )
        out.append(
            f'<rect class="track" x="{left:.0f}" y="{top}" width="{cell * regions:.1f}" '
            f'height="18"/>'
        )
        levels = [_level(float(part) / per_region) for part in report.shares[index]]
        begin = 0
        for region in range(1, regions + 1):
            if region < regions and levels[region] == levels[begin]:
                continue
            if levels[begin]:
                span = f"{human(begin * per_region)} to {human(region * per_region)}"
                out.append(
                    f'<rect class="owned l{levels[begin]}" x="{left + begin * cell:.2f}" '
                    f'y="{top}" width="{(region - begin) * cell:.2f}" height="18">'
                    f"<title>{escape(f'{index} {name}: {span}')}</title></rect>"
                )
            begin = region
    out.append("</svg>")
    if dropped > 0:
        out.append(f"<p>{dropped} more layers own parts of the disk; they are not drawn.</p>")
    idle = len(report.layers) - len(rows) - max(dropped, 0)
    if idle:
        what = "1 layer owns" if idle == 1 else f"{idle} layers own"
        out.append(f'<p class="key">{what} nothing: the guest sees nothing of it.</p>')
    return "".join(out)


def _level(share: float) -> int:
    """0 (none) to 4 (nearly all)."""
    return 0 if share <= 0 else min(4, 1 + int(share * 4 - 1e-9))
