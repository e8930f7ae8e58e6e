"""The errors of this package. Each message is one printable line: the thing, its value, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that a user can mend. Line breaks, control characters and halves of surrogate pairs become escapes."""

    def __init__(self, message: object = "") -> None:
        super().__init__(
            "".join(
                c if c.isprintable() else c.encode("unicode_escape").decode()
                for c in str(message)
            )
        )


class Note(UserWarning):
    """A warning that something runs in another way than it could; the command line prints it as one line."""


class PackError(UserError):
    """Base of every error that this package raises on purpose."""


def shown(value: object, most: int = 160) -> str:
    """A value as text for an error message: one line of at most ``most`` characters, cut in the middle, since the end
    of a path says most. It never raises."""
    # Python refuses to write more than 4,300 digits
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    # so that a megabyte of text is not formatted
    if isinstance(value, str | bytes) and len(value) > 2 * most:
        value = value[:most] + value[-most:]  # type: ignore[operator]  # both are of one type
    name = f"a {type(value).__name__}"
    parts = [value]
    for part in parts:  # a list that holds another twice, and so on, has more parts than its text could show
        if isinstance(part, dict):
            parts += part.values()
        elif isinstance(part, list | tuple | set):
            parts += part
        if len(parts) > 1_000_000:
            return name
    try:
        if hasattr(value, "__fspath__"):
            value = str(value)
        text = " ".join(repr(value).split())
    except Exception:
        # A user's class may raise in its repr, and so may a list with a number that is too long.
        return name
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[most // 2 + 1 - most :]}"


class SettingError(PackError):
    """An argument or an environment variable is unknown, or out of range."""


class FormatError(PackError):
    """A checkpoint or a packed weight is damaged, missing, or does not fit its model."""


class KernelError(PackError):
    """No kernel of this machine can do what was asked."""
