"""The trimming methods, one per file, found by name."""

from st3.policies.base import Policy, available, parse, presets, register
from st3.policies.fastv import FastV
from st3.policies.no_trim import NoTrim
from st3.policies.pyramid_drop import PyramidDrop
from st3.policies.random import Random
from st3.policies.st3 import ST3
from st3.policies.vtw import VTW

__all__ = [
    "ST3",
    "VTW",
    "FastV",
    "NoTrim",
    "Policy",
    "PyramidDrop",
    "Random",
    "available",
    "parse",
    "presets",
    "register",
]
