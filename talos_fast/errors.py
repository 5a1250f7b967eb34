"""The one error type that means "your input, not our bug", and how it quotes others."""


class TalosError(ValueError):
    """Bad input: the message names the parameter or file, what was found, and what to do.

    The command line prints the message as one line and exits with code 2.
    """


def brief(error: BaseException) -> str:
    """What another library said, on one line and cut: some name every tensor of a model."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"
