"""Continuous batching: a fixed number of slots decode together, and a finished answer's slot takes the next request.

    engine = Engine(config, weights, EngineConfig(slots=16, max_length=1024), compute=compute)
    request = engine.submit(prompt, max_tokens=100, choice=Choice(temperature=0.6), on_token=print)
    while engine.step(): ...

There are two ways in. For conversations, prompts enter in chunks between the decoding steps of the others, and take over what
some slot already holds of their beginning (a system prompt, the dialog so far). For many answers at once, whole prompts are
computed together beside the slots, each once however many answers it gets (`EngineConfig.whole`). All programs are compiled by
`warm_up`; none is compiled later. The engine knows token ids only, and belongs to one thread.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from llama_jax.model.cache import KVCache
from llama_jax.model.config import Compute, ModelConfig
from llama_jax.model.decode import Prepared
from llama_jax.parallel.axes import batch_shards
from llama_jax.sampling import slots as device
from llama_jax.sampling.choose import Choice
from llama_jax.sampling.keys import key_data
from llama_jax.sampling.request import EngineConfig, Request, Shape, shape_for

_AHEAD = 8  # waiting requests that are looked at for company, in multiples of the slots


class Engine:
    """Slots, the requests in them and those that wait. Call it inside `jax.set_mesh`, on any mesh.

    On several hosts every process runs it with the same requests: what it does depends on nothing else.
    """

    def __init__(self, config: ModelConfig, weights: Prepared, settings: EngineConfig, *, compute: Compute):
        """`weights` come from `model.decode.prepare`; others may take their place later (`self.weights`)."""
        if settings.max_length > config.max_length:
            raise ValueError(f"engine: max_length {settings.max_length} exceeds the model's context of {config.max_length}")
        mesh = jax.sharding.get_mesh()
        if not mesh.empty and settings.slots % batch_shards(mesh):
            raise ValueError(f"engine: {settings.slots} slots do not divide over {batch_shards(mesh)} shards of the batch")
        self.config, self.settings, self._weights = config, settings, weights
        self.waiting: collections.deque[Request] = collections.deque()
        self._chunks, self._wholes = sorted(settings.chunks), sorted(settings.whole)
        self._requests: list[Request | None] = [None] * settings.slots
        self._held: list[list[int]] = [[] for _ in range(settings.slots)]  # the tokens in each slot's cache
        self._used = [0] * settings.slots  # when each slot was last taken
        self._clock = 0
        self._stale: set[int] = set()  # cancelled, but active on the device
        self._filled: KVCache | None = None  # whole prompts beside the slots
        self._beside: collections.deque[tuple[Request, int]] = collections.deque()  # who waits for which row of them
        self.finished = self.reused_tokens = self.prefilled_tokens = self.drawn_tokens = 0
        self._programs = device.programs(config, compute, settings, mesh)
        self._slots = self._programs.empty()

    @property
    def weights(self) -> Prepared:
        """What the engine computes with. New ones, of another policy, take over nothing that the old ones computed."""
        return self._weights

    @weights.setter
    def weights(self, weights: Prepared) -> None:
        if self.active or self._beside:
            count = self.active + len(self._beside)
            raise RuntimeError(f"engine: {count} requests are under way; new weights come between two runs")
        self._weights = weights
        self._held = [[] for _ in range(self.settings.slots)]

    # ---- requests ----

    def submit(
        self, prompt: Sequence[int], *, max_tokens: int, choice: Choice | None = None, seed: int = 0, index: int = 0,
        key: np.ndarray | None = None, stop_ids: Sequence[int] = (), on_token: Callable[[Request, int], None] | None = None,
        alternatives: int = 0,
    ) -> Request:  # fmt: skip
        """Queues a prompt. Its draws depend on (seed, index), or `key`, alone; `on_token` is called for each token drawn.

        `alternatives` of the most likely tokens are told of beside each drawn one (`Request.most_likely`).

        Raises:
          ValueError: a prompt that does not fit with its answer, ids outside the vocabulary, impossible settings.
        """
        prompt, V = [int(token) for token in prompt], self.config.vocab_size
        room = min(self.settings.max_length - max_tokens, self.settings.longest_prompt)
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
        if not 0 < len(prompt) <= room:
            raise ValueError(
                f"prompt: has {len(prompt)} tokens; expected 1 to {max(room, 0)}, since the context of "
                f"{self.settings.max_length} also holds max_tokens={max_tokens}"
            )
        if not 0 <= min(prompt) <= max(prompt) < V:
            raise ValueError(f"prompt: expected ids in 0..{V - 1}, got {min(prompt)}..{max(prompt)}")
        if len(stop_ids) > self.settings.stops:
            raise ValueError(f"stop_ids: expected at most {self.settings.stops} of this engine, got {len(stop_ids)}")
        if not all(0 <= token < V for token in stop_ids):
            raise ValueError(f"stop_ids: expected ids in 0..{V - 1}, got {list(stop_ids)}")
        if not 0 <= alternatives <= self.settings.alternatives:
            raise ValueError(f"alternatives: expected 0 to {self.settings.alternatives} of this engine, got {alternatives}")
        if key is None:
            key = key_data(seed, [index])[0]
        choice = Choice() if choice is None else choice.check()
        request = Request(prompt, max_tokens, choice, np.asarray(key), tuple(map(int, stop_ids)), on_token, alternatives)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request now; its slot is free for others."""
        if request.finish:
            return
        self._finish(request, "cancelled")
        if request.slot >= 0:
            self._stale.add(request.slot)
            self._requests[request.slot] = None
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            self._beside = collections.deque(pair for pair in self._beside if pair[0] is not request)

    @property
    def active(self) -> int:
        """Requests that sit in a slot."""
        return sum(request is not None for request in self._requests)

    @property
    def queued(self) -> int:
        """Requests that have no slot yet."""
        return len(self.waiting) + len(self._beside)

    @property
    def compilations(self) -> int:
        """Programs compiled so far for these shapes. It does not grow after `warm_up`."""
        return self._programs.compilations

    @property
    def is_warm(self) -> bool:
        """Whether `warm_up` has compiled these shapes, perhaps of another engine."""
        return self._programs.decode._cache_size() > 0

    def warm_up(self) -> "Engine":
        """Compiles every program, on no request."""
        run, nowhere = self._programs, self.settings.slots
        key_data(0, [0])
        for shape in self._wholes:
            self._fill([], shape)
            self._take_rows([])
        for shape in self._chunks:
            self._slots = run.extend(self.weights, self._slots, device.pieces([], shape, nowhere=nowhere))
            self._copy_rows([], shape[1])
        self._sit([])
        self._slots, _ = run.decode(self.weights, self._slots, np.int32(1), np.int32(0), np.bool_(False))
        self._mark(0, [])
        self._slots = run.deactivate(self._slots, np.zeros((self.settings.slots,), bool))
        self._filled = None
        return self

    # ---- one round ----

    def step(self) -> bool:
        """Admits what there is room for (one chunk), then decodes; False if there was nothing to do."""
        if self._stale:
            rows = np.zeros((self.settings.slots,), bool)
            rows[list(self._stale)] = True
            self._slots = self._programs.deactivate(self._slots, rows)
            self._stale.clear()
        self._enter_whole()
        while self._chunks and (entering := self._next_chunk()):
            self._run_chunk(entering)
            if any(request.left for request in entering):  # a long prompt lets the others go on in between
                break
        decoding = [request for request in self._requests if request and request.seated]
        if not decoding:
            return self.active > 0 or self.queued > 0
        # With others waiting, stop as soon as a batch of slots is free for them.
        enough = min(self.queued, self.settings.seats)
        until = max(len(decoding) - enough, 0) if enough else 0
        filling = self.active > len(decoding)
        most = 1 if filling else self.settings.steps
        tell = np.bool_(any(request.alternatives for request in decoding))
        self._slots, drawn = self._programs.decode(self.weights, self._slots, np.int32(most), np.int32(until), tell)
        drawn = jax.device_get(drawn)
        for request in decoding:
            self._take(request, drawn)
        return True

    def answer(
        self, prompts: Iterable[Sequence[int]], *, keys: Iterable[np.ndarray], max_tokens: int, choice: Choice,
        stop_ids: Sequence[int], progress: Callable[[int], None] | None = None,
    ) -> list[Request]:  # fmt: skip
        """Submits prompts, each with its key (`key_data`), and works until all are answered."""
        return self.run(
            [
                self.submit(prompt, max_tokens=max_tokens, choice=choice, key=key, stop_ids=stop_ids)
                for prompt, key in zip(prompts, keys, strict=True)
            ],
            progress=progress,
        )

    def run(self, requests: Iterable[Request], *, progress: Callable[[int], None] | None = None) -> list[Request]:
        """Works until the given requests are finished; gives them back. `progress` is told how many just were."""
        requests = list(requests)
        open_ones, told = collections.deque(request for request in requests if not request.finish), self.finished
        while True:
            while open_ones and open_ones[0].finish:
                open_ones.popleft()
            if progress and self.finished > told:
                progress(self.finished - told)
                told = self.finished
            if not open_ones:
                return requests
            if not self.step() and not all(request.finish for request in open_ones):
                raise RuntimeError("the engine is idle, but not all of the requests were submitted to it")

    # ---- whole prompts, computed beside the slots ----

    def _enter_whole(self) -> None:
        """Seats requests with whole prompts while there are free slots."""
        while self._wholes and self.active < self.settings.slots and (self._beside or self._next_whole()):
            free = [slot for slot in range(self.settings.slots) if self._requests[slot] is None]
            group = []
            for slot in free[: self.settings.seats]:
                if self._beside:
                    request, row = self._beside.popleft()
                    self._place(request, slot, len(request.prompt) - 1)
                    group.append((request, row))
            self._take_rows(group)
            self._sit([request for request, _ in group])

    def _next_whole(self) -> bool:
        """Computes the next different prompts of one shape; False if none waits."""
        shape = shape_for(len(self.waiting[0].prompt) - 1, self._wholes) if self.waiting else None
        if shape is None:  # nobody waits, or the next one enters by chunks
            return False
        rows: dict[tuple[int, ...], int] = {}
        others = []
        for _ in range(min(len(self.waiting), _AHEAD * self.settings.slots)):
            request = self.waiting.popleft()
            prompt = tuple(request.prompt)
            fits = shape_for(len(prompt) - 1, self._wholes) == shape
            if fits and (prompt in rows or len(rows) < shape[1]):
                self._beside.append((request, rows.setdefault(prompt, len(rows))))
            else:
                others.append(request)
        self.waiting.extendleft(reversed(others))
        self._fill(list(rows), shape)
        self.prefilled_tokens += sum(map(len, rows)) - len(rows)
        return True

    def _fill(self, prompts: Sequence[Sequence[int]], shape: Shape) -> None:
        C, G = shape
        tokens, lengths = np.zeros((G, C), np.int32), np.zeros((G,), np.int32)
        for row, prompt in enumerate(prompts):
            lengths[row] = len(prompt) - 1
            tokens[row, : lengths[row]] = prompt[:-1]
        self._filled = self._programs.fill(self.weights, tokens, lengths)

    def _take_rows(self, group: list[tuple[Request, int]]) -> None:
        M = self.settings.seats
        sources, rows = np.zeros((M,), np.int32), np.full((M,), self.settings.slots, np.int32)
        for i, (request, row) in enumerate(group):
            sources[i], rows[i] = row, request.slot
        self._slots = self._programs.take(self._slots, self._filled, sources, rows)

    # ---- prompts in chunks, with what some slot holds already ----

    def _next_chunk(self) -> list[Request]:
        """The requests whose next pieces of prompt enter together: of one shape, unfinished ones first."""
        group = [request for request in self._requests if request and not request.seated]
        if group:
            shape = self._shape(group[0].left)
            return [request for request in group if self._shape(request.left) == shape][: shape[1]]
        shape, copies = None, []
        free = [slot for slot in range(self.settings.slots) if self._requests[slot] is None]
        for request in list(itertools.islice(self.waiting, _AHEAD * self.settings.slots)) if free else []:
            if shape_for(len(request.prompt) - 1, self._wholes):
                continue
            slot, source, common = self._best_slot(request, free)
            this = self._shape(len(request.prompt) - 1 - common)
            if shape is None:
                shape = this
            together = (_common(request.prompt, other.prompt) for other in group)
            worth = self.settings.reuse and max(together, default=0) >= max(common, self.settings.reuse)
            # One whose beginning is just being computed by another comes next, and takes it over.
            if this != shape or worth:
                continue
            self.waiting.remove(request)
            self._place(request, slot, common)
            request.reused = common
            self.reused_tokens += common
            if source != slot and common:
                copies.append((source, slot))
            group.append(request)
            free.remove(slot)
            if len(group) == shape[1] or not free:
                break
        if copies:
            self._copy_rows(copies, shape[1])
        return group

    def _shape(self, left: int) -> Shape:
        return shape_for(left, self._chunks) or self._chunks[-1]

    def _best_slot(self, request: Request, free: list[int]) -> tuple[int, int, int]:
        """(slot to sit in, slot to take the beginning from, how much of it)."""
        oldest = min(free, key=lambda slot: self._used[slot])
        if not self.settings.reuse:
            return oldest, oldest, 0
        commons = [min(_common(request.prompt, held), len(request.prompt) - 1) for held in self._held]
        source = max(range(self.settings.slots), key=lambda slot: (commons[slot], slot in free, -self._used[slot]))
        if commons[source] < self.settings.reuse:
            return oldest, oldest, 0
        # In that slot only if little of what it holds is lost: dialogs with one system message begin alike, and all go on.
        goes_on = source in free and len(self._held[source]) - commons[source] <= self.settings.reuse
        return (source if goes_on else oldest), source, commons[source]

    def _run_chunk(self, group: list[Request]) -> None:
        shape = self._shape(group[0].left)
        if any(request.left for request in group):
            entering = device.pieces(group, shape, nowhere=self.settings.slots)
            self._slots = self._programs.extend(self.weights, self._slots, entering)
            for request, count in zip(group, entering.counts.tolist()):
                self._held[request.slot] += request.prompt[request.filled : request.filled + count]
                request.filled += count
                self.prefilled_tokens += count
        ready = [request for request in group if not request.left]
        for start in range(0, len(ready), self.settings.seats):
            self._sit(ready[start : start + self.settings.seats])

    def _copy_rows(self, pairs: list[tuple[int, int]], size: int) -> None:
        sources, rows = np.zeros((size,), np.int32), np.full((size,), self.settings.slots, np.int32)
        for i, (source, row) in enumerate(pairs):
            sources[i], rows[i] = source, row
        self._slots = self._programs.copy(self._slots, sources, rows)

    # ---- taking seats ----

    def _place(self, request: Request, slot: int, filled: int) -> None:
        """Gives a request a slot whose cache holds, or is about to hold, the first `filled` tokens of its prompt."""
        self._clock += 1
        self._used[slot] = self._clock
        self._requests[slot] = request
        self._stale.discard(slot)  # sitting down ends what was active there
        self._held[slot] = list(request.prompt[:filled])
        request.slot, request.filled = slot, filled

    def _sit(self, group: list[Request]) -> None:
        nowhere, key_shape = self.settings.slots, self._slots.keys.shape[1:]
        entering = device.seats(group, self.settings.seats, nowhere=nowhere, key_shape=key_shape, stops=self.settings.stops)
        self._slots = self._programs.sit(self._slots, entering)
        for request in group:
            request.seated = True
            if request.choice.penalises:
                self._mark(request.slot, request.prompt)

    def _mark(self, slot: int, prompt: Sequence[int]) -> None:
        tokens = np.zeros((self.settings.max_length,), np.int32)
        tokens[: len(prompt)] = prompt
        self._slots = self._programs.set_seen(self._slots, np.int32(slot), tokens, np.int32(len(prompt)))

    # ---- results ----

    def _take(self, request: Request, drawn: device.Drawn) -> None:
        """Hands out what a slot drew; frees it if that was all."""
        if request.finish:  # cancelled by the callback of another, who was told first
            return
        slot, mask = request.slot, drawn.mask[request.slot]
        new, *log_probs = (x[slot][mask].tolist() for x in (drawn.tokens, drawn.log_probs, drawn.model_log_probs))
        self.drawn_tokens += len(new)
        # The cache holds all but the newest token.
        self._held[slot] += [(request.tokens or request.prompt)[-1], *new[:-1]]
        finished = not drawn.active[slot]
        likely = []
        if request.alternatives:
            beside = (x[slot][mask, : request.alternatives].tolist() for x in (drawn.likely_tokens, drawn.likely_log_probs))
            likely = [list(zip(tokens, theirs)) for tokens, theirs in zip(*beside)]
        for i, (token, log_p, model_log_p) in enumerate(zip(new, *log_probs)):
            request.tokens.append(token)
            request.log_probs.append(log_p)
            request.model_log_probs.append(model_log_p)
            request.most_likely += likely[i : i + 1]
            if finished and i == len(new) - 1:
                self._finish(request, "stop" if token in request.stop_ids else "length")
            if request.on_token:
                request.on_token(request, token)
            if request.finish == "cancelled":  # by the callback
                return
        if request.finish:
            self._requests[slot] = None

    def _finish(self, request: Request, how: str) -> None:
        request.finish = how
        self.finished += 1


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common beginning of two lists."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
