"""A picture of a plan: address up, launches to the right, one box per buffer, coloured by layer.

In: a Plan, and a function from a buffer's name to its layer. Out: standalone SVG text; hovering
over a box shows the buffer's name::

    Path("memory.svg").write_text(plan_to_svg(plan, lambda name: name.rsplit("_", 1)[-1]))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from colorsys import hls_to_rgb
from dataclasses import dataclass
from xml.sax.saxutils import escape

from turbotx.memory.planner.plan import Placement, Plan

_WIDTH, _HEIGHT = 900.0, 420.0
_LEFT, _TOP, _RIGHT = 76.0, 46.0, 16.0
_LEGEND_COLUMNS, _LEGEND_ROW = 6, 18.0
_TURN = 137.508
"""Degrees of hue between one layer and the next: the golden angle, so that neighbours differ
most."""

_STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #333; }
  .title { font-size: 14px; font-weight: 600; }
  .name { font-size: 10px; fill: #222; pointer-events: none; }
  .page { fill: #fff; } .frame { fill: none; stroke: #999; }
  .chunk { stroke: #999; stroke-dasharray: 2 4; stroke-width: .7; }
  .grid { stroke: #ccc; stroke-width: .5; }
  .bound { stroke: #c22; stroke-width: 1.5; stroke-dasharray: 7 4; }
  .live { fill: none; stroke: #222; stroke-width: 1.2; }
  rect.buffer { stroke: #fff; stroke-width: .6; } rect.buffer:hover { stroke: #000; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #16181c; } text { fill: #ddd; } .live { stroke: #eee; }
    .name { fill: #111; } .grid { stroke: #333; } rect.buffer { stroke: #16181c; }
  }
"""


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps launches and bytes to pixels."""

    launches: int
    nbytes: int

    def x(self, launch: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * launch / self.launches

    def y(self, offset: float) -> float:
        return _TOP + _HEIGHT * (1 - offset / self.nbytes)


def plan_to_svg(plan: Plan, layer_of: Callable[[str], object]) -> str:
    """Return the SVG of address (MiB, up) over time (launches, right), with live bytes as a line.

    `layer_of` maps a buffer's name to anything printable; equal layers get one colour, in order of
    first appearance.
    """
    launches = max((p.buffer.lifetime.end for p in plan.placements), default=1)
    scale = _Scale(launches, max(plan.peak_nbytes, plan.lower_bound_nbytes, 1))
    layers = dict.fromkeys(str(layer_of(p.buffer.name)) for p in plan.placements)
    colours = {layer: _colour(index) for index, layer in enumerate(layers)}
    legend_rows = -(-len(layers) // _LEGEND_COLUMNS)
    height = _TOP + _HEIGHT + 44 + _LEGEND_ROW * (legend_rows + 1)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {height:g}" '
        f'role="img" aria-label="Memory plan: address over launches">',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{_WIDTH:g}" height="{height:g}"/>',
        _text(_LEFT, 20, _headline(plan), "start", "title"),
        *_axes(plan, scale),
    ]
    for placement in plan.placements:
        lines.extend(_box(placement, scale, str(layer_of(placement.buffer.name)), colours))
    lines.extend(_live_line(plan, scale))
    lines.extend(_legend(colours))
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def _headline(plan: Plan) -> str:
    over = plan.peak_nbytes / plan.lower_bound_nbytes if plan.lower_bound_nbytes else 1.0
    return (
        f"{len(plan.placements)} buffers, peak {_mib(plan.peak_nbytes)}, "
        f"lower bound {_mib(plan.lower_bound_nbytes)} ({over:.3f} x), {len(plan.chunks)} chunks"
    )


def _mib(nbytes: float) -> str:
    if nbytes >= 2**20:
        return f"{nbytes / 2**20:.2f} MiB"
    return f"{nbytes / 2**10:.1f} KiB" if nbytes else "0"


def _colour(index: int) -> str:
    hue, light = index * _TURN % 360 / 360, (0.68, 0.78, 0.60)[index % 3]
    red, green, blue = (round(255 * part) for part in hls_to_rgb(hue, light, 0.62))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _line(style: str, start: tuple[float, float], end: tuple[float, float], title: str = "") -> str:
    hover = f"<title>{title}</title>" if title else ""
    return (
        f'<line class="{style}" x1="{start[0]:.1f}" y1="{start[1]:.1f}" '
        f'x2="{end[0]:.1f}" y2="{end[1]:.1f}">{hover}</line>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _axes(plan: Plan, scale: _Scale) -> Iterator[str]:
    left, right, bottom = scale.x(0), scale.x(scale.launches), scale.y(0)
    for chunk in plan.chunks[:512]:  # more lines than pixels would be solid grey
        if 0 < chunk.offset < scale.nbytes:
            y = scale.y(chunk.offset)
            yield _line("chunk", (left, y), (right, y))
    for step in range(6):
        offset, launch = scale.nbytes * step / 5, round(scale.launches * step / 5)
        yield _text(left - 6, scale.y(offset) + 4, _mib(offset), "end")
        yield _line("grid", (scale.x(launch), _TOP), (scale.x(launch), bottom))
        yield _text(scale.x(launch), bottom + 16, str(launch))
    yield _text((left + right) / 2, bottom + 32, "launch")


def _box(placement: Placement, scale: _Scale, layer: str, colours: dict[str, str]) -> Iterator[str]:
    buffer, lifetime = placement.buffer, placement.buffer.lifetime
    x, width = scale.x(lifetime.begin), scale.x(lifetime.end) - scale.x(lifetime.begin)
    y, height = scale.y(placement.end), scale.y(placement.offset) - scale.y(placement.end)
    name = escape(buffer.name)
    yield (
        f'<rect class="buffer" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{colours[layer]}"><title>{name} ({escape(layer)}): {buffer.nbytes} bytes at '
        f"{placement.offset}, launches {lifetime.begin} to {lifetime.end - 1}</title></rect>"
    )
    if height >= 12 and width >= 6 * len(buffer.name):
        yield _text(x + 3, y + height / 2 + 3.5, buffer.name, "start", "name")


def _live_line(plan: Plan, scale: _Scale) -> Iterator[str]:
    """Draw the live bytes of each launch, and the lower bound, which is their maximum."""
    change = [0] * (scale.launches + 1)
    for placement in plan.placements:
        change[placement.buffer.lifetime.begin] += placement.buffer.nbytes
        change[placement.buffer.lifetime.end] -= placement.buffer.nbytes
    points, live = [], 0
    for launch in range(scale.launches):
        live += change[launch]
        points += [(launch, live), (launch + 1, live)]
    path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in points)
    yield f'<polyline class="live" points="{path}"><title>live bytes</title></polyline>'
    y = scale.y(plan.lower_bound_nbytes)
    left, right = scale.x(0), scale.x(scale.launches)
    yield _line("bound", (left, y), (right, y), "lower bound")
    yield (
        f'<rect class="frame" x="{left:.1f}" y="{_TOP:g}" width="{right - left:.1f}" '
        f'height="{_HEIGHT:g}"/>'
    )
    key = "solid: live bytes · dashed red: lower bound · dotted: chunks"
    yield _text(right, 36, key, "end")


def _legend(colours: dict[str, str]) -> Iterator[str]:
    cell = (_WIDTH - _LEFT - _RIGHT) / _LEGEND_COLUMNS
    for index, (layer, colour) in enumerate(colours.items()):
        x = _LEFT + cell * (index % _LEGEND_COLUMNS)
        y = _TOP + _HEIGHT + 44 + _LEGEND_ROW * (index // _LEGEND_COLUMNS)
        shown = layer if len(layer) <= 20 else layer[:19] + "…"
        yield f'<rect x="{x:.1f}" y="{y:.1f}" width="12" height="12" fill="{colour}"/>'
        yield _text(x + 17, y + 10, shown, "start")
