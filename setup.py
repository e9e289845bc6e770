"""Which folders become which packages; everything else about the project stands in pyproject.toml.

`configs/` and `recipes/` ship in the wheel under importable names, and `kernels/` is a source root (it must not become a
package called `kernels`, which other libraries probe for).
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["turbotrain", "turbotrain.*"]),
        *find_packages("kernels"),
        "turbotrain_configs",
        "turbotrain_recipes",
    ],
    package_dir={
        "turbokernels": "kernels/turbokernels",
        "turbotrain_configs": "configs",
        "turbotrain_recipes": "recipes",
    },
    package_data={
        "turbotrain_configs": ["**/*.yaml"],
        "turbotrain_recipes": ["*.yaml", "*.md", "assets/**/*"],
        "turbokernels": ["**/*.md", "**/*.json"],
    },
)
