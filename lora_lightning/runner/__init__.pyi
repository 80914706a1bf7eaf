from .loading import apply_overrides as apply_overrides
from .loading import find_recipe as find_recipe
from .loading import list_recipes as list_recipes
from .loading import load_recipe as load_recipe
from .loading import run_recipe as run_recipe
from .loading import sweep_recipe as sweep_recipe
