"""The one exception that stands for a mistake of the user's."""


class UserError(Exception):
    """Wrong usage, config or data: shown as one plain message without a traceback, exit status 2."""
