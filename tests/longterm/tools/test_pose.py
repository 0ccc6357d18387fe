import math

import numpy as np
import pytest

from holdfast.errors import UsageError
from holdfast.longterm.tools.pose import Events, Pose, before, both, either, events, mask, overlap


def walkers(frames=60):
    """Two animals of length 2: 0 runs along x at 3 a second, 1 rests at (10, 0), facing up."""
    t = np.arange(frames) / 10
    ahead = np.zeros((frames, 2, 2, 2))
    ahead[:, 0, 0, 0], ahead[:, 0, 1, 0] = 3 * t + 1, 3 * t - 1
    ahead[:, 1, :, 0] = 10
    ahead[:, 1, 0, 1], ahead[:, 1, 1, 1] = 1, -1
    return Pose(
        ahead, 10, regions={"box": (3.1, -1, 6.1, 1), "wedge": [(0.1, -1), (4, -1), (0.1, 9)]}
    )


@pytest.mark.parametrize("seed", range(20))
def test_events_and_masks_are_the_same(seed):
    draw = np.random.default_rng(seed)
    one = draw.random(draw.integers(0, 200)) < draw.random()
    found = events(one)
    assert np.array_equal(mask(found), one)
    assert events(mask(found)) == found
    assert (found.frames[1:, 0] > found.frames[:-1, 1]).all()


@pytest.mark.parametrize("seed", range(10))
def test_combinations_equal_their_definition(seed):
    draw = np.random.default_rng(seed)
    a, b = (draw.random(120) < draw.random() for _ in range(2))
    one, two = events(a), events(b)
    assert np.array_equal(mask(both(one, two)), a & b)
    assert np.array_equal(mask(either(one, two)), a | b)
    want = [r for r in one.frames.tolist() if b[r[0] : r[1]].any()]
    assert overlap(one, two).frames.tolist() == want
    for within in (0, 3):
        starts = two.frames[:, 0]
        want = [r for r in one.frames.tolist() if any(0 <= s - r[1] <= within for s in starts)]
        assert before(one, two, within).frames.tolist() == want


def test_short_events_go_after_gaps_are_closed():
    one = np.array([c == "#" for c in "##.##....#..###"])
    assert events(one).frames.tolist() == [[0, 2], [3, 5], [9, 10], [12, 15]]
    assert events(one, smooth=1).frames.tolist() == [[0, 5], [9, 10], [12, 15]]
    assert events(one, 4, 2).frames.tolist() == [[0, 5], [9, 15]]


def test_measures_by_hand():
    pose = walkers()
    assert pose.size(0) == 2
    np.testing.assert_allclose(pose.speed(0), 3)
    np.testing.assert_allclose(pose.speed(1), 0)
    np.testing.assert_allclose(pose.distance(0, 1)[:3], [10, 9.7, 9.4])
    np.testing.assert_allclose(pose.heading(1), math.pi / 2)
    np.testing.assert_allclose(pose.angle(0, 1)[:30], 0, atol=1e-9)
    np.testing.assert_allclose(pose.angle(1, 0)[:30], math.pi / 2)
    # Behind it, once it has run past.
    np.testing.assert_allclose(pose.angle(0, 1)[40:], math.pi)


def test_regions():
    pose = walkers()
    x = 3 * np.arange(60) / 10
    assert np.array_equal(pose.inside(0, "box"), (x > 3.1) & (x < 6.1))
    assert np.array_equal(pose.inside(0, "wedge"), (x > 0.1) & (x < 3.61))
    assert not pose.inside(1, "wedge").any()


def test_the_unseen_is_in_no_event():
    pose = walkers()
    pose.data[20:30, 0] = np.nan
    for found in (pose.speed(0) < 99, pose.distance(0, 1) < 99, pose.inside(0, "box")):
        assert not found[20:30].any() and found[:10].any() | found[10:20].any()
    # One keypoint of two is enough for a centre.
    pose.data[20:30, 0, 0] = 1.0
    assert not np.isnan(pose.distance(0, 1)).any()


def test_three_dimensions_and_one_frame():
    pose = Pose(np.ones((1, 1, 3, 3)), 30)
    assert pose.speed(0).tolist() == [0] and pose.centre(0).shape == (1, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda p: Pose(np.zeros((5, 2, 2)), 30),
            r"keypoints, 2 or 3\], not \[5, 2, 2\]",
        ),
        (lambda p: Pose(p.data, 0), "fps=0 must be above 0"),
        (lambda p: Pose(p.data, 9, front=5), "front=5, back=-1: there are 2 keypoints"),
        (lambda p: Pose(p.data, 9, regions={"r": [1, 2]}), "region 'r' is neither a box"),
        (lambda p: p.speed(2), "animal 2 is not tracked; there are 0 to 1"),
        (lambda p: p.speed("0"), "animal '0' must be a number"),
        (lambda p: p.inside(0, "bax"), "unknown region 'bax'; nearest known: box"),
        (lambda p: Pose(p.data, 9).inside(0, "x"), "none was given; pass regions="),
        (lambda p: events(p.speed(0)), r"events need a mask, bool\[T\], not float64\[60\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(UsageError, match=message):
        call(walkers())


def test_events_differ_by_length_of_the_recording():
    assert events(np.zeros(4, bool)) != events(np.zeros(5, bool))
    assert events(np.zeros(4, bool)) == Events(np.zeros((0, 2), np.int64), 4)
