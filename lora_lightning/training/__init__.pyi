from .cross_fitting import cross_fit as cross_fit
from .fit_guard import FitGuard as FitGuard
from .gain_test import Choice as Choice
from .gain_test import Look as Look
from .gain_test import choose as choose
from .gain_test import diagnose as diagnose
from .lora_callback import LoRACallback as LoRACallback
from .prefix_cache.callback import PrefixCache as PrefixCache
