"""Read the golden vectors; tests/vectors/README.md says where they come from."""

import json
from pathlib import Path
from typing import Any

Vector = dict[str, Any]

DIRECTORY = Path(__file__).resolve().parents[1] / "vectors"


def load(name: str) -> Any:
    """Return the content of tests/vectors/<name>.json."""
    return json.loads((DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))
