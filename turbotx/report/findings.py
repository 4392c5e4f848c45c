"""Findings: measured numerics, times and resources, attached to a report.

In: numerics, a profile, resources of built kernels. Out: the same as plain dicts, empty if nothing
was measured::

    report.with_findings(numerics=report.numerics(model, x)).to_html()
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from turbotx.kernels.triton.resources import Resources
from turbotx.report.numerics import Error, Numerics
from turbotx.report.profile import Profile


@dataclass(frozen=True)
class Findings:
    """Measurements at the report's shape. resources: kernel -> target -> its resources there."""

    numerics: Numerics | None = None
    profile: Profile | None = None
    resources: Mapping[str, Mapping[str, Resources]] = field(default_factory=dict)

    def resources_as_dicts(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return registers, spills and so on by kernel and target, ready for JSON."""
        return {
            kernel: {target: asdict(r) for target, r in targets.items()}
            for kernel, targets in self.resources.items()
        }

    def numerics_as_dicts(self) -> dict[str, Any] | None:
        """Return the errors against float64, ready for JSON; None if not measured."""
        if self.numerics is None:
            return None
        return {
            "holds": self.numerics.holds,
            "launches": [_error(e) for e in self.numerics.launches],
            "outputs": [_error(e) for e in self.numerics.outputs],
        }

    def times_us(self) -> dict[str, float]:
        """Return the median time of every launch, by name."""
        timed = self.profile.launches if self.profile else ()
        return {t.launch.name: t.median_us for t in timed}


def _error(error: Error) -> dict[str, Any]:
    """Convert an error to a dict; NaN and infinity become None, as JSON has neither."""
    values = {**asdict(error), "relative": error.relative, "holds": error.holds}
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }
