"""The critical step of a trajectory, by Monte Carlo advantage (arXiv 2509.16456, section 4).

V(s_i) is the mean outcome reward of continuations sampled from the state before step i; V(s_H) is the
trajectory's own reward; the advantage of step i is V(s_{i+1}) - V(s_i), so H steps need H values, never 2H.

`finder` is the public face; `search` (uniform), `racing` (and uniform's posterior) and `bisect` decide where to
sample; `value_model` is the posterior; `rounds` runs searches on an engine; `proposals` order them; `step` is the
result.
"""

from gpo_fast.critical.finder import CriticalStepFinder, OutcomeReward
from gpo_fast.critical.step import Criterion, CriticalStep, Estimator, Reset, Reuse

__all__ = ["Criterion", "CriticalStep", "CriticalStepFinder", "Estimator", "OutcomeReward", "Reset", "Reuse"]
