"""Triton's interpreter without a search that it repeats.

Before each launch and each call of one kernel's function by another it goes through all that
`triton.language` holds, for the members to replace. Those are the same ones every time, and the
search takes as long as many a small kernel.
"""

import inspect

import triton.language as tl
from triton.runtime import interpreter


def remember_builtins() -> None:
    """Find the members once; what is replaced, when and for how long stays Triton's business."""
    packages = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    names = {
        package: [name for name, x in inspect.getmembers(package) if tl.core.is_builtin(x)]
        for package in packages
    }
    search = interpreter._patch_builtin

    def patch(package, *options):
        if package not in names:
            search(package, *options)
        for name in names.get(package, ()):
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, *options)

    interpreter._patch_builtin = patch
