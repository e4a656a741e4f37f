"""Every error that Headscope raises, as one tree.

HeadscopeError
├── ShapeError            tensors that do not fit together, or do not fit an edit
├── NonFiniteError        NaN or infinity where a number was expected
├── NotIntercepted        attention that was not caught, or cannot be caught this way
├── SelectionError        a site, layer, head, position or step that does not exist or was never hit
├── EditError             an edit that this site cannot express, or edits that contradict each other
├── RecipeError           a recipe that is malformed, or made for another model
├── BudgetError           what was asked would not fit the byte budget
├── StoreError            a capture on disk that is missing, damaged or of another version
├── ModelError            a model that cannot be loaded safely
├── InputError            text or tensors that a model cannot take
├── AttributionError      a target or model that cannot be attributed
└── ClosedError           a probe, capture or plan used after it was closed
"""


class HeadscopeError(Exception):
    """Base of all errors raised on purpose; the message says what was expected, what came, and what to do."""


class ShapeError(HeadscopeError, ValueError):
    """Tensors whose shapes do not fit together."""


class NonFiniteError(HeadscopeError, ArithmeticError):
    """NaN or infinity where a finite number was expected."""


class NotIntercepted(HeadscopeError, RuntimeError):
    """Attention that was seen but not caught, or that cannot be caught in this way."""


class SelectionError(HeadscopeError, LookupError):
    """A site, layer, head, position or step that does not exist, or a selector that hit nothing."""


class EditError(HeadscopeError, ValueError):
    """An edit that a site cannot express, or edits that contradict each other."""


class RecipeError(HeadscopeError, ValueError):
    """A recipe that is malformed or was made for another model."""


class BudgetError(HeadscopeError, MemoryError):
    """Keeping what was asked would exceed the byte budget."""


class StoreError(HeadscopeError, OSError):
    """A capture or result on disk that is missing, damaged or of another version."""


class ModelError(HeadscopeError, RuntimeError):
    """A model that cannot be loaded, or not safely."""


class InputError(HeadscopeError, ValueError):
    """Text or tensors that the model cannot take."""


class AttributionError(HeadscopeError, ValueError):
    """A target that is no single number, or a model through which relevance cannot be followed."""


class ClosedError(HeadscopeError, RuntimeError):
    """A probe, capture or plan that was used after it was closed."""
