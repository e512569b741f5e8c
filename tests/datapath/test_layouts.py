"""The native kernel finds every word of the shared memory where Python does."""

import pytest

from nebula_mp import shm, shm_ring, shm_stats, shm_table
from nebula_mp.shm import Layout
from nebula_mp.shm_table import Row

pytestmark = pytest.mark.native

RING_WORDS = ("HEAD", "TAIL", "LEASE", "PROGRESS")
TABLE_WORDS = ("RULES_GENERATION", "LIVE", "TOUCHED")
CONTROLS_OWN = {"JOURNAL", "JOURNAL_ROW"}
HEADER = {
    "magic": (0, 8),
    "version": (8, 4),
    "spare": (12, 4),
    "generation": (16, 8),
    "size": (24, 8),
    "parameters": (32, 32),
}


def members(prefix: str, fields: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"{prefix}.{name}": place for name, place in fields.items()}


def python() -> dict[str, tuple[int, int]]:
    """What Python says of where things are: offset and size."""
    found: dict[str, tuple[int, int]] = {}
    for name, row in vars(shm_table).items():
        if isinstance(row, Row) and name not in CONTROLS_OWN:
            found[name] = (0, row.size)
            found |= members(name, {each: (field.offset, field.size) for each, field in row.fields.items()})
    for module, names in ((shm_ring, RING_WORDS), (shm_table, TABLE_WORDS), (shm, ["GENERATION"])):
        found |= {name: (8 * getattr(module, name), 8) for name in names}
    found["SEEDS"] = (8 * shm_table.SEEDS, 8 * shm_table.SEED_COUNT)
    found["TIMEOUTS"] = (8 * shm_table.TIMEOUTS, 8 * shm_table.TIMEOUT_COUNT)
    found["USED"] = (8 * shm_table.USED, 8 * shm_table.USED_COUNT)
    found["ROWS_AT_WORD"] = (shm_table.ROWS_AT, 0)
    found["HEADER"] = (0, shm._HEADER.size)
    found |= members("HEADER", HEADER)
    found["AREA_HEADER"] = (0, shm_ring.AREA_HEADER_BYTES)
    count, number = 8 * shm_ring._COUNT, 8 * shm_ring._NUMBER
    found |= members("AREA_HEADER", {"count": (count, 8), "number": (number, 8), "spare": (16, 48)})
    found["ENTRY"] = (0, shm_ring._ENTRY.size)
    fields = shm_ring.Entry._fields
    return found | members("ENTRY", {name: (4 * each, 4) for each, name in enumerate(fields)})


def test_every_field_lies_where_python_has_it_and_none_is_missing() -> None:
    from nebula_mp import _accel  # noqa: PLC0415 - not everywhere

    found = _accel.layout_offsets()

    assert len({name for name, _, _ in found}) == len(found)
    assert {name: (offset, size) for name, offset, size in found} == python()


def test_every_region_is_known_by_the_same_name_magic_and_version() -> None:
    from nebula_mp import _accel  # noqa: PLC0415 - not everywhere

    modules = (shm_table, shm_ring, shm_stats)
    expected = [
        tuple(layout)
        for module in modules
        for name, layout in vars(module).items()
        if isinstance(layout, Layout) and name not in CONTROLS_OWN
    ]

    assert sorted(_accel.layouts()) == sorted(expected)
