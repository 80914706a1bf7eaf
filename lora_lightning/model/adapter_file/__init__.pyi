from .hub import push_adapter as push_adapter
from .load import load_adapter as load_adapter
from .save import read_header as read_header
from .save import save_adapter as save_adapter
