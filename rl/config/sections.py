"""The sections that say what is trained, on what, sampled and scored how, and what is kept and shown.

(What moves the weights, `grpo`, `optimizer` and `sft`, is in rl.config.training.) Names that mean what they mean in TRL
are TRL's. Paths are relative to the folder in which the command is started.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from rl.config.section import Contradiction, Flag, Natural, Number, Positive, Section, Text

Scalar = str | int | float | bool | None


# What a value that is either is called in pydantic's errors, where it is no key.
TEXT, MAPPING = "<text>", "<mapping>"


def _text_or_mapping(value: Any) -> str:
    return TEXT if isinstance(value, str) else MAPPING


class GeneratedTokenizer(Section):
    """A tokenizer made here instead of downloaded: one token per listed character, or one per byte."""

    type: Literal["characters", "bytes"]
    """characters: the symbols of `alphabet`; bytes: any text, 256 tokens."""
    alphabet: Text | None = None
    """Every character that a text may contain, each once (type: characters)."""
    special_tokens: tuple[Text, ...] = ("<think>", "</think>", "<answer>", "</answer>")
    """Strings that become one token each, beside <pad>, <eos> and <unk>; they are kept in decoded text."""

    def contradictions(self) -> Iterator[Contradiction]:
        if self.type == "characters" and self.alphabet is None:
            yield Contradiction("alphabet", "is missing; type: characters needs the characters to know")
        if self.type == "bytes" and self.alphabet is not None:
            yield Contradiction("alphabet", "has no effect with type: bytes, which knows every character; remove it")
        repeated = sorted({c for c in self.alphabet or "" if (self.alphabet or "").count(c) > 1})
        if repeated:
            yield Contradiction("alphabet", f"names {', '.join(map(repr, repeated))} more than once; allowed once each")
        reserved = {"<pad>", "<eos>", "<unk>", *(self.alphabet or "")}
        for i, token in enumerate(self.special_tokens):
            if token in reserved or token in self.special_tokens[:i]:
                yield Contradiction("special_tokens", f"{token!r} is named twice, or is one of <pad>, <eos>, <unk>")


class ModelSection(Section):
    """Which policy is trained."""

    name_or_path: Text | None = None
    """Folder or hub id of a checkpoint to start from."""
    from_config: (
        Annotated[
            Annotated[Text, Tag(TEXT)] | Annotated[dict[str, Any], Tag(MAPPING)],
            Discriminator(_text_or_mapping),
        ]
        | None
    ) = None
    """Random weights: the keys of a Hugging Face config.json of the DeepSeek family, or the path of such a file.
    A vocab_size that is left out is the size of the tokenizer."""
    tokenizer: (
        Annotated[
            Annotated[Text, Tag(TEXT)] | Annotated[GeneratedTokenizer, Tag(MAPPING)],
            Discriminator(_text_or_mapping),
        ]
        | None
    ) = None
    """Folder or hub id, or a tokenizer made here; left out: the one beside the checkpoint."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of weights and activations (the router stays float32)."""
    gradient_checkpointing: Flag = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    trust_remote_code: Flag = False
    """Run the tokenizer's Python code that lies beside the checkpoint; only if you trust its authors. Code of a model
    is never run."""
    router_bias_update_rate: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Step by which the experts' selection bias follows their load, after every optimizer step of the cold start and
    every step of GRPO (DeepSeek-V3: 0.001); 0 keeps it frozen."""

    def contradictions(self) -> Iterator[Contradiction]:
        if (self.name_or_path is None) == (self.from_config is None):
            both = "both are given" if self.name_or_path is not None else "neither is given"
            yield Contradiction("name_or_path", f"exactly one of name_or_path and from_config is needed; {both}")
        if self.from_config is not None and self.tokenizer is None:
            yield Contradiction(
                "tokenizer", "is missing; from_config brings none: name a folder, a hub id, or {type: ...}"
            )
        if self.from_config == {}:
            yield Contradiction("from_config", "is empty; allowed: the keys of a config.json, or its path")
        if self.trust_remote_code and self.name_or_path is None and not isinstance(self.tokenizer, str):
            yield Contradiction("trust_remote_code", "has no effect without a checkpoint; remove it")


class DataSource(Section):
    """Where rows come from, and which of their columns mean what."""

    source: Text
    """Hub id; path of a .jsonl, .json, .csv or .parquet file; or `package.module:function` / `file.py:function`,
    a Python function that yields rows (dicts)."""
    config: Text | None = None
    """Name of the configuration of a hub data set ("main" for openai/gsm8k)."""
    split: Text | None = None
    """Split of a hub data set; left out: "train"."""
    params: dict[str, Any] = Field(default={})
    """Arguments of the Python function. If it takes `seed` and none is given here, it gets one that is derived from the
    recipe's."""
    limit: Positive | None = None
    """Use only the first rows."""
    columns: dict[Text, Text] = Field(default={})
    """New name: column of the data set. `prompt` is needed (and `completion` for sft); `answer` is the reference
    answer; `id` names the row. All other columns reach the reward functions under their own names."""
    extract: dict[Text, Text] = Field(default={})
    """Column (new name): regular expression; the column becomes what the first group finds in it (GSM8K's answer:
    '#### (.+)')."""

    @property
    def kind(self) -> Literal["function", "jsonl", "json", "csv", "parquet", "hub"]:
        """How `source` is read, told from its form."""
        if re.fullmatch(r"(.+\.py|[\w.]+):[A-Za-z_]\w*", self.source):
            return "function"
        suffix = self.source.rsplit(".", 1)[-1].lower()
        return suffix if suffix in ("jsonl", "json", "csv", "parquet") else "hub"  # type: ignore[return-value]

    def contradictions(self) -> Iterator[Contradiction]:
        if self.params and self.kind != "function":
            yield Contradiction("params", f"only a Python function takes parameters; {self.source!r} is none")
        for key in ("config", "split"):
            if getattr(self, key) is not None and self.kind != "hub":
                yield Contradiction(
                    key, f"only a hub data set has it; {self.source!r} is read as {self.kind}; remove it"
                )
        for column, pattern in self.extract.items():
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                yield Contradiction("extract", f"{column}: {pattern!r} is no regular expression: {error}")
                continue
            if groups < 1:
                yield Contradiction("extract", f"{column}: {pattern!r} has no group; put what to keep in (...)")


class TemplateSection(Section):
    """How a question becomes the text that the policy continues."""

    kind: Literal["r1_zero", "chat", "raw"] = "r1_zero"
    """r1_zero: plain text for base models that asks for <think> and <answer>; chat: the tokenizer's own chat template;
    raw: the prompt column as it is."""
    text: Text | None = None
    """Wording around the question, which stands at {prompt}. r1_zero: instead of ours; chat: the user's message."""
    system: Text | None = None
    """System message (chat)."""
    chat_template_kwargs: dict[str, Scalar] = Field(default={})
    """Further arguments of the chat template, for example enable_thinking: true (chat)."""

    def contradictions(self) -> Iterator[Contradiction]:
        if self.kind == "raw" and self.text is not None:
            yield Contradiction("text", "has no effect with kind: raw; allowed with r1_zero and chat")
        if self.text is not None and self.text.count("{prompt}") != 1:
            yield Contradiction("text", "must contain {prompt} exactly once")
        for key in ("system", "chat_template_kwargs"):
            if self.kind != "chat" and self.changed(key):
                yield Contradiction(key, f"has no effect with kind: {self.kind}; allowed with chat")


class DataSection(Section):
    """Problems to train on, problems held out, and how they are worded."""

    train: DataSource
    """Rows to train on."""
    eval: DataSource | None = None
    """Held-out rows; left out: no evaluation."""
    template: TemplateSection = TemplateSection()
    """From question to prompt."""
    max_prompt_length: Positive = 512
    """Tokens a prompt may have."""
    overlong_prompts: Literal["drop", "refuse"] = "drop"
    """Longer prompts: drop and count them, or refuse to start."""
    missing_answers: Literal["refuse", "allow"] = "refuse"
    """Rows without an `answer` where other rows have one: refuse to start, or give reward functions None for them (for
    mixtures in which not every row is scored against a reference)."""
    eval_overlap: Literal["refuse", "warn"] = "refuse"
    """When a held-out prompt also occurs in train (compared without case and white space): refuse to start, or warn."""
    shuffle: Flag = True
    """A new order every epoch (seeded); false: the order of the rows."""

    def contradictions(self) -> Iterator[Contradiction]:
        if self.eval is None and self.changed("eval_overlap"):
            yield Contradiction("eval_overlap", "has no effect without data.eval; remove it")


class RolloutSection(Section):
    """How completions are sampled."""

    prompts_per_step: Positive = 16
    """Problems in one step, over all processes."""
    num_generations: Annotated[Positive, Field(ge=2)] = 8
    """Completions per problem (G); a group of one has nothing to be compared with."""
    max_completion_length: Positive = 256
    """Tokens after which a completion is cut off."""
    temperature: Annotated[Number, Field(gt=0)] = 1.0
    """Sampling temperature; training uses the same distribution."""
    stop_strings: tuple[Text, ...] | None = None
    """Texts that end a completion, beside the end tokens of the model; left out: those of the template."""
    engine: Literal["in_process", "hf"] = "in_process"
    """in_process: our engine over the latent cache; hf: transformers' generate, for other architectures."""
    max_batch_size: Positive | None = None
    """Rows sampled at once on a process; left out: what fits into cache_bytes, or all."""
    cache_bytes: Positive | None = None
    """Memory for the latent cache on a process (in_process)."""
    batch_invariant: bool = False
    """Completions and log-probabilities equal bit for bit, whatever else is sampled with them (in_process; slower).
    A GPU then takes steps of max_batch_size rows, or 256 where that is left out; another number may give other bits."""

    def contradictions(self) -> Iterator[Contradiction]:
        if self.engine == "hf" and self.cache_bytes is not None:
            yield Contradiction("cache_bytes", "has no effect with engine: hf; use max_batch_size")
        if self.engine == "hf" and self.batch_invariant:
            yield Contradiction("batch_invariant", "has no effect with engine: hf; only in_process can promise it")


class RewardsSection(Section):
    """How completions are scored."""

    reward_funcs: tuple[
        Annotated[
            Annotated[Text, Tag(TEXT)] | Annotated[dict[str, Any], Tag(MAPPING)], Discriminator(_text_or_mapping)
        ],
        ...,
    ]
    """Names of reward functions: a built-in, `package.module:function` or `file.py:function`; or a mapping with `func`
    and settings (weight, params, when, ...; see rewards/reward_entry.py)."""
    reward_weights: tuple[Number, ...] | None = None
    """One weight per function; left out: 1 each."""
    on_error: Literal["stop", "mask"] = "stop"
    """A reward function that raises: stop the run, or leave its scores out and count them."""
    task_column: Text | None = None
    """Column that names the task of a row, for functions restricted to tasks."""

    def contradictions(self) -> Iterator[Contradiction]:
        if not self.reward_funcs:
            yield Contradiction("reward_funcs", "is empty; name at least one reward function")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            yield Contradiction(
                "reward_weights",
                f"has {len(self.reward_weights)} entries for {len(self.reward_funcs)} reward_funcs; one each is needed",
            )
        if self.reward_weights is not None and not any(self.reward_weights):
            yield Contradiction("reward_weights", "are all 0; at least one must differ")


class LoggingSection(Section):
    """What is shown and recorded (metrics.jsonl in the run folder gets every GRPO step, whatever is shown)."""

    report_to: tuple[Literal["wandb"], ...] = ()
    """Trackers beside our own files."""
    project: Text = "aha"
    """Project in the tracker."""
    run_name: Text | None = None
    """Name in the tracker; left out: the recipe's name."""
    logging_steps: Positive = 1
    """Steps between lines on the screen, records in the tracker and logged completions."""
    log_completions: Flag = True
    """Write completions with their scores to the run folder and the tracker."""
    print_samples_every: Natural = 10
    """Steps between sample completions on the screen; 0: never."""

    def contradictions(self) -> Iterator[Contradiction]:
        for key in ("project", "run_name"):
            if not self.report_to and self.changed(key):
                yield Contradiction(key, "has no effect while report_to is empty")


class CheckpointSection(Section):
    """What is kept, and how often."""

    save_steps: Natural = 50
    """Steps between checkpoints to resume from; 0: only one, at the end."""
    save_total_limit: Positive | None = 2
    """Checkpoints to keep, the oldest go first; null: all."""
    save_final_policy: Flag = True
    """Write the trained policy in the hub's layout at the end."""


class EvalSection(Section):
    """How held-out problems are answered."""

    eval_steps: Natural = 0
    """Steps between evaluations; 0: only after the last step (and before the first, see eval_on_start)."""
    eval_on_start: Flag = False
    """Also evaluate before the first step."""
    num_problems: Positive | None = None
    """Use only the first held-out problems; left out: all."""
    greedy: Flag = True
    """Answer each problem once with the likeliest token at each position."""
    num_samples: Natural = 0
    """Sampled completions per problem (k of pass@k and maj@k); 0: none."""
    temperature: Annotated[Number, Field(gt=0)] = 1.0
    """Temperature of the samples."""
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with this probability; 1: off."""
    top_k: Natural = 0
    """Sample from the k likeliest tokens; 0: off."""
    min_p: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Sample from the tokens that have at least this share of the likeliest one's probability; 0: off."""
    metric: Text | None = None
    """Reward function whose score of 1 means that an answer is right, in training and held out; left out: accuracy,
    exact_match, multiple_choice, countdown or code, for each row the first that scores it; without any of them there is
    no accuracy."""
    max_completion_length: Positive | None = None
    """Tokens of an answer; left out: rollout.max_completion_length."""

    def contradictions(self) -> Iterator[Contradiction]:
        if not self.greedy and self.num_samples == 0:
            yield Contradiction("num_samples", "is 0 and greedy is false: nothing would be evaluated; set one of them")
        for key in ("temperature", "top_p", "top_k", "min_p"):
            if self.num_samples == 0 and self.changed(key):
                yield Contradiction(key, "has no effect while num_samples is 0")
