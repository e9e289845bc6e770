"""The recipes, importable as `turbotrain_recipes` so that an installed user has them too."""
