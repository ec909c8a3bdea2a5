"""The `--where` filter language, parsed to an Arrow expression and never evaluated as Python.

Uses Python's syntax: comparisons, ``and``, ``or``, ``not``, ``in``, arithmetic, and for text
``startswith``, ``endswith``, ``contains`` and ``like`` (``%`` any text, ``_`` one character), each
as a method or a function: ``source.endswith('.py') and num_labels / num_tokens > 0.5``. Columns
whose names are not identifiers are written ``col('its name')``.
"""

import ast
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow.compute as pc

from schemas.console.text import did_you_mean
from schemas.errors import ConfigError

Expression = Any  # pyarrow.compute.Expression, which has no types

_COMPARISONS: dict[type[ast.cmpop], Callable[[Expression, Expression], Expression]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Expression, Expression], Expression]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a.cast("float64") / b,
}
_TEXT: dict[str, Callable[[Expression, str], Expression]] = {
    "startswith": pc.starts_with,
    "endswith": pc.ends_with,
    "contains": pc.match_substring,
    "like": pc.match_like,
}


def names_in(text: str) -> set[str]:
    """The columns that an expression uses.

    Raises:
        ConfigError: the text is not an expression.
    """
    tree = _parse(text)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = {
        call.args[0].value
        for call in calls
        if _is_col(call) and call.args and isinstance(call.args[0], ast.Constant)
    }
    return (names - {*_TEXT, "col"}) | {str(name) for name in named}


def parse_filter(text: str, columns: Iterable[str]) -> Expression:
    """Parses an expression over the given columns, for `pyarrow.Table.filter`.

    Raises:
        ConfigError: the text is not an expression, is not allowed in the language, or uses an
            unknown column; the message lists the known ones.
    """
    try:
        expression = _Filter(text, sorted(columns)).build(_parse(text))
    except RecursionError as error:
        raise ConfigError("--where: the expression is nested too deeply") from error
    return expression if isinstance(expression, pc.Expression) else pc.scalar(expression)


def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" at character {error.offset}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"--where {text!r}: not an expression{where}; {_HELP}") from error


class _Filter:
    """Builds an Arrow expression from a syntax tree."""

    def __init__(self, text: str, columns: list[str]) -> None:
        self._text = text
        self._columns = columns

    def build(self, node: ast.expr) -> Any:
        """An Arrow expression, or a plain value for a constant."""
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                return node.value
            case ast.Name():
                return self._column(node.id)
            case ast.BoolOp():
                return self._logic(node)
            case ast.UnaryOp(op=ast.Not()):
                return ~_expression(self.build(node.operand))
            case ast.UnaryOp(op=ast.USub()):
                value = self.build(node.operand)
                return pc.negate(value) if isinstance(value, pc.Expression) else -value
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                left, right = self.build(node.left), self.build(node.right)
                return _ARITHMETIC[type(node.op)](_expression(left), _expression(right))
            case ast.Compare():
                return self._comparison(node)
            case ast.Call():
                return self._call(node)
            case _:
                found = ast.unparse(node)
                raise ConfigError(f"--where {self._text!r}: {found!r} is not allowed; {_HELP}")

    def _column(self, name: str) -> Expression:
        if name not in self._columns:
            hint = did_you_mean(name, self._columns)
            raise ConfigError(
                f"--where {self._text!r}: no column {name}{hint} (known: "
                f"{', '.join(self._columns)})"
            )
        return pc.field(name)

    def _logic(self, node: ast.BoolOp) -> Expression:
        values = [_expression(self.build(value)) for value in node.values]
        result = values[0]
        for value in values[1:]:
            result = result & value if isinstance(node.op, ast.And) else result | value
        return result

    def _comparison(self, node: ast.Compare) -> Expression:
        parts = []
        left = node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            parts.append(self._compared(left, operator, right))
            left = right
        result = parts[0]
        for part in parts[1:]:
            result = result & part
        return result

    def _compared(self, left: ast.expr, operator: ast.cmpop, right: ast.expr) -> Expression:
        value = _expression(self.build(left))
        if isinstance(operator, ast.In | ast.NotIn):
            found = value.isin(self._constants(right))
            return ~found if isinstance(operator, ast.NotIn) else found
        if isinstance(operator, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self._refusal(right, "None after is")
            return value.is_null() if isinstance(operator, ast.Is) else value.is_valid()
        return _COMPARISONS[type(operator)](value, _expression(self.build(right)))

    def _constants(self, node: ast.expr) -> list[Any]:
        if not isinstance(node, ast.List | ast.Tuple | ast.Set):
            raise self._refusal(node, "a list of values after in, such as ('a', 'b')")
        values = [self.build(item) for item in node.elts]
        if any(isinstance(value, pc.Expression) for value in values):
            raise self._refusal(node, "values, not columns, in a list")
        return values

    def _call(self, node: ast.Call) -> Expression:
        arguments = list(node.args)
        if isinstance(node.func, ast.Attribute):
            name, arguments = node.func.attr, [node.func.value, *arguments]
        else:
            name = node.func.id if isinstance(node.func, ast.Name) else ""
        if _is_col(node) and len(arguments) == 1 and not node.keywords:
            column = self.build(arguments[0])
            return self._column(column if isinstance(column, str) else str(column))
        if name not in _TEXT or len(arguments) != 2 or node.keywords:
            raise self._refusal(
                node, "startswith, endswith, contains or like with a column and a text"
            )
        pattern = self.build(arguments[1])
        if not isinstance(pattern, str):
            raise self._refusal(arguments[1], "a text in quotes")
        return _TEXT[name](_expression(self.build(arguments[0])), pattern)

    def _refusal(self, node: ast.expr, expected: str) -> ConfigError:
        found = ast.unparse(node)
        return ConfigError(f"--where {self._text!r}: found {found!r}; expected {expected}")


def _is_col(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "col"


def _expression(value: Any) -> Expression:
    return value if isinstance(value, pc.Expression) else pc.scalar(value)


_HELP = (
    "use column names, numbers, 'texts', < <= == != >= >, and, or, not, in, + - * /, and "
    "startswith, endswith, contains, like"
)
