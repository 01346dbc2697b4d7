"""GRPO: one step is one straight line, sample -> score -> advantages -> update -> report.

    problems = order(step)                                   which problems, a pure function of the step
    experience = collect(problems)                           rl.rollout samples, rewards score, rl.grpo compares
    result = update.run(experience)                          rl.train.update: the loss; rl.train.learner: the optimizer
    step metrics

Every stage is timed; nothing here branches on an algorithm variant.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rewards.base import TrainerState
from rewards.scorer import RewardScorer
from rl.config import Recipe
from rl.data import ProblemOrder, fingerprint
from rl.distributed import is_main_process
from rl.policy.model import moe_leaf_classes
from rl.train.balance import update_router_biases
from rl.train.evaluate import Evaluation, Evaluator, rightness_functions
from rl.train.experience import Experience, collect
from rl.train.keeping import Keeper, check_finite, save_final_policy
from rl.train.learner import Learner
from rl.train.metrics import MetricsLogger, Progress
from rl.train.report import closing_text, write_run_report
from rl.train.run_folder import check_same_data
from rl.train.session import (
    POLICY_FOLDER,
    Session,
    load_data,
    make_policy,
    make_scorer,
    open_session,
    starting_point,
)
from rl.train.step_metrics import stage_seconds, step_metrics
from rl.train.update import GRPOUpdate


@dataclass(slots=True)
class StageClock:
    """Seconds of each named stage of a step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began


class GRPOTrainer:
    """Trains the policy of a recipe with GRPO; the same object on every rank. resume: from the newest checkpoint of the
    run folder.

    Construction checks and loads everything; ValueError is about the recipe, its data or the run folder."""

    def __init__(self, recipe: Recipe, *, resume: bool = False) -> None:
        scorer = make_scorer(recipe)
        self.rightness = rightness_functions(scorer.entries, recipe.eval.metric)
        start_from = starting_point(recipe, recipe.run_folder)
        session = open_session(recipe, stage="grpo", resume=resume, start_from=start_from)
        if not self.rightness and is_main_process():
            print("[aha] no reward function says whether an answer is right: no accuracy (eval.metric can name one)")
        train, held_out = load_data(recipe, session.tokenizer, scorer)
        self.train_set, data = train, fingerprint(train)
        check_same_data(session.found, data, key="data.train")
        self._assemble(recipe, session, scorer, start_from, data=data)
        self.dropped = {"overlong_train_prompts": train.overlong}
        rollout = recipe.rollout
        self.order = ProblemOrder(len(train), recipe.seed, rollout.prompts_per_step, shuffle=recipe.data.shuffle)
        self.evaluator = None
        if held_out is not None:
            self.dropped["overlong_eval_prompts"] = held_out.overlong
            problems = [held_out[i] for i in range(min(len(held_out), recipe.eval.num_problems or len(held_out)))]
            self.evaluator = Evaluator(
                recipe.eval,
                problems,
                rightness=self.rightness,
                engine=self.engine,
                scorer=scorer,
                decode=session.decode,
                params=self.params,
                seed=recipe.seed,
            )
        self.start_step = self.keeper.restore(session.found)
        self.evaluations: dict[str, dict[str, float] | None] = {
            "first_evaluation": None,
            "last_evaluation": None,
            **self.keeper.extra,
        }

    def _assemble(
        self, recipe: Recipe, session: Session, scorer: RewardScorer, start_from: Path | None, *, data: str
    ) -> None:
        self.recipe, self.session, self.scorer = recipe, session, scorer
        policy = make_policy(
            recipe.model, session.tokenizer, seed=recipe.seed, device=session.accelerator.device, start_from=start_from
        )
        self.learner = Learner(
            policy,
            recipe.optimizer,
            accelerator=session.accelerator,
            total_steps=recipe.optimizer_steps,
            with_reference=recipe.grpo.beta > 0,
            zero3_leaf_classes=moe_leaf_classes(policy),
        )
        self.params = session.sampling_params()
        self.engine = session.make_engine(policy)
        self.update = GRPOUpdate(
            self.learner,
            recipe.grpo,
            micro_batch_tokens=recipe.optimizer.micro_batch_tokens,
            temperature=recipe.rollout.temperature,
            max_completion_length=recipe.rollout.max_completion_length,
        )
        self.keeper = Keeper(session.folder, self.learner, keep=recipe.checkpoint.save_total_limit, data=data)

    def train(self) -> None:
        """All steps of the recipe that are left. An evaluation comes after the checkpoint of its step, so that one that
        fails costs nothing; a run resumed from that checkpoint makes it again."""
        recipe, steps = self.recipe, self.recipe.grpo.steps
        began = time.monotonic() - self.keeper.elapsed_s
        with MetricsLogger(self.session.folder, recipe, stage="grpo", resume_step=self.start_step) as log:
            self._evaluate_if_due(self.start_step, log)
            progress = Progress("GRPO", total=steps, initial=self.start_step, disable=not is_main_process())
            for done in range(self.start_step + 1, steps + 1):
                metrics, experience = self.step(done - 1)
                self._report(done, metrics, experience, log, progress)
                self.keeper.save_if_due(
                    done,
                    recipe.checkpoint.save_steps,
                    total=steps,
                    elapsed_s=time.monotonic() - began,
                    extra=self.evaluations,
                )
                self._evaluate_if_due(done, log)
            progress.close()
            self._finish(log, began=began)

    def _finish(self, log: MetricsLogger, *, began: float) -> None:
        """Write what is left to look at: the policy, the last evaluation, the summary and the curves."""
        folder = self.session.folder
        if self.recipe.checkpoint.save_final_policy:
            save_final_policy(self.learner, folder / POLICY_FOLDER, self.session.tokenizer)
        self._evaluate(self.recipe.grpo.steps, log)
        if is_main_process():
            summary = write_run_report(
                folder,
                self.recipe,
                first=self.evaluations["first_evaluation"],
                last=self.evaluations["last_evaluation"],
                train_seconds=time.monotonic() - began,
                dropped=self.dropped,
            )
            print(closing_text(summary, folder), flush=True)
        self.scorer.close()

    def step(self, step: int) -> tuple[dict[str, float], Experience]:
        """GRPO step number `step` (0-based): its metrics (the same on every rank) and what was sampled."""
        recipe, clock, began = self.recipe, StageClock(), time.monotonic()
        self.scorer.trainer_state = TrainerState(step, recipe.grpo.steps)
        problems = [self.train_set[i] for i in self.order.indices(step)]
        with self.learner.gathered():
            experience = collect(
                problems,
                engine=self.engine,
                params=self.params,
                num_generations=recipe.rollout.num_generations,
                seed=recipe.seed,
                step=step,
                scorer=self.scorer,
                decode=self.session.decode,
                scale_rewards=recipe.grpo.scale_rewards,
                clock=clock,
            )
        with clock("update"):
            result = self.update.run(
                experience,
                step=step,
                replay_routes=experience.routes_recorded and recipe.grpo.routing_replay is not False,
                after_each=partial(check_finite, step=step + 1, on_nonfinite=recipe.optimizer.on_nonfinite),
            )
        if recipe.model.router_bias_update_rate:
            assert result.expert_load is not None
            update_router_biases(self.learner.policy, result.expert_load, rate=recipe.model.router_bias_update_rate)
        if recipe.grpo.ref_update_steps and (step + 1) % recipe.grpo.ref_update_steps == 0:
            assert self.learner.reference is not None
            self.learner.reference.refresh()
        epoch = self.order.epoch(step + 1)
        seconds = stage_seconds(clock.seconds, time.monotonic() - began)
        metrics = step_metrics(experience, result, seconds, epoch=epoch, rightness=self.rightness)
        if step == 0:
            metrics |= {f"data/{name}": float(count) for name, count in self.dropped.items()}
        return metrics, experience

    def _report(
        self, done: int, metrics: dict[str, float], experience: Experience, log: MetricsLogger, progress: Progress
    ) -> None:
        logging = self.recipe.logging
        shown = done % logging.logging_steps == 0 or done == self.recipe.grpo.steps
        log.log(done, metrics, shown=shown)
        if shown and logging.log_completions:
            log.log_completions(done, experience.table())
        progress.update(
            reward=metrics["reward"],
            accuracy=metrics.get("accuracy"),
            length=metrics["completions/mean_length"],
            tokens_per_s=metrics["rollout/tokens_per_s"],
        )
        if logging.print_samples_every and done % logging.print_samples_every == 0:
            progress.write(experience.sample_text(done))

    def _evaluate_if_due(self, done: int, log: MetricsLogger) -> None:
        """After `done` steps, as the recipe says; the evaluation after the last step is `_finish`'s."""
        section = self.recipe.eval
        due = section.eval_steps and done % section.eval_steps == 0 if done else section.eval_on_start
        if due and done < self.recipe.grpo.steps:
            self._evaluate(done, log)

    def _evaluate(self, done: int, log: MetricsLogger) -> None:
        if self.evaluator is None:
            return
        began = time.monotonic()
        self.scorer.trainer_state = TrainerState(done, self.recipe.grpo.steps)
        with self.learner.gathered():
            evaluation: Evaluation = self.evaluator.run()
        if done == self.start_step:
            log.forget_evaluation(done)
        log.log_evaluation(done, {**evaluation.metrics, "time/eval_s": time.monotonic() - began}, evaluation.table())
        self.evaluations["last_evaluation" if done else "first_evaluation"] = evaluation.metrics
