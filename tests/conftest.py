"""Settings for all tests."""

import os
from importlib.util import find_spec

if find_spec("hypothesis"):  # a GPU machine may lack it
    from hypothesis import settings

    # no deadline: a first call may compile or import; in CI the same examples every time
    settings.register_profile("flashtile", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
    settings.load_profile("flashtile")
