"""decode.c as Python functions on tensors: compiled once with the machine's C compiler, loaded through ctypes.

The shared library is kept in the user's cache folder under a hash of the source, the flags and the CPU, and compiled
(about two seconds) where it is missing. Without a compiler that takes the source (gcc 12 or clang) `load` gives None
and warns, and decode stays with plain torch: the same results up to rounding, at a third to half of the speed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from rl.policy.moe import Router
from rl.rollout.ops import AttentionPlan
from rl.rollout.weights import DecodeWeights, LayerWeights

_SOURCE = Path(__file__).with_name("decode.c")
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno")
# Arguments of each function of decode.c: pointer, 64-bit integer, float.
_SIGNATURES = {
    "rms_norm": "ppfpiii",
    "split_joined": "piiipfppfppipii",
    "attend": "pppippippipiiiifi",
    "route": "pppiiiiiiiiifppi",
    "gather_by_expert": "piiipippp",
    "silu_mul": "ppiii",
    "add_experts": "ppppiiii",
    "attention": "ppfpipfppfppippippipiiiiifi",
    "dense_mlp": "pppiiipi",
    "experts": "pppiiippiipi",
    "draw": "pppfiiippi",
}
_log = logging.getLogger(__name__)


@functools.cache
def load() -> NativeDecode | None:
    """The compiled functions, or None where they cannot be had (a warning says why, once)."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        _log.warning(
            "no C compiler (cc, gcc, clang): decode on the CPU stays with plain torch, at a third to half of the speed"
        )
        return None
    problems = []
    for threading in (("-fopenmp",), ("-fopenmp-simd",)):
        try:
            return NativeDecode(ctypes.CDLL(str(_compiled(compiler, (*_FLAGS, *threading)))))
        except (subprocess.CalledProcessError, OSError) as error:
            detail = error.stderr.strip()[:500] if isinstance(error, subprocess.CalledProcessError) else error
            problems.append(f"with {threading[0]}: {detail}")
    text = "\n".join(problems)
    _log.warning("decode.c does not compile or load; decode on the CPU stays with plain torch, slower\n%s", text)
    return None


def _compiled(compiler: str, flags: tuple[str, ...]) -> Path:
    """The shared library, compiled if it is not there yet; processes that do so at once do not disturb each other."""
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(b"\0".join((source, " ".join((compiler, *flags)).encode(), _cpu().encode()))).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aha-rl"
    target = folder / f"decode-{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = Path(work) / target.name
            command = [compiler, *flags, str(_SOURCE), "-o", str(built), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(built, target)
    return target


def _cpu() -> str:
    """What -march=native depends on: a cache folder may be shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _at(tensor: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
    if tensor is None:
        return None
    assert tensor.dtype == dtype and tensor.device.type == "cpu", (tensor.dtype, tensor.device)
    return tensor.data_ptr()


class NativeDecode:
    """All tensors are fp32 on the CPU and contiguous unless said otherwise; loops use torch's number of threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        kinds = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
        signatures = {name: [kinds[kind] for kind in text] for name, text in _SIGNATURES.items()}
        for name, arguments in signatures.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        library.gather_by_expert.restype = library.panel_width.restype = ctypes.c_int64
        self._panel_width = int(library.panel_width())
        self._library = library

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x (N, D) -> x / rms(x) * weight."""
        out = torch.empty_like(x)
        self._library.rms_norm(_at(x), _at(weight), eps, _at(out), *x.shape, torch.get_num_threads())
        return out

    def split_joined(
        self,
        joined: torch.Tensor,
        query_norm: tuple[torch.Tensor, float] | None,
        latent_norm: tuple[torch.Tensor, float],
        turns: torch.Tensor,
        own: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """joined (N, query | latent | rope) -> the query part (N, query), normalised if query_norm (weight, eps) is
        given. Row r's latent, normalised, and its rope part, turned by turns (N, R/2) complex64, become cache row
        positions[r] of own[r], own (S, T, C+R)."""
        rows, (_, tokens, width) = joined.shape[0], own.shape
        rank = latent_norm[0].shape[0]
        query = joined.new_empty(rows, joined.shape[1] - width)
        weight, eps = query_norm if query_norm is not None else (None, 0.0)
        self._library.split_joined(
            _at(joined), query.shape[1], rank, width - rank, _at(weight), eps, _at(query), _at(latent_norm[0]),
            latent_norm[1], _at(turns, torch.complex64), _at(own), tokens * width, _at(positions, torch.int64), rows,
            torch.get_num_threads(),
        )  # fmt: skip
        return query

    def attend(
        self,
        q: torch.Tensor,
        turns: torch.Tensor | None,
        own: torch.Tensor,
        own_len: torch.Tensor,
        prompt: torch.Tensor,
        prompt_slot: torch.Tensor,
        prompt_len: torch.Tensor,
        *,
        rank: int,
        scale: float,
    ) -> torch.Tensor:
        """q (N, H, C+R), its last R turned first by turns (N, R/2) complex64 if given; row r attends to
        prompt[prompt_slot[r], :prompt_len[r]] and own[r, :own_len[r]], both (slots, tokens, C+R) -> (N, H, C)."""
        rows, heads, width = q.shape
        out = q.new_empty(rows, heads, rank)
        self._library.attend(
            _at(q), _at(turns, torch.complex64), _at(own), own.stride(0), _at(own_len, torch.int64), _at(prompt),
            prompt.stride(0), _at(prompt_slot, torch.int64), _at(prompt_len, torch.int64),
            own.shape[1] + prompt.shape[1], _at(out), rows, heads, rank, width - rank, scale, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def route(self, x: torch.Tensor, router: Router) -> tuple[torch.Tensor, torch.Tensor]:
        """As `rl.policy.moe.Router.forward` of x (N, D): experts (N, K) int64, weights (N, K)."""
        (rows, width), k = x.shape, router.top_k
        chosen = torch.empty(rows, k, dtype=torch.int64)
        weights = x.new_empty(rows, k)
        self._library.route(
            _at(x), _at(router.weight), _at(router.e_score_correction_bias), rows, width, router.num_experts, k,
            router.num_groups, router.top_groups if router.limit_groups else 0, router.sigmoid, router.sigmoid,
            router.normalise, router.scaling, _at(chosen, torch.int64), _at(weights), torch.get_num_threads(),
        )  # fmt: skip
        return chosen, weights

    def gather_by_expert(
        self, x: torch.Tensor, experts: torch.Tensor, num_experts: int, *, spare: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """x (N, D), experts (N, K) int64 -> x of each choice sorted by expert (N * K + spare, D) with zeros in the
        spare rows, where each expert's rows end (E,) int32, the sorted row of each choice (N, K) int32, and the fewest
        rows of an expert that has any."""
        (rows, k), width = experts.shape, x.shape[1]
        gathered = x.new_empty(rows * k + spare, width)
        gathered[rows * k :] = 0
        offsets = torch.empty(num_experts, dtype=torch.int32)
        place = torch.empty(rows, k, dtype=torch.int32)
        fewest = self._library.gather_by_expert(
            _at(experts, torch.int64), rows, k, num_experts, _at(x), width, _at(offsets, torch.int32),
            _at(place, torch.int32), _at(gathered),
        )  # fmt: skip
        return gathered, offsets, place, fewest

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """(N, 2I) -> silu(first half) * second half, (N, I)."""
        rows, width = gate_up.shape
        out = gate_up.new_empty(rows, width // 2)
        self._library.silu_mul(_at(gate_up), _at(out), rows, width // 2, torch.get_num_threads())
        return out

    def add_experts(
        self, residual: torch.Tensor, parts: torch.Tensor, place: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """residual (N, D) += sum_k weights[:, k] * parts[place[:, k]], in place; weights (N, K)."""
        (rows, k), width = weights.shape, residual.shape[1]
        self._library.add_experts(
            _at(residual), _at(parts), _at(place, torch.int32), _at(weights), rows, k, width, torch.get_num_threads()
        )
        return residual

    def panels(self, matrices: torch.Tensor | None) -> torch.Tensor | None:
        """matrices (..., out, in) packed in panels, (..., out / panel, in, panel); None where `out` is no multiple of a
        panel, on a CPU without AVX-512, or for None."""
        if matrices is None or not self._panel_width or matrices.shape[-2] % self._panel_width:
            return None
        return matrices.unflatten(-2, (-1, self._panel_width)).transpose(-2, -1).contiguous()

    def attention(
        self, residual: torch.Tensor, layer: LayerWeights, weights: DecodeWeights, turns: torch.Tensor,
        own: torch.Tensor, prompt: torch.Tensor, plan: AttentionPlan,
    ) -> None:  # fmt: skip
        """residual (N, D) += attention(norm(residual)) of a layer with `attention_panels`. turns (N, R/2) complex64:
        of queries and new cache rows; the new one of row r becomes the last of own[r]."""
        assert layer.attention_panels is not None
        joined, query, output = layer.attention_panels
        norm, latent, inner = layer.attention_norm, layer.latent_norm, layer.query_norm
        self._library.attention(
            _at(residual), _at(norm.weight), norm.eps, _at(joined), layer.joined.shape[0],
            None if inner is None else _at(inner.weight), 0.0 if inner is None else inner.eps, _at(query),
            _at(latent.weight), latent.eps, _at(turns, torch.complex64), _at(own), own.stride(0),
            _at(plan.own_len, torch.int64), _at(prompt), prompt.stride(0), _at(plan.prompt_slot, torch.int64),
            _at(plan.prompt_len, torch.int64), own.shape[1] + prompt.shape[1], _at(output), *residual.shape,
            weights.heads, weights.latent_rank, weights.rope_dims, weights.scale, torch.get_num_threads(),
        )  # fmt: skip

    def dense_mlp(self, residual: torch.Tensor, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """residual (N, D) += down(silu(gate(x)) * up(x)); `panels` of (2I, D) and (D, I)."""
        self._library.dense_mlp(
            _at(x), _at(gate_up), _at(down), *x.shape, down.shape[1], _at(residual), torch.get_num_threads()
        )

    def experts(
        self, residual: torch.Tensor, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor,
        gate_up: torch.Tensor, down: torch.Tensor,
    ) -> None:  # fmt: skip
        """residual (N, D) += sum_k weights[:, k] * expert_k(x); experts (N, K) int64, weights (N, K); `panels` of
        (E, 2I, D) and (E, D, I)."""
        (rows, k), width = experts.shape, x.shape[1]
        self._library.experts(
            _at(x), _at(experts, torch.int64), _at(weights), rows, k, gate_up.shape[0], _at(gate_up), _at(down), width,
            down.shape[2], _at(residual), torch.get_num_threads(),
        )  # fmt: skip

    def draw(
        self, logits: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `rl.rollout.sampling.Sampler` without truncation: logits (N, V), seeds and steps (N,) int64 -> token (N,)
        int64, logprob (N,); temperature 0 is greedy."""
        tokens, logprobs = torch.empty_like(seeds), logits.new_empty(logits.shape[0])
        self._library.draw(
            _at(logits), _at(seeds, torch.int64), _at(steps, torch.int64), 1 / (temperature or 1.0), temperature == 0,
            *logits.shape, _at(tokens, torch.int64), _at(logprobs), torch.get_num_threads(),
        )  # fmt: skip
        return tokens, logprobs
