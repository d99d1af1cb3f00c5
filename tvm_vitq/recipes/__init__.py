"""Recipes: one published method per file, listed here in one line each."""

from __future__ import annotations

from tvm_vitq.errors import VitqError, nearest
from tvm_vitq.recipes.adalog import AdaLog
from tvm_vitq.recipes.adfq_vit import ADFQViT
from tvm_vitq.recipes.aphq_vit import APHQViT
from tvm_vitq.recipes.auto import Auto
from tvm_vitq.recipes.auto_fast import AutoFast
from tvm_vitq.recipes.base import Recipe
from tvm_vitq.recipes.dopq_vit import DopQViT
from tvm_vitq.recipes.erq import ERQ
from tvm_vitq.recipes.fima_q import FIMAQ
from tvm_vitq.recipes.fq_vit import FQViT
from tvm_vitq.recipes.glf_q import GLFQ
from tvm_vitq.recipes.igq_vit import IGQViT
from tvm_vitq.recipes.is_vit import ISViT
from tvm_vitq.recipes.minmax import MinMax
from tvm_vitq.recipes.mse import MeanSquaredError
from tvm_vitq.recipes.p2_vit import P2ViT
from tvm_vitq.recipes.peg import PerEmbeddingGroup
from tvm_vitq.recipes.percentile import Percentile
from tvm_vitq.recipes.ptq4vit import PTQ4ViT
from tvm_vitq.recipes.q_bert import QBert
from tvm_vitq.recipes.qdrop import QDrop
from tvm_vitq.recipes.repq_vit import RepQViT
from tvm_vitq.recipes.repquant import RepQuant
from tvm_vitq.recipes.vs_quant import VSQuant

ALL: tuple[type[Recipe], ...] = (
    MinMax,
    MeanSquaredError,
    Percentile,
    Auto,
    AutoFast,
    RepQViT,
    FQViT,
    PTQ4ViT,
    AdaLog,
    PerEmbeddingGroup,
    VSQuant,
    QBert,
    P2ViT,
    ERQ,
    QDrop,
    RepQuant,
    ISViT,
    DopQViT,
    ADFQViT,
    APHQViT,
    FIMAQ,
    GLFQ,
    IGQViT,
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
