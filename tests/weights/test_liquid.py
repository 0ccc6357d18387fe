"""The liquid: dynamics by hand, constant state, conductances, event streams, the head."""

import pytest
import torch
import torch.nn.functional as F

from holdfast.errors import UsageError
from holdfast.weights.liquid import (
    ConductancePairs,
    ContrastiveHead,
    LiquidStateMachine,
    Read,
    saccade_events,
    scanline_spikes,
)


def stream(steps=20, batch=3, channels=8, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.rand(batch, steps, channels, generator=random) < 0.2


def liquid(**options):
    return LiquidStateMachine(8, 32, 5, **{"gain": 0.5, **options})


def forward_ref(machine, events):
    """Readouts of one stream, neuron by neuron."""
    w_in, w_rec = machine.input.weight().tolist(), machine.recurrent.weight().tolist()
    n = machine.n
    v, z, r = [0.0] * n, [0.0] * n, [0.0] * n
    for x in events.tolist():
        v = [
            machine.beta * v[i]
            + sum(w * e for w, e in zip(w_in[i], x, strict=True))
            + sum(w * s for w, s in zip(w_rec[i], z, strict=True))
            - machine.theta * z[i]
            for i in range(n)
        ]
        z = [float(u > machine.theta) for u in v]
        r = [machine.gamma * a + b for a, b in zip(r, z, strict=True)]
    return r


def test_dynamics_equal_the_reference():
    machine = liquid(dtype=torch.float64, theta=0.7, beta=0.8)
    events = stream()
    got, _ = machine(events)
    want = [forward_ref(machine, one) for one in events]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
    assert got.any()


def test_state_bytes_are_the_formula_whatever_the_length():
    for steps in (1, 50):
        features, state = liquid()(stream(steps))
        assert sum(t.nbytes for t in state) == 4 * 3 * 3 * 32
        assert features is state.readout


def test_a_stream_in_pieces_is_the_same_stream():
    machine, events = liquid(), stream(20)
    whole, state = None, None
    for piece in (events[:, :7], events[:, 7:8], events[:, 8:]):
        whole, state = machine(piece, state)
    want, end = machine(events)
    assert torch.equal(whole, want) and all(map(torch.equal, state, end))


def test_features_are_deterministic_and_a_state_dict_of_16_bytes_restores_them():
    machine, events = liquid(), stream()
    want, _ = machine(events)
    assert torch.equal(liquid()(events)[0], want)
    assert not list(machine.parameters())
    kept = machine.state_dict()
    assert sum(t.nbytes for t in kept.values()) == 16
    other = LiquidStateMachine(8, 32, 6, gain=0.5)
    assert not torch.equal(other(events)[0], want)
    other.load_state_dict(kept)
    assert torch.equal(other(events)[0], want)


def test_events_as_bool_or_numbers_are_the_same():
    machine, events = liquid(), stream()
    assert torch.equal(machine(events)[0], machine(events.float())[0])


def test_conductances_are_positive_lognormal_and_their_difference_is_scaled():
    pairs = ConductancePairs(300, 300, 1, scale=0.2, spread=0.5)
    positive, negative = pairs.pair(0, 300, torch.device("cpu"))
    assert positive.min() > 0 and negative.min() > 0
    logs = torch.stack([positive, negative]).log()
    torch.testing.assert_close(logs.std(dim=(1, 2)), torch.full((2,), 0.5), atol=0.01, rtol=0)
    assert abs(torch.corrcoef(logs.flatten(1))[0, 1]) < 0.02
    assert pairs.weight().std().item() == pytest.approx(0.2, rel=0.02)
    assert torch.equal(pairs.rows(40, 50, torch.device("cpu")), pairs.weight()[40:50])


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_the_spectral_radius_and_sparsity_are_what_was_asked_for(sparsity):
    machine = LiquidStateMachine(8, 256, 0, spectral=0.9, sparsity=sparsity)
    weight = machine.recurrent.weight()
    assert (weight == 0).float().mean().item() == pytest.approx(sparsity, abs=0.01)
    assert torch.linalg.eigvals(weight).abs().max().item() == pytest.approx(0.9, rel=0.12)


def test_read_noise_is_fresh_relative_and_reproducible():
    machine, events = liquid(device_noise=0.05), stream(40)
    torch.manual_seed(1)
    one, two = machine(events)[0], machine(events)[0]
    torch.manual_seed(1)
    assert torch.equal(machine(events)[0], one) and not torch.equal(one, two)
    quiet = liquid()(events)[0]
    # Noise moves some spikes, and not what the features say.
    assert F.cosine_similarity(one, quiet).min() > 0.9


def test_read_noise_by_its_deviation():
    pairs = ConductancePairs(200, 200, 0, scale=1.0)
    read = Read(pairs, 0.1, torch.device("cpu"))
    positive, negative = pairs.pair(0, 200, torch.device("cpu"))
    # What two independent noises, each a tenth of its conductance, would move.
    want = 0.1 * (positive**2 + negative**2).mean().sqrt()
    torch.manual_seed(0)
    assert (read() - pairs.weight()).std().item() == pytest.approx(want.item(), rel=0.02)


def test_firing_rate_counts_spikes():
    machine, events = liquid(gamma=0.0), stream(6)
    spikes = [machine(events[:, : t + 1])[0].mean().item() for t in range(6)]
    assert machine.firing_rate(events) == pytest.approx(sum(spikes) / 6)
    assert machine.firing_rate(torch.zeros_like(events)) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"theta": 0.0}, "theta=0.0 makes every neuron fire at rest"),
        ({"theta": -1.0}, "theta=-1.0"),
        ({"beta": 1.0}, r"beta=1.0 is outside \[0, 1\)"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"device_noise": -0.1}, "device_noise=-0.1 is negative"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        liquid(**options)


def test_bad_events_are_refused():
    with pytest.raises(UsageError, match="must be 0 or 1"):
        liquid()(stream().float() * 0.5)
    with pytest.raises(UsageError, match=r"expected \(B, T, 8\)"):
        liquid()(stream(channels=7))


def test_a_saccade_fires_on_where_a_dot_comes_and_off_where_it_leaves():
    image = torch.zeros(1, 2, 2)
    image[0, 0, 0] = 1
    events = saccade_events(image, steps=4, travel=1, threshold=0.4).view(4, 2, 3, 3)
    # Two steps right, then two down; each half step brings half the brightness.
    for step, (leaves, comes) in enumerate([((0, 0), (0, 1))] * 2 + [((0, 1), (1, 1))] * 2):
        on, off = events[step].nonzero().tolist()
        assert on == [0, *comes] and off == [1, *leaves]


def test_a_still_scene_without_contrast_has_no_events():
    assert not saccade_events(torch.zeros(2, 4, 4)).any()
    images = torch.rand(2, 4, 4)
    assert saccade_events(images, steps=30).shape == (2, 30, 2 * 7 * 7)


def test_scanlines_fire_as_often_as_pixels_are_bright():
    image = torch.tensor([[[0.0, 0.5], [0.25, 1.0]]])
    spikes = scanline_spikes(image, steps=16)
    assert spikes.shape == (1, 16, 2)
    counts = spikes.view(4, 4, 2).sum(1) / 4  # row, row, column, column
    assert torch.equal(counts, torch.cat([image[0], image[0].T]))


def test_images_that_cannot_be_scanned_are_refused():
    with pytest.raises(UsageError, match="8 or more"):
        scanline_spikes(torch.zeros(1, 4, 4), steps=7)
    with pytest.raises(UsageError, match="square"):
        scanline_spikes(torch.zeros(1, 4, 5))


def test_the_head_is_two_linear_maps_and_its_loss_the_symmetric_contrast():
    head = ContrastiveHead(6, 4, p=3, temperature=0.5)
    assert sum(p.nbytes for p in head.parameters()) == 4 * (6 + 4) * 3
    first, second = torch.randn(5, 6), torch.randn(5, 4)
    a, b = F.linear(first, head.first.weight), F.linear(second, head.second.weight)
    close = [[(F.cosine_similarity(u, v, dim=0) / 0.5).exp() for v in b] for u in a]
    losses = [
        -(close[i][i] / sum(close[i])).log() - (close[i][i] / sum(row[i] for row in close)).log()
        for i in range(5)
    ]
    torch.testing.assert_close(head(first, second), sum(losses) / 10)


def test_classes_are_those_whose_examples_are_nearest():
    head = ContrastiveHead(2, 2, p=2)
    for linear in (head.first, head.second):
        torch.nn.init.eye_(linear.weight)
    examples = torch.tensor([[1.0, 0.1], [5.0, -0.5], [0.0, 2.0]])
    found = head.classify(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), examples, torch.tensor([7, 7, 9]))
    assert found.tolist() == [7, 9]
