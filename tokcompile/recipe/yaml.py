"""Read YAML into plain data with the line and column of every key and value.

Only mappings with text keys, lists, and plain scalars exist here. Tags, anchors, aliases, merge keys and duplicate
keys are mistakes, so a file can neither run code nor grow without bound.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

Loc = tuple[int | str, ...]
Place = tuple[int, int]
#: where in the data, what is wrong, where in the text
Fault = tuple[Loc, str, Place]

_PREFIX = "tag:yaml.org,2002:"
_SCALARS = {_PREFIX + kind for kind in ("null", "bool", "int", "float", "str")}


@dataclass
class Marks:
    """``(line, column)``, both from 1, of values and of mapping keys, by their place in the data."""

    values: dict[Loc, Place] = field(default_factory=dict)
    keys: dict[Loc, Place] = field(default_factory=dict)

    def find(self, loc: Loc, *, key: bool = False) -> Place | None:
        """Place of a value (or of its key), else of the innermost enclosing value that is known."""
        if key and loc in self.keys:
            return self.keys[loc]
        while loc and loc not in self.values:
            loc = loc[:-1]
        return self.values.get(loc)


def read(text: str) -> tuple[Any, Marks, list[Fault]]:
    """Parse YAML text.

    Returns:
        the data (None when the text is not YAML, and for ``null``), the places, and the faults.
    """
    yaml, reader = YAML(typ="safe", pure=True), _Reader()
    try:
        node = yaml.compose(text)
        if node is None:
            return None, reader.marks, [((), "the file is empty", (1, 1))]
        data = reader.value(node, (), yaml)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
        return None, reader.marks, [((), f"not valid YAML: {error.problem or error.context}", place)]
    except (YAMLError, RecursionError) as error:
        why = str(error).strip().split("\n")[0] if isinstance(error, YAMLError) else "nested too deeply"
        return None, reader.marks, [((), f"not valid YAML: {why}", (1, 1))]
    return data, reader.marks, reader.faults


class _Reader:
    def __init__(self) -> None:
        self.marks, self.faults = Marks(), list[Fault]()
        self.seen: set[int] = set()

    def value(self, node: Node, loc: Loc, yaml: YAML) -> Any:
        self.marks.values.setdefault(loc, _place(node))
        if id(node) in self.seen:
            self.faults.append((loc, "anchors and aliases (& and *) are not allowed in a recipe", _place(node)))
            return None
        self.seen.add(id(node))
        if isinstance(node, MappingNode):
            self.refuse_tag(node, loc, _PREFIX + "map")
            return self.mapping(node, loc, yaml)
        if isinstance(node, SequenceNode):
            self.refuse_tag(node, loc, _PREFIX + "seq")
            return [self.value(item, (*loc, index), yaml) for index, item in enumerate(node.value)]
        tag = str(node.tag)
        if tag == _PREFIX + "timestamp":
            return str(node.value)
        if tag not in _SCALARS:
            self.refuse_tag(node, loc)
            return None
        try:
            return yaml.constructor.construct_object(node)
        except (YAMLError, ValueError, TypeError, KeyError, IndexError):
            what = f"not a valid {tag.removeprefix(_PREFIX)}: {str(node.value)[:40]!r}"
            self.faults.append((loc, what, _place(node)))
            return None

    def refuse_tag(self, node: Node, loc: Loc, allowed: str = "") -> None:
        tag = str(node.tag)
        if tag != allowed:
            what = f"tag {tag.replace(_PREFIX, '!!')!r} is not allowed in a recipe"
            self.faults.append((loc, what, _place(node)))

    def mapping(self, node: MappingNode, loc: Loc, yaml: YAML) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if str(key_node.tag) != _PREFIX + "str":
                self.faults.append((loc, "a key should be plain text", _place(key_node)))
                continue
            key = str(key_node.value)
            place = (*loc, key)
            if key in data:
                what = f"duplicate key, first on line {self.marks.keys[place][0]}"
                self.faults.append((place, what, _place(key_node)))
                continue
            self.marks.keys[place] = _place(key_node)
            data[key] = self.value(value_node, place, yaml)
        return data


def _place(node: Node) -> Place:
    return node.start_mark.line + 1, node.start_mark.column + 1
