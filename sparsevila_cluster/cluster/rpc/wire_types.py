"""What a protocol's methods take and give, as msgpack and back: what comes in is checked against the protocol's annotations.

A dataclass is a map of the fields that differ from their defaults, a tuple or set an array, an enumeration its value. No name of a
class crosses the wire, and nothing but the classes that the protocol names is made of it.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import msgpack
from pydantic import BaseModel

from sparsevila_cluster.cluster.worker_api import methods_of
from sparsevila_cluster.core.errors import Incompatible, Internal

Read = Callable[[Any], Any]


def pack(value: Any) -> bytes:
    """Raises Internal: something in it is nothing that a protocol could name."""
    try:
        packed: bytes = msgpack.packb(value, default=_plain, unicode_errors="surrogatepass")
    except (TypeError, ValueError, OverflowError) as error:
        raise Internal(f"cannot be sent: {error}") from error
    return packed


def unpack(data: bytes) -> Any:
    """Raises Incompatible: it is no msgpack."""
    try:
        return msgpack.unpackb(data, strict_map_key=False, unicode_errors="surrogatepass")
    except (TypeError, ValueError, msgpack.UnpackException) as error:
        raise Incompatible(f"no msgpack: {str(error)[:100]}") from error


@dataclasses.dataclass(frozen=True)
class WireMethod:
    """How the arguments of one method are read, and each of its results or items."""

    name: str
    arguments: tuple[Read, ...]
    num_required: int
    result: Read

    def read_arguments(self, values: Any) -> tuple[Any, ...]:
        """Raises Incompatible: too many or too few, or one that is not of the annotated type."""
        if not isinstance(values, list) or not self.num_required <= len(values) <= len(self.arguments):
            raise Incompatible(f"{self.name} takes {self.num_required} to {len(self.arguments)} arguments")
        return tuple(read(value) for read, value in zip(self.arguments, values, strict=False))


@functools.cache
def wire_methods(api: Callable[..., Any]) -> dict[str, WireMethod]:
    """Of every method of a protocol in worker_api.py, by name."""
    return {name: _wire_method(getattr(api, name)) for name in methods_of(api)}


def _wire_method(method: Any) -> WireMethod:
    hints = typing.get_type_hints(method)
    code, defaults = method.__code__, method.__defaults__ or ()
    names = code.co_varnames[1 : code.co_argcount]
    result = hints.get("return", Any)
    if typing.get_origin(result) is collections.abc.AsyncGenerator:
        result = typing.get_args(result)[0]
    arguments = tuple(reader(hints.get(name, Any)) for name in names)
    return WireMethod(method.__name__, arguments, len(names) - len(defaults), reader(result))


# ---- to plain data -------------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        given = ((name, getattr(value, name), default) for name, default in _defaults(value.__class__))
        return {name: item for name, item, default in given if item is not default and not _same(item, default)}
    if isinstance(value, (set, frozenset)):
        return list(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"a {type(value).__name__}")


@functools.cache
def _defaults(kind: type) -> tuple[tuple[str, Any], ...]:
    return tuple((field.name, field.default) for field in dataclasses.fields(kind))


def _same(item: Any, default: Any) -> bool:
    """Whether leaving it out says the same. True == 1, but is not the same."""
    return type(item) is type(default) and bool(item == default)


# ---- and back ------------------------------------------------------------------------------------------------------------------


@functools.cache
def reader(hint: Any) -> Read:
    """A function that makes a value of an annotated type from plain data, and raises Incompatible where it cannot."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, Callable):  # a function does not travel: it is left at its default
        return _anything
    if origin in (typing.Union, types.UnionType):
        return _one_of(args)
    if origin is typing.Literal:
        return _member(frozenset(args))
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        return _fixed_tuple(tuple(map(reader, args)))
    if origin in MAKERS:
        return _array(reader(args[0]), MAKERS[origin])
    if origin is dict:
        return _table(reader(args[0]), reader(args[1]))
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast(type, hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _guarded(hint)
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return _guarded(hint.model_validate)
    if hint is float:
        return _instance(float, int)
    if hint in (int, str, bytes, bool, dict):
        return _instance(typing.cast(type, hint))
    if hint in (None, type(None)):
        return _instance(type(None))
    raise TypeError(f"a protocol cannot carry {hint!r}")


MAKERS: dict[Any, Callable[[Any], Any]] = {
    tuple: tuple,
    list: list,
    frozenset: frozenset,
    Sequence: tuple,
    collections.abc.Sequence: tuple,
}


def _anything(value: Any) -> Any:
    return value


def _instance(*kinds: type) -> Read:
    def read(value: Any) -> Any:
        if type(value) in kinds:
            return value
        raise Incompatible(f"expected {kinds[0].__name__}, got {type(value).__name__}")

    return read


def _member(legal: frozenset[Any]) -> Read:
    def read(value: Any) -> Any:
        if isinstance(value, (str, int, bool)) and value in legal:
            return value
        raise Incompatible(f"expected one of {sorted(map(str, legal))}, got {str(value)[:40]!r}")

    return read


def _one_of(hints: tuple[Any, ...]) -> Read:
    readers = tuple(reader(hint) for hint in hints if hint is not type(None))
    may_be_none = len(readers) < len(hints)

    def read(value: Any) -> Any:
        if value is None and may_be_none:
            return None
        for one in readers[:-1]:
            try:
                return one(value)
            except Incompatible:
                pass
        return readers[-1](value)

    return read


def _items(value: Any) -> list[Any]:
    if type(value) is list:
        return value
    raise Incompatible(f"expected an array, got {type(value).__name__}")


def _fixed_tuple(readers: tuple[Read, ...]) -> Read:
    def read(value: Any) -> tuple[Any, ...]:
        if len(_items(value)) != len(readers):
            raise Incompatible(f"expected {len(readers)} items, got {len(value)}")
        return tuple(one(item) for one, item in zip(readers, value, strict=True))

    return read


def _array(item: Read, make: Callable[[Any], Any]) -> Read:
    return lambda value: make([item(each) for each in _items(value)])


def _table(key: Read, item: Read) -> Read:
    def read(value: Any) -> dict[Any, Any]:
        if type(value) is not dict:
            raise Incompatible(f"expected a map, got {type(value).__name__}")
        return {key(name): item(each) for name, each in value.items()}

    return read


def _record(kind: type) -> Read:
    hints = typing.get_type_hints(kind)
    readers = {field.name: reader(hints[field.name]) for field in dataclasses.fields(kind)}

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise Incompatible(f"expected a {kind.__name__}, got {type(value).__name__}")
        try:
            return kind(**{name: readers[name](item) for name, item in value.items()})
        except KeyError as error:
            raise Incompatible(f"a {kind.__name__} has no {error}") from error
        except TypeError as error:
            raise Incompatible(f"no {kind.__name__}: {error}") from error

    return read


def _guarded(make: Callable[[Any], Any]) -> Read:
    def read(value: Any) -> Any:
        try:
            return make(value)
        except ValueError as error:
            raise Incompatible(str(error)[:200]) from error

    return read
