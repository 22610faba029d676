"""A party's secret, from which the draws of its private steps follow: 32 bytes in a file that never leaves it.

A peer's lies beside its key. A simulation has one for all of its clients, in the user's own folder and not in the
run's: run directories are handed on, and whoever has the secret can take the noise off what was sent.
"""

import os
import secrets
from pathlib import Path

from peertune.errors import IdentityError
from peertune.files import reported, write_file
from peertune.privacy.draws import SECRET_BYTES

FILE = "secret"
"""In a peer's folder."""
VARIABLE = "PEERTUNE_SECRET"
"""The environment's name for the file of simulations."""


def of_simulations() -> bytes:
    """Return the secret of this user's simulations; errors are those of `read_secret`."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "peertune"
    return read_secret(Path(os.environ.get(VARIABLE) or folder / FILE).expanduser())


def read_secret(file: Path) -> bytes:
    """Return the secret in a file, which is drawn where there is none, for its owner alone.

    Raises IdentityError where it is no secret, or may be read by others, and RunError where it can't be written.
    """
    with reported(file):
        if not file.exists():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(file, secrets.token_bytes(SECRET_BYTES), private=True)
        open_to, found = file.stat().st_mode & 0o077, file.read_bytes()
    if open_to:
        raise IdentityError(f"{file}: others may read it, and take the noise off by it; give it mode 600, or remove it")
    if len(found) != SECRET_BYTES:
        raise IdentityError(f"{file}: has {len(found)} bytes, and a secret {SECRET_BYTES}; remove it to draw another")
    return found
