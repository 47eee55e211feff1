"""Structured output: which tokens a guide (a JSON schema, a regex, a grammar, a list of texts) allows next.

    errors ◄─ vocabulary ◄─ guide ◄─ compiler ─► grammar

The library behind it is llguidance; benchmarks/results/guided-libraries.md says why.
"""

from ensemble.guided.compiler import GuideCompiler
from ensemble.guided.errors import GuideError
from ensemble.guided.grammar import GUIDE_TYPES, GuideType
from ensemble.guided.guide import Guide, apply_mask, fill_masks

__all__ = ["GUIDE_TYPES", "Guide", "GuideCompiler", "GuideError", "GuideType", "apply_mask", "fill_masks"]
