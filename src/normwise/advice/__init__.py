"""Where to start with a model: rules and an optimizer, each with a reason, a source and a price."""

from normwise.advice.advisor import advise
from normwise.advice.answer import Advice, Call, Line, Recipe
from normwise.advice.goals import GOALS
from normwise.advice.probe import Probe

__all__ = ["GOALS", "Advice", "Call", "Line", "Probe", "Recipe", "advise"]
