"""The recipe: everything a run is made of, in one strict and typed YAML file.

`schema` declares the keys; `loading` reads a file, or a packaged recipe by its name, into a `Recipe`.
"""

from flamingo_ft.config.loading import dump_recipe, load_recipe
from flamingo_ft.config.schema import DataSource, Recipe

__all__ = ["DataSource", "Recipe", "dump_recipe", "load_recipe"]
