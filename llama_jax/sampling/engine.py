"""Continuous batching: a fixed number of slots decode together, and a finished answer's slot takes the next request.

    engine = Engine(config, weights, EngineConfig(slots=16, max_length=1024), compute=compute)
    request = engine.submit(prompt, max_tokens=100, choice=Choice(temperature=0.6), on_token=print)
    while engine.step(): ...

Prompts enter in chunks between the decoding steps of the others, and take over what some slot already holds of their
beginning (a system prompt, the dialog so far, the same prompt asked K times). All programs are compiled by `warm_up`; none is
compiled later. The engine knows token ids only, and belongs to one thread.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import jax
import numpy as np

from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.decode import Prepared
from llama_jax.model.decode_attention import round_up
from llama_jax.parallel.axes import batch_shards
from llama_jax.sampling import slots as device
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.generate import row_keys


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The shapes of an engine; each is compiled once.

    slots: requests that decode together.
    max_length: tokens of prompt and answer that a slot holds.
    chunks: (length, prompts) of each way in: the shortest length that holds what is left of a prompt takes it, else the
      longest takes a piece. It depends on the prompt alone, so that results do not depend on who else is waiting.
    steps: decoding steps between two looks of the host; 1 streams every token at once, more cost less overhead.
    reuse: take over a prefix of at least this many tokens from any slot; 0 never does. A taken-over prefix is equal to a
      computed one up to rounding.
    """

    slots: int = 8
    max_length: int = 2048
    chunks: tuple[tuple[int, int], ...] = ((32, 4), (256, 1))
    steps: int = 8
    reuse: int = 16

    def __post_init__(self):
        if self.slots < 1 or self.max_length < 2 or self.steps < 1 or not self.chunks or min(map(min, self.chunks)) < 1:
            raise ValueError(f"engine: expected positive sizes, got {self}")


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and what was drawn for it so far."""

    prompt: Sequence[int]
    max_tokens: int
    choice: Choice
    key: np.ndarray  # data of a PRNG key
    stop_ids: tuple[int, ...]
    on_token: Callable[["Request", int], None] | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    finish: Literal["", "stop", "length", "cancelled"] = ""
    slot: int = -1
    filled: int = 0  # tokens of the prompt that are in the slot
    reused: int = 0  # of those, taken over


class Engine:
    """Slots, the requests in them and those that wait. Call it inside `jax.set_mesh`, on any mesh."""

    def __init__(self, config: ModelConfig, weights: Prepared, settings: EngineConfig, *, compute: Compute):
        """`weights` come from `model.decode.prepare`; a new policy's may take their place later (`self.weights`)."""
        if settings.max_length > config.max_length:
            raise ValueError(f"engine: max_length {settings.max_length} exceeds the model's context of {config.max_length}")
        self.config, self.settings, self.weights = config, settings, weights
        self.waiting: collections.deque[Request] = collections.deque()
        self._chunks = sorted(settings.chunks)
        self._requests: list[Request | None] = [None] * settings.slots
        self._held: list[list[int]] = [[] for _ in range(settings.slots)]  # the tokens in each slot's cache
        self._used = [0] * settings.slots  # when each slot was last taken
        self._clock = 0
        self._stale: set[int] = set()  # cancelled, but active on the device
        self.reused_tokens = self.prefilled_tokens = self.drawn_tokens = 0

        def empty():
            return device.empty_slots(
                config, batch=settings.slots, slots=round_up(settings.max_length), dtype=compute.activation_dtype
            )

        mesh = jax.sharding.get_mesh()
        if not mesh.empty and settings.slots % batch_shards(mesh):
            raise ValueError(f"engine: {settings.slots} slots do not divide over {batch_shards(mesh)} shards of the batch")
        # Without fixed layouts of its state, a program would be compiled again for what another one returned.
        own = None if mesh.empty else device.shardings(jax.eval_shape(empty), mesh)
        pair = None if mesh.empty else (own, None)

        def program(function, out, **options):
            return jax.jit(function, out_shardings=out, **options)

        self._slots = program(empty, own)()
        self._admit = program(device.make_admit(config, compute=compute), pair, donate_argnums=1)
        self._decode = program(device.make_decode(config, compute=compute, steps=settings.steps), pair, donate_argnums=1)
        self._copy = program(device.copy_rows, own, donate_argnums=0)
        self._set_seen = program(device.set_seen, own, donate_argnums=0)
        self._deactivate = program(device.deactivate, own, donate_argnums=0)

    # ---- requests ----

    def submit(
        self, prompt: Sequence[int], *, max_tokens: int, choice: Choice | None = None, seed: int = 0, index: int = 0,
        key: np.ndarray | None = None, stop_ids: Sequence[int] = (), on_token: Callable[[Request, int], None] | None = None,
    ) -> Request:  # fmt: skip
        """Queues a prompt. Its draws depend on (seed, index), or `key`, alone; `on_token` is called for each token drawn.

        Raises:
          ValueError: a prompt that does not fit with its answer, ids outside the vocabulary, impossible settings.
        """
        prompt, room, V = [int(token) for token in prompt], self.settings.max_length - max_tokens, self.config.vocab_size
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
        if not 0 < len(prompt) <= room:
            raise ValueError(
                f"prompt: has {len(prompt)} tokens; expected 1 to {max(room, 0)}, since the context of "
                f"{self.settings.max_length} also holds max_tokens={max_tokens}"
            )
        if not 0 <= min(prompt) <= max(prompt) < V:
            raise ValueError(f"prompt: expected ids in 0..{V - 1}, got {min(prompt)}..{max(prompt)}")
        if len(stop_ids) > device.STOPS:
            raise ValueError(f"stop_ids: expected at most {device.STOPS}, got {len(stop_ids)}")
        if key is None:
            key = key_data(seed, [index])[0]
        choice = Choice() if choice is None else choice.check()
        request = Request(prompt, max_tokens, choice, np.asarray(key), tuple(map(int, stop_ids)), on_token)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request now; its slot is free for others."""
        if request.finish:
            return
        request.finish = "cancelled"
        if request.slot < 0:
            self.waiting.remove(request)
        else:
            self._stale.add(request.slot)
            self._requests[request.slot] = None

    @property
    def active(self) -> int:
        """Requests that sit in a slot."""
        return sum(request is not None for request in self._requests)

    @property
    def compilations(self) -> int:
        """Programs compiled so far. It does not grow after `warm_up`."""
        programs = (self._admit, self._decode, self._copy, self._set_seen, self._deactivate)
        return sum(program._cache_size() for program in programs)

    def warm_up(self) -> "Engine":
        """Compiles every program, on no request."""
        for length, prompts in self._chunks:
            self._slots, _ = self._admit(self.weights, self._slots, self._entries([], length, prompts))
        self._slots, _ = self._decode(self.weights, self._slots, np.int32(1), np.int32(0))
        for prompts in {prompts for _, prompts in self._chunks}:
            self._copy_rows([], prompts)
        self._mark(0, [])
        self._slots = self._deactivate(self._slots, np.zeros((self.settings.slots,), bool))
        return self

    # ---- one round ----

    def step(self) -> bool:
        """Admits what there is room for (one chunk), then decodes; False if there was nothing to do."""
        if self._stale:
            rows = np.zeros((self.settings.slots,), bool)
            rows[list(self._stale)] = True
            self._slots = self._deactivate(self._slots, rows)
            self._stale.clear()
        while entering := self._next_chunk():  # short prompts all at once; a long one lets the others go on in between
            self._run_chunk(entering)
            if any(request.filled < len(request.prompt) for request in entering):
                break
        decoding = [request for request in self._requests if request and request.filled == len(request.prompt)]
        if not decoding:
            return self.active > 0 or bool(self.waiting)
        # With others waiting, stop as soon as a batch of slots is free for them.
        enough = min(len(self.waiting), max(prompts for _, prompts in self._chunks))
        until = max(len(decoding) - enough, 0) if enough else 0
        filling = self.active > len(decoding)
        most = 1 if filling else self.settings.steps
        self._slots, drawn = self._decode(self.weights, self._slots, np.int32(most), np.int32(until))
        drawn = jax.device_get(drawn)
        for slot, request in enumerate(self._requests):
            if request and request.filled == len(request.prompt):
                self._take(request, drawn, slot)
        return True

    def run(self, requests: Iterable[Request], *, progress: Callable[[int], None] | None = None) -> list[Request]:
        """Works until the given requests are finished; gives them back. `progress` is told how many just were."""
        requests = list(requests)
        done = 0
        while (found := sum(bool(request.finish) for request in requests)) < len(requests):
            if progress and found > done:
                progress(found - done)
            done = found
            if not self.step():
                raise RuntimeError("the engine is idle, but not all of the requests were submitted to it")
        if progress and found > done:
            progress(found - done)
        return requests

    # ---- admission ----

    def _next_chunk(self) -> list[Request]:
        """The requests whose next pieces of prompt enter together: of one shape, unfinished ones first."""
        group = [request for request in self._requests if request and request.filled < len(request.prompt)]
        if group:
            shape = self._shape(group[0])
            return [request for request in group if self._shape(request) == shape][: shape[1]]
        shape, copies = None, []
        for request in list(self.waiting):
            free = [slot for slot in range(self.settings.slots) if self._requests[slot] is None]
            if not free:
                break
            slot, source, common = self._best_slot(request, free)
            left = len(request.prompt) - common
            this = next((chunk for chunk in self._chunks if chunk[0] >= left), self._chunks[-1])
            if shape is None:
                shape = this
            together = (_common(request.prompt, other.prompt) for other in group)
            worth = self.settings.reuse and max(together, default=0) >= max(common, self.settings.reuse)
            # One whose beginning is just being computed by another comes next, and takes it over.
            if this != shape or worth:
                continue
            self.waiting.remove(request)
            self._seat(request, slot, common)
            if source != slot and common:
                copies.append((source, slot))
            group.append(request)
            if len(group) == shape[1]:
                break
        if copies:
            self._copy_rows(copies, shape[1])
        return group

    def _shape(self, request: Request) -> tuple[int, int]:
        left = len(request.prompt) - request.filled
        return next((chunk for chunk in self._chunks if chunk[0] >= left), self._chunks[-1])

    def _best_slot(self, request: Request, free: list[int]) -> tuple[int, int, int]:
        """(slot to sit in, slot to take the beginning from, how much of it)."""
        oldest = min(free, key=lambda slot: self._used[slot])
        if not self.settings.reuse:
            return oldest, oldest, 0
        # The last token is always computed: its logits are wanted.
        commons = [min(_common(request.prompt, held), len(request.prompt) - 1) for held in self._held]
        source = max(range(self.settings.slots), key=lambda slot: (commons[slot], slot in free))
        if commons[source] < self.settings.reuse:
            return oldest, oldest, 0
        return (source if source in free else oldest), source, commons[source]

    def _seat(self, request: Request, slot: int, common: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock
        self._requests[slot] = request
        self._held[slot] = list(request.prompt[:common])
        request.slot, request.filled, request.reused = slot, common, common
        self.reused_tokens += common
        if request.choice.repetition_penalty != 1:
            self._mark(slot, request.prompt)

    def _run_chunk(self, group: list[Request]) -> None:
        length, prompts = self._shape(group[0])
        self._slots, drawn = self._admit(self.weights, self._slots, self._entries(group, length, prompts))
        for request in group:
            piece = request.prompt[request.filled : request.filled + length]
            self._held[request.slot] += piece
            request.filled += len(piece)
            self.prefilled_tokens += len(piece)
        if any(request.filled == len(request.prompt) for request in group):
            drawn = jax.device_get(drawn)
            for row, request in enumerate(group):
                if request.filled == len(request.prompt):
                    self._take(request, drawn, row)

    def _entries(self, group: list[Request], length: int, prompts: int) -> device.Entries:
        """Arrays of the next pieces of prompts; what is not taken lies outside the slots."""
        G, key_shape = prompts, self._slots.keys.shape[1:]
        entries = device.Entries(
            rows=np.full((G,), self.settings.slots, np.int32), tokens=np.zeros((G, length), np.int32),
            counts=np.zeros((G,), np.int32), starts=np.zeros((G,), np.int32), final=np.zeros((G,), bool),
            limit=np.zeros((G,), np.int32), keys=np.zeros((G, *key_shape), np.uint32),
            choice=Choice(
                temperature=np.zeros((G,), np.float32), top_k=np.zeros((G,), np.int32), top_p=np.ones((G,), np.float32),
                min_p=np.zeros((G,), np.float32), repetition_penalty=np.ones((G,), np.float32),
            ),
            stops=np.full((G, device.STOPS), -1, np.int32),
        )  # fmt: skip
        for i, request in enumerate(group):
            piece = request.prompt[request.filled : request.filled + length]
            entries.rows[i], entries.counts[i], entries.starts[i] = request.slot, len(piece), request.filled
            entries.tokens[i, : len(piece)] = piece
            entries.final[i] = request.filled + len(piece) == len(request.prompt)
            entries.limit[i], entries.keys[i] = request.max_tokens, request.key
            entries.stops[i, : len(request.stop_ids)] = request.stop_ids
            for field in dataclasses.fields(Choice):
                getattr(entries.choice, field.name)[i] = getattr(request.choice, field.name)
        return entries

    def _copy_rows(self, pairs: list[tuple[int, int]], size: int) -> None:
        sources, rows = np.zeros((size,), np.int32), np.full((size,), self.settings.slots, np.int32)
        for i, (source, row) in enumerate(pairs):
            sources[i], rows[i] = source, row
        self._slots = self._copy(self._slots, sources, rows)

    def _mark(self, slot: int, prompt: Sequence[int]) -> None:
        tokens = np.zeros((self.settings.max_length,), np.int32)
        tokens[: len(prompt)] = prompt
        self._slots = self._set_seen(self._slots, np.int32(slot), tokens, np.int32(len(prompt)))

    # ---- results ----

    def _take(self, request: Request, drawn: device.Drawn, row: int) -> None:
        """Hands out what a row drew; frees its slot if that was all."""
        new = drawn.tokens[row][drawn.mask[row]].tolist()
        log_probs = drawn.log_probs[row][drawn.mask[row]].tolist()
        self.drawn_tokens += len(new)
        # The cache holds all but the newest token.
        self._held[request.slot] += [*request.tokens[-1:], *new[:-1]]
        finished = not drawn.active[row]
        for i, (token, log_p) in enumerate(zip(new, log_probs)):
            request.tokens.append(token)
            request.log_probs.append(log_p)
            if finished and i == len(new) - 1:
                request.finish = "stop" if token in request.stop_ids else "length"
            if request.on_token:
                request.on_token(request, token)
            if request.finish == "cancelled":  # by the callback
                return
        if request.finish:
            self._requests[request.slot] = None


def key_data(seed: int, indices: Sequence[int]) -> np.ndarray:
    """The PRNG keys of `generate.row_keys` as plain numbers. # uint32 [B, ...]"""
    return np.asarray(jax.random.key_data(row_keys(seed, indices)))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common beginning."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))
