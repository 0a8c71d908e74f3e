"""What the notebooks share: where their runs are kept, their recipe files, and small example data."""

from .example_data import write_box_data, write_example_data
from .start import start_notebook, write_recipe

__all__ = ["start_notebook", "write_box_data", "write_example_data", "write_recipe"]
