"""Rollout speed of the in-process engine, beside transformers' `generate` or vLLM for the same work in the same call.

    python scripts/bench_rollout.py --shape quickstart --batch 128 --group 8 --prompt 16 --new 128 --peer hf --check
    python scripts/bench_rollout.py --shape moonlight --batch 256 --prompt 256 --new 512 --dtype bfloat16 --device cuda

Prints one JSON line per measurement. Tokens per second are end to end: prefill, decode, sampling with
log-probabilities, and returning completions. The bandwidth limit is the time to read, once per step, the weights that
the step needs and the cache rows that it attends to (a group's prompt once), at the copy bandwidth measured on the
same device. Engine and peer take turns (`--repeats`), so that both see the same machine; the median is reported,
warm-up apart. Weights are random, N(0, initializer_range) for matrices. `--skew`: half of the rows end in the first
quarter of `--new` (lengths drawn beforehand).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rl.policy.config import PolicyConfig
from rl.policy.model import Policy, init_policy
from rl.rollout.engine import Engine
from rl.rollout.kernels.step_table import Kernel, step_table
from rl.types import Problem, RolloutGroup, RolloutRequest, SamplingParams

QUICKSTART = {
    "vocab_size": 48, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "q_lora_rank": 64,
    "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 16, "v_head_dim": 48, "intermediate_size": 256,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "rope_theta": 100.0, "initializer_range": 0.06,
}  # fmt: skip
SMALL = {
    "vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "intermediate_size": 2816,
    "n_routed_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 640, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "quickstart": QUICKSTART,
    "0.69b": SMALL | {
        "qk_nope_head_dim": 64, "v_head_dim": 64, "kv_lora_rank": 256, "n_routed_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 512,
    },
    "1.6b": SMALL,
    "moonlight": SMALL | {
        "vocab_size": 163840, "hidden_size": 2048, "num_hidden_layers": 27, "intermediate_size": 11264,
        "moe_intermediate_size": 1408, "n_shared_experts": 2, "routed_scaling_factor": 2.446, "rope_theta": 50000.0,
    },
}  # fmt: skip


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    config = read_shape(arguments.shape)
    bandwidth = copy_bandwidth(device)
    if arguments.peer == "vllm" and arguments.peer_only:
        emit(bench_vllm(config, arguments))
        return
    policy = init_policy(config, seed=0, dtype=dtype, device=device)
    requests = make_requests(config, arguments)
    params = SamplingParams(arguments.new, temperature=arguments.temperature)
    engine = Engine(
        policy, max_batch_size=arguments.max_batch_size, cache_bytes=arguments.cache_bytes,
        steps_per_look=arguments.steps_per_look, look_behind=arguments.look_behind,
        batch_invariant=arguments.batch_invariant,
    )  # fmt: skip
    lengths = skewed_lengths(arguments) if arguments.skew else [arguments.new] * arguments.batch
    if arguments.skew:
        engine.limit_of = lambda request, k: lengths[request * arguments.group + k]
    peer = None
    if arguments.peer == "hf":
        peer = HFPeer(policy, arguments)
        if arguments.check:
            emit(check_against(peer, policy, requests, arguments))
    warm_up_s = timed(lambda: engine.generate(requests, SamplingParams(min(8, arguments.new))))
    if device.type == "cuda":
        warm_up_s += timed(lambda: engine.generate(requests, params))
        torch.cuda.reset_peak_memory_stats()
    ours, theirs = [], []
    for _ in range(arguments.repeats):
        began = time.process_time()
        engine.generate(requests, params)
        cpu_s = time.process_time() - began
        ours.append(engine.stats | {"tokens_per_cpu_s": engine.stats["tokens"] / cpu_s})
        if peer is not None:
            theirs.append(peer.generate(requests))
    emit(describe(ours, config, arguments, policy, lengths, bandwidth, warm_up_s))
    if theirs:
        emit(compare(ours, theirs))
    if arguments.profile:
        profile(lambda: engine.generate(requests, params), device)
    if arguments.peer == "vllm":
        del engine, policy
        torch.cuda.empty_cache()
        emit(bench_vllm(config, arguments))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="quickstart", help=f"{', '.join(SHAPES)}, or a config.json")
    parser.add_argument("--batch", type=int, default=128, help="rows")
    parser.add_argument("--group", type=int, default=8, help="rows that share a prompt")
    parser.add_argument("--prompt", type=int, default=16, help="prompt tokens")
    parser.add_argument("--new", type=int, default=128, help="new tokens of each row (no stop token)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--cache-bytes", type=int, default=None)
    parser.add_argument("--max-batch-size", type=int, default=None, help="rows at once; the others wait")
    parser.add_argument("--steps-per-look", type=int, default=None, help="see rl.rollout.engine.Engine")
    parser.add_argument("--look-behind", action=argparse.BooleanOptionalAction, default=None, help="likewise")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", default="none", choices=["none", "hf", "vllm"])
    parser.add_argument("--peer-only", action="store_true", help="with --peer vllm: leave our own engine out")
    parser.add_argument("--check", action="store_true", help="equal logits and greedy tokens with --peer hf")
    parser.add_argument("--skew", action="store_true", help="half of the rows end in the first quarter")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--profile", action="store_true", help="one more run, and where the time of a step goes")
    arguments = parser.parse_args()
    for name in ("batch", "group", "prompt", "new", "threads", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: must be at least 1")
    if arguments.shape not in SHAPES and not Path(arguments.shape).is_file():
        parser.error(f"--shape {arguments.shape}: neither one of {', '.join(SHAPES)} nor a config.json")
    if arguments.peer_only and arguments.peer != "vllm":
        parser.error("--peer-only goes with --peer vllm")
    if arguments.batch % arguments.group:
        parser.error(f"--batch {arguments.batch} is not a multiple of --group {arguments.group}")
    if arguments.check and arguments.peer != "hf":
        parser.error("--check compares with --peer hf")
    return arguments


def read_shape(shape: str) -> PolicyConfig:
    values = SHAPES[shape] if shape in SHAPES else json.loads(Path(shape).read_text())
    return PolicyConfig.from_dict(values, strict=False)


def make_requests(config: PolicyConfig, arguments: argparse.Namespace) -> list[RolloutRequest]:
    generator = torch.Generator().manual_seed(0)
    requests = []
    for i in range(arguments.batch // arguments.group):
        ids = torch.randint(0, config.vocab_size, (arguments.prompt,), generator=generator).tolist()
        seeds = tuple(range(i * arguments.group, (i + 1) * arguments.group))
        requests.append(RolloutRequest(Problem(str(i), "", tuple(ids)), seeds))
    return requests


def skewed_lengths(arguments: argparse.Namespace) -> list[int]:
    """Half of the rows uniform in the first quarter, the others in the rest, in random order."""
    generator = torch.Generator().manual_seed(1)
    rows, new = arguments.batch, arguments.new
    short = torch.randint(1, max(new // 4, 1) + 1, (rows // 2,), generator=generator)
    long = torch.randint(new // 4 + 1, new + 1, (rows - rows // 2,), generator=generator)
    return torch.cat((short, long))[torch.randperm(rows, generator=generator)].tolist()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy, best of several."""
    source = torch.empty(2**28 if device.type == "cpu" else 2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(timed(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.numel() / best


def timed(call: Callable[[], Any], device: torch.device | None = None) -> float:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def bytes_per_step(
    config: PolicyConfig, policy: Policy, lengths: Sequence[int], *, group: int, prompt: int, steps: int
) -> tuple[int, int]:
    """-> weight bytes, cache bytes that an average one of `steps` steps reads: every matrix but the embedding once, of
    the experts those that some live row is expected to choose; own tokens of each live row, each group's prompt once.
    lengths: tokens of each row, group by group; the first comes from the prompt, each other takes a step."""
    element = policy.lm_head.weight.element_size()
    rows = sum(n - 1 for n in lengths) / steps
    weights = 0.0
    for name, parameter in policy.named_parameters():
        share = 1.0
        if name == "model.embed_tokens.weight" and not config.tie_word_embeddings:  # tied, it is the output matrix
            continue
        if ".experts." in name:
            assert config.n_routed_experts is not None and config.num_experts_per_tok is not None
            share = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** rows
        weights += share * parameter.numel() * element
    per_token = config.num_hidden_layers * config.cache_width * element
    longest = [max(lengths[start : start + group]) for start in range(0, len(lengths), group)]
    read = sum(n * (n - 1) / 2 for n in lengths) + prompt * sum(n - 1 for n in longest)
    return int(weights), int(read / steps * per_token)


def describe(
    runs: list[dict[str, Any]],
    config: PolicyConfig,
    arguments: argparse.Namespace,
    policy: Policy,
    lengths: Sequence[int],
    bandwidth: float,
    warm_up_s: float,
) -> dict[str, Any]:
    run = sorted(runs, key=lambda run: run["tokens_per_s"])[len(runs) // 2]
    steps = max(run["steps"], 1)
    weight_bytes, cache_bytes = bytes_per_step(
        config, policy, lengths, group=arguments.group, prompt=arguments.prompt, steps=steps
    )
    limit_s = steps * (weight_bytes + cache_bytes) / bandwidth
    element = policy.lm_head.weight.element_size()
    return {
        "engine": "rl.rollout",
        "shape": arguments.shape, "parameters": sum(p.numel() for p in policy.parameters()),
        "batch": arguments.batch, "group": arguments.group, "prompt": arguments.prompt, "new": arguments.new,
        "dtype": arguments.dtype, "device": device_name(arguments), "skew": arguments.skew,
        "rows_at_once": run["max_batch"],
        "batch_invariant": arguments.batch_invariant, "backend": run["backend"],
        "tokens_per_s": round(run["tokens_per_s"], 1),
        "tokens_per_cpu_s": round(run["tokens_per_cpu_s"], 1),
        "all_runs_tokens_per_s": [round(r["tokens_per_s"], 1) for r in runs],
        "ms_per_step": round(1e3 * run["decode_s"] / steps, 3), "steps": run["steps"],
        "prefill_ms": round(1e3 * run["prefill_s"], 2), "first_token_ms": round(1e3 * run["first_token_s"], 2),
        "warm_up_s": round(warm_up_s, 2), "busy_frac": round(run["busy_frac"], 3),
        "cache_bytes_per_token": config.num_hidden_layers * config.cache_width * element,
        "cache_bytes": run["cache_bytes"], "derived_bytes": run["derived_bytes"],
        "derived_ms": round(1e3 * run["build_s"], 2), "peak_bytes": peak_memory(arguments) + run["arena_bytes"],
        "weight_bytes_per_step": weight_bytes, "cache_bytes_per_step": cache_bytes,
        "copy_bytes_per_s": round(bandwidth), "bandwidth_limit_frac": round(limit_s / run["seconds"], 4),
    }  # fmt: skip


def device_name(arguments: argparse.Namespace) -> str:
    if arguments.device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} thread(s)"


def peak_memory(arguments: argparse.Namespace) -> int:
    if arguments.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the runs taken in turns. Where other programs share the CPU, tokens per CPU second is the steadier
    one."""
    line: dict[str, Any] = {"engine": "transformers"}
    for key in ("tokens_per_s", "tokens_per_cpu_s"):
        peer = statistics.median(run[key] for run in theirs)
        line |= {key: round(peer, 1), f"ratio_{key}": round(statistics.median(run[key] for run in ours) / peer, 2)}
    return line


class HFPeer:
    """transformers' model of the shape's family with the policy's own weights; one row per completion, sampling at the
    same temperature, no log-probabilities (which only favours it)."""

    def __init__(self, policy: Policy, arguments: argparse.Namespace) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**policy.config.to_dict()))
        self.model = self.model.to(policy.lm_head.weight.dtype).to_empty(device=arguments.device)
        self.model.load_state_dict(policy.state_dict())
        rotary = self.model.model.rotary_emb  # its buffers are not in the state
        rotary.__init__(self.model.config)
        rotary.to(arguments.device)
        self.model.eval()
        self.model.set_experts_implementation("grouped_mm")
        self.arguments, self.device = arguments, torch.device(arguments.device)
        self.sampling = GenerationConfig(
            max_new_tokens=arguments.new, min_new_tokens=arguments.new, do_sample=arguments.temperature > 0,
            temperature=arguments.temperature or None, top_k=0, top_p=1.0, pad_token_id=0, use_cache=True,
        )  # fmt: skip

    @torch.no_grad()
    def generate(self, requests: list[RolloutRequest]) -> dict[str, float]:
        ids = torch.tensor([r.problem.prompt_ids for r in requests for _ in r.seeds], device=self.device)
        mask = torch.ones_like(ids)
        began = time.process_time()
        seconds = timed(
            lambda: self.model.generate(input_ids=ids, attention_mask=mask, generation_config=self.sampling),
            self.device,
        )
        tokens = ids.shape[0] * self.arguments.new
        return {"tokens_per_s": tokens / seconds, "tokens_per_cpu_s": tokens / (time.process_time() - began)}

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([ids], device=self.device)).logits[0].float()


def check_against(
    peer: HFPeer, policy: Policy, requests: list[RolloutRequest], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Greedy completions of the first groups: how far transformers' logits put our tokens below its best one, and how
    far our log-probabilities are from its."""
    groups: list[RolloutGroup] = Engine(policy).generate(
        [RolloutRequest(r.problem, r.seeds[:1]) for r in requests[:8]], SamplingParams(arguments.new, temperature=0.0)
    )
    worst_gap = worst_logprob = 0.0
    equal = total = 0
    for group in groups:
        (completion,) = group.completions
        prompt = group.problem.prompt_ids
        logits = peer.logits([*prompt, *completion.token_ids])[len(prompt) - 1 : -1].cpu()
        tokens = torch.tensor(completion.token_ids)
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        worst_gap = max(worst_gap, (logits.amax(-1) - chosen).max().item())
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        worst_logprob = max(worst_logprob, (logprobs - completion.logprobs).abs().max().item())
        equal += int((logits.argmax(-1) == tokens).sum())
        total += len(tokens)
    return {
        "check": "greedy tokens and logprobs against transformers' full forward", "tokens": total,
        "equal_to_its_argmax": equal, "worst_logit_gap": worst_gap, "worst_logprob_difference": worst_logprob,
    }  # fmt: skip


def bench_vllm(config: PolicyConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """vLLM with dummy weights redrawn as N(0, 0.02), groups sharing prompts by its prefix cache, the sampled token's
    log-probability returned. Needs VLLM_ALLOW_INSECURE_SERIALIZATION=1 (the redraw runs in its worker)."""
    from vllm import LLM
    from vllm import SamplingParams as VLLMParams

    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16), 768, 1024]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config.to_dict() | {"torch_dtype": arguments.dtype}))
        started = time.perf_counter()
        llm = LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, dtype=arguments.dtype, max_num_seqs=1024,
            max_model_len=arguments.prompt + arguments.new, gpu_memory_utilization=0.9, enable_prefix_caching=True,
            compilation_config={"cudagraph_capture_sizes": sizes},
        )  # fmt: skip
        llm.apply_model(redraw_weights)
        warm_up_s = time.perf_counter() - started
        prompts = [
            {"prompt_token_ids": list(request.problem.prompt_ids)} for request in make_requests(config, arguments)
        ]
        per_prompt = VLLMParams(
            n=arguments.group, temperature=arguments.temperature, max_tokens=arguments.new, ignore_eos=True,
            logprobs=0, detokenize=False,
        )  # fmt: skip
        speeds = []
        for _ in range(arguments.repeats):
            llm.reset_prefix_cache()
            seconds = timed(lambda: llm.generate(prompts, per_prompt, use_tqdm=False))
            speeds.append(arguments.batch * arguments.new / seconds)
    return {
        "engine": "vllm", "shape": arguments.shape, "batch": arguments.batch, "prompt": arguments.prompt,
        "new": arguments.new, "tokens_per_s": round(statistics.median(speeds), 1), "warm_up_s": round(warm_up_s, 1),
    }  # fmt: skip


def redraw_weights(model: torch.nn.Module) -> None:
    """N(0, 0.02) for matrices, 1 for norms, 0 for the rest (runs inside vLLM's worker)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0.0, 0.02)
        else:
            parameter.data.fill_(1.0 if "norm" in name else 0.0)


def profile(call: Callable[[], Any], device: torch.device) -> None:
    """On a CPU the operators that take longest; on a GPU a decode step, kernel by kernel."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        call()
    if not on_gpu:
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60)
        print(table, flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    kernels = [Kernel(e["name"], e["ts"], e["dur"]) for e in events if e.get("cat") == "kernel"]
    print("\n".join(step_table(kernels)), flush=True)


def emit(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
