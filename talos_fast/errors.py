"""The one error type that means "your input, not our bug"."""


class TalosError(ValueError):
    """Bad input: the message names the parameter or file, what was found, and what to do.

    The command line prints the message as one line and exits with code 2.
    """
