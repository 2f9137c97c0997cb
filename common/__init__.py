"""Data and evaluation helpers shared by all scripts."""

import errno
import os
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake in the input: one message that names the flag, file or value and the mend; scripts
    exit with 2."""

    def __str__(self) -> str:
        return super().__str__().rsplit("UserError: ", 1)[-1].strip()  # a loader process wraps it


def claim(file) -> None:
    """Lock a file open for writing while this process lives; UserError if another one holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:  # lockf, not flock: loader processes, which may outlive a killed run, do not inherit it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{file.name}: another run writes here; use another --exp-name") from None
    except OSError:  # a network file system without locks
        pass


def allow_open_files(needed: int = 256, wanted: int = 4096) -> None:
    """Raise the limit of open files as far as it may be raised: loader processes need many."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if most < needed:
        mend = "raise the limit (ulimit -n 4096), or use --num-workers 0"
        raise UserError(f"{most} open files are too few for loader processes; {mend}")
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextmanager
def written_whole(path: Path):
    """A file to write to that takes its place at the end: whatever dies, it is old or new."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def explain(error: Exception) -> str | None:
    """One line, with the mend, for what the input or the machine did; None for our own mistakes."""
    text, cause = str(error).strip(), error.__context__
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, RuntimeError) and getattr(cause, "errno", None) in full:
        error, text = cause, str(cause)  # torch's word for a full disk says less
    if isinstance(error, UserError | FloatingPointError):
        return text
    if isinstance(error, OSError):
        mends = dict.fromkeys(full, "; make room, and the same command continues")
        mends[errno.EMFILE] = "; raise the limit (ulimit -n 4096), or use --num-workers 0"
        return text + mends.get(error.errno, "")
    lowered = text.lower()
    if "out of memory" in lowered or "allocate memory" in lowered or isinstance(error, MemoryError):
        return f"{first_line(text)}; use --accumulate 2 or more, or a smaller --crop-size"
    if "DataLoader worker" in text:
        return (
            f"{first_line(text)} Where /dev/shm is small (docker run --shm-size=8g), use "
            "--num-workers 0; the same command continues"
        )
    if "too many open files" in lowered:
        return "too many open files; raise the limit (ulimit -n 4096), or use --num-workers 0"
    return None


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300] or "no memory is left"
