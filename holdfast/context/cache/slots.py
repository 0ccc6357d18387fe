"""A fixed number of slots per row and head, for keys, values and what is known of them.

Everything lies in tensors (B,H|1,C,w) that are allocated once and changed in place, so that bytes
are constant and moving entries never needs a second copy of them.
"""

import torch
from torch import Tensor

from holdfast.errors import UsageError
from holdfast.forms.base import Form
from holdfast.forms.packed import Packed

# Entries that are encoded at a time: what bounds scratch.
PIECE = 16


class Slots:
    """Tensors by name, moved together.

    Args:
        batch, capacity: rows and slots per row.
        device: where numbers are needed.
        place: "device", or "host" to keep them in host memory (pinned where there is CUDA).
    """

    def __init__(self, batch: int, capacity: int, device: torch.device, place: str = "device"):
        self.batch, self.capacity, self.device, self.place = batch, capacity, device, place
        self.tensors: dict[str, Tensor] = {}
        self._forms: dict[str, tuple[Form | None, int, torch.dtype]] = {}

    def add(
        self, name: str, heads: int, width: int, dtype: torch.dtype, form: Form | None = None
    ) -> None:
        """Vectors of `width` elements; `form` says how they are written, None is as they are."""
        self._forms[name] = form, width, dtype
        home = self.device if self.place == "device" else torch.device("cpu")
        for part, (elements, kind) in columns(name, width, dtype, form).items():
            # Zeros: a slot that nobody has filled yet is hidden, but 0 times NaN would be NaN.
            self.tensors[part] = torch.zeros(
                self.batch, heads, self.capacity, elements, dtype=kind, device=home,
                pin_memory=self.place == "host" and self.device.type == "cuda",
            )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def write(self, name: str, start: int, x: Tensor) -> None:
        """x (B,H,n,w) into slots `start` and following of every row."""
        step = x.shape[2] if self._forms[name][0] is None else PIECE
        for at in range(0, x.shape[2], step):
            piece = x[:, :, at : at + step]
            to = slice(start + at, start + at + piece.shape[2])
            for part, values in self._encode(name, piece).items():
                self.tensors[part][:, :, to].copy_(values, non_blocking=True)

    def write_at(self, name: str, rows: Tensor, tokens: Tensor, slots: Tensor, x: Tensor) -> None:
        """Token tokens[i] of row rows[i] of x (B,H,n,w) into slot slots[i]; all (N,) int64."""
        for at in range(0, len(rows), PIECE):
            row, token, slot = (t[at : at + PIECE] for t in (rows, tokens, slots))
            for part, values in self._encode(name, x[row, :, token][None]).items():
                to = self.tensors[part]
                to[row.to(to.device), :, slot.to(to.device)] = values[0].to(to.device)

    def read(self, name: str, at: slice) -> Tensor:
        """(B,H,n,w) of a range of slots; a view where nothing has to be decoded or brought."""
        return self._decode(name, {part: self.tensors[part][:, :, at] for part in self._of(name)})

    def take(self, name: str, slots: Tensor, rows: slice = slice(None)) -> Tensor:
        """(R,H,n,w) of slots (R,H,n) int64, which heads may choose differently, of some rows."""
        parts = {}
        for part in self._of(name):
            tensor = self.tensors[part][rows]
            index = slots.to(tensor.device)[..., None].expand(-1, -1, -1, tensor.shape[3])
            parts[part] = tensor.gather(2, index)
        return self._decode(name, parts)

    def give(self, name: str, slots: Tensor, x: Tensor, rows: slice = slice(None)) -> None:
        """x (R,H,n,w) into slots (R,H,n) int64 of some rows."""
        for at in range(0, x.shape[2], PIECE):
            piece = slice(at, at + PIECE)
            for part, values in self._encode(name, x[:, :, piece]).items():
                tensor = self.tensors[part][rows]
                index = slots[:, :, piece, None].expand(-1, -1, -1, tensor.shape[3])
                values = values.to(tensor.device, tensor.dtype)
                tensor.scatter_(2, index.to(tensor.device), values)

    def _of(self, name: str) -> list[str]:
        form, width, dtype = self._forms[name]
        return list(columns(name, width, dtype, form))

    def _decode(self, name: str, parts: dict[str, Tensor]) -> Tensor:
        form, width, dtype = self._forms[name]
        parts = {part: t.to(self.device, non_blocking=True) for part, t in parts.items()}
        if form is None:
            return parts[name]
        shape = (*next(iter(parts.values())).shape[:3], width)
        buffers = {
            part.removeprefix(f"{name}."): t.reshape(-1, t.shape[-1]) for part, t in parts.items()
        }
        return form.decode(Packed.from_buffers(form, shape, dtype, buffers))

    def move(self, source: Tensor) -> None:
        """Slot t becomes what is in slot source[..., t]: source (B,H|1,K) int64 ascending.

        Raises:
            UsageError: heads choose differently, but a tensor is shared by heads.
        """
        for name, tensor in self.tensors.items():
            if tensor.shape[1] == 1 and source.shape[1] > 1:
                raise UsageError(f"{name} is shared by heads, which keep different entries")
            at = source.to(tensor.device).expand(-1, tensor.shape[1], -1)
            # What a block reads lies at its own slots or behind them, so blocks before it can be
            # overwritten already.
            step = block(self.capacity)
            for start in range(0, at.shape[2], step):
                index = at[:, :, start : start + step, None].expand(-1, -1, -1, tensor.shape[3])
                tensor[:, :, start : start + index.shape[2]] = tensor.gather(2, index)

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] is: (B,) int64."""
        for tensor in self.tensors.values():
            index = rows.to(tensor.device)
            for start in range(0, self.capacity, block(self.capacity)):
                part = tensor[:, :, start : start + block(self.capacity)]
                part.copy_(part.index_select(0, index))

    def select(self, rows: Tensor) -> None:
        """Other rows, of which there may be fewer: the only change that allocates."""
        self.batch = len(rows)
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.index_select(0, rows.to(tensor.device))

    def _encode(self, name: str, x: Tensor) -> dict[str, Tensor]:
        form, _, dtype = self._forms[name]
        if form is None:
            return {name: x}
        buffers = form.encode(x.to(dtype).contiguous(), check=False).to_buffers()
        return {f"{name}.{part}": t.view(*x.shape[:3], -1) for part, t in buffers.items()}


def block(capacity: int) -> int:
    """Entries that are moved at a time."""
    return min(capacity, max(64, capacity // 16))


def columns(
    name: str, width: int, dtype: torch.dtype, form: Form | None
) -> dict[str, tuple[int, torch.dtype]]:
    """What one vector takes: tensor -> (elements, dtype).

    Raises:
        UsageError: the form does not write every vector on its own.
    """
    if form is None:
        return {name: (width, dtype)}
    found = {}
    for part, (shape, kind) in form.layout(torch.Size((3, width)), dtype).items():
        if len(shape) != 2 or shape[0] != 3:
            raise UsageError(
                f"{form} shares {part!r} between vectors, which a cache cannot keep apart; "
                f"use Int8() or Int4(group={width}), which write every vector on its own"
            )
        found[f"{name}.{part}"] = shape[1], kind
    return found


def vector_nbytes(width: int, dtype: torch.dtype, form: Form | None = None) -> int:
    """Bytes of one vector of `width` elements."""
    return sum(n * kind.itemsize for n, kind in columns("", width, dtype, form).values())


def write_scratch(batch: int, heads: int, width: int, dtype: torch.dtype, form: Form | None) -> int:
    """Bytes that writing holds beside the slots: a piece, encoded from up to five fp32 copies."""
    elements = batch * heads * PIECE * width
    return elements * dtype.itemsize if form is None else elements * (dtype.itemsize + 5 * 4)
