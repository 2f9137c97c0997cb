"""Data and evaluation helpers shared by all scripts."""


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
