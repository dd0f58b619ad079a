"""The one exception for mistakes a user can mend: shown without a traceback."""


class UserError(ValueError):
    """Names the file, key, line or value at fault, what was expected and what to do about it."""
