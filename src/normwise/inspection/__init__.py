"""What a checkpoint's weights are like: norms, units, spectra, changes and bounds, read tensor by tensor."""

from normwise.inspection.inspector import Inspection, inspect

__all__ = ["Inspection", "inspect"]
