"""Files of an earlier run that cannot be read: named, set aside, and made again."""

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

SUFFIX = ".damaged"


def set_aside(path: Path, reason: object) -> Path:
    """Rename a file that cannot be read to `<name>.damaged`, say so in the log, and return the new path."""
    aside = path.with_name(path.name + SUFFIX)
    os.replace(path, aside)
    first_line = (str(reason).strip() or type(reason).__name__).splitlines()[0]
    logger.warning("%s: damaged (%s); set aside as %s and made again", path, first_line, aside.name)
    return aside
