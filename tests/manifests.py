"""Manifests as somebody may have written them, with a checksum that is right."""

import json
from pathlib import Path

from fusedisk.sealed import seal


def edit_manifest(path: Path, change: dict[str, object]) -> None:
    """Change fields of a manifest in its place."""
    content = json.loads(path.read_text()) | change
    content.pop("checksum", None)
    path.write_bytes(seal(json.dumps(content, indent=2).encode()))
