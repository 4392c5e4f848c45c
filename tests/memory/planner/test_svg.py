"""The picture of a plan: well-formed, one box a buffer, to scale, names escaped."""

from xml.etree import ElementTree

from turbotx.memory.planner import Buffer, Chunk, Lifetime, Placement, Plan
from turbotx.memory.planner.svg import plan_to_svg

SVG = "{http://www.w3.org/2000/svg}"


def boxes(text):
    root = ElementTree.fromstring(text)
    return [box for box in root.iter(SVG + "rect") if box.get("class") == "buffer"]


def test_one_box_a_buffer_to_scale_and_coloured_by_layer():
    placements = (
        Placement(Buffer("a_0", 1024, Lifetime(0, 2)), 0),
        Placement(Buffer("b_0", 2048, Lifetime(1, 4)), 1024),
        Placement(Buffer("a_1", 1024, Lifetime(2, 4)), 0),
    )
    plan = Plan((Chunk(0, 1 << 21),), placements, 3072, 3072)
    a_0, b_0, a_1 = boxes(plan_to_svg(plan, lambda name: name[-1]))
    assert abs(2 * float(a_0.get("height")) - float(b_0.get("height"))) < 0.2
    assert abs(float(a_0.get("width")) * 3 / 2 - float(b_0.get("width"))) < 0.2
    assert float(a_0.get("y")) > float(b_0.get("y"))  # address 0 is at the bottom
    assert abs(float(b_0.get("y")) + float(b_0.get("height")) - float(a_0.get("y"))) < 0.2
    assert a_0.get("fill") == b_0.get("fill") != a_1.get("fill")
    assert b_0.find(SVG + "title").text == "b_0 (0): 2048 bytes at 1024, launches 1 to 3"


def test_names_may_hold_any_character():
    placement = Placement(Buffer('<&">', 64, Lifetime(0, 1)), 0)
    plan = Plan((Chunk(0, 64),), (placement,), 64, 64)
    (box,) = boxes(plan_to_svg(plan, lambda name: "x<y"))
    assert box.find(SVG + "title").text.startswith('<&"> (x<y)')


def test_an_empty_plan_is_still_a_picture():
    assert boxes(plan_to_svg(Plan((), (), 0, 0), str)) == []
