from pathlib import Path

import pytest

from peertune.errors import IdentityError, RunError
from peertune.identity.secret import of_simulations, read_secret


def test_a_secret_is_drawn_once_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "peer" / "secret"
    first = read_secret(file)
    assert len(first) == 32
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_secret(file) == first
    assert read_secret(tmp_path / "other") != first


def test_a_secret_that_others_can_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    read_secret(file)
    file.chmod(0o640)
    with pytest.raises(IdentityError, match="others may read it"):
        read_secret(file)
    file.write_bytes(b"short")
    file.chmod(0o600)
    with pytest.raises(IdentityError, match="has 5 bytes"):
        read_secret(file)
    with pytest.raises(RunError, match="can't be written"):
        read_secret(file / "below")


def test_simulations_have_one_in_the_user_s_folder_or_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PEERTUNE_SECRET", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert of_simulations() == read_secret(tmp_path / "peertune" / "secret")
    monkeypatch.setenv("PEERTUNE_SECRET", str(tmp_path / "mine"))
    assert of_simulations() == read_secret(tmp_path / "mine")
