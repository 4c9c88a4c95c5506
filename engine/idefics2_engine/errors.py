"""What a caller may catch: one class per kind of bad input, all of them ``ValueError``."""


class Idefics2Error(ValueError):
    """Base of every error that bad input causes; the message names what, wanted and got."""


class ConfigError(Idefics2Error):
    """A checkpoint's JSON files are missing, unreadable or describe an impossible model."""


class CheckpointError(Idefics2Error):
    """Weights are missing, unreadable or do not fit the config."""


class ImageError(Idefics2Error):
    """An image cannot be read or used."""


class PromptError(Idefics2Error):
    """A prompt or a conversation cannot be turned into token ids."""


class SamplingError(Idefics2Error):
    """A sampling parameter is out of its range."""
