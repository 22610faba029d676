"""What tests of one end of an edge share."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from parties import Federation
from wires import started

from peertune.files import write_file


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Clients 0 and 1 have addresses, 2 and 3 can only dial out."""
    made = Federation(tmp_path_factory.mktemp("edges"), name="trial")
    for client in range(4):
        made.join(f"peer-{client}", f"127.0.0.1:{client + 1}" if client < 2 else None)
    write_file(made.folder / "roster.yaml", made.roster().raw)
    return made


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for peers to swap in; at the end all are told to stop waiting, so that a test that fails ends, too."""
    with ThreadPoolExecutor(4) as made:
        yield made
        for swapper in started:
            swapper.stop_waiting()
    started.clear()
