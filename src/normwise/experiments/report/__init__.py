"""One self-contained HTML page, or one picture, from the results of a study.

Needs the extra ``normwise[report]`` and says so when imported without it, so that a long study finds out before its work;
the packages themselves are imported when a page is written.
"""

from normwise.errors import need
from normwise.experiments.report.page import write
from normwise.experiments.report.picture import picture

__all__ = ["picture", "write"]

need("report", "altair", "vl_convert", "jinja2", what="a report")
