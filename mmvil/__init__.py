"""mmvil: Vision-LSTM (arXiv 2406.04303) for OpenMMLab.

Importing this package is cheap and needs nothing but the standard library. `mmvil.ops` needs torch; `mmvil.models` and
the rest need mmengine. Registration needs no import at all: mmengine imports `mmvil.registry` by itself when it meets a
type such as `mmvil.VisionLSTM`, and that in turn imports the modules that hold the registered classes.
"""

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .capture import capture_inference
    from .convert import from_official

__all__ = ['__version__', 'capture_inference', 'from_official']


def __getattr__(name: str) -> Any:
    """Import the public functions at their first use, so that `import mmvil` stays free of torch and mmengine."""
    if name == 'from_official':
        from .convert import from_official

        return from_official
    if name == 'capture_inference':
        from .capture import capture_inference

        return capture_inference
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
