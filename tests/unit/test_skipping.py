"""What becomes of a step whose loss or gradient is not finite, with the scale of fp16 and without."""

import math

import pytest
import torch

from sdlora.training.state import State, find_fault


@pytest.mark.parametrize(
    ("loss", "norm", "fault"),
    [
        (1.0, 1.0, ""),
        (math.nan, 1.0, "loss"),
        (math.inf, math.inf, "loss"),
        (1.0, math.inf, "gradient"),
        (0.0, math.nan, "gradient"),
    ],
)
def test_a_fault_is_named(loss, norm, fault):
    assert find_fault(loss, norm) == fault


def make_state(scaler=None):
    state = State.__new__(State)
    state.scaler, state.skipped_in_row = scaler, 0
    return state


def test_without_a_scale_each_counts(capsys):
    state = make_state()
    state.skip(3, "gradient")
    state.skip(4, "loss")
    assert state.skipped_in_row == 2
    assert "step 4: the loss is not finite, so the step is skipped (2 in a row)" in capsys.readouterr().err


def overflow(scaler, optimizer, factor):
    """One step whose gradient is infinite, as far as the check for it."""
    factor.grad = torch.full_like(factor, math.inf)
    scaler.scale(torch.ones(()))  # what makes the scale
    scaler.unscale_(optimizer)


def test_an_overflow_of_fp16_lowers_the_scale_and_counts_only_once_that_is_used_up(capsys):
    factor = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([factor], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    state = make_state(scaler)
    scales = []
    for step in range(5):
        overflow(scaler, optimizer, factor)
        scales.append(scaler.get_scale())
        state.skip(step, "gradient")
    assert scales == [4, 2, 1, 0.5, 0.25]
    assert state.skipped_in_row == 2  # those at 0.5 and 0.25
    assert capsys.readouterr().err.count("skipped") == 2
    assert factor.tolist() == [1, 1]


def test_a_loss_that_is_not_finite_counts_whatever_the_scale():
    factor = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([factor], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    state = make_state(scaler)
    overflow(scaler, optimizer, factor)
    state.skip(1, "loss")
    assert state.skipped_in_row == 1
    overflow(scaler, optimizer, factor)  # the scaler is ready for the next step
    state.skip(2, "gradient")
    assert state.skipped_in_row == 1
