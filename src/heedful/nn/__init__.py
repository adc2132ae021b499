"""Attention for models that people build themselves: a module that takes any method of heedful.

from heedful.methods import SigmoidAttention
from heedful.nn import Attention, FeatureMap, convert
"""

from heedful.nn.attention import Attention
from heedful.nn.converting import convert
from heedful.nn.feature_map import FeatureMap

__all__ = ["Attention", "FeatureMap", "convert"]
