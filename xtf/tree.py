"""Pytrees with readable paths: the few helpers that everything else is written with.

A tree is nested dicts, lists, tuples and registered dataclasses. `None` is a leaf (a frozen parameter's gradient), and so is
`xtf.Param`. Paths are the keys joined by dots, `layers.0.q.weight`: they name leaves in errors, tables and name maps.
"""
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

from torch.utils import _pytree as pytree

Tree = Any
T = TypeVar("T")

tree_map = pytree.tree_map
flatten = pytree.tree_flatten
unflatten = pytree.tree_unflatten
leaves = pytree.tree_leaves


def flatten_with_path(tree: Tree) -> list[tuple[str, Any]]:
    """The leaves with their dotted paths, in flatten order.

    >>> flatten_with_path({"layers": [{"w": 1}, {"w": 2}]})
    [('layers.0.w', 1), ('layers.1.w', 2)]
    """
    return [(".".join(_key(k) for k in path), leaf) for path, leaf in pytree.tree_flatten_with_path(tree)[0]]


def map_with_path(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Like `tree_map`, and `fn` gets each leaf's dotted path first.

    >>> map_with_path(lambda path, x: f"{path}={x}", {"a": {"b": 1}})
    {'a': {'b': 'a.b=1'}}
    """
    return pytree.tree_map_with_path(lambda path, *xs: fn(".".join(_key(k) for k in path), *xs), tree, *rest)


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def dataclass_tree(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that is a pytree; fields with `metadata={"static": True}` are kept, not mapped.

    Static fields travel in the flatten context, because `register_dataclass` with dropped fields resets them silently.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    static = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if not f.metadata.get("static")]

    def to_list(x):
        return [getattr(x, n) for n in data], tuple(getattr(x, n) for n in static)

    def from_list(values, context):
        return cls(**dict(zip(data, values, strict=True)), **dict(zip(static, context, strict=True)))

    def to_list_with_keys(x: Any) -> Any:
        return [(pytree.GetAttrKey(n), getattr(x, n)) for n in data], tuple(getattr(x, n) for n in static)

    pytree.register_pytree_node(cls, to_list, from_list, flatten_with_keys_fn=to_list_with_keys,
                                serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
    return cls


def _key(k: Any) -> str:
    for field in ("key", "idx", "name"):
        if hasattr(k, field):
            return str(getattr(k, field))
    return str(k)
