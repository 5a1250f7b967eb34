"""The version, for the package and for every file that says what wrote it."""

__version__ = "0.1.0"
