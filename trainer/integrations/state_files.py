"""What a checkpoint's folder keeps of nowcasting: a file of the run, and one of each rank while on probation."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from sidecast.atomic_files import replacing
from sidecast.trainer.hook.attachment import Attachment

log = logging.getLogger(__name__)

STATE_FILE = "sidecast_state.json"


def save_state(attachment: Attachment, folder: Path, *, is_writer: bool) -> None:
    """Adds this rank's part of the nowcasting to a checkpoint; what finds no room costs itself, with a warning.

    Args:
        attachment: Of the run.
        folder: The checkpoint's.
        is_writer: Whether this rank writes what is the same on all.
    """
    own = attachment.state_dict()
    if own is None:
        return
    if not folder.is_dir():
        log.warning("nowcasting will not resume from this checkpoint: there is no folder %s", folder)
        return
    attachment.save_rollback_copy(folder)
    if not is_writer:
        return
    try:
        # An earlier run's, in the same place, is not to be taken for it.
        (folder / STATE_FILE).unlink(missing_ok=True)
        with replacing(folder / STATE_FILE) as partial:
            partial.write_text(json.dumps(own))
    except OSError as error:
        log.warning("a run that resumes from %s begins its nowcasting anew: %s", folder, error)


def load_state(folder: Path | None) -> dict[str, Any] | None:
    """What ``save_state`` wrote of the run; None where there is none, or none that can be read."""
    if folder is None or not (folder / STATE_FILE).exists():
        return None
    reason = "is no state of a run"
    try:
        saved = json.loads((folder / STATE_FILE).read_text())
        if isinstance(saved, dict) and isinstance(saved.get("step"), int):
            return saved
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {error}"
    log.warning("nowcasting begins anew: %s %s", folder / STATE_FILE, reason)
    return None
