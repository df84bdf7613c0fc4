"""What rank 0 leaves for the commands that act for its run: they show the run's secret, as its ranks do."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from sidecast.atomic_files import replacing
from sidecast.errors import ConfigError
from sidecast.trainer.pipe.messages import Session

log = logging.getLogger(__name__)


class RunFile:
    """The file.

    Args:
        path: Of it.
        endpoint: Of the run's service.

    Raises:
        ConfigError: There is no such folder.
    """

    def __init__(self, path: str, endpoint: str) -> None:
        # The job may go to another working directory.
        self._path = Path(path).absolute()
        if not self._path.parent.is_dir():
            raise ConfigError(f"nowcaster.run_file is {path!r}; allowed: a file in an existing folder")
        self._endpoint = endpoint

    def write(self, session: Session) -> None:
        """Puts a run's id, secret and service in the place of what is there, for the file's owner alone.

        Raises:
            ConfigError: It cannot be written.
        """
        content = {"run_id": session.run_id, "run_secret": session.run_secret, "endpoint": self._endpoint}
        try:
            with replacing(self._path) as partial:
                partial.unlink(missing_ok=True)
                descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with open(descriptor, "w", encoding="utf-8") as file:
                    file.write(json.dumps(content) + "\n")
        except OSError as error:
            raise ConfigError(f"nowcaster.run_file {self._path} cannot be written: {error.strerror}") from error

    def renew(self, session: Session) -> None:
        """The same, but for a warning if it cannot be written: no run ends for that."""
        try:
            self.write(session)
        except ConfigError as error:
            log.warning("%s", error)
