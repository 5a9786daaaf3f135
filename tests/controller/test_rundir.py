import os
import subprocess
import sys
from pathlib import Path

import pytest

from baton.base.errors import ConfigError
from baton.controller.rundir import FAILED_KEPT, SOCKET_PATH_MAX, RunDirectory, default_base, tail


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def test_a_removed_directory_leaves_nothing(base: Path) -> None:
    run = RunDirectory.create(base)
    run.socket("a").touch()
    run.log("b").write_text("hello")
    run.remove()
    run.remove()
    assert [path.name for path in base.iterdir()] == ["lock"]


def test_a_kept_directory_has_logs_and_no_sockets(base: Path) -> None:
    run = RunDirectory.create(base)
    run.socket("a").touch()
    run.log("b").write_text("hello")
    kept = run.keep()
    assert kept.name.startswith("failed-")
    assert {path.name for path in kept.iterdir()} == {"lock", "b.log"}


def test_a_sweep_takes_the_dead_and_leaves_the_living(base: Path) -> None:
    living = RunDirectory.create(base)
    code = "import sys; from pathlib import Path; from baton.controller.rundir import RunDirectory as R; "
    code += "R.create(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(base)], check=True)
    assert len(list(base.iterdir())) == 3
    newest = RunDirectory.create(base)
    assert {path for path in base.iterdir() if path.is_dir()} == {living.path, newest.path}
    living.remove()
    newest.remove()


def test_only_the_latest_failures_are_kept(base: Path) -> None:
    for _ in range(FAILED_KEPT + 2):
        RunDirectory.create(base).keep()
    RunDirectory.create(base).remove()
    assert len(list(base.glob("failed-*"))) == FAILED_KEPT


def test_a_base_that_others_can_read_is_refused(base: Path) -> None:
    base.mkdir(mode=0o755)
    base.chmod(0o755)
    with pytest.raises(ConfigError, match="closed to others"):
        RunDirectory.create(base)


def test_the_default_is_short_enough_for_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert default_base() == Path("/tmp") / f"baton-{os.getuid()}"
    assert len(str(default_base() / "1234567-abcdefgh" / "prefill-12.sock")) < SOCKET_PATH_MAX


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == []
    log.write_bytes(b"x" * 100_000 + b"\n" + b"\n".join(b"line %d" % i for i in range(50)) + b"\n\xff")
    assert tail(log, 3) == ["line 48", "line 49", "�"]
