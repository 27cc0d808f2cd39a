"""Which settings to compile next when the best are asked for: every likely mesh once, then around the best, then all others."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping

from llama_jax.parallel.mesh import MeshConfig
from llama_jax.planning.stages import model_of, stage_shape
from llama_jax.pretrain.base import StageConfig

# From the least recomputation to the least memory; `offload` stands apart, since its products lie with the host.
REMAT = ("none", "dots", "queries", "attention", "full")

# (tokens that a device works on at a time, remat), from the most memory to the least; each step about halves it.
LADDER = ((16_384, "dots"), (8192, "dots"), (16_384, "attention"), (8192, "attention"), (4096, "full"), (2048, "full"))

# Steps around a good setting: (places in REMAT, factor of the microbatches). First those that save work for memory, then those
# that trade one for the other, then those that save memory.
_STEPS = ((-1, 1.0), (0, 0.5), (-1, 2.0), (1, 0.5), (0, 2.0), (1, 1.0))


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of the search."""

    mesh: MeshConfig
    remat: str
    microbatches: int

    def of(self, config: StageConfig) -> StageConfig:
        """The config with this setting."""
        loop = dataclasses.replace(config.loop, microbatches=self.microbatches)
        compute = dataclasses.replace(config.compute, remat=self.remat)
        return dataclasses.replace(config, mesh=self.mesh, loop=loop, compute=compute)


# What is known of settings: seconds a step, infinity for one that does not fit, None for one whose mesh does not divide it.
Known = Mapping[Setting, float | None]


@dataclasses.dataclass(frozen=True)
class Space:
    """All settings of a config on so many devices; meshes in an order in which good ones come early."""

    meshes: tuple[MeshConfig, ...]
    rows: int  # a step
    tokens: int  # a step and device

    def microbatches(self, mesh: MeshConfig) -> tuple[int, ...]:
        """The numbers of microbatches that leave every device whole rows, ascending."""
        return _divisors(self.rows // (mesh.data * mesh.fsdp))

    def setting(self, mesh: MeshConfig, tokens: int, remat: str) -> Setting:
        """That with the most tokens at a time, up to so many."""
        numbers = self.microbatches(mesh)
        fit = (number for number in numbers if self.tokens <= tokens * number)
        return Setting(mesh, remat, next(fit, numbers[-1]))

    def next(self, known: Known, *, compilations: int) -> Setting | None:
        """What to compile after what is known, when so many programs are compiled in all; None when nothing is left.

        Two thirds of the programs go to the likely meshes, one after the other; then come the neighbours of the best settings
        of the best two meshes; then what remains.
        """
        explored = self._mesh_to_try(known)
        if explored is not None and len(known) < max(2 * compilations // 3, 2):
            return explored
        around = [setting for setting in self._neighbours(known) if _promises(setting, known)]
        # What does not fit on one mesh seldom fits on another: a device works on the same tokens.
        around.sort(key=lambda setting: not _promises(setting, known, on_any_mesh=True))
        rest = (setting for setting in self._all() if _promises(setting, known))
        return next(iter(around), None) or explored or next(rest, None)

    def _mesh_to_try(self, known: Known) -> Setting | None:
        """A mesh with which nothing fitted yet: at the step of LADDER that fits elsewhere, or below.

        While nothing fits anywhere, every mesh takes one step down in turn.
        """
        fitted, failed = -1, -1  # steps of LADDER
        for step, mesh in itertools.product(range(len(LADDER)), self.meshes):
            seconds = known.get(self.setting(mesh, *LADDER[step]))
            failed = step if seconds == math.inf else failed
            fitted = step if fitted < 0 and _fits(seconds) else fitted
        start = fitted if fitted >= 0 else min(failed + 1, len(LADDER) - 1)
        pending: list[tuple[int, Setting]] = []
        for mesh in self.meshes:
            tries = [setting for setting in known if setting.mesh == mesh]
            if any(_fits(known[setting]) for setting in tries):
                continue
            steps = (self.setting(mesh, *step) for step in LADDER[start:])
            found = next((setting for setting in steps if _promises(setting, known)), None)
            if found is not None:
                pending.append((0 if fitted >= 0 else len(tries), found))
        return min(pending, key=lambda pair: pair[0])[1] if pending else None

    def _neighbours(self, known: Known) -> Iterator[Setting]:
        best: dict[MeshConfig, Setting] = {}
        for setting in sorted((s for s, seconds in known.items() if _fits(seconds)), key=known.__getitem__):
            best.setdefault(setting.mesh, setting)
        centres = [setting for setting in list(best.values())[:2] if setting.remat in REMAT]
        for (places, factor), setting in itertools.product(_STEPS, centres):
            place, number = REMAT.index(setting.remat) + places, setting.microbatches * factor
            if 0 <= place < len(REMAT) and number in self.microbatches(setting.mesh):
                yield Setting(setting.mesh, REMAT[place], int(number))
        for setting in centres:
            yield dataclasses.replace(setting, remat="offload")

    def _all(self) -> Iterator[Setting]:
        sizes = dict.fromkeys((*(tokens for tokens, _ in LADDER), 32_768))
        for remat, tokens, mesh in itertools.product((*REMAT[1:], REMAT[0], "offload"), sizes, self.meshes):
            yield self.setting(mesh, tokens, remat)


def _promises(setting: Setting, known: Known, *, on_any_mesh: bool = False) -> bool:
    """Whether it is new, its mesh not refused, and it not surely bigger than one of this mesh that does not fit."""
    if setting in known:
        return False
    for other, seconds in known.items():
        if _fits(seconds) or (other.mesh != setting.mesh and not on_any_mesh):
            continue
        if seconds is None and other.mesh == setting.mesh:
            return False
        if seconds == math.inf and setting.microbatches <= other.microbatches and _keeps_no_less(setting.remat, other.remat):
            return False
    return True


def _keeps_no_less(remat: str, other: str) -> bool:
    return remat == other or ("offload" not in (remat, other) and REMAT.index(remat) < REMAT.index(other))


def space(config: StageConfig, *, devices: int, slices: int = 1) -> Space:
    """The settings of a config on so many devices.

    `data` is the number of slices; what is left goes to fsdp as far as the batch has rows for it, since gathering weights
    costs less than exchanging activations; then to the sequence, then to tensor parallelism, whose products are the smallest.
    Copies of the weights within a slice come last: they save gathers, and cost the memory of a copy.
    """
    shape, model, rows = stage_shape(config), model_of(config), config.loop.batch_size
    found = []
    for copies, sequence, tensor in itertools.product((1, 2, 4), (1, 2, 4, 8, 16), (1, 2, 4, 8)):
        fsdp, left = divmod(devices, slices * copies * sequence * tensor)
        if left or not fsdp or rows % (slices * copies * fsdp) or model.width % fsdp:
            continue
        if config.stage in ("ppo", "grpo") and tensor < config.mesh.tensor:  # generation divides its weights over tensor alone
            continue
        uneven = sequence > 1 and shape.length % (2 * sequence)  # a ring cuts rows into halves of pieces
        if uneven or any(size % tensor for size in (model.heads, model.ffn, model.vocab_size)):
            continue
        order = (copies, sequence * tensor, tensor)
        found.append((order, MeshConfig(data=slices * copies, fsdp=fsdp, sequence=sequence, tensor=tensor)))
    meshes = tuple(mesh for _, mesh in sorted(found, key=lambda pair: pair[0]))
    return Space(meshes, rows, shape.sequences * shape.length // devices)


@functools.cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(divisor for divisor in range(1, number + 1) if number % divisor == 0)


def _fits(seconds: float | None) -> bool:
    return seconds is not None and math.isfinite(seconds)
