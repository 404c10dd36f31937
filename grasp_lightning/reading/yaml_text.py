"""YAML from the user; every error is one line. For the arguments, see ``text``."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from grasp_lightning.errors import DataError, GraspError
from grasp_lightning.reading.text import one_line, read_small, told

_MAX_DEPTH = 100  # levels of a YAML file
_MAX_NODES = 100_000  # of a YAML file, each alias counted as often as it is used
_MAX_BITS = 1024  # of a whole number in a YAML file
_TEXT_TAG, _MERGE_TAG = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"

# What PyYAML raises besides its own errors: impossible dates, integers of thousands of digits, tags
# that do not fit their text, nesting.
_YAML_ERRORS = (
    yaml.YAMLError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    OverflowError,
    RecursionError,
)


def read_yaml(
    path: Path, raises: type[GraspError] = DataError, what: str | None = None, advice: str = ""
) -> Any:  # noqa: ANN401  parsed YAML
    """Return the content of a YAML file, see ``parse_yaml``."""
    text = read_small(path, raises, what, advice)
    return parse_yaml(text, what or str(path), raises, advice)


def parse_yaml(
    text: str,
    what: str,
    raises: type[GraspError] = DataError,
    advice: str = "",
    *,
    is_strict: bool = True,
) -> Any:  # noqa: ANN401  parsed YAML
    """Return the content of a YAML text; ``is_strict`` refuses keys that are twice or no text."""
    try:
        return yaml.load(text, Loader=_Strict if is_strict else _Loader)
    except _YAML_ERRORS as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else one_line(error)
        raise raises(told(f"{what}:", f"not valid YAML: {reason}", advice)) from error


class _Loader(yaml.SafeLoader):
    """Refuses endless nesting and aliases; depth is counted while reading, so that nobody waits."""

    _depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """Return the next value."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"nested more than {_MAX_DEPTH} levels deep")
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_yaml_int(self, node: ScalarNode) -> int:
        """Return a whole number that Python can print again."""
        value = int(super().construct_yaml_int(node))
        if value.bit_length() > _MAX_BITS:
            raise ValueError(
                f"a number of {value.bit_length()} bits in line {node.start_mark.line + 1}"
            )
        return value

    def get_single_node(self) -> Node | None:
        """Return the whole content, unless it is too large."""
        node: Node | None = super().get_single_node()
        if node is not None and _size(node, {}) > _MAX_NODES:
            raise yaml.YAMLError(f"more than {_MAX_NODES} values, counting every use of an alias")
        return node


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Strict(_Loader):
    """Refuses keys that are not text or are repeated: Python would keep the last."""

    def compose_mapping_node(self, anchor: dict[Any, Node]) -> MappingNode:
        """Return the next mapping, its keys checked before merges add others."""
        node = super().compose_mapping_node(anchor)
        seen: set[Hashable] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == _MERGE_TAG:
                continue
            if not isinstance(key, ScalarNode) or key.tag != _TEXT_TAG:
                came = key.value if isinstance(key, ScalarNode) else "a list or section"
                raise yaml.YAMLError(f"line {line}: the key {one_line(came)} is not text; quote it")
            if key.value in seen:
                raise yaml.YAMLError(f"line {line}: the key {one_line(key.value)} is given twice")
            seen.add(key.value)
        return node


def _size(node: Node, known: dict[int, int]) -> int:
    """Return the number of values in a node; an alias to its own parent is endless."""
    if id(node) not in known:
        known[id(node)] = _MAX_NODES + 1  # until it is counted: a node that contains itself
        parts: list[Node] = []
        if isinstance(node, MappingNode):
            parts = [value for _, value in node.value]
        elif isinstance(node, SequenceNode):
            parts = node.value
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]
