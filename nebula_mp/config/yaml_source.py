"""Configuration files as one tree whose every node knows where it stands.

Data flow: a file or a directory -> [config.yaml_source] -> Mapping -> config.load
Finds the files, parses them with libyaml and merges them as Nebula does; knows no key of Nebula.
The tree is built from parser events and not by PyYAML's composer, which would recurse without a limit, let a
repeated key win silently and lose how a scalar was quoted. No value becomes a Python object here.
Source: YAML 1.1; slackhq/nebula config/config.go (which files, in which order, how they merge).
"""

import os
import re
import stat
from collections.abc import Iterator
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from nebula_mp.config.report import Place, Report, shown
from nebula_mp.config.values import go_text

FILE_BYTES_MAX = 1 << 20
FILES_MAX = 256
DEPTH_MAX = 32  # Nebula's deepest key has six levels
NODES_MAX = 100_000  # aliases counted as often as they are used

_ENDINGS = (".yml", ".yaml")
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = frozenset(_TAG + name for name in ("int", "float", "bool", "null"))
_NOT_YAML = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_GO_EMPTY = frozenset(("", "0", "false", "-0"))


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value. `text` is the string Nebula sees, None for null (which means: not set)."""

    place: Place
    text: str | None


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list. Each item carries its index in its own file: merging puts lists one behind the other."""

    place: Place
    items: tuple[tuple[int, "Node"], ...]


class Entry(NamedTuple):
    """A key and its value."""

    key_place: Place
    value: "Node"


@dataclass(frozen=True, slots=True)
class Mapping:
    """A map, in the order of the file."""

    place: Place
    entries: MappingABC[str, Entry]


Node = Scalar | Sequence | Mapping


def is_unset(node: Node) -> bool:
    """Tell whether the value is null, which Nebula treats as if the key were absent."""
    return isinstance(node, Scalar) and node.text is None


def describe(node: Node) -> str:
    """Say what was found, for a message; never key material."""
    if isinstance(node, Scalar):
        return "nothing" if node.text is None else shown(node.text)
    return "a list" if isinstance(node, Sequence) else "a map"


def find_files(path: Path, report: Report) -> tuple[Path, ...]:
    """Give `path` itself, or every .yml and .yaml file below it in the order they are merged.

    Problems are reported against the path that has them, without a line.
    """
    files: list[Path] = []
    _collect(path, report, files, ancestors=())
    files.sort(key=lambda file: os.fsencode(Path(os.path.abspath(file))))  # noqa: PTH100 - see below
    # abspath, because the original sorts names as they are spelled: Path.resolve would follow links.
    if len(files) > FILES_MAX:
        report.problem(_whole(path), "", f"found more than {FILES_MAX} .yml and .yaml files below it")
        return ()
    return tuple(files)


def _collect(path: Path, report: Report, files: list[Path], ancestors: tuple[tuple[int, int], ...]) -> None:
    direct = not ancestors
    wanted = direct or path.name.endswith(_ENDINGS)
    try:
        status = path.stat()
    except OSError as error:
        if wanted:
            report.problem(_whole(path), "", f"cannot be read: {error.strerror}")
        return
    if not stat.S_ISDIR(status.st_mode):
        if not wanted:
            return
        if direct or stat.S_ISREG(status.st_mode):
            files.append(path)
        else:
            report.problem(_whole(path), "", "found no regular file, expected one with YAML in it")
        return
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        report.problem(_whole(path), "", "is a link to a directory that contains it: an endless loop")
        return
    if len(ancestors) > DEPTH_MAX:
        report.problem(_whole(path), "", f"found more than {DEPTH_MAX} levels of directories")
        return
    if len(files) > FILES_MAX:
        return  # enough for the caller to refuse them
    before = len(files)
    try:
        names = sorted(os.listdir(path))  # noqa: PTH208 - names are wanted, in the order they are visited
    except OSError as error:
        report.problem(_whole(path), "", f"cannot be read: {error.strerror}")
        return
    for name in names:
        _collect(path / name, report, files, (*ancestors, identity))
    if direct and len(files) == before:
        report.problem(_whole(path), "", "found no .yml or .yaml file below this directory")


def _whole(path: Path, number: int = 0) -> Place:
    return Place(number, 0, 0, path)


def read_file(path: Path, number: int, report: Report) -> Mapping | None:
    """Parse one file; None if it could not be parsed, which then stands in `report`.

    `number` is its place among the files. A repeated key is reported and its first value kept.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        report.problem(_whole(path, number), "", f"cannot be read: {error.strerror}")
        return None
    if len(data) > FILE_BYTES_MAX:
        report.problem(_whole(path, number), "", "found more than 1 MiB, expected a configuration file")
        return None
    return parse(data, path, number, report)


def parse(data: bytes, path: Path, number: int, report: Report) -> Mapping | None:
    """Parse the bytes of one file; the rest as in `read_file`."""
    encoding = "utf-16" if data[:2] in {b"\xff\xfe", b"\xfe\xff"} else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        report.problem(
            Place(number, line, column, path), "", f"found bytes that are not {encoding[:5].upper()} text"
        )
        return None
    if match := _NOT_YAML.search(text):
        line = text.count("\n", 0, match.start()) + 1
        column = match.start() - text.rfind("\n", 0, match.start())
        report.problem(
            Place(number, line, column, path),
            "",
            f"found the control character U+{ord(match[0]):04X}, expected text",
        )
        return None
    return _Builder(text, path, number, report).document()


class _RefusedError(Exception):
    """The file cannot become a tree; args: place, text."""


@dataclass(slots=True)
class _Built:
    """A node and how many nodes it stands for, aliases counted each time."""

    node: Node
    count: int


@dataclass(slots=True)
class _Builder:
    """Turns the events of one file into a tree; used once, by `document`."""

    text: str
    path: Path
    number: int
    report: Report
    anchors: dict[str, _Built | None] = field(default_factory=dict)  # None while it is being built

    def document(self) -> Mapping | None:
        """Give the only document; an empty file is an empty map."""
        events: Iterator[Any] = yaml.parse(self.text, Loader=yaml.CSafeLoader)
        try:
            return self._document(events)
        except _RefusedError as refused:
            place, text = refused.args
            self.report.problem(place, "", text)
        except yaml.MarkedYAMLError as error:
            self._syntax(error)
        return None

    def _document(self, events: Iterator[Any]) -> Mapping:
        next(events)  # stream start
        empty = Mapping(self._start(), {})
        if isinstance(next(events), yaml.StreamEndEvent):
            return empty
        root = self._node(next(events), events, depth=0, prefix="").node
        next(events)  # document end
        after = next(events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise _RefusedError(
                self._place(after.start_mark),
                "found a second YAML document, expected one (Nebula reads only the first)",
            )
        if is_unset(root):
            return empty
        if not isinstance(root, Mapping):
            raise _RefusedError(root.place, f"found {describe(root)}, expected a map of settings")
        return root

    def _node(self, event: Any, events: Iterator[Any], depth: int, prefix: str) -> _Built:
        place = self._place(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event.anchor, place)
        if depth > DEPTH_MAX:
            raise _RefusedError(place, f"found more than {DEPTH_MAX} levels, expected fewer")
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            built = _Built(Scalar(place, self._scalar_text(event, place)), 1)
        elif isinstance(event, yaml.SequenceStartEvent):
            built = self._sequence(event, place, events, depth, prefix)
        else:
            built = self._mapping(event, place, events, depth, prefix)
        if event.anchor is not None:
            self.anchors[event.anchor] = built
        return built

    def _alias(self, anchor: Any, place: Place) -> _Built:
        if anchor not in self.anchors:
            raise _RefusedError(
                place, f"found the alias {shown(anchor)} of an anchor that is not defined before"
            )
        built = self.anchors[anchor]
        if built is None:
            raise _RefusedError(
                place, f"found the alias {shown(anchor)} inside its own anchor: an endless loop"
            )
        return built

    def _scalar_text(self, event: Any, place: Place) -> str | None:
        spelling: str = event.value
        plain = not event.style
        if event.tag is None or event.tag == "!":
            return go_text(spelling) if plain else spelling
        if event.tag == _TAG + "str":
            return spelling
        if event.tag in _PLAIN_TAGS:
            return go_text(spelling)
        raise _RefusedError(place, _tag_refused(event.tag))

    def _sequence(self, event: Any, place: Place, events: Iterator[Any], depth: int, prefix: str) -> _Built:
        self._collection_tag(event, place, "seq")
        items: list[tuple[int, Node]] = []
        count = 1
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            item = self._node(event, events, depth + 1, f"{prefix}[{len(items)}]")
            count = self._add(count, item.count, place)
            items.append((len(items), item.node))
        return _Built(Sequence(place, tuple(items)), count)

    def _mapping(self, event: Any, place: Place, events: Iterator[Any], depth: int, prefix: str) -> _Built:
        self._collection_tag(event, place, "map")
        entries: dict[str, Entry] = {}
        merged: dict[str, Entry] = {}
        count = 1
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key_place = self._place(event.start_mark)
            key = self._key(event, events, depth, key_place)
            dotted = f"{prefix}.{key_shown(key)}" if prefix else key_shown(key)
            value = self._node(next(events), events, depth + 1, dotted)
            count = self._add(count, value.count + 1, place)
            if key == "<<" and not getattr(event, "style", "alias"):
                for source in self._merge_sources(value.node, key_place):
                    for name, entry in source.entries.items():
                        merged.setdefault(name, entry)
            elif key in entries:
                first = entries[key].key_place.line
                self.report.problem(key_place, dotted, f"found a second time, first at line {first}")
            else:
                entries[key] = Entry(key_place, value.node)
        return _Built(Mapping(place, {**merged, **entries}), count)

    def _key(self, event: Any, events: Iterator[Any], depth: int, place: Place) -> str:
        key = self._node(event, events, depth + 1, "").node
        if not isinstance(key, Scalar):
            raise _RefusedError(place, f"found {describe(key)} as a key, expected a name")
        if key.text is None:
            raise _RefusedError(place, "found nothing as a key, expected a name")
        # A key is its spelling: `on:` and `010:` stay what they are.
        return key.text if isinstance(event, yaml.AliasEvent) else str(event.value)

    def _merge_sources(self, node: Node, place: Place) -> list[Mapping]:
        nodes = [item for _, item in node.items] if isinstance(node, Sequence) else [node]
        sources = [item for item in nodes if isinstance(item, Mapping)]
        if len(sources) != len(nodes):
            raise _RefusedError(place, "found `<<` without a map behind it, expected an alias of one")
        return sources

    def _collection_tag(self, event: Any, place: Place, name: str) -> None:
        if event.tag not in {None, "!", _TAG + name}:
            raise _RefusedError(place, _tag_refused(event.tag))

    def _add(self, count: int, more: int, place: Place) -> int:
        if count + more > NODES_MAX:
            raise _RefusedError(place, f"found more than {NODES_MAX} values, expected fewer")
        return count + more

    def _syntax(self, error: yaml.MarkedYAMLError) -> None:
        # libyaml's own words quote nothing of the file, so they can be shown.
        mark = error.problem_mark or error.context_mark
        place = self._place(mark) if mark else self._start()
        text = f"broken YAML: {error.problem}"
        if error.context and error.context_mark and error.context_mark.line + 1 != place.line:
            text += f" {error.context} that starts at line {error.context_mark.line + 1}"
        line = [*self.text.split("\n"), ""][place.line - 1]
        if "\t" in line[: len(line) - len(line.lstrip())]:
            text += "; indent with spaces, not tabs"
        self.report.problem(place, "", text)

    def _place(self, mark: Any) -> Place:
        return Place(self.number, mark.line + 1, mark.column + 1, self.path)

    def _start(self) -> Place:
        return Place(self.number, 1, 1, self.path)


def _tag_refused(tag: str) -> str:
    return f"found the tag {shown(tag)}, expected a value without one"


def key_shown(key: str) -> str:
    """Give a key as it may stand in a message: itself if it looks like one, else in quotes or withheld."""
    text = shown(key)
    return key if text == f'"{key}"' and re.fullmatch(r"[\w.:/%-]+", key) else text


def merge(earlier: Mapping, later: Mapping, report: Report, prefix: str = "") -> Mapping:
    """Merge two files: maps deeply, of two scalars the later, of two lists the later before the earlier.

    An unset value leaves the other alone. Nebula also ignores 0, false and "" in a later file; that would
    make a value impossible to switch off, so here the later one counts, and a warning says so.
    """
    entries = dict(earlier.entries)
    for key, entry in later.entries.items():
        dotted = f"{prefix}{key_shown(key)}"
        old = entries.get(key)
        if old is None or is_unset(old.value):
            entries[key] = entry
        elif not is_unset(entry.value):
            entries[key] = Entry(entry.key_place, _merge_values(old, entry, report, dotted))
    return Mapping(later.place, entries)


def _merge_values(old: Entry, new: Entry, report: Report, dotted: str) -> Node:
    match old.value, new.value:
        case Mapping() as earlier, Mapping() as later:
            return merge(earlier, later, report, f"{dotted}.")
        case Sequence() as earlier, Sequence() as later:
            return Sequence(later.place, (*later.items, *earlier.items))
        case Scalar() as earlier, Scalar() as later:
            if later.text in _GO_EMPTY and earlier.text != later.text:
                report.warning(
                    later.place,
                    dotted,
                    f"replaces the value at {earlier.place}; Nebula itself would keep that one, "
                    'since it ignores 0, false and "" in a later file',
                )
            return later
        case earlier, later:
            report.problem(
                later.place,
                dotted,
                f"found {_kind(later)}, expected {_kind(earlier)} as at {earlier.place}",
            )
            return later


def _kind(node: Node) -> str:
    return "a single value" if isinstance(node, Scalar) else describe(node)
