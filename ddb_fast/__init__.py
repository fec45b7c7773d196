"""Diffusing DeBias: find the shortcut an image set teaches, train a classifier without it."""

import os.path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["debias", "fit_amplifier", "load_data"]

_FOLDER = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_FOLDER, "kernels")):
    # The sources, where `kernels` lies beside the package: they come before an installed one for
    # whoever stands in a checkout.
    __path__.append(os.path.dirname(_FOLDER))

if TYPE_CHECKING:
    from ddb_fast.facade import debias, fit_amplifier, load_data
else:

    def __getattr__(name: str) -> Any:
        # torch takes seconds to import, and most commands only want a word from one module.
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from ddb_fast import facade

        return getattr(facade, name)
