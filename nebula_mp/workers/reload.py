"""What a reload may change in a running gateway, and what has to wait for a restart.

Data flow: new Config, running Config -> [workers.reload] -> workers.reloading
Source: the reload column of Nebula's configuration keys.
"""

from dataclasses import replace
from typing import Any

from nebula_mp.config.model import Config

_RESTART_ONLY: dict[str, tuple[str, ...]] = {
    "": ("cipher", "handshakes", "routines"),
    "listen": ("host", "port", "udp_offloads"),
    "tun": ("dev", "tx_queue", "drop_local_broadcast", "drop_multicast", "use_offloads"),
    "mp": ("run_dir", "workers", "drain", "kernel", "user", "offload"),
}


def merge(running: Config, new: Config) -> tuple[Config, tuple[str, ...]]:
    """Give the config to run with from now on, and the changed keys that keep their running value."""
    kept: list[str] = []
    sections: dict[str, Any] = {}
    for section, keys in _RESTART_ONLY.items():
        old_part, new_part = (getattr(config, section) if section else config for config in (running, new))
        held = {key: getattr(old_part, key) for key in keys}
        kept += (
            f"{section}.{key}" if section else key for key in keys if getattr(new_part, key) != held[key]
        )
        sections |= {section: replace(new_part, **held)} if section else held
    return replace(new, **sections), tuple(sorted(kept))
