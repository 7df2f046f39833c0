"""Trees with readable paths: the few helpers that everything else is written with.

A tree is nested dicts, lists, tuples, named tuples and `dataclass_tree` classes; anything else is a leaf, `None` (a
frozen parameter's gradient) and `xtf.Param` among them. Paths are keys joined by dots, `layers.0.q.weight`: they name
leaves in errors, tables and name maps. Where several trees are walked together dicts match by key, in the first one's
order.

The classes are registered with `torch.utils._pytree` too, for torch.func. Its own walks cost ten times as much host
time as these.
"""
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, dataclass_transform

from torch.utils import _pytree as pytree

Tree = Any
T = TypeVar("T")


@functools.cache
def _fields(cls: type) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """(fields that are mapped, static ones) of a `dataclass_tree` class; None for any other."""
    return getattr(cls, "_tree_fields", None)


def leaves(tree: Tree) -> list[Any]:
    """The leaves in order.

    >>> leaves({"a": [1, None], "b": (2,)})
    [1, None, 2]
    """
    out: list[Any] = []
    _collect(tree, out)
    return out


def flatten(tree: Tree) -> tuple[list[Any], Tree]:
    """(leaves, structure); the structure is the tree itself, as an example for `unflatten`."""
    return leaves(tree), tree


def unflatten(values: Iterable[Any], like: Tree) -> Tree:
    """A tree of the structure of `like` with these leaves.

    >>> unflatten("xyz", {"a": [1, (2, None)]})
    {'a': ['x', ('y', 'z')]}
    """
    return _build(like, iter(values))


def tree_map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`fn` of each leaf, and of what `rest` have in its place (a whole subtree may stand there).

    Raises ValueError, naming the path, where another tree has other keys.

    >>> tree_map(lambda x, y: x + y, {"a": 1, "b": [2]}, {"b": [20], "a": 10})
    {'a': 11, 'b': [22]}
    """
    return _build(tree, iter([fn(*xs) for xs in zip_leaves(tree, *rest)]))


def zip_leaves(tree: Tree, *rest: Tree) -> list[tuple]:
    """For each leaf of `tree`: the leaf, and what each of `rest` has in its place.

    Raises ValueError, naming the path, where another tree has other keys.

    >>> zip_leaves({"a": 1, "b": [2]}, {"b": [None], "a": 10})
    [(1, 10), (2, None)]
    """
    columns: list[list] = [leaves(tree)]
    try:
        for other in rest:
            columns.append([])
            _align(tree, other, columns[-1])
    except _Mismatch as e:
        raise ValueError(f"trees differ at {'.'.join(reversed(e.path)) or 'the root'}: {e}") from None
    return list(zip(*columns, strict=True))


def flatten_with_path(tree: Tree) -> list[tuple[str, Any]]:
    """The leaves with their dotted paths, in order.

    >>> flatten_with_path({"layers": [{"w": 1}, {"w": 2}]})
    [('layers.0.w', 1), ('layers.1.w', 2)]
    """
    return list(_walk("", tree))


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Like `tree_map`, and `fn` gets each leaf's dotted path first.

    >>> map_with_path(lambda path, x: f"{path}={x}", {"a": {"b": 1}})
    {'a': {'b': 'a.b=1'}}
    """
    leaves = zip(_walk("", tree), zip_leaves(tree, *rest), strict=True)
    return _build(tree, iter([fn(path, *xs) for (path, _), xs in leaves]))


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def dataclass_tree(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that is a tree; fields with `metadata={"static": True}` are kept, not mapped.

    Static fields travel in torch's flatten context, because its `register_dataclass` with dropped fields resets them
    silently.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    data, static = (tuple(f.name for f in fields if bool(f.metadata.get("static")) is kept) for kept in (False, True))
    cls._tree_fields = data, static  # pyright: ignore

    def to_list(x: Any) -> Any:
        return [getattr(x, n) for n in data], tuple(getattr(x, n) for n in static)

    def to_list_with_keys(x: Any) -> Any:
        return [(pytree.GetAttrKey(n), getattr(x, n)) for n in data], tuple(getattr(x, n) for n in static)

    def from_list(values: Any, context: Any) -> Any:
        return cls(**dict(zip(data, values, strict=True)), **dict(zip(static, context, strict=True)))

    pytree.register_pytree_node(cls, to_list, from_list, flatten_with_keys_fn=to_list_with_keys,
                                serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
    return cls


class _Mismatch(Exception):
    """Two trees have other keys; `path` grows on the way out, innermost key first."""

    def __init__(self, text: str):
        super().__init__(text)
        self.path: list[str] = []


@functools.cache
def _is_leaf(cls: type) -> bool:
    """Asked before each call below: most nodes are leaves, and a call costs more than the question."""
    return cls not in (dict, list) and not issubclass(cls, tuple) and _fields(cls) is None


def _collect(x: Tree, out: list) -> None:
    t = type(x)
    if t is dict:
        for child in x.values():
            out.append(child) if _is_leaf(type(child)) else _collect(child, out)
    elif t is list or isinstance(x, tuple):
        for child in x:
            out.append(child) if _is_leaf(type(child)) else _collect(child, out)
    elif (fields := _fields(t)) is not None:
        for name in fields[0]:
            _collect(getattr(x, name), out)
    else:
        out.append(x)


def _align(x: Tree, other: Tree, out: list) -> None:
    """What `other` has where `x` has its leaves."""
    t, key = type(x), None
    try:
        if t is dict:
            if type(other) is not dict or other.keys() != x.keys():
                raise _mismatch(x, other)
            for key, child in x.items():
                out.append(other[key]) if _is_leaf(type(child)) else _align(child, other[key], out)
        elif t is list or isinstance(x, tuple):
            if type(other) is not t or len(other) != len(x):
                raise _mismatch(x, other)
            for key, child in enumerate(x):
                _align(child, other[key], out)
        elif (fields := _fields(t)) is not None:
            if type(other) is not t:
                raise _mismatch(x, other)
            for key in fields[0]:
                _align(getattr(x, key), getattr(other, key), out)
        else:
            out.append(other)
    except _Mismatch as e:
        if key is not None:
            e.path.append(str(key))
        raise


def _build(x: Tree, values: Iterator) -> Tree:
    t = type(x)
    if t is dict:
        return {key: next(values) if _is_leaf(type(child)) else _build(child, values) for key, child in x.items()}
    if t is list:
        return [_build(child, values) for child in x]
    if isinstance(x, tuple):
        out = [_build(child, values) for child in x]
        return t(*out) if hasattr(x, "_fields") else tuple(out)
    if (fields := _fields(t)) is not None:
        data, static = fields
        return t(**{n: _build(getattr(x, n), values) for n in data}, **{n: getattr(x, n) for n in static})
    return next(values)


def _walk(path: str, x: Tree) -> Iterator[tuple[str, Any]]:
    children = _children(x)
    if children is None:
        yield path, x
    else:
        for key, child in children.items():
            yield from _walk(f"{path}.{key}" if path else key, child)


def _children(x: Tree) -> dict[str, Any] | None:
    """A node's children by key; None for a leaf."""
    t = type(x)
    if t is dict:
        return {str(key): child for key, child in x.items()}
    if (fields := _fields(t)) is not None:
        return {name: getattr(x, name) for name in fields[0]}
    if isinstance(x, tuple) and hasattr(x, "_asdict"):
        return x._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    if t is list or isinstance(x, tuple):
        return {str(i): child for i, child in enumerate(x)}
    return None


def _mismatch(x: Tree, other: Tree) -> _Mismatch:
    keys, others = _children(x), _children(other)
    shown = list(others) if others is not None else "None" if other is None else f"a {type(other).__name__}"
    return _Mismatch(f"one has {list(keys or ())} there, another {shown}")
