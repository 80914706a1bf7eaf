from .initialise import start_from_data as start_from_data
from .prune import Pruner as Pruner
from .rank_choice import choose_ranks as choose_ranks
