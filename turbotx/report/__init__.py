"""Reports on what turbotx made of a model, for people and for programs.

In: a model and example inputs. Out: a `Report`::

    turbotx.explain(model, input_ids=ids).regions
"""

from turbotx.report.report import Report, explain

__all__ = ["Report", "explain"]
