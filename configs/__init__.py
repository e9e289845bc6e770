"""The Hydra configuration groups, importable as `turbotrain_configs` so that an installed user has them too."""
