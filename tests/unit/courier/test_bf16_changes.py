"""bf16 without torch, against torch; and what changes in it lose over a run's snapshots."""

from __future__ import annotations

import numpy as np
import torch

from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.bf16 import from_bf16, round_in_place, round_to_bf16
from sidecast.trainer.courier.reconstruction import Reconstruction

NUM_ELEMENTS = 300_001


def test_rounds_as_torch_does() -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 1 << 20, dtype=np.uint64).astype(np.uint32)
    special = np.array([0, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x3F808000, 0x3F818000])
    values = np.concatenate([bits, special.astype(np.uint32)]).view(np.float32)
    ours = from_bf16(round_to_bf16(values))
    theirs = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    is_nan = np.isnan(values)
    assert np.isnan(ours[is_nan]).all()
    assert (ours[~is_nan].view(np.uint32) == theirs[~is_nan].view(np.uint32)).all()


def test_what_was_rounded_in_place_travels_exactly() -> None:
    values = np.random.default_rng(1).standard_normal(NUM_ELEMENTS).astype(np.float32)
    expected = from_bf16(round_to_bf16(values))
    round_in_place(values)
    assert (values == expected).all()
    assert (from_bf16(round_to_bf16(values)) == values).all()


def test_errors_do_not_add_up_over_snapshots() -> None:
    """As training moves: a drift of a thousandth of the weights per interval, with noise."""
    generator = np.random.default_rng(2)
    state = (0.02 * generator.standard_normal(NUM_ELEMENTS)).astype(np.float32)
    drift = (1e-5 * generator.standard_normal(NUM_ELEMENTS)).astype(np.float32)
    reconstruction = Reconstruction(state.nbytes)
    held = np.zeros_like(state)
    errors, plain_errors = [], []
    states = []
    for step in range(20):
        state = state + drift + (3e-6 * generator.standard_normal(NUM_ELEMENTS)).astype(np.float32)
        states.append(state)
        view = memoryview(state).cast("B")
        key = pb.ChunkKey(session_id="s", id=step, dtype=pb.FP32 if step == 0 else pb.BF16)
        if step == 0:
            held[:] = state
        else:
            # As the service does, in two chunks.
            half = NUM_ELEMENTS // 2 * 2
            for start, length in ((0, half), (half, 2 * NUM_ELEMENTS - half)):
                change = np.frombuffer(reconstruction.change(view, start, length), np.uint16)
                held[start // 2 : (start + length) // 2] += from_bf16(change)
        reconstruction.follow(key, view, b"")
        assert (reconstruction._values_N == held).all()
        if step >= 5:
            window = np.abs(state - states[step - 4]).mean()
            errors.append(np.abs(held - state).mean() / window)
            rounded = from_bf16(round_to_bf16(state))
            plain_errors.append(np.abs(rounded - state).mean() / window)
    assert max(errors) < 0.005
    # The last is no worse than the first: nothing is left behind.
    assert errors[-1] < 1.5 * errors[0]
    # Rounded weights would lose a good part of the change itself.
    assert min(plain_errors) > 20 * max(errors)
