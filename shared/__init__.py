"""What every task uses: configuration, assets, cleaning, splits, metrics, checkpoints, reports. Knows no task."""


class UserError(Exception):
    """A foreseeable mistake: the message says cause, place and remedy in one or two lines; the command exits with code 2."""
