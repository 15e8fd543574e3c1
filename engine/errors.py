"""What a user can mend: the commands print it as one sentence and exit with code 2."""


class UserError(ValueError):
    """Says what was wanted, what came, and what to do."""
