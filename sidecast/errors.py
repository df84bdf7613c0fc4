"""The base of every error that sidecast raises on purpose."""


class SidecastError(Exception):
    """Something sidecast refuses or could not do; the message names the thing, the value and what is allowed."""


class ConfigError(SidecastError, ValueError):
    """A setting, file or model that a user gave cannot be used."""


class NoRoomError(SidecastError):
    """Memory or a disk has no room for what is needed; the message says how much that is."""
