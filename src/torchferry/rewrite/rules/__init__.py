"""Rewriters of our own, one operator a file: what torch's exporter or an engine gets wrong or cannot take.

Importing this package registers all of them.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
