from .results import Prediction as Prediction
from .results import Row as Row
from .results import Run as Run
from .results import Transcript as Transcript
from .summary import Summary as Summary
from .write import print_table as print_table
from .write import write_report as write_report
