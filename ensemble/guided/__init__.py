"""Structured output: which tokens a guide (a JSON schema, a regex, a grammar, a list of texts) allows next.

    errors ◄─ vocabulary ◄─ guide ◄─ compiler ─► grammar

The library behind it is llguidance: it needs no torch, compiles in a millisecond, and refuses what it can't enforce;
xgrammar was measured beside it (benchmarks/results/guided-libraries.md).
"""

from deepseek_triton.ensemble.guided.compiler import GuideCompiler
from deepseek_triton.ensemble.guided.errors import GuideError
from deepseek_triton.ensemble.guided.guide import Guide, apply_mask, fill_masks
from deepseek_triton.ensemble.protocol.request_options import GUIDE_TYPES, GuideType

__all__ = ["GUIDE_TYPES", "Guide", "GuideCompiler", "GuideError", "GuideType", "apply_mask", "fill_masks"]
