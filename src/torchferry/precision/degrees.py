"""How each operator treats powers of two: one table, a rule an operator, its proof in a line.

Every float tensor t of a graph is stored as t / 2**k with an integer k of its own. A rule says which k's an operator
allows. If f is homogeneous of degree d, f(x / 2**k) = f(x) / 2**(d*k), so its output is stored with d*k; what is not
homogeneous needs k = 0. Multiplying by a power of two is exact in floating point while nothing leaves the range, so a
graph under these rules computes the same bits as before, shifted.

A rule is a list of linear relations between slots, each a sum that must be zero. A slot is an input (``"in", 0``), an
output (``"out", 0``), a float attribute (``"attr", "epsilon"``: stored as value / 2**k, too) or a number of the rule's
own (``"aux", "m"``).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Callable

Slot = tuple[str, int | str]
Relation = dict[Slot, int]

FLOAT = ir.DataType.FLOAT
_MAX_DENOMINATOR = 4


@dataclass(frozen=True)
class Rule:
    """What one operator asks of the scales.

    Attributes:
        degree: The relation, in words of k.
        proof: Why the output is then the true one, shifted.
        relations: The same as data, for one node.
        is_exact: False where the operator's own rounding may differ by an ulp at another scale.
    """

    degree: str
    proof: str
    relations: Callable[[ir.Node], list[Relation]]
    is_exact: bool = True


def is_float(value: ir.Value | None) -> bool:
    """Tell whether a tensor takes part: FP32 ones do, everything else has no scale."""
    return value is not None and value.dtype == FLOAT


def float_slots(node: ir.Node) -> list[Slot]:
    """Return every input and output of a node that has a scale."""
    inputs: list[Slot] = [("in", i) for i, value in enumerate(node.inputs) if is_float(value)]
    return inputs + [("out", i) for i, value in enumerate(node.outputs) if is_float(value)]


def rule_of(node: ir.Node) -> Rule | None:
    """Return an operator's rule; None if the table has none, and the node then gets scale 1 everywhere."""
    return RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None


def relations_of(node: ir.Node) -> list[Relation]:
    """Return what a node asks of its scales; a relation with an operand that the node does not have is none."""
    rule = rule_of(node)
    relations = FIXED(node) if rule is None else rule.relations(node)
    slots = set(float_slots(node))
    return [relation for relation in relations if all(s in slots or s[0] in ("attr", "aux") for s in relation)]


def constant(value: ir.Value | None) -> Any:
    """Return a constant tensor's array, None for anything else."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Return a node's attribute, or a default."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def _equal(slots: list[Slot]) -> list[Relation]:
    return [{slots[0]: 1, slot: -1} for slot in slots[1:]]


def FIXED(node: ir.Node) -> list[Relation]:  # noqa: N802 - these four read as words of the table
    """Ask for k = 0 everywhere."""
    return [{slot: 1} for slot in float_slots(node)]


def EQUAL(node: ir.Node) -> list[Relation]:  # noqa: N802
    """Ask for one k everywhere."""
    return _equal(float_slots(node))


def FREE(node: ir.Node) -> list[Relation]:  # noqa: N802
    """Ask for one k of all inputs; outputs have none, or do not depend on it."""
    inputs = [slot for slot in float_slots(node) if slot[0] == "in"]
    return _equal(inputs) + [{slot: 1} for slot in float_slots(node) if slot[0] == "out"]


def PRODUCT(node: ir.Node) -> list[Relation]:  # noqa: N802
    """Ask for the output's k to be the sum of the inputs'."""
    return [{("out", 0): 1} | {slot: -1 for slot in float_slots(node) if slot[0] == "in"}]


def _some(*equal: Slot, attributes: tuple[str, ...] = (), optional: bool = True) -> Callable[[ir.Node], list[Relation]]:
    """Ask for one k of these slots and attributes, and 0 of all others.

    Where an attribute is left out that has a default other than 0, it cannot absorb, and all have 0.
    """

    def relations(node: ir.Node) -> list[Relation]:
        if not optional and not node.attributes.keys() >= set(attributes):
            return FIXED(node)
        slots = float_slots(node)
        tied: list[Slot] = [slot for slot in equal if slot in slots]
        tied += [("attr", name) for name in attributes if name in node.attributes]
        return _equal(tied) + [{slot: 1} for slot in slots if slot not in equal]

    return relations


def _linear_with_bias(bias: int, *also: int) -> Callable[[ir.Node], list[Relation]]:
    """Ask for k_out = the sum of the factors' k, the bias having the output's."""

    def relations(node: ir.Node) -> list[Relation]:
        factors: list[Slot] = [("in", 0), ("in", 1), *(("in", i) for i in also)]
        present = [slot for slot in factors if slot in float_slots(node)]
        return [{("out", 0): 1} | dict.fromkeys(present, -1), {("out", 0): 1, ("in", bias): -1}]

    return relations


def _degree(numerator: int, denominator: int = 1) -> Callable[[ir.Node], list[Relation]]:
    return lambda _: [{("out", 0): denominator, ("in", 0): -numerator}]


def _power(node: ir.Node) -> list[Relation]:
    exponent = constant(node.inputs[1])
    if exponent is None or exponent.size != 1:
        return FIXED(node)
    fraction = Fraction(float(exponent.reshape(-1)[0])).limit_denominator(_MAX_DENOMINATOR)
    if float(fraction) != float(exponent.reshape(-1)[0]):
        return FIXED(node)
    return [{("out", 0): fraction.denominator, ("in", 0): -fraction.numerator}, {("in", 1): 1}]


def _norm(node: ir.Node) -> list[Relation]:
    """Scale and bias have the output's k; eps is added to a variance, so it has twice the input's."""
    relations: list[Relation] = [{("out", 0): 1, ("in", 1): -1}, {("out", 0): 1, ("in", 2): -1}]
    if "epsilon" in node.attributes:
        relations.append({("attr", "epsilon"): 1, ("in", 0): -2})
    else:
        relations.append({("in", 0): 1})  # its default cannot be scaled; ``prepare`` writes it out
    relations.append({("out", 1): 1, ("in", 0): -1})  # LayerNormalization's mean
    relations.append({("out", 2): 1, ("in", 0): 1})  # and 1 / deviation
    return relations


def _batch_norm(node: ir.Node) -> list[Relation]:
    if attribute(node, "training_mode", 0) or "epsilon" not in node.attributes:
        return FIXED(node)
    m: Slot = ("aux", "m")
    return [
        {("in", 3): 1, ("in", 0): -1},
        {("in", 2): 1, ("out", 0): -1},
        {("in", 4): 1, m: -2},
        {("attr", "epsilon"): 1, m: -2},
        {("in", 1): 1, ("out", 0): -1, ("in", 0): 1, m: -1},
    ]


def _cast(node: ir.Node) -> list[Relation]:
    if attribute(node, "to") in (FLOAT, ir.DataType.BOOL):
        return EQUAL(node) if is_float(node.inputs[0]) else FIXED(node)
    return FIXED(node)


def _scatter(node: ir.Node) -> list[Relation]:
    return FIXED(node) if attribute(node, "reduction", "none") == "mul" else EQUAL(node)


def _hard_sigmoid(node: ir.Node) -> list[Relation]:
    if "alpha" not in node.attributes:
        return FIXED(node)
    return [{("attr", "alpha"): 1, ("in", 0): 1}, {("out", 0): 1}]


def _attention(node: ir.Node) -> list[Relation]:
    tied: set[Slot] = {("in", 0), ("in", 1), ("in", 2), ("out", 0)}
    others = [{slot: 1} for slot in float_slots(node) if slot not in tied]
    return [{("in", 0): 1, ("in", 1): 1}, {("out", 0): 1, ("in", 2): -1}, *others]


_IN, _OUT = ("in", 0), ("out", 0)
RULES: dict[str, Rule] = {}


def _add(names: str, degree: str, proof: str, relations: Callable[[ir.Node], list[Relation]], **more: bool) -> None:
    RULES.update(dict.fromkeys(names.split(), Rule(degree, proof, relations, **more)))


_add(
    "Identity Reshape Flatten Squeeze Unsqueeze Transpose Slice Split Expand Tile Concat Gather GatherElements "
    "GatherND SpaceToDepth DepthToSpace ReverseSequence Trilu Compress CenterCropPad Col2Im Unique",
    "equal",
    "only moves elements, or adds some of them up",
    EQUAL,
)
_add("Relu Abs Neg", "equal", "f(c*x) = c*f(x) for c > 0, to the bit: only the sign is looked at", EQUAL)
_add("LeakyRelu", "equal", "the slope multiplies x, whatever its scale", EQUAL)
_add("PRelu", "equal, slope 0", "the slope multiplies x where x < 0 and 1 does elsewhere", _some(_IN, _OUT))
_add("Add Sub Sum Max Min Mean Mod", "equal", "f(c*x, c*y) = c*f(x, y)", EQUAL)
_add("Where", "equal", "picks elements of two tensors", EQUAL)
_add("Clip", "equal, bounds too", "clip(c*x, c*a, c*b) = c*clip(x, a, b)", _some(_IN, ("in", 1), ("in", 2), _OUT,
     attributes=("min", "max")))  # fmt: skip
_add("Pad", "equal, the value too", "only adds elements of the value", _some(_IN, ("in", 2), _OUT,
     attributes=("value",)))  # fmt: skip
_add(
    "ThresholdedRelu",
    "equal, alpha too",
    "compares x with alpha",
    _some(_IN, _OUT, attributes=("alpha",), optional=False),
)
_add("Shrink", "equal, lambd and bias too", "compares x with lambd, adds bias", _some(_IN, _OUT,
     attributes=("lambd", "bias"), optional=False))  # fmt: skip
_add("ConstantOfShape", "any, the value absorbs", "every element is the value", _some(_OUT, attributes=("value",)))
_add("OneHot", "values equal output", "every element is one of the two values", _some(("in", 2), _OUT))
_add("ScatterND ScatterElements Scatter", "equal", "moves elements, adds them, or takes the larger", _scatter)
_add("CumSum Dropout", "equal", "sums, or copies, of the input", _some(_IN, _OUT))
_add("TopK", "values equal, indices any", "order does not depend on c > 0", _some(_IN, _OUT))
_add("MaxPool AveragePool GlobalAveragePool GlobalMaxPool MaxUnpool LpPool GlobalLpPool", "equal",
     "means and maxima: f(c*x) = c*f(x)", EQUAL)  # fmt: skip
_add("Resize Upsample", "equal", "weighted sums of x whose weights depend on sizes alone", _some(_IN, _OUT))
_add("GridSample RoiAlign MaxRoiPool", "equal, places 0", "weighted sums of x whose weights depend on the places",
     _some(_IN, _OUT))  # fmt: skip
_add("ReduceMax ReduceMin ReduceMean ReduceSum ReduceL1 ReduceL2", "equal", "sums and maxima: f(c*x) = c*f(x)", EQUAL)
_add("ReduceSumSquare", "out = 2 in", "squares: f(c*x) = c**2 f(x)", _degree(2))
_add("Mul MatMul Einsum", "out = sum of in", "multilinear: f(c*x, d*y) = c*d*f(x, y)", PRODUCT)
_add("Conv ConvTranspose Gemm", "out = x + w, bias = out", "bilinear, and the bias is added", _linear_with_bias(2))
_add("DeformConv", "out = x + w + mask, bias = out", "trilinear at given offsets", lambda node: [
     *_linear_with_bias(3, 4)(node), {("in", 2): 1}])  # fmt: skip
_add("Div", "out = a - b", "(c*x)/(d*y) = (c/d)*(x/y)", lambda _: [{_OUT: 1, _IN: -1, ("in", 1): 1}])
_add("Sqrt", "2 out = in", "sqrt(4**k x) = 2**k sqrt(x), correctly rounded at every scale", _degree(1, 2))
_add("Reciprocal", "out = -in", "1/(c*x) = (1/c)*(1/x)", _degree(-1))
_add("Pow", "out = exponent * in", "(c*x)**p = c**p * x**p for a constant p", _power, is_exact=False)
_add("LayerNormalization InstanceNormalization GroupNormalization RMSNormalization",
     "in any, eps = 2 in, scale = bias = out", "(c*x - mean(c*x)) / sqrt(var(c*x) + c*c*eps) does not depend on c",
     _norm)  # fmt: skip
_add("BatchNormalization", "mean = in, var = eps = 2m, scale = out - in + m, bias = out",
     "(x - mean) * scale / sqrt(var + eps) + bias, each factor shifted", _batch_norm)  # fmt: skip
_add("LpNormalization MeanVarianceNormalization", "in any, out 0", "divides by a norm of the input", FREE)
_add("Sign ArgMax ArgMin NonZero IsNaN IsInf Shape Size Hardmax", "in any, out 0", "f(c*x) = f(x) for c > 0", FREE)
_add("Equal Less LessOrEqual Greater GreaterOrEqual", "inputs equal", "order does not depend on c > 0", FREE)
_add("Cast", "equal between floats and to bool, else 0", "an integer has no scale", _cast)
_add("CastLike", "equal", "the second input gives only its type", lambda _: [{_OUT: 1, _IN: -1}])
_add("HardSigmoid", "alpha = -in, out 0", "max(0, min(1, (alpha/c)*(c*x) + beta))", _hard_sigmoid)
_add("Attention", "q + k = 0, out = v", "softmax needs the true q*k; its output weighs v", _attention)
_add("Log", "out 0, in any for one addition", "log(2**k y) = log(y) + k ln 2", FIXED)
_add("Softmax", "0", "softmax(c*x) is another function; softmax(x - max) is the same", FIXED)
_add("Sigmoid Tanh Erf", "0", "not homogeneous; flat beyond 2**15, so a clip there changes no bit", FIXED)
_add("Gelu HardSwish Swish Mish", "0", "x * gate(x): opened where x leaves the range", FIXED)
_add(
    "Exp LogSoftmax Softplus Softsign Elu Selu Celu Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Round Floor "
    "Ceil ReduceProd ReduceLogSum ReduceLogSumExp LRN Det Range AffineGrid NonMaxSuppression LSTM GRU RNN EyeLike "
    "RandomNormal RandomUniform RandomNormalLike RandomUniformLike BlackmanWindow HannWindow HammingWindow",
    "0",
    "not homogeneous",
    FIXED,
)
_add("If Loop Scan", "0, in FP32", "its body is not looked into", FIXED)


def table() -> list[tuple[str, str, str]]:
    """Return the rules for people: operators, relation, proof; in the table's order."""
    rows: dict[Rule, list[str]] = {}
    for name, rule in RULES.items():
        rows.setdefault(rule, []).append(name)
    return [(", ".join(names), rule.degree, rule.proof) for rule, names in rows.items()]
