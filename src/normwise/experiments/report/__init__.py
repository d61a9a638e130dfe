"""One self-contained HTML page, or one picture, from the results of a study.

Needs the extra ``normwise[report]`` and says so when imported without it, so that a long study finds out before its work.
"""

from normwise.errors import need

need("report", "altair", "vl_convert", "jinja2", what="a report")

from normwise.experiments.report.page import write  # noqa: E402
from normwise.experiments.report.picture import picture  # noqa: E402

__all__ = ["picture", "write"]
