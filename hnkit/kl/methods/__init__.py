"""The methods of `noise_kl`, one module each; every module of this folder is one, found without a list."""

from __future__ import annotations

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
