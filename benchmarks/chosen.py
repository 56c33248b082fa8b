"""What dmt chose when it compiled, from the reports that it leaves in ``dump_dir``: what a speed is the speed of."""

from __future__ import annotations

import json
from pathlib import Path

TELLING = ("select_kernels", "fuse_optimizers")  # passes whose notes say which implementation runs and why
COUNTED = ("fuse_interaction", "fuse_cross")  # passes that say it by what they rewrote
LONGEST = 140


def chosen(folder: Path) -> str:
    """Return what the compiled graphs under a folder chose; empty where none was compiled."""
    said: dict[str, None] = {}
    for report in sorted(folder.rglob("report.json")):
        for done in json.loads(report.read_text())["passes"]:
            if done["name"] in TELLING:
                said |= {note if len(note) <= LONGEST else note[:LONGEST] + "...": None for note in done["notes"]}
            elif done["name"] in COUNTED:
                said[f"{done['name']}: {done['matched'] if done['changed'] else 0}"] = None
    return ". ".join(said)
