"""The errors of this package. Each message is one printable line: the thing, its value, and what to do."""

from __future__ import annotations


class PackError(Exception):
    """Base of every error that this package raises on purpose."""

    def __init__(self, message: object = "") -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message)))


def shown(value: object) -> str:
    """A value as text for a message: at most 100 characters. It never raises."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write more than 4,300 digits
        return f"an integer of {value.bit_length()} bits"
    try:
        return f"{value!r:.100}"
    except Exception:  # a list with such a number
        return f"a {type(value).__name__}"


class SettingError(PackError):
    """An argument or an environment variable is unknown, or out of range."""


class FormatError(PackError):
    """A checkpoint or a packed weight is damaged, missing, or does not fit its model."""


class KernelError(PackError):
    """No kernel of this machine can do what was asked."""
