"""Console output, model cards, tables and reports.

The package is also the function `graftkit.report(RUN, ...)`, as both have the same name: calling it makes a report.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, *runs: Any, **options: Any) -> dict[str, Any]:
        from graftkit.report.making import report

        return report(*runs, **options)


sys.modules[__name__].__class__ = _Package
