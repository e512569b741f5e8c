"""The files in configs/: they load without a word, and what they call a default is the default."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nebula_mp.config.load import READERS, REFUSALS, load_config
from nebula_mp.config.model import Config, FirewallConfig, FirewallRule

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.yml"))


def test_the_promised_examples_are_there() -> None:
    assert [file.name for file in FILES] == [
        "gateway.yml",
        "minimal.yml",
        "two-sites-a.yml",
        "two-sites-b.yml",
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_example_loads_without_warnings(file: Path) -> None:
    assert load_config(file, strict=True).warnings == ()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_example_fits_a_terminal(file: Path) -> None:
    assert max(map(len, file.read_text().splitlines())) <= 110


def test_the_reference_shows_every_key_we_obey() -> None:
    tree = yaml.safe_load((CONFIGS / "gateway.yml").read_text())
    shown = set()
    for key in (*READERS, *REFUSALS):
        value = tree
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                break
            value = value[part]
        else:
            shown.add(key)

    assert shown == {*READERS, *REFUSALS} - {"tun.disabled"}


def test_the_reference_shows_the_defaults() -> None:
    shown = load_config(CONFIGS / "gateway.yml").config

    # What has no default, or shows more than the default, is taken from the file; all else must agree.
    rules = FirewallConfig(inbound=(FirewallRule(local_cidr="any"),), outbound=(FirewallRule(),))
    defaults = Config(
        pki=replace(shown.pki, blocklist=(), disconnect_invalid=True, initiating_version=None),
        static_host_map=shown.static_host_map,
        firewall=rules,
    )
    assert shown == defaults


def test_the_two_sites_fit_each_other() -> None:
    a, b = (load_config(CONFIGS / f"two-sites-{site}.yml").config for site in "ab")

    for here, there in ((a, b), (b, a)):
        ports = {remote.port for remotes in here.static_host_map.values() for remote in remotes}
        assert ports == {there.listen.port}
        assert len(here.firewall.inbound) == len(there.firewall.outbound)
    assert a.cipher == b.cipher
    assert a.static_host_map.keys().isdisjoint(b.static_host_map.keys())
