"""Settings that must hold before the first import of any test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # `tests.integration.conftest` from anywhere

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if not torch.cuda.is_available():
    # Where Triton is installed without a GPU, its kernels run in the interpreter; they read this when they are defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")
