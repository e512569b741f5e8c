"""The documentation is true: links lead somewhere, commands exist, and the README's way to a network works."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CLONE = Path(__file__).resolve().parents[1]
PAGES = sorted([*CLONE.glob("*.md"), *(CLONE / "docs").rglob("*.md")])
README = (CLONE / "README.md").read_text()
TEXTS = [
    "nebula_mp",
    "tests",
    "tools",
    "docs",
    "configs",
    "stubs",
    "rust/*.toml",
    "rust/accel",
    "rust/core",
    "rust/fuzz",
    ".ci",
    "*.md",
    "*.cfg",
    "*.toml",
    "*.py",
    "*.in",
]


def page_id(page: Path) -> str:
    return str(page.relative_to(CLONE))


def fenced(text: str, language: str) -> list[str]:
    """The bodies of a page's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """The anchors GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target == CLONE or CLONE in target.parents, link
        assert not anchor or anchor in anchors(target), link


def documented_commands(page: Path) -> Iterator[list[str]]:
    for block in [*fenced(page.read_text(), "sh"), *fenced(page.read_text(), "console")]:
        for line in block.splitlines():
            words = line.removeprefix("$ ").split("#")[0].removeprefix("sudo ").split()
            if words:
                yield words


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_tool_and_subcommand_in_a_code_block_exists_with_its_options(page: Path) -> None:
    for words in documented_commands(page):
        program, *rest = words
        if program.startswith("tools/"):
            assert os.access(CLONE / program, os.X_OK), program
        elif program == "nebula-mp":
            subcommand = [*take_names(rest)]
            text = help_of(subcommand)
            for option in (word.split("=")[0] for word in rest if word.startswith("-")):
                assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"{option} in {words}"


def take_names(words: list[str]) -> Iterator[str]:
    for word in words:
        if not re.fullmatch(r"[a-z][a-z-]*", word):
            return
        yield word


def help_of(subcommand: list[str]) -> str:
    done = run_program(*subcommand, "--help")
    assert done.returncode == 0, f"nebula-mp {' '.join(subcommand)}: {done.stderr}"
    return done.stdout


def run_program(*arguments: str, cwd: Path = CLONE) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-P", "-m", "nebula_mp", *arguments]
    return subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_the_two_sites_of_the_readme_can_be_set_up_by_its_commands_alone(tmp_path: Path) -> None:
    commands = [
        words for words in documented_commands(CLONE / "README.md") if words[:2] == ["nebula-mp", "cert"]
    ]
    (example,) = fenced(README, "yaml")

    for words in commands:
        done = run_program(*words[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    config = tmp_path / "config.yml"
    config.write_text(example.replace("/etc/nebula/", f"{tmp_path}/"))
    done = run_program("config", "validate", "-c", str(config), cwd=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert {"ca.key", "site-a.key", "site-b.crt", "site-b.key"} <= {path.name for path in tmp_path.iterdir()}


def texts() -> Iterator[Path]:
    for pattern in TEXTS:
        for found in CLONE.glob(pattern):
            files = found.rglob("*") if found.is_dir() else [found]
            yield from (file for file in files if file.is_file() and is_source(file))


def is_source(file: Path) -> bool:
    """And not what was made of one, nor an input of a fuzzer."""
    return not {"__pycache__", "target", "corpus"} & {*file.parts} and file.suffix != ".so"


def test_no_file_speaks_of_the_machine_it_was_written_on() -> None:
    homes = re.compile(rf"{re.escape(str(CLONE))}\b|/(?:home|Users|root)/\w")

    found = [f"{page_id(file)}: {match[0]}" for file in texts() if (match := homes.search(file.read_text()))]

    assert found == []
