"""The error for people at the command line."""


class UserError(ValueError):
    """One clear sentence: what is wrong, where, and what to do. The command line prints it and exits with status 1."""
