"""Makes ddb_fast importable from a bare checkout, where nothing was installed; import it first.

An installed ddb_fast is left alone. The C++ operators exist only where they were built.
"""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if find_spec("ddb_fast") is None:
    _folder = ROOT / "ddb_fast"
    _spec = spec_from_file_location(
        "ddb_fast", _folder / "__init__.py", submodule_search_locations=[str(_folder)]
    )
    sys.modules["ddb_fast"] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["ddb_fast"])
