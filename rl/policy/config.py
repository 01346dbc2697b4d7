"""The shape of a DeepSeek-V2/V3 policy, in Hugging Face's field names.

In: a `config.json` dictionary (DeepSeek-V2, V2-Lite, V3, R1, Moonlight, Kimi-K2, or one written by transformers 5) or
the `model.from_config` section of a recipe. Out: a frozen, checked `PolicyConfig`. Both spellings of RoPE scaling are
read: `rope_theta` + `rope_scaling` (the hub's files) and `rope_parameters` (transformers 5).

A combination that the hub layout cannot express (softmax scores in a V3 file, say) is refused instead of saved wrongly.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Keys of hub files that say nothing about the computation, or are checked and then dropped.
_KNOWN_BUT_UNUSED = frozenset(
    [
        "architectures",
        "auto_map",
        "aux_loss_alpha",
        "attention_dropout",
        "dtype",
        "ep_size",
        "head_dim",
        "hidden_act",
        "mlp_bias",
        "num_key_value_heads",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "output_router_logits",
        "pretraining_tp",
        "qk_head_dim",
        "quantization_config",
        "rope_parameters",
        "seq_aux",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "_name_or_path",
    ]
)
_MODEL_TYPES = {"deepseek_v2": "deepseek_v2", "deepseek_v3": "deepseek_v3", "kimi_k2": "deepseek_v3"}
_ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "an integer"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a string"),
}
_FIXED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0, None),
    "mlp_bias": (False, None),
}
_DENSE: dict[str, int | float | None] = {
    "n_routed_experts": None,
    "num_experts_per_tok": None,
    "moe_intermediate_size": None,
    "n_shared_experts": 0,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN context extension (arXiv:2309.00071) with DeepSeek's two attention temperatures.

    The tables of cos and sin are multiplied by `attention_factor`, or if that is None by mscale(factor, mscale) /
    mscale(factor, mscale_all_dim); the softmax scale by mscale(factor, mscale_all_dim) ** 2.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Shape of a policy; every name is that of `config.json`. Raises ValueError naming the key, its value and what is
    allowed. `n_routed_experts=None` makes every layer dense; `q_lora_rank=None` leaves queries uncompressed."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    q_lora_rank: int | None = None
    attention_bias: bool = False

    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    n_shared_experts: int = 0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool | None = None  # None: True for deepseek_v3, False for deepseek_v2
    routed_scaling_factor: float = 1.0
    scoring_func: str | None = None  # None: "sigmoid" for deepseek_v3, "softmax" for deepseek_v2
    topk_method: str | None = None  # None: "noaux_tc" for deepseek_v3, "greedy" for deepseek_v2
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1

    rope_theta: float = 10000.0
    rope_interleave: bool = True
    rope_scaling: YarnScaling | None = None
    max_position_embeddings: int = 4096

    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    model_type: str = "deepseek_v3"
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.model_type not in _MODEL_TYPES:
            raise ValueError(_wrong("model_type", self.model_type, f"one of {sorted(_MODEL_TYPES)}"))
        object.__setattr__(self, "model_type", _MODEL_TYPES[self.model_type])
        v3 = self.model_type == "deepseek_v3"
        defaults = {
            "norm_topk_prob": v3,
            "scoring_func": "sigmoid" if v3 else "softmax",
            "topk_method": "noaux_tc" if v3 else "greedy",
        }
        for key, value in defaults.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        _check_dimensions(self)
        if self.moe_layers:
            _check_experts(self)
        else:  # one spelling for "all layers dense", whatever the expert keys say
            for key, neutral in _DENSE.items():
                object.__setattr__(self, key, neutral)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token and layer: kv_lora_rank + qk_rope_head_dim."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts; a route's layer axis counts these."""
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe_layer(i))

    def is_moe_layer(self, index: int) -> bool:
        if self.n_routed_experts is None:
            return False
        return index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, strict: bool = True) -> PolicyConfig:
        """From a `config.json` dictionary. strict: an unknown key is an error (recipes); hub files pass False, since
        they carry keys of other programs."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if strict:
            refuse_unknown(values, fields | _KNOWN_BUT_UNUSED)
        for key, allowed in _FIXED_VALUES.items():
            if key in values and values[key] not in allowed:
                raise ValueError(_wrong(key, values[key], f"{allowed[0]!r}, the only one that is implemented"))
        kv_heads = values.get("num_key_value_heads")
        if kv_heads not in (None, values.get("num_attention_heads")):
            raise ValueError(_wrong("num_key_value_heads", kv_heads, "equal to num_attention_heads (MLA) or absent"))
        known = {key: value for key, value in values.items() if key in fields}
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [key for key in required if known.get(key) is None]
        if missing:
            raise ValueError(f"policy config lacks {', '.join(missing)}")
        for key in ("n_group", "topk_group", "n_shared_experts", "moe_layer_freq", "rope_interleave"):
            if key in known and known[key] is None:
                del known[key]  # the hub writes null for "not used"
        known = {f.name: _read(f.name, str(f.type), known[f.name]) for f in dataclasses.fields(cls) if f.name in known}
        theta, scaling = _read_rope(values)
        known["rope_theta"], known["rope_scaling"] = theta, scaling
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` dictionary; transformers, vLLM and `from_dict` open it.

        transformers has no dense-only mode and no layer frequency: a policy without experts is written as
        `first_k_dense_replace = num_hidden_layers`; a `moe_layer_freq` above 1 only DeepSeek's own code reads.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            scaling = {k: v for k, v in dataclasses.asdict(self.rope_scaling).items() if v is not None}
            rope = {"rope_type": "yarn", **scaling}
            values["rope_scaling"] = {"type": "yarn", **rope}
        values["rope_parameters"] = {**rope, "rope_theta": self.rope_theta}
        if self.n_routed_experts is None:
            values["first_k_dense_replace"] = self.num_hidden_layers
            for key in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"):
                del values[key]
        values |= {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "num_key_value_heads": self.num_attention_heads,
            "num_nextn_predict_layers": 0,
        }
        return values


def _wrong(key: str, value: Any, allowed: str) -> str:
    return f"policy config: {key} = {value!r}; allowed: {allowed}"


def _read(key: str, kind: str, value: Any) -> Any:
    """The value of a field of type `kind`. A number in quotes is a number: YAML 1.1 reads 1e-6 as a string."""
    optional = kind.endswith(" | None")
    kind = kind.removesuffix(" | None")
    if (value is None and optional) or kind not in _KINDS:
        return value
    accepted, allowed = _KINDS[kind]
    wrong = ValueError(_wrong(key, value, allowed + (" or null" if optional else "")))
    if isinstance(value, bool) and kind != "bool":
        raise wrong
    if kind == "float" and isinstance(value, (int, float, str)):
        try:
            return float(value)
        except ValueError:
            raise wrong from None
    if not isinstance(value, accepted):
        raise wrong
    return value


def refuse_unknown(values: Mapping[str, Any], known: set[str] | frozenset[str]) -> None:
    """ValueError with the nearest name for a key of `values` that is not in `known`."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"policy config: unknown key {key!r} = {values[key]!r}{hint}")


def _check_dimensions(config: PolicyConfig) -> None:
    positive = [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "kv_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "v_head_dim",
        "intermediate_size",
        "moe_layer_freq",
        "max_position_embeddings",
    ]
    for key in positive:
        value = getattr(config, key)
        if value < 1:
            raise ValueError(_wrong(key, value, "an integer >= 1"))
    if config.q_lora_rank is not None and config.q_lora_rank < 1:
        raise ValueError(_wrong("q_lora_rank", config.q_lora_rank, "null or an integer >= 1"))
    if config.qk_rope_head_dim % 2:
        raise ValueError(_wrong("qk_rope_head_dim", config.qk_rope_head_dim, "an even integer"))
    if config.model_type == "deepseek_v2" and not config.rope_interleave:
        raise ValueError(_wrong("rope_interleave", False, "true for deepseek_v2, whose files know no other layout"))
    if config.model_type == "deepseek_v2" and config.hidden_size % config.num_attention_heads:
        allowed = (
            f"a multiple of num_attention_heads = {config.num_attention_heads} (transformers' rule for deepseek_v2)"
        )
        raise ValueError(_wrong("hidden_size", config.hidden_size, allowed))
    for key in ("rope_theta", "rms_norm_eps", "initializer_range", "routed_scaling_factor"):
        if not getattr(config, key) > 0:
            raise ValueError(_wrong(key, getattr(config, key), "a number > 0"))
    for key in ("first_k_dense_replace", "n_shared_experts"):
        if getattr(config, key) < 0:
            raise ValueError(_wrong(key, getattr(config, key), "an integer >= 0"))
    if config.rope_scaling is not None:
        _check_yarn(config.rope_scaling)


def _check_yarn(yarn: YarnScaling) -> None:
    allowed = {
        "factor": (yarn.factor >= 1, "a number >= 1"),
        "original_max_position_embeddings": (yarn.original_max_position_embeddings >= 1, "an integer >= 1"),
        "beta_slow": (yarn.beta_slow > 0, "a number > 0"),
        "beta_fast": (yarn.beta_fast >= yarn.beta_slow, f"a number >= beta_slow = {yarn.beta_slow:g}"),
    }
    for key, (fits, what) in allowed.items():
        if not fits:
            raise ValueError(_wrong(f"rope_scaling.{key}", getattr(yarn, key), what))


def _check_experts(config: PolicyConfig) -> None:
    experts, chosen, width = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
    assert experts is not None
    if experts < 1:
        raise ValueError(_wrong("n_routed_experts", experts, "null (dense) or an integer >= 1"))
    if width is None or width < 1:
        raise ValueError(_wrong("moe_intermediate_size", width, "an integer >= 1"))
    allowed = {
        "deepseek_v3": {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "norm_topk_prob": (True, False)},
        "deepseek_v2": {
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
            "norm_topk_prob": (False,),  # transformers ignores it in V2 files, DeepSeek's own code does not
        },
    }[config.model_type]
    for key, values in allowed.items():
        if getattr(config, key) not in values:
            raise ValueError(_wrong(key, getattr(config, key), f"one of {list(values)} for {config.model_type}"))
    groups, kept = config.n_group, config.topk_group
    if groups < 1 or experts % groups:
        raise ValueError(_wrong("n_group", groups, f"a divisor of n_routed_experts = {experts}"))
    if not 1 <= kept <= groups:
        raise ValueError(_wrong("topk_group", kept, f"1 to n_group = {groups}"))
    if config.topk_method == "noaux_tc" and groups > 1 and experts // groups < 2:
        raise ValueError(_wrong("n_group", groups, "two or more experts in each group (it scores by its top two)"))
    limited = config.topk_method in ("noaux_tc", "group_limited_greedy")
    reachable = experts // groups * kept if limited else experts
    if chosen is None or not 1 <= chosen <= reachable:
        raise ValueError(_wrong("num_experts_per_tok", chosen, f"1 to {reachable} (the experts of topk_group groups)"))


def _read_rope(values: Mapping[str, Any]) -> tuple[float, YarnScaling | None]:
    """theta and YaRN from either spelling; like transformers, a `rope_scaling` that is not null wins."""
    for key in ("rope_scaling", "rope_parameters"):
        if values.get(key) is not None and not isinstance(values[key], (Mapping, YarnScaling)):
            raise ValueError(_wrong(key, values[key], "null or a mapping"))
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    newer = values.get("rope_parameters") or {}
    if isinstance(given, YarnScaling):
        return _read("rope_theta", "float", values.get("rope_theta", 10000.0)), given
    theta = given.get("rope_theta", newer.get("rope_theta", values.get("rope_theta", 10000.0)))
    theta = _read("rope_theta", "float", theta)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ValueError(_wrong(f"{key}.type", kind, "'default' or 'yarn'"))
    known = {field.name for field in dataclasses.fields(YarnScaling)}
    refuse_unknown(given, known | {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
    fields = dataclasses.fields(YarnScaling)
    scaling = {
        f.name: _read(f"{key}.{f.name}", str(f.type), given[f.name]) for f in fields if given.get(f.name) is not None
    }
    scaling.setdefault("original_max_position_embeddings", values.get("max_position_embeddings", 4096))
    if "factor" not in scaling:
        raise ValueError(f"policy config: {key} of type 'yarn' lacks 'factor'")
    return theta, YarnScaling(**scaling)
