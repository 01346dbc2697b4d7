"""Recipes: one YAML file per run, read into frozen sections, wrong ones refused with every reason at once.

    recipe = load_recipe("recipes/quickstart.yaml", ["--rollout.temperature", "0.8", "--seed=3"])
    recipe.rollout.temperature, recipe.batch_plan(world_size=2), recipe.dump(folder / "recipe.yaml")

`python -m rl.config` prints the JSON schema, for editors that complete and check YAML.
"""

from rl.config.batch_plan import BatchPlan
from rl.config.loading import load_recipe
from rl.config.recipe import Recipe
from rl.config.sections import (
    CheckpointSection,
    DataSection,
    DataSource,
    EvalSection,
    GeneratedTokenizer,
    LoggingSection,
    ModelSection,
    RewardsSection,
    RolloutSection,
    TemplateSection,
)
from rl.config.training import GRPOSection, OptimizerSection, SFTSection

__all__ = [
    "BatchPlan",
    "CheckpointSection",
    "DataSection",
    "DataSource",
    "EvalSection",
    "GRPOSection",
    "GeneratedTokenizer",
    "LoggingSection",
    "ModelSection",
    "OptimizerSection",
    "Recipe",
    "RewardsSection",
    "RolloutSection",
    "SFTSection",
    "TemplateSection",
    "load_recipe",
]
