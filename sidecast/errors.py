"""The base of every error that sidecast raises on purpose, and how messages show what is not ours."""

_MAX_SHOWN_CHARACTERS = 80
_MAX_SHOWN_BITS = 256


class SidecastError(Exception):
    """Something sidecast refuses or could not do; the message names the thing, the value and what is allowed."""


class ConfigError(SidecastError, ValueError):
    """A setting, file or model that a user gave cannot be used."""


class NoRoomError(SidecastError):
    """Memory or a disk has no room for what is needed; the message says how much that is."""


def one_line(error: BaseException) -> str:
    """What an error of somebody else's says, without the advice and further lines that follow its first sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].partition(". ")[0].rstrip(".") if lines else type(error).__name__


def shown(value: object) -> str:
    """A value that a message names, of any type and size, in few characters."""
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        # Python refuses to print integers of thousands of digits.
        return repr(value) if value.bit_length() <= _MAX_SHOWN_BITS else f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return repr(value) if len(value) <= _MAX_SHOWN_CHARACTERS else f"{value[:_MAX_SHOWN_CHARACTERS]!r}..."
    if isinstance(value, list | tuple | dict) and not value:
        return repr(value)
    return f"a {type(value).__name__}"


def printable(text: str) -> str:
    """A text for a terminal: what could move its cursor, or end the line, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
