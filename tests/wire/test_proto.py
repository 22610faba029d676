import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("made", ["peer_pb2.py", "peer_pb2.pyi"])
def test_what_protoc_makes_of_the_protocol_is_what_is_there(made: str, tmp_path: Path) -> None:
    source = Path("peertune") / "wire" / "peer.proto"
    (tmp_path / source).parent.mkdir(parents=True)
    shutil.copy(ROOT / source, tmp_path / source)
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.", "--pyi_out=.", str(source)]
    subprocess.run(protoc, cwd=tmp_path, check=True)
    assert (ROOT / "peertune" / "wire" / made).read_text() == (tmp_path / "peertune" / "wire" / made).read_text()
