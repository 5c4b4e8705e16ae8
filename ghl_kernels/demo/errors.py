"""The one exception of the command line that is the user's to mend."""


class UserError(Exception):
    """Something the user can put right; the message is one sentence, shown without a traceback."""
