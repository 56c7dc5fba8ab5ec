"""What every task uses, in packages whose imports point one way: see README.md. Knows no task."""


class UserError(Exception):
    """A foreseeable mistake: the message says cause, place and remedy in one or two lines; the command exits with code 2."""
