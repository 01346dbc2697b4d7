"""The table of a decode step, from kernels made up here. Their names are held against the kernels themselves."""

from __future__ import annotations

import importlib

import pytest

from rl.rollout.kernels.step_table import _FIRST, _NORM, Kernel, step_table


def test_the_names_are_those_of_the_kernels() -> None:
    pytest.importorskip("triton")
    for module, name in (("rows", _FIRST), ("norm", _NORM)):
        assert hasattr(importlib.import_module(f"rl.rollout.kernels.{module}"), name)


def test_a_profile_tells_a_step_kernel_by_kernel() -> None:
    kernels: list[Kernel] = []
    clock = 0.0

    def ran(name: str, length: float, beside: float = 0.0) -> None:
        nonlocal clock
        kernels.append(Kernel(name, clock - beside, length))
        clock += length - beside

    for step in range(3):
        ran("_begin_kernel", 2)
        for _layer in range(4):
            ran("_combine_norm_kernel", 3)
            ran("product", 10 + step)
            ran("_combine_norm_kernel", 4)
            ran("product", 20)
            ran("shared", 6, beside=5)
        ran("_combine_norm_kernel", 3)
        ran("head", 30)
    ran("copy", 1000)  # after the last step: it makes that one unlike the others
    first, _, *lines = step_table(kernels)
    layer = 3 + 10.5 + 4 + 20 + 1  # of the steps 0 and 1
    assert first == f"mean of 2 steps: {2 + 4 * layer + 33:.0f} us; 4 layers of a step are alike: {layer:.1f} us"
    words = [line.split() for line in lines]
    assert words[:5] == [
        ["0.0", "3.0", "_combine_norm_kernel"], ["3.0", "10.5", "product"], ["13.5", "4.0", "_combine_norm_kernel"],
        ["17.5", "20.0", "product"], ["32.5", "6.0", "shared"],
    ]  # fmt: skip
    assert words[6:] == [["30.0", "head"], ["3.0", "_combine_norm_kernel"], ["2.0", "_begin_kernel"]]
    assert step_table([]) == ["no decode step with kernels of our own"]
