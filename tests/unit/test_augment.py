"""Augmentation and the stateless draws under it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from edgekd.data.augment import augment, mix_batch, to_float
from edgekd.data.config import AugmentConfig
from edgekd.data.rng import seed_of, uniform

POLICIES = {
    "none": AugmentConfig(),
    "shift": AugmentConfig(policy="shift", pad=3),
    "crop_flip": AugmentConfig(policy="crop_flip"),
    "rrc": AugmentConfig(policy="rrc"),
    "erase": AugmentConfig(erase=0.7),
    "everything": AugmentConfig(policy="crop_flip", erase=0.5),
}


def images(count: int = 24, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ draws
def splitmix64(state: int) -> int:
    mask = 2**64 - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_draws_are_those_of_splitmix64_in_python_integers() -> None:
    gamma, positions = 0x9E3779B97F4A7C15, np.array([0, 1, 7, 10**9, 2**62])
    got = uniform(5, "shift", 3, positions, 4)
    base = seed_of(5, "shift", 3)
    for i, p in enumerate(positions.tolist()):
        row = splitmix64(base + p * gamma)
        assert got[i].tolist() == [(splitmix64(row + (j + 1) * gamma) >> 11) * 2.0**-53 for j in range(4)]


def test_draws_are_uniform() -> None:
    draws = uniform(0, "t", 0, np.arange(100_000), 4)
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        counts = np.bincount((column * 100).astype(int), minlength=100)
        assert ((counts - 1000) ** 2 / 1000).sum() < 180  # chi-square, 99 degrees of freedom: 180 has p < 1e-6


def test_draws_of_other_columns_positions_epochs_seeds_and_purposes_are_independent() -> None:
    n = 50_000
    a = uniform(0, "t", 0, np.arange(n), 2)
    others = [
        a[:, 1],
        np.roll(a[:, 0], 1),
        uniform(0, "t", 1, np.arange(n), 1)[:, 0],
        uniform(1, "t", 0, np.arange(n), 1)[:, 0],
        uniform(0, "u", 0, np.arange(n), 1)[:, 0],
    ]
    for other in others:
        assert abs(np.corrcoef(a[:, 0], other)[0, 1]) < 5 / np.sqrt(n)  # five standard errors
        joint = np.histogram2d(a[:, 0], other, bins=10)[0]
        assert ((joint - n / 100) ** 2 / (n / 100)).sum() < 180


def test_a_draw_does_not_depend_on_the_other_positions_or_on_their_number() -> None:
    whole = uniform(0, "t", 2, np.arange(1000), 5)
    some = np.array([999, 3, 500])
    assert np.array_equal(uniform(0, "t", 2, some, 5), whole[some])
    assert np.array_equal(uniform(0, "t", 2, some, 2), whole[some, :2])


def test_seeds_differ_by_purpose_and_index() -> None:
    seeds = {seed_of(s, p, *i) for s in (0, 1, -1) for p in ("a", "b") for i in ((), (0,), (1,), (1, 2), (12,))}
    assert len(seeds) == 30
    assert all(0 <= s < 2**64 for s in seeds)


# ------------------------------------------------------------------------------------------------ every policy
@pytest.mark.parametrize("policy", POLICIES)
def test_a_sample_is_augmented_alike_in_any_batch(policy: str) -> None:
    cfg, x, at = POLICIES[policy], images(), torch.arange(100, 124)
    whole = augment(x, at, cfg, seed=1, epoch=2)
    for part in (torch.tensor([5]), torch.tensor([23, 0, 11]), torch.arange(23, -1, -1)):
        assert torch.equal(augment(x[part], at[part], cfg, seed=1, epoch=2), whole[part])


@pytest.mark.parametrize("policy", POLICIES)
def test_the_result_is_float_in_the_unit_interval_and_the_input_is_untouched(policy: str) -> None:
    x = images()
    before = x.clone()
    y = augment(x, torch.arange(24), POLICIES[policy], seed=0, epoch=0)
    assert (y.shape, y.dtype) == ((24, 3, 16, 16), torch.float32)
    assert y.min() >= 0
    assert y.max() <= 1
    assert torch.equal(x, before)


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"none"}))
def test_another_epoch_or_seed_gives_another_view(policy: str) -> None:
    x, at = images(), torch.arange(24)
    views = [augment(x, at, POLICIES[policy], seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0))]
    assert not any(torch.equal(a, b) for a, b in zip(views, views[1:] + views[:1], strict=True))


def test_no_policy_divides_by_255_and_nothing_else() -> None:
    x = images()
    expected = (x.numpy().astype(np.float32) / np.float32(255)).transpose(0, 3, 1, 2)
    assert np.array_equal(to_float(x).numpy(), expected)
    assert np.array_equal(augment(x, torch.arange(24), AugmentConfig(), seed=0, epoch=0).numpy(), expected)


# ------------------------------------------------------------------------------------------------ single policies
@pytest.mark.parametrize("policy", ["shift", "crop_flip"])
def test_each_view_is_one_of_the_windows_of_the_padded_image(policy: str) -> None:
    x, pad = images(count=60, size=8), 2
    views = augment(x, torch.arange(60), AugmentConfig(policy=policy, pad=pad), seed=0, epoch=0)  # type: ignore[arg-type]
    padded = torch.nn.functional.pad(to_float(x), (pad,) * 4)
    seen = set()
    for i in range(60):
        windows = {(t, s, f): padded[i, :, t : t + 8, s : s + 8].flip(2) if f else padded[i, :, t : t + 8, s : s + 8]
                   for t in range(5) for s in range(5) for f in (False, True)}  # fmt: skip
        match = [key for key, window in windows.items() if torch.equal(window, views[i])]
        assert len(match) == 1
        seen.add(match[0])
    assert {t for t, _, _ in seen} == {s for _, s, _ in seen} == set(range(5))
    assert {f for _, _, f in seen} == ({False, True} if policy == "crop_flip" else {False})


def test_images_that_are_not_square_are_shifted_too() -> None:
    x = images()[:, :10]
    y = augment(x, torch.arange(24), AugmentConfig(policy="crop_flip", pad=0, flip=0), seed=0, epoch=0)
    assert torch.equal(y, to_float(x))


@pytest.mark.parametrize("policy", ["crop_flip", "rrc"])
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_come_with_their_probability(policy: str, probability: float) -> None:
    n = 4000
    x = torch.zeros(n, 8, 8, 3, dtype=torch.uint8)
    x[:, :, 4:] = 255
    cfg = AugmentConfig(policy=policy, pad=0, flip=probability, scale=1.0)  # type: ignore[arg-type]
    y = augment(x, torch.arange(n), cfg, seed=0, epoch=0)
    share = (y[:, :, :, :4].mean((1, 2, 3)) > y[:, :, :, 4:].mean((1, 2, 3))).float().mean().item()
    assert abs(share - probability) <= 5 * np.sqrt(probability * (1 - probability) / n)


def test_a_resized_crop_of_a_ramp_covers_the_area_it_should() -> None:
    n, size, scale = 2000, 32, 0.25
    ramp = torch.arange(size, dtype=torch.uint8) * 8
    x = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size), torch.zeros(size, size, dtype=torch.uint8)], -1).expand(
        n, -1, -1, -1
    )
    y = augment(x, torch.arange(n), AugmentConfig(policy="rrc", scale=scale, flip=0), seed=0, epoch=0)
    step = 8 / 255
    inner = slice(8, 24)  # away from the border, where the ramp is cut off
    wide = ((y[:, 0, 16, inner][:, -1] - y[:, 0, 16, inner][:, 0]) / 15 / step).numpy()
    high = ((y[:, 1, inner, 16][:, -1] - y[:, 1, inner, 16][:, 0]) / 15 / step).numpy()
    assert wide.max() <= 1.01
    assert high.max() <= 1.01
    assert abs((wide * high).mean() - (1 + scale) / 2) < 0.02  # sides cut to the image lose a little
    assert ((wide / high) > 0.74).all()
    assert ((wide / high) < 1.35).all()


def test_a_resized_crop_of_everything_is_the_image() -> None:
    x = images()
    cfg = AugmentConfig(policy="rrc", scale=1.0, flip=0)
    y = augment(x, torch.arange(24), cfg, seed=0, epoch=0)
    whole = [i for i in range(24) if torch.allclose(y[i], to_float(x)[i], atol=1e-5)]
    ratios = np.exp(np.log(3 / 4) + uniform(0, "rrc", 0, np.arange(24), 5)[:, 1] * np.log(16 / 9))
    assert whole == [i for i in range(24) if abs(ratios[i] - 1) < 1e-6]  # a window of the whole area and another ratio is cut to the image
    assert (y.amax((1, 2, 3)) <= to_float(x).amax((1, 2, 3)) + 1e-6).all()


def test_erasing_fills_one_rectangle_with_the_mean_colour() -> None:
    n, size = 3000, 16
    x = images(n, size)
    y, plain = augment(x, torch.arange(n), AugmentConfig(erase=0.4), seed=0, epoch=0), to_float(x)
    changed = (y != plain).any(1)
    hit = changed.flatten(1).any(1)
    assert abs(hit.float().mean().item() - 0.4) < 5 * np.sqrt(0.24 / n)
    for i in torch.nonzero(hit).flatten()[:50].tolist():
        rows, columns = changed[i].any(1), changed[i].any(0)
        assert torch.equal(changed[i], rows[:, None] & columns[None])
        assert torch.equal(
            y[i, :, rows][:, :, columns], plain[i].mean((1, 2))[:, None, None].expand(-1, int(rows.sum()), int(columns.sum()))
        )
    area = changed[hit].float().mean().item()
    assert 0.1 < area < 0.25  # uniform between 0.02 and 1/3, some cut to the image


# ------------------------------------------------------------------------------------------------ mixing
def test_without_mixup_and_cutmix_nothing_is_mixed() -> None:
    assert mix_batch(to_float(images()), AugmentConfig(), seed=0, step=0) is None


def test_mixup_is_the_weighted_mean_of_partners() -> None:
    x = to_float(images())
    for step in range(10):
        mixed = mix_batch(x, AugmentConfig(mixup=1.0), seed=0, step=step)
        assert mixed is not None
        share = mixed.share[:, None, None, None].double()
        expected = share * x.double() + (1 - share) * x[mixed.partner].double()
        assert torch.allclose(mixed.images.double(), expected, atol=1e-6)


def test_cutmix_pastes_a_rectangle_and_its_share_counts_the_pixels() -> None:
    x = to_float(images())
    for step in range(20):
        mixed = mix_batch(x, AugmentConfig(cutmix=1.0), seed=0, step=step)
        assert mixed is not None
        own = (mixed.images == x).all(1)
        assert torch.equal(mixed.images, torch.where(own[:, None], x, x[mixed.partner]))
        assert own[0].float().mean().item() == pytest.approx(mixed.share[0].item(), abs=1e-6)
        pasted = ~own[0]
        assert torch.equal(pasted, pasted.any(1)[:, None] & pasted.any(0)[None])


@pytest.mark.parametrize("size", [5, 6])
def test_partners_are_the_batch_turned_round(size: int) -> None:
    mixed = mix_batch(to_float(images(size)), AugmentConfig(mixup=0.2), seed=0, step=0)
    assert mixed is not None
    assert mixed.partner.tolist() == list(range(size))[::-1]
    assert mixed.share.shape == (size,)


def test_mixing_depends_on_seed_and_step_and_uses_both_kinds() -> None:
    x, cfg = to_float(images()), AugmentConfig(mixup=0.5, cutmix=0.5)
    runs = [[mix_batch(x, cfg, seed=0, step=s) for s in range(40)] for _ in range(2)]
    assert all(torch.equal(a.images, b.images) for a, b in zip(*runs, strict=True) if a and b)
    kinds = [bool((m.images == x).all(1)[1].any()) for m in runs[0] if m]
    assert 5 < sum(kinds) < 35
    other = mix_batch(x, cfg, seed=1, step=0)
    assert other is not None
    assert runs[0][0] is not None
    assert not torch.equal(other.images, runs[0][0].images)


def test_the_mean_share_is_that_of_the_beta_distribution() -> None:
    x, cfg = to_float(images(2, 4)), AugmentConfig(mixup=0.4)
    shares = np.array([m.share[0].item() for s in range(2000) if (m := mix_batch(x, cfg, seed=0, step=s))])
    sd = 0.5 / np.sqrt(2 * 0.4 + 1)  # of Beta(a, a)
    assert abs(shares.mean() - 0.5) < 5 * sd / np.sqrt(len(shares))
    assert abs(shares.std() - sd) < 0.02
