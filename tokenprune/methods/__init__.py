"""The methods by name. A method is one file; one that is not listed here is used by giving an instance to ``patch``."""

from tokenprune.methods.aim import AIM
from tokenprune.methods.base import Method
from tokenprune.methods.divprune import DivPrune
from tokenprune.methods.fastv import FastV
from tokenprune.methods.pyramiddrop import PyramidDrop
from tokenprune.methods.random import Random
from tokenprune.methods.spatten import SpAtten
from tokenprune.methods.tome import ToMe
from tokenprune.methods.uniform import Uniform

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (AIM, DivPrune, FastV, PyramidDrop, Random, SpAtten, ToMe, Uniform)
}

__all__ = ["AIM", "METHODS", "DivPrune", "FastV", "Method", "PyramidDrop", "Random", "SpAtten", "ToMe", "Uniform"]
