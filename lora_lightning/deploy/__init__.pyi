from .exporting import Exported as Exported
from .exporting import export as export
