"""How a value shows itself: in one line, to rich, and in a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field
from html import escape

# Longer text is cut in the one line, not in notebooks.
MAX_CHARS = 80


class ReprMixin:
    """Gives a class its `repr`, rich and notebook forms from what `_facts` yields.

    A dataclass that inherits it is decorated with `repr=False`.
    """

    __slots__ = ()

    def _facts(self) -> Iterator[tuple[str, object]]:
        """(name, value), the most interesting first. Of a dataclass: the fields that are not at their default."""
        fields: dict[str, Field[object]] = getattr(type(self), "__dataclass_fields__", {})
        for name, field in fields.items():
            value = getattr(self, name)
            if field.repr and value != _default(field):
                yield name, value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={_short(value)}' for name, value in self._facts())})"

    def __rich_repr__(self) -> Iterator[tuple[str, object]]:
        yield from self._facts()

    def _repr_html_(self) -> str:
        left = 'style="text-align: left"'
        pairs = ((name, value if isinstance(value, str) else _short(value)) for name, value in self._facts())
        rows = "".join(f"<tr><td {left}>{escape(name)}</td><td {left}>{escape(text)}</td></tr>" for name, text in pairs)
        return f"<table><caption>{escape(type(self).__name__)}</caption>{rows}</table>"


def _default(field: Field[object]) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _short(value: object) -> str:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, str) and len(value) > MAX_CHARS:
        return f"{value[:MAX_CHARS]!r}..."
    return repr(value)
