"""Turn word problems into conversations: SVAMP's equation becomes a line of working, then the answer follows GSM8K's marker.

user       Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack. How much do you have to pay ...?
assistant  76 - 25 = 51
           #### 51
"""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction
from typing import Any

from pipelines.artifacts import Conversations, Prompts
from pipelines.ingest import DialogueConfig, DialogueSettings, column_of, gather, to_conversation, to_prompt
from pipelines.stage import StageContext

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def conversations(config: DialogueConfig, stage: StageContext) -> Conversations:
    def to_content(columns: dict[str, Any], source: DialogueSettings) -> dict[str, Any]:
        return to_conversation({"prompt": problem(columns), "response": working(columns)}, source)

    return stage.publish(Conversations, **gather(config, stage, to_content, "conversations"))


def prompts(config: DialogueConfig, stage: StageContext) -> Prompts:
    """Use the whole answer as the reference; a verifier reads the number in it."""

    def to_content(columns: dict[str, Any], source: DialogueSettings) -> dict[str, Any]:
        return to_prompt({"prompt": problem(columns), "reference": working(columns)}, source)

    return stage.publish(Prompts, **gather(config, stage, to_content, "prompts"))


def problem(columns: dict[str, Any]) -> str:
    """Join the body, which usually lacks its full stop, and the question."""
    body, question = (" ".join(column_of(columns, name).split()) for name in ("Body", "Question"))
    return f"{body.rstrip('.,')}. {question}"


def working(columns: dict[str, Any]) -> str:
    """Return the line of working and the answer; raise ValueError if the two disagree.

    `working({"Equation": "( 76.0 - 25.0 )", "Answer": 51.0}) == "76 - 25 = 51\\n#### 51"`
    """
    equation, answer = column_of(columns, "Equation"), column_of(columns, "Answer")
    try:
        tree = ast.parse(equation.strip(), mode="eval").body
        value = value_of(tree)
    except (SyntaxError, KeyError, ZeroDivisionError):
        raise ValueError(f"the equation {equation!r} can't be computed; expected numbers, + - * / and brackets") from None
    if value != Fraction(answer):
        raise ValueError(f"the equation {equation} is {value}, the answer {answer}")
    return f"{re.sub(r'[.]0(?![0-9])', '', ast.unparse(tree))} = {value}\n#### {value}"


def value_of(node: ast.AST) -> Fraction:
    """Return the exact value of an expression, so that rounding can't make thirds disagree."""
    match node:
        case ast.BinOp(left, operation, right):
            return OPERATORS[type(operation)](value_of(left), value_of(right))
        case ast.Constant(value):
            return Fraction(value)
    raise KeyError(type(node))
