"""Data and evaluation helpers shared by all scripts."""


class UserError(ValueError):
    """A mistake in the input: one message that names the flag, file or value and the mend; scripts
    exit with 2."""
