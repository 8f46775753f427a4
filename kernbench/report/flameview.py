"""Where the frames of the flame view go, in percent of its width, and the same frames as a tree to open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kernbench.record import FlameFrame
from kernbench.report import tracewords, units

# A frame thinner than this is invisible on a page, even a wide one.
THINNEST_PERCENT = 0.08
# Deeper frames are of no use to a reader, and each level indents the tree.
DEEPEST = 48

KINDS = {
    "python": "Python",
    "library": "library",
    "op": "operator",
    "call": "runtime call",
    "annotation": "annotation",
}


@dataclass(frozen=True)
class Box:
    """One drawn frame; ``title`` is what a pointer over it shows."""

    left: float
    width: float
    depth: int
    kind: str
    label: str
    title: str


@dataclass
class Node:
    """One frame of the tree; the frames of libraries are closed until somebody opens them."""

    frame: FlameFrame
    share: float
    label: str
    open: bool
    children: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class FlameView:
    boxes: list[Box]
    roots: list[Node]
    depth: int
    seconds: float
    kinds: list[tuple[str, str]]
    folded: int


def layout(frames: Sequence[FlameFrame]) -> FlameView | None:
    """Place the frames, each below its parent and beside its siblings in their order; None where there are none."""
    total = sum(frame.seconds_per_step for frame in frames if frame.parent < 0)
    if total <= 0:
        return None
    boxes: list[Box] = []
    roots: list[Node] = []
    nodes: list[Node | None] = []
    lefts: list[float] = []
    depths: list[int] = []
    # Where the next child of each frame begins; the last one is that of the roots.
    cursors: list[float] = [0.0] * (len(frames) + 1)
    for index, frame in enumerate(frames):
        # A parent stands before its children; anything else is no tree.
        parent = frame.parent if 0 <= frame.parent < index else -1
        width = 100 * frame.seconds_per_step / total
        left, depth = cursors[parent], depths[parent] + 1 if parent >= 0 else 0
        cursors[parent] += width
        cursors[index] = left
        lefts.append(left)
        depths.append(depth)
        above = nodes[parent] if parent >= 0 else None
        if depth >= DEEPEST or (parent >= 0 and above is None):
            nodes.append(None)
            continue
        node = Node(frame, frame.seconds_per_step / total, _label(frame), frame.kind != "library" and depth < 3)
        nodes.append(node)
        (roots if above is None else above.children).append(node)
        if width >= THINNEST_PERCENT:
            boxes.append(Box(round(left, 3), round(width, 3), depth, frame.kind, node.label, _title(frame, total)))
    kinds = [(kind, KINDS[kind]) for kind in KINDS if any(box.kind == kind for box in boxes)]
    folded = sum(frame.folded for frame in frames)
    return FlameView(boxes, roots, 1 + max((box.depth for box in boxes), default=0), total, kinds, folded)


def _label(frame: FlameFrame) -> str:
    return f"{frame.name} (+{frame.folded})" if frame.folded else frame.name


def _title(frame: FlameFrame, total: float) -> str:
    where = tracewords.place(frame.source)
    own = f", {units.seconds(frame.self_seconds_per_step)} itself" if frame.self_seconds_per_step else ""
    folded = f", {frame.folded} library frames folded into it" if frame.folded else ""
    share = units.share(frame.seconds_per_step / total)
    name = frame.name if len(frame.name) <= 160 else f"{frame.name[:159]}…"
    return f"{name}{f' at {where}' if where else ''}: {units.seconds(frame.seconds_per_step)} ({share}){own}{folded}"
