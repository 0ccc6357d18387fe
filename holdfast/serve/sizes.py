"""What a request takes of the budget, known before anything of it is allocated."""

import math

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from holdfast.context.attention.relay import PrefixRegistry, SharedPrefix
from holdfast.context.cache.bounded import BoundedCache, default_chunk
from holdfast.context.cache.policy import CachePolicy
from holdfast.errors import DoesNotFit, UsageError
from holdfast.forms.base import Form
from holdfast.units import format_bytes

# Tokens of a prompt that are read between two decode steps of the others.
CHUNK = 128
# Requests that a budget is divided by, where nobody says how many tokens each may keep.
SHARES = 8
# Where a policy drops entries, a text may be as long as this unless told otherwise.
LONGEST = 1 << 17
# Tokens beyond which bytes grow evenly.
MANY = 1 << 12


class Sizes:
    """Divides a budget among requests and shared prefixes, and makes their caches.

    Args:
        budget: bytes of all caches together, at any time.
        policy: one that drops nothing gives each request room for all its tokens, the others
            `tokens_per_request` entries however long it is.
        tokens_per_request: by default what an eighth of the budget holds.
        prefix_budget: the part of the budget that is for shared prefixes; 0 shares none.
        longest: tokens of a prompt and its answer at most; by default what the model was made for,
            or `LONGEST` where a policy drops entries.

    Raises:
        DoesNotFit: not even one request fits.
        UsageError: options that do not go together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        budget: int,
        policy: CachePolicy,
        *,
        tokens_per_request: int | None = None,
        prefix_budget: int | None = None,
        longest: int | None = None,
        form: Form | None = None,
    ):
        self.model, self.form, self.budget, self.policy = model, form, budget, policy
        self.grows = not policy.drops
        # A policy that looks several times would see the prefix as often; a sliding window may
        # hide it.
        layers = DynamicCache(config=model.config).layers
        shares = type(policy).attend is CachePolicy.attend and all(
            type(layer) is DynamicLayer for layer in layers
        )
        self.prefix_budget = (budget // 8 if prefix_budget is None else prefix_budget) * shares
        if not 0 <= self.prefix_budget < budget:
            raise UsageError(
                f"{format_bytes(self.prefix_budget)} for shared prefixes leave nothing of "
                f"{format_bytes(budget)}; give less, or 0"
            )
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", LONGEST)
        if self.grows:
            if tokens_per_request is not None:
                raise UsageError(
                    f"{policy!r} gives each request room for all its tokens; leave "
                    "tokens_per_request out, or choose a policy that drops entries"
                )
            probe = BoundedCache.for_model(model, policy, tokens=MANY, form=form)
            # Bytes grow with the tokens by steps and bends: a line above them all.
            steepest = probe.predict(2 * MANY, CHUNK) - probe.predict(MANY, CHUNK)
            self.unit = math.ceil(steepest / MANY)
            beside = max(probe.predict(n, CHUNK) - n * self.unit for n in range(MANY))
        else:
            share = self.for_requests // SHARES if tokens_per_request is None else None
            probe = BoundedCache.for_model(model, policy, budget=share, batch=1, form=form,
                                           tokens=tokens_per_request)  # fmt: skip
            self.unit = probe.shape.kv_bytes(1)
            beside, positions = 0, LONGEST
            self._fixed = probe.capacity
        self._scratch = math.ceil(beside / self.unit)
        self.size = None if self.grows else math.ceil(probe.peak_nbytes() / self.unit)
        # Where the cache gives positions, a text may be longer than the model has some for.
        self.longest = longest or positions
        if not policy.rotates:
            self.longest = min(self.longest, positions)
        least = (self._scratch + 2 if self.size is None else self.size) * self.unit
        if least > self.for_requests:
            error = DoesNotFit(
                f"one request needs {format_bytes(least)}, and {format_bytes(self.for_requests)} "
                "of the budget are for requests; raise it, or lower tokens_per_request"
            )
            error.details = {"needs_bytes": least}
            raise error

    @property
    def for_requests(self) -> int:
        return self.budget - self.prefix_budget

    def registry(self) -> PrefixRegistry | None:
        """Where prefixes are shared; None where they are not."""
        if not self.prefix_budget:
            return None
        return PrefixRegistry(self.model, self.prefix_budget, form=self.form)

    def tokens(self, prompt: int) -> int:
        """What a scheduler counts for a prompt, in units of one token's keys and values."""
        return prompt + self._scratch

    def output(self, prompt: int, wanted: int | None, default: int) -> int:
        """How many tokens may be produced after a prompt.

        Args:
            wanted: what a client asks for; None takes as much of `default` as fits.

        Raises:
            UsageError: more than the model or this server takes.
            DoesNotFit: more than the budget ever holds; `details["needs_bytes"]` would.
        """
        output = wanted or min(default, max(1, self.longest - prompt))
        if prompt + output > self.longest:
            raise UsageError(
                f"{prompt} tokens of prompt and {output} of output are {prompt + output}, at most "
                f"{self.longest} are possible; shorten the prompt or lower max_tokens"
            )
        if not self.grows:
            return output
        room = self.for_requests // self.unit - self._scratch - prompt
        if room < (wanted or 1):
            units = self._scratch + prompt + (wanted or 1)
            need = units * self.unit + self.prefix_budget
            error = DoesNotFit(
                f"{prompt} tokens of prompt and {wanted or 1} of output need a context budget of "
                f"{need} bytes ({format_bytes(need)}), this server has {self.budget} "
                f"({format_bytes(self.budget)}); shorten the prompt or lower max_tokens"
            )
            error.details = {"needs_bytes": need, "budget_bytes": self.budget}
            raise error
        return min(output, room)

    def cache(self, prefix: SharedPrefix | None, tokens: int) -> BoundedCache:
        """An empty cache; `tokens` is how many the request will have of its own, if it grows."""
        capacity = max(2, tokens) if self.grows else self._fixed
        chunk = min(CHUNK, default_chunk(capacity))
        if prefix is not None:
            return prefix.cache(1, tokens=capacity, policy=self.policy, chunk=chunk)
        return BoundedCache.for_model(
            self.model, self.policy, tokens=capacity, batch=1, form=self.form, chunk=chunk
        )
