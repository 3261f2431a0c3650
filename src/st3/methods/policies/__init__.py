"""The trimming methods, one per file, found by name."""

from st3.methods.policies.base import Policy, available, parse, presets, register
from st3.methods.policies.cdpruner import CDPruner
from st3.methods.policies.dart import DART
from st3.methods.policies.divprune import DivPrune
from st3.methods.policies.dycoke import DyCoke
from st3.methods.policies.fastv import FastV
from st3.methods.policies.feather import FEATHER
from st3.methods.policies.key_norm import KeyNormPruning
from st3.methods.policies.no_trim import NoTrim
from st3.methods.policies.pyramid_drop import PyramidDrop
from st3.methods.policies.random import Random
from st3.methods.policies.sparsevlm import SparseVLM
from st3.methods.policies.st3 import ST3
from st3.methods.policies.uniform_grid import UniformGrid
from st3.methods.policies.v2drop import V2Drop
from st3.methods.policies.visionzip import VisionZip
from st3.methods.policies.vtw import VTW

__all__ = [
    "DART",
    "FEATHER",
    "ST3",
    "VTW",
    "CDPruner",
    "DivPrune",
    "DyCoke",
    "FastV",
    "KeyNormPruning",
    "NoTrim",
    "Policy",
    "PyramidDrop",
    "Random",
    "SparseVLM",
    "UniformGrid",
    "V2Drop",
    "VisionZip",
    "available",
    "parse",
    "presets",
    "register",
]
