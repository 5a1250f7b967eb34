"""The one error type that means "your input, not our bug", and how it quotes others."""

from collections.abc import Iterator
from contextlib import contextmanager


class TalosError(ValueError):
    """Bad input: the message names the parameter or file, what was found, and what to do.

    The command line prints the message as one line and exits with code 2.
    """


@contextmanager
def needs(extra: str, what: object = "") -> Iterator[None]:
    """Around the import of an optional package: says which extra of talos-fast installs it, and what needs it.

    Raises:
        TalosError: the package is not installed, or too old for what is imported.
    """
    try:
        yield
    except ImportError as error:
        about = f"{what}: " if what else ""
        raise TalosError(f"{about}{error}; pip install 'talos-fast[{extra}]'") from error


def brief(error: BaseException) -> str:
    """Another library's message, on one line and cut short: some list every tensor of a model."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"
