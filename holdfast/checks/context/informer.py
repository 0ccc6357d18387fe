"""Forecasts of hourly series: Informer, its twin with exact attention, and simple forecasters."""

import copy
import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.checks import Result, check
from holdfast.context.attention.informer import InformerForecaster
from holdfast.context.attention.probsparse import probsparse_attention
from holdfast.context.kernels import attention_with_lse
from holdfast.errors import UsageError
from holdfast.host import data_dir
from holdfast.meter import Meter

MONTH = 30 * 24
BATCH, LR = 32, 2e-3
SMALL: dict[str, Any] = {"d_model": 64, "heads": 4, "d_ff": 128, "dropout": 0.1}
# Neighbouring windows are almost equal; 5 shares no factor with the hours of a day.
STRIDE = 5
LOOKBACKS, STRENGTHS = (48, 96, 168, 336), (1.0, 1e2, 1e3, 1e4)
LAGS = range(1, 169)
Forecaster = Callable[[Tensor], Tensor]  # first steps (N,) -> (N,pred_len,C)
Part = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Series:
    """values (T,C), standardised on the training part; marks (T,4); where two parts end."""

    values: Tensor
    marks: Tensor
    train: int
    val: int

    def starts(self, part: Part, lookback: int, ahead: int) -> Tensor:
        """(N,) first steps to forecast: `lookback` steps before, `ahead` within the part."""
        ends = {"train": (0, self.train), "val": (self.train, self.val)}
        first, last = ends.get(part, (self.val, len(self.values)))
        return torch.arange(max(first, lookback), last - ahead + 1)


def standardise(values: Tensor, train: int) -> Tensor:
    """Mean 0 and variance 1 in the first `train` steps; a constant column becomes 0."""
    mean, std = values[:train].mean(0), values[:train].std(0)
    return (values - mean) / torch.where(std > 1e-9 * mean.abs(), std, 1)


def time_marks(start: datetime, hours: int) -> Tensor:
    """(T,4): hour, weekday, day of the month and of the year, each in [-0.5, 0.5]."""
    times = [start + timedelta(hours=i) for i in range(hours)]
    rows = [
        (t.hour / 23, t.weekday() / 6, (t.day - 1) / 30, (t.timetuple().tm_yday - 1) / 365)
        for t in times
    ]
    return torch.tensor(rows) - 0.5


def etth1() -> Series:
    """Seven hourly columns of a transformer station: 12 months to train, 4 and 4 to judge."""
    path = data_dir() / "ett" / "ETTh1.csv"
    if not path.is_file():
        raise UsageError(f"{path} is missing; put ETTh1.csv there or set HOLDFAST_DATA")
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1 : 20 * MONTH + 1]
    values = torch.tensor([[float(x) for x in row[1:]] for row in rows], dtype=torch.float64)
    marks = time_marks(datetime.fromisoformat(rows[0][0]), len(rows))
    return Series(standardise(values, 12 * MONTH).float(), marks, 12 * MONTH, 16 * MONTH)


def periodic(seed: int, columns: int = 4, hours: int = 6000) -> Series:
    """Sums of two waves, of 24 and of 60 hours, with a noise of a tenth of their variance."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(hours)[:, None]
    draw = lambda: torch.rand(columns, generator=generator)  # noqa: E731
    waves = [(0.5 + draw()) * torch.sin(2 * math.pi * (t / period + draw())) for period in (24, 60)]
    clean = torch.stack(waves).sum(0)
    noise = torch.randn(clean.shape, generator=generator) * clean.std(0) * 0.1**0.5
    train, val = hours * 6 // 10, hours * 8 // 10
    marks = time_marks(datetime(2020, 1, 1), hours)
    return Series(standardise(clean + noise, train), marks, train, val)


@dataclass(frozen=True)
class Task:
    """`pred_len` steps of a series to forecast from `seq_len`, after `steps` of training."""

    series: Series
    seq_len: int
    pred_len: int
    steps: int

    def window(self, at: Tensor, before: int, after: int) -> Tensor:
        """(N,before+after) places around first steps `at` (N,)."""
        return at[:, None] + torch.arange(-before, after)

    def inputs(self, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        past = self.window(at, self.seq_len, 0)
        series = self.series
        return series.values[past], series.marks[past], series.marks[self.truth_at(at)]

    def truth_at(self, at: Tensor) -> Tensor:
        return self.window(at, 0, self.pred_len)

    @torch.no_grad()
    def mse(self, forecast: Forecaster, part: Part = "test", stride: int = STRIDE) -> float:
        """Over windows of a part and all columns, in units of the training part's variance."""
        errors = []
        for at in self.series.starts(part, max(LOOKBACKS), self.pred_len)[::stride].split(128):
            truth = self.series.values[self.truth_at(at)]
            errors.append((forecast(at) - truth).square().mean((1, 2)))
        return torch.cat(errors).mean().item()

    def last(self, at: Tensor) -> Tensor:
        return self.series.values[at - 1][:, None]

    def seasonal(self, lag: int) -> Forecaster:
        """The value `lag` steps before, or the latest known one a multiple of it before."""
        ahead = torch.arange(self.pred_len)
        back = lag * (ahead // lag + 1)
        return lambda at: self.series.values[at[:, None] + ahead - back]

    def linear(self, lookback: int, strength: float) -> Forecaster:
        """Ridge regression of what follows on what was, both relative to the last known value.

        Columns share the weights.
        """
        gram = torch.zeros(lookback + self.pred_len, lookback + self.pred_len, dtype=torch.float64)
        values = self.series.values[: self.series.train]
        for column in values.T:
            windows = column.unfold(0, lookback + self.pred_len, 1)
            relative = (windows - windows[:, lookback - 1 : lookback]).double()
            gram += relative.T @ relative
        known, cross = gram[:lookback, :lookback], gram[:lookback, lookback:]
        weights = torch.linalg.solve(known + strength * torch.eye(lookback), cross).float()

        def forecast(at: Tensor) -> Tensor:
            past = self.series.values[self.window(at, lookback, 0)]  # (N,lookback,C)
            return ((past - past[:, -1:]).mT @ weights).mT + past[:, -1:]

        return forecast

    def informer(self, attention: Literal["prob", "full"], seed: int) -> Forecaster:
        """Trained; of four states on the way the one that is best on the validation part."""
        torch.manual_seed(seed)
        model = InformerForecaster(
            self.series.values.shape[1],
            self.series.marks.shape[1],
            seq_len=self.seq_len,
            label_len=self.seq_len // 2,
            pred_len=self.pred_len,
            attention=attention,
            **SMALL,
        )
        forecast = lambda at: model(*self.inputs(at))  # noqa: E731
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=self.steps)
        starts = self.series.starts("train", self.seq_len, self.pred_len)
        draws = torch.Generator().manual_seed(seed)
        best, state = math.inf, model.state_dict()
        for step in range(1, self.steps + 1):
            at = starts[torch.randint(len(starts), (BATCH,), generator=draws)]
            loss = F.mse_loss(forecast(at), self.series.values[self.truth_at(at)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            if step % (self.steps // 4) == 0:
                model.eval()
                val = self.mse(forecast, "val", 4 * STRIDE + 1)
                model.train()
                if val < best:
                    best, state = val, copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        model.eval()
        return forecast

    def best(self, candidates: Iterable[Forecaster]) -> Forecaster:
        """The one that is best on the validation part."""
        return min(candidates, key=lambda each: self.mse(each, "val", 4 * STRIDE + 1))

    def compare(self, seed: int, stride: int) -> dict[str, float]:
        forecasters = {
            "informer": self.informer("prob", seed),
            "dense_twin": self.informer("full", seed),
            "last_value": self.last,
            "seasonal_naive": self.best(self.seasonal(lag) for lag in LAGS),
            "linear": self.best(self.linear(n, s) for n in LOOKBACKS for s in STRENGTHS),
        }
        return {name: self.mse(each, stride=stride) for name, each in forecasters.items()}


def peak(attention: Callable[[Tensor, Tensor, Tensor], Tensor], n: int) -> int:
    """Bytes that forward and backward of one head take at their peak, beside q, k and v."""
    given = [torch.randn(1, 1, n, 64, requires_grad=True) for _ in range(3)]
    torch.autograd.grad(attention(*given).sum(), given)
    with Meter(inputs=given) as meter:
        torch.autograd.grad(attention(*given).sum(), given)
    return meter.peak - meter.base


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@check(
    "informer",
    claim="on ETTh1, horizons 24 and 168, errs less than the last value and at most 1.1 x its twin "
    "with dense attention; on a series of two periods less than a tuned seasonal naive forecast, "
    "too; attention takes at most 0.2 x the bytes of plain attention at 4,096, and n log n",
)
def run(seed: int, full: bool = False) -> Result:
    etth, waves = etth1(), periodic(seed)
    more, stride = (8, 1) if full else (1, STRIDE)
    tasks = {
        "etth1_24": Task(etth, 96, 24, 160 * more),
        "etth1_168": Task(etth, 168, 168, 80 * more),
        "periodic_96": Task(waves, 96, 96, 200 * more),
    }
    with torch.random.fork_rng(devices=[]):
        errors = {name: task.compare(seed, stride) for name, task in tasks.items()}
        short, long = (peak(probsparse_attention, n) for n in (1024, 4096))
        dense = peak(plain, 4096)
        exact = peak(lambda q, k, v: attention_with_lse(q, k, v)[0], 4096)
    growth = long / short
    n_log_n = 4 * math.log(4096) / math.log(1024)
    ours = {name: of.pop("informer") for name, of in errors.items()}
    beats = all(
        mse < errors[name]["last_value"] and mse <= 1.1 * errors[name]["dense_twin"]
        for name, mse in ours.items()
    )
    seasonal = ours["periodic_96"] <= errors["periodic_96"]["seasonal_naive"]
    return Result(
        measured={
            **{f"{name}_mse": mse for name, mse in ours.items()},
            "attention_bytes_at_4096": long,
            "growth_from_1024": growth,
        },
        baseline={
            **{f"{name}_{who}": mse for name, of in errors.items() for who, mse in of.items()},
            "plain_attention_bytes_at_4096": dense,
            "exact_chunked_attention_bytes_at_4096": exact,
            "growth_of_n_log_n": n_log_n,
        },
        threshold="each mse < last value and <= 1.1 x dense twin; periodic_96 <= seasonal naive; "
        "bytes at 4096 <= 0.2 x plain attention, growth <= that of n log n",
        passed=beats and seasonal and long <= 0.2 * dense and growth <= n_log_n,
    )
