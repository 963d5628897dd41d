"""FLOPs of a training step by part of the model and by pass, counted in its jaxpr.

A matrix product [m, k] [k, n] is 2 m k n FLOPs in every dtype. Only matrix products are counted; everything else is
less than a hundredth. Loop bodies are multiplied by their trip count. Attention is counted in full, causal or not,
because that is what is computed.

An equation belongs to the part whose `jax.named_scope` its name stack contains: one of `models.base.SCOPES`, TEACHER or
ATTACK. Its pass follows from the transformations in the name stack, which jvp, transpose and remat leave there:

    rematted_computation     recomputed: a forward product that is computed again in the backward pass
    transpose(...)           weight_gradients if both operands depend on the batch and the product has no batch
                             dimensions; backward otherwise (gradients of inputs, and of attention)
    none of these            forward
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxprs_in_params

from vkd_jax.models.base import SCOPES
from vkd_jax.training.step import ATTACK, TEACHER

PASSES = ("forward", "backward", "weight_gradients", "recomputed")
OTHER = "other"  # products outside of all scopes


@dataclasses.dataclass
class Work:
    """FLOPs of one part of the model, summed over all devices."""

    forward: float = 0.0
    backward: float = 0.0
    weight_gradients: float = 0.0
    recomputed: float = 0.0
    integers: float = 0.0  # those of the four passes above whose operands are 8-bit integers

    @property
    def total(self) -> float:
        """FLOPs of all passes."""
        return sum(getattr(self, name) for name in PASSES)


@dataclasses.dataclass(frozen=True)
class _Product:
    """A `dot_general` equation, where it runs, and how often."""

    equation: JaxprEqn
    name_stack: str
    from_batch: Sequence[bool]  # for each operand
    times: int

    @property
    def part(self) -> str:
        """The innermost scope of the model that the product runs under; a teacher's and an attacker's are one part."""
        for whole in (TEACHER, ATTACK):
            if whole in self.name_stack:
                return whole
        return max(SCOPES, key=self.name_stack.rfind) if any(name in self.name_stack for name in SCOPES) else OTHER

    @property
    def pass_name(self) -> str:
        """One of PASSES."""
        if "rematted_computation" in self.name_stack:
            return "recomputed"
        if "transpose(" not in self.name_stack:
            return "forward"
        _, (batch_dimensions, _) = self.equation.params["dimension_numbers"]
        return "weight_gradients" if all(self.from_batch) and not batch_dimensions else "backward"

    @property
    def flops(self) -> float:
        """FLOPs of all iterations."""
        (contracted, _), _ = self.equation.params["dimension_numbers"]
        left = self.equation.invars[0].aval.shape
        size = math.prod(self.equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        return 2.0 * size * self.times

    @property
    def is_integer(self) -> bool:
        """Whether 8-bit integers are multiplied."""
        return all(operand.aval.dtype.name == "int8" for operand in self.equation.invars)


def count(jaxpr: ClosedJaxpr, from_batch: Sequence[bool]) -> dict[str, Work]:
    """Counts the FLOPs of a traced step, by part of the model.

    Args:
        jaxpr: The traced step.
        from_batch: For each input of the jaxpr, whether it is part of a batch rather than a weight.

    Returns:
        FLOPs of each of `models.base.SCOPES`, a TEACHER's forward pass, an ATTACK, and OTHER products, if any.
    """
    parts: dict[str, Work] = {}

    def record(product: _Product) -> None:
        work = parts.setdefault(product.part, Work())
        setattr(work, product.pass_name, getattr(work, product.pass_name) + product.flops)
        work.integers += product.flops * product.is_integer

    _visit(jaxpr.jaxpr, from_batch, "", 1, record)
    return parts


def _visit(
    jaxpr: Jaxpr, from_batch: Sequence[bool], name_stack: str, times: int, record: Callable[[_Product], None]
) -> list[bool]:
    """Records all products of a jaxpr, and returns which of its outputs depend on the batch."""
    dependent = {variable for variable, depends in zip(jaxpr.invars, from_batch, strict=True) if depends}
    for equation in jaxpr.eqns:
        inputs = [not isinstance(x, Literal) and x in dependent for x in equation.invars]
        scope = f"{name_stack}/{equation.source_info.name_stack}"
        outputs = [any(inputs)] * len(equation.outvars)
        if equation.primitive.name == "dot_general":
            record(_Product(equation, scope, inputs, times))
        elif equation.primitive.name == "optimization_barrier":
            outputs = inputs
        elif equation.primitive.name == "scan":
            outputs = _visit_scan(equation, inputs, scope, times, record)
        elif bodies := list(jaxprs_in_params(equation.params)):
            # The inputs of a branch are the last ones of its equation, behind the index of the branch.
            flags = [_visit(body, inputs[len(inputs) - len(body.invars) :], scope, times, record) for body in bodies]
            outputs = [any(column) for column in zip(*flags, strict=True)]
        dependent |= {x for x, depends in zip(equation.outvars, outputs, strict=True) if depends}
    return [not isinstance(x, Literal) and x in dependent for x in jaxpr.outvars]


def _visit_scan(
    equation: JaxprEqn, inputs: list[bool], scope: str, times: int, record: Callable[[_Product], None]
) -> list[bool]:
    """Visits the body of a loop once it is known which carried values depend on the batch."""
    (body,), length = jaxprs_in_params(equation.params), equation.params["length"]

    def count_whole(outside: Sequence, inside: Sequence) -> int:
        """The number of values without the leading loop axis that scanned inputs and outputs have."""
        return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))

    # Inputs are constants, carried values and scanned values; parameters that count them differ between JAX versions.
    end = count_whole(equation.invars, body.invars)
    carried = slice(end - count_whole(equation.outvars, body.outvars), end)
    while True:
        outputs = _visit(body, inputs, scope, times, lambda product: None)
        carry = [before or after for before, after in zip(inputs[carried], outputs, strict=False)]
        if carry == inputs[carried]:
            return _visit(body, inputs, scope, times * length, record)
        inputs[carried] = carry
