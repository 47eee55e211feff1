"""Guided decoding: masks of the tokens that a guide (a JSON schema, a regex, a grammar or a choice) allows next.

Imports between the modules:

    errors ◄─ vocabulary ◄─ guide ◄─ compiler ─► grammar
                              ▲
                          background ─► budget

It uses llguidance, which needs no torch, compiles in about a millisecond and rejects what it can't enforce.
benchmarks/results/guided-libraries.md compares it with xgrammar.
"""

from deepseek_triton.ensemble.guided.background import BackgroundGuide, MaskThreads, wait_for_any
from deepseek_triton.ensemble.guided.compiler import GuideCompiler
from deepseek_triton.ensemble.guided.errors import GuideError
from deepseek_triton.ensemble.guided.guide import Guide, apply_mask
from deepseek_triton.ensemble.protocol.request_options import GUIDE_TYPES, GuideType

__all__ = [
    "GUIDE_TYPES",
    "BackgroundGuide",
    "Guide",
    "GuideCompiler",
    "GuideError",
    "GuideType",
    "MaskThreads",
    "apply_mask",
    "wait_for_any",
]
