"""Recipes: one published method per file, listed here in one line each."""

from __future__ import annotations

from tvm_vitq.errors import VitqError, nearest
from tvm_vitq.recipes.adalog import AdaLog
from tvm_vitq.recipes.auto import Auto
from tvm_vitq.recipes.base import Recipe
from tvm_vitq.recipes.fq_vit import FQViT
from tvm_vitq.recipes.minmax import MinMax
from tvm_vitq.recipes.mse import MeanSquaredError
from tvm_vitq.recipes.percentile import Percentile
from tvm_vitq.recipes.ptq4vit import PTQ4ViT
from tvm_vitq.recipes.repq_vit import RepQViT

ALL: tuple[type[Recipe], ...] = (
    MinMax,
    MeanSquaredError,
    Percentile,
    Auto,
    RepQViT,
    FQViT,
    PTQ4ViT,
    AdaLog,
)

RECIPES: dict[str, type[Recipe]] = {recipe.name: recipe for recipe in ALL}

DEFAULT = Percentile.name


def find_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by name with its default parameters, or the one given; VitqError with the nearest names
    otherwise.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise VitqError(
            "unknown recipe",
            where="recipe",
            got=recipe,
            expected=nearest(str(recipe), RECIPES) or ", ".join(RECIPES),
        )
    return RECIPES[recipe]()


__all__ = ["DEFAULT", "RECIPES", "Recipe", "find_recipe"]
