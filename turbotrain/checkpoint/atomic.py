"""Files and folders that appear whole or not at all: written beside their destination, flushed, renamed. No torch here."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

logger = logging.getLogger(__name__)

# How the name begins of whatever is being written, or was when its process was killed. Such names have no suffix of their own:
# who looks for *.json or *.safetensors never finds half of one.
UNFINISHED = ".tmp-"
_NAME = 40  # characters of the final name in that of the unfinished: it may be the longest that a disk takes


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when the block ends, and vanishes when it raises.

    Raises OSError with the reason when the disk is full or read-only; `folder` is then what it was.
    """
    folder = folder.expanduser().absolute()
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{folder.name[:_NAME]}.", dir=folder.parent))
        temporary.chmod(0o755)
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        _swap(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise _refused(folder, error) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of `path` when the block ends, and vanishes when it raises.

    Raises OSError with the reason when the disk is full or read-only; `path` is then what it was.
    """
    path = path.expanduser().absolute()
    temporary = path.with_name(f"{UNFINISHED}{path.name[:_NAME]}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise _refused(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _refused(path: Path, error: OSError | SafetensorError) -> OSError:
    """What a failed write says, whatever library it came from: safetensors tells of a full disk in words of its own."""
    while isinstance(error.__cause__, (OSError, SafetensorError)):  # of a file within a folder, say
        error = error.__cause__
    reason = getattr(error, "strerror", None) or str(error)
    named = getattr(error, "filename", None)
    if named and UNFINISHED not in str(named):
        reason += f" ({named})"
    return OSError(
        f"cannot write {path}: {reason}; choose another output, or free space or permissions there; nothing was changed"
    )


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes left half-written below `folder`, where nobody may be writing now."""
    for torn in list(folder.rglob(f"{UNFINISHED}*")):
        if torn.is_dir():
            shutil.rmtree(torn, ignore_errors=True)
        else:
            torn.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file or folder to disk: before a rename that makes it the newest."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`. An old folder that holds more than a checkpoint is kept beside it."""
    if not folder.exists():
        os.rename(new, folder)
        sync(folder.parent)
        return
    old = new  # after an exchange the old content has the new one's name
    if not _exchange(new, folder):
        old = Path(tempfile.mkdtemp(prefix=f"{UNFINISHED}{folder.name[:_NAME]}.old.", dir=folder.parent))
        os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            os.rename(old, folder)
            raise
    sync(folder.parent)
    ours = {file.name for file in folder.iterdir()}
    strangers = [file.name for file in old.iterdir() if file.name not in ours and not file.name.startswith("model")]
    if strangers:
        kept = Path(tempfile.mkdtemp(prefix=f"{folder.name}.replaced.", dir=folder.parent))
        os.rename(old, kept)
        logger.warning("%s: replaced; its other files (%s) are now in %s", folder, ", ".join(strangers), kept)
    else:
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step, so that no kill can fall between; False where the system cannot (renameat2 of Linux)."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2
    return rename is not None and rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0
