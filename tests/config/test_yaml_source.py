"""Which files are read, how they merge, and files that are meant to hurt the parser."""

import os
import time
from pathlib import Path

import pytest

from nebula_mp.config import yaml_source
from nebula_mp.config.report import Report
from nebula_mp.config.yaml_source import Mapping, Node, Scalar, find_files, merge, parse
from nebula_mp.errors import ConfigError

HERE = Path("c.yml")


def problems(report: Report) -> list[str]:
    try:
        report.raise_problems()
    except ConfigError as error:
        return list(error.problems)
    return []


def plain(node: Node) -> object:
    """The tree without its places."""
    if isinstance(node, Scalar):
        return node.text
    if isinstance(node, Mapping):
        return {key: plain(entry.value) for key, entry in node.entries.items()}
    return [plain(item) for _, item in node.items]


def read(text: str | bytes) -> object:
    report = Report()
    tree = parse(text if isinstance(text, bytes) else text.encode(), HERE, 0, report)
    assert problems(report) == []
    assert tree is not None
    return plain(tree)


def refused(text: str | bytes) -> list[str]:
    report = Report()
    parse(text if isinstance(text, bytes) else text.encode(), HERE, 0, report)
    return problems(report)


def test_only_yml_and_yaml_below_a_directory_are_taken_in_the_order_of_their_full_names(
    tmp_path: Path,
) -> None:
    names = ["b.yml", "b/a.yml", "b/c/z.yaml", "a.yaml", ".hidden.yml", "B.yml"]
    for name in [*names, "c.yml.bak", "d.json", "b/yml"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    report = Report()

    found = [str(file.relative_to(tmp_path)) for file in find_files(tmp_path, report)]

    assert found == [".hidden.yml", "B.yml", "a.yaml", "b.yml", "b/a.yml", "b/c/z.yaml"]
    assert problems(report) == []


def test_a_file_named_directly_may_have_any_name(tmp_path: Path) -> None:
    file = tmp_path / "nebula.conf"
    file.touch()

    assert find_files(file, Report()) == (file,)


def test_a_directory_without_configuration_is_a_problem(tmp_path: Path) -> None:
    report = Report()

    assert find_files(tmp_path, report) == ()
    assert problems(report) == [f"{tmp_path}: found no .yml or .yaml file below this directory"]


def test_a_link_back_to_a_directory_above_is_a_problem_and_not_an_endless_walk(tmp_path: Path) -> None:
    (tmp_path / "a.yml").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/loop").symlink_to(tmp_path)
    report = Report()

    find_files(tmp_path, report)

    assert problems(report) == [
        f"{tmp_path}/sub/loop: is a link to a directory that contains it: an endless loop"
    ]


def test_a_link_to_nowhere_and_a_pipe_are_problems_if_their_names_say_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yml").touch()
    (tmp_path / "dangling.yml").symlink_to(tmp_path / "nowhere")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.yml")
    os.mkfifo(tmp_path / "pipe.txt")
    report = Report()

    find_files(tmp_path, report)

    assert problems(report) == [
        f"{tmp_path}/dangling.yml: cannot be read: No such file or directory",
        f"{tmp_path}/pipe.yml: found no regular file, expected one with YAML in it",
    ]


def test_more_files_than_anybody_has_are_a_problem(tmp_path: Path) -> None:
    for number in range(yaml_source.FILES_MAX + 1):
        (tmp_path / f"{number}.yml").touch()
    report = Report()

    assert find_files(tmp_path, report) == ()
    assert problems(report) == [f"{tmp_path}: found more than 256 .yml and .yaml files below it"]


def test_directories_deeper_than_anybody_has_are_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.yml").touch()
    (tmp_path / ("d/" * (yaml_source.DEPTH_MAX + 2))).mkdir(parents=True)
    report = Report()

    find_files(tmp_path, report)

    assert problems(report) == [f"{tmp_path}{'/d' * 33}: found more than 32 levels of directories"]


def test_a_directory_or_file_that_may_not_be_read_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    report = Report()

    find_files(tmp_path, report)
    yaml_source.read_file(tmp_path / "gone.yml", 1, report)

    assert problems(report) == [
        f"{tmp_path}: cannot be read: Permission denied",
        f"{tmp_path}/gone.yml: cannot be read: No such file or directory",
    ]


def test_a_file_above_one_mebibyte_is_refused_and_one_of_that_size_is_read(tmp_path: Path) -> None:
    file = tmp_path / "c.yml"
    file.write_bytes(b"a: b\n" + b"#" * (yaml_source.FILE_BYTES_MAX - 5))
    report = Report()
    assert yaml_source.read_file(file, 0, report) is not None

    file.write_bytes(b"a: b\n" + b"#" * (yaml_source.FILE_BYTES_MAX - 4))

    assert yaml_source.read_file(file, 0, report) is None
    assert problems(report) == [f"{file}: found more than 1 MiB, expected a configuration file"]


def test_an_unprintable_file_name_is_escaped(tmp_path: Path) -> None:
    report = Report()

    find_files(tmp_path / "a\nb\udcff", report)

    assert problems(report) == [f"{tmp_path}/a\\nb\\udcff: cannot be read: No such file or directory"]


def test_quoted_and_block_scalars_are_text_and_plain_ones_are_what_yaml_says() -> None:
    assert read("""{a: 010, b: "010", c: '010', d: !!str 010, e: !!int "010", f: , g: ""}""") == {
        "a": "8", "b": "010", "c": "010", "d": "010", "e": "8", "f": None, "g": "",
    }  # fmt: skip
    assert read("a: |\n  1\n  2\nb: >\n  1\n  2\n") == {"a": "1\n2\n", "b": "1 2\n"}


def test_a_key_is_its_spelling() -> None:
    assert read("{on: 1, 010: 2, 1.50: 3, 'x y': 4}") == {"on": "1", "010": "2", "1.50": "3", "x y": "4"}


def test_anchors_aliases_and_merge_keys_work_as_in_nebula() -> None:
    text = "a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}\ne: [*x]\nf: {<<: [{g: 1}, {g: 2, h: 3}]}\n"

    assert read(text) == {
        "a": {"b": "1", "c": "2"},
        "d": {"b": "3", "c": "2"},
        "e": [{"b": "1", "c": "2"}],
        "f": {"g": "1", "h": "3"},
    }


def test_a_quoted_merge_key_is_a_key() -> None:
    assert read('a: {"<<": 1}') == {"a": {"<<": "1"}}


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "~\n", "\n\n"])
def test_a_file_without_content_sets_nothing(text: str) -> None:
    assert read(text) == {}


@pytest.mark.parametrize("text", ["a: !!set {b}", "a: !mine [b]", "a: !!timestamp 2020-01-01"])
def test_tags_are_refused(text: str) -> None:
    tag = text.split()[1].replace("!!", "tag:yaml.org,2002:")

    assert refused(text) == [f'c.yml:1:4: found the tag "{tag}", expected a value without one']


@pytest.mark.parametrize("text", ["a: !!seq [b]", "a: ! [b]"])
def test_a_tag_that_says_what_a_list_is_anyway_is_accepted(text: str) -> None:
    assert read(text) == {"a": ["b"]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_nebula_reads(encoding: str) -> None:
    assert read("a: ä\n".encode(encoding)) == {"a": "ä"}


def test_bytes_that_are_no_text_are_shown_by_their_place() -> None:
    assert refused(b"a: 1\nb: \xff\n") == ["c.yml:2:4: found bytes that are not UTF-8 text"]


@pytest.mark.parametrize("character", ["\x00", "\x1b", "\x7f", "\ufffe"])
def test_control_characters_are_refused(character: str) -> None:
    assert refused(f"a: 1\nb: x{character}\n") == [
        f"c.yml:2:5: found the control character U+{ord(character):04X}, expected text"
    ]


def bomb(levels: int, width: int) -> str:
    """Each list holds `width` times the one before: width ** levels values in a few hundred bytes."""
    lines = ["a0: &a0 x"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels + 1)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(bomb(9, 10), id="a billion laughs"),
        pytest.param(
            "a: &a [" + "x," * 1000 + "]\n" + "".join(f"k{n}: *a\n" for n in range(200)),
            id="a long list often",
        ),
        pytest.param("a: [" + "x," * 200_000 + "]", id="many values"),
        pytest.param("a: &a {b: c}\nd:\n" + "  <<: *a\n" * 60_000, id="many merges"),
        pytest.param("[" * 500_000, id="nested lists"),
        pytest.param("{a: " * 200_000, id="nested maps"),
        pytest.param("- " * 300_000, id="nested block lists"),
        pytest.param("? " * 300_000, id="nested keys"),
        pytest.param("&a " * 200_000, id="anchors of nothing"),
        pytest.param("a: *" + "b" * 500_000, id="a long alias"),
        pytest.param('"' + "\\x41" * 200_000, id="a text without an end"),
    ],
)
def test_files_made_to_hurt_are_refused_within_a_second(text: str) -> None:
    started = time.process_time()

    found = refused(text)

    assert len(found) == 1
    assert len(found[0]) < 200
    assert time.process_time() - started < 1


def test_repeated_keys_are_named_with_their_section() -> None:
    assert refused("a:\n  - {b: 1, b: 2}\na: 3\n") == [
        "c.yml:2:12: a[0].b: found a second time, first at line 2",
        "c.yml:3:1: a: found a second time, first at line 1",
    ]


def merged(*texts: str) -> tuple[object, list[str], tuple[str, ...]]:
    """The tree of several files, later ones last, with problems and warnings."""
    report = Report()
    result: Mapping | None = None
    for number, text in enumerate(texts):
        tree = parse(text.encode(), Path(f"{number}.yml"), number, report)
        assert tree is not None
        result = tree if result is None else merge(result, tree, report)
    assert result is not None
    return plain(result), problems(report), report.warnings()


def test_maps_merge_deeply_scalars_are_replaced_and_lists_appended_the_later_file_first() -> None:
    # nebula 1.11.0 -test printed the same for these two files
    first = "tun: {mtu: 1400, dev: a}\nfirewall: {inbound: [{host: any}]}\nh: {x: [1, 2]}\n"
    second = "tun: {mtu: 1300}\nfirewall: {inbound: [{group: any}]}\nh: {x: [3], y: 4}\n"

    assert merged(first, second) == (
        {
            "tun": {"mtu": "1300", "dev": "a"},
            "firewall": {"inbound": [{"group": "any"}, {"host": "any"}]},
            "h": {"x": ["3", "1", "2"], "y": "4"},
        },
        [],
        (),
    )


def test_null_in_either_file_leaves_the_other_alone() -> None:
    assert merged("a: 1\nb:\nc: [1]\n", "a:\nb: {d: 2}\nc: ~\n") == (
        {"a": "1", "b": {"d": "2"}, "c": ["1"]},
        [],
        (),
    )


@pytest.mark.parametrize("value", ["false", "0", '""'])
def test_a_later_file_can_switch_something_off_and_it_is_said_that_nebula_would_not(value: str) -> None:
    tree, wrong, warnings = merged("a: {b: 1}\n", f"a:\n  b: {value}\n")

    assert tree == {"a": {"b": value.strip('"')}}
    assert wrong == []
    text = (
        "1.yml:2:6: a.b: replaces the value at 0.yml:1:8; Nebula itself would keep that one, "
        'since it ignores 0, false and "" in a later file'
    )
    assert warnings == (text,)


def test_the_same_empty_value_twice_is_no_warning() -> None:
    assert merged("a: 0\n", "a: 0\n") == ({"a": "0"}, [], ())


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        ("a: 1\n", "a: [1]\n", "1.yml:1:4: a: found a list, expected a single value as at 0.yml:1:4"),
        ("a: [1]\n", "a: 1\n", "1.yml:1:4: a: found a single value, expected a list as at 0.yml:1:4"),
        (
            "a: {b: {}}\n",
            "a: {b: 1}\n",
            "1.yml:1:8: a.b: found a single value, expected a map as at 0.yml:1:8",
        ),
    ],
)
def test_values_of_different_kinds_do_not_merge(first: str, second: str, problem: str) -> None:
    assert merged(first, second)[1] == [problem]
