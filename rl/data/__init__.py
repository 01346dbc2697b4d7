"""From dataset rows to problems with tokens, and in which order they are trained on.

    tokenizer = load_tokenizer(recipe.model)
    train, held_out = load_train_and_eval(recipe.data, tokenizer, seed=recipe.seed)
    order = ProblemOrder(len(train), recipe.seed, recipe.rollout.prompts_per_step)
    problems = [train[i] for i in order.indices(step)]
"""

from rl.data.fingerprint import fingerprint
from rl.data.order import ProblemOrder
from rl.data.problems import ProblemSet, load_problems, load_train_and_eval, refuse_overlap
from rl.data.sft_rows import SFTRow, SFTRows, load_sft_rows
from rl.data.template import PromptTemplate, sampling_stops
from rl.data.tokenizer import build_tokenizer, load_tokenizer

__all__ = [
    "ProblemOrder",
    "ProblemSet",
    "PromptTemplate",
    "SFTRow",
    "SFTRows",
    "build_tokenizer",
    "fingerprint",
    "load_problems",
    "load_sft_rows",
    "load_tokenizer",
    "load_train_and_eval",
    "refuse_overlap",
    "sampling_stops",
]
