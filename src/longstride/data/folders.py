"""Folders that exist completely or not at all."""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

# A folder whose name begins so is half-written or on its way out: nothing reads it.
UNFINISHED = ".unfinished-"


@contextmanager
def written_whole(folder: Path) -> Generator[Path]:
    """Fill a temporary sibling, then rename it to ``folder``: a reader, or the next process, sees all of it or none.

    Everything is flushed to the disk before the rename, so the promise holds for a killed process and for a power cut.
    An existing ``folder`` is replaced. If the body raises, the temporary folder is removed and ``folder`` is untouched.

    Yields:
        The temporary folder, empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(UNFINISHED + folder.name)
    # What a killed process left behind.
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        flush_folder(unfinished)
        if folder.exists():
            # A folder cannot be renamed over another one that holds files.
            replaced = folder.with_name(f"{UNFINISHED}replaced-{folder.name}")
            shutil.rmtree(replaced, ignore_errors=True)
            folder.rename(replaced)
            unfinished.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            unfinished.rename(folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def flush_folder(folder: Path) -> None:
    """Have every file and folder below ``folder``, and itself, on the disk."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            flush(Path(parent, name))
        flush(Path(parent))


def flush(path: Path) -> None:
    """Have one file, or the entries of one folder, on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder, and journals its entries by itself.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
