"""Diagrams of an optimizer step, drawn from what the step really computes.

The formulas of the catalogue are run once on names in the place of numbers: every operation that they ask for, with
every rounding, becomes a node. Nothing about an arithmetic is written down here.
"""

import dataclasses
import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxaudit.arithmetics import Arithmetic, Options, make_step
from jaxaudit.floats import BFLOAT16, FLOAT32, Format, round_scalar
from jaxaudit.hyperparameters import Hyperparameters
from jaxaudit.scalars import WIDE, scalars_of
from jaxaudit.steps import Step


@dataclasses.dataclass(frozen=True)
class Node:
    """A number of a step: a name, or an operation on others.

    Attributes:
        operation: what computes it; "tensor", "scalar" or "constant" for a name.
        inputs: what from, in order.
        formats: those that the result is rounded to, one after the other; of a name, that which it has.
        name: of a tensor, scalar or constant.
    """

    operation: str
    inputs: tuple["Node", ...] = ()
    formats: tuple[str, ...] = ()
    name: str = ""

    def __ne__(self, other: object) -> Any:  # formulas compare with zero to make a mask
        return not self == other if isinstance(other, Node) else Node("mask", (self,))

    def __or__(self, other: "Node") -> "Node":
        return Node("mask", (self, other))

    def __and__(self, other: "Node") -> "Node":
        return Node("mask", (self, other))

    def rounded(self, fmt: str) -> "Node":
        """Return it after a rounding; one to the format that it has already changes nothing."""
        if self.formats[-1:] == (fmt,):
            return self
        return dataclasses.replace(self, formats=(*self.formats, fmt))

    def expression(self) -> str:
        """Write it as a formula in which each format is a function that rounds."""
        if not self.inputs:
            return self.name
        told = [x.expression() for x in self.inputs]
        text = _WRITTEN[self.operation].format(*told)
        for fmt in self.formats:
            text = f"{fmt}({text})"
        return text


_WRITTEN = {
    "+": "{0} + {1}",
    "−": "{0} − {1}",
    "×": "{0} × {1}",
    "÷": "{0} ÷ {1}",
    "√": "sqrt({0})",
    "√ of MKL": "mkl_sqrt({0})",
    "a × b + c": "fma({0}, {1}, {2})",
    "negated": "-({0})",
    "scalar loop, or not": "{0} in the scalar loop, else {1}",
}


class TracingOperations:
    """Operations whose values are nodes; each result says to which formats it was rounded."""

    def round_to(self, value: Node, fmt: Format) -> Node:
        """Note a rounding; everything is float32 unless it was made narrower."""
        return value if fmt is FLOAT32 else value.rounded(fmt.name)

    def narrow(self, a: Node, fmt: Format = FLOAT32) -> Node:
        """Note the rounding of a double."""
        return a.rounded(fmt.name)

    def wide(self, a: Node) -> Node:
        """Widen, which is exact."""
        return a

    def where(self, mask: Node, a: Node, b: Node) -> Node:
        """Choose between the scalar loop and the vectorised one; a lerp starts where small weights let it."""
        return Node("scalar loop, or not", (a, b)) if _is_tail(mask) else b

    def negate(self, a: Node) -> Node:
        """Negate, which is exact."""
        return Node("negated", (a,))

    def __getattr__(self, name: str) -> Any:
        symbol, fmt = _OPERATIONS[name]
        return lambda *inputs: Node(symbol, tuple(map(_node, inputs)), (fmt,))


_OPERATIONS = {
    "add": ("+", "float32"),
    "subtract": ("−", "float32"),
    "multiply": ("×", "float32"),
    "divide": ("÷", "float32"),
    "sqrt": ("√", "float32"),
    "mkl_amd_sqrt": ("√ of MKL", "float32"),
    "fma": ("a × b + c", "float32"),
    "wide_add": ("+", "float64"),
    "wide_multiply": ("×", "float64"),
    "wide_fma": ("a × b + c", "float64"),
}


def _node(value: Any) -> Node:
    return value if isinstance(value, Node) else Node("constant", (), (), f"{float(value):g}")


def _is_tail(mask: Node) -> bool:
    """Tell whether a mask asks for the scalar loop alone; `..._from_end` is off for weights below 0.5."""
    names = [mask.name] if not mask.inputs else [x.name for x in mask.inputs]
    return names == ["tail"]


#: Hyperparameters of which no scalar is a 16-bit number by accident.
_GIVEN = Hyperparameters(
    learning_rate=np.array([1.2345678e-3, 1.1234567e-3, 1.0123456e-3]),
    beta1=0.8912345678,
    beta2=0.9931234567,
    epsilon=1.2345678e-6,
    weight_decay=0.0123456789,
)
_TIMESTEPS = (3, 7, 11)


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """What an arithmetic computes in a step.

    Attributes:
        arithmetic: which one.
        step: with decoupled weight decay, in `storage`.
        storage: format of the recorded weights.
        results: each tensor of the state after the step, by name.
    """

    arithmetic: Arithmetic
    step: Step
    storage: Format
    results: Mapping[str, Node]


def trace(arithmetic: Arithmetic) -> TracedStep:
    """Run the formulas of an arithmetic on names, for bfloat16 weights where it has them."""
    storage = BFLOAT16 if BFLOAT16 in arithmetic.storages else arithmetic.storages[0]
    step = make_step(arithmetic, storage, _GIVEN, Options(decoupled=True))
    scalars = _scalars(arithmetic, step)
    tensors = {name: Node("tensor", (), (fmt,), name) for name, fmt in _tensors(step).items()}
    tensors["tail"] = Node("tail", (), (), "tail")
    ops: Any = TracingOperations()
    results: dict[str, Node] = {}
    for name in step.state:
        found = step.replay(name, ops, scalars, tensors)
        if not step.reads_stored:  # what was not rounded yet feeds the update
            for earlier in results:
                raw = Node("tensor", (), ("float32",), f"unrounded {earlier}")
                found = _replaced(found, _unrounded(step, earlier, scalars, tensors), raw)
        results[name] = found
    if "compensation" in results:  # it is made of the new weight, which is drawn below
        new = Node("tensor", (), (step.param_format.name,), "new_param")
        results["compensation"] = _replaced(results["compensation"], results["param"], new)
    return TracedStep(arithmetic, step, storage, results)


def _tensors(step: Step) -> dict[str, str]:
    before = {name: step.format_of(name).name for name in step.state}
    after = {f"new_{name}": fmt for name, fmt in before.items()}
    return before | after | {"grad": step.storage.name}


def _unrounded(
    step: Step, name: str, scalars: Mapping[str, Node], tensors: Mapping[str, Node]
) -> Node:
    plain = dataclasses.replace(step, exp_avg_format=FLOAT32, exp_avg_sq_format=FLOAT32)
    ops: Any = TracingOperations()
    return plain.replay(name, ops, scalars, tensors)


def _replaced(node: Node, what: Node, by: Node) -> Node:
    if node == what:
        return by
    if len(node.formats) > 1 and dataclasses.replace(node, formats=node.formats[:1]) == what:
        return dataclasses.replace(by, formats=node.formats)
    return dataclasses.replace(node, inputs=tuple(_replaced(x, what, by) for x in node.inputs))


def _scalars(arithmetic: Arithmetic, step: Step) -> dict[str, Node]:
    """Name the scalars, with the coarsest format that holds what the arithmetic's rule makes of them."""
    found = {}
    for name, values in scalars_of(step, arithmetic.rule, _GIVEN, _TIMESTEPS).items():
        if name.endswith("_from_end"):
            assert not values.any(), "a lerp of these numbers starts from the old value"
        narrow = all(float(round_scalar(float(x), BFLOAT16)) == float(x) for x in values)
        fmt = "float64" if values.dtype == np.float64 else "bfloat16" if narrow else "float32"
        found[name] = Node("scalar", (), (fmt,), name.removeprefix(WIDE))
    return found


# Drawing.

_ROW, _HIGH, _GAP, _CHARACTER = 50, 38, 34, 7.3
_TITLES = {
    "exp_avg": "exp_avg, the first moment",
    "exp_avg_sq": "exp_avg_sq, the second moment",
    "compensation": "compensation, Kahan's buffer",
    "param": "param, the weight",
}
_COLOURS = {"bfloat16": "#D55E00", "float16": "#D55E00", "float32": "#5F6B76", "float64": "#0072B2"}


@dataclasses.dataclass
class _Box:
    node: Node
    column: int
    row: float
    inputs: list["_Box"]

    @property
    def lines(self) -> tuple[str, str]:
        node = self.node
        if node.operation == "scalar" or node.operation == "tensor":
            return node.name.replace("new_", "new "), node.formats[-1]
        if node.operation == "constant":
            return node.name, ""
        return node.operation, " → ".join(node.formats)

    @property
    def width(self) -> float:
        return max(map(len, self.lines)) * _CHARACTER + 18


def svg(traced: TracedStep) -> str:
    """Draw a step, a part for each tensor of the state; operands enter an operation from top to bottom."""
    parts, y, widest = [], 64.0, 0.0
    for name in traced.step.state:
        drawing, width, height = _part(_title(traced, name), traced.results[name], y)
        parts.append(drawing)
        y, widest = y + height, max(widest, width)
    one, width = traced.arithmetic, max(widest + 24, 860)
    title = f"{one.name}: one step, {traced.storage.name} weights, decoupled weight decay"
    described = "; ".join(f"new {n} = {x.expression()}" for n, x in traced.results.items())
    legend = "Grey: float32. Orange: rounded to 16 bits. Blue: double. Operands enter from top to bottom; a × b + c is rounded once."
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {y + 6:.0f}" '
            f'width="{width:.0f}" height="{y + 6:.0f}" font-family="monospace" font-size="12">',
            f"<title>{html.escape(title)}</title>",
            f"<desc>{html.escape(described)}</desc>",
            f'<rect width="{width:.0f}" height="{y + 6:.0f}" rx="8" fill="#ffffff"/>',
            f'<text x="16" y="26" font-size="15" font-weight="bold" fill="#1b1f23">{html.escape(title)}</text>',
            f'<text x="16" y="46" fill="#5F6B76" font-size="11">{legend}</text>',
            *parts,
            "</svg>\n",
        ]
    )


def _title(traced: TracedStep, name: str) -> str:
    step, title = traced.step, f"new {_TITLES[name]}"
    if name != "param":
        return f"{title}, kept in {step.format_of(name).name}"
    if step.stochastic:
        return f"{title}, then rounded to one of its two neighbours in bfloat16, by chance"
    if step.keeps_more:
        return (
            f"{title}, kept in float32; the recording holds its copy in {step.recorded_format.name}"
        )
    return f"{title}, kept in {step.param_format.name}"


def _part(title: str, root: Node, top: float) -> tuple[str, float, float]:
    """Return the drawing of one tensor, its width and its height."""
    boxes: list[_Box] = []
    last = _place(root, 0, 0.0, boxes)
    depth = max(box.column for box in boxes)
    widths = [
        max((box.width for box in boxes if box.column == depth - k), default=0)
        for k in range(depth + 1)
    ]
    lefts = [16 + sum(widths[:k]) + _GAP * k for k in range(depth + 1)]
    lines = [
        f'<text x="16" y="{top + 18:.0f}" font-weight="bold" fill="#1b1f23">{html.escape(title)}</text>'
    ]
    for box in boxes:
        x, y = lefts[depth - box.column], top + 30 + box.row * _ROW
        for k, child in enumerate(box.inputs):
            cx = lefts[depth - child.column] + child.width
            cy = top + 30 + child.row * _ROW + _HIGH / 2
            ey = y + _HIGH * (k + 1) / (len(box.inputs) + 1)
            middle = x - _GAP / 2
            lines.append(
                f'<path d="M{cx:.1f} {cy:.1f} H{middle - 8:.1f} L{x:.1f} {ey:.1f}" fill="none" stroke="#9AA4AE"/>'
            )
        lines += _drawn(box, x, y)
    return "\n".join(lines), lefts[-1] + widths[-1], 30 + last * _ROW + 14


def _place(node: Node, column: int, row: float, boxes: list[_Box]) -> float:
    """Give a node and all it is made of a place; return the first free row below them."""
    box = _Box(node, column, row, [])
    below = row
    for child in node.inputs:
        start = len(boxes)
        below = _place(child, column + 1, below, boxes)
        box.inputs.append(boxes[-1] if len(boxes) > start else boxes[start])
    if box.inputs:
        rows = [child.row for child in box.inputs]
        box.row = (min(rows) + max(rows)) / 2
    boxes.append(box)
    return below if box.inputs else row + 1


def _drawn(box: _Box, x: float, y: float) -> Iterator[str]:
    upper, lower = map(html.escape, box.lines)
    colour = _COLOURS.get(box.node.formats[-1] if box.node.formats else "", "#5F6B76")
    named = box.node.operation in ("tensor", "scalar", "constant")
    corner = 3 if box.node.operation == "tensor" else 16
    fill, stroke = ("#ffffff", colour) if named else (colour, colour)
    ink = "#1b1f23" if named else "#ffffff"
    dashes = ' stroke-dasharray="4 3"' if box.node.operation in ("scalar", "constant") else ""
    yield (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{box.width:.1f}" height="{_HIGH}" rx="{corner if named else 6}" '
        f'fill="{fill}" stroke="{stroke}"{dashes}/>'
    )
    middle = x + box.width / 2
    shift = 16 if lower else 23
    yield f'<text x="{middle:.1f}" y="{y + shift}" text-anchor="middle" fill="{ink}">{upper}</text>'
    if lower:
        tone = colour if named else "#ffffff"
        yield f'<text x="{middle:.1f}" y="{y + 30}" text-anchor="middle" font-size="11" fill="{tone}">{lower}</text>'


def expressions(traced: TracedStep) -> Sequence[str]:
    """Write the results as formulas."""
    return [f"new {name} = {node.expression()}" for name, node in traced.results.items()]
