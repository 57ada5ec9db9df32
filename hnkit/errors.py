"""The exceptions of hnkit.

Everything a user can cause derives from `InputError`; the command line turns it into one line and exit code 2.
"""


class InputError(ValueError):
    """Bad input: the message is one line that says what was given, what is accepted and what to do.

    Attributes:
        everywhere: whether every process of the command raises it alike, so that one of them is to say it.
    """

    everywhere = False


class NonFiniteError(InputError):
    """A map, reward or product returned NaN or infinity; the message names the sample it happened at."""


class ExpansiveMapError(InputError):
    """The local norm is 1 or more where a method needs less; the message names the norm."""


class NotApplicable(Exception):  # noqa: N818 - it is a verdict, not an error
    """A hypothesis of a statement is not met, so that the statement says nothing; the message names the hypothesis.

    Raised where the hypothesis is tested, and nowhere else: whatever else goes wrong inside a check makes it fail.
    """


class NotCertifiedError(InputError):
    """No proof of a Lipschitz constant is known for a map; the message names the layer in the way."""


class MissingDerivativeError(InputError):
    """A method needs a derivative of the map that torch cannot compute; the message says which methods do without."""
