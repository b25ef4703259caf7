"""Every error that vitopt raises on purpose.

    VitoptError
    ├── RecipeError        the recipe or a command's arguments are wrong
    ├── CheckpointError    a checkpoint is missing, unreadable or unsafe
    ├── DataError          images or labels cannot be used
    │   └── BadImageError  one image file cannot be decoded
    ├── PatternError       a layer pattern matches no layer of the model
    ├── UnsupportedError   this machine cannot run what was asked for
    ├── MeasurementError   a variant ran but its numbers cannot be used
    ├── RecordError        records cannot be read or compared
    └── StorageError       results cannot be written

Each carries one line that names the thing and the remedy. `vitopt.cli` prints that line and exits with
status 1; anything else that escapes is a bug and keeps its traceback.
"""


class VitoptError(Exception):
    """Base of the tree: catch this to catch everything that vitopt raises on purpose."""


class RecipeError(VitoptError):
    """A recipe or an argument is wrong; the message lists every mistake found."""


class CheckpointError(VitoptError):
    """A checkpoint is missing, unreadable, not an image classifier, or holds pickled weights."""


class DataError(VitoptError):
    """A data set has no usable images, or its labels do not fit the model's head."""


class BadImageError(DataError):
    """One image is truncated, not an image, or has too many pixels."""


class PatternError(VitoptError):
    """A logical layer name matches nothing in the model; the message lists what exists."""


class UnsupportedError(VitoptError):
    """A format or an attention kernel cannot run on this machine."""


class MeasurementError(VitoptError):
    """A variant gave NaN, ran out of memory, or could not be timed."""


class RecordError(VitoptError):
    """A record has another schema, or two records do not describe the same images."""


class StorageError(VitoptError):
    """Results cannot be written: the disk is full or the folder is not writable."""
