"""A rollout function as a user would write it: `rollout.function: drpo_megatron.rollout.examples:calculator`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable

from drpo_megatron.records import Prompt
from drpo_megatron.rollout.turns import Session, Trajectory

MOST_CALLS = 4

_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


async def calculator(prompt: Prompt, session: Session) -> Trajectory:
    """The policy writes an expression and `=`; the calculator puts the result behind it, and the policy goes on.

    What the calculator puts in is not trained. A text that is no expression gets no result.
    """
    trajectory = Trajectory(prompt)
    for _ in range(MOST_CALLS):
        if not session.left(trajectory):
            break
        turn = await session.sample(trajectory, stop=["="])
        text = session.tokenizer.decode(turn.token_ids)
        result = evaluate(text.rstrip().removesuffix("=")) if text.rstrip().endswith("=") else None
        if result is None:
            break
        session.insert(trajectory, f" {result}\n")
    return trajectory


def evaluate(text: str) -> str | None:
    """Value of the expression that `text` ends with: numbers, + - * / and parentheses. None if it does not."""
    line = text.rsplit("\n", 1)[-1].rsplit(":", 1)[-1].strip()
    try:
        value = _value(ast.parse(line, mode="eval").body)
        return str(int(value)) if value == int(value) else f"{value:.6g}"
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError):
        return None


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATORS:
            return _OPERATORS[type(operation)](_value(left), _value(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
    raise ValueError("not arithmetic")
