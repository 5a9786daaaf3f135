"""The kernels with tiles for AVX-512, whatever this machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_wide_tiles_say_the_same(tmp_path: Path) -> None:
    files = [str(HERE / name) for name in ("test_kernels.py", "test_attention.py")]
    ran = subprocess.run(
        [sys.executable, str(HERE / "wide.py"), *files],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},  # its index does not know how wide our vectors are
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert ran.returncode == 0, ran.stdout
    assert " passed" in ran.stdout
