"""The errors of this package. Each message is one printable line: the thing, its value, and what to do."""

from __future__ import annotations


class PackError(Exception):
    """Base of every error that this package raises on purpose."""

    def __init__(self, message: object = "") -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message)))


class SettingError(PackError):
    """An argument or an environment variable is unknown, or out of range."""


class FormatError(PackError):
    """A checkpoint or a packed weight is damaged, missing, or does not fit its model."""


class KernelError(PackError):
    """No kernel of this machine can do what was asked."""
