"""Every error a user of safeft can meet: what happened (the value), why it matters, what to do.

Each class also inherits the built-in that fits it, so ``except ValueError`` keeps working in
scripts that do not know safeft.
"""


class SafeftError(Exception):
    """Base of all errors safeft raises on purpose; the commands print it and exit with code 2."""


class UnsupportedModelError(SafeftError, NotImplementedError):
    """The model's layout has no site rule, so no neuron of it can be named."""


class PromptError(SafeftError, ValueError):
    """Prompts cannot be read, are empty or one-sided, or cannot be put into a chat template."""


class SelectionError(SafeftError, ValueError):
    """Scores cannot become a set of neurons: a fraction of 0, a count above what is there."""


class ArtefactError(SafeftError, ValueError):
    """A saved set or certificate is missing, truncated, edited or of a newer schema."""


class FingerprintError(SafeftError, ValueError):
    """A set of neurons meets a model it was not located in."""


class FreezeError(SafeftError, RuntimeError):
    """The promise cannot be kept: an optimizer, adapter or engine, or a hook that is dead."""


class ConfigError(SafeftError, ValueError):
    """A command or YAML file asks for what does not exist or does not go together."""
