"""How releases store weights, and what the engine demands of their names and config. One row per output scheme."""

from stages.schemes import mxfp4, mxfp8
from stages.schemes.scheme import Scheme

SCHEMES: dict[str, Scheme] = {mxfp4.NAME: mxfp4, mxfp8.NAME: mxfp8}
