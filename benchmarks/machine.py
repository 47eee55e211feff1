"""Describe the machine that a figure was measured on."""

from deepseek_triton.ensemble.processes.machine import describe as describe
