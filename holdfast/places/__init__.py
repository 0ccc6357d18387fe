"""Where bytes lie: arenas with a hard cap, and the store that moves activations into them."""

from holdfast.places.activations import ActivationStore
from holdfast.places.arena import Arena, ArenaFull, HostArena
from holdfast.places.disk import DiskArena
from holdfast.places.offload import offload
from holdfast.places.spans import SavedTensorChanged, State

__all__ = [
    "ActivationStore",
    "Arena",
    "ArenaFull",
    "DiskArena",
    "HostArena",
    "SavedTensorChanged",
    "State",
    "offload",
]
