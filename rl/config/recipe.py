"""The recipe: all sections of a run, what they demand of each other, and the resolved copy saved with the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rl.config.batch_plan import BatchPlan, plan_batch
from rl.config.section import Contradiction, Natural, Section, Text
from rl.config.sections import (
    CheckpointSection,
    DataSection,
    EvalSection,
    LoggingSection,
    ModelSection,
    RewardsSection,
    RolloutSection,
)
from rl.config.training import GRPOSection, OptimizerSection, SFTSection
from rl.config.yaml_text import to_yaml


class Recipe(Section):
    """One run, complete: what a YAML file and the command line say, with every default filled in."""

    name: Text
    """Name of the run."""
    seed: Natural = 0
    """Everything random is derived from it."""
    output_dir: Text = "runs/{name}"
    """Folder of the run; {name} and {seed} are filled in."""
    model: ModelSection
    """Which policy."""
    data: DataSection
    """Which problems."""
    rollout: RolloutSection = RolloutSection()
    """How completions are sampled."""
    rewards: RewardsSection
    """How they are scored."""
    grpo: GRPOSection
    """The objective."""
    optimizer: OptimizerSection = OptimizerSection()
    """The step."""
    sft: SFTSection | None = None
    """The cold start; left out: none."""
    logging: LoggingSection = LoggingSection()
    """What is shown and recorded."""
    checkpoint: CheckpointSection = CheckpointSection()
    """What is kept."""
    eval: EvalSection = EvalSection()
    """How held-out problems are answered."""

    @property
    def run_folder(self) -> Path:
        """output_dir with its names filled in."""
        return Path(self.output_dir.replace("{name}", self.name).replace("{seed}", str(self.seed)))

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole GRPO run; schedules are laid over them."""
        return self.grpo.steps * self.grpo.mini_batches * self.grpo.num_iterations

    def batch_plan(self, world_size: int) -> BatchPlan:
        """The batch arithmetic on `world_size` processes. ValueError with every number that cannot be divided."""
        return plan_batch(self.rollout, self.data, self.grpo, self.optimizer, self.sft, world_size=world_size)

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, every key present."""
        return to_yaml(self.model_dump(mode="json"))

    def dump(self, path: str | Path) -> None:
        """Write the resolved recipe; `load_recipe(path)` gives an equal one."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def contradictions(self) -> Iterator[Contradiction]:
        rest = self.output_dir.replace("{name}", "").replace("{seed}", "")
        if "{" in rest or "}" in rest:
            yield Contradiction("output_dir", "may contain {name} and {seed}, no other braces")
        if "/" in self.name or self.name in (".", ".."):
            yield Contradiction("name", "names a folder: no slash, not . or ..")
        if self.data.eval is None:
            for key in type(self.eval).model_fields:
                if key != "metric" and self.eval.changed(key):  # which also names the accuracy of training
                    yield Contradiction(f"eval.{key}", "has no effect without data.eval (held-out problems)")
        longest = self.data.max_prompt_length + self.rollout.max_completion_length
        if self.optimizer.micro_batch_tokens < longest:
            yield Contradiction(
                "optimizer.micro_batch_tokens",
                f"must hold the longest row: data.max_prompt_length + rollout.max_completion_length = {longest}",
            )
        if self.optimizer.warmup_steps > self.optimizer_steps:
            yield Contradiction(
                "optimizer.warmup_steps",
                f"must be at most grpo.steps x mini_batches x num_iterations = {self.optimizer_steps}",
            )
        if self.rollout.engine == "hf" and self.grpo.routing_replay is True:
            yield Contradiction("grpo.routing_replay", "needs rollout.engine: in_process, which records the experts")
