"""What the source of a module's forward pass says, read and never run: how it applies a bare parameter, and which layers give its outputs.

A class without readable source (compiled, typed into a prompt, traced) says nothing, and neither does a line that is not understood.
"""

from normwise.parameters.forward_source.flow import Flow, outputs
from normwise.parameters.forward_source.multiplications import asked_of_others, multiplies
from normwise.parameters.forward_source.passage import called, handed_on, passed_through
from normwise.parameters.forward_source.products import contractions, uses
from normwise.parameters.forward_source.splits import Split, number, splits
from normwise.parameters.forward_source.sums import adds_to_stream
from normwise.parameters.forward_source.trees import functions, name_of

__all__ = [
    "Flow", "Split", "adds_to_stream", "asked_of_others", "called", "contractions", "functions", "handed_on", "multiplies", "name_of",
    "number", "outputs", "passed_through", "splits", "uses",
]  # fmt: skip
