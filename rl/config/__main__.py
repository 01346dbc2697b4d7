"""`python -m rl.config > schema.json`: the JSON schema of a recipe, for editors that check and complete YAML."""

import json

from rl.config.recipe import Recipe

if __name__ == "__main__":
    print(json.dumps(Recipe.model_json_schema(), indent=2))
