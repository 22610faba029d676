import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client: no test may reach for the network
os.environ["PEERTUNE_CACHE"] = ""  # no test finds what another has kept, or the user
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on tensors this small, threads wait more than they work

import gc
import sys
from collections.abc import Callable, Generator, Iterator
from io import StringIO
from pathlib import Path

import pytest
import sides
from hypothesis import HealthCheck, settings

sides.watch()
# How long an example takes says how busy the machine is: no test is about that.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and sides.is_thorough(vars(item.module), item.fixturenames):
            item.add_marker("thorough")
    # What takes minutes must not begin last, when the other processes have nothing left to do: least of all peers that
    # are killed and cut off, which wait more than they compute.
    long = {item.path for item in items if item.get_closest_marker("thorough") is not None}
    items.sort(key=lambda item: (item.path not in long, item.path.parent.name != "wire"))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage while modules are imported, which took a quarter of that time, nor in them ever after."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a quick test that starts a process: it belongs to the others."""
    before = len(sides.started)
    yield
    if item.get_closest_marker("thorough") is None and (new := sides.started[before:]):
        pytest.fail(f"starts {', '.join(new)}: mark it with pytest.mark.thorough, which `make quick` leaves out")


@pytest.fixture(scope="session")
def glue_path() -> Path:
    """The folder with one folder of Parquet files for each GLUE task."""
    path = Path(__file__).parents[2] / "shared" / "data" / "glue"
    if not path.is_dir():
        pytest.skip(f"no GLUE data in {path}")
    return path


@pytest.fixture(scope="session")
def little_glue(glue_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of each GLUE task: tokenising all of them for each run would take minutes."""
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("glue")
    for file in glue_path.glob("*/*.parquet"):
        (folder / file.parent.name).mkdir(exist_ok=True)
        parquet.write_table(parquet.read_table(file).slice(0, 600), folder / file.parent.name / file.name)
    return folder


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def peertune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Run the command in this process, in an empty folder without a terminal; return exit code, output and problems."""
    from processes import problems

    from peertune.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", StringIO())

    def call(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peertune", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        code = caught.value.code
        assert code is None or isinstance(code, int)
        return code or 0, out, problems(err)

    return call
