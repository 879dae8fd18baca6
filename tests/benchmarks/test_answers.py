"""Counting wrong elements: exact by the bit, or within a stated tolerance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from undertow.benchmarks.answers import count_wrong, within


@pytest.mark.parametrize(
    ("answer", "reference", "wrong"),
    [
        (b"abc", b"abc", 0),
        (b"abd", b"abc", 1),
        (1, 1.0, 1),  # another type is another answer
        ([1, 2, 3], [1, 5, 3], 1),
        ([1, 2], [1, 2, 3], 3),
        (None, [1, 2], 2),
        ({"a": 1}, {"a": 1, "b": 2}, 1),
        (3, {}, 1),
        ((torch.tensor([1.0]), "x"), (torch.tensor([2.0]), "x"), 1),
    ],
)
def test_plain_values_and_containers(answer, reference, wrong):
    assert count_wrong(answer, reference) == wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_tensors_are_compared_bit_by_bit(seed, dtype):
    reference = (torch.randn(5, 7) * 3).to(dtype)
    answer = reference.clone()
    assert count_wrong(answer, reference) == 0
    places = torch.randperm(35)[:4]
    answer.view(-1)[places] = (answer.view(-1)[places] == 0).to(dtype)
    assert count_wrong(answer, reference) == int((answer != reference).sum()) > 0


def test_nan_equals_itself_and_signed_zeros_differ():
    nan = torch.tensor([math.nan, 0.0])
    assert count_wrong(nan.clone(), nan) == 0
    assert count_wrong(torch.tensor([math.nan, -0.0]), nan) == 1


def test_shape_and_dtype_matter():
    reference = torch.zeros(2, 3)
    assert count_wrong(torch.zeros(3, 2), reference) == 6
    assert count_wrong(torch.zeros(2, 3, dtype=torch.float64), reference) == 6
    assert count_wrong("zeros", reference) == 6
    assert count_wrong(torch.zeros(0), torch.zeros(0)) == 0
    assert count_wrong(torch.zeros(1), torch.zeros(0)) == 1


def test_strided_tensors_and_arrays():
    reference = torch.arange(12).reshape(3, 4)
    assert count_wrong(reference.t().contiguous().t(), reference) == 0
    assert count_wrong(np.arange(4.0) + [0, 0, 1, 0], np.arange(4.0)) == 1


def test_within_a_tolerance():
    count = within(atol=0.1, rtol=0.01)
    reference = torch.tensor([0.0, 100.0, math.inf, math.nan, -100.0])
    assert count(reference + torch.tensor([0.05, 1.05, 0.0, 0.0, 1.0]), reference) == 0
    assert count(torch.tensor([0.2, 101.2, -math.inf, 0.0, math.nan]), reference) == 5
    assert count(torch.zeros(2), reference) == 5
