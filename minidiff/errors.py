"""What is said to people: errors, and notices that stop nothing."""


class UserError(ValueError):
    """One clear sentence: what is wrong, where, and what to do. The command line prints it and exits with status 1."""


class UserNotice(UserWarning):
    """One clear sentence of what was done otherwise than asked. The command line prints it and goes on."""
