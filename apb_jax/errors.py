"""The one exception that means: the input is wrong, not the program."""


class UserError(ValueError):
    """One line that names the value, the rule it breaks and the nearest legal choice.

    Command lines print it as ``error: <line>`` and exit with status 2, without a traceback.
    """
