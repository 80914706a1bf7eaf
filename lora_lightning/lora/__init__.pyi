from .config import LoRAConfig as LoRAConfig
from .rank_rules import Spectrum as Spectrum
from .rank_rules import choose as choose
