"""ExecuTorch's portable kernels without a backend, for any processor and for checking the others."""

from __future__ import annotations

from . import Recipe

RECIPE = Recipe("portable", list, formats=("f32",))
