"""models/schedule.py: the betas and the tables made of them."""
import json
from pathlib import Path

import pytest
import torch

from models.schedule import alpha_bars, linear_betas, schedule_tables

SHAPES = json.loads((Path(__file__).parents[1] / "data" / "checkpoint_shapes.json").read_text())


@pytest.mark.parametrize("T", [1000, 100, 4000])
def test_betas_are_linear_and_scale_with_T(T):
    betas = linear_betas(T)
    assert betas.shape == (T,) and betas.dtype == torch.float32
    assert betas[0].item() == pytest.approx(0.1 / T) and betas[-1].item() == pytest.approx(20 / T)
    assert betas.double().diff().std() < 1e-8
    assert betas.double().sum().item() == pytest.approx(10.05)  # as much noise altogether, whatever T


def test_alpha_bars_are_float64_products():
    levels = alpha_bars(torch.tensor([0.5, 0.25, 0.1]))
    assert levels[:2] == [0.5, 0.375]
    assert alpha_bars(linear_betas())[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    assert levels[2] == 0.375 * (1 - torch.tensor(0.1).double().item()) and type(levels[2]) is float


def test_schedule_tables_are_the_published_ones():
    published = {name: shape for name, shape in SHAPES["idiff_face_ema_averaged_model.ckpt"].items()
                 if not name.startswith("eps_model.")}
    assert {name: list(table.shape) for name, table in schedule_tables(linear_betas()).items()} == published


def test_schedule_tables_by_hand():
    tables = schedule_tables(torch.tensor([0.36, 0.4375]))
    expected = {"betas": [0.36, 0.4375], "alphas": [0.64, 0.5625], "sigmas": [0.6, 0.4375**0.5],
                "sqrt_alphas_inv": [1 / 0.8, 1 / 0.75], "alpha_bars": [0.64, 0.36], "sqrt_alpha_bars": [0.8, 0.6],
                "sqrt_one_minus_alpha_bars": [0.6, 0.8],
                "one_minus_alphas_over_sqrt_one_minus_alpha_bars": [0.36 / 0.6, 0.4375 / 0.8]}
    assert tables.keys() == expected.keys()
    for name, values in expected.items():
        assert tables[name].tolist() == pytest.approx(values, abs=1e-6) and tables[name].dtype == torch.float32
